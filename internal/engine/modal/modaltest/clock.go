package modaltest

import (
	"context"
	"sync"
	"time"
)

// clock is the real one, moved forward.
type clock struct {
	mu      sync.Mutex
	forward time.Duration
	moved   chan struct{} // closed and replaced when it was moved
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.forward)
}

func (c *clock) movement() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.moved == nil {
		c.moved = make(chan struct{})
	}
	return c.moved
}

func (c *clock) advance(by time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forward += by
	if c.moved != nil {
		close(c.moved)
		c.moved = nil
	}
}

// Advance moves the fake's clock forward: sandboxes reach the end of their time, idle
// ones theirs, and images the end of their life. Tokens do not, as the SDK has no such
// clock.
func (f *Fake) Advance(by time.Duration) { f.clock.advance(by) }

// reapers end sandboxes whose time is over, until ctx ends.
func (f *Fake) reapers(ctx context.Context) {
	const often = 50 * time.Millisecond // how late an end may come
	tick := time.NewTicker(often)
	defer tick.Stop()
	for {
		moved := f.clock.movement()
		f.reapOverdue()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-moved:
		}
	}
}
