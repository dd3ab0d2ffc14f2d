package session_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/session"
)

var errDisk = fmt.Errorf("write state: %w", syscall.ENOSPC)

// TestLife looks at a session from all sides while it lives.
func TestLife(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{Create: func(ctx context.Context, _ string) error { return sleep(ctx, time.Second) }})
		begin := time.Now()
		s, err := r.Create(t.Context(), session.Request{Limits: engine.Limits{PIDs: 9}, Labels: map[string]string{"a": "b"}})
		if err != nil {
			t.Fatal(err)
		}
		want := session.Session{
			ID: s.ID, State: session.Starting, Engine: "fake", Sandbox: "s-" + s.ID, Limits: engine.Limits{MemoryBytes: 1 << 30, PIDs: 9}, Network: egress.None(),
			Lifetime: session.DefaultLifetime, Labels: map[string]string{"a": "b"}, CreateTime: begin, Details: session.Details{Generation: 1},
		}
		if diff := cmp.Diff(want, s); diff != "" || len(s.ID) != 26 {
			t.Errorf("id %q (-want +got):\n%s", s.ID, diff)
		}
		if diff := cmp.Diff(want, r.store.stored(s.ID)); diff != "" {
			t.Error(diff)
		}
		r.refused(s.ID, "is being started")
		because := errors.New("no time")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Millisecond, because)
		defer cancel()
		if s, err := r.WaitStarted(ctx, s.ID); !errors.Is(err, because) || s.State != session.Starting {
			t.Errorf("%+v, %v", s, err)
		}
		s, err = r.WaitStarted(t.Context(), s.ID)
		if err != nil || s.State != session.Running || time.Since(begin) != time.Second {
			t.Errorf("%+v, %v", s, err)
		}
		if sb, err := r.Sandbox(t.Context(), s.ID); err != nil || sb.ID() != s.Sandbox || sb.Limits() != s.Limits {
			t.Errorf("%v, %v", sb, err)
		}
		if diff := cmp.Diff(s, r.get(s.ID)); diff != "" || r.Running() != 1 {
			t.Errorf("%d running\n%s", r.Running(), diff)
		}
		s, err = r.Terminate(t.Context(), s.ID, "me")
		if err != nil || s.State != session.Terminated || s.Reason != session.Requested || s.Detail != "terminated by me" || !s.EndTime.Equal(time.Now()) {
			t.Errorf("%+v, %v", s, err)
		}
		r.refused(s.ID, "has ended (REQUESTED)")
		if diff := cmp.Diff(s, r.ended(s.ID)); diff != "" || r.Running() != 0 {
			t.Errorf("%d running\n%s", r.Running(), diff)
		}
		again, err := r.Terminate(t.Context(), s.ID, "you")
		if diff := cmp.Diff(s, again); diff != "" || err != nil {
			t.Errorf("a second time: %v\n%s", err, diff)
		}
		if s, err := r.WaitStarted(t.Context(), s.ID); err != nil || s.State != session.Terminated {
			t.Errorf("%+v, %v", s, err)
		}
		states := []session.State{session.Starting, session.Running, session.Terminating, session.Terminated}
		if diff := cmp.Diff(states, r.store.written()); diff != "" {
			t.Errorf("written: %s", diff)
		}
		if diff := cmp.Diff([]string{s.ID}, r.executions.calls()); diff != "" {
			t.Errorf("executions ended: %s", diff)
		}
		if r.log.String() != "" {
			t.Errorf("an ordinary life is worth no line in the log: %s", r.log)
		}
	})
}

func TestCreateRefused(t *testing.T) {
	tests := map[string]struct {
		request session.Request
		change  func(r *rig)
		kind    fault.Kind
		reason  string
	}{
		"negative lifetime": {session.Request{Lifetime: -1}, nil, fault.Invalid, "LIFETIME"},
		"too long a life":   {session.Request{Lifetime: session.MaxLifetime + 1}, nil, fault.Invalid, "LIFETIME"},
		"limits":            {session.Request{Limits: engine.Limits{CPUMillis: 1}}, nil, fault.FailedPrecondition, "LIMIT_NOT_ENFORCEABLE"},
		"draining":          {session.Request{}, func(r *rig) { r.Drain() }, fault.Unavailable, "SERVER_DRAINING"},
		"closed":            {session.Request{}, func(r *rig) { _ = r.Close() }, fault.Unavailable, "SERVER_DRAINING"},
		"the store is full": {session.Request{}, func(r *rig) {
			r.store.hook(func(string, session.Session) error { return fault.New(fault.Exhausted, "STATE_FULL", "no room") })
		}, fault.Exhausted, "STATE_FULL"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, enginefake.Hooks{})
				if test.change != nil {
					test.change(r)
				}
				_, err := r.Create(t.Context(), test.request)
				wantFault(t, err, test.kind, test.reason)
				if r.Running() != 0 || len(r.fake.Made()) != 0 || len(r.store.records) != 0 {
					t.Errorf("%d running, made %v, records %v", r.Running(), r.fake.Made(), r.store.records)
				}
				if err := r.StopAll(t.Context()); err != nil {
					t.Error(err)
				}
			})
		})
	}
	t.Run("the longest life", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r := newRig(t, enginefake.Hooks{})
			if s := r.get(r.running(session.Request{Lifetime: session.MaxLifetime})); s.ExpireTime().Sub(s.CreateTime) != session.MaxLifetime {
				t.Errorf("%+v", s)
			}
		})
	})
}

func TestUnknown(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		for what, f := range map[string]func() error{
			"Get":         func() error { _, err := r.Get(t.Context(), "none"); return err },
			"WaitStarted": func() error { _, err := r.WaitStarted(t.Context(), "none"); return err },
			"Terminate":   func() error { _, err := r.Terminate(t.Context(), "none", "me"); return err },
			"Sandbox":     func() error { _, err := r.Sandbox(t.Context(), "none"); return err },
		} {
			if err := f(); fault.ReasonOf(err) != "SESSION_NOT_FOUND" || fault.KindOf(err) != fault.NotFound {
				t.Errorf("%s: %v", what, err)
			}
		}
	})
}

// TestStartFails ends a session whose sandbox cannot be made, and leaves nothing of it.
func TestStartFails(t *testing.T) {
	refuse := func(context.Context, string) error { return errors.New("out of user ids") }
	hang := func(ctx context.Context, _ string) error { <-ctx.Done(); return context.Cause(ctx) }
	long := func(context.Context, string) error { return errors.New(strings.Repeat("\xffx", 10<<10)) }
	for name, test := range map[string]struct {
		hooks  enginefake.Hooks
		after  time.Duration
		detail string
	}{
		"create fails":                      {enginefake.Hooks{Create: refuse}, 0, "out of user ids"},
		"create fails and leaves something": {enginefake.Hooks{Created: refuse}, 0, "out of user ids"},
		"create hangs":                      {enginefake.Hooks{Create: hang}, 2 * time.Minute, "no sandbox within 2m0s"},
		"create hangs and leaves something": {enginefake.Hooks{Created: hang}, 2 * time.Minute, "no sandbox within 2m0s"},
		"a long error":                      {enginefake.Hooks{Create: long}, 0, "\uFFFDx"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, test.hooks)
				begin := time.Now()
				id := r.create(session.Request{})
				s, err := r.WaitStarted(t.Context(), id)
				if err != nil || s.State < session.Terminating || s.Reason != session.StartFailed || time.Since(begin) != test.after {
					t.Errorf("%v after %v: %+v", err, time.Since(begin), s)
				}
				s = r.ended(id)
				if s.Reason != session.StartFailed || !strings.Contains(s.Detail, test.detail) || len(s.Detail) > 5<<10 {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

// TestLost ends a session whose sandbox has ended.
func TestLost(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		id := r.running(session.Request{})
		time.Sleep(time.Minute)
		r.fake.Die("s-" + id)
		if s := r.ended(id); s.Reason != session.SandboxLost || !s.EndTime.Equal(s.CreateTime.Add(time.Minute)) {
			t.Errorf("%+v", s)
		}
		if diff := cmp.Diff([]string{id}, r.executions.calls()); diff != "" {
			t.Error(diff)
		}
	})
}

// TestExpires ends a session on the moment, counted from its creation.
func TestExpires(t *testing.T) {
	for name, restarts := range map[string]int{"at once": 0, "after restarts": 3} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, enginefake.Hooks{Create: func(ctx context.Context, _ string) error { return sleep(ctx, 30*time.Second) }})
				id := r.running(session.Request{Lifetime: 10 * time.Minute})
				for range restarts {
					time.Sleep(time.Minute)
					r.restart()
				}
				time.Sleep(time.Until(r.get(id).CreateTime.Add(10*time.Minute - time.Second)))
				if s := r.get(id); s.State != session.Running {
					t.Errorf("a second before its end: %+v", s)
				}
				if s := r.ended(id); s.Reason != session.Expired || s.EndTime.Sub(s.CreateTime) != 10*time.Minute || s.Detail != "its lifetime of 10m0s passed" {
					t.Errorf("%+v", s)
				}
			})
		})
	}
	t.Run("while executord is away", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r := newRig(t, enginefake.Hooks{})
			id := r.running(session.Request{Lifetime: 10 * time.Minute})
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Hour)
			r.open()
			if err := r.Recover(t.Context()); err != nil {
				t.Fatal(err)
			}
			if s := r.ended(id); s.Reason != session.Expired || s.EndTime.Sub(s.CreateTime) != time.Hour {
				t.Errorf("%+v", s)
			}
			if diff := cmp.Diff([]string{id}, r.executions.calls()); diff != "" {
				t.Error(diff)
			}
		})
	})
}

// TestTerminateAt ends a session at every stage of its life.
func TestTerminateAt(t *testing.T) {
	for name, test := range map[string]struct {
		after time.Duration
		takes time.Duration
		want  session.EndReason
	}{
		"at once":                       {0, 3 * time.Second, session.Requested},
		"while its sandbox is made":     {5 * time.Second, 3 * time.Second, session.Requested},
		"while it runs":                 {20 * time.Second, 3 * time.Second, session.Requested},
		"while it is ended":             {101 * time.Second, 2 * time.Second, session.Expired},
		"when it has ended":             {200 * time.Second, 0, session.Expired},
		"at the moment when it expires": {100 * time.Second, 3 * time.Second, ""},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, enginefake.Hooks{
					Create:    func(ctx context.Context, _ string) error { return sleep(ctx, 10*time.Second) },
					Terminate: func(ctx context.Context, _ string) error { return sleep(ctx, time.Second) },
				})
				r.executions.hook = func(ctx context.Context, _ string) error { return sleep(ctx, 2*time.Second) }
				id := r.create(session.Request{Lifetime: 100 * time.Second})
				if test.after > 0 {
					time.Sleep(test.after)
				}
				begin := time.Now()
				s, err := r.Terminate(t.Context(), id, "me")
				if err != nil || s.State != session.Terminated || test.want != "" && s.Reason != test.want {
					t.Errorf("%v, %+v", err, s)
				}
				takes := test.takes
				if len(r.fake.Made()) == 0 {
					takes -= time.Second // there is no sandbox to end
				}
				if took := time.Since(begin); took != takes {
					t.Errorf("it took %v, want %v", took, takes)
				}
				r.ended(id)
			})
		})
	}
}

// TestTerminateFromManySides gives all of them the same end; the first reason stands.
func TestTerminateFromManySides(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{Terminate: func(ctx context.Context, _ string) error { return sleep(ctx, time.Second) }})
		id := r.running(session.Request{})
		var wg sync.WaitGroup
		results := make(chan session.Session, 5)
		for i := range cap(results) - 1 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 100 * time.Millisecond)
				s, err := r.Terminate(t.Context(), id, fmt.Sprint(i))
				if err != nil {
					t.Error(err)
				}
				results <- s
			})
		}
		wg.Go(func() {
			time.Sleep(50 * time.Millisecond)
			if err := r.StopAll(t.Context()); err != nil {
				t.Error(err)
			}
			results <- r.get(id)
		})
		time.Sleep(10 * time.Millisecond)
		r.refused(id, "is being ended")
		wg.Wait()
		close(results)
		for s := range results {
			if s.State != session.Terminated || s.Detail != "terminated by 0" {
				t.Errorf("%+v", s)
			}
		}
	})
}

// TestTerminateGoesOn when the caller has left.
func TestTerminateGoesOn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{Terminate: func(ctx context.Context, _ string) error { return sleep(ctx, time.Minute) }})
		id := r.running(session.Request{})
		because := errors.New("no time")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, because)
		defer cancel()
		if s, err := r.Terminate(ctx, id, "me"); !errors.Is(err, because) || s.State != session.Terminating || s.Reason != session.Requested {
			t.Errorf("%v, %+v", err, s)
		}
		r.ended(id)
	})
}

// TestExecutionsFirst ends the sandbox only when nothing runs in it any more, or does
// not end.
func TestExecutionsFirst(t *testing.T) {
	for name, test := range map[string]struct {
		hook func(n *atomic.Int64) func(ctx context.Context, id string) error
		want time.Duration
	}{
		"they take their time": {func(*atomic.Int64) func(context.Context, string) error {
			return func(ctx context.Context, _ string) error { return sleep(ctx, 10*time.Minute) }
		}, 10 * time.Minute},
		"they hang": {func(*atomic.Int64) func(context.Context, string) error {
			return func(ctx context.Context, _ string) error { <-ctx.Done(); return context.Cause(ctx) }
		}, 15 * time.Minute},
		"they fail at first": {func(n *atomic.Int64) func(context.Context, string) error {
			return func(context.Context, string) error {
				if n.Add(1) < 4 {
					return errors.New("not now")
				}
				return nil
			}
		}, 350 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, enginefake.Hooks{})
				var n atomic.Int64
				r.executions.hook = test.hook(&n)
				id := r.running(session.Request{})
				begin := time.Now()
				var wg sync.WaitGroup
				wg.Go(func() {
					if _, err := r.Terminate(t.Context(), id, "me"); err != nil {
						t.Error(err)
					}
				})
				time.Sleep(test.want - time.Millisecond)
				if len(r.live()) != 1 || r.get(id).State != session.Terminating {
					t.Errorf("before its executions ended: %v, %+v", r.live(), r.get(id))
				}
				wg.Wait()
				if took := time.Since(begin); took != test.want {
					t.Errorf("it took %v, want %v", took, test.want)
				}
				r.ended(id)
			})
		})
	}
}

// TestEngineFailsAtTheEnd tries until the sandbox is gone: nobody is told sooner.
func TestEngineFailsAtTheEnd(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var fails atomic.Int64
		r := newRig(t, enginefake.Hooks{Terminate: func(context.Context, string) error {
			if fails.Add(1) <= 12 {
				return errors.New("device or resource busy")
			}
			return nil
		}})
		id := r.running(session.Request{})
		begin := time.Now()
		s, err := r.Terminate(t.Context(), id, "me")
		// 50 ms, doubled up to 30 s.
		if took := time.Since(begin); err != nil || took < time.Minute || took > 3*time.Minute || fails.Load() != 13 {
			t.Errorf("%v after %v and %d tries: %+v", err, took, fails.Load(), s)
		}
		r.ended(id)
		if !strings.Contains(r.log.String(), "device or resource busy") {
			t.Errorf("not logged: %s", r.log)
		}
	})
}

// TestStoreFails writes a state until it is stored; what cannot be recorded does not
// begin and does not end.
func TestStoreFails(t *testing.T) {
	for name, state := range map[string]session.State{"running": session.Running, "terminating": session.Terminating, "terminated": session.Terminated} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, enginefake.Hooks{})
				var broken atomic.Bool
				broken.Store(true)
				r.store.hook(func(op string, s session.Session) error {
					if op == "update" && s.State == state && broken.Load() {
						return errDisk
					}
					return nil
				})
				id := r.create(session.Request{Lifetime: time.Hour})
				time.Sleep(time.Minute)
				switch s := r.get(id); {
				case state == session.Running && s.State != session.Starting, state != session.Running && s.State != session.Running:
					t.Errorf("%+v", s)
				}
				if state == session.Running {
					r.refused(id, "is being started")
				}
				var wg sync.WaitGroup
				done := make(chan struct{})
				wg.Go(func() {
					defer close(done)
					if _, err := r.Terminate(t.Context(), id, "me"); err != nil {
						t.Error(err)
					}
				})
				time.Sleep(10 * time.Minute)
				select {
				case <-done:
					t.Error("ended without a record")
				default:
				}
				if n := strings.Count(r.log.String(), "trying again"); n == 0 || n > 15 {
					t.Errorf("%d lines in the log", n)
				}
				broken.Store(false)
				wg.Wait()
				r.ended(id)
			})
		})
	}
}

// TestRecordIsTakenAway does not keep a session for ever whose record somebody deleted.
func TestRecordIsTakenAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		id := r.running(session.Request{})
		r.store.mu.Lock()
		delete(r.store.records, id)
		r.store.mu.Unlock()
		if s, err := r.Terminate(t.Context(), id, "me"); err != nil || s.State != session.Terminated {
			t.Errorf("%v, %+v", err, s)
		}
		synctest.Wait()
		if len(r.live()) != 0 || r.Running() != 0 {
			t.Errorf("%v, %d running", r.live(), r.Running())
		}
	})
}

func TestLists(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{Create: func(ctx context.Context, _ string) error { return sleep(ctx, time.Minute) }})
		ended := r.create(session.Request{})
		if _, err := r.Terminate(t.Context(), ended, "me"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
		running := r.running(session.Request{})
		time.Sleep(time.Millisecond)
		starting := r.create(session.Request{})
		ids := func(q session.Query) (ids []string) {
			page, err := r.List(t.Context(), q)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range page {
				ids = append(ids, s.ID)
			}
			return ids
		}
		if diff := cmp.Diff([]string{starting, running}, ids(session.Query{Limit: 9})); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]string{starting, running, ended}, ids(session.Query{Limit: 9, Terminated: true})); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]string{running}, ids(session.Query{Limit: 1, Before: starting})); diff != "" {
			t.Error(diff)
		}
		// What is on its way to its end is shown so before that is stored.
		r.store.hook(func(op string, s session.Session) error {
			if op == "update" {
				return errDisk
			}
			return nil
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.Terminate(ctx, running, "me"); err == nil {
			t.Error("ended without a record")
		}
		page, err := r.List(t.Context(), session.Query{Limit: 9})
		if err != nil || len(page) != 2 || page[1].State != session.Terminating || page[1].Reason != session.Requested {
			t.Errorf("%+v, %v", page, err)
		}
		r.store.hook(func(string, session.Session) error { return errDisk })
		if _, err := r.List(t.Context(), session.Query{Limit: 9}); !errors.Is(err, errDisk) {
			t.Error(err)
		}
		r.store.hook(nil)
	})
}

func TestStopAllAndDrain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{Terminate: func(ctx context.Context, _ string) error { return sleep(ctx, time.Minute) }})
		ids := []string{r.running(session.Request{}), r.running(session.Request{}), r.create(session.Request{})}
		r.Drain()
		for _, id := range ids[:2] {
			if s := r.get(id); s.State != session.Running {
				t.Errorf("draining ended %+v", s)
			}
		}
		because := errors.New("no time")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, because)
		defer cancel()
		if err := r.StopAll(ctx); !errors.Is(err, because) {
			t.Error(err)
		}
		if err := r.StopAll(t.Context()); err != nil {
			t.Error(err)
		}
		for _, id := range ids {
			if s := r.ended(id); s.Reason != session.ServerStopped {
				t.Errorf("%+v", s)
			}
		}
	})
}

// TestRecordFailsWhileOthersWait has those who found a session that then did not come
// to be return, and Close wait for the one who made it.
func TestRecordFailsWhileOthersWait(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		inserting, fail := make(chan struct{}), make(chan struct{})
		r.store.hook(func(op string, _ session.Session) error {
			if op == "insert" {
				close(inserting)
				<-fail
				return errDisk
			}
			return nil
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := r.Create(t.Context(), session.Request{}); !errors.Is(err, errDisk) {
				t.Error(err)
			}
		})
		<-inserting
		wg.Go(func() {
			if err := r.StopAll(t.Context()); err != nil {
				t.Error(err)
			}
		})
		closed := make(chan struct{})
		wg.Go(func() { _ = r.Close(); close(closed) })
		synctest.Wait()
		select {
		case <-closed:
			t.Error("Close did not wait for a Create")
		default:
		}
		close(fail)
		wg.Wait()
		if len(r.fake.Made()) != 0 || r.Running() != 0 {
			t.Errorf("made %v, %d running", r.fake.Made(), r.Running())
		}
	})
}

// TestClose leaves the sandboxes and ends those who wait.
func TestClose(t *testing.T) {
	for name, hooks := range map[string]enginefake.Hooks{
		"starting":    {Create: func(ctx context.Context, _ string) error { <-ctx.Done(); return context.Cause(ctx) }},
		"terminating": {Terminate: func(ctx context.Context, _ string) error { <-ctx.Done(); return context.Cause(ctx) }},
		"running":     {},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, hooks)
				id := r.create(session.Request{})
				synctest.Wait()
				var wg sync.WaitGroup
				expect := func(what string, f func() error) {
					wg.Go(func() { wantFault(t, f(), fault.Unavailable, "SERVER_STOPPING") })
				}
				if name == "starting" {
					expect("WaitStarted", func() error { _, err := r.WaitStarted(t.Context(), id); return err })
				}
				if name == "terminating" {
					expect("Terminate", func() error { _, err := r.Terminate(t.Context(), id, "me"); return err })
				}
				synctest.Wait()
				begin := time.Now()
				if err := r.Close(); err != nil || time.Since(begin) > time.Second {
					t.Errorf("%v after %v", err, time.Since(begin))
				}
				wg.Wait()
				if _, err := r.Terminate(t.Context(), id, "me"); fault.ReasonOf(err) != "SERVER_STOPPING" {
					t.Errorf("Terminate after Close: %v", err)
				}
				if name == "running" {
					_, err := r.Sandbox(t.Context(), id)
					wantFault(t, err, fault.Unavailable, "SERVER_STOPPING")
				} else {
					r.refused(id, "is being")
				}
				if s := r.get(id); s.State == session.Terminated || s.EndTime != (time.Time{}) {
					t.Errorf("%+v", s)
				}
				if err := r.Close(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestCloseWhileExecutionsEnd leaves the sandbox alone: the executor after this one
// still has to read out what ran in it.
func TestCloseWhileExecutionsEnd(t *testing.T) {
	for name, hook := range map[string]func(ctx context.Context, _ string) error{
		"they are waited for": func(ctx context.Context, _ string) error { <-ctx.Done(); return context.Cause(ctx) },
		"they are closed too": func(context.Context, string) error { return errors.New("executord is stopping") },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, enginefake.Hooks{})
				r.executions.hook = hook
				id := r.running(session.Request{Lifetime: time.Minute})
				time.Sleep(2 * time.Minute)
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				if live := r.live(); len(live) != 1 {
					t.Errorf("the sandbox was ended: %v", live)
				}
				if s := r.store.stored(id); s.State != session.Terminating || s.Reason != session.Expired {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

// TestCloseDuringAWrite finishes it.
func TestCloseDuringAWrite(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		r.store.hook(func(op string, _ session.Session) error {
			if op == "update" {
				time.Sleep(time.Second)
			}
			return nil
		})
		id := r.create(session.Request{})
		synctest.Wait()
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if s := r.store.stored(id); s.State != session.Running {
			t.Errorf("%+v", s)
		}
	})
}

// TestNothingIsLeft counts goroutines after many sessions that ended in all ways, with
// nothing in order.
func TestNothingIsLeft(t *testing.T) {
	r := newRig(t, enginefake.Hooks{Create: func(context.Context, string) error {
		if rand.IntN(10) == 0 {
			return errors.New("out of luck")
		}
		time.Sleep(time.Duration(rand.IntN(500)) * time.Microsecond)
		return nil
	}})
	round := func(n int) {
		var wg sync.WaitGroup
		for range n {
			wg.Go(func() {
				id := r.create(session.Request{Lifetime: time.Duration(1+rand.IntN(2000)) * time.Microsecond})
				time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
				if rand.IntN(3) == 0 {
					r.fake.Die("s-" + id)
				}
				var both sync.WaitGroup
				for range 2 {
					both.Go(func() {
						if s, err := r.Terminate(t.Context(), id, "me"); err != nil || s.State != session.Terminated {
							t.Errorf("%+v, %v", s, err)
						}
					})
				}
				both.Wait()
			})
		}
		wg.Wait()
	}
	round(10)
	before := runtime.NumGoroutine()
	round(200)
	deadline := time.Now().Add(time.Minute)
	for runtime.NumGoroutine() > before+3 || len(r.live()) > 0 || r.Running() > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before; sandboxes %v, %d running", runtime.NumGoroutine(), before, r.live(), r.Running())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestWithoutALogger works.
func TestWithoutALogger(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var fails atomic.Int64
		fake := enginefake.New(enginefake.Config{Hooks: enginefake.Hooks{Terminate: func(context.Context, string) error {
			if fails.Add(1) == 1 {
				return errors.New("not now")
			}
			return nil
		}}})
		t.Cleanup(fake.Shutdown)
		s, err := session.New(session.Config{Engines: engines.Set{fake}, Store: newMemory(), Dir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		s.SetExecutions(&executions{})
		one, err := s.Create(t.Context(), session.Request{})
		if err != nil {
			t.Fatal(err)
		}
		if one, err = s.Terminate(t.Context(), session.Ref{ID: one.ID}, "me", idempotency.Key{}); err != nil || one.State != session.Terminated {
			t.Errorf("%+v, %v", one, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestNoRoom refuses new sessions, and nothing else, while the disk has no room.
func TestNoRoom(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		var full error
		s, err := session.New(session.Config{Engines: engines.Set{r.fake}, Store: r.store, Dir: t.TempDir(), CheckRoom: func() error { return full }})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		s.SetExecutions(r.executions)
		before, err := s.Create(t.Context(), session.Request{Lifetime: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		full = fault.New(fault.Exhausted, "DISK_FULL", "no room")
		_, err = s.Create(t.Context(), session.Request{})
		wantFault(t, err, fault.Exhausted, "DISK_FULL")
		if _, err := s.WaitStarted(t.Context(), session.Ref{ID: before.ID}); err != nil {
			t.Error(err)
		}
		expires, lifetime, err := s.Expiry(t.Context(), before.ID)
		if err != nil || lifetime != time.Hour || !expires.Equal(before.CreateTime.Add(time.Hour)) {
			t.Errorf("%v, %v, %v", expires, lifetime, err)
		}
		_, _, err = s.Expiry(t.Context(), "nosuch")
		wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
		if ended, err := s.Terminate(t.Context(), session.Ref{ID: before.ID}, "tester", idempotency.Key{}); err != nil || ended.State != session.Terminated {
			t.Errorf("%+v, %v", ended, err)
		}
		full = nil
		if _, err := s.Create(t.Context(), session.Request{}); err != nil {
			t.Error(err)
		}
	})
}
