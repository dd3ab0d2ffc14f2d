package admission_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	oneShot   = admission.Need{Run: true, Sandbox: true}
	inSession = admission.Need{Run: true}
	session   = admission.Need{Sandbox: true}
)

// crowd are those who ask, each in a goroutine of its own. It lives in a bubble.
type crowd struct {
	t *testing.T
	c *admission.Controller

	mu     sync.Mutex
	served []string // in order
	slots  map[string]*admission.Slot
	errs   map[string]error
	group  sync.WaitGroup
}

func newCrowd(t *testing.T, cfg admission.Config) *crowd {
	r := &crowd{t: t, c: admission.New(cfg), slots: make(map[string]*admission.Slot), errs: make(map[string]error)}
	t.Cleanup(r.group.Wait)
	return r
}

// ask has somebody ask, and returns when he has a place, waits, or was refused.
func (r *crowd) ask(ctx context.Context, name string, need admission.Need) {
	r.group.Go(func() {
		slot, err := r.c.Acquire(ctx, need)
		r.mu.Lock()
		defer r.mu.Unlock()
		if (slot == nil) == (err == nil) {
			r.t.Errorf("%s got %v and %v", name, slot, err)
		}
		if err != nil {
			r.errs[name] = err
			return
		}
		r.served, r.slots[name] = append(r.served, name), slot
	})
	synctest.Wait()
}

// end gives somebody's places back.
func (r *crowd) end(name string) {
	r.t.Helper()
	r.mu.Lock()
	slot := r.slots[name]
	r.mu.Unlock()
	if slot == nil {
		r.t.Fatalf("%s has no place", name)
	}
	slot.Release()
	synctest.Wait()
}

// want checks who was served so far, in order.
func (r *crowd) want(names string) {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if got := strings.Join(r.served, " "); got != names {
		r.t.Fatalf("served are %q, want %q", got, names)
	}
}

// refused checks with what somebody was refused.
func (r *crowd) refused(name string, kind fault.Kind, reason string) *fault.Error {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	err, ok := errors.AsType[*fault.Error](r.errs[name])
	if !ok || err.Kind != kind || err.Reason != reason {
		r.t.Fatalf("%s got %v, want %s", name, r.errs[name], reason)
	}
	return err
}

func (r *crowd) stats(running, sandboxes, queued int) {
	r.t.Helper()
	if s := r.c.Stats(); s.Running != running || s.Sandboxes != sandboxes || s.Queued != queued {
		r.t.Errorf("running %d, sandboxes %d, queued %d; want %d, %d, %d", s.Running, s.Sandboxes, s.Queued, running, sandboxes, queued)
	}
}

func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

func TestFirstComeFirstServed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newCrowd(t, admission.Config{MaxRunning: 2, MaxQueued: 10, MaxQueueWait: time.Minute})
		for i := range 7 {
			r.ask(t.Context(), fmt.Sprint(i), oneShot)
		}
		r.want("0 1")
		r.stats(2, 2, 5)
		r.end("1")
		r.want("0 1 2")
		r.end("0")
		r.want("0 1 2 3")
		r.end("0") // a second time frees nothing
		r.want("0 1 2 3")
		for _, name := range []string{"2", "3", "4"} {
			r.end(name)
		}
		r.want("0 1 2 3 4 5 6")
		r.end("5")
		r.end("6")
		r.stats(0, 0, 0)
		r.ask(t.Context(), "late", oneShot)
		r.want("0 1 2 3 4 5 6 late")
		r.end("late")
	})
}

// Who waits for one thing does not keep those waiting who do not need it; among those
// who need it, the order is kept.
func TestNeedsApart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newCrowd(t, admission.Config{MaxRunning: 2, MaxSandboxes: 2, MaxQueued: 10, MaxQueueWait: time.Hour})
		r.ask(t.Context(), "s1", session)
		r.ask(t.Context(), "s2", session)
		r.ask(t.Context(), "o1", oneShot) // no sandbox is free
		r.ask(t.Context(), "x1", inSession)
		r.ask(t.Context(), "s3", session)
		r.want("s1 s2 x1")
		r.stats(1, 2, 2)
		r.ask(t.Context(), "x2", inSession)
		r.want("s1 s2 x1 x2")
		r.ask(t.Context(), "x3", inSession)
		r.end("s1") // a sandbox, but nothing to run in it: the session behind gets it
		r.want("s1 s2 x1 x2 s3")
		r.end("x1") // o1 came before x3 and still lacks a sandbox
		r.want("s1 s2 x1 x2 s3 x3")
		r.end("x2")
		r.end("s2")
		r.want("s1 s2 x1 x2 s3 x3 o1")
		for _, name := range []string{"s3", "x3", "o1"} {
			r.end(name)
		}
		r.stats(0, 0, 0)
	})
}

// One who needs two things gets both or waits, and is before those who came later.
func TestBothAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newCrowd(t, admission.Config{MaxRunning: 1, MaxSandboxes: 1, MaxQueued: 10, MaxQueueWait: time.Hour})
		r.ask(t.Context(), "o1", oneShot)
		r.ask(t.Context(), "o2", oneShot)
		r.ask(t.Context(), "x", inSession)
		r.ask(t.Context(), "s", session)
		r.stats(1, 1, 3)
		r.end("o1")
		r.want("o1 o2")
		r.stats(1, 1, 2)
		r.end("o2")
		r.stats(1, 1, 0) // both, in no order: they need different things
		r.end("x")
		r.end("s")
	})
}

func TestQueueIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newCrowd(t, admission.Config{MaxRunning: 1, MaxSandboxes: 7, MaxQueued: 1, MaxQueueWait: time.Minute})
		r.ask(t.Context(), "runs", oneShot)
		r.ask(t.Context(), "waits", oneShot)
		r.ask(t.Context(), "refused", oneShot)
		err := r.refused("refused", fault.Exhausted, "QUEUE_FULL")
		if err.RetryAfter != time.Second || err.Meta["max_running"] != "1" || err.Meta["max_sandboxes"] != "7" {
			t.Errorf("%v, again after %v", err.Meta, err.RetryAfter)
		}
		var subjects []string
		for _, q := range err.Quotas {
			subjects = append(subjects, q.Subject)
			if q.Description == "" {
				t.Errorf("%s has no description", q.Subject)
			}
		}
		if got := strings.Join(subjects, " "); got != "server:executions server:sandboxes server:queue" {
			t.Errorf("quotas of %s", got)
		}
		r.ask(t.Context(), "session", session) // needs nothing that is taken
		r.want("runs session")
		time.Sleep(59 * time.Second)
		synctest.Wait()
		r.stats(1, 2, 1)
		time.Sleep(time.Second)
		synctest.Wait()
		if err := r.refused("waits", fault.Exhausted, "QUEUE_TIMEOUT"); len(err.Quotas) != 2 || err.RetryAfter == 0 {
			t.Errorf("quotas %v, again after %v", err.Quotas, err.RetryAfter)
		}
		r.stats(1, 2, 0)
		r.ask(t.Context(), "next", oneShot)
		r.end("runs")
		r.want("runs session next")
		r.end("next")
		r.end("session")
	})
}

func TestNoQueue(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newCrowd(t, admission.Config{MaxRunning: 1})
		r.ask(t.Context(), "runs", inSession)
		r.ask(t.Context(), "refused", inSession)
		r.refused("refused", fault.Exhausted, "QUEUE_FULL")
		r.end("runs")
	})
}

func TestNoLimits(t *testing.T) {
	c := admission.New(admission.Config{})
	for range 1000 {
		if _, err := c.Acquire(t.Context(), oneShot); err != nil {
			t.Fatal(err)
		}
	}
	if c.Saturated() {
		t.Error("without limits it is saturated")
	}
}

// Who leaves the queue leaves no hole in it.
func TestLeavingTheQueue(t *testing.T) {
	for _, leaver := range []string{"1", "2", "3"} {
		t.Run(leaver, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newCrowd(t, admission.Config{MaxRunning: 1, MaxQueued: 3, MaxQueueWait: time.Hour})
				r.ask(t.Context(), "0", oneShot)
				gone := errors.New("the caller has gone")
				ctx, cancel := context.WithCancelCause(t.Context())
				for _, name := range []string{"1", "2", "3"} {
					if name == leaver {
						r.ask(ctx, name, oneShot)
					} else {
						r.ask(t.Context(), name, oneShot)
					}
				}
				cancel(gone)
				synctest.Wait()
				if !errors.Is(r.errs[leaver], gone) {
					t.Fatalf("who left got %v", r.errs[leaver])
				}
				r.ask(t.Context(), "4", oneShot) // there is room again
				r.ask(ctx, "late", oneShot)
				if !errors.Is(r.errs["late"], gone) {
					t.Errorf("who had left before got %v", r.errs["late"])
				}
				order := slices.DeleteFunc([]string{"0", "1", "2", "3", "4"}, func(s string) bool { return s == leaver })
				for i, name := range order {
					r.want(strings.Join(order[:i+1], " "))
					r.end(name)
				}
				r.stats(0, 0, 0)
			})
		})
	}
}

func TestDrain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newCrowd(t, admission.Config{MaxRunning: 1, MaxSandboxes: 1, MaxQueued: 9, MaxQueueWait: time.Hour})
		r.ask(t.Context(), "runs", oneShot)
		r.ask(t.Context(), "a", oneShot)
		r.ask(t.Context(), "b", session)
		r.ask(t.Context(), "c", inSession)
		r.c.Drain()
		synctest.Wait()
		for _, name := range []string{"a", "b", "c"} {
			r.refused(name, fault.Unavailable, "SERVER_DRAINING")
		}
		r.ask(t.Context(), "d", inSession)
		if err := r.refused("d", fault.Unavailable, "SERVER_DRAINING"); err.RetryAfter == 0 {
			t.Error("it is not said when to come back")
		}
		r.stats(1, 1, 0)
		r.end("runs")
		r.stats(0, 0, 0)
		r.c.Drain()
	})
}

// What runs after a restart counts, though it may be more than is allowed now.
func TestOccupied(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newCrowd(t, admission.Config{MaxRunning: 2, MaxQueued: 9, MaxQueueWait: time.Hour})
		var old []*admission.Slot
		for range 3 {
			old = append(old, r.c.Occupy(oneShot))
		}
		r.stats(3, 3, 0)
		r.ask(t.Context(), "new", oneShot)
		for i, slot := range old {
			r.mu.Lock()
			served := len(r.served)
			r.mu.Unlock()
			if served > 0 && i < 2 {
				t.Errorf("served while %d run", 3-i)
			}
			slot.Release()
			synctest.Wait()
		}
		r.want("new")
		r.end("new")
	})
}

func TestSaturated(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newCrowd(t, admission.Config{MaxRunning: 1, MaxSandboxes: 2, MaxQueued: 9, MaxQueueWait: time.Hour})
		want := func(want bool, when string) {
			t.Helper()
			if r.c.Saturated() != want {
				t.Errorf("%s: saturated is %v", when, !want)
			}
		}
		want(false, "empty")
		r.ask(t.Context(), "a", inSession)
		want(true, "all run")
		r.end("a")
		want(false, "empty again")
		r.ask(t.Context(), "s1", session)
		want(false, "one sandbox")
		r.ask(t.Context(), "s2", session)
		want(true, "all sandboxes")
		r.end("s1")
		want(false, "one sandbox less")
		r.end("s2")
		r.c.Drain()
		want(true, "draining")
	})
}

// TestBurst is fault case 10 at the size of the unit: of 10,000 who come at once as many
// run as may, as many wait as may, and the rest is refused with all details.
func TestBurst(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const limit, queue, burst = 8, 50, 10_000
		c := admission.New(admission.Config{MaxRunning: limit, MaxQueued: queue, MaxQueueWait: time.Hour})
		var running, most, served, refused atomic.Int64
		var group sync.WaitGroup
		defer group.Wait()
		for range burst {
			group.Go(func() {
				slot, err := c.Acquire(t.Context(), oneShot)
				if err != nil {
					e, ok := errors.AsType[*fault.Error](err)
					if !ok || e.Reason != "QUEUE_FULL" || e.RetryAfter == 0 || len(e.Quotas) == 0 {
						t.Errorf("%v", err)
					}
					refused.Add(1)
					return
				}
				now := running.Add(1)
				for m := most.Load(); now > m && !most.CompareAndSwap(m, now); m = most.Load() {
				}
				time.Sleep(time.Second)
				running.Add(-1)
				served.Add(1)
				slot.Release()
			})
		}
		synctest.Wait()
		if s := c.Stats(); s.Running != limit || s.Queued != queue || refused.Load() != burst-limit-queue {
			t.Errorf("%d run, %d wait, %d are refused", s.Running, s.Queued, refused.Load())
		}
		begun := time.Now()
		group.Wait()
		if served.Load() != limit+queue || most.Load() != limit {
			t.Errorf("%d were served, %d at a time", served.Load(), most.Load())
		}
		if took := time.Since(begun); took != (limit+queue+limit-1)/limit*time.Second {
			t.Errorf("places were free while somebody waited: it took %v", took)
		}
	})
}

// TestNothingIsLost has many come and go at random, some of them in the moment in which
// it is their turn, and looks whether places get lost.
func TestNothingIsLost(t *testing.T) {
	c := admission.New(admission.Config{MaxRunning: 3, MaxSandboxes: 4, MaxQueued: 1000, MaxQueueWait: 2 * time.Millisecond})
	var running, sandboxes atomic.Int64
	var group sync.WaitGroup
	for worker := range 16 {
		group.Go(func() {
			random := rand.New(rand.NewPCG(uint64(worker), 7))
			for range 400 {
				need := []admission.Need{oneShot, inSession, session}[random.IntN(3)]
				ctx, cancel := context.WithTimeoutCause(t.Context(), time.Duration(random.IntN(300))*time.Microsecond, errors.New("gone"))
				slot, err := c.Acquire(ctx, need)
				if err == nil {
					if need.Run && running.Add(1) > 3 || need.Sandbox && sandboxes.Add(1) > 4 {
						t.Error("more than may run")
					}
					if random.IntN(2) == 0 {
						time.Sleep(time.Duration(random.IntN(50)) * time.Microsecond)
					}
					if need.Run {
						running.Add(-1)
					}
					if need.Sandbox {
						sandboxes.Add(-1)
					}
					slot.Release()
				}
				cancel()
			}
		})
	}
	group.Wait()
	if s := c.Stats(); s.Running != 0 || s.Sandboxes != 0 || s.Queued != 0 {
		t.Errorf("%+v", s)
	}
}
