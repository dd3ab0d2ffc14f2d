package guestclient

import (
	"context"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

// AwaitOver waits up to a minute until nobody is left to write output, without reading
// any. The Output says whether that is so.
func (c *Client) AwaitOver(ctx context.Context, execution string, wait time.Duration) (*Output, error) {
	return c.readEnd(ctx, &guestv1.ReadRequest{Execution: execution, Mode: guestv1.ReadMode_READ_MODE_AWAIT_OVER}, wait)
}

// Discard makes the guest give up all output from a position on, also what is still to
// come, and waits up to a minute for the exit.
func (c *Client) Discard(ctx context.Context, execution string, position int64, wait time.Duration) (*Output, error) {
	r := &guestv1.ReadRequest{Execution: execution, Position: uint64(max(position, 0)), Mode: guestv1.ReadMode_READ_MODE_DISCARD}
	return c.readEnd(ctx, r, wait)
}

func (c *Client) readEnd(ctx context.Context, r *guestv1.ReadRequest, wait time.Duration) (*Output, error) {
	wait = max(min(wait, maxWait), 0)
	r.WaitMs = uint32(milliseconds(wait))
	a, err := c.call(ctx, &guestv1.Request{Call: &guestv1.Request_Read{Read: r}}, wait)
	if err != nil {
		return nil, err
	}
	return checkedOutput(a, 0)
}
