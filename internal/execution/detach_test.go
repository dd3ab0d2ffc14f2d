package execution_test

import (
	"context"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

func detach(grace time.Duration) execution.Policies {
	return execution.Policies{Detach: execution.CancelDetached, DetachGrace: &grace}
}

// TestDetachPolicy ends what nobody watches, when it should and not before.
func TestDetachPolicy(t *testing.T) {
	const s = time.Second
	type visit struct{ from, to time.Duration }
	for name, test := range map[string]struct {
		policies execution.Policies
		attended bool
		visits   []visit
		want     execution.Reason
		ended    time.Duration
	}{
		"kept running":                 {execution.Policies{}, false, nil, execution.Exited, 100 * s},
		"kept running after a visit":   {execution.Policies{Detach: execution.KeepRunning}, false, []visit{{1 * s, 2 * s}}, execution.Exited, 100 * s},
		"nobody comes":                 {detach(20 * s), false, nil, execution.Abandoned, 20 * s},
		"nobody comes, by default":     {execution.Policies{Detach: execution.CancelDetached}, false, nil, execution.Abandoned, 10 * s},
		"nobody comes, no grace":       {detach(0), false, nil, execution.Abandoned, 0},
		"the only one leaves":          {detach(20 * s), false, []visit{{5 * s, 30 * s}}, execution.Abandoned, 50 * s},
		"one leaves, another stays":    {detach(5 * s), false, []visit{{0, 30 * s}, {10 * s, 99 * s}}, execution.Exited, 100 * s},
		"it comes back in time":        {detach(20 * s), false, []visit{{0, 30 * s}, {49 * s, 60 * s}, {79 * s, 95 * s}}, execution.Exited, 100 * s},
		"the one who starts it stays":  {detach(0), true, []visit{{1 * s, 60 * s}}, execution.Abandoned, 60 * s},
		"the one who starts it is out": {detach(0), true, nil, execution.Abandoned, 10 * s},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(100 * s)}, Exit: enginefake.Exit(0)}))
				begin := time.Now()
				ref := r.start(execution.Request{Policies: test.policies, Attended: test.attended})
				for _, v := range test.visits {
					time.AfterFunc(v.from, func() {
						w, err := r.Watch(context.Background(), ref, nil)
						if err != nil {
							t.Error(err)
							return
						}
						time.AfterFunc(v.to-v.from, w.Close)
					})
				}
				e := r.wait(ref)
				if took := time.Since(begin); e.Result.Reason != test.want || took != test.ended {
					t.Errorf("%+v after %v", e.Result, took)
				}
				if test.want == execution.Abandoned && (e.Result.Outcome() != execution.CancelledByAny || e.Result.Evidence["detach_grace_ms"] == "" || !e.Result.TreeEmpty) {
					t.Errorf("%+v", e.Result)
				}
				time.Sleep(100 * s) // for those who still leave
			})
		})
	}
}

// TestDetachOverARestart counts anew: those who watched need time to come back. That they
// were sent away does not count.
func TestDetachOverARestart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{}))
		ref := r.start(execution.Request{Policies: detach(10 * time.Second)})
		w, err := r.Watch(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		time.AfterFunc(time.Second, w.Close) // by the stop
		if err := r.Drain(ctx); err == nil {
			t.Error("nothing runs")
		}
		r.restart()
		time.Sleep(9 * time.Second)
		if e := r.get(ref); e.State != execution.Running || *e.Policies.DetachGrace != 10*time.Second {
			t.Errorf("%+v", e)
		}
		if w, err = r.Watch(t.Context(), ref, nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		w.Close()
		begin := time.Now()
		if e := r.wait(ref); e.Result.Reason != execution.Abandoned || time.Since(begin) != 10*time.Second {
			t.Errorf("%+v after %v", e.Result, time.Since(begin))
		}
	})
}

func TestPoliciesAreChecked(t *testing.T) {
	r := newRig(t, enginefake.Config{})
	for name, test := range map[string]struct {
		policies execution.Policies
		reason   string
	}{
		"limit":           {execution.Policies{OnLimit: "drop"}, "ON_LIMIT"},
		"mode":            {execution.Policies{Detach: "leave"}, "DETACH_MODE"},
		"grace":           {detach(time.Hour + 1), "DETACH_GRACE"},
		"negative grace":  {detach(-1), "DETACH_GRACE"},
		"retention":       {execution.Policies{Retention: execution.MaxRetention + 1}, "RETENTION"},
		"negative":        {execution.Policies{Retention: -1}, "RETENTION"},
		"what is allowed": {execution.Policies{OnLimit: execution.Kill, Detach: execution.KeepRunning, Retention: execution.MaxRetention, DetachGrace: ptr(time.Hour)}, ""},
	} {
		_, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}, Policies: test.policies})
		if fault.ReasonOf(err) != test.reason || err != nil && fault.KindOf(err) != fault.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, idle := range []time.Duration{-1, time.Millisecond, time.Second + 1, 8 * 24 * time.Hour} {
		_, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}, IdleTimeout: idle}})
		wantFault(t, err, fault.Invalid, "IDLE_TIMEOUT")
	}
}
