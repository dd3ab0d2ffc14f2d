package guestclient

import (
	"context"
	"errors"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

// errNotAsked is why there is no early output: the start took more than one try.
var errNotAsked = errors.New("the first output was not asked for together with the start")

// Early is the first output of a command, asked for together with its start. An answer
// that nobody waits for is thrown away when it comes.
type Early struct {
	await    func(context.Context) (answer, error)
	maxBytes int
}

// Output waits for the output. Any error, also one of the guest, means no more than that
// it is to be asked for with Read: nothing is lost.
func (e *Early) Output(ctx context.Context) (*Output, error) {
	a, err := e.await(ctx)
	if err != nil {
		return nil, err
	}
	if refused := a.response.GetError(); refused != nil {
		a.release()
		return nil, errorOf(refused)
	}
	return checkedOutput(a, e.maxBytes)
}

// StartRead is Start, with the Read from position 0 sent right behind it: the first
// output comes without the time it takes to hear of the start and to ask. The guest
// takes the requests of a pipe in their order, so that the read finds the command.
func (c *Client) StartRead(ctx context.Context, r *guestv1.StartRequest, maxBytes int, wait time.Duration) (*guestv1.StartResponse, *Early, error) {
	a, early, err := c.tryStartRead(ctx, r, maxBytes, min(wait, maxWait))
	if err != nil {
		// A start may be repeated, and Start knows when. What was asked for with it is
		// asked for again.
		resp, err := c.Start(ctx, r)
		return resp, &Early{await: func(context.Context) (answer, error) { return answer{}, errNotAsked }}, err
	}
	defer a.release()
	if e := a.response.GetError(); e != nil {
		return nil, nil, errorOf(e)
	}
	if a.response.GetStart().GetPid() <= 0 || len(a.payload.bytes()) > 0 {
		return nil, nil, errWrongAnswer
	}
	return a.response.GetStart(), early, nil
}

// tryStartRead sends both and waits for the answer to the start; an error means that
// there was none.
func (c *Client) tryStartRead(ctx context.Context, r *guestv1.StartRequest, maxBytes int, wait time.Duration) (answer, *Early, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errSilent)
	defer cancel()
	p, err := c.connect(ctx)
	if err != nil {
		return answer{}, nil, err
	}
	start := &guestv1.Request{Call: &guestv1.Request_Start{Start: r}}
	read := readRequest(r.GetExecution(), 0, maxBytes, wait)
	started, output, err := p.postTogether(ctx, start, read)
	if err != nil {
		return answer{}, nil, err
	}
	early := &Early{maxBytes: maxBytes, await: func(ctx context.Context) (answer, error) { return p.await(ctx, read.GetId(), output) }}
	a, err := p.await(ctx, start.GetId(), started)
	return a, early, err
}
