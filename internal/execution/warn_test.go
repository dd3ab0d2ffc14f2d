package execution_test

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
)

// warned is a warning, as times since the first event.
type warned struct {
	Deadline   execution.Deadline
	At, Expire time.Duration
}

func warnings(got told) (all []warned) {
	for i, e := range got.events {
		if e.Warning != nil {
			all = append(all, warned{e.Warning.Deadline, got.at[i].Round(100 * time.Millisecond), e.Warning.ExpireTime.Sub(got.events[0].Time).Round(100 * time.Millisecond)})
		}
	}
	return all
}

// TestWarnings come when a tenth of a time is left, at most a minute, and for no time
// below ten seconds.
func TestWarnings(t *testing.T) {
	const s, m = time.Second, time.Minute
	silent := enginefake.Script{}
	for name, test := range map[string]struct {
		script   enginefake.Script
		command  execution.Command
		lifetime time.Duration // of its session
		want     []warned
		reason   execution.Reason
	}{
		"timeout":            {silent, execution.Command{Timeout: 100 * s}, 0, []warned{{execution.DeadlineTimeout, 90 * s, 100 * s}}, execution.TimedOut},
		"a long timeout":     {silent, execution.Command{Timeout: 100 * m}, 0, []warned{{execution.DeadlineTimeout, 99 * m, 100 * m}}, execution.TimedOut},
		"the shortest":       {silent, execution.Command{Timeout: 10 * s}, 0, []warned{{execution.DeadlineTimeout, 9 * s, 10 * s}}, execution.TimedOut},
		"too short":          {silent, execution.Command{Timeout: 9999 * time.Millisecond}, 0, nil, execution.TimedOut},
		"it ends before":     {enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(89 * s)}, Exit: enginefake.Exit(0)}, execution.Command{Timeout: 100 * s}, 0, nil, execution.Exited},
		"idle":               {silent, execution.Command{Timeout: time.Hour, IdleTimeout: 50 * s}, 0, []warned{{execution.DeadlineIdle, 45 * s, 50 * s}}, execution.IdleTimedOut},
		"idle, too short":    {silent, execution.Command{Timeout: time.Hour, IdleTimeout: 5 * s}, 0, nil, execution.IdleTimedOut},
		"the session's end":  {silent, execution.Command{Timeout: 3 * time.Hour}, 10 * m, []warned{{execution.DeadlineSessionExpiry, 9 * m, 10 * m}, {execution.DeadlineTimeout, 179 * m, 180 * m}}, execution.TimedOut},
		"idle and timeout":   {silent, execution.Command{Timeout: 60 * s, IdleTimeout: 100 * s}, 0, []warned{{execution.DeadlineTimeout, 54 * s, 60 * s}}, execution.TimedOut},
		"idle, active, idle": {enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(46*s, "x"), enginefake.Stdout(10*s, "y")}}, execution.Command{Timeout: time.Hour, IdleTimeout: 50 * s}, 0, []warned{{execution.DeadlineIdle, 45 * s, 50 * s}, {execution.DeadlineIdle, 101 * s, 106 * s}}, execution.IdleTimedOut},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, scripted(test.script))
				request := execution.Request{Command: test.command}
				request.Command.Args = []string{"x"}
				if test.lifetime > 0 {
					r.session("a")
					request.Session = "a"
					r.sessions.lifetime, r.sessions.expires = test.lifetime, time.Now().Add(test.lifetime)
				}
				got := r.watch(r.start(request), nil)
				if diff := cmp.Diff(test.want, warnings(got)); diff != "" {
					t.Errorf("(-want +got)\n%s", diff)
				}
				if got.result.Reason != test.reason || got.result.Outcome() != (&execution.Result{Reason: test.reason, ExitCode: got.result.ExitCode}).Outcome() {
					t.Errorf("%+v", got.result)
				}
				if test.reason == execution.IdleTimedOut && (got.result.Evidence["idle_timeout_ms"] == "" || got.result.Outcome() != execution.Timeout) {
					t.Errorf("%+v", got.result)
				}
			})
		})
	}
}

// TestWarningsOverARestart are given at most once, and not forgotten.
func TestWarningsOverARestart(t *testing.T) {
	for name, at := range map[string][]time.Duration{
		"before":         {50 * time.Second},
		"after":          {95 * time.Second},
		"again":          {50 * time.Second, 92 * time.Second, 95 * time.Second},
		"while it is on": {89999 * time.Millisecond},
		"at the start":   {time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, scripted(enginefake.Script{}))
				begin := time.Now()
				ref := r.start(execution.Request{Command: execution.Command{Timeout: 100 * time.Second}})
				for _, at := range at {
					time.Sleep(time.Until(begin.Add(at)))
					r.restart()
				}
				got := warnings(r.watch(ref, nil))
				if len(got) != 1 || got[0].Deadline != execution.DeadlineTimeout || got[0].At < 90*time.Second || got[0].At > 91*time.Second || got[0].Expire != 100*time.Second {
					t.Errorf("%+v", got)
				}
			})
		})
	}
}

// TestPostponedExpiry is asked for again before it is warned of.
func TestPostponedExpiry(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{}))
		r.session("a")
		begin := time.Now()
		r.sessions.lifetime, r.sessions.expires = 100*time.Second, begin.Add(100*time.Second)
		ref := r.start(execution.Request{Session: "a", Command: execution.Command{Timeout: 5 * time.Minute}})
		time.Sleep(time.Minute)
		r.sessions.mu.Lock()
		r.sessions.lifetime, r.sessions.expires = 200*time.Second, begin.Add(200*time.Second)
		r.sessions.mu.Unlock()
		want := []warned{{execution.DeadlineSessionExpiry, 180 * time.Second, 200 * time.Second}, {execution.DeadlineTimeout, 270 * time.Second, 300 * time.Second}}
		if diff := cmp.Diff(want, warnings(r.watch(ref, nil))); diff != "" {
			t.Error(diff)
		}
	})
}

// TestWarningThatCannotBeNoted is given late rather than twice.
func TestWarningThatCannotBeNoted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{}))
		begin := time.Now()
		r.memory.hook(func(op string, e execution.Execution) error {
			if op == "update" && e.State == execution.Running && time.Since(begin) < 95*time.Second {
				return errors.New("disk on fire")
			}
			return nil
		}, nil)
		got := warnings(r.watch(r.start(execution.Request{Command: execution.Command{Timeout: 100 * time.Second}}), nil))
		if len(got) != 1 || got[0].At < 95*time.Second || got[0].At > 96*time.Second {
			t.Errorf("%+v", got)
		}
	})
}

// TestLateAnswerToTheStart is of a machine with too much to do: what the guest measured
// is not moved by how late its answer came.
func TestLateAnswerToTheStart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		cfg := scripted(enginefake.Script{
			StartMicros: 1000,
			Steps:       []enginefake.Step{enginefake.Stdout(2*time.Second, "x"), enginefake.Pause(10 * time.Second)}, Exit: enginefake.Exit(0),
		})
		cfg.Hooks.Answer = func(_ string, q *guestv1.Request, _ *enginefake.Answer) {
			if q.GetStart() != nil {
				time.Sleep(8 * time.Second)
			}
		}
		r := newRig(t, cfg)
		begin := time.Now()
		got := r.watch(r.start(execution.Request{}), nil)
		times := got.result.Times
		if since := times.Started.Sub(begin); since != time.Millisecond {
			t.Errorf("started after %v", since)
		}
		if since := times.FirstOutput.Sub(begin); since < 2*time.Second || since > 2*time.Second+time.Millisecond {
			t.Errorf("first output after %v", since)
		}
		if appended := got.events[1].Time; times.FirstOutput.After(appended) {
			t.Errorf("first output at %v, appended at %v", times.FirstOutput, appended)
		}
		inOrder(t, times)
	})
}

// TestFirstOutputIsNotLaterThanItWasRead, whatever the guest says.
func TestFirstOutputIsNotLaterThanItWasRead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		exit := enginefake.Exit(0)
		exit.FirstOutputMicros, exit.RunMicros = ptr(uint64(9e6)), 10e6
		r := newRig(t, scripted(enginefake.Script{
			Lie: true, Exit: exit, Steps: []enginefake.Step{enginefake.Stdout(2*time.Second, "x"), enginefake.Pause(8 * time.Second)},
		}))
		got := r.watch(r.start(execution.Request{}), nil)
		if times := got.result.Times; times.FirstOutput.After(got.events[1].Time) {
			t.Errorf("first output at %v, appended at %v", times.FirstOutput, got.events[1].Time)
		}
		inOrder(t, got.result.Times)
	})
}
