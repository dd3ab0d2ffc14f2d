package guestclient

import (
	"context"
	"fmt"
	"math"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

const (
	// MaxWrite is the most that one Write can carry.
	MaxWrite = 64 << 10
	// maxWriteWait is the longest that a guest can be asked to wait for room.
	maxWriteWait = 10 * time.Second
)

// Written is how far a command's input has come.
type Written struct {
	// Committed is how much of it the program's pipe or terminal has taken.
	Committed int64
	// Closed says that nothing more is taken.
	Closed bool
}

// Write writes data, at most MaxWrite, to a command's input, where offset is the
// position of its first byte, and with end the end. It waits up to ten seconds for
// room, and then tells how much there was. What was written already is not written
// again: a lost pipe is not seen by the caller. An Error tells in Committed how far
// the input has come.
func (c *Client) Write(ctx context.Context, execution string, offset int64, data []byte, end bool, wait time.Duration) (Written, error) {
	if offset < 0 || len(data) > MaxWrite {
		return Written{}, fmt.Errorf("write %d bytes at %d: out of range", len(data), offset)
	}
	wait = max(min(wait, maxWriteWait), 0)
	at := uint64(offset)
	return c.write(ctx, &guestv1.WriteRequest{Execution: execution, Offset: &at, Close: end, WaitMs: uint32(milliseconds(wait))}, data, wait)
}

// Input asks how far a command's input has come.
func (c *Client) Input(ctx context.Context, execution string) (Written, error) {
	return c.write(ctx, &guestv1.WriteRequest{Execution: execution}, nil, 0)
}

func (c *Client) write(ctx context.Context, r *guestv1.WriteRequest, data []byte, wait time.Duration) (Written, error) {
	a, err := c.callWith(ctx, &guestv1.Request{Call: &guestv1.Request_Write{Write: r}}, data, wait)
	if err != nil {
		return Written{}, err
	}
	defer a.release()
	answer := a.response.GetWrite()
	if answer == nil || len(a.payload.bytes()) > 0 {
		return Written{}, errWrongAnswer
	}
	if answer.GetCommittedOffset() > math.MaxInt64 {
		return Written{}, fmt.Errorf("the guest told that %d bytes of input were taken", answer.GetCommittedOffset())
	}
	return Written{Committed: int64(answer.GetCommittedOffset()), Closed: answer.GetClosed()}, nil
}

// Resize changes the size of a command's terminal.
func (c *Client) Resize(ctx context.Context, execution string, size *guestv1.TerminalSize) error {
	r := &guestv1.ResizeRequest{Execution: execution, Size: size}
	resp, err := c.ask(ctx, &guestv1.Request{Call: &guestv1.Request_Resize{Resize: r}})
	if err == nil && resp.GetResize() == nil {
		err = errWrongAnswer
	}
	return err
}

// Signal sends a signal to processes of a command. Over a pipe that is lost it may be
// sent twice.
func (c *Client) Signal(ctx context.Context, execution string, signal int32, scope guestv1.SignalRequest_Scope) error {
	r := &guestv1.SignalRequest{Execution: execution, Signal: uint32(signal), Scope: scope}
	resp, err := c.ask(ctx, &guestv1.Request{Call: &guestv1.Request_Signal{Signal: r}})
	if err == nil && resp.GetSignal() == nil {
		err = errWrongAnswer
	}
	return err
}
