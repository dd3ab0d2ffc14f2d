package session_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
)

// TestRecover takes up sessions in every state, with and without their sandbox.
func TestRecover(t *testing.T) {
	for name, test := range map[string]struct {
		state   session.State
		reason  session.EndReason
		sandbox bool
		want    session.State
		because session.EndReason
	}{
		"starting, not made":   {session.Starting, "", false, session.Running, ""},
		"starting, made":       {session.Starting, "", true, session.Running, ""},
		"running":              {session.Running, "", true, session.Running, ""},
		"running, lost":        {session.Running, "", false, session.Terminated, session.SandboxLost},
		"terminating":          {session.Terminating, session.Expired, true, session.Terminated, session.Expired},
		"terminating, gone":    {session.Terminating, session.Requested, false, session.Terminated, session.Requested},
		"terminating, stopped": {session.Terminating, session.ServerStopped, true, session.Terminated, session.ServerStopped},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, enginefake.Hooks{})
				record := session.Session{
					ID: "01arz3ndektsv4rrffq69g5fav", State: test.state, Reason: test.reason, Engine: "fake",
					Sandbox: "s-01arz3ndektsv4rrffq69g5fav", Limits: engine.Limits{PIDs: 5}, Lifetime: time.Hour, CreateTime: time.Now(),
				}
				if test.reason != "" {
					record.Detail = "as it was recorded"
				}
				r.store.records[record.ID] = record
				if test.sandbox {
					if _, err := r.fake.Create(t.Context(), engine.Spec{ID: record.Sandbox, Limits: record.Limits}); err != nil {
						t.Fatal(err)
					}
				}
				if err := r.Recover(t.Context()); err != nil {
					t.Fatal(err)
				}
				if test.state == session.Running && test.sandbox {
					// At once: an execution may be waiting for it.
					if sb, err := r.Sandbox(t.Context(), record.ID); err != nil || sb.ID() != record.Sandbox {
						t.Errorf("%v, %v", sb, err)
					}
				}
				if test.want == session.Running {
					s, err := r.WaitStarted(t.Context(), record.ID)
					record.State, record.Limits = session.Running, engine.Limits{PIDs: 5, MemoryBytes: 1 << 30}
					if diff := cmp.Diff(record, s); diff != "" && test.state == session.Starting || err != nil {
						t.Errorf("%v\n%s", err, diff)
					}
					if sb, err := r.Sandbox(t.Context(), record.ID); err != nil || sb.ID() != record.Sandbox {
						t.Errorf("%v, %v", sb, err)
					}
					if len(r.fake.Made()) != 1 || len(r.executions.calls()) != 0 {
						t.Errorf("made %v, ended %v", r.fake.Made(), r.executions.calls())
					}
					return
				}
				s := r.ended(record.ID)
				if took := s.EndTime.Sub(s.CreateTime); took > time.Minute {
					t.Errorf("it took %v", took)
				}
				if s.Reason != test.because || test.reason != "" && s.Detail != record.Detail {
					t.Errorf("%+v", s)
				}
				if diff := cmp.Diff([]string{record.ID}, r.executions.calls()); diff != "" {
					t.Errorf("executions ended: %s", diff)
				}
				if len(r.live()) != 0 {
					t.Errorf("left: %v", r.live())
				}
			})
		})
	}
}

// openTime is how long a start waits.
const openTime = 30 * time.Second

func TestRecoverFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{Open: func(ctx context.Context, _ string) error { return errors.New("engine on fire") }})
		r.store.hook(func(op string, _ session.Session) error {
			if op == "unfinished" {
				return errDisk
			}
			return nil
		})
		if err := r.Recover(t.Context()); !errors.Is(err, errDisk) {
			t.Error(err)
		}
		r.store.hook(nil)
		// A start that is called off while a sandbox is looked for.
		r.store.records["x"] = session.Session{ID: "x", State: session.Running, Sandbox: "s-x", Lifetime: time.Hour, CreateTime: time.Now()}
		because := errors.New("stop")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, because)
		defer cancel()
		if err := r.Recover(ctx); !errors.Is(err, because) {
			t.Error(err)
		}
		begin := time.Now()
		if err := r.Close(); err != nil || time.Since(begin) > time.Second {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		if s := r.store.stored("x"); s.State != session.Running {
			t.Errorf("%+v", s)
		}
	})
}

// TestEngineFailsAtRecovery waits for an engine in trouble, in the background when it
// takes long. Only one that says so has lost a sandbox. A session that ends meanwhile is
// told to have ended only when the engine can end it.
func TestEngineFailsAtRecovery(t *testing.T) {
	for name, test := range map[string]struct {
		broken   time.Duration
		lifetime time.Duration
		lost     bool
		want     session.EndReason
	}{
		"for a while":               {10 * time.Second, 24 * time.Hour, false, ""},
		"for long":                  {time.Hour, 24 * time.Hour, false, ""},
		"and has lost it":           {5 * time.Minute, 24 * time.Hour, true, session.SandboxLost},
		"for longer than it lives":  {time.Hour, 30 * time.Minute, false, session.Expired},
		"for longer than it is let": {time.Hour, 24 * time.Hour, false, session.Requested},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var until atomic.Int64
				r := newRig(t, enginefake.Hooks{Open: func(context.Context, string) error {
					if time.Now().UnixNano() < until.Load() {
						return fault.New(fault.Unavailable, "ENGINE", "try again")
					}
					return nil
				}})
				id := r.running(session.Request{Lifetime: test.lifetime})
				begin := time.Now()
				until.Store(begin.Add(test.broken).UnixNano())
				r.restart()
				if took := time.Since(begin); took > 32*time.Second {
					t.Errorf("recovery took %v", took)
				}
				if s := r.get(id); s.State != session.Running {
					t.Errorf("%+v", s)
				}
				if test.broken > openTime {
					_, err := r.Sandbox(t.Context(), id)
					wantFault(t, err, fault.Unavailable, "SANDBOX_UNREACHABLE")
				}
				if test.lost {
					r.fake.Die("s-" + id)
				}
				if test.want == session.Requested {
					ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
					defer cancel()
					if s, err := r.Terminate(ctx, id, "tester"); !errors.Is(err, context.DeadlineExceeded) || s.State != session.Terminating {
						t.Errorf("%v, %+v", err, s)
					}
				}
				if test.want != "" {
					if s := r.ended(id); s.Reason != test.want || s.EndTime.Before(begin.Add(test.broken)) {
						t.Errorf("%+v", s)
					}
					return
				}
				time.Sleep(test.broken + time.Minute)
				if _, err := r.Sandbox(t.Context(), id); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestCloseAtAnyMoment closes the Service at every moment of a session's life and opens
// another one: the session comes to the same end, and nothing is left.
func TestCloseAtAnyMoment(t *testing.T) {
	for moment := time.Duration(0); moment < 120*time.Second; moment += 7 * time.Second {
		t.Run(moment.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				slow := func(ctx context.Context, _ string) error { return sleep(ctx, 10*time.Second) }
				r := newRig(t, enginefake.Hooks{Create: slow, Terminate: slow})
				r.executions.hook = func(ctx context.Context, _ string) error { return sleep(ctx, 10*time.Second) }
				r.store.hook(func(op string, _ session.Session) error {
					if op == "update" {
						time.Sleep(5 * time.Second)
					}
					return nil
				})
				id := r.create(session.Request{Lifetime: 60 * time.Second})
				if moment > 0 {
					time.Sleep(moment)
				}
				begin := time.Now()
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(begin); took > 5*time.Second {
					t.Errorf("Close took %v", took)
				}
				before := r.store.stored(id)
				r.open()
				if err := r.Recover(t.Context()); err != nil {
					t.Fatal(err)
				}
				s := r.ended(id)
				if s.Reason != session.Expired || s.State < before.State || len(r.fake.Made()) > 2 {
					t.Errorf("%+v, made %v", s, r.fake.Made())
				}
				synctest.Wait()
				if len(r.live()) != 0 || r.Running() != 0 {
					t.Errorf("left: %v, %d running", r.live(), r.Running())
				}
			})
		})
	}
}
