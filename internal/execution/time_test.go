package execution_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// TestBackstop ends the sandbox of a command that its guest never ends.
func TestBackstop(t *testing.T) {
	for name, test := range map[string]struct {
		cancelAfter time.Duration
		want        time.Duration
		reason      execution.Reason
	}{
		"timeout":             {0, 40 * time.Second, execution.TimedOut},                                // 20 + 5 + 15
		"cancel":              {10 * time.Second, 10*time.Second + 16*time.Second, execution.Cancelled}, // grace 1 and 15
		"cancel near the end": {39 * time.Second, 40 * time.Second, execution.Cancelled},
	} {
		for _, session := range []string{"", "a"} {
			t.Run(name+" "+session, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					r := newRig(t, scripted(enginefake.Script{Immortal: true, Steps: []enginefake.Step{enginefake.Stdout(0, "x")}}))
					if session != "" {
						r.session(session)
					}
					ref := r.start(execution.Request{Session: session, Command: execution.Command{
						Args: []string{"x"}, Timeout: 20 * time.Second, GracePeriod: ptr(5 * time.Second),
					}})
					begin := time.Now()
					if test.cancelAfter > 0 {
						time.Sleep(test.cancelAfter)
						r.cancel(ref, time.Second)
					}
					res := r.wait(ref).Result
					took := time.Since(begin)
					if session != "" {
						took -= 10 * time.Second // in which the guest was asked to end it alone
					}
					if res.Reason != test.reason || !res.TreeEmpty || !res.Killed || res.Reaped != 1 {
						t.Errorf("%+v", res)
					}
					if took < test.want || took > test.want+time.Second {
						t.Errorf("ended after %v, want %v", took, test.want)
					}
					if left, _ := r.fake.List(t.Context()); len(left) != 0 {
						t.Errorf("left: %v", left)
					}
				})
			})
		}
	}
}

// TestTimeoutOfTheGuest is not awaited by executord but told by the guest.
func TestTimeoutOfTheGuest(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{IgnoreTerm: true}))
		begin := time.Now()
		res := r.run(execution.Request{Command: execution.Command{Args: []string{"x"}, Timeout: time.Minute, GracePeriod: ptr(7 * time.Second)}})
		if took := time.Since(begin); took != 67*time.Second || res.Reason != execution.TimedOut || !res.Killed {
			t.Errorf("%+v after %v", res, took)
		}
	})
}

// TestCoalescing gathers what comes within 5 ms and keeps nothing waiting that comes
// after a silence.
func TestCoalescing(t *testing.T) {
	steps := func(n int, every time.Duration, text string) []enginefake.Step {
		all := []enginefake.Step{enginefake.Stdout(time.Second, text)}
		for range n - 1 {
			all = append(all, enginefake.Stdout(every, text))
		}
		return append(all, enginefake.Pause(time.Second))
	}
	ms := time.Millisecond
	tests := map[string]struct {
		steps []enginefake.Step
		want  []time.Duration // when output is recorded, from the first one on
	}{
		"one":                       {steps(1, 0, "x"), []time.Duration{0}},
		"two at once":               {steps(2, time.Microsecond, "x"), []time.Duration{0, 5 * ms}},
		"a trickle":                 {steps(20, ms, "x"), []time.Duration{0, 5 * ms, 10 * ms, 15 * ms, 20 * ms}},
		"slower than the window":    {steps(4, 7*ms, "x"), []time.Duration{0, 7 * ms, 14 * ms, 21 * ms}},
		"large pieces are not kept": {steps(3, ms, strings.Repeat("x", 4<<10)), []time.Duration{0, ms, 2 * ms}},
		"a window that fills up":    {steps(3, 2*ms, strings.Repeat("x", 3<<10)), []time.Duration{0, 5 * ms}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, scripted(enginefake.Script{Steps: test.steps, Exit: enginefake.Exit(0)}))
				got := r.watch(r.start(execution.Request{}), nil)
				var at []time.Duration
				for _, e := range got.events {
					if e.Output == nil {
						continue
					}
					if d := e.Time.Sub(got.events[1].Time); len(at) == 0 || d > at[len(at)-1] {
						at = append(at, d)
					}
				}
				if diff := cmp.Diff(test.want, at); diff != "" {
					t.Errorf("recorded at %v, want %v", at, test.want)
				}
				if first := got.events[1].Time.Sub(got.events[0].Time); first != time.Second {
					t.Errorf("the first piece was recorded after %v", first)
				}
			})
		})
	}
}

// TestExitIsNotKeptWaiting ends a command at once, whatever it wrote just before.
func TestExitIsNotKeptWaiting(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var reads atomic.Int64
		cfg := scripted(enginefake.Script{
			Steps: []enginefake.Step{enginefake.Stdout(0, "a"), enginefake.Stdout(time.Millisecond, "b")}, Exit: enginefake.Exit(0),
		})
		cfg.Hooks.Ask = func(_ string, q *guestv1.Request) bool {
			if q.GetRead() != nil && reads.Add(1) == 2 {
				time.Sleep(2 * time.Millisecond) // so that the rest and the exit come together
			}
			return true
		}
		r := newRig(t, cfg)
		begin := time.Now()
		r.run(execution.Request{})
		if took := time.Since(begin); took != 2*time.Millisecond || reads.Load() != 2 {
			t.Errorf("it took %v and %d reads", took, reads.Load())
		}
	})
}

// TestSilentPrograms writes nothing while a program does not.
func TestSilentPrograms(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var requests atomic.Int64
		r := newRig(t, enginefake.Config{
			Script: func(*guestv1.StartRequest) enginefake.Script {
				return enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(20 * time.Minute)}, Exit: enginefake.Exit(0)}
			},
			Hooks: enginefake.Hooks{Answer: func(string, *guestv1.Request, *enginefake.Answer) { requests.Add(1) }},
		})
		e := r.wait(r.start(execution.Request{}))
		if e.Sequence != 2 {
			t.Errorf("%d events", e.Sequence)
		}
		// Every 20 s, and a few at both ends.
		if n := requests.Load(); n > 20*3+6 {
			t.Errorf("%d requests in 20 minutes", n)
		}
	})
}

// TestEagerGuest has a guest that answers at once instead of waiting: it does not keep
// executord busy.
func TestEagerGuest(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var requests atomic.Int64
		r := newRig(t, enginefake.Config{
			Script: func(*guestv1.StartRequest) enginefake.Script {
				return enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(time.Minute)}, Exit: enginefake.Exit(0)}
			},
			Hooks: enginefake.Hooks{Answer: func(_ string, q *guestv1.Request, a *enginefake.Answer) {
				if requests.Add(1); q.GetRead() != nil {
					a.Response = &guestv1.Response{Id: q.GetId(), Answer: &guestv1.Response_Read{Read: &guestv1.ReadResponse{}}}
				}
			}},
		})
		ref := r.start(execution.Request{})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := requests.Load(); n > 2100 {
			t.Errorf("%d requests in 10 s", n)
		}
		// It never tells the end, either; the fake's own wait ends with its sandbox.
		r.cancel(ref, 0)
	})
}

// TestBrokenPipes cuts the pipe again and again: nothing is lost and nothing doubled.
func TestBrokenPipes(t *testing.T) {
	for _, every := range []int{2, 3, 7} {
		t.Run(fmt.Sprint(every), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var steps []enginefake.Step
				want := map[string]string{}
				for i := range 200 {
					text := fmt.Sprintf("%06d\n", i)
					if i%3 == 0 {
						steps = append(steps, enginefake.Stderr(3*time.Millisecond, text))
						want["stderr"] += text
					} else {
						steps = append(steps, enginefake.Stdout(3*time.Millisecond, text))
						want["stdout"] += text
					}
				}
				cfg := scripted(enginefake.Script{Steps: steps, Exit: enginefake.Exit(7)})
				cfg.Hooks.Answer = enginefake.CutEvery(every)
				r := newRig(t, cfg)
				got := r.watch(r.start(execution.Request{}), nil)
				if string(got.output["stdout"]) != want["stdout"] || string(got.output["stderr"]) != want["stderr"] {
					t.Errorf("%q", got.output)
				}
				if *got.result.ExitCode != 7 || len(r.fake.Started()) != 1 {
					t.Errorf("%+v, started %v", got.result, r.fake.Started())
				}
			})
		})
	}
}

// TestGuestFails has guests that stop answering, for a while or for good, at each
// request.
func TestGuestFails(t *testing.T) {
	type answer func(a *enginefake.Answer)
	drop := func(a *enginefake.Answer) { a.Drop = true }
	cut := func(a *enginefake.Answer) { a.Cut = true }
	refuse := func(a *enginefake.Answer) {
		a.Response.Answer = &guestv1.Response_Error{Error: enginefake.Refusal(guestv1.Error_KIND_NOT_FOUND, "no such command")}
	}
	nonsense := func(a *enginefake.Answer) {
		a.Response.Answer = &guestv1.Response_Stop{Stop: &guestv1.StopResponse{}}
	}
	lie := func(a *enginefake.Answer) {
		a.Response.Answer = &guestv1.Response_Read{Read: &guestv1.ReadResponse{Chunks: []*guestv1.Chunk{{Stream: 1, Size: 1 << 30}}}}
	}
	isStart := func(q *guestv1.Request) bool { return q.GetStart() != nil }
	isRead := func(q *guestv1.Request) bool { return q.GetRead() != nil }
	tests := map[string]struct {
		when    func(q *guestv1.Request) bool
		how     answer
		away    time.Duration
		outcome execution.Reason
		atLeast time.Duration // until the end
		atMost  time.Duration
		detail  string
	}{
		"start is dropped for a while":   {isStart, drop, 5 * time.Second, execution.Exited, 10 * time.Second, 30 * time.Second, ""},
		"start is dropped":               {isStart, drop, time.Hour, execution.SandboxLost, 30 * time.Second, 50 * time.Second, "whether the command was started is not known"},
		"start is cut for a while":       {isStart, cut, 5 * time.Second, execution.Exited, 5 * time.Second, 20 * time.Second, ""},
		"start is cut":                   {isStart, cut, time.Hour, execution.SandboxLost, 30 * time.Second, 50 * time.Second, "whether the command was started is not known"},
		"start is answered wrongly":      {isStart, nonsense, time.Hour, execution.SandboxLost, 30 * time.Second, 50 * time.Second, "whether the command was started is not known"},
		"read is dropped for a while":    {isRead, drop, 5 * time.Second, execution.Exited, 10 * time.Second, 60 * time.Second, ""},
		"read is dropped":                {isRead, drop, time.Hour, execution.SandboxLost, 30 * time.Second, 90 * time.Second, "whether the command finished is not known"},
		"read is cut for a while":        {isRead, cut, 20 * time.Second, execution.Exited, 20 * time.Second, 40 * time.Second, ""},
		"read is cut":                    {isRead, cut, time.Hour, execution.SandboxLost, 30 * time.Second, 90 * time.Second, "whether the command finished is not known"},
		"read is refused":                {isRead, refuse, time.Hour, execution.SandboxLost, 0, 20 * time.Second, "no such command"},
		"read is answered wrongly":       {isRead, nonsense, time.Hour, execution.SandboxLost, 30 * time.Second, 90 * time.Second, "whether the command finished is not known"},
		"read tells more than there is":  {isRead, lie, time.Hour, execution.SandboxLost, 30 * time.Second, 90 * time.Second, "whether the command finished is not known"},
		"read is nonsense for a while":   {isRead, lie, 20 * time.Second, execution.Exited, 20 * time.Second, 60 * time.Second, ""},
		"everything is dropped at times": {func(*guestv1.Request) bool { return true }, drop, 15 * time.Second, execution.Exited, 15 * time.Second, 60 * time.Second, ""},
	}
	for name, test := range tests {
		for _, session := range []string{"", "a"} {
			t.Run(name+" "+session, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					var begin time.Time
					r := newRig(t, enginefake.Config{
						Script: func(*guestv1.StartRequest) enginefake.Script {
							return enginefake.Script{
								Steps: []enginefake.Step{enginefake.Stdout(0, "hello"), enginefake.Stdout(8*time.Second, "bye")}, Exit: enginefake.Exit(0),
							}
						},
						Hooks: enginefake.Hooks{Answer: func(_ string, q *guestv1.Request, a *enginefake.Answer) {
							if test.when(q) && time.Since(begin) < test.away {
								test.how(a)
							}
						}},
					})
					if session != "" {
						r.session(session)
					}
					begin = time.Now()
					ref := r.start(execution.Request{Session: session})
					got := r.watch(ref, nil)
					took := time.Since(begin)
					if got.result.Reason != test.outcome || !got.result.TreeEmpty {
						t.Fatalf("%+v", got.result)
					}
					if took < test.atLeast || took > test.atMost {
						t.Errorf("ended after %v, want %v to %v", took, test.atLeast, test.atMost)
					}
					contains(t, got.result.Detail, test.detail)
					if test.outcome == execution.Exited && string(got.output["stdout"]) != "hellobye" {
						t.Errorf("%q", got.output)
					}
					if len(r.fake.Started()) > 1 {
						t.Errorf("started %v", r.fake.Started())
					}
					time.Sleep(time.Minute)
					// A command that fails alone does not take its session along.
					left, _ := r.fake.List(t.Context())
					if session != "" && !slices.Contains(left, "s-a") {
						t.Errorf("the session's sandbox was ended for one command: %v", left)
					}
					if len(left) != len(session) || len(r.fake.Held("s-a")) != 0 {
						t.Errorf("left: %v, held: %v", left, r.fake.Held("s-a"))
					}
				})
			})
		}
	}
}

// TestGuestIsSilent ends a session's sandbox when nothing in it can be reached.
func TestGuestIsSilent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var silent atomic.Bool
		r := newRig(t, enginefake.Config{
			Script: func(*guestv1.StartRequest) enginefake.Script { return enginefake.Script{} },
			Hooks: enginefake.Hooks{Answer: func(_ string, _ *guestv1.Request, a *enginefake.Answer) {
				a.Drop = silent.Load()
			}},
		})
		r.session("a")
		refs := []execution.Ref{r.start(execution.Request{Session: "a"}), r.start(execution.Request{Session: "a"})}
		time.Sleep(time.Second)
		silent.Store(true)
		for _, ref := range refs {
			if res := r.wait(ref).Result; res.Reason != execution.SandboxLost || !res.TreeEmpty {
				t.Errorf("%+v", res)
			}
		}
		if left, _ := r.fake.List(t.Context()); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// TestSandboxDies under a command, during its start and before.
func TestSandboxDies(t *testing.T) {
	for name, after := range map[string]time.Duration{"before the start": 0, "during the start": 2 * time.Second, "while it runs": 10 * time.Second} {
		for _, session := range []string{"", "a"} {
			t.Run(name+" "+session, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					r := newRig(t, scripted(enginefake.Script{StartDelay: 5 * time.Second, Steps: []enginefake.Step{enginefake.Stdout(6*time.Second, "x")}}))
					sandbox := "s-" + session
					if session != "" {
						r.session(session)
						if after == 0 {
							r.fake.Die(sandbox)
						}
					}
					ref := r.start(execution.Request{Session: session})
					begin := time.Now()
					if session == "" {
						sandbox = "e-" + ref.ID
						if after == 0 {
							t.Skip("it is only just made")
						}
					}
					time.Sleep(after)
					r.fake.Die(sandbox)
					// A session asks for the end of its executions when its sandbox is gone.
					var wg sync.WaitGroup
					wg.Go(func() {
						time.Sleep(time.Millisecond)
						_ = r.EndSession(t.Context(), session)
					})
					got := r.watch(ref, nil)
					wg.Wait()
					if after == 0 {
						if got.result.Reason != execution.SessionEnded || !got.result.Times.Started.IsZero() {
							t.Errorf("nothing was tried before the session ended, and yet: %+v", got.result)
						}
						return
					}
					if got.result.Reason != execution.SandboxLost || !got.result.TreeEmpty || got.result.Outcome() != execution.Crashed {
						t.Errorf("%+v", got.result)
					}
					want := "whether the command was started is not known"
					if after == 10*time.Second {
						want = "whether the command finished is not known"
					}
					contains(t, got.result.Detail, "the sandbox ended", want)
					if took := time.Since(begin) - after; took > time.Second {
						t.Errorf("noticed after %v", took)
					}
					synctest.Wait()
					if left, _ := r.fake.List(t.Context()); len(left) != 0 {
						t.Errorf("left: %v", left)
					}
				})
			})
		}
	}
}

// TestEngineFails makes and ends sandboxes with an engine in trouble.
func TestEngineFails(t *testing.T) {
	hang := func(ctx context.Context, _ string) error { <-ctx.Done(); return context.Cause(ctx) }
	refuse := func(context.Context, string) error { return errors.New("out of user ids") }
	t.Run("create hangs", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r := newRig(t, enginefake.Config{Hooks: enginefake.Hooks{Create: hang}})
			begin := time.Now()
			res := r.run(execution.Request{})
			if res.Reason != execution.StartFailed || time.Since(begin) != 2*time.Minute {
				t.Errorf("%+v after %v", res, time.Since(begin))
			}
			contains(t, res.Detail, "no sandbox within 2m0s")
		})
	})
	t.Run("create fails and leaves a sandbox", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r := newRig(t, enginefake.Config{Hooks: enginefake.Hooks{Created: refuse}})
			if res := r.run(execution.Request{}); res.Reason != execution.StartFailed || res.Evidence["kind"] != "no_sandbox" {
				t.Errorf("%+v", res)
			}
			synctest.Wait()
			if left, _ := r.fake.List(t.Context()); len(left) != 0 || len(r.fake.Made()) != 1 {
				t.Errorf("made %v, left %v", r.fake.Made(), left)
			}
		})
	})
	t.Run("cancelled create leaves a sandbox", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r := newRig(t, enginefake.Config{Hooks: enginefake.Hooks{Created: hang}})
			ref := r.start(execution.Request{})
			time.Sleep(time.Second)
			if e := r.cancel(ref, 0); e.Result.Reason != execution.Cancelled || len(r.fake.Started()) != 0 {
				t.Errorf("%+v, started %v", e.Result, r.fake.Started())
			}
			synctest.Wait()
			if left, _ := r.fake.List(t.Context()); len(left) != 0 || len(r.fake.Made()) != 1 {
				t.Errorf("made %v, left %v", r.fake.Made(), left)
			}
		})
	})
	t.Run("terminate fails for a while", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			var fails atomic.Int64
			r := newRig(t, enginefake.Config{Hooks: enginefake.Hooks{Terminate: func(context.Context, string) error {
				if fails.Add(1) <= 5 {
					return errors.New("device or resource busy")
				}
				return nil
			}}})
			begin := time.Now()
			r.run(execution.Request{})
			if time.Since(begin) > time.Second {
				t.Errorf("the end of a sandbox kept its result waiting for %v", time.Since(begin))
			}
			time.Sleep(time.Minute)
			if left, _ := r.fake.List(t.Context()); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
			contains(t, r.log.String(), "device or resource busy")
		})
	})
	t.Run("terminate fails for a while where the end was forced", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			var fails atomic.Int64
			r := newRig(t, enginefake.Config{
				Script: func(*guestv1.StartRequest) enginefake.Script { return enginefake.Script{} },
				Hooks: enginefake.Hooks{Terminate: func(context.Context, string) error {
					if fails.Add(1) <= 5 {
						return errors.New("device or resource busy")
					}
					return nil
				}},
			})
			ref := r.start(execution.Request{})
			time.Sleep(time.Second)
			res := r.cancel(ref, 0).Result
			if !res.TreeEmpty || res.Reason != execution.Cancelled {
				t.Errorf("%+v", res)
			}
			if left, _ := r.fake.List(t.Context()); len(left) != 0 {
				t.Errorf("the end was told and there is %v", left)
			}
		})
	})
	t.Run("terminate never works", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r := newRig(t, enginefake.Config{
				Script: func(*guestv1.StartRequest) enginefake.Script { return enginefake.Script{} },
				Hooks:  enginefake.Hooks{Terminate: func(context.Context, string) error { return errors.New("device or resource busy") }},
			})
			ref := r.start(execution.Request{})
			time.Sleep(time.Second)
			begin := time.Now()
			if res := r.cancel(ref, 0).Result; res.TreeEmpty || res.Reason != execution.Cancelled {
				t.Errorf("%+v", res)
			}
			if took := time.Since(begin); took < 2*time.Minute || took > 2*time.Minute+5*time.Second {
				t.Errorf("it took %v", took)
			}
			time.Sleep(5 * time.Minute)
			contains(t, r.log.String(), "a sandbox is left until the next start")
		})
	})
	t.Run("terminate hangs", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r := newRig(t, enginefake.Config{
				Script: func(*guestv1.StartRequest) enginefake.Script { return enginefake.Script{} },
				Hooks:  enginefake.Hooks{Terminate: hang},
			})
			ref := r.start(execution.Request{})
			time.Sleep(time.Second)
			if res := r.cancel(ref, 0).Result; res.TreeEmpty || res.Reason != execution.Cancelled {
				t.Errorf("%+v", res)
			}
		})
	})
}

// TestStoreFails writes the end again and again until it is stored, and holds nobody
// up who only reads.
func TestStoreFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "x")}, Exit: enginefake.Exit(0)}))
		var tries atomic.Int64
		var broken atomic.Bool
		broken.Store(true)
		r.memory.hook(func(op string, _ execution.Execution) error {
			if op == "update" && broken.Load() {
				tries.Add(1)
				return errDisk
			}
			return nil
		}, nil)
		ref := r.start(execution.Request{})
		if got := r.watch(ref, nil); got.result == nil {
			t.Error("no result for the watcher")
		}
		if e := r.get(ref); e.State != execution.Ended {
			t.Errorf("state %d", e.State)
		}
		time.Sleep(10 * time.Minute)
		if n := tries.Load(); n < 300 || n > 700 {
			t.Errorf("%d tries in 10 minutes", n)
		}
		if lines := strings.Count(r.log.String(), "cannot write, trying again"); lines == 0 || lines > 12 {
			t.Errorf("%d lines in the log", lines)
		}
		if r.Running() != 1 {
			t.Errorf("%d running", r.Running())
		}
		broken.Store(false)
		r.wait(ref)
		if stored, _ := r.memory.stored(ref.ID); stored.State != execution.Ended || stored.Result == nil {
			t.Errorf("%+v", stored)
		}
	})
}

// TestEndThatCannotBeSealed is not told to anybody: it would not be true after a crash.
func TestEndThatCannotBeSealed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(time.Second)}, Exit: enginefake.Exit(0)}))
		ref := r.start(execution.Request{})
		dir := filepath.Join(r.dir, ref.ID)
		if err := os.Rename(dir, dir+".away"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if e := r.get(ref); e.State != execution.Running || e.Result != nil {
			t.Errorf("%+v", e)
		}
		wantFault(t, r.Delete(t.Context(), ref), fault.FailedPrecondition, "EXECUTION_NOT_ENDED")
		if err := os.Rename(dir+".away", dir); err != nil {
			t.Fatal(err)
		}
		if e := r.wait(ref); e.Result.Reason != execution.Exited || e.Result.Times.Ended.Sub(e.CreateTime) != time.Second {
			t.Errorf("%+v", e.Result)
		}
		r.watch(ref, nil)
	})
}

// TestRecordIsTakenAway does not wait for ever for a record that somebody deleted.
func TestRecordIsTakenAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(time.Second)}, Exit: enginefake.Exit(0)}))
		ref := r.start(execution.Request{})
		if err := r.memory.DeleteExecution(t.Context(), ref.ID); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Wait(t.Context(), ref); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if left, _ := r.fake.List(t.Context()); len(left) != 0 || r.Running() != 0 {
			t.Errorf("left %v, %d running", left, r.Running())
		}
	})
}

// TestBackPressure pauses a program whose output is not taken, and loses nothing.
func TestBackPressure(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{
			Steps: []enginefake.Step{enginefake.Stdout(0, strings.Repeat("x", 5<<20))}, Exit: enginefake.Exit(0),
		}))
		got := r.watch(r.start(execution.Request{}), nil)
		if len(got.output["stdout"]) != 5<<20 {
			t.Errorf("%d bytes", len(got.output["stdout"]))
		}
	})
}
