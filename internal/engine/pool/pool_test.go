package pool_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/pool"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a Pool over a fake engine, in a bubble.
type rig struct {
	*pool.Pool
	t    *testing.T
	fake *enginefake.Engine
	log  *lockedBuffer
	stop context.CancelCauseFunc
	done chan struct{}
}

// limits are those of the fake engine.
var limits = engine.Limits{MemoryBytes: 1 << 30, PIDs: 9}

// newRig runs a Pool until the end of the test, which checks that it left nothing.
func newRig(t *testing.T, cfg pool.Config, hooks enginefake.Hooks) *rig {
	t.Helper()
	r := &rig{t: t, fake: enginefake.New(enginefake.Config{Limits: limits, Hooks: hooks}), log: &lockedBuffer{}, done: make(chan struct{})}
	cfg.Engine, cfg.Logger = r.fake, slog.New(slog.NewTextHandler(r.log, nil))
	r.Pool = pool.New(cfg)
	ctx, stop := context.WithCancelCause(context.Background())
	r.stop = stop
	var group sync.WaitGroup
	group.Go(func() {
		defer close(r.done)
		if err := r.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		stop(errors.New("the test is over"))
		group.Wait()
		if left := r.alive(); len(left) > 0 && !t.Failed() {
			t.Errorf("left behind: %v", left)
		}
		r.fake.Shutdown()
	})
	synctest.Wait()
	return r
}

// alive are the sandboxes that there are, without those that were claimed.
func (r *rig) alive() []string {
	r.t.Helper()
	ids, err := r.fake.List(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	return ids
}

// claim claims one that must be there, and ends it with the test.
func (r *rig) claim() engine.Sandbox {
	r.t.Helper()
	sb, ok := r.Claim(engine.Spec{ID: "mine"})
	if !ok {
		r.t.Fatal("none is ready")
	}
	if sb.Limits() != limits || !strings.HasPrefix(sb.ID(), "w-") || len(sb.ID()) > 63 {
		r.t.Fatalf("claimed %s with %+v", sb.ID(), sb.Limits())
	}
	select {
	case <-sb.Done():
		r.t.Fatalf("claimed %s, which has ended", sb.ID())
	default:
	}
	if _, err := sb.Terminate(context.Background()); err != nil {
		r.t.Fatal(err)
	}
	return sb
}

// after lets time pass and checks how many are ready.
func (r *rig) after(d time.Duration, ready int) {
	r.t.Helper()
	time.Sleep(d)
	synctest.Wait()
	if s := r.Stats(); s.Ready != ready || len(r.alive()) != ready {
		r.t.Fatalf("%d are ready, there are %v; want %d", s.Ready, r.alive(), ready)
	}
}

func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

func TestClaimAndRefill(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, pool.Config{Size: 2}, enginefake.Hooks{})
		r.after(0, 2) // at once after the start
		first, second := r.claim(), r.claim()
		if first.ID() == second.ID() || !slices.Equal(r.fake.Made(), []string{first.ID(), second.ID()}) {
			t.Errorf("claimed %s and %s of %v", first.ID(), second.ID(), r.fake.Made())
		}
		if _, ok := r.Claim(engine.Spec{}); ok {
			t.Error("a third one was ready")
		}
		r.after(pool.DefaultDelay-time.Millisecond, 0) // what was claimed has the machine for itself
		r.after(time.Millisecond, 2)
		if s := r.Stats(); s != (pool.Stats{Size: 2, Ready: 2, Hits: 2, Misses: 1}) {
			t.Errorf("%+v", s)
		}
		r.after(time.Minute, 2)
		if n := len(r.fake.Made()); n != 4 {
			t.Errorf("%d were made", n)
		}
	})
}

// Claims that follow each other closely must not put off the refill for ever.
func TestRefillUnderLoad(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, pool.Config{Size: 2}, enginefake.Hooks{Create: sleep(10 * time.Millisecond)})
		time.Sleep(time.Second)
		for range 200 {
			if sb, ok := r.Claim(engine.Spec{}); ok {
				sb.Terminate(t.Context())
			}
			time.Sleep(30 * time.Millisecond)
		}
		if s := r.Stats(); s.Hits < 60 {
			t.Errorf("%+v", s)
		}
	})
}

// A request with limits of its own gets none, is no miss, and is not prepared for.
func TestSpecialLimits(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, pool.Config{Size: 1}, enginefake.Hooks{})
		for _, special := range []engine.Limits{{MemoryBytes: 1 << 29}, {CPUMillis: 100}, {PIDs: 10}} {
			if _, ok := r.Claim(engine.Spec{Limits: special}); ok {
				t.Errorf("%+v: claimed", special)
			}
		}
		r.after(time.Hour, 1)
		if s := r.Stats(); s.Hits != 0 || s.Misses != 0 {
			t.Errorf("%+v", s)
		}
		if sb, ok := r.Claim(engine.Spec{Limits: limits}); !ok { // the same, written out
			t.Error("the engine's own limits are taken for special ones")
		} else {
			sb.Terminate(t.Context())
		}
	})
}

func TestOff(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, pool.Config{Size: 0}, enginefake.Hooks{})
		<-r.done
		if _, ok := r.Claim(engine.Spec{}); ok {
			t.Error("claimed")
		}
		r.after(time.Hour, 0)
		if s := r.Stats(); s != (pool.Stats{}) {
			t.Errorf("%+v", s)
		}
	})
}

func TestNothingBeforeRun(t *testing.T) {
	fake := enginefake.New(enginefake.Config{})
	p := pool.New(pool.Config{Engine: fake, Size: 3})
	if _, ok := p.Claim(engine.Spec{}); ok || len(fake.Made()) > 0 {
		t.Errorf("claimed %v of %v", ok, fake.Made())
	}
	p.Drain()
	if err := p.Run(t.Context()); err != nil || len(fake.Made()) > 0 {
		t.Errorf("drained before it ran: %v, made %v", err, fake.Made())
	}
}

// One that dies is noticed and replaced; one that dies in the moment of the claim is not
// handed out.
func TestDeath(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, pool.Config{Size: 2}, enginefake.Hooks{})
		r.after(time.Minute, 2)
		made := r.fake.Made()
		r.fake.Die(made[0])
		r.after(0, 2)
		if made = r.fake.Made(); len(made) != 3 {
			t.Fatalf("made %v", made)
		}
		r.fake.Die(made[1])
		if sb := r.claim(); sb.ID() != made[2] {
			t.Errorf("claimed %s of %v", sb.ID(), made)
		}
		r.after(pool.DefaultDelay, 2)
		if !strings.Contains(r.log.String(), made[0]) {
			t.Errorf("nobody was told: %s", r.log)
		}
	})
}

// Sandboxes that do not live long are not made all the time.
func TestDyingAllTheTime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var r *rig
		r = newRig(t, pool.Config{Size: 1}, enginefake.Hooks{})
		until := time.Now().Add(10 * time.Minute)
		for time.Now().Before(until) {
			for _, id := range r.alive() {
				r.fake.Die(id)
			}
			time.Sleep(50 * time.Millisecond)
			synctest.Wait()
		}
		if n := len(r.fake.Made()); n < 10 || n > 30 {
			t.Errorf("%d were made in 10 minutes", n)
		}
		r.after(3*time.Minute, 1)
	})
}

func TestAge(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var least atomic.Int64
		least.Store(2)
		var r *rig
		r = newRig(t, pool.Config{Size: 2, MaxAge: time.Minute}, enginefake.Hooks{Terminate: func(context.Context, string) error {
			least.Store(min(least.Load(), int64(r.Stats().Ready)))
			return nil
		}})
		old := r.alive()
		r.after(59*time.Second, 2)
		if !slices.Equal(r.alive(), old) {
			t.Fatal("replaced too early")
		}
		r.after(time.Second, 2)
		for _, id := range r.alive() {
			if slices.Contains(old, id) {
				t.Errorf("%s is still there", id)
			}
		}
		if least.Load() != 2 {
			t.Errorf("only %d were ready meanwhile", least.Load())
		}
		r.after(10*time.Minute, 2)
		if n := len(r.fake.Made()); n != 24 {
			t.Errorf("%d were made in 11 minutes", n)
		}
	})
}

func TestFailures(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var broken atomic.Bool
		broken.Store(true)
		var tries []time.Duration
		begun := time.Now()
		r := newRig(t, pool.Config{Size: 2}, enginefake.Hooks{Created: func(context.Context, string) error {
			if broken.Load() {
				tries = append(tries, time.Since(begun)) // one at a time
				return errors.New("no room")
			}
			return nil
		}})
		r.after(10*time.Minute, 0) // and nothing is left of what was half made
		want := "[0s 500ms 1.5s 3.5s 7.5s 15.5s 31.5s 1m3.5s 2m3.5s 3m3.5s"
		if got := fmt.Sprint(tries); !strings.HasPrefix(got, want) {
			t.Errorf("tried at %s, want %s", got, want)
		}
		broken.Store(false)
		if _, ok := r.Claim(engine.Spec{}); ok {
			t.Error("claimed what was not made")
		}
		r.after(time.Minute, 2)
		if !strings.Contains(r.log.String(), "no room") {
			t.Error("nobody was told")
		}
	})
}

func TestOneAtATime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var making, most atomic.Int64
		r := newRig(t, pool.Config{Size: 5}, enginefake.Hooks{Create: func(ctx context.Context, _ string) error {
			most.Store(max(most.Load(), making.Add(1)))
			defer making.Add(-1)
			return sleep(time.Second)(ctx, "")
		}})
		r.after(5*time.Second, 5)
		if most.Load() != 1 {
			t.Errorf("%d were made at a time", most.Load())
		}
	})
}

func TestBusy(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var busy atomic.Bool
		busy.Store(true)
		r := newRig(t, pool.Config{Size: 1, Busy: busy.Load}, enginefake.Hooks{})
		r.after(time.Hour, 0)
		busy.Store(false)
		r.after(time.Second, 1)
		busy.Store(true)
		r.claim()
		r.after(time.Hour, 0)
	})
}

func TestDrain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, pool.Config{Size: 3}, enginefake.Hooks{})
		r.after(0, 3)
		sb := r.claim()
		r.Drain()
		if _, ok := r.Claim(engine.Spec{}); ok {
			t.Error("claimed after the drain")
		}
		<-r.done
		r.after(time.Hour, 0)
		if n := len(r.fake.Made()); n != 3 {
			t.Errorf("%d were made, %s was claimed", n, sb.ID())
		}
		r.Drain()
	})
}

// A drain does not wait until what is being made has been, and leaves nothing of it.
func TestDrainWhileMaking(t *testing.T) {
	for name, hooks := range map[string]enginefake.Hooks{
		"before":                {Create: sleep(time.Hour)},
		"after":                 {Created: sleep(time.Hour)},
		"heedless of the drain": {Created: func(context.Context, string) error { time.Sleep(time.Second); return nil }},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, pool.Config{Size: 1}, hooks)
				time.Sleep(10 * time.Millisecond)
				begun := time.Now()
				r.Drain()
				<-r.done
				if took := time.Since(begun); took > time.Second {
					t.Errorf("it took %v", took)
				}
				r.after(0, 0)
			})
		})
	}
}

// The end of the context drains too, and a sandbox that cannot be ended does not keep
// the owner for ever.
func TestStuck(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var stuck atomic.Bool
		r := newRig(t, pool.Config{Size: 1}, enginefake.Hooks{Terminate: func(context.Context, string) error {
			if stuck.Load() {
				return errors.New("it does not die")
			}
			return nil
		}})
		r.after(0, 1)
		stuck.Store(true)
		begun := time.Now()
		r.stop(errors.New("stop"))
		<-r.done
		if took := time.Since(begun); took != 10*time.Second {
			t.Errorf("gave up after %v", took)
		}
		id := r.alive()[0]
		if !strings.Contains(r.log.String(), id) {
			t.Errorf("nobody was told: %s", r.log)
		}
		stuck.Store(false)
		sb, err := r.fake.Open(t.Context(), id) // as the next start does
		if err == nil {
			_, err = sb.Terminate(t.Context())
		}
		if err != nil {
			t.Error(err)
		}
	})
}

// What could not be ended, or not even be looked at, is tried again until it is gone.
func TestLeftovers(t *testing.T) {
	broken := errors.New("too many open files")
	for name, test := range map[string]struct {
		hooks func(broken func() error) enginefake.Hooks
		die   bool
	}{
		"half made, and not to be found": {hooks: func(broken func() error) enginefake.Hooks {
			hook := func(context.Context, string) error { return broken() }
			return enginefake.Hooks{Created: hook, Open: hook}
		}},
		"dead, and not to be ended": {die: true, hooks: func(broken func() error) enginefake.Hooks {
			return enginefake.Hooks{Terminate: func(context.Context, string) error { return broken() }}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				mends := time.Now().Add(30 * time.Second)
				r := newRig(t, pool.Config{Size: 1}, test.hooks(func() error {
					if time.Now().Before(mends) {
						return broken
					}
					return nil
				}))
				if test.die {
					r.after(0, 1)
					r.fake.Die(r.alive()[0])
				}
				time.Sleep(20 * time.Second)
				synctest.Wait()
				if n := len(r.alive()); n == 0 {
					t.Error("nothing is left: the test tests nothing")
				}
				r.after(time.Minute, 1)
				if n := len(r.fake.Made()); n != 2 {
					t.Errorf("%d were made", n)
				}
			})
		})
	}
}

// sleep is a hook that takes its time.
func sleep(d time.Duration) func(context.Context, string) error {
	return func(ctx context.Context, _ string) error {
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// lockedBuffer is for a logger that many write to.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
