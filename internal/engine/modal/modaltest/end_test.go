package modaltest_test

import (
	"errors"
	"io"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	modal "github.com/modal-labs/modal-client/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestSignalsFromInsideDoNothingToTheSandbox(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	stdout, stderr, code := run(t, sb, "for n in $(seq 1 31); do kill -$n 1; done; sleep 0.2; kill -TERM $$; echo lives")
	if stdout != "" || stderr != "" || code != 128+15 {
		t.Errorf("got %q, %q, %d", stdout, stderr, code)
	}
}

func TestMemoryLimit(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, &modal.SandboxCreateParams{MemoryMiB: 64, MemoryLimitMiB: 128})
	// What takes too much ends; the sandbox, its neighbours and what takes less do not.
	if _, _, code := run(t, sb, "head -c 300m /dev/zero | tail -c 300m >/dev/null"); code == 0 {
		t.Error("300 MiB fit into 128")
	}
	if got := out(t, sb, "head -c 40m /dev/zero | tail -c 40m | wc -c"); got != "41943040" {
		t.Errorf("40 MiB give %s", got)
	}
}

func TestNoLimitOfMemoryByARequest(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, &modal.SandboxCreateParams{MemoryMiB: 64})
	if got := out(t, sb, "head -c 300m /dev/zero | tail -c 300m | wc -c"); got != "314572800" {
		t.Errorf("300 MiB give %s", got)
	}
}

func TestTheSandboxEndsWithItsProgram(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, &modal.SandboxCreateParams{Command: []string{"sh", "-c", "echo from the start; read x; echo $x; exit 3"}})
	if _, err := io.WriteString(sb.Stdin, "a word\n"); err != nil {
		t.Fatal(err)
	}
	code, err := sb.Wait(t.Context(), nil)
	if err != nil || code != 3 {
		t.Errorf("wait: %d, %v", code, err)
	}
}

func TestOutputOfTheSandboxsProgramAfterItsEnd(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, &modal.SandboxCreateParams{Command: []string{"sh", "-c", "echo last words"}})
	if _, err := sb.Wait(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if text, err := readAll(t.Context(), sb.Stdout); err != nil || string(text) != "last words\n" {
		t.Errorf("read %q, %v", text, err)
	}
}

func TestReadiness(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	byFile, err := modal.NewExecProbe([]string{"test", "-e", "/ready"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	byPort, err := modal.NewTCPProbe(8000, nil)
	if err != nil {
		t.Fatal(err)
	}
	for what, sb := range map[string]*modal.Sandbox{
		"touch /ready": w.create(t, &modal.SandboxCreateParams{ReadinessProbe: byFile}),
		"python3 -m http.server 8000 --directory /etc/ssl >/dev/null 2>&1 & sleep 100": w.create(t, &modal.SandboxCreateParams{ReadinessProbe: byPort}),
	} {
		if err := sb.WaitUntilReady(t.Context(), 300*time.Millisecond, nil); err == nil {
			t.Errorf("%s: ready before", what)
		}
		if _, err := sb.Exec(t.Context(), []string{"sh", "-c", what}, nil); err != nil {
			t.Fatal(err)
		}
		if err := sb.WaitUntilReady(t.Context(), 20*time.Second, nil); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestOutputOfTheSandboxsProgram(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, &modal.SandboxCreateParams{Command: []string{"sh", "-c", "echo from the start; read x; sleep 1000"}})
	line := make([]byte, 15)
	if _, err := io.ReadFull(sb.Stdout, line); err != nil || string(line) != "from the start\n" {
		t.Errorf("read %q, %v", line, err)
	}
	sb.Stdout.Close()
}

func TestLifetimeIsTheLongestADay(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	// The SDK lets 48 h pass; the service does not.
	_, err := w.Sandboxes.Create(t.Context(), w.app, w.image, &modal.SandboxCreateParams{Timeout: 48 * time.Hour})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("two days: %v", err)
	}
	day := w.create(t, &modal.SandboxCreateParams{Timeout: 24 * time.Hour})
	short := w.create(t, nil) // 300 s where nothing is said
	f.Advance(301 * time.Second)
	if code, err := short.Wait(t.Context(), nil); err != nil || code != 124 {
		t.Errorf("five minutes: %d, %v", code, err)
	}
	if code, err := day.Poll(t.Context(), nil); err != nil || code != nil {
		t.Errorf("a day, after five minutes: %v, %v", code, err)
	}
	f.Advance(24 * time.Hour)
	if code, err := day.Wait(t.Context(), nil); err != nil || code != 124 {
		t.Errorf("a day: %d, %v", code, err)
	}
	_, err = day.Exec(t.Context(), []string{"true"}, nil)
	if status.Code(err) != codes.NotFound {
		t.Errorf("exec in what has ended: %v", err)
	}
}

func TestIdleSandboxLooksLikeExitZero(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, &modal.SandboxCreateParams{IdleTimeout: time.Minute, Timeout: time.Hour})
	p, err := sb.Exec(t.Context(), []string{"sh", "-c", "echo up; read x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(p.Stdout, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	f.Advance(10 * time.Minute)
	time.Sleep(150 * time.Millisecond)
	if code, err := sb.Poll(t.Context(), nil); err != nil || code != nil {
		t.Errorf("a program that runs does not keep it: %v, %v", code, err)
	}
	if err := p.Stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, code := finish(t, p); code != 1 {
		t.Errorf("code %d", code)
	}
	f.Advance(2 * time.Minute)
	if code, err := sb.Wait(t.Context(), nil); err != nil || code != 0 {
		t.Errorf("the SDK says %d, %v", code, err)
	}
	if got := f.Sandboxes()[0].Result; got != "IDLE_TIMEOUT" {
		t.Errorf("the service says %s", got)
	}
}

func TestOutputMayBeGoneAfterTheEnd(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	p, err := sb.Exec(t.Context(), []string{"sh", "-c", "echo first; sleep 1000"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(p.Stdout, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Terminate(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(p.Stdout); status.Code(err) != codes.NotFound {
		t.Errorf("read: %v", err)
	}
	if _, err := p.Wait(t.Context(), nil); status.Code(err) != codes.NotFound {
		t.Errorf("wait: %v", err)
	}
	if err := sb.Filesystem.WriteText(t.Context(), "x", "/x", nil); !errors.As(err, new(modal.NotFoundError)) {
		t.Errorf("write: %v", err)
	}
}

func TestExitSnapshot(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, &modal.SandboxCreateParams{ExperimentalOptions: map[string]any{"enable_exit_snapshot": true}})
	out(t, sb, "echo last > /root/words")
	if _, err := sb.Terminate(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	img, err := sb.ExperimentalGetExitSnapshot(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.Sandboxes.Create(t.Context(), w.app, img, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Detach()
	if got := out(t, again, "cat /root/words"); got != "last" {
		t.Errorf("got %q", got)
	}
	plain := w.create(t, nil)
	if _, err := plain.ExperimentalGetExitSnapshot(t.Context(), nil); !errors.As(err, new(modal.InvalidError)) {
		t.Errorf("without the option: %v", err)
	}
}
