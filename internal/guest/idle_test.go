package guest

import (
	"context"
	"path/filepath"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"golang.org/x/sys/unix"
)

const idleCause = guestv1.StopCause_STOP_CAUSE_IDLE

// busyTree is a fakeTree that uses a share of a core from a time on until another.
type busyTree struct {
	fakeTree
	begun       time.Time
	from, until time.Duration
	percent     int
	looks       []time.Duration
}

func (f *busyTree) cpu() (user, system time.Duration, ok bool) {
	at := time.Since(f.begun)
	f.looks = append(f.looks, at)
	busy := max(min(at, f.until)-f.from, 0)
	return busy * time.Duration(f.percent) / 100, 0, true
}

// TestIdleTimeout says what counts as activity, and how exactly the end comes.
func TestIdleTimeout(t *testing.T) {
	for name, c := range map[string]struct {
		timeout     time.Duration
		from, until time.Duration
		percent     int
		writes      []time.Duration // when something is written
		input       time.Duration   // when it gets input
		full        time.Duration   // until when its output is not taken
		took, late  time.Duration   // how long it lives, and how much longer it may
	}{
		"nothing happens":           {timeout: 20 * time.Second, took: 20 * time.Second},
		"the shortest":              {timeout: time.Second, took: time.Second},
		"it writes":                 {timeout: 20 * time.Second, writes: []time.Duration{5 * time.Second, 19 * time.Second, 30500 * time.Millisecond}, took: 50500 * time.Millisecond, late: time.Second},
		"it writes too late":        {timeout: 20 * time.Second, writes: []time.Duration{21 * time.Second}, took: 20 * time.Second},
		"it works":                  {timeout: 20 * time.Second, until: time.Minute, percent: 100, took: 80 * time.Second, late: 2 * time.Second},
		"it works with breaks":      {timeout: 20 * time.Second, from: 15 * time.Second, until: 16 * time.Second, percent: 50, took: 36 * time.Second, late: 2 * time.Second},
		"it polls":                  {timeout: 20 * time.Second, until: time.Hour, percent: 0, took: 20 * time.Second},
		"it gets input":             {timeout: 20 * time.Second, input: 7 * time.Second, took: 27 * time.Second},
		"nobody takes what it says": {timeout: 20 * time.Second, full: 50 * time.Second, took: 68 * time.Second, late: 2 * time.Second},
		"a long one":                {timeout: time.Hour, until: time.Minute, percent: 100, took: time.Hour, late: 6 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &busyTree{begun: time.Now(), from: c.from, until: c.until, percent: c.percent}
				cmd, die := fakeCommand(&f.fakeTree)
				cmd.tree, cmd.begun = f, f.begun
				f.onKill = die
				end := &ending{tree: f, found: make(map[int]bool)}
				for _, at := range c.writes {
					time.AfterFunc(at, func() { cmd.spool.add(chunk{block: newStock(0).get(smallestBlock), to: 1}) })
				}
				if c.input > 0 {
					time.AfterFunc(c.input, func() { cmd.touch(time.Now()) })
				}
				if c.full > 0 {
					cmd.spool.waiting = 1
					time.AfterFunc(c.full, func() {
						cmd.spool.mu.Lock()
						defer cmd.spool.mu.Unlock()
						cmd.spool.waiting = 0
					})
				}
				cmd.lead(end, 10*time.Hour, c.timeout, 0)
				if took := time.Since(f.begun); took < c.took || took > c.took+c.late {
					t.Errorf("ended after %v, want %v", took, c.took)
				}
				if end.cause != idleCause {
					t.Errorf("cause %v", end.cause)
				}
				for i, at := range f.looks {
					before := time.Duration(0)
					if i > 0 {
						before = f.looks[i-1]
					}
					if at-before < lookEvery {
						t.Fatalf("looks at %v", f.looks)
					}
				}
				if n, most := len(f.looks), int(time.Since(f.begun)/max(c.timeout/looks, time.Second))+2; n > most {
					t.Errorf("%d looks", n)
				}
			})
		})
	}
}

// TestIdlePrograms has real programs be idle, and not.
func TestIdlePrograms(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		idle := func(id, script string) *guestv1.StartRequest {
			r := g.sh(id, script)
			r.IdleMs, r.TimeoutMs, r.GraceMs = 1500, 60_000, 5000
			return r
		}
		// Idle, but for what its children do for nothing.
		o := g.run(idle("sleeper", "echo x; while :; do sleep 0.2; done"))
		wantStop(t, o, unix.SIGTERM, idleCause, false)
		if string(o.stdout) != "x\n" {
			t.Errorf("%q", o.stdout)
		}
		// One that works longer than it may be idle, without a word.
		o = g.run(idle("worker", "timeout 4 sh -c 'while :; do :; done'; echo done"))
		wantCode(t, o, 0)
		if string(o.stdout) != "done\n" || o.exit.GetStopCause() != guestv1.StopCause_STOP_CAUSE_UNSPECIFIED {
			t.Errorf("%q, %v", o.stdout, o.exit)
		}
		// One that writes now and then.
		o = g.run(idle("talker", "for i in 1 2 3 4 5; do echo $i; sleep 0.7; done"))
		wantCode(t, o, 0)
		// One that does not heed TERM.
		deaf := idle("deaf", "trap '' TERM; while :; do sleep 0.2; done")
		deaf.GraceMs = 300
		wantStop(t, g.run(deaf), unix.SIGKILL, idleCause, true)
	})
}

// TestIdleIsTold answers a read with how long the command has been idle.
func TestIdleIsTold(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		r := g.sh("quiet", "sleep 60")
		r.IdleMs = 30_000
		g.start(r)
		time.Sleep(300 * time.Millisecond)
		first, err := g.Read(t.Context(), "quiet", 0, 1, 0)
		if err != nil {
			t.Fatal(err)
		}
		second, err := g.Read(t.Context(), "quiet", 0, 1, 500*time.Millisecond)
		if err != nil {
			t.Fatal(err)
		}
		if first.Idle < 300*time.Millisecond || second.Idle < first.Idle+500*time.Millisecond {
			t.Errorf("idle for %v, then %v", first.Idle, second.Idle)
		}
		g.start(g.sh("other", "sleep 60"))
		if out, err := g.Read(t.Context(), "other", 0, 1, 10*time.Millisecond); err != nil || out.Idle != 0 {
			t.Errorf("%+v, %v", out, err)
		}
		for _, id := range []string{"quiet", "other"} {
			g.stop(id, 0)
			g.readAll(id, &output{})
			g.release(id)
		}
	})
}

// TestDiscard gives up what a program wrote and goes on writing, so that it ends
// although nobody takes its output.
func TestDiscard(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		const size = 8 << 20
		file := filepath.Join(g.dir, "progress")
		g.start(g.program("flood", "progress", file, strconv.Itoa(size)))
		o := &output{}
		g.read("flood", o)
		first := o.size
		g.read("flood", o)
		const read = 1000 // of what came is taken: the rest is given up with what follows
		eventually(t, "the spool is full", func() bool { return taken(file) > spoolBytes })
		var exit *guestv1.Exit
		for exit == nil {
			out, err := g.Client.Discard(t.Context(), g.full("flood"), read, time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if len(out.Chunks) > 0 || !out.Discarding {
				t.Fatalf("%+v", out)
			}
			exit = out.Exit
		}
		// The second read gave up what the first one told, so that counts as read too.
		if taken := max(first, read); exit.GetCode() != 0 || exit.GetDiscardedBytes() != uint64(size-taken) {
			t.Errorf("%v, read %d", exit, taken)
		}
		// Any position is as good as another now, also after a restart of executord.
		for _, at := range []int64{0, o.size, size, size + 1} {
			out, err := g.Read(t.Context(), "flood", at, 1, 0)
			if err != nil || out.Exit == nil || !out.Discarding || len(out.Chunks) > 0 {
				t.Errorf("read at %d: %+v, %v", at, out, err)
			}
		}
		g.release("flood")
	})
}

// TestAwaitOver tells a reader without room that a command is over, also while its
// output fills the pipes.
func TestAwaitOver(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		file := filepath.Join(g.dir, "progress")
		g.start(g.program("full", "progress", file, strconv.Itoa(8<<20)))
		eventually(t, "the spool is full", func() bool { return taken(file) > spoolBytes })
		out, err := g.Client.AwaitOver(t.Context(), g.full("full"), 50*time.Millisecond)
		if err != nil || out.Over || len(out.Chunks) > 0 {
			t.Fatalf("%+v, %v", out, err)
		}
		g.stop("full", 0)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		if out, err = g.Client.AwaitOver(ctx, g.full("full"), 20*time.Second); err != nil || !out.Over || out.Exit != nil {
			t.Fatalf("%+v, %v", out, err)
		}
		// What it wrote is there.
		o := g.readAll("full", &output{})
		if len(o.stdout) < spoolBytes || string(o.stdout) != string(randomBytes(0, 8<<20)[:len(o.stdout)]) {
			t.Errorf("%d bytes", len(o.stdout))
		}
		g.release("full")
	})
}

func TestParseCPU(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"7 (a) b)) S 1 7 7 0 -1 0 0 0 0 0 100 50 7 3 20 0 1 0 9": 1600 * time.Millisecond,
		"7 (x) S 1 7 7 0 -1 0 0 0 0 0 -1 50 x 99999999999999999": 500 * time.Millisecond,
		"7 (x) S 1": 0, "": 0, ")": 0,
	} {
		if got := parseCPU([]byte(text)); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}
