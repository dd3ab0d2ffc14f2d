package execution_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// newLimitedRig makes a rig whose commands take a minute, with limits.
func newLimitedRig(t *testing.T, cfg admission.Config) *rig {
	t.Helper()
	r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(time.Minute)}, Exit: enginefake.Exit(0)}))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r.limit(cfg)
	return r
}

// limit opens a Service with limits.
func (r *rig) limit(cfg admission.Config) {
	r.t.Helper()
	r.admission = admission.New(cfg)
	r.open()
}

// begun is what became of a Start in a goroutine of its own.
type begun struct {
	execution.Execution
	err  error
	done bool
}

// begin starts in a goroutine of its own and returns when that waits or has ended.
func (r *rig) begin(ctx context.Context, group *sync.WaitGroup, request execution.Request) *begun {
	request.Command.Args = []string{"x"}
	b := &begun{}
	group.Go(func() {
		b.Execution, b.err = r.Start(ctx, request)
		b.done = true
	})
	synctest.Wait()
	return b
}

func (r *rig) counts(running, sandboxes, queued int) {
	r.t.Helper()
	synctest.Wait()
	if s := r.admission.Stats(); s.Running != running || s.Sandboxes != sandboxes || s.Queued != queued {
		r.t.Errorf("running %d, sandboxes %d, queued %d; want %d, %d, %d", s.Running, s.Sandboxes, s.Queued, running, sandboxes, queued)
	}
}

// Executions that are too many wait for their turn, in order, and their times say so.
func TestQueue(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newLimitedRig(t, admission.Config{MaxRunning: 2, MaxQueued: 2, MaxQueueWait: time.Hour})
		r.session("a")
		var group sync.WaitGroup
		defer group.Wait()
		origin := time.Now()
		var all []*begun
		for _, session := range []string{"", "a", "a", ""} {
			all = append(all, r.begin(t.Context(), &group, execution.Request{Session: session}))
		}
		r.counts(2, 1, 2)
		_, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}})
		wantFault(t, err, fault.Exhausted, "QUEUE_FULL")
		// A request that is wrong is told so at once.
		_, err = r.Start(t.Context(), execution.Request{})
		wantFault(t, err, fault.Invalid, "COMMAND_EMPTY")
		if all[2].done || all[3].done || r.Running() != 2 {
			t.Fatalf("%d run", r.Running())
		}
		for i, b := range all {
			time.Sleep(time.Until(origin.Add(time.Duration(1+i/2) * time.Minute)))
			synctest.Wait()
			if b.err != nil {
				t.Fatal(b.err)
			}
			times := r.wait(execution.Ref{Session: b.Session, ID: b.ID}).Result.Times
			inOrder(t, times)
			if !times.Queued.Equal(origin) || times.SandboxReady.Sub(origin) != time.Duration(i/2)*time.Minute {
				t.Errorf("%d: queued at %v, ready at %v", i, times.Queued.Sub(origin), times.SandboxReady.Sub(origin))
			}
		}
		r.counts(0, 0, 0)
	})
}

func TestQueueTimeout(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newLimitedRig(t, admission.Config{MaxRunning: 1, MaxQueued: 9, MaxQueueWait: 10 * time.Second})
		first := r.start(execution.Request{})
		begin := time.Now()
		_, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}})
		wantFault(t, err, fault.Exhausted, "QUEUE_TIMEOUT")
		if took := time.Since(begin); took != 10*time.Second {
			t.Errorf("it waited for %v", took)
		}
		gone := errors.New("the caller has gone")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, gone)
		defer cancel()
		if _, err := r.Start(ctx, execution.Request{Command: execution.Command{Args: []string{"x"}}}); !errors.Is(err, gone) {
			t.Errorf("%v", err)
		}
		r.counts(1, 1, 0)
		if len(r.memory.all()) != 1 {
			t.Error("what did not get its turn was recorded")
		}
		r.wait(first)
		r.counts(0, 0, 0)
	})
}

// A place is taken until the sandbox has gone, however the execution ends.
func TestPlaceIsGivenBack(t *testing.T) {
	for name, test := range map[string]struct {
		hooks  enginefake.Hooks
		refuse func(op string, _ execution.Execution) error
		cancel bool
		reason execution.Reason
	}{
		"exited":     {reason: execution.Exited},
		"cancelled":  {cancel: true, reason: execution.Cancelled},
		"no sandbox": {hooks: enginefake.Hooks{Create: func(context.Context, string) error { return errors.New("no room") }}, reason: execution.StartFailed},
		"lost":       {hooks: enginefake.Hooks{Dial: func(context.Context, string) error { return errors.New("no pipe") }}, reason: execution.SandboxLost},
		"not recorded": {refuse: func(op string, _ execution.Execution) error {
			if op == "insert" {
				return errors.New("no disk")
			}
			return nil
		}},
		"not durable": {refuse: func(op string, _ execution.Execution) error {
			if op == "sync" {
				return errors.New("no disk")
			}
			return nil
		}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				cfg := scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(time.Minute)}, Exit: enginefake.Exit(0)})
				cfg.Hooks = test.hooks
				ends := test.hooks.Terminate
				cfg.Hooks.Terminate = func(ctx context.Context, id string) error {
					time.Sleep(time.Second)
					if ends != nil {
						return ends(ctx, id)
					}
					return nil
				}
				r := newRig(t, cfg)
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				r.limit(admission.Config{MaxRunning: 1, MaxSandboxes: 1, MaxQueued: 9, MaxQueueWait: time.Hour})
				r.memory.hook(test.refuse, nil)
				e, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}})
				if (err != nil) != (test.refuse != nil) {
					t.Fatal(err)
				}
				if err == nil {
					ref := execution.Ref{ID: e.ID}
					if test.cancel {
						r.cancel(ref, 0)
					}
					if res := r.wait(ref).Result; res.Reason != test.reason {
						t.Errorf("%+v", res)
					}
				}
				time.Sleep(2 * time.Minute)
				r.counts(0, 0, 0)
				if left, _ := r.fake.List(t.Context()); len(left) != 0 {
					t.Errorf("left: %v", left)
				}
			})
		})
	}
}

// The next one gets its place when the sandbox of the one before has been removed, not
// when its result is told.
func TestPlaceOutlastsTheResult(t *testing.T) {
	bubble(t, func(t *testing.T) {
		cfg := scripted(enginefake.Script{Exit: enginefake.Exit(0)})
		cfg.Hooks.Terminate = func(context.Context, string) error { time.Sleep(time.Minute); return nil }
		r := newRig(t, cfg)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r.limit(admission.Config{MaxSandboxes: 1, MaxQueued: 9, MaxQueueWait: time.Hour})
		begin := time.Now()
		for range 3 {
			r.run(execution.Request{})
		}
		if took := time.Since(begin).Round(time.Second); took != 2*time.Minute {
			t.Errorf("it took %v", took)
		}
	})
}

func TestDrainWakesTheQueue(t *testing.T) {
	for name, stop := range map[string]func(r *rig) error{
		"drain": func(r *rig) error { return r.Drain(r.t.Context()) },
		"close": func(r *rig) error { return r.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newLimitedRig(t, admission.Config{MaxRunning: 1, MaxQueued: 9, MaxQueueWait: time.Hour})
				r.start(execution.Request{})
				var group sync.WaitGroup
				var waiting []*begun
				for range 5 {
					waiting = append(waiting, r.begin(t.Context(), &group, execution.Request{}))
				}
				begin := time.Now()
				group.Go(func() {
					if err := stop(r); err != nil {
						t.Error(err)
					}
				})
				synctest.Wait()
				for _, b := range waiting {
					wantFault(t, b.err, fault.Unavailable, "SERVER_DRAINING")
				}
				if time.Since(begin) != 0 {
					t.Errorf("woken after %v", time.Since(begin))
				}
				group.Wait()
				if n := len(r.memory.all()); n != 1 {
					t.Errorf("%d were recorded", n)
				}
			})
		})
	}
}

// What an executord before this one began counts, though it is more than may run now.
func TestRecoveredCounts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newLimitedRig(t, admission.Config{})
		r.session("a")
		old := []execution.Ref{r.start(execution.Request{}), r.start(execution.Request{}), r.start(execution.Request{Session: "a"})}
		time.Sleep(10 * time.Second)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r.limit(admission.Config{MaxRunning: 1, MaxQueued: 9, MaxQueueWait: time.Hour})
		if err := r.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.counts(3, 2, 0)
		ref := r.start(execution.Request{})
		for _, ref := range old {
			if e := r.get(ref); e.State != execution.Ended {
				t.Errorf("the new one got its turn while %s was in state %d", ref.ID, e.State)
			}
		}
		r.wait(ref)
		r.counts(0, 0, 0)
	})
}

// A session that ends while a command waits for its turn refuses it then.
func TestSessionEndsWhileQueued(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newLimitedRig(t, admission.Config{MaxRunning: 1, MaxQueued: 9, MaxQueueWait: time.Hour})
		r.session("a")
		r.start(execution.Request{})
		var group sync.WaitGroup
		defer group.Wait()
		b := r.begin(t.Context(), &group, execution.Request{Session: "a"})
		r.sessions.end("a")
		time.Sleep(time.Minute + time.Second)
		r.counts(0, 0, 0)
		wantFault(t, b.err, fault.FailedPrecondition, "SESSION_NOT_RUNNING")
	})
}

// TestBurst is fault case 10: of 10,000 creates at once as many run as may, as many wait
// as may, in order, and the rest is refused with what there is to say.
func TestBurst(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const limit, queue, burst = 4, 20, 10_000
		r := newLimitedRig(t, admission.Config{MaxRunning: limit, MaxQueued: queue, MaxQueueWait: time.Hour})
		var (
			group    sync.WaitGroup
			mu       sync.Mutex
			reasons  = make(map[string]int)
			accepted []execution.Ref
		)
		for range burst {
			group.Go(func() {
				e, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}})
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					accepted = append(accepted, execution.Ref{ID: e.ID})
					return
				}
				refusal, ok := errors.AsType[*fault.Error](err)
				if !ok || refusal.RetryAfter <= 0 || len(refusal.Quotas) == 0 {
					t.Errorf("%v", err)
				}
				reasons[fault.ReasonOf(err)]++
			})
		}
		most := 0
		for range 100 {
			synctest.Wait()
			s := r.admission.Stats()
			most = max(most, r.Running())
			if s.Queued == 0 && s.Running == 0 {
				break
			}
			if s.Running > limit || s.Queued > queue {
				t.Fatalf("%+v", s)
			}
			time.Sleep(10 * time.Second)
		}
		group.Wait()
		if most != limit || len(accepted) != limit+queue || reasons["QUEUE_FULL"] != burst-limit-queue {
			t.Errorf("%d at a time, %d accepted, refused: %v", most, len(accepted), reasons)
		}
		for _, ref := range accepted {
			if res := r.wait(ref).Result; res.Reason != execution.Exited {
				t.Errorf("%+v", res)
			}
		}
		synctest.Wait()
		if left := r.list(); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
		if ids := r.fake.Started(); len(slices.Compact(slices.Sorted(slices.Values(ids)))) != limit+queue {
			t.Errorf("%d were started", len(ids))
		}
		if text := r.log.String(); strings.Contains(text, "level=ERROR") {
			t.Error(fmt.Sprint(text)[:1000])
		}
	})
}
