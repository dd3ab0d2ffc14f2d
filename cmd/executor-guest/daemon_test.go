package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/guest/mux"
	"github.com/harvest-run/executord/internal/guestclient"
)

// foreignBox is a box as others make it: a shell script that awaits the guest as first
// process, with a /run of its own. It returns how a program is started in it.
func foreignBox(t *testing.T, file string, env ...string) (enter func(args ...string) *exec.Cmd, box *exec.Cmd) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("makes namespaces")
	}
	const script = `mount -t tmpfs none /run && echo up && exec "$0" "$@"`
	box = exec.Command("unshare", "--mount", "--pid", "--uts", "--ipc", "--net", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, file, "daemon", "the-box", "inherit")
	box.Env = append(os.Environ(), env...)
	out, err := box.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	box.Stderr = os.Stderr
	if err := box.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = box.Process.Kill()
		_ = box.Wait()
	})
	if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
		t.Fatalf("the box: %v", err)
	}
	children, err := os.ReadFile("/proc/" + strconv.Itoa(box.Process.Pid) + "/task/" + strconv.Itoa(box.Process.Pid) + "/children")
	if err != nil {
		t.Fatal(err)
	}
	pid := strings.TrimSpace(string(children))
	return func(args ...string) *exec.Cmd {
		return exec.Command("nsenter", append([]string{"--target", pid, "--mount", "--pid", "--uts", "--ipc", "--net"}, args...)...)
	}, box
}

// dialer is a guestclient.Dialer over the standard input and output of `dial`, which is
// started again when it was ended: it is a process of the box like others.
type dialer struct {
	t     *testing.T
	start func() *exec.Cmd

	session *mux.Session
	cmd     *exec.Cmd
}

func (d *dialer) Dial(ctx context.Context) (net.Conn, error) {
	if d.session != nil {
		if conn, err := d.session.Dial(ctx); err == nil {
			return conn, nil
		}
		d.close()
	}
	cmd := d.start()
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	greeting := make([]byte, len(mux.Greeting))
	if _, err := io.ReadFull(out, greeting); err != nil || string(greeting) != mux.Greeting {
		d.t.Errorf("greeted with %q, %v", greeting, err)
	}
	if d.session, err = mux.Open(stdio{out, in}); err != nil {
		return nil, err
	}
	d.cmd = cmd
	return d.session.Dial(ctx)
}

func (d *dialer) close() {
	d.session.Close()
	_ = d.cmd.Wait() // it may have been killed
	d.session = nil
}

type stdio struct {
	io.Reader
	io.WriteCloser
}

func dialBox(t *testing.T, start func() *exec.Cmd) *guestclient.Client {
	t.Helper()
	d := &dialer{t: t, start: start}
	client := guestclient.New(d)
	t.Cleanup(func() {
		client.Close()
		d.close()
		if state := d.cmd.ProcessState; !state.Success() {
			t.Errorf("dial ended with %v", state)
		}
	})
	return client
}

func TestDaemonInAForeignBox(t *testing.T) {
	file := build(t)
	enter, box := foreignBox(t, file, "A_SECRET=s3cret", "MODAL_TASK_ID=ta-1", "PATH="+os.Getenv("PATH"))
	guest := dialBox(t, func() *exec.Cmd { return enter(file, "dial") })
	run := func(args ...string) guestclient.Outcome {
		t.Helper()
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("too slow"))
		defer cancel()
		out, err := guest.Run(ctx, guestclient.Command{Args: args, Dir: "/", Env: map[string]string{"PATH": "/usr/bin:/bin", "MINE": "1"}, Timeout: 30 * time.Second, Limit: 64 << 10})
		if err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		return out
	}
	if out := run("sh", "-c", "hostname; cat; umask; echo $A_SECRET $MODAL_TASK_ID $MINE $PATH"); string(out.Stdout) != "the-box\n0022\ns3cret 1 /usr/bin:/bin\n" {
		t.Errorf("%q %q", out.Stdout, out.Stderr)
	}
	// A second guest finds the first, and leaves.
	if out, err := enter(file, "daemon", "other").CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("a second daemon: %v, %q", err, out)
	}
	if out := run("hostname"); string(out.Stdout) != "the-box\n" {
		t.Errorf("after a second daemon: %q", out.Stdout)
	}
	for _, signal := range []string{"HUP", "INT", "TERM", "QUIT", "USR1", "PIPE", "SEGV", "KILL"} {
		run("sh", "-c", "kill -"+signal+" 1")
	}
	// Nor does everything at once, which ends the programs, and the way in too.
	run("bash", "-c", "kill -KILL -1; exit 0")
	if out := run("echo", "here"); string(out.Stdout) != "here\n" {
		t.Errorf("after all signals: %q", out.Stdout)
	}
	// A second way in, at the same time.
	second := dialBox(t, func() *exec.Cmd { return enter(file, "dial") })
	if _, err := second.Info(t.Context()); err != nil {
		t.Error(err)
	}
	if err := box.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the box: %v", err)
	}
}

func TestDialWithoutAGuest(t *testing.T) {
	file := build(t)
	cmd := exec.Command("unshare", "--mount", "sh", "-c", `mount -t tmpfs none /run; exec timeout -k 1 60 "$0" dial`, file)
	if os.Geteuid() != 0 {
		t.Skip("makes namespaces")
	}
	out, err := cmd.CombinedOutput()
	if err == nil || cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "no guest answers") {
		t.Errorf("%v, %q", err, out)
	}
	if strings.Contains(string(out), strings.TrimSpace(mux.Greeting)) {
		t.Error("it greeted without a guest")
	}
}
