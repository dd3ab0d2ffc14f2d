package modaltest_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	modal "github.com/modal-labs/modal-client/go"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	modaltest.MaybeRun()
	goleak.VerifyTestMain(m)
}

// start starts a fake that leaves nothing behind.
func start(t *testing.T, cfg modaltest.Config) *modaltest.Fake {
	t.Helper()
	t.Parallel() // they sleep more than they work
	return startFor(t, cfg)
}

func startFor(t testing.TB, cfg modaltest.Config) *modaltest.Fake {
	t.Helper()
	cfg.Dir = t.TempDir()
	f, err := modaltest.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if left, _ := filepath.Glob(filepath.Join(cfg.Dir, "*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	return f
}

// environment is held while a client looks at its environment: tests run side by side.
var environment sync.Mutex

// client is the SDK, as a program has it, with further variables.
func client(t testing.TB, f *modaltest.Fake, variables ...string) *modal.Client {
	t.Helper()
	environment.Lock()
	for k, v := range f.Environment() {
		os.Setenv(k, v)
	}
	for _, v := range variables {
		k, v, _ := strings.Cut(v, "=")
		os.Setenv(k, v)
		defer os.Unsetenv(k)
	}
	c, err := modal.NewClient()
	environment.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// workspace is a client with an app and a built image.
type workspace struct {
	*modal.Client
	app   *modal.App
	image *modal.Image
}

func prepare(t testing.TB, f *modaltest.Fake, variables ...string) workspace {
	t.Helper()
	c := client(t, f, variables...)
	app, err := c.Apps.FromName(t.Context(), "app", &modal.AppFromNameParams{CreateIfMissing: true})
	if err != nil {
		t.Fatal(err)
	}
	image, err := c.Images.FromRegistry("debian:stable", nil).Build(t.Context(), app, nil)
	if err != nil {
		t.Fatal(err)
	}
	return workspace{Client: c, app: app, image: image}
}

// create makes a sandbox whose handle is given up before the client.
func (w workspace) create(t testing.TB, p *modal.SandboxCreateParams) *modal.Sandbox {
	t.Helper()
	sb, err := w.Sandboxes.Create(t.Context(), w.app, w.image, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sb.Detach() })
	return sb
}

// run runs a script in a sandbox to its end.
func run(t *testing.T, sb *modal.Sandbox, script string) (stdout, stderr string, code int) {
	t.Helper()
	p, err := sb.Exec(t.Context(), []string{"sh", "-c", script}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return finish(t, p)
}

func finish(t *testing.T, p *modal.ContainerProcess) (stdout, stderr string, code int) {
	t.Helper()
	out, err := readAll(t.Context(), p.Stdout)
	if err != nil {
		t.Fatalf("read stdout: %v", err)
	}
	bad, err := readAll(t.Context(), p.Stderr)
	if err != nil {
		t.Fatalf("read stderr: %v", err)
	}
	code, err = p.Wait(t.Context(), nil)
	if err != nil {
		t.Fatalf("wait: %v", err)
	}
	return string(out), string(bad), code
}

// out is what a script says.
func out(t *testing.T, sb *modal.Sandbox, script string) string {
	t.Helper()
	stdout, stderr, code := run(t, sb, script)
	if code != 0 {
		t.Fatalf("%s: exit code %d: %s", script, code, stderr)
	}
	return strings.TrimSpace(stdout)
}

// eventually waits for something that takes a moment.
func eventually(t *testing.T, what string, do func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for !do() {
		select {
		case <-ctx.Done():
			t.Fatalf("%s: it never came to it", what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// processes counts the host's processes that have this word in their arguments.
func processes(t *testing.T, word string) int {
	t.Helper()
	text, err := exec.Command("pgrep", "-fc", "--", word).Output()
	if err != nil && len(text) == 0 {
		t.Fatal(err)
	}
	n := 0
	for _, c := range strings.TrimSpace(string(text)) {
		n = n*10 + int(c-'0')
	}
	return n
}

func TestRunsAProgram(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	sb := w.create(t, nil)
	stdout, stderr, code := run(t, sb, "echo hi; echo bad >&2; exit 42")
	if stdout != "hi\n" || stderr != "bad\n" || code != 42 {
		t.Fatalf("got %q, %q, %d", stdout, stderr, code)
	}
}

func TestSandboxHasARootOfItsOwn(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{}))
	one, two := w.create(t, nil), w.create(t, nil)
	out(t, one, "mkdir /workspace && echo 1 > /workspace/x && echo 1 > /root/x && echo 1 > /usr/local/x && echo 1 > /tmp/x")
	if got := out(t, two, "ls /workspace/x /root/x /usr/local/x /tmp/x 2>&1 | grep -c 'No such file'"); got != "4" {
		t.Errorf("%s of 4 files are not seen by another sandbox", got)
	}
	for _, path := range []string{"/workspace/x", "/root/x", "/usr/local/x"} {
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s is on the host", path)
		}
	}
	if got := out(t, one, "echo $$ > /dev/null; ps -e -o pid= | head -1 | tr -d ' '; hostname; id -u"); !strings.HasPrefix(got, "1\nta-") || !strings.HasSuffix(got, "\n0") {
		t.Errorf("process ids, host name and user are %q", got)
	}
	if got := out(t, one, "mount -t tmpfs x /mnt 2>&1; kill -9 1; echo 1 > /proc/sys/kernel/sysrq; mknod /tmp/d b 8 0; ls /work /home/* 2>&1; true"); strings.Contains(got, "brief") {
		t.Errorf("the host shows: %s", got)
	}
}
