// Package admission decides what may run now: it hands out places for executions and
// sandboxes up to a limit, keeps those who ask for more in a bounded queue, in the
// order in which they came, and refuses the rest. It knows nothing of what takes the
// places, and has no goroutines: who waits does so in his own.
package admission

import (
	"context"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

// Config says how much there is. Its zero value has no limits.
type Config struct {
	// MaxRunning bounds the executions at a time; 0 does not.
	MaxRunning int
	// MaxSandboxes bounds the sandboxes in use at a time, of sessions and of one-shots
	// together; 0 does not.
	MaxSandboxes int
	// MaxQueued bounds those who wait; with 0 nobody does.
	MaxQueued int
	// MaxQueueWait is how long one waits at most.
	MaxQueueWait time.Duration
}

// Need is what one asks for: places that are taken together or not at all.
type Need struct {
	// Run is a place among the executions.
	Run bool
	// Sandbox is a place among the sandboxes.
	Sandbox bool
}

// Stats tells how it is now.
type Stats struct {
	Config
	// Running and Sandboxes are the places that are taken; what was taken up after a
	// restart can be more than the limit.
	Running   int
	Sandboxes int
	// Queued are those who wait.
	Queued int
}

// Controller hands out places. Make one with New.
type Controller struct {
	cfg Config

	mu        sync.Mutex
	running   int
	sandboxes int
	queue     line
	draining  bool
}

// Slot is the places that somebody has.
type Slot struct {
	controller *Controller
	need       Need
	given      bool // back
}

// New makes a Controller.
func New(cfg Config) *Controller { return &Controller{cfg: cfg} }

// Draining is the fault of those who ask while executord is stopping.
func Draining() error {
	return &fault.Error{
		Kind: fault.Unavailable, Reason: "SERVER_DRAINING", RetryAfter: time.Second,
		Message: "executord is stopping and takes no new work",
	}
}

// Acquire takes places, and waits for them if it must. Faults: Exhausted (QUEUE_FULL,
// QUEUE_TIMEOUT), Unavailable (SERVER_DRAINING); ctx's cause when that ends first. The
// Slot must be released.
func (c *Controller) Acquire(ctx context.Context, need Need) (*Slot, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	slot, w, err := c.enter(need)
	if w == nil {
		return slot, err
	}
	patience := time.NewTimer(c.cfg.MaxQueueWait)
	defer patience.Stop()
	select {
	case <-w.called:
	case <-patience.C:
		if c.leave(w) {
			return nil, c.timedOut(need)
		}
	case <-ctx.Done():
		if !c.leave(w) && w.slot != nil {
			w.slot.Release() // called in the same moment: the next one has it
		}
		return nil, context.Cause(ctx)
	}
	return w.slot, w.err
}

// Occupy takes places that are in use already, whatever the limits are: those of
// what an executord before this one began.
func (c *Controller) Occupy(need Need) *Slot {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.take(need)
}

// Release gives the places back; a second time it does nothing.
func (s *Slot) Release() {
	c := s.controller
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.given {
		return
	}
	s.given = true
	if s.need.Run {
		c.running--
	}
	if s.need.Sandbox {
		c.sandboxes--
	}
	c.callLocked()
}

// Drain refuses everybody from now on, those who wait included. What has a Slot keeps it.
func (c *Controller) Drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
	for w := c.queue.next(anything); w != nil; w = c.queue.next(anything) {
		c.queue.remove(w)
		w.call(nil, Draining())
	}
}

// Saturated says whether there is nothing left to hand out: whoever works ahead should
// then not.
func (c *Controller) Saturated() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.draining || c.queue.size > 0 || !c.fits(Need{Run: true, Sandbox: true})
}

// Stats tells how it is now.
func (c *Controller) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return Stats{Config: c.cfg, Running: c.running, Sandboxes: c.sandboxes, Queued: c.queue.size}
}

// enter takes places or joins the queue.
func (c *Controller) enter(need Need) (*Slot, *waiter, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.draining:
		return nil, nil, Draining()
	case c.fits(need): // and so for none of those who wait
		return c.take(need), nil, nil
	case c.queue.size >= c.cfg.MaxQueued:
		return nil, nil, c.full(need)
	}
	w := &waiter{need: need, called: make(chan struct{})}
	c.queue.join(w)
	return nil, w, nil
}

// leave takes one out of the queue; false if he was called before.
func (c *Controller) leave(w *waiter) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-w.called:
		return false
	default:
		c.queue.remove(w)
		return true
	}
}

// fits says whether the places are free.
func (c *Controller) fits(need Need) bool {
	return (!need.Run || c.cfg.MaxRunning == 0 || c.running < c.cfg.MaxRunning) &&
		(!need.Sandbox || c.cfg.MaxSandboxes == 0 || c.sandboxes < c.cfg.MaxSandboxes)
}

func (c *Controller) take(need Need) *Slot {
	if need.Run {
		c.running++
	}
	if need.Sandbox {
		c.sandboxes++
	}
	return &Slot{controller: c, need: need}
}

// callLocked gives places to those who wait, as long as there are some.
func (c *Controller) callLocked() {
	for w := c.queue.next(c.fits); w != nil; w = c.queue.next(c.fits) {
		c.queue.remove(w)
		w.call(c.take(w.need), nil)
	}
}
