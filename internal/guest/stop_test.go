package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guestclient"
	"golang.org/x/sys/unix"
)

const (
	timeoutCause   = guestv1.StopCause_STOP_CAUSE_TIMEOUT
	requestedCause = guestv1.StopCause_STOP_CAUSE_REQUESTED
	noCause        = guestv1.StopCause_STOP_CAUSE_UNSPECIFIED
	// ignoreTerm is a script that only KILL ends; its child ignores TERM too.
	ignoreTerm = "trap '' TERM; echo ready; while :; do sleep 0.05; done"
)

func wantStop(t *testing.T, o *output, sig unix.Signal, cause guestv1.StopCause, killed bool) {
	t.Helper()
	wantSignal(t, o, sig)
	if e := o.exit; e.GetStopCause() != cause || e.GetKilled() != killed || !e.GetTreeEmpty() {
		t.Errorf("%v; want cause %v, killed %v and an empty tree", e, cause, killed)
	}
}

func TestTimeout(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		t.Run("TERM is heeded", func(t *testing.T) {
			r := g.sh("heeds", "echo begun; exec sleep 60")
			r.TimeoutMs, r.GraceMs = 200, 60_000
			o := g.run(r)
			wantStop(t, o, unix.SIGTERM, timeoutCause, false)
			if run := o.exit.GetRunMicros(); run < 200_000 || run > 30_000_000 {
				t.Errorf("ran %d µs with a time-out of 200 ms", run)
			}
			if string(o.stdout) != "begun\n" {
				t.Errorf("output %q", o.stdout)
			}
		})
		t.Run("TERM is ignored", func(t *testing.T) {
			r := g.sh("ignores", ignoreTerm)
			r.TimeoutMs, r.GraceMs = 200, 200
			o := g.run(r)
			wantStop(t, o, unix.SIGKILL, timeoutCause, true)
			if run := o.exit.GetRunMicros(); run < 400_000 {
				t.Errorf("ran %d µs with a time-out and a grace of 200 ms each", run)
			}
			if o.exit.GetReaped() < 1 {
				t.Errorf("reaped %d", o.exit.GetReaped())
			}
		})
		t.Run("TERM is answered with a code", func(t *testing.T) {
			r := g.sh("answers", "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.02; done")
			r.TimeoutMs, r.GraceMs = 300, 60_000
			o := g.run(r)
			wantCode(t, o, 3)
			if o.exit.GetStopCause() != timeoutCause || o.exit.GetKilled() || string(o.stdout) != "ready\nbye\n" {
				t.Errorf("%v, %q", o.exit, o.stdout)
			}
		})
		t.Run("no grace", func(t *testing.T) {
			r := g.sh("graceless", "trap 'echo bye' TERM; while :; do sleep 0.02; done")
			r.TimeoutMs = 200
			o := g.run(r)
			wantStop(t, o, unix.SIGKILL, timeoutCause, true)
			if len(o.stdout) != 0 {
				t.Errorf("TERM was sent: %q", o.stdout)
			}
		})
		t.Run("a stopped process", func(t *testing.T) {
			r := g.sh("frozen", "kill -STOP $$; echo on; sleep 60")
			r.TimeoutMs, r.GraceMs = 200, 60_000
			wantStop(t, g.run(r), unix.SIGTERM, timeoutCause, false)
		})
		t.Run("a stopped process that ignores TERM", func(t *testing.T) {
			r := g.sh("frozen2", "trap '' TERM; kill -STOP $$; while :; do kill -STOP $$; done")
			r.TimeoutMs, r.GraceMs = 200, 100
			wantStop(t, g.run(r), unix.SIGKILL, timeoutCause, true)
		})
		t.Run("not reached", func(t *testing.T) {
			r := g.sh("quick", "echo done")
			r.TimeoutMs, r.GraceMs = 60_000, 60_000
			o := g.run(r)
			wantCode(t, o, 0)
			if o.exit.GetStopCause() != noCause {
				t.Errorf("%v", o.exit)
			}
		})
		t.Run("reached by its children alone", func(t *testing.T) {
			r := g.sh("children", "trap '' TERM; sleep 60 & exec sleep 0.05")
			r.TimeoutMs, r.GraceMs = 60_000, 60_000
			o := g.run(r)
			wantCode(t, o, 0)
			if e := o.exit; e.GetStopCause() != noCause || e.GetKilled() || e.GetReaped() != 1 || !e.GetTreeEmpty() {
				t.Errorf("%v", e)
			}
		})
	})
}

func TestStop(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		t.Run("TERM reaches the whole tree", func(t *testing.T) {
			g.start(g.sh("all", "trap 'echo leader >> log; wait; exit 5' TERM; (trap 'echo child >> log; exit' TERM; echo ready; while :; do sleep 0.02; done) & while :; do sleep 0.02; done"))
			o := &output{}
			g.readUntil("all", o, "ready\n")
			g.stop("all", time.Minute)
			wantCode(t, g.readAll("all", o), 5)
			g.release("all")
			log, _ := os.ReadFile(filepath.Join(g.dir, "log"))
			if s := string(log); !strings.Contains(s, "child\n") || !strings.Contains(s, "leader\n") || o.exit.GetStopCause() != requestedCause {
				t.Errorf("%q, %v", s, o.exit)
			}
		})
		t.Run("twice, sooner", func(t *testing.T) {
			g.start(g.sh("sooner", ignoreTerm))
			o := &output{}
			g.readUntil("sooner", o, "ready\n")
			g.stop("sooner", time.Hour)
			g.stop("sooner", 50*time.Millisecond)
			wantStop(t, g.readAll("sooner", o), unix.SIGKILL, requestedCause, true)
			g.release("sooner")
		})
		t.Run("twice, later", func(t *testing.T) {
			g.start(g.sh("later", ignoreTerm))
			o := &output{}
			g.readUntil("later", o, "ready\n")
			g.stop("later", 100*time.Millisecond)
			g.stop("later", time.Hour)
			wantStop(t, g.readAll("later", o), unix.SIGKILL, requestedCause, true)
			g.release("later")
		})
		t.Run("sooner than the grace of a time-out", func(t *testing.T) {
			r := g.sh("hurry", "trap 'echo asked' TERM; echo ready; while :; do sleep 0.02; done")
			r.TimeoutMs, r.GraceMs = 300, 3_600_000
			g.start(r)
			o := &output{}
			g.readUntil("hurry", o, "asked\n")
			g.stop("hurry", 0)
			wantStop(t, g.readAll("hurry", o), unix.SIGKILL, timeoutCause, true)
			g.release("hurry")
		})
		t.Run("after the end", func(t *testing.T) {
			g.start(g.sh("after", "exit 4"))
			o := g.readAll("after", &output{})
			g.stop("after", 0)
			again := g.readAll("after", &output{})
			wantCode(t, again, 4)
			if o.exit.String() != again.exit.String() {
				t.Errorf("the end changed from %v to %v", o.exit, again.exit)
			}
			g.release("after")
		})
		t.Run("unknown", func(t *testing.T) {
			if err := g.Stop(t.Context(), "unknown", 0); guestclient.KindOf(err) != guestv1.Error_KIND_NOT_FOUND {
				t.Error(err)
			}
		})
		t.Run("strays that ignore TERM have the grace", func(t *testing.T) {
			g.start(g.sh("strays", "trap 'exit 0' TERM; (trap '' TERM; echo ready; sleep 0.3; echo last) & while :; do sleep 0.02; done"))
			o := &output{}
			g.readUntil("strays", o, "ready\n")
			g.stop("strays", time.Minute)
			wantCode(t, g.readAll("strays", o), 0)
			if string(o.stdout) != "ready\nlast\n" || o.exit.GetKilled() {
				t.Errorf("%q, %v", o.stdout, o.exit)
			}
			g.release("strays")
		})
		t.Run("while strays have the grace", func(t *testing.T) {
			started, err := g.Start(t.Context(), g.sh("cut", "trap 'exit 0' TERM; (trap '' TERM; echo ready; sleep 60) & while :; do sleep 0.02; done"))
			if err != nil {
				t.Fatal(err)
			}
			o := &output{}
			g.readUntil("cut", o, "ready\n")
			g.stop("cut", time.Hour)
			eventually(t, "the leader is gone", func() bool { return !alive(int(started.GetPid())) })
			g.stop("cut", 0)
			wantCode(t, g.readAll("cut", o), 0)
			if !o.exit.GetKilled() {
				t.Errorf("%v", o.exit)
			}
			g.release("cut")
		})
	})
}

// TestStopDuringStart orders the end while the start is on its way.
func TestStopDuringStart(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		for i := range 30 {
			id := fmt.Sprint("racer-", i)
			var both sync.WaitGroup
			both.Go(func() {
				for {
					err := g.Stop(t.Context(), id, 0)
					if guestclient.KindOf(err) != guestv1.Error_KIND_NOT_FOUND {
						if err != nil {
							t.Error(err)
						}
						return
					}
				}
			})
			g.start(g.sh(id, "sleep 60"))
			both.Wait()
			wantStop(t, g.readAll(id, &output{}), unix.SIGKILL, requestedCause, true)
			g.release(id)
		}
	})
}

// TestStopUnreadCommand stops a command again and again whose output nobody reads:
// the one who stops it is the one who would read.
func TestStopUnreadCommand(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		const size = 8 << 20
		file := filepath.Join(g.dir, "progress")
		g.start(g.program("full", "progress", file, strconv.Itoa(size)))
		eventually(t, "the spool is full", func() bool { return taken(file) > spoolBytes })
		ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
		defer cancel()
		for i := range 5 {
			if err := g.Stop(ctx, "full", time.Duration(5-i)*time.Millisecond); err != nil {
				t.Fatalf("stop %d: %v", i, err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		o := g.readAll("full", &output{})
		if o.exit.GetStopCause() != requestedCause {
			t.Errorf("%v", o.exit)
		}
		data := randomBytes(0, size)
		if len(o.stdout) == 0 || len(o.stdout) >= size || string(o.stdout) != string(data[:len(o.stdout)]) {
			t.Errorf("%d bytes that are not the first of those written", len(o.stdout))
		}
		g.release("full")
	})
}

// TestIdle counts how often a guest wakes up that has nothing to do: one command runs
// and is silent, another has ended and its output waits for a reader.
func TestIdle(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		file := filepath.Join(g.dir, "progress")
		g.start(g.sh("silent", "sleep 60"))
		g.start(g.program("unread", "progress", file, strconv.Itoa(8<<20)))
		eventually(t, "the spool is full", func() bool { return taken(file) > spoolBytes })
		g.stop("unread", 0)
		time.Sleep(holderPatience + holderPatience/2) // what is done once is done
		before := wakeups(t, g.pid)
		time.Sleep(time.Second)
		if n := wakeups(t, g.pid) - before; n > 60 {
			t.Errorf("woke up %d times in a second", n)
		}
		g.stop("silent", 0)
		for _, id := range []string{"silent", "unread"} {
			g.readAll(id, &output{})
			g.release(id)
		}
	})
}

// wakeups is how often the threads of a process went to sleep by themselves.
func wakeups(t *testing.T, pid int) int {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	total := 0
	for _, file := range files {
		text, _ := os.ReadFile(file)
		_, after, _ := strings.Cut(string(text), "\nvoluntary_ctxt_switches:")
		n := 0
		_, _ = fmt.Sscan(after, &n)
		total += n
	}
	return total
}
