package execution_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// renamed is an engine under another name, which has placements.
type renamed struct {
	*enginefake.Engine
	name string
}

func (r *renamed) Name() string                     { return r.name }
func (r *renamed) CheckSpec(spec engine.Spec) error { return r.CheckLimits(spec.Limits) }

// Create makes a sandbox wherever it should be.
func (r *renamed) Create(ctx context.Context, spec engine.Spec) (engine.Sandbox, error) {
	spec.Placement = engine.Placement{}
	return r.Engine.Create(ctx, spec)
}

// twoEngines are those of a rig with another engine beside the default one.
func twoEngines(t *testing.T, r *rig, cfg enginefake.Config) *renamed {
	t.Helper()
	other := &renamed{Engine: enginefake.New(cfg), name: "other"}
	t.Cleanup(other.Shutdown)
	r.config = func(c *execution.Config) { c.Engines = engines.Set{r.engine, other} }
	r.restart()
	return other
}

// TestChoiceOfEngine runs each execution where it was asked to, also over a restart.
func TestChoiceOfEngine(t *testing.T) {
	bubble(t, func(t *testing.T) {
		slow := enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "early "), enginefake.Stdout(time.Minute, "late")}, Exit: enginefake.Exit(0)}
		r := newRig(t, scripted(slow))
		other := twoEngines(t, r, scripted(slow))
		first := r.start(execution.Request{})
		second := r.start(execution.Request{Engine: "other", Placement: engine.Placement{GPU: "T4"}})
		time.Sleep(time.Second)
		for ref, want := range map[execution.Ref]string{first: "fake", second: "other"} {
			if e := r.get(ref); e.Engine != want {
				t.Errorf("it is on %s, want %s", e.Engine, want)
			}
		}
		here, _ := r.fake.List(t.Context())
		there, _ := other.List(t.Context())
		if len(here) != 1 || here[0] != "e-"+first.ID || len(there) != 1 || there[0] != "e-"+second.ID {
			t.Errorf("sandboxes %v and %v", here, there)
		}
		r.restart()
		for _, ref := range []execution.Ref{first, second} {
			if e := r.wait(ref); e.Result.Reason != execution.Exited {
				t.Errorf("%+v", e.Result)
			}
			if got := r.watch(ref, nil); string(got.output["stdout"]) != "early late" {
				t.Errorf("%q", got.output)
			}
		}
	})
}

// TestEngineIsRefused has nothing left of what asks for an engine that is not there.
func TestEngineIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Exit: enginefake.Exit(0)}))
		r.session("a")
		for _, test := range []struct {
			request execution.Request
			reason  string
		}{
			{execution.Request{Engine: "moon"}, "ENGINE_NOT_AVAILABLE"},
			{execution.Request{Placement: engine.Placement{GPU: "T4"}}, "PLACEMENT_NOT_AVAILABLE"},
			{execution.Request{Session: "a", Engine: "fake"}, "ENGINE_WITH_PARENT"},
			{execution.Request{Session: "a", Placement: engine.Placement{Regions: []string{"eu"}}}, "PLACEMENT_WITH_PARENT"},
		} {
			test.request.Command.Args = []string{"program"}
			if _, err := r.Start(t.Context(), test.request); fault.ReasonOf(err) != test.reason {
				t.Errorf("%+v: %v, want %s", test.request, err, test.reason)
			}
		}
		if n := len(r.memory.all()); n != 0 {
			t.Errorf("%d executions were recorded", n)
		}
	})
}

// TestEngineIsNotConfiguredAnyMore leaves alone what is on such an engine, and goes on with
// it when the engine is there again.
func TestEngineIsNotConfiguredAnyMore(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Exit: enginefake.Exit(0)}))
		other := twoEngines(t, r, scripted(enginefake.Script{
			Steps: []enginefake.Step{enginefake.Stdout(0, "early "), enginefake.Stdout(time.Hour/4, "late")}, Exit: enginefake.Exit(3),
		}))
		ref := r.start(execution.Request{Engine: "other"})
		time.Sleep(time.Minute)
		both := r.config
		r.config = nil
		r.restart()

		if e := r.get(ref); e.State != execution.Running || e.Result != nil {
			t.Errorf("it is told of as %+v", e)
		}
		w, err := r.Watch(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		var seen []byte
		for {
			event, err := w.Next(t.Context())
			if err != nil {
				if fault.ReasonOf(err) != "ENGINE_NOT_AVAILABLE" || errors.Is(err, io.EOF) {
					t.Errorf("its stream ends with %v", err)
				}
				break
			}
			if event.Output != nil {
				seen = append(seen, event.Output.Data...)
			}
		}
		if string(seen) != "early " {
			t.Errorf("its stream has %q", seen)
		}
		if _, err := r.Wait(t.Context(), ref); fault.ReasonOf(err) != "ENGINE_NOT_AVAILABLE" {
			t.Errorf("waiting for it: %v", err)
		}
		if _, err := r.Cancel(t.Context(), ref, execution.Cancellation{By: "me"}); fault.ReasonOf(err) != "ENGINE_NOT_AVAILABLE" {
			t.Errorf("cancelling it: %v", err)
		}
		if left, _ := other.List(t.Context()); len(left) != 1 || r.Running() != 0 {
			t.Errorf("sandboxes %v, %d running", left, r.Running())
		}
		contains(t, r.log.String(), "is left alone")

		r.config = both
		r.restart()
		if e := r.wait(ref); e.Result.Reason != execution.Exited || *e.Result.ExitCode != 3 {
			t.Errorf("%+v", e.Result)
		}
		if got := r.watch(ref, nil); string(got.output["stdout"]) != "early late" {
			t.Errorf("%q", got.output)
		}
	})
}
