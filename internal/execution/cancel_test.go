package execution_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// TestCancelAt cancels an execution at every stage of its life.
func TestCancelAt(t *testing.T) {
	// A sandbox takes 10 s, a start 10 s more, the program 100 s.
	script := enginefake.Script{
		StartDelay: 5 * time.Second, Steps: []enginefake.Step{enginefake.Stdout(20*time.Second, "x"), enginefake.Pause(80 * time.Second)},
		Exit: enginefake.Exit(0), TermDelay: time.Second,
	}
	tests := map[string]struct {
		after   time.Duration
		reason  execution.Reason
		started bool
		takes   time.Duration // from the order to the end
	}{
		"before anything":     {0, execution.Cancelled, false, 0},
		"before the sandbox":  {5 * time.Second, execution.Cancelled, false, 0},
		"during the start":    {12 * time.Second, execution.Cancelled, true, 4 * time.Second},
		"while it runs":       {40 * time.Second, execution.Cancelled, true, time.Second},
		"while its end comes": {109500 * time.Millisecond, execution.Cancelled, true, 500 * time.Millisecond},
		"after its end":       {200 * time.Second, execution.Exited, true, 0},
	}
	for name, test := range tests {
		for _, session := range []string{"", "a"} {
			t.Run(name+" "+session, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					cfg := scripted(script)
					cfg.Hooks.Create = func(ctx context.Context, id string) error {
						if id != "s-a" {
							return sleep(ctx, 10*time.Second)
						}
						return nil
					}
					r := newRig(t, cfg)
					wait := test.after
					if session != "" {
						r.session(session)
						wait = max(0, wait-10*time.Second) // there is a sandbox
						if wait == 0 && name != "before anything" {
							t.Skip("nothing comes before the sandbox")
						}
					}
					ref := r.start(execution.Request{Session: session})
					if wait > 0 {
						time.Sleep(wait)
					}
					begin := time.Now()
					e, err := r.Cancel(t.Context(), ref, execution.Cancellation{By: "me"})
					if err != nil {
						t.Fatal(err)
					}
					res := e.Result
					if e.State != execution.Ended || res.Reason != test.reason || !res.TreeEmpty {
						t.Fatalf("state %d, %+v", e.State, res)
					}
					if took := time.Since(begin); took != test.takes && !(session != "" && name == "before anything") {
						t.Errorf("it took %v, want %v", took, test.takes)
					}
					if test.reason == execution.Cancelled {
						// One that comes to its end while it is being stopped has an exit code.
						if res.CancelledBy != "me" || res.Detail != "cancelled by me" || (res.ExitCode != nil) != (name == "while its end comes") {
							t.Errorf("%+v", res)
						}
					} else if res.CancelledBy != "" || *res.ExitCode != 0 {
						t.Errorf("%+v", res)
					}
					if started := len(r.fake.Started()) > 0; started != test.started && !(session != "" && name == "before anything") {
						t.Errorf("started: %v", started)
					}
					if got := r.watch(ref, nil); cmp.Diff(res, got.result) != "" {
						t.Errorf("the log tells another end:\n%s", cmp.Diff(res, got.result))
					}
					again, err := r.Cancel(t.Context(), ref, execution.Cancellation{By: "you"})
					if diff := cmp.Diff(e, again); diff != "" || err != nil {
						t.Errorf("a second time: %v\n%s", err, diff)
					}
					synctest.Wait()
					if left, _ := r.fake.List(t.Context()); len(left) != len(session) {
						t.Errorf("sandboxes: %v", left)
					}
					if held := r.fake.Held("s-a"); len(held) != 0 {
						t.Errorf("the guest holds %v", held)
					}
				})
			})
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// TestShorterGrace has a second order shorten the grace and keep the first reason.
func TestShorterGrace(t *testing.T) {
	tests := map[string]struct {
		first, second time.Duration
		between       time.Duration
		want          time.Duration // from the first order to the end
	}{
		"at once":                  {10 * time.Minute, 0, 5 * time.Second, 5 * time.Second},
		"shorter":                  {10 * time.Minute, time.Minute, 5 * time.Second, 65 * time.Second},
		"longer":                   {time.Minute, 5 * time.Minute, 5 * time.Second, time.Minute},
		"the same":                 {time.Minute, time.Minute, 5 * time.Second, time.Minute},
		"shorter, but later":       {time.Minute, 50 * time.Second, 30 * time.Second, time.Minute},
		"from both sides together": {time.Minute, time.Second, 0, time.Second},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, scripted(enginefake.Script{IgnoreTerm: true}))
				ref := r.start(execution.Request{})
				time.Sleep(time.Second)
				begin := time.Now()
				var wg sync.WaitGroup
				order := func(grace time.Duration, by string) {
					wg.Go(func() {
						e, err := r.Cancel(t.Context(), ref, execution.Cancellation{Grace: &grace, By: by})
						if err != nil || e.Result.CancelledBy != "first" || !e.Result.Killed {
							t.Errorf("%v, %+v", err, e.Result)
						}
					})
				}
				order(test.first, "first")
				synctest.Wait()
				time.Sleep(test.between)
				order(test.second, "second")
				wg.Wait()
				if took := time.Since(begin); took != test.want {
					t.Errorf("ended after %v, want %v", took, test.want)
				}
			})
		})
	}
}

func TestCancelArguments(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{IgnoreTerm: true}))
		ref := r.start(execution.Request{Command: execution.Command{Args: []string{"x"}, GracePeriod: ptr(20 * time.Second)}})
		time.Sleep(time.Second)
		for _, grace := range []time.Duration{-1, execution.MaxGracePeriod + 1} {
			_, err := r.Cancel(t.Context(), ref, execution.Cancellation{Grace: &grace})
			wantFault(t, err, fault.Invalid, "GRACE_PERIOD")
		}
		if e := r.get(ref); e.State != execution.Running {
			t.Errorf("state %d after orders that were refused", e.State)
		}
		begin := time.Now()
		e, err := r.Cancel(t.Context(), ref, execution.Cancellation{})
		if err != nil || time.Since(begin) != 20*time.Second {
			t.Errorf("%v after %v: the command's own grace is 20 s", err, time.Since(begin))
		}
		_, err = r.Cancel(t.Context(), ref, execution.Cancellation{Grace: ptr(time.Duration(-1))})
		wantFault(t, err, fault.Invalid, "GRACE_PERIOD")
		_ = e
	})
}

// TestCancelRaces lets orders of all kinds meet the natural end, the start and each
// other, without the order that a bubble brings.
func TestCancelRaces(t *testing.T) {
	fake := enginefake.New(enginefake.Config{Script: func(q *guestv1.StartRequest) enginefake.Script {
		return enginefake.Script{
			Steps: []enginefake.Step{enginefake.Stdout(time.Duration(rand.IntN(800))*time.Microsecond, "some output\n")},
			Exit:  enginefake.Exit(0),
		}
	}})
	t.Cleanup(fake.Shutdown)
	r := &rig{
		t: t, engine: fake, fake: fake, store: newMemory(), log: &lockedBuffer{},
		sessions: &sessions{running: make(map[string]engine.Sandbox)}, dir: filepath.Join(t.TempDir(), "logs"),
	}
	r.open()
	r.session("a")
	var cancelled, exited atomic.Int64
	rounds := 150
	if testing.Short() {
		rounds = 30
	}
	for i := range rounds {
		session := ""
		if i%2 == 0 {
			session = "a"
		}
		e, err := r.Start(t.Context(), execution.Request{Session: session, Command: execution.Command{Args: []string{"x"}}})
		if err != nil {
			t.Fatal(err)
		}
		ref := execution.Ref{Session: session, ID: e.ID}
		var wg sync.WaitGroup
		results := make(chan *execution.Result, 4)
		for n := range 2 {
			wg.Go(func() {
				time.Sleep(time.Duration(rand.IntN(2500)) * time.Microsecond)
				e, err := r.Cancel(t.Context(), ref, execution.Cancellation{By: fmt.Sprint(n)})
				if err != nil {
					t.Error(err)
					return
				}
				results <- e.Result
			})
		}
		wg.Go(func() {
			e, err := r.Wait(t.Context(), ref)
			if err != nil {
				t.Error(err)
			}
			results <- e.Result
		})
		wg.Go(func() {
			w, err := r.Watch(t.Context(), ref, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer w.Close()
			got, err := read(t.Context(), w, ref, nil)
			if err != nil {
				t.Error(err)
			}
			results <- got.result
		})
		wg.Wait()
		close(results)
		first := <-results
		for other := range results {
			if diff := cmp.Diff(first, other); diff != "" {
				t.Errorf("two ends of one execution:\n%s", diff)
			}
		}
		switch first.Reason {
		case execution.Cancelled:
			cancelled.Add(1)
		case execution.Exited:
			exited.Add(1)
		default:
			t.Errorf("%+v", first)
		}
		if err := r.Delete(t.Context(), ref); err != nil {
			t.Error(err)
		}
	}
	if cancelled.Load() == 0 || exited.Load() == 0 {
		t.Errorf("%d cancelled, %d exited: nothing raced", cancelled.Load(), exited.Load())
	}
}

// TestEndsAndStopsRace has a session end while executions are started in it: each is
// refused or ended, and none is left.
func TestEndsAndStopsRace(t *testing.T) {
	fake := enginefake.New(enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script { return enginefake.Script{} }})
	t.Cleanup(fake.Shutdown)
	r := &rig{
		t: t, engine: fake, fake: fake, store: newMemory(), log: &lockedBuffer{},
		sessions: &sessions{running: make(map[string]engine.Sandbox)}, dir: filepath.Join(t.TempDir(), "logs"),
	}
	r.open()
	for i := range 20 {
		id := fmt.Sprint("s", i)
		sb := r.session(id)
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
				e, err := r.Start(t.Context(), execution.Request{Session: id, Command: execution.Command{Args: []string{"x"}}})
				if err != nil {
					wantFault(t, err, fault.FailedPrecondition, "SESSION_NOT_RUNNING")
					return
				}
				e, err = r.Wait(t.Context(), execution.Ref{Session: id, ID: e.ID})
				if err != nil || e.Result.Reason != execution.SessionEnded {
					t.Errorf("%v, %+v", err, e.Result)
				}
			})
		}
		wg.Go(func() {
			time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
			r.sessions.end(id)
			if err := r.EndSession(t.Context(), id); err != nil {
				t.Error(err)
			}
			if _, err := sb.Terminate(t.Context()); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
	}
	if r.Running() != 0 {
		t.Errorf("%d left", r.Running())
	}
}

// TestCancelWhileTheGuestIsAway carries an order out when the guest can be reached
// again, and ends the sandbox when it cannot be.
func TestCancelWhileTheGuestIsAway(t *testing.T) {
	for name, test := range map[string]struct {
		away time.Duration
		want time.Duration
		lost bool
	}{
		"for a moment": {8 * time.Second, 10 * time.Second, false}, // when the first order was not answered
		"for ever":     {time.Hour, 20 * time.Second, true},        // grace and slack
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var from atomic.Pointer[time.Time]
				away := func() bool { at := from.Load(); return at != nil && time.Since(*at) < test.away }
				r := newRig(t, enginefake.Config{
					Script: func(*guestv1.StartRequest) enginefake.Script {
						return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "x")}}
					},
					Hooks: enginefake.Hooks{
						Ask: func(string, *guestv1.Request) bool { return !away() },
						Dial: func(context.Context, string) error {
							if away() {
								return errors.New("connection refused")
							}
							return nil
						},
					},
				})
				ref := r.start(execution.Request{})
				time.Sleep(time.Second)
				begin := time.Now()
				from.Store(&begin)
				res := r.cancel(ref, 5*time.Second).Result
				took := time.Since(begin)
				if res.Reason != execution.Cancelled || res.CancelledBy != "tester" || !res.TreeEmpty {
					t.Errorf("%+v", res)
				}
				if took < test.want || took > test.want+time.Second {
					t.Errorf("ended after %v, want %v", took, test.want)
				}
				if (res.Evidence["cause"] != "") != test.lost || (res.Signal != 0) == test.lost {
					t.Errorf("%+v", res)
				}
			})
		})
	}
}
