package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guestclient"
	"golang.org/x/sys/unix"
)

// limited is a request with a limit of open files.
func limited(r *guestv1.StartRequest, n uint64) *guestv1.StartRequest {
	r.OpenFiles = n
	return r
}

func TestOpenFiles(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		own := openFilesOf(t, g.pid)
		before := g.run(g.sh("before", "ulimit -Sn; ulimit -Hn"))
		o := g.run(limited(g.sh("limited", `ulimit -Sn; ulimit -Hn; bash -c 'ulimit -n'
grep -E "^(TracerPid|State)" /proc/$$/status
for ((i = 3; i < 64; i++)); do eval "exec $i</dev/null" || { echo "stopped at $i"; exit 7; }; done`), 24))
		wantCode(t, o, 7)
		if want := "24\n24\n24\nState:\tS (sleeping)\nTracerPid:\t0\nstopped at 24\n"; string(o.stdout) != want {
			t.Errorf("stdout %q, stderr %q, want %q", o.stdout, o.stderr, want)
		}
		after := g.run(g.sh("after", "ulimit -Sn; ulimit -Hn"))
		if string(after.stdout) != string(before.stdout) {
			t.Errorf("a command without a limit has %q after one with, before %q", after.stdout, before.stdout)
		}
		if now := openFilesOf(t, g.pid); now != own {
			t.Errorf("the guest has %q, before %q", now, own)
		}
	})
}

// openFilesOf is what the kernel says of the limit of a process.
func openFilesOf(t *testing.T, pid int) string {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(limit)
}

// What cannot be started is told as without a limit, and leaves nothing.
func TestOpenFilesStartRefused(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		text := filepath.Join(g.dir, "text")
		if err := os.WriteFile(text, []byte("no program"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]struct {
			request *guestv1.StartRequest
			kind    guestv1.Error_Kind
		}{
			"missing":     {limited(g.request("missing", "/no/such/program"), 64), guestv1.Error_KIND_NO_SUCH_PROGRAM},
			"no program":  {limited(g.request("text", text), 64), guestv1.Error_KIND_NOT_EXECUTABLE},
			"a directory": {limited(g.request("directory", "/"), 64), guestv1.Error_KIND_NOT_EXECUTABLE},
			"more than the kernel has": {
				limited(g.request("more", "/bin/true"), 1<<40), guestv1.Error_KIND_INTERNAL,
			},
		} {
			_, err := g.Start(t.Context(), c.request)
			if kind := guestclient.KindOf(err); kind != c.kind {
				t.Errorf("%s: %v, %v, want %v", name, kind, err, c.kind)
			}
		}
		eventually(t, "nothing is left", func() bool { all, _ := g.children(); return len(all) == 0 })
		wantCode(t, g.run(limited(g.sh("then", "exit 3"), 64)), 3)
	})
}

// A program that is signalled while it starts does not hang, and ends as the signal says.
func TestHoldOfSignalled(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGKILL, syscall.SIGTERM, syscall.SIGSTOP, syscall.SIGCONT} {
		for i := range 40 {
			// Now and then the signal's stop comes before that of the start.
			pid, err := syscall.ForkExec("/bin/sleep", []string{"sleep", "0"}, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: true, Ptrace: true}})
			if err != nil {
				t.Fatal(err)
			}
			for range i % 3 {
				_ = syscall.Kill(pid, sig)
			}
			if err := hold(pid); err != nil {
				t.Errorf("signal %d: %v", sig, err)
			}
			_ = syscall.Kill(pid, sig)
			if err := letGo(pid); err != nil {
				t.Errorf("signal %d: %v", sig, err)
			}
			if sig == syscall.SIGSTOP {
				_ = syscall.Kill(pid, syscall.SIGCONT)
			}
			var status syscall.WaitStatus
			if _, err := syscall.Wait4(pid, &status, 0, nil); err != nil {
				t.Fatal(err)
			}
			goesOn := sig == syscall.SIGSTOP || sig == syscall.SIGCONT
			if goesOn && !(status.Exited() && status.ExitStatus() == 0) || !goesOn && status.Signal() != sig {
				t.Errorf("signal %d: ended with %#x", sig, status)
			}
		}
	}
}

func TestHoldFails(t *testing.T) {
	if err := hold(1); err == nil { // no child of the test's
		t.Error("held a process that is not ours")
	}
	if err := letGo(1 << 22); err != nil {
		t.Errorf("one that is gone: %v", err)
	}
	buried(1 << 22)
}

// A limit costs a start a small part of what it takes.
func TestOpenFilesCost(t *testing.T) {
	g := startDaemon(t, "proc")
	var plain, held time.Duration
	for i := range 40 {
		for _, n := range []uint64{0, 64} {
			id := fmt.Sprintf("cost-%d-%d", n, i)
			began := time.Now()
			o := g.run(limited(g.request(id, "/bin/true"), n))
			if took := time.Since(began); n == 0 {
				plain += took
			} else {
				held += took
			}
			wantCode(t, o, 0)
			g.release(id)
		}
	}
	if held > 3*plain {
		t.Errorf("40 commands took %v with a limit, %v without", held, plain)
	}
	t.Logf("40 commands: %v with a limit, %v without", held, plain)
}

// A terminal is not in the way, and its signals reach the program.
func TestOpenFilesOnTerminal(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		o := g.run(limited(g.onTerminal("terminal", "ulimit -Hn; test -t 0 && kill -INT $$; echo no"), 32))
		wantSignal(t, o, unix.SIGINT)
		if string(o.stdout) != "32\r\n" {
			t.Errorf("%q", o.stdout)
		}
	})
}
