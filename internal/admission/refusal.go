package admission

import (
	"fmt"
	"strconv"
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

// retryAfter is when somebody who was refused may come back: the queue moves on as
// soon as something ends.
const retryAfter = time.Second

// full is the fault of one for whom there is no place in the queue.
func (c *Controller) full(need Need) error {
	e := c.refusal("QUEUE_FULL", need, "no place is free, and %d wait for one, which is as many as may", c.cfg.MaxQueued)
	e.Quotas = append(e.Quotas, fault.Quota{
		Subject: "server:queue", Description: fmt.Sprintf("at most %d requests wait for a place (admission.max_queued)", c.cfg.MaxQueued),
	})
	return e
}

// timedOut is the fault of one who waited too long.
func (c *Controller) timedOut(need Need) error {
	return c.refusal("QUEUE_TIMEOUT", need, "no place became free within %v", c.cfg.MaxQueueWait)
}

// refusal is a fault with the limits of what was needed.
func (c *Controller) refusal(reason string, need Need, format string, args ...any) *fault.Error {
	e := fault.New(fault.Exhausted, reason, format, args...)
	e.RetryAfter = retryAfter
	if need.Run && c.cfg.MaxRunning > 0 {
		e.Quotas = append(e.Quotas, fault.Quota{
			Subject:     "server:executions",
			Description: fmt.Sprintf("at most %d executions run at a time (admission.max_running)", c.cfg.MaxRunning),
		})
		e = e.With("max_running", strconv.Itoa(c.cfg.MaxRunning))
	}
	if need.Sandbox && c.cfg.MaxSandboxes > 0 {
		e.Quotas = append(e.Quotas, fault.Quota{
			Subject:     "server:sandboxes",
			Description: fmt.Sprintf("at most %d sandboxes are in use at a time (admission.max_sandboxes)", c.cfg.MaxSandboxes),
		})
		e = e.With("max_sandboxes", strconv.Itoa(c.cfg.MaxSandboxes))
	}
	return e
}
