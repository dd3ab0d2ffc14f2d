package local

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func atoi(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestStatOf(t *testing.T) {
	self, err := statOf(os.Getpid())
	if err != nil || self.ticks == 0 {
		t.Errorf("of this process: %+v, %v", self, err)
	}
	for _, pid := range []int{0, -1, 1 << 30} {
		if _, err := statOf(pid); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("of process %d: %v", pid, err)
		}
	}
	// A name may look like anything.
	odd := filepath.Join(t.TempDir(), ") Z 1 1 1 (")
	text, err := os.ReadFile("/usr/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(odd, text, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(odd, "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if s, err := statOf(cmd.Process.Pid); err != nil || s.ticks < self.ticks {
		t.Errorf("of a process with an odd name: %+v, %v", s, err)
	}
	p, err := findProcess(cmd.Process.Pid, self.ticks, mustBoot(t))
	if !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("found by another's time: %v, %v", p, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	await(t, "it is a zombie", func() bool { return !alive(cmd.Process.Pid) })
	zombie := mustStat(t, cmd.Process.Pid)
	if p, err := findProcess(cmd.Process.Pid, zombie.ticks, mustBoot(t)); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("a zombie was found alive: %v, %v", p, err)
	}
	if err := cmd.Wait(); !errors.Is(err, syscall.ECHILD) {
		t.Errorf("%v, want that it was reaped already", err)
	}
	if _, err := statOf(cmd.Process.Pid); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("of a process that was reaped: %v", err)
	}
}

func TestProcess(t *testing.T) {
	pidfd := -1
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := watchProcess(cmd.Process.Pid, pidfd)
	if err != nil {
		t.Fatal(err)
	}
	defer p.fd.Close()
	cause := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, cause)
	defer cancel()
	if err := p.wait(ctx); !errors.Is(err, cause) {
		t.Errorf("wait: %v, want the context's cause", err)
	}
	found, err := findProcess(p.pid, mustStat(t, p.pid).ticks, mustBoot(t))
	if err != nil {
		t.Fatal(err)
	}
	defer found.fd.Close()
	found.kill()
	if err := found.wait(t.Context()); err != nil {
		t.Errorf("wait: %v", err)
	}
	if err := cmd.Wait(); !errors.Is(err, syscall.ECHILD) {
		t.Errorf("%v, want that it was reaped already", err)
	}
	found.kill() // of what is gone is no harm
}

func mustStat(t *testing.T, pid int) stat {
	t.Helper()
	s, err := statOf(pid)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestDescendants(t *testing.T) {
	cmd := exec.Command("bash", "-c", "(sleep 1000 & sleep 1000 & wait) & (exec setsid bash -c 'sleep 1000 & wait') & wait")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Two shells below the first, and three that sleep.
	await(t, "five processes run", func() bool { return descendants(cmd.Process.Pid) == 5 })
	if n := descendants(1 << 30); n != 0 {
		t.Errorf("of nobody: %d", n)
	}
	below := children(t, cmd.Process.Pid)
	for _, pid := range append(below, cmd.Process.Pid) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	_ = cmd.Wait()
	// The orphans come to this process, which took them on in TestMain.
	for _, pid := range below {
		await(t, "an orphan is gone", func() bool {
			_, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil)
			_, err := os.Stat("/proc/" + strconv.Itoa(pid))
			return errors.Is(err, fs.ErrNotExist)
		})
	}
}

// children are the descendants' ids.
func children(t *testing.T, pid int) []int {
	t.Helper()
	out, _ := exec.Command("ps", "-e", "-o", "pid=,ppid=").Output()
	below := map[int]bool{pid: true}
	var all []int
	for range 4 {
		for line := range strings.Lines(string(out)) {
			f := strings.Fields(line)
			if id := atoi(t, f[0]); below[atoi(t, f[1])] && !below[id] {
				below[id] = true
				all = append(all, id)
			}
		}
	}
	return all
}

func TestFindListener(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if _, err := findListener(path); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("no socket: %v", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	p, err := findListener(path)
	if err != nil || p.pid != os.Getpid() {
		t.Fatalf("%+v, %v, want this process", p, err)
	}
	p.fd.Close()
	l.Close()
	if _, err := findListener(path); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("nobody listens: %v", err)
	}
}
