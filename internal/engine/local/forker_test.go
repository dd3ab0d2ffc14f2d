package local

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
)

func mustLive(t *testing.T, sb engine.Sandbox, id string) {
	t.Helper()
	if out, err := runPython(t.Context(), sb, id, `print("alive")`); err != nil || out.stdout != "alive\n" {
		t.Errorf("sandbox %s: %v, %v", sb.ID(), out, err)
	}
}

// Whoever kills the process that forks guests ends none of them, and the next guest is
// forked by another.
func TestForkerIsKilled(t *testing.T) {
	e := newEngine(t)
	before := sandboxFor(t, e, engine.Spec{ID: "before"})
	killed := e.forker.process.Pid
	if err := syscall.Kill(killed, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	mustLive(t, before, "one")
	after := sandboxFor(t, e, engine.Spec{ID: "after"})
	mustLive(t, after, "one")
	mustLive(t, before, "two")
	if now := e.forker.process.Pid; now == killed || alive(killed) {
		t.Errorf("process %d was killed, %d forks", killed, now)
	}
	if s, err := os.Stat("/proc/" + strconv.Itoa(killed)); err == nil {
		t.Errorf("the one that was killed is left as a zombie: %v", s)
	}
}

// One that hangs holds up a create for as long as that is willing to wait, and no other.
func TestForkerHangs(t *testing.T) {
	e := newEngine(t)
	before := sandboxFor(t, e, engine.Spec{ID: "before"})
	if err := syscall.Kill(e.forker.process.Pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	cause := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, cause)
	defer cancel()
	waiting, gaveUp := context.WithCancelCause(t.Context())
	gaveUp(cause)
	if sb, err := e.Create(ctx, engine.Spec{ID: "hangs"}); !errors.Is(err, cause) {
		t.Errorf("%v, %v, want the context's cause", sb, err)
	}
	if sb, err := e.Create(waiting, engine.Spec{ID: "gave-up"}); !errors.Is(err, cause) {
		t.Errorf("%v, %v, want the context's cause", sb, err)
	}
	mustLive(t, sandboxFor(t, e, engine.Spec{ID: "hangs"}), "one")
	mustLive(t, before, "one")
}

// It ends with the engine, and by itself with the process that the engine is in.
func TestForkerEnds(t *testing.T) {
	cfg := testConfig(t)
	e := openEngine(t, cfg)
	sb, err := e.Create(t.Context(), engine.Spec{ID: "stays"})
	if err != nil {
		t.Fatal(err)
	}
	mustLive(t, sb, "one")
	// As the kernel closes all that executord has when it dies.
	pid := e.forker.process.Pid
	e.forker.socket.Close()
	await(t, "it ends by itself", func() bool { return !alive(pid) })
	mustLive(t, sb, "two")
	sandboxFor(t, e, engine.Spec{ID: "another"})
	pid = e.forker.process.Pid
	if _, err := sb.Terminate(t.Context()); err != nil {
		t.Error(err)
	}
	t.Cleanup(func() { // after the other sandbox is gone
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		if alive(pid) {
			t.Error("it outlives its engine")
		}
	})
	t.Cleanup(func() {
		if sb, err := e.Open(context.Background(), "another"); err == nil {
			_, _ = sb.Terminate(context.Background()) // looked at by its own clean-up
		}
	})
}

// Guests that were forked by a process that is gone are still known when they end.
func TestOrphansEnd(t *testing.T) {
	e := newEngine(t)
	sb := sandboxFor(t, e, engine.Spec{ID: "orphan"})
	if err := syscall.Kill(e.forker.process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "its parent is gone", func() bool { return !alive(e.forker.process.Pid) })
	if err := syscall.Kill(sb.(*sandbox).process.pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-sb.Done():
	case <-time.After(time.Minute):
		t.Fatal("its end is not seen")
	}
}

func TestManyAtOnce(t *testing.T) {
	e := newEngine(t)
	var all sync.WaitGroup
	for i := range 12 {
		all.Go(func() {
			sb, err := e.Create(t.Context(), engine.Spec{ID: "many-" + strconv.Itoa(i)})
			if err != nil {
				t.Error(err)
				return
			}
			if out, err := runPython(t.Context(), sb, "hello", `import os; print(os.uname().nodename)`); err != nil || out.stdout != sb.ID()+"\n" {
				t.Errorf("%v, %v", out, err)
			}
			if _, err := sb.Terminate(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

// A guest gets nothing of executord's: not its environment, its files, its protection
// from the out-of-memory killer, or what is in its memory.
func TestGuestGetsNothing(t *testing.T) {
	needRoot(t)
	t.Setenv("EXECUTORD_TEST_SECRET", "canary")
	old, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-7"), 0); err != nil {
		t.Skipf("cannot be protected here: %v", err)
	}
	defer func() { _ = os.WriteFile("/proc/self/oom_score_adj", old, 0) }()
	e := newEngine(t)
	sb := sandboxFor(t, e, engine.Spec{ID: "bare"})
	for name, pid := range map[string]int{"the process that forks guests": e.forker.process.Pid, "the guest": sb.(*sandbox).process.pid} {
		proc := filepath.Join("/proc", strconv.Itoa(pid))
		if text, err := os.ReadFile(filepath.Join(proc, "environ")); err != nil || len(text) != 0 {
			t.Errorf("%s has the environment %q, %v", name, text, err)
		}
		if text, err := os.ReadFile(filepath.Join(proc, "oom_score_adj")); err != nil || strings.TrimSpace(string(text)) != "0" {
			t.Errorf("%s has the score %q, %v", name, text, err)
		}
		for _, fd := range []string{"0", "1", "2"} {
			if link, err := os.Readlink(filepath.Join(proc, "fd", fd)); err != nil || !strings.HasSuffix(link, "/null") {
				t.Errorf("descriptor %s of %s: %q, %v", fd, name, link, err)
			}
		}
		s, err := os.ReadFile(filepath.Join(proc, "statm"))
		if err != nil {
			t.Fatal(err)
		}
		if resident := atoi(t, strings.Fields(string(s))[1]) * os.Getpagesize(); resident > 24<<20 {
			t.Errorf("%s has %d bytes in memory", name, resident)
		}
	}
}
