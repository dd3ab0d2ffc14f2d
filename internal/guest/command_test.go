package guest

import (
	"errors"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// fakeTree is a tree without processes. Its methods may be called while a test
// changes it.
type fakeTree struct {
	mu     sync.Mutex
	pids   []int // none of which exists
	err    error
	kills  int
	immune bool // to KILL
	onKill func()
}

func (f *fakeTree) set(pids ...int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pids = pids
}

func (f *fakeTree) adopt(*syscall.SysProcAttr) {}
func (f *fakeTree) started(int)                {}
func (f *fakeTree) remove()                    {}

func (f *fakeTree) processes() ([]int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.pids), f.err
}

func (f *fakeTree) kill(patience time.Duration) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kills++
	if f.immune {
		time.Sleep(patience)
		return false
	}
	f.pids = nil
	if f.onKill != nil {
		f.onKill()
	}
	return true
}

func (f *fakeTree) cpu() (time.Duration, time.Duration, bool) { return 0, 0, false }

// These ids are above the largest that the kernel gives.
const (
	fakeLeader = 1<<22 + 1 + iota
	fakeStray
	fakeStray2
)

// fakeCommand is a command whose leader ends when it is told to.
func fakeCommand(f *fakeTree) (c *command, die func()) {
	c = newCommand("x")
	c.tree, c.pid = f, fakeLeader
	died := make(chan death, 1)
	c.died = died
	f.set(fakeLeader)
	return c, func() { died <- death{when: time.Now()} }
}

func newEnding(f *fakeTree) *ending { return &ending{tree: f, found: make(map[int]bool)} }

func TestLead(t *testing.T) {
	type step struct {
		after time.Duration
		do    func(c *command, f *fakeTree, die func())
	}
	dies := func(_ *command, f *fakeTree, die func()) { f.set(); die() }
	stop := func(grace time.Duration) func(*command, *fakeTree, func()) {
		return func(c *command, _ *fakeTree, _ func()) { c.stop(requestedCause, grace) }
	}
	for name, c := range map[string]struct {
		timeout, grace time.Duration
		steps          []step
		took           time.Duration
		want           ending
		kills          int
	}{
		"ends by itself":                   {steps: []step{{time.Minute, dies}}, took: time.Minute},
		"ends before its time-out":         {timeout: time.Hour, steps: []step{{time.Minute, dies}}, took: time.Minute},
		"time-out without grace":           {timeout: time.Minute, took: time.Minute, want: ending{cause: timeoutCause, killed: true}, kills: 1},
		"time-out and grace":               {timeout: time.Minute, grace: time.Second, took: time.Minute + time.Second, want: ending{cause: timeoutCause, killed: true}, kills: 1},
		"time-out, heeds TERM":             {timeout: time.Minute, grace: time.Hour, steps: []step{{61 * time.Second, dies}}, took: 61 * time.Second, want: ending{cause: timeoutCause}},
		"stop without grace":               {steps: []step{{time.Second, stop(0)}}, took: time.Second, want: ending{cause: requestedCause, killed: true}, kills: 1},
		"a second stop can come sooner":    {steps: []step{{time.Second, stop(time.Hour)}, {time.Second, stop(time.Second)}}, took: 3 * time.Second, want: ending{cause: requestedCause, killed: true}, kills: 1},
		"a second stop cannot come later":  {steps: []step{{time.Second, stop(time.Minute)}, {time.Second, stop(time.Hour)}}, took: 61 * time.Second, want: ending{cause: requestedCause, killed: true}, kills: 1},
		"a stop in the grace of a timeout": {timeout: time.Minute, grace: time.Hour, steps: []step{{70 * time.Second, stop(time.Second)}}, took: 71 * time.Second, want: ending{cause: timeoutCause, killed: true}, kills: 1},
		"a time-out in the grace of a stop": {
			timeout: time.Minute, grace: time.Second, steps: []step{{50 * time.Second, stop(time.Hour)}},
			took: 61 * time.Second, want: ending{cause: requestedCause, killed: true}, kills: 1,
		},
		"many stops at once": {
			steps: []step{{time.Second, func(c *command, _ *fakeTree, _ func()) {
				for i := range 1000 {
					c.stop(requestedCause, time.Hour-time.Duration(i)*time.Second)
				}
			}}},
			took: time.Second + time.Hour - 999*time.Second, want: ending{cause: requestedCause, killed: true}, kills: 1,
		},
		"a stop for one that ended by itself": {
			steps: []step{{time.Second, func(c *command, f *fakeTree, die func()) {
				f.set() // a zombie, which nobody has reaped yet
				c.stop(requestedCause, 0)
				synctest.Wait()
				die()
			}}},
			took: time.Second,
		},
		"a stop for a zombie that is not told": {
			// A process that traces the leader keeps its end from us until it is killed.
			steps: []step{{time.Second, func(c *command, f *fakeTree, die func()) {
				f.set(fakeStray)
				f.onKill = die
				c.stop(requestedCause, 0)
			}}},
			took: time.Second + killPatience, want: ending{cause: requestedCause, killed: true}, kills: 1,
		},
		"KILL that takes long": {
			steps: []step{{time.Second, func(c *command, f *fakeTree, die func()) {
				f.immune = true
				c.stop(requestedCause, 0)
			}}, {time.Hour, dies}},
			took: time.Hour + time.Second, want: ending{cause: requestedCause, killed: true}, kills: 1,
		},
		"a tree that cannot be looked at": {
			steps: []step{{time.Second, func(c *command, f *fakeTree, _ func()) {
				f.mu.Lock()
				f.err = errors.New("too many open files")
				f.mu.Unlock()
				c.stop(requestedCause, time.Second)
			}}},
			took: 2 * time.Second, want: ending{cause: requestedCause, killed: true}, kills: 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeTree{}
				cmd, die := fakeCommand(f)
				f.onKill = die
				end := newEnding(f)
				var script sync.WaitGroup
				script.Go(func() {
					for _, s := range c.steps {
						time.Sleep(s.after)
						s.do(cmd, f, die)
					}
				})
				begun := time.Now()
				d := cmd.lead(end, c.timeout, 0, c.grace)
				if took := time.Since(begun); took != c.took || !d.when.Equal(time.Now()) {
					t.Errorf("ended after %v, want %v", took, c.took)
				}
				if end.cause != c.want.cause || end.killed != c.want.killed || f.kills != c.kills {
					t.Errorf("cause %v, killed %v with %d KILLs; want %v, %v with %d", end.cause, end.killed, f.kills, c.want.cause, c.want.killed, c.kills)
				}
				script.Wait()
			})
		})
	}
}

func TestAwaitStrays(t *testing.T) {
	for name, c := range map[string]struct {
		script func(c *command, f *fakeTree, end *ending)
		cause  bool // it is being stopped, with a minute of grace
		gone   bool
		// took is exact, or the latest if until is set.
		took, until time.Duration
		reaped      uint32
	}{
		"nobody": {func(_ *command, f *fakeTree, _ *ending) { f.set() }, false, true, 0, 0, 0},
		"one that stays": {func(_ *command, f *fakeTree, _ *ending) {
			f.set(fakeStray)
		}, false, false, drainWindow, drainWindow + 10*time.Millisecond, 1},
		"two, one after the other": {func(_ *command, f *fakeTree, _ *ending) {
			f.set(fakeStray, fakeStray2)
			time.Sleep(20 * time.Millisecond)
			f.set(fakeStray2)
			time.Sleep(20 * time.Millisecond)
			f.set()
		}, false, true, 40 * time.Millisecond, 50 * time.Millisecond, 2},
		"with the grace of a stop": {func(_ *command, f *fakeTree, _ *ending) {
			f.set(fakeStray)
			time.Sleep(30 * time.Second)
			f.set()
		}, true, true, 30 * time.Second, 30*time.Second + 10*time.Millisecond, 1},
		"beyond the grace of a stop": {func(_ *command, f *fakeTree, _ *ending) {
			f.set(fakeStray)
		}, true, false, time.Minute, time.Minute + 10*time.Millisecond, 1},
		"a stop that comes meanwhile": {func(c *command, f *fakeTree, _ *ending) {
			f.set(fakeStray)
			time.Sleep(10 * time.Millisecond)
			c.stop(requestedCause, 0)
		}, false, false, 10 * time.Millisecond, 10 * time.Millisecond, 1},
		"a stop with long grace changes nothing": {func(c *command, f *fakeTree, _ *ending) {
			f.set(fakeStray)
			time.Sleep(10 * time.Millisecond)
			c.stop(requestedCause, time.Hour)
		}, false, false, drainWindow, drainWindow + 10*time.Millisecond, 1},
		"a shorter stop in the grace": {func(c *command, f *fakeTree, _ *ending) {
			f.set(fakeStray)
			time.Sleep(10 * time.Second)
			c.stop(requestedCause, time.Second)
		}, true, false, 11 * time.Second, 11*time.Second + 10*time.Millisecond, 1},
		"a tree that cannot be looked at": {func(_ *command, f *fakeTree, _ *ending) {
			f.set()
			f.err = errors.New("too many open files")
		}, false, false, drainWindow, drainWindow + 10*time.Millisecond, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeTree{}
				cmd, _ := fakeCommand(f)
				end := newEnding(f)
				if c.cause {
					cmd.stop(requestedCause, time.Minute)
					<-cmd.ordered
					end.cause = requestedCause
				}
				var script sync.WaitGroup
				script.Go(func() { c.script(cmd, f, end) })
				synctest.Wait()
				begun := time.Now()
				gone := cmd.awaitStrays(end)
				took := time.Since(begun)
				if gone != c.gone || took < c.took || took > max(c.until, c.took) {
					t.Errorf("gone %v after %v; want %v after %v to %v", gone, took, c.gone, c.took, c.until)
				}
				script.Wait()
				if !gone {
					f.set()
				}
				if reaped, empty := end.outcome(); reaped != c.reaped || empty != (f.err == nil) {
					t.Errorf("reaped %d, want %d; empty %v", reaped, c.reaped, empty)
				}
			})
		})
	}
}

// TestAwaitStraysWhileWeKeepThemWaiting gives strays the time in which they wait for
// room in the spool, up to a bound.
func TestAwaitStraysWhileWeKeepThemWaiting(t *testing.T) {
	for name, c := range map[string]struct {
		words  int // that the stray has yet to write
		gone   bool
		stop   bool
		at     time.Duration
		within time.Duration
	}{
		"last words":                {2 << 20, true, false, time.Minute, time.Hour},
		"more than last words":      {8 << 20, false, false, time.Minute, time.Hour},
		"stopped while they wait":   {8 << 20, false, true, 0, time.Second},
		"nothing to say, and stays": {0, false, false, drainWindow, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeTree{}
				cmd, _ := fakeCommand(f)
				f.set(fakeStray)
				w := newSource(cmd.spool, stdout, newStock(1))
				for cmd.spool.used() < spoolBytes { // the reader is away
					w.commit(len(w.space()))
				}
				var all sync.WaitGroup
				done := make(chan struct{})
				all.Go(func() {
					defer close(done)
					put(w, make([]byte, c.words))
					w.close()
					if c.words > 0 {
						f.set()
					}
				})
				all.Go(func() { // a reader who takes a minute for each MiB
					for position := int64(0); ; {
						time.Sleep(time.Minute)
						pieces, _, _, err := cmd.spool.read(position, 1<<20)
						if err != nil {
							t.Error(err)
							return
						}
						n := 0
						for _, p := range pieces {
							n += len(p.data)
							p.block.release()
						}
						position += int64(n)
						select {
						case <-done:
							if n == 0 {
								return
							}
						default:
						}
					}
				})
				synctest.Wait()
				if c.stop {
					cmd.stop(requestedCause, time.Second)
				}
				begun := time.Now()
				gone := cmd.awaitStrays(newEnding(f))
				took := time.Since(begun)
				if gone != c.gone || took < c.at || took > c.within {
					t.Errorf("gone %v after %v; want %v after %v to %v", gone, took, c.gone, c.at, c.within)
				}
				all.Wait()
			})
		})
	}
}
