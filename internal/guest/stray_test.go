package guest

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// alive says whether a process is there, other than as a zombie.
func alive(pid int) bool {
	p, err := readProcess(pid)
	return err == nil && p.alive
}

// pids reads what scripts wrote as "pid N".
func pids(t *testing.T, text []byte) []int {
	t.Helper()
	var all []int
	for line := range strings.Lines(string(text)) {
		var pid int
		if n, _ := fmt.Sscanf(line, "pid %d", &pid); n == 1 {
			all = append(all, pid)
		}
	}
	return all
}

// TestStrays leaves processes behind in all the ways there are.
func TestStrays(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		for name, c := range map[string]struct {
			script string
			strays int
		}{
			"a child":                   {"sleep 60 & echo pid $!", 1},
			"a child without the pipes": {"sleep 60 <&- >&- 2>&- & echo pid $!", 1},
			"another session":           {"setsid -f bash -c 'echo pid $$; exec sleep 60'; sleep 0.1", 1},
			"double fork and session":   {"(setsid bash -c '(bash -c \"echo pid \\$\\$; exec sleep 60\") & exit' &) ; sleep 0.2", 1},
			"ignores all it can":        {"bash -c 'trap \"\" TERM HUP INT; echo pid $$; while :; do sleep 0.01; done' & sleep 0.1", 1},
			"stopped":                   {"sleep 60 & kill -STOP $!; echo pid $!", 1},
			"several":                   {"for i in 1 2 3 4 5; do sleep 60 & echo pid $!; done", 5},
		} {
			t.Run(name, func(t *testing.T) {
				begun := time.Now()
				id := strings.ReplaceAll(name, " ", "-")
				o := g.run(g.sh(id, c.script))
				wantCode(t, o, 0)
				if took := time.Since(begun); took > 20*time.Second {
					t.Errorf("the end came after %v", took)
				}
				left := pids(t, o.stdout)
				if len(left) != c.strays {
					t.Fatalf("%d processes were left, want %d: %q %q", len(left), c.strays, o.stdout, o.stderr)
				}
				for _, pid := range left {
					if alive(pid) {
						t.Errorf("process %d is left", pid)
						_ = unix.Kill(pid, unix.SIGKILL)
					}
				}
				if e := o.exit; int(e.GetReaped()) < c.strays || !e.GetTreeEmpty() || e.GetKilled() || e.GetStopCause() != noCause {
					t.Errorf("%v, want %d reaped", e, c.strays)
				}
			})
		}
		eventually(t, "no child and no zombie", func() bool {
			all, _ := g.children()
			return len(all) == 0
		})
	})
}

// TestHeadlessStray leaves a process whose first thread has ended; it looks like a
// zombie and runs.
func TestHeadlessStray(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		r := g.program("x", "headless")
		r.Args = append([]string{"/bin/bash", "-c", `"$@" > out & until grep -q headless out; do sleep 0.02; done; cat out`, "-"}, r.GetArgs()...)
		o := g.run(r)
		wantCode(t, o, 0)
		var pid int
		if _, err := fmt.Sscanf(string(o.stdout), "headless %d", &pid); err != nil {
			t.Fatalf("%q: %v", o.stdout, err)
		}
		if alive(pid) {
			t.Errorf("process %d is left", pid)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		if !o.exit.GetTreeEmpty() || o.exit.GetReaped() != 1 {
			t.Errorf("%v", o.exit)
		}
	})
}

// TestOrphansAreReaped makes orphans while the command runs.
func TestOrphansAreReaped(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		g.start(g.sh("x", "for ((i = 0; i < 200; i++)); do (sleep 0.0$((i % 10)) &); done; sleep 0.2; echo ready; sleep 60"))
		o := &output{}
		g.readUntil("x", o, "ready\n")
		eventually(t, "only the leader is a child", func() bool {
			all, zombies := g.children()
			return len(all) == 1 && zombies == 0
		})
		g.stop("x", 0)
		g.readAll("x", o)
		g.release("x")
	})
}

// TestTreesAreApart ends one command beside another.
func TestTreesAreApart(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		g.start(g.sh("stays", "setsid -f sleep 60; sleep 60 & echo ready; wait; wait"))
		o := &output{}
		g.readUntil("stays", o, "ready\n")
		for i := range 5 {
			wantCode(t, g.run(g.sh(fmt.Sprint("goes-", i), "setsid -f sleep 60; sleep 60 &")), 0)
		}
		if out, err := g.Read(t.Context(), "stays", o.size, 100, 0); err != nil || out.Exit != nil {
			t.Errorf("the other command ended too: %v, %v", out, err)
		}
		g.stop("stays", time.Minute)
		wantStop(t, g.readAll("stays", o), unix.SIGTERM, requestedCause, false)
		g.release("stays")
	})
}

// TestEndIsNotDelayed compares commands that leave something behind with others that
// do not: only the former may take as long as the window for last words.
func TestEndIsNotDelayed(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		const n = 10
		times := make(map[string]time.Duration)
		for _, script := range []string{"echo x", "sleep 60 & echo x"} {
			begun := time.Now()
			for i := range n {
				wantCode(t, g.run(g.sh(fmt.Sprint("x", i), script)), 0)
			}
			times[script] = time.Since(begun)
		}
		plain, left := times["echo x"], times["sleep 60 & echo x"]
		if left < n*drainWindow || plain >= left {
			t.Errorf("%d ends took %v, with a child left behind %v", n, plain, left)
		}
	})
}

// TestTailOfTee loses nothing of what a process writes that outlives its shell for a
// moment.
func TestTailOfTee(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		var want bytes.Buffer
		for i := 1; i <= 20000; i++ {
			fmt.Fprintln(&want, i)
		}
		for i := range 5 {
			o := g.run(g.sh(fmt.Sprint("tee-", i), "exec > >(tee f); seq 20000; exit 3"))
			wantCode(t, o, 3)
			if !bytes.Equal(o.stdout, want.Bytes()) {
				t.Fatalf("%d bytes of %d", len(o.stdout), want.Len())
			}
			if o.exit.GetReaped() > 1 || !o.exit.GetTreeEmpty() {
				t.Errorf("%v", o.exit)
			}
		}
	})
}

// TestTailOfTeeForSlowReader is the same when it is the reader who keeps the tee
// waiting, for longer than the window for last words.
func TestTailOfTeeForSlowReader(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		const size = 3 << 20
		g.start(g.sh("x", fmt.Sprintf("exec > >(tee f); head -c %d /dev/zero; exit 3", size)))
		o := &output{}
		for o.exit == nil {
			out, err := g.Read(t.Context(), "x", o.size, 32<<10, 20*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			o.add(out)
			out.Release()
			if o.size > size/4 {
				time.Sleep(15 * time.Millisecond)
			}
		}
		wantCode(t, o, 3)
		if o.size != size {
			t.Errorf("%d bytes of %d", o.size, size)
		}
		g.release("x")
	})
}

// TestEndlessStray leaves a process that writes for ever; the end must come although
// it keeps the reader busy.
func TestEndlessStray(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		o := g.run(g.sh("x", "yes & echo pid $! >&2; sleep 0.05"))
		wantCode(t, o, 0)
		if left := pids(t, o.stderr); len(left) != 1 || alive(left[0]) {
			t.Errorf("%v is left", left)
		}
		if e := o.exit; !e.GetTreeEmpty() || e.GetReaped() != 1 {
			t.Errorf("%v", e)
		}
	})
}

// TestPipeHeldByAnotherCommand hands the pipe of one command to another, which is not
// ended with it.
func TestPipeHeldByAnotherCommand(t *testing.T) {
	for _, what := range []string{"hold", "flood"} {
		t.Run(what, func(t *testing.T) {
			overTrees(t, func(t *testing.T, g *guestProcess) {
				path := filepath.Join(g.dir, "s")
				g.start(g.program("keep", "keep", path, what))
				kept := &output{}
				g.readUntil("keep", kept, "listening\n")
				o := g.run(g.program("give", "give", path, "100"))
				wantCode(t, o, 0)
				if !bytes.Contains(o.stdout, randomBytes(3, 100)) {
					t.Errorf("output %.100q", o.stdout)
				}
				if e := o.exit; !e.GetTreeEmpty() || e.GetReaped() != 0 {
					t.Errorf("%v", e)
				}
				g.stop("keep", 0)
				g.readAll("keep", kept)
				g.release("keep")
			})
		})
	}
}

// TestHeldPipeOfUnreadCommand is the same when the reader comes only after the pipe
// was given up: what was written before must still come.
func TestHeldPipeOfUnreadCommand(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		const size = spoolBytes + 50<<10 // fills the spool and most of a pipe
		path := filepath.Join(g.dir, "s")
		g.start(g.program("keep", "keep", path, "hold"))
		kept := &output{}
		g.readUntil("keep", kept, "listening\n")
		started, err := g.Start(t.Context(), g.program("give", "give", path, fmt.Sprint(size)))
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the program ends", func() bool { return !alive(int(started.GetPid())) })
		time.Sleep(holderPatience + holderPatience/2)
		o := g.readAll("give", &output{})
		wantCode(t, o, 0)
		if !bytes.Equal(o.stdout, randomBytes(3, size)) {
			t.Errorf("%d bytes, want %d", len(o.stdout), size)
		}
		g.release("give")
		g.stop("keep", 0)
		g.readAll("keep", kept)
		g.release("keep")
	})
}
