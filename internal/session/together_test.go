package session_test

import (
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/store"
)

// house is both services with a real store.
type house struct {
	sessions   *session.Service
	executions *execution.Service
}

func openHouse(t *testing.T, fake *enginefake.Engine, st *store.Store, dir string) *house {
	t.Helper()
	sessions, err := session.New(session.Config{Engines: engines.Set{fake}, Store: st, Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	executions, err := execution.New(execution.Config{
		Engines: engines.Set{fake}, Store: st, Sessions: sessions, Dir: filepath.Join(dir, "executions"), DefaultRetainedBytes: 1 << 20, MaxRetainedBytes: 1 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	sessions.SetExecutions(executions)
	h := &house{sessions, executions}
	t.Cleanup(h.close)
	if err := executions.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := sessions.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *house) close() {
	_ = h.sessions.Close()
	_ = h.executions.Close()
}

// TestTogether leads a session with executions through its end, at once and over a
// restart: each execution has the end that the session brought it.
func TestTogether(t *testing.T) {
	for name, test := range map[string]struct {
		restart bool // between the start and the end
		end     func(t *testing.T, h *house, fake *enginefake.Engine, id string)
		reason  session.EndReason
		want    execution.Reason
	}{
		"terminated": {false, func(t *testing.T, h *house, _ *enginefake.Engine, id string) {
			if _, err := h.sessions.Terminate(t.Context(), session.Ref{ID: id}, "me", idempotency.Key{}); err != nil {
				t.Error(err)
			}
		}, session.Requested, execution.SessionEnded},
		"terminated after a restart": {true, func(t *testing.T, h *house, _ *enginefake.Engine, id string) {
			if _, err := h.sessions.Terminate(t.Context(), session.Ref{ID: id}, "me", idempotency.Key{}); err != nil {
				t.Error(err)
			}
		}, session.Requested, execution.SessionEnded},
		"lost": {false, func(_ *testing.T, _ *house, fake *enginefake.Engine, id string) {
			fake.Die("s-" + id)
		}, session.SandboxLost, execution.SandboxLost},
		"expired":                  {false, nil, session.Expired, execution.SessionEnded},
		"expired during a restart": {true, nil, session.Expired, execution.SessionEnded},
	} {
		t.Run(name, func(t *testing.T) {
			fake := enginefake.New(enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script {
				return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "hello")}}
			}})
			t.Cleanup(fake.Shutdown)
			dir := t.TempDir()
			st, err := store.Open(t.Context(), store.Config{Dir: dir})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { st.Close() })
			h := openHouse(t, fake, st, dir)
			lifetime := time.Hour
			if test.end == nil {
				lifetime = 500 * time.Millisecond
			}
			s, err := h.sessions.Create(t.Context(), session.Request{Lifetime: lifetime})
			if err != nil {
				t.Fatal(err)
			}
			if s, err = h.sessions.WaitStarted(t.Context(), session.Ref{ID: s.ID}); err != nil || s.State != session.Running {
				t.Fatalf("%+v, %v", s, err)
			}
			var refs []execution.Ref
			for range 3 {
				e, err := h.executions.Start(t.Context(), execution.Request{Session: s.ID, Command: execution.Command{Args: []string{"x"}}})
				if err != nil {
					t.Fatal(err)
				}
				refs = append(refs, execution.Ref{Session: s.ID, ID: e.ID})
			}
			for len(fake.Held("s-"+s.ID)) < len(refs) {
				time.Sleep(time.Millisecond)
			}
			if test.restart {
				h.close()
				if test.end == nil {
					time.Sleep(time.Until(s.ExpireTime()))
				}
				h = openHouse(t, fake, st, dir)
			}
			if test.end != nil {
				test.end(t, h, fake, s.ID)
			}
			for _, ref := range refs {
				e, err := h.executions.Wait(t.Context(), ref)
				if err != nil || e.Result.Reason != test.want || !e.Result.TreeEmpty {
					t.Errorf("%v, %+v", err, e.Result)
				}
				if e.Result.Reason == execution.SessionEnded && e.Result.Totals[0].Size != 5 {
					t.Errorf("its output: %+v", e.Result.Totals)
				}
			}
			deadline := time.Now().Add(time.Minute)
			for h.sessions.Running() > 0 && time.Now().Before(deadline) {
				time.Sleep(time.Millisecond)
			}
			s, err = h.sessions.Get(t.Context(), session.Ref{ID: s.ID})
			if err != nil || s.State != session.Terminated || s.Reason != test.reason {
				t.Errorf("%v, %+v", err, s)
			}
			_, err = h.executions.Start(t.Context(), execution.Request{Session: s.ID, Command: execution.Command{Args: []string{"x"}}})
			wantFault(t, err, fault.FailedPrecondition, "SESSION_NOT_RUNNING")
			if left, _ := fake.List(t.Context()); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// TestTogetherInARace ends sessions while executions are started in them: none is left
// without an end, and none is started in a session that was told to have ended.
func TestTogetherInARace(t *testing.T) {
	fake := enginefake.New(enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script { return enginefake.Script{} }})
	t.Cleanup(fake.Shutdown)
	dir := t.TempDir()
	st, err := store.Open(t.Context(), store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	h := openHouse(t, fake, st, dir)
	var all sync.WaitGroup
	for n := range 6 {
		all.Go(func() {
			s, err := h.sessions.Create(t.Context(), session.Request{})
			if err == nil {
				s, err = h.sessions.WaitStarted(t.Context(), session.Ref{ID: s.ID})
			}
			if err != nil {
				t.Error(err)
				return
			}
			var both sync.WaitGroup
			both.Go(func() {
				for {
					e, err := h.executions.Start(t.Context(), execution.Request{Session: s.ID, Command: execution.Command{Args: []string{"x"}}})
					if err != nil {
						wantFault(t, err, fault.FailedPrecondition, "SESSION_NOT_RUNNING")
						return
					}
					both.Go(func() {
						e, err := h.executions.Wait(t.Context(), execution.Ref{Session: s.ID, ID: e.ID})
						if err != nil || e.Result.Reason != execution.SessionEnded {
							t.Errorf("%v, %+v", err, e.Result)
						}
					})
				}
			})
			both.Go(func() {
				time.Sleep(time.Duration(n) * 5 * time.Millisecond)
				if s, err := h.sessions.Terminate(t.Context(), session.Ref{ID: s.ID}, fmt.Sprint(n), idempotency.Key{}); err != nil || s.State != session.Terminated {
					t.Errorf("%+v, %v", s, err)
				}
			})
			both.Wait()
		})
	}
	all.Wait()
	if unfinished, err := st.UnfinishedExecutions(t.Context()); err != nil || len(unfinished) != 0 || h.executions.Running() != 0 {
		t.Errorf("unfinished: %d, %v; %d running", len(unfinished), err, h.executions.Running())
	}
	if left, _ := fake.List(t.Context()); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}
