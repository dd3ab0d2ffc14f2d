package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/session"
)

// fakeUnfinished knows fixed records.
type fakeUnfinished struct {
	sessions   []session.Session
	executions []execution.Execution
	sessionErr error
	executeErr error
}

func (f *fakeUnfinished) UnfinishedSessions(context.Context) ([]session.Session, error) {
	return f.sessions, f.sessionErr
}

func (f *fakeUnfinished) UnfinishedExecutions(context.Context) ([]execution.Execution, error) {
	return f.executions, f.executeErr
}

// straysOf are strays of one engine.
func straysOf(e engine.Engine, ids ...string) []stray {
	var all []stray
	for _, id := range ids {
		all = append(all, stray{e, id})
	}
	return all
}

// names are those of strays, with their engines' if that is not "fake".
func names(all []stray) []string {
	var out []string
	for _, one := range all {
		if name := one.engine.Name(); name != "fake" {
			out = append(out, name+"/"+one.sandbox)
		} else {
			out = append(out, one.sandbox)
		}
	}
	return out
}

func TestFindStrays(t *testing.T) {
	known := &fakeUnfinished{
		sessions: []session.Session{{ID: "1", Sandbox: "s-1"}, {ID: "2", Sandbox: "s-2"}},
		executions: []execution.Execution{
			{ID: "1", Sandbox: "e-1"},
			{ID: "2", Session: "1", Sandbox: "s-1"},
			// Its session has ended: the sandbox is a stray all the same.
			{ID: "3", Session: "3", Sandbox: "s-3"},
			// Not yet with a sandbox.
			{ID: "4", Sandbox: "e-4"},
		},
	}
	strays, err := findStrays(t.Context(), engines.Set{newFakeEngine("s-1", "s-2", "s-3", "s-4", "e-1", "e-2", "trial-x")}, known, discard())
	if err != nil || fmt.Sprint(names(strays)) != "[e-2 s-3 s-4 trial-x]" {
		t.Errorf("%v, %v", strays, err)
	}
	if strays, err := findStrays(t.Context(), engines.Set{newFakeEngine()}, known, discard()); err != nil || len(strays) != 0 {
		t.Errorf("%v, %v", strays, err)
	}
	for _, broken := range []*fakeUnfinished{{sessionErr: errors.New("no")}, {executeErr: errors.New("no")}} {
		if strays, err := findStrays(t.Context(), engines.Set{newFakeEngine("s-1")}, broken, discard()); err == nil || strays != nil {
			t.Errorf("without records %v are strays, %v", strays, err)
		}
	}
}

func TestEndStrays(t *testing.T) {
	fake := newFakeEngine("a", "b", "c", "needed", "stuck", "broken")
	fake.stuck["stuck"], fake.broken["broken"] = true, true
	logs := &syncBuffer{}
	endStrays(t.Context(), straysOf(fake, "a", "stuck", "b", "gone", "broken", "c"), slog.New(slog.NewTextHandler(logs, nil)))
	if fmt.Sprint(fake.gone()) != "[a b c]" {
		t.Errorf("ended %v", fake.gone())
	}
	for _, want := range []string{
		`msg="ended a sandbox that nobody needs" sandbox=a engine=fake processes=1`,
		`sandbox=stuck engine=fake error="it does not die"`,
		`sandbox=broken engine=fake error="open it: the pipe is broken"`,
	} {
		if !strings.Contains(logs.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, logs)
		}
	}
}

func TestEndStraysIsInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	fake := newFakeEngine("a")
	endStrays(ctx, straysOf(fake, "a"), discard())
	if len(fake.gone()) != 0 {
		t.Errorf("ended %v", fake.gone())
	}
}

// TestSweepAtAStop: what a stop that ends everything finds half swept is swept.
func TestSweepAtAStop(t *testing.T) {
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	for onStop, want := range map[configv1.OnStop]string{configv1.OnStop_ON_STOP_KEEP: "[]", configv1.OnStop_ON_STOP_TERMINATE: "[a b]"} {
		fake := newFakeEngine("a", "b")
		d := &Daemon{log: discard(), settings: &configv1.Config{OnStop: onStop}, engines: engines.Set{fake}, strays: straysOf(fake, "a", "b")}
		d.sweep(stopped)
		if fmt.Sprint(fake.gone()) != want {
			t.Errorf("%v: ended %v, want %s", onStop, fake.gone(), want)
		}
	}
}

// TestStraysOfSeveralEngines looks at each engine; one that does not answer keeps nobody
// from starting.
func TestStraysOfSeveralEngines(t *testing.T) {
	known := &fakeUnfinished{executions: []execution.Execution{{ID: "1", Sandbox: "e-1", Engine: "far"}}}
	far := named{newFakeEngine("e-1", "e-2"), "far"}
	silent := named{newFakeEngine("e-3"), "silent"}
	silent.listErr = errors.New("no route to it")
	logs := &syncBuffer{}
	strays, err := findStrays(t.Context(), engines.Set{newFakeEngine("s-9"), far, silent}, known, slog.New(slog.NewTextHandler(logs, nil)))
	if err != nil || fmt.Sprint(names(strays)) != "[s-9 far/e-2]" {
		t.Errorf("%v, %v", names(strays), err)
	}
	if !strings.Contains(logs.String(), "no route to it") || !strings.Contains(logs.String(), "engine=silent") {
		t.Errorf("the log has %s", logs)
	}
}

// TestSweepAgain ends what was left behind when it is found twice, and nothing that
// somebody may still need: what a session is about to move to, what the pool keeps, what an
// image is built in.
func TestSweepAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFakeEngine("e-01a", "e-01b", "s-01c", "s-01d-2", "w-01e", "b-01f", "s-01g")
		known := &fakeUnfinished{
			executions: []execution.Execution{{ID: "01b", Sandbox: "e-01b"}},
			sessions:   []session.Session{{ID: "01d", Sandbox: "s-01d"}},
		}
		d := &Daemon{log: discard(), settings: &configv1.Config{}, engines: engines.Set{fake}, known: known}
		ctx, cancel := context.WithCancel(t.Context())
		goRun(t, func() { d.sweep(ctx) })
		time.Sleep(sweepInterval + time.Second)
		if len(fake.gone()) != 0 {
			t.Errorf("found once, and ended: %v", fake.gone())
		}
		// Somebody ends one of them in time.
		fake.mu.Lock()
		delete(fake.sandboxes, "s-01g")
		fake.mu.Unlock()
		time.Sleep(sweepInterval)
		if fmt.Sprint(fake.gone()) != "[e-01a s-01c]" {
			t.Errorf("ended %v", fake.gone())
		}
		cancel()
	})
}

// TestServerInfoOfAnEngineThatIsSilent tells of the others all the same.
func TestServerInfoOfAnEngineThatIsSilent(t *testing.T) {
	silent := newFakeEngine("a")
	silent.listErr = errors.New("no route to it")
	if got := describe(t.Context(), named{newFakeEngine("a", "b"), "well"}); got.Name != "well" || got.Sandboxes != 2 {
		t.Errorf("%+v", got)
	}
	got := describe(t.Context(), silent)
	last := got.Capabilities[len(got.Capabilities)-1]
	if last.Name != "sandboxes" || last.Available || !strings.Contains(last.Detail, "no route to it") || !strings.Contains(last.Remedy, "doctor --engine fake") {
		t.Errorf("%+v", got)
	}
}
