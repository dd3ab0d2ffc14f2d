package pool

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
)

// ask is Claim without its check, so that there can be kinds which the waist has no
// words for yet.
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
