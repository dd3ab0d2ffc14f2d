package modaltest_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	modal "github.com/modal-labs/modal-client/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Each of these is a fact about the SDK that stands in reference/modal.md as proved.

func TestTrapSequencesOfCalls(t *testing.T) {
	f := start(t, modaltest.Config{})
	ctx := t.Context()
	expect := func(what string, want ...string) {
		t.Helper()
		if got := f.Calls(); !slices.Equal(got, want) {
			t.Errorf("%s:\n got %v\nwant %v", what, got, want)
		}
		f.ResetCounts()
	}
	c := client(t, f)
	app, err := c.Apps.FromName(ctx, "app", &modal.AppFromNameParams{CreateIfMissing: true})
	if err != nil {
		t.Fatal(err)
	}
	expect("first call, app", "CP.AuthTokenGet", "CP.AppGetOrCreate")
	image, err := c.Images.FromRegistry("debian", nil).DockerfileCommands([]string{"ENV A=1"}, nil).Build(ctx, app, nil)
	if err != nil {
		t.Fatal(err)
	}
	expect("image of two layers", "CP.EnvironmentGetOrCreate", "CP.ImageGetOrCreate", "CP.ImageGetOrCreate")
	sb, err := c.Sandboxes.Create(ctx, app, image, &modal.SandboxCreateParams{Name: "n", Env: map[string]string{"B": "2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sb.Detach() })
	expect("create", "CP.SandboxCreateV2")
	p, err := sb.Exec(ctx, []string{"sh", "-c", "echo $A$B"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	expect("exec", "TCR.TaskExecStart")
	if got, err := io.ReadAll(p.Stdout); err != nil || string(got) != "12\n" {
		t.Errorf("read %q, %v", got, err)
	}
	expect("read", "TCR.TaskExecStdioRead")
	if _, err := p.Wait(ctx, nil); err != nil {
		t.Error(err)
	}
	expect("wait", "TCR.TaskExecWait")
	again, err := c.Sandboxes.FromID(ctx, sb.SandboxID, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = again.Detach() })
	expect("from id")
	if _, err := again.Exec(ctx, []string{"true"}, nil); err != nil {
		t.Fatal(err)
	}
	expect("first exec of a handle", "CP.SandboxGetTaskIdV2", "CP.SandboxGetCommandRouterAccess", "TCR.TaskExecStart")
	if _, err := c.Sandboxes.FromName(ctx, "app", "n", nil); err != nil {
		t.Error(err)
	}
	expect("from name", "CP.SandboxGetFromNameV2")
	if _, err := c.Sandboxes.FromName(ctx, "app", "other", nil); err == nil {
		t.Error("found what is not there")
	}
	expect("from a name that is not there", "CP.SandboxGetFromNameV2", "CP.SandboxGetFromName")
	if err := sb.Filesystem.MakeDirectory(ctx, "/d", nil); err != nil {
		t.Error(err)
	}
	expect("make directory", "TCR.TaskExecStart", "TCR.TaskExecWait")
	if _, err := sb.Filesystem.Stat(ctx, "/d", nil); err != nil {
		t.Error(err)
	}
	expect("stat", "TCR.TaskExecStart", "TCR.TaskExecWait", "TCR.TaskExecStdioRead")
	if _, err := sb.SnapshotFilesystem(ctx, nil); err != nil {
		t.Error(err)
	}
	expect("snapshot", "TCR.TaskSnapshotFilesystem")
	if err := sb.ReloadVolumes(ctx, nil); err != nil {
		t.Error(err)
	}
	expect("reload", "TCR.TaskReloadVolumes")
	if _, err := sb.Terminate(ctx, &modal.SandboxTerminateParams{Wait: true}); err != nil {
		t.Error(err)
	}
	expect("terminate", "CP.SandboxTerminateV2", "CP.SandboxWaitV2")
}

func TestTrapRouterConnectionsOutliveTheClient(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	out(t, sb, "true")
	w.Close()
	if got := out(t, sb, "echo still"); got != "still" {
		t.Errorf("got %q", got)
	}
	if err := sb.Detach(); err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Exec(t.Context(), []string{"true"}, nil); !errors.As(err, new(modal.ClientClosedError)) {
		t.Errorf("after Detach: %v", err)
	}
}

func TestTrapGPUsAreOfTheFirstBackend(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	f.ResetCounts()
	sb := w.create(t, &modal.SandboxCreateParams{GPU: "T4:2", Env: map[string]string{"A": "1"}, Tags: map[string]string{"k": "v"}})
	if got := out(t, sb, "echo $A"); got != "1" {
		t.Errorf("got %q", got)
	}
	if n := len(sb.SandboxID); n != len("sb-")+22 {
		t.Errorf("id %s", sb.SandboxID)
	}
	if f.Counts()["CP.SandboxCreate"] != 1 || f.Counts()["CP.SandboxCreateV2"] != 0 {
		t.Errorf("calls %v", f.Calls())
	}
	if got := f.Sandboxes()[0].GPU; got != "T4" {
		t.Errorf("gpu %q", got)
	}
	if code, err := sb.Terminate(t.Context(), &modal.SandboxTerminateParams{Wait: true}); err != nil || code != 137 {
		t.Errorf("terminate: %d, %v", code, err)
	}
}

func TestTrapFromIDNeverFails(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb, err := w.Sandboxes.FromID(t.Context(), "sb-01ARZ3NDEKTSV4RRFFQ69G5FAV", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Poll(t.Context(), nil); status.Code(err) != codes.NotFound {
		t.Errorf("poll: %v", err)
	}
}

func TestTrapWaitIsHeld(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	f.ResetCounts()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := sb.Wait(ctx, nil); err == nil {
		t.Error("it has ended")
	}
	if n := f.Counts()["CP.SandboxWaitV2"]; n != 1 {
		t.Errorf("%d calls in 300 ms", n)
	}
}

func TestTrapContextsDoNotKill(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	p, err := sb.Exec(ctx, []string{"sh", "-c", "read x; echo $x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := p.Wait(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("wait: %v", err)
	}
	if _, err := io.WriteString(p.Stdin, "alive\n"); err != nil {
		t.Fatal(err)
	}
	if stdout, _, code := finish(t, p); stdout != "alive\n" || code != 0 {
		t.Errorf("got %q, %d", stdout, code)
	}
}

func TestTrapOnlyCloseEndsARead(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	p, err := sb.Exec(t.Context(), []string{"sleep", "1000"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(200*time.Millisecond, func() { p.Stdout.Close() })
	if _, err := io.ReadAll(p.Stdout); err == nil || !strings.Contains(err.Error(), "context canceled") {
		t.Errorf("got %v", err)
	}
}

func TestTrapWaitAfterTheTimeoutFails(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	p, err := sb.Exec(t.Context(), []string{"true"}, &modal.SandboxExecParams{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond)
	if _, err := p.Wait(t.Context(), nil); !errors.As(err, new(modal.ExecTimeoutError)) {
		t.Errorf("a program that exited 0: %v", err)
	}
}

func TestTrapArgumentsHaveALimit(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	if _, err := sb.Exec(t.Context(), []string{"echo", strings.Repeat("x", 65536)}, nil); !errors.As(err, new(modal.InvalidError)) {
		t.Errorf("got %v", err)
	}
	p, err := sb.Exec(t.Context(), []string{"sh", "-c", "echo ${#A}"}, &modal.SandboxExecParams{Env: map[string]string{"A": strings.Repeat("x", 100_000)}})
	if err != nil {
		t.Fatal(err)
	}
	if stdout, _, _ := finish(t, p); stdout != "100000\n" {
		t.Errorf("a large environment: %q", stdout)
	}
}

func TestTrapImageBuilds(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	build := func(command string) (*modal.Image, error) {
		return w.Images.FromRegistry("debian", nil).DockerfileCommands([]string{command}, nil).Build(t.Context(), w.app, nil)
	}
	f.DelayBuilds(200 * time.Millisecond)
	f.ResetCounts()
	img, err := build("RUN apt-get install -y git")
	if err != nil || f.Counts()["CP.ImageJoinStreaming"] == 0 {
		t.Errorf("a build that takes time: %v, %v", err, f.Calls())
	}
	f.DelayBuilds(0)
	same, err := build("RUN apt-get install -y git")
	if err != nil || same.ImageID != img.ImageID {
		t.Errorf("built again: %v", err)
	}
	f.RefuseBuilds("exit code 100")
	if _, err := build("RUN false"); !errors.As(err, new(modal.RemoteError)) || !strings.Contains(err.Error(), "exit code 100") {
		t.Errorf("refused: %v", err)
	}
	if _, err := w.Images.FromID(t.Context(), "im-01ARZ3NDEKTSV4RRFFQ69G5FAV", nil); !errors.As(err, new(modal.NotFoundError)) {
		t.Errorf("no such image: %v", err)
	}
}

func TestTrapReadersResumeAfterTheConnectionWasIdle(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f, "MODAL_SANDBOX_CHANNEL_IDLE_TIMEOUT=0.1")
	sb := w.create(t, nil)
	p, err := sb.Exec(t.Context(), []string{"sh", "-c", "echo first; read x; echo second"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(p.Stdout, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(400 * time.Millisecond)
	if _, err := io.WriteString(p.Stdin, "\n"); err != nil {
		t.Fatal(err)
	}
	if stdout, _, _ := finish(t, p); stdout != "second\n" {
		t.Errorf("got %q", stdout)
	}
	if n := f.Counts()["TCR.TaskExecStdioRead"]; n < 3 { // twice stdout, stderr
		t.Errorf("%d streams", n)
	}
}

func TestTrapOutputIsKeptForEveryReader(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	p, err := sb.Exec(t.Context(), []string{"sh", "-c", "seq 1 100000; (sleep 0.3; echo late) & echo end >&2"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if code, err := p.Wait(t.Context(), nil); err != nil || code != 0 { // before anything is read
		t.Fatalf("wait: %d, %v", code, err)
	}
	stdout, stderr, _ := finish(t, p)
	if len(stdout) != 588895 || stderr != "end\n" {
		t.Errorf("got %d bytes and %q", len(stdout), stderr)
	}
	if got := f.Sandboxes()[0].Spooled; got != 588895+4 {
		t.Errorf("%d bytes are kept", got)
	}
}
