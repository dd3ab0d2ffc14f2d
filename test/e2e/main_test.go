// Package e2e tests the binaries as users run them: a real executord on a unix
// socket, real sandboxes, the public client and executorctl. Its TestMain fails when
// anything is left: processes, control groups, mounts, directories.
package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// binaries is where TestMain puts what it built.
var binaries string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "executord-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	built := os.Getenv(builtIn)
	// An ordinary user's executord is tested too and must reach the binaries.
	if built == "" {
		built = dir
		if err := errors.Join(os.Chmod(dir, 0o755), build(dir)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	binaries = built
	before := traces()
	stopModal, err := startModal(built)
	if err != nil {
		fmt.Fprintln(os.Stderr, errors.Join(err, stopModal()))
		return 1
	}
	code := m.Run()
	if err := errors.Join(leftAtModal(), stopModal()); err != nil {
		fmt.Fprintln(os.Stderr, "Modal:", err)
		code = max(code, 1)
	}
	if code == 0 {
		if left := waitClean(before); len(left) > 0 {
			fmt.Fprintf(os.Stderr, "left behind after all tests:\n%s\n", strings.Join(left, "\n"))
			return 1
		}
	}
	return code
}

// build makes the binaries as `make build` does, without touching bin/.
func build(dir string) error {
	root, err := filepath.Abs("../..")
	if err != nil {
		return err
	}
	guest := filepath.Join(root, "internal/guestbinary/bin/executor-guest")
	for _, args := range [][]string{
		{"-ldflags", "-s -w", "-o", guest, "./cmd/executor-guest"},
		{"-o", dir + "/", "./cmd/executord", "./cmd/executorctl", "./internal/engine/modal/modaltest/fakemodal"},
	} {
		cmd := exec.Command("go", append([]string{"build", "-trimpath"}, args...)...)
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build: %w\n%s", err, out)
		}
	}
	return nil
}

// ours are the names of the control groups that the daemons of these tests use. Other
// packages' tests run beside these; what they have is theirs to look after.
var ours struct {
	sync.Mutex
	names []string
}

// claim notes the group's name of a state directory.
func claim(state string) {
	sum := sha256.Sum256([]byte(state))
	ours.Lock()
	defer ours.Unlock()
	ours.names = append(ours.names, "executord-"+hex.EncodeToString(sum[:4]))
}

// traces is everything that a sandbox of ours could leave on the host.
func traces() []string {
	ours.Lock()
	defer ours.Unlock()
	var found []string
	groups, _ := os.ReadFile("/proc/self/cgroup")
	for _, name := range ours.names {
		for _, root := range []string{"", "unified", "memory", "pids", "cpu", "cpu,cpuacct"} {
			for line := range strings.Lines(string(groups)) {
				fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
				dir := filepath.Join("/sys/fs/cgroup", root, fields[2], name)
				if _, err := os.Stat(dir); err == nil && !slices.Contains(found, dir) {
					found = append(found, dir)
				}
			}
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "/xd-") {
			found = append(found, "mount "+strings.TrimSpace(line))
		}
	}
	for _, file := range loops("/") {
		if strings.Contains(file, "/xd-") {
			found = append(found, "loop device of "+file)
		}
	}
	processes, _ := filepath.Glob("/proc/[0-9]*/cgroup")
	for _, p := range processes {
		text, _ := os.ReadFile(p)
		for _, name := range ours.names {
			if bytes.Contains(text, []byte("/"+name+"/")) {
				found = append(found, filepath.Dir(p)+" executor-guest")
				break
			}
		}
	}
	return found
}

// waitClean waits until nothing is there that was not there before.
func waitClean(before []string) []string {
	var left []string
	for range 100 {
		left = slices.DeleteFunc(traces(), func(s string) bool { return slices.Contains(before, s) })
		if len(left) == 0 {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return left
}

// daemon is a running executord.
type daemon struct {
	t       *testing.T
	dir     string // of state, socket and log
	user    *syscall.Credential
	flags   []string
	process *exec.Cmd
	done    chan struct{}
	log     *os.File
	mu      sync.Mutex
}

// start starts an executord of the test's own; it is terminated at the test's end
// with all that runs in it.
func start(t *testing.T, flags ...string) *daemon {
	t.Helper()
	return startAs(t, nil, flags...)
}

func startAs(t *testing.T, user *syscall.Credential, flags ...string) *daemon {
	t.Helper()
	engine := engineFlags(t)
	// Not t.TempDir: its path is too long for a socket and closed to other users.
	dir, err := os.MkdirTemp("", "xd-")
	if err != nil {
		t.Fatal(err)
	}
	if user != nil {
		if err := os.Chown(dir, int(user.Uid), int(user.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	claim(filepath.Join(dir, "state"))
	d := &daemon{t: t, dir: dir, user: user, flags: append(engine, flags...), log: log}
	d.up()
	t.Cleanup(func() {
		d.stop(syscall.SIGTERM)
		log.Close()
		if t.Failed() {
			text, _ := os.ReadFile(filepath.Join(dir, "log"))
			t.Logf("log of executord:\n%s", tail(text, 8<<10))
		}
		if left, err := os.ReadDir(filepath.Join(dir, "state/local/sandboxes")); err == nil && len(left) > 0 {
			t.Errorf("%d directories of sandboxes are left", len(left))
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return d
}

func tail(b []byte, n int) []byte {
	if len(b) > n {
		return b[len(b)-n:]
	}
	return b
}

func (d *daemon) address() string { return "unix:" + filepath.Join(d.dir, "s") }

// up starts the process and waits until it answers.
func (d *daemon) up() {
	d.t.Helper()
	args := append([]string{
		"serve", "--listen", d.address(), "--state-dir", filepath.Join(d.dir, "state"), "--on-stop", "terminate", "--drain-timeout", "1s",
	}, d.flags...)
	cmd := exec.Command(filepath.Join(binaries, "executord"), args...)
	cmd.Stdout, cmd.Stderr = d.log, d.log
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + d.dir, "DAEMON_CANARY=daemon-secret-7141"}
	cmd.Env = append(cmd.Env, modalEnv...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: d.user}
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	d.mu.Lock()
	d.process, d.done = cmd, done
	d.mu.Unlock()
	c := d.client()
	defer c.Close()
	for range 600 {
		ctx, cancel := context.WithTimeout(d.t.Context(), time.Second)
		_, err := c.Admin().GetServerInfo(ctx, nil)
		cancel()
		if err == nil {
			return
		}
		select {
		case <-done:
			text, _ := os.ReadFile(filepath.Join(d.dir, "log"))
			d.t.Fatalf("executord did not start:\n%s", tail(text, 4<<10))
		case <-time.After(50 * time.Millisecond):
		}
	}
	d.t.Fatal("executord does not answer")
}

// running waits until an execution runs.
func (d *daemon) running(name string) {
	d.t.Helper()
	c := d.client()
	defer c.Close()
	for range 1200 {
		got, err := c.Executor().GetExecution(d.t.Context(), &executorv1.GetExecutionRequest{Name: name})
		if err != nil {
			d.t.Fatal(err)
		}
		if got.GetExecution().GetState() >= executorv1.Execution_STATE_RUNNING {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	d.t.Fatalf("%s does not run", name)
}

// kill ends the process as kill -9 does and waits until it is gone.
func (d *daemon) kill() {
	_ = d.process.Process.Kill()
	<-d.done
}

// stop signals the process and waits until it is gone; it returns its exit code.
func (d *daemon) stop(sig syscall.Signal) int {
	_ = d.process.Process.Signal(sig)
	select {
	case <-d.done:
	case <-time.After(90 * time.Second):
		d.t.Error("executord did not stop")
		d.kill()
	}
	return d.process.ProcessState.ExitCode()
}

func (d *daemon) client() *client.Client {
	d.t.Helper()
	c, err := client.Dial(client.Config{Address: d.address(), MaxOutage: 2 * time.Minute})
	if err != nil {
		d.t.Fatal(err)
	}
	return c
}

// dial is client, closed at the test's end.
func (d *daemon) dial() *client.Client {
	c := d.client()
	d.t.Cleanup(func() { c.Close() })
	return c
}

// ctl runs executorctl and returns what it printed.
func (d *daemon) ctl(args ...string) (stdout, stderr string, code int) {
	d.t.Helper()
	return d.ctlStdin("", args...)
}

func (d *daemon) ctlStdin(stdin string, args ...string) (stdout, stderr string, code int) {
	d.t.Helper()
	cmd := exec.Command(filepath.Join(binaries, "executorctl"), args...)
	cmd.Env = append(os.Environ(), "EXECUTOR_ADDRESS="+d.address())
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		d.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// rss is the resident memory of a process in bytes.
func rss(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	var size, resident int64
	if _, err := fmt.Sscan(string(text), &size, &resident); err != nil {
		t.Fatal(err)
	}
	return resident * int64(os.Getpagesize())
}

// needRoot skips what an ordinary user's host does not allow.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: control groups and other users")
	}
}
