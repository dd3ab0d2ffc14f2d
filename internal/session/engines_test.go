package session_test

import (
	"context"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/session"
)

// renamed is an engine under another name, which has placements.
type renamed struct {
	*enginefake.Engine
	name string
}

func (r renamed) Name() string                     { return r.name }
func (r renamed) CheckSpec(spec engine.Spec) error { return r.CheckLimits(spec.Limits) }

// Create makes a sandbox wherever it should be.
func (r renamed) Create(ctx context.Context, spec engine.Spec) (engine.Sandbox, error) {
	spec.Placement = engine.Placement{}
	return r.Engine.Create(ctx, spec)
}

// TestChoiceOfEngine has each session live where it was asked to; one on an engine that is
// not configured any more is left alone until it is again.
func TestChoiceOfEngine(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		other := renamed{enginefake.New(enginefake.Config{}), "other"}
		t.Cleanup(other.Shutdown)
		with := func(set engines.Set) *session.Service {
			t.Helper()
			s, err := session.New(session.Config{Engines: set, Store: r.store, Dir: r.dir})
			if err != nil {
				t.Fatal(err)
			}
			s.SetExecutions(r.executions)
			if err := s.Recover(t.Context()); err != nil {
				t.Fatal(err)
			}
			return s
		}
		both := engines.Set{r.fake, other}
		s := with(both)
		for _, test := range []struct {
			request session.Request
			reason  string
		}{
			{session.Request{Engine: "moon"}, "ENGINE_NOT_AVAILABLE"},
			{session.Request{Placement: engine.Placement{Runtime: "vm"}}, "PLACEMENT_NOT_AVAILABLE"},
		} {
			if _, err := s.Create(t.Context(), test.request); fault.ReasonOf(err) != test.reason {
				t.Errorf("%+v: %v, want %s", test.request, err, test.reason)
			}
		}
		where := engine.Placement{GPU: "T4:2", Regions: []string{"us-east"}, Runtime: "gvisor"}
		made, err := s.Create(t.Context(), session.Request{Engine: "other", Placement: where, Lifetime: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		ref := session.Ref{ID: made.ID}
		if made, err = s.WaitStarted(t.Context(), ref); err != nil || made.Engine != "other" || made.State != session.Running || made.Details.Placement.GPU != "T4:2" {
			t.Fatalf("%+v, %v", made, err)
		}
		if name, err := s.EngineOf(t.Context(), made.ID); err != nil || name != "other" {
			t.Errorf("EngineOf: %q, %v", name, err)
		}
		if here, _ := r.fake.List(t.Context()); len(here) != 0 {
			t.Errorf("on the default engine are %v", here)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}

		s = with(engines.Set{r.fake})
		if now, err := s.Get(t.Context(), ref); err != nil || now.State != session.Running {
			t.Errorf("it is told of as %+v, %v", now, err)
		}
		if _, err := s.Sandbox(t.Context(), made.ID, caller.Caller{}); fault.ReasonOf(err) != "ENGINE_NOT_AVAILABLE" {
			t.Errorf("its sandbox: %v", err)
		}
		if _, err := s.Terminate(t.Context(), ref, "me", idempotency.Key{}); fault.ReasonOf(err) != "ENGINE_NOT_AVAILABLE" {
			t.Errorf("ending it: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}

		s = with(both)
		defer s.Close()
		if sb, err := s.Sandbox(t.Context(), made.ID, caller.Caller{}); err != nil || sb.ID() != made.Sandbox {
			t.Errorf("%v, %v", sb, err)
		}
		if ended, err := s.Terminate(t.Context(), ref, "me", idempotency.Key{}); err != nil || ended.State != session.Terminated {
			t.Errorf("%+v, %v", ended, err)
		}
		if left, _ := other.List(t.Context()); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
}
