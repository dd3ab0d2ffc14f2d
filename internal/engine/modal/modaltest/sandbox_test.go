package modaltest_test

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	modal "github.com/modal-labs/modal-client/go"
)

func TestStandardInput(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	p, err := sb.Exec(t.Context(), []string{"cat"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	for i := range 20 {
		piece := bytes.Repeat([]byte{'a' + byte(i)}, 1+i*5000)
		want.Write(piece)
		if _, err := p.Stdin.Write(piece); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Stdin.Close(); err != nil {
		t.Fatal(err)
	}
	stdout, _, code := finish(t, p)
	if stdout != want.String() || code != 0 {
		t.Fatalf("got %d bytes and code %d, want %d bytes", len(stdout), code, want.Len())
	}
}

func TestTerminate(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	if _, err := sb.Exec(t.Context(), []string{"sh", "-c", "setsid sleep 98761 & sleep 98761"}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "start", func() bool { return processes(t, "^sleep 98761") == 2 })
	if code, err := sb.Poll(t.Context(), nil); err != nil || code != nil {
		t.Fatalf("poll: %v, %v", code, err)
	}
	code, err := sb.Terminate(t.Context(), &modal.SandboxTerminateParams{Wait: true})
	if err != nil || code != 137 {
		t.Fatalf("terminate: %d, %v", code, err)
	}
	if n := processes(t, "^sleep 98761"); n != 0 {
		t.Errorf("%d processes are left", n)
	}
	if _, err := sb.Terminate(t.Context(), nil); err != nil {
		t.Errorf("terminate again: %v", err)
	}
	if code, err := sb.Poll(t.Context(), nil); err != nil || code == nil || *code != 137 {
		t.Errorf("poll: %v, %v", code, err)
	}
}

func TestNamesTagsAndLists(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{PageSize: 2}))
	ctx := t.Context()
	ids := make(map[string]bool)
	for i := range 5 {
		tags := map[string]string{"all": "yes", "odd": string(rune('0' + i%2))}
		sb := w.create(t, &modal.SandboxCreateParams{Name: "name-" + string(rune('a'+i)), Tags: tags})
		ids[sb.SandboxID] = i%2 == 1
		if got, err := sb.GetTags(ctx, nil); err != nil || !maps.Equal(got, tags) {
			t.Errorf("tags %v, %v", got, err)
		}
	}
	list := func(tags map[string]string) (got []string) {
		all, err := w.Sandboxes.List(ctx, &modal.SandboxListParams{AppID: w.app.AppID, Tags: tags})
		if err != nil {
			t.Fatal(err)
		}
		for sb, err := range all {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, sb.SandboxID)
		}
		return got
	}
	if got := list(map[string]string{"all": "yes"}); len(got) != 5 || !slices.IsSortedFunc(got, func(a, b string) int { return -strings.Compare(a, b) }) {
		t.Errorf("all: %v", got)
	}
	odd := list(map[string]string{"odd": "1"})
	if len(odd) != 2 || !ids[odd[0]] || !ids[odd[1]] {
		t.Errorf("odd: %v", odd)
	}

	_, err := w.Sandboxes.Create(ctx, w.app, w.image, &modal.SandboxCreateParams{Name: "name-a"})
	if !errors.As(err, new(modal.AlreadyExistsError)) {
		t.Errorf("a name that is taken: %v", err)
	}
	sb, err := w.Sandboxes.FromName(ctx, "app", "name-a", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Detach()
	if got := out(t, sb, "echo $MODAL_SANDBOX_ID"); got != sb.SandboxID {
		t.Errorf("it is %s, not %s", got, sb.SandboxID)
	}
	if _, err := sb.Terminate(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Sandboxes.FromName(ctx, "app", "name-a", nil); !errors.As(err, new(modal.NotFoundError)) {
		t.Errorf("the name of one that has ended: %v", err)
	}
	if sb, err := w.Sandboxes.FromName(ctx, "app", "name-a", &modal.SandboxFromNameParams{IncludeTerminated: true}); err != nil || sb.SandboxID == "" {
		t.Errorf("with those that have ended: %v", err)
	}
	w.create(t, &modal.SandboxCreateParams{Name: "name-a"})
	if err := sb.SetTags(ctx, map[string]string{"new": "1"}, nil); err != nil {
		t.Error(err)
	}
}

func TestFilesystemCalls(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	ctx, files := t.Context(), sb.Filesystem
	big := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	if err := files.WriteBytes(ctx, big, "/deep/in/there", nil); err != nil {
		t.Fatal(err)
	}
	if got, err := files.ReadBytes(ctx, "/deep/in/there", nil); err != nil || !bytes.Equal(got, big) {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
	if info, err := files.Stat(ctx, "/deep/in/there", nil); err != nil || info.Size != int64(len(big)) || info.Type != modal.FileTypeFile || info.Mode != 0o644 {
		t.Errorf("stat: %+v, %v", info, err)
	}
	if got, err := files.ListFiles(ctx, "/deep", nil); err != nil || len(got) != 1 || got[0].Name != "in" || got[0].Type != modal.FileTypeDirectory {
		t.Errorf("list: %+v, %v", got, err)
	}
	if _, err := files.ReadText(ctx, "/missing", nil); !errors.As(err, new(modal.SandboxFilesystemNotFoundError)) {
		t.Errorf("read what is missing: %v", err)
	}
	if _, err := files.ReadText(ctx, "/deep", nil); !errors.As(err, new(modal.SandboxFilesystemIsADirectoryError)) {
		t.Errorf("read a directory: %v", err)
	}
	if err := files.WriteText(ctx, "x", "/deep", nil); !errors.As(err, new(modal.SandboxFilesystemIsADirectoryError)) {
		t.Errorf("write a directory: %v", err)
	}
	if err := files.WriteText(ctx, "x", "/deep/in/there/x", nil); !errors.As(err, new(modal.SandboxFilesystemNotADirectoryError)) {
		t.Errorf("write below a file: %v", err)
	}
	if err := files.Remove(ctx, "/deep", nil); !errors.As(err, new(modal.SandboxFilesystemDirectoryNotEmptyError)) {
		t.Errorf("remove a full directory: %v", err)
	}
	if err := files.MakeDirectory(ctx, "/deep/in", &modal.SandboxFilesystemMakeDirectoryParams{CreateParents: new(bool)}); !errors.As(err, new(modal.SandboxFilesystemPathAlreadyExistsError)) {
		t.Errorf("make what is there: %v", err)
	}
	out(t, sb, "echo target > /target && ln -s /target /link")
	if err := files.WriteText(ctx, "new", "/link", nil); err != nil {
		t.Fatal(err)
	}
	if got := out(t, sb, "cat /target; test -h /link || cat /link"); got != "target\nnew" {
		t.Errorf("a link that was written to: %q", got)
	}
	if err := files.Remove(ctx, "/deep", &modal.SandboxFilesystemRemoveParams{Recursive: true}); err != nil {
		t.Error(err)
	}
}

func TestProgramsAreEndedByTheirTimeout(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	p, err := sb.Exec(t.Context(), []string{"sleep", "100"}, &modal.SandboxExecParams{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	// The wait has to run when the time is over: one that is begun later fails.
	if code, err := p.Wait(t.Context(), nil); code != 137 && !errors.As(err, new(modal.ExecTimeoutError)) {
		t.Errorf("got %d, %v", code, err)
	}
}

func TestMissingProgram(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	p, err := sb.Exec(t.Context(), []string{"no-such-program"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := finish(t, p); code != 127 || !strings.Contains(stderr, "no-such-program") {
		t.Errorf("got %d, %q", code, stderr)
	}
}

func TestTerminal(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	p, err := sb.Exec(t.Context(), []string{"sh", "-c", "tty; stty size; read x; echo got $x >&2"}, &modal.SandboxExecParams{PTY: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(p.Stdin, "word\n"); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code := finish(t, p)
	if want := "/dev/pts/0\r\n24 80\r\nword\r\ngot word\r\n"; code != 0 || stderr != "" || !strings.Contains(stdout, "24 80") || !strings.HasSuffix(stdout, "got word\r\n") {
		t.Errorf("got %d, %q, %q; want something like %q", code, stdout, stderr, want)
	}
}
