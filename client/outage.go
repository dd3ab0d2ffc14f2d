package client

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"
)

// The time between two attempts doubles from the first to the last of these, less
// a random part of up to a half, so that many clients of a server that came back
// do not come back together.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

// pause is the wait after the given failure of an outage, from 1.
func pause(attempt int) time.Duration {
	d := lastPause
	if shift := attempt - 1; shift < 10 {
		d = min(d, firstPause<<max(0, shift))
	}
	return d/2 + rand.N(d/2+1)
}

// outage counts the failures since the server was last heard of.
type outage struct {
	name   string
	limit  time.Duration
	tell   func(Outage)
	since  time.Time // of the first failure; zero when there is none
	failed int
}

func (c *Client) newOutage(name string) outage {
	return outage{name: name, limit: c.cfg.MaxOutage, tell: c.cfg.OnOutage}
}

// over notes that the server was heard of.
func (o *outage) over() { o.since, o.failed = time.Time{}, 0 }

// left is how much of the limit remains.
func (o *outage) left() time.Duration {
	if o.since.IsZero() {
		return max(0, o.limit)
	}
	return max(0, o.limit-time.Since(o.since))
}

// wait notes a failure and returns when another attempt is due. It returns an
// ErrOutage with the failure when the limit has passed, and the cause of ctx when
// that ends.
func (o *outage) wait(ctx context.Context, failure error) error {
	o.failed++
	if o.since.IsZero() {
		o.since = time.Now()
	}
	left := o.left()
	if left == 0 {
		if o.limit <= 0 {
			return failure
		}
		return fmt.Errorf("%w for %s: %w", ErrOutage, o.limit, failure)
	}
	// The last wait is cut short, so that an attempt is made at the very end too.
	d := min(max(pause(o.failed), retryDelay(failure)), left)
	if o.tell != nil {
		o.tell(Outage{Execution: o.name, Attempt: o.failed, Err: failure, Wait: d})
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
