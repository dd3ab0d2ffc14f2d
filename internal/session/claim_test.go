package session_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/pool"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
)

// reopen closes the Service and opens one with a pool that keeps one ready, and with
// limits.
func (r *rig) reopen(cfg admission.Config) *pool.Pool {
	r.t.Helper()
	if err := r.Close(); err != nil {
		r.t.Fatal(err)
	}
	p := pool.New(pool.Config{Engine: r.fake, Size: 1})
	var group sync.WaitGroup
	group.Go(func() { _ = p.Run(context.Background()) })
	r.t.Cleanup(func() { p.Drain(); group.Wait() })
	synctest.Wait()
	r.pool, r.admission = p, admission.New(cfg)
	r.open()
	return p
}

func (r *rig) places(sandboxes, queued int) {
	r.t.Helper()
	synctest.Wait()
	if s := r.admission.Stats(); s.Sandboxes != sandboxes || s.Queued != queued || s.Running != 0 {
		r.t.Errorf("sandboxes %d, queued %d; want %d, %d", s.Sandboxes, s.Queued, sandboxes, queued)
	}
}

func TestClaim(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		r.reopen(admission.Config{})
		ready := r.fake.Made()[0]
		id := r.running(session.Request{})
		if s := r.store.stored(id); s.Sandbox != ready || s.Limits.MemoryBytes != 1<<30 {
			t.Errorf("%+v, ready was %s", s, ready)
		}
		if sb, err := r.Sandbox(t.Context(), id); err != nil || sb.ID() != ready {
			t.Errorf("%v, %v", sb, err)
		}
		// The next executord finds it by the record.
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r.admission = nil // the old one is drained
		r.open()
		if err := r.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s := r.get(id); s.State != session.Running || s.Sandbox != ready {
			t.Errorf("%+v", s)
		}
		if _, err := r.Terminate(t.Context(), id, "me"); err != nil {
			t.Fatal(err)
		}
		if s := r.ended(id); slices.Contains(r.live(), ready) {
			t.Errorf("%+v, and its sandbox is there", s)
		}
		own := r.running(session.Request{Limits: engine.Limits{PIDs: 7}})
		if s := r.get(own); s.Sandbox != "s-"+own || s.Limits.PIDs != 7 {
			t.Errorf("%+v", s)
		}
	})
}

// A session that was recorded with a claimed sandbox and not yet running adopts it.
func TestClaimedAndStarting(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		if _, err := r.fake.Create(t.Context(), engine.Spec{ID: "w-1"}); err != nil {
			t.Fatal(err)
		}
		r.store.records["x"] = session.Session{ID: "x", State: session.Starting, Sandbox: "w-1", Lifetime: time.Hour, CreateTime: time.Now()}
		r.restart()
		if s, err := r.WaitStarted(t.Context(), "x"); err != nil || s.State != session.Running || s.Sandbox != "w-1" || len(r.live()) != 1 {
			t.Errorf("%+v, %v, %v", s, err, r.live())
		}
	})
}

// What was claimed for a session that did not come to be is ended, its place given back.
func TestClaimedInVain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		r.reopen(admission.Config{MaxSandboxes: 1})
		ready := r.fake.Made()[0]
		broken := errors.New("the disk is on fire")
		r.store.hook(func(op string, _ session.Session) error {
			if op == "insert" {
				return broken
			}
			return nil
		})
		if _, err := r.Create(t.Context(), session.Request{}); !errors.Is(err, broken) {
			t.Fatal(err)
		}
		r.places(0, 0)
		if slices.Contains(r.live(), ready) {
			t.Errorf("%s is left", ready)
		}
	})
}

// Sessions count until their sandboxes are gone, also those that were found again.
func TestSessionsCount(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{Terminate: func(context.Context, string) error { time.Sleep(time.Second); return nil }})
		limits := admission.Config{MaxSandboxes: 2, MaxQueued: 1, MaxQueueWait: 10 * time.Second}
		r.reopen(limits)
		first, second := r.running(session.Request{}), r.running(session.Request{})
		r.places(2, 0)

		var group sync.WaitGroup
		defer group.Wait()
		var third session.Session
		begin := time.Now()
		group.Go(func() {
			var err error
			if third, err = r.Create(t.Context(), session.Request{}); err != nil {
				t.Error(err)
			}
		})
		r.places(2, 1)
		_, err := r.Create(t.Context(), session.Request{})
		wantFault(t, err, fault.Exhausted, "QUEUE_FULL")
		if _, err := r.Terminate(t.Context(), first, "me"); err != nil {
			t.Fatal(err)
		}
		group.Wait()
		if took := time.Since(begin); third.ID == "" || took != time.Second {
			t.Errorf("%+v after %v", third, took)
		}
		_, err = r.Create(t.Context(), session.Request{})
		wantFault(t, err, fault.Exhausted, "QUEUE_TIMEOUT")

		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r.admission = admission.New(limits)
		r.open()
		if err := r.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.places(2, 0)
		for _, id := range []string{second, third.ID} {
			if _, err := r.Terminate(t.Context(), id, "me"); err != nil {
				t.Fatal(err)
			}
		}
		r.places(0, 0)
	})
}

func TestDrainWakesWhoWaits(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		r.reopen(admission.Config{MaxSandboxes: 1, MaxQueued: 1, MaxQueueWait: time.Hour})
		r.running(session.Request{})
		var group sync.WaitGroup
		defer group.Wait()
		group.Go(func() {
			_, err := r.Create(t.Context(), session.Request{})
			wantFault(t, err, fault.Unavailable, "SERVER_DRAINING")
		})
		r.places(1, 1)
		r.Drain()
		r.places(1, 0)
	})
}
