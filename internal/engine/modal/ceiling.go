package modal

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

const (
	// breakAfter failures in a row no more sandboxes are asked for, for a while.
	breakAfter = 5
	firstBreak = 5 * time.Second
	longBreak  = 2 * time.Minute
)

// ceiling bounds what a fault, of ours or of a caller, can cost: how many sandboxes there
// are at a time, how many are asked for in a minute, and how often one is asked for where
// that does not work.
type ceiling struct {
	most, perMinute int

	mu     sync.Mutex
	alive  map[string]bool // by sandbox id
	asked  []time.Time     // of the last minute, the oldest first
	failed int             // in a row
	closed time.Time       // no requests until then
	probe  bool            // one is on its way after a break
}

func newCeiling(most, perMinute int) *ceiling {
	return &ceiling{most: most, perMinute: perMinute, alive: make(map[string]bool)}
}

// admit lets a sandbox be asked for, or says why not. Whoever was let in calls outcome.
func (c *ceiling) admit(id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	c.asked = slices.DeleteFunc(c.asked, func(at time.Time) bool { return now.Sub(at) >= time.Minute })
	switch {
	case c.failed >= breakAfter && (now.Before(c.closed) || c.probe):
		e := fault.New(fault.Unavailable, reasonUnavailable, "the last %d sandboxes that were asked for could not be made; no more are asked for until %s",
			c.failed, c.closed.Format(time.TimeOnly))
		e.RetryAfter = max(c.closed.Sub(now), time.Second)
		return e
	case len(c.alive) >= c.most && !c.alive[id]:
		return exhausted("sandboxes", c.most, retryLater, "%d sandboxes are alive on Modal, which is as many as this executord may have (modal.max_sandboxes)", len(c.alive))
	case len(c.asked) >= c.perMinute:
		return exhausted("sandboxes_per_minute", c.perMinute, c.asked[0].Add(time.Minute).Sub(now),
			"%d sandboxes were asked for in the last minute, which is as many as this executord may ask for (modal.max_creates_per_minute)", len(c.asked))
	}
	c.probe = c.failed >= breakAfter
	c.alive[id] = true
	c.asked = append(c.asked, now)
	return nil
}

func exhausted(name string, limit int, retry time.Duration, format string, args ...any) error {
	e := fault.New(fault.Exhausted, "ENGINE_EXHAUSTED", format, args...)
	e.Quotas = []fault.Quota{{Subject: "engine:modal", Name: name, Limit: int64(limit), Description: fmt.Sprintf(format, args...)}}
	e.RetryAfter = retry
	return e.With("limit", fmt.Sprint(limit))
}

// outcome tells how it went. failed means by the provider's fault; a caller that went
// away or asked for nonsense says nothing about it.
func (c *ceiling) outcome(ok, failed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.probe = false
	switch {
	case ok:
		c.failed = 0
	case failed:
		c.failed++
		if c.failed >= breakAfter {
			c.closed = time.Now().Add(min(firstBreak<<min(c.failed-breakAfter, 10), longBreak))
		}
	}
}

// found counts a sandbox that is there already.
func (c *ceiling) found(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.alive[id] = true
}

// gone makes room.
func (c *ceiling) gone(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.alive, id)
}
