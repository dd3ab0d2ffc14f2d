package pool

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
)

// ask is Claim without its check, so that kinds are told by a number.
func (p *Pool) ask(pids int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kindLocked(engine.Spec{Limits: engine.Limits{PIDs: pids}}, time.Now())
	p.wake()
}

// has tells how many are ready of each kind, the one that was asked for last first.
func (p *Pool) has() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	text := ""
	for _, k := range p.kinds {
		text += fmt.Sprintf("%d:%d ", k.spec.Limits.PIDs, len(k.ready))
	}
	return text
}

// The kinds are bounded; the one that was not asked for the longest goes, the one that
// is there from the start stays, and one that nobody asks for is given up.
func TestKinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := enginefake.New(enginefake.Config{Limits: engine.Limits{PIDs: 1}})
		defer fake.Shutdown()
		p := New(Config{Engine: fake, Size: 2, MaxKinds: 3, MaxAge: time.Minute})
		var group sync.WaitGroup
		defer group.Wait()
		group.Go(func() { _ = p.Run(context.Background()) })
		defer p.Drain()
		want := func(want string) {
			t.Helper()
			synctest.Wait()
			if got := p.has(); got != want {
				t.Errorf("has %q, want %q", got, want)
			}
			if ids, err := fake.List(t.Context()); err != nil || len(ids) != p.Stats().Ready {
				t.Errorf("%d are ready of %v, %v", p.Stats().Ready, ids, err)
			}
		}
		want("1:2 ")
		p.ask(2)
		p.ask(3)
		want("3:2 2:2 1:2 ")
		p.ask(4)
		want("4:2 3:2 1:2 ")
		p.ask(3)
		want("3:2 4:2 1:2 ")
		p.ask(5)
		want("5:2 3:2 1:2 ")
		time.Sleep(30 * time.Second)
		p.ask(3)
		time.Sleep(30 * time.Second)
		want("3:2 1:2 ")
		time.Sleep(30 * time.Second)
		want("1:2 ")
	})
}

// What a sandbox is made for is never handed out to another.
func TestClaimIsExact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := enginefake.New(enginefake.Config{Placement: true, Secrets: []string{"s"}})
		defer fake.Shutdown()
		fake.AddImage("im-1")
		fake.AddImage("im-2")
		p := New(Config{Engine: fake, Size: 1})
		var group sync.WaitGroup
		defer group.Wait()
		group.Go(func() { _ = p.Run(context.Background()) })
		defer p.Drain()
		synctest.Wait()
		for name, spec := range map[string]engine.Spec{
			"volumes": {Volumes: []engine.VolumeMount{{Name: "v", Path: "/v"}}}, "secrets": {Secrets: []string{"s"}}, "gpu": {Placement: engine.Placement{GPU: "A100"}},
			"region": {Placement: engine.Placement{Regions: []string{"eu"}}}, "runtime": {Placement: engine.Placement{Runtime: "gvisor"}},
		} {
			for range 2 {
				if sb, ok := p.Claim(spec); ok {
					t.Errorf("%s: claimed %s", name, sb.ID())
				}
				time.Sleep(time.Minute)
			}
		}
		if stats := p.Stats(); stats.Ready != 1 || stats.Misses != 0 {
			t.Errorf("%+v", stats)
		}
		// Images are kinds: the first claim brings what the second finds.
		for _, want := range []bool{false, true} {
			for _, image := range []engine.ImageRef{"im-1", "im-2"} {
				sb, ok := p.Claim(engine.Spec{Image: image})
				if ok != want {
					t.Errorf("%s: claimed %v", image, ok)
				} else if ok {
					if spec := fake.Spec(sb.ID()); spec.Image != image {
						t.Errorf("for %s: one of %q", image, spec.Image)
					}
					sb.Terminate(t.Context())
				}
			}
			time.Sleep(time.Second)
		}
	})
}

// A kind that cannot be made any more does not keep the others from being made.
func TestImageIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := enginefake.New(enginefake.Config{})
		defer fake.Shutdown()
		fake.AddImage("im")
		p := New(Config{Engine: fake, Size: 1})
		var group sync.WaitGroup
		defer group.Wait()
		group.Go(func() { _ = p.Run(context.Background()) })
		defer p.Drain()
		p.Claim(engine.Spec{Image: "im"})
		time.Sleep(time.Second)
		if err := fake.Images().Delete(t.Context(), "im"); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if sb, ok := p.Claim(engine.Spec{Image: "im"}); ok {
				sb.Terminate(t.Context()) // the one that was ready
			}
			if sb, ok := p.Claim(engine.Spec{}); !ok {
				t.Error("none of the engine's base is ready")
			} else {
				sb.Terminate(t.Context())
			}
			time.Sleep(time.Second)
			if n := len(strings.Fields(p.has())); n != 1 {
				t.Errorf("%d kinds", n)
			}
		}
	})
}

// Where an engine ends sandboxes, one is handed out only if it lives long enough.
func TestClaimLives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := enginefake.New(enginefake.Config{Lifetime: time.Hour})
		defer fake.Shutdown()
		p := New(Config{Engine: fake, Size: 1})
		var group sync.WaitGroup
		defer group.Wait()
		group.Go(func() { _ = p.Run(context.Background()) })
		defer p.Drain()
		time.Sleep(5 * time.Minute)
		if sb, ok := p.Claim(engine.Spec{Lifetime: 56 * time.Minute}); ok {
			t.Errorf("claimed one that lives until %v", sb.Deadline())
		}
		sb, ok := p.Claim(engine.Spec{Lifetime: 55 * time.Minute})
		if !ok {
			t.Fatal("the one that lives long enough is not claimed")
		}
		if _, err := sb.Terminate(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
