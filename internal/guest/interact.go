package guest

import (
	"io"
	"syscall"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

// takePayload reads what follows a request. Only a write has a use for it. ok is false
// for more than a write may have.
func takePayload(from io.Reader, req *guestv1.Request, size int) (payload []byte, ok bool, err error) {
	if req.GetWrite() == nil || size > maxWrite {
		_, err := io.CopyN(io.Discard, from, int64(size))
		return nil, req.GetWrite() == nil, err
	}
	payload = make([]byte, size)
	_, err = io.ReadFull(from, payload)
	return payload, true, err
}

// write hands input to a command.
func (g *Guest) write(r *guestv1.WriteRequest, data []byte) (*guestv1.WriteResponse, error) {
	c, err := g.command(r.GetExecution())
	if err != nil {
		return nil, err
	}
	if c.input == nil {
		return nil, refuse(guestv1.Error_KIND_INVALID, "the input of %q is not open", c.id)
	}
	if r.Offset == nil {
		if len(data) > 0 || r.GetClose() {
			return nil, refuse(guestv1.Error_KIND_INVALID, "a write without an offset")
		}
		committed, closed, over := c.input.state()
		return &guestv1.WriteResponse{CommittedOffset: uint64(committed), Closed: closed || over}, nil
	}
	if r.GetOffset() > 1<<62 {
		return nil, c.input.refuse(guestv1.Error_KIND_INVALID, "offset %d is beyond everything", r.GetOffset())
	}
	wait := min(milliseconds(uint64(r.GetWaitMs())), maxWriteWait)
	before, _, _ := c.input.state()
	committed, closed, err := c.input.write(int64(r.GetOffset()), data, r.GetClose(), wait)
	if committed > before {
		c.touch(time.Now()) // what has no room is no activity
	}
	if err != nil {
		return nil, err
	}
	return &guestv1.WriteResponse{CommittedOffset: uint64(committed), Closed: closed}, nil
}

// resize changes the size of a command's terminal.
func (g *Guest) resize(r *guestv1.ResizeRequest) error {
	c, err := g.command(r.GetExecution())
	if err != nil {
		return err
	}
	if c.terminal == nil {
		return refuse(guestv1.Error_KIND_INVALID, "%q has no terminal", c.id)
	}
	return c.whileItLives(func() error { return c.terminal.resize(r.GetSize()) })
}

// signal sends a signal to processes of a command.
func (g *Guest) signal(r *guestv1.SignalRequest) error {
	c, err := g.command(r.GetExecution())
	if err != nil {
		return err
	}
	if r.GetSignal() < 1 || r.GetSignal() > 64 {
		return refuse(guestv1.Error_KIND_INVALID, "signal %d", r.GetSignal())
	}
	// What makes no sense is said whether the command lives or not.
	if _, known := guestv1.SignalRequest_Scope_name[int32(r.GetScope())]; !known || r.GetScope() == guestv1.SignalRequest_SCOPE_UNSPECIFIED {
		return refuse(guestv1.Error_KIND_INVALID, "scope %d", r.GetScope())
	}
	sig := syscall.Signal(r.GetSignal())
	return c.whileItLives(func() error {
		target := c.pid
		switch r.GetScope() {
		case guestv1.SignalRequest_SCOPE_PROCESS:
		case guestv1.SignalRequest_SCOPE_GROUP:
			target = -c.pid // the leader of a session leads a group
			if c.terminal != nil {
				if group := c.terminal.foreground(); group > 1 {
					target = -group
				}
			}
		case guestv1.SignalRequest_SCOPE_TREE:
			signalAll(c.tree, sig)
			return nil
		}
		if !g.reaper.signal(c.pid, target, sig) {
			return refuse(guestv1.Error_KIND_ENDED, "the command has ended")
		}
		return nil
	})
}

// whileItLives does something to the processes of a command whose leader has not ended.
func (c *command) whileItLives(do func() error) error {
	c.alive.RLock()
	defer c.alive.RUnlock()
	if c.dead {
		return refuse(guestv1.Error_KIND_ENDED, "the command has ended")
	}
	return do()
}

// leaderIsDead has everything refused from now on that needs a living command.
func (c *command) leaderIsDead() {
	c.alive.Lock()
	c.dead = true
	c.alive.Unlock()
	if c.input != nil {
		c.input.finish()
	}
}
