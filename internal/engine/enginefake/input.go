package enginefake

import (
	"fmt"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

// InputBytes is how much input a script can leave unread before its writers wait.
const InputBytes = 64 << 10

// input is what a script has yet to read.
type input struct {
	mu        sync.Mutex
	data      []byte
	committed int64
	closed    bool // by the writer or by the script
	over      bool
	change    chan struct{} // closed when something of the above changes
}

func newInput() *input { return &input{change: make(chan struct{})} }

// changed tells those who wait. The caller holds mu.
func (in *input) changed() {
	close(in.change)
	in.change = make(chan struct{})
}

// read takes at most n bytes; with none there, wait closes when there may be some. A
// script whose input is not open reads its end.
func (in *input) read(n int) (data []byte, end bool, wait <-chan struct{}) {
	if in == nil {
		return nil, true, nil
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.data) == 0 {
		return nil, in.closed, in.change
	}
	n = min(n, len(in.data))
	data, in.data = in.data[:n:n], in.data[n:]
	in.changed()
	return data, false, nil
}

func (in *input) shut() {
	if in == nil {
		return
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
	in.changed()
}

func (in *input) finish() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.over = true
	in.changed()
}

// write is what the protocol says about WriteRequest, for what there is room for now.
// wait closes when there may be more.
func (in *input) write(r *guestv1.WriteRequest, data []byte) (answer *Answer, wait <-chan struct{}) {
	in.mu.Lock()
	defer in.mu.Unlock()
	told := func() *Answer {
		return &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Write{
			Write: &guestv1.WriteResponse{CommittedOffset: uint64(in.committed), Closed: in.closed || in.over},
		}}}
	}
	refused := func(kind guestv1.Error_Kind, message string) *Answer {
		a := refuse(kind, message)
		committed := uint64(in.committed)
		a.Response.GetError().CommittedOffset = &committed
		return a
	}
	if r.Offset == nil {
		return told(), nil
	}
	skip := in.committed - int64(r.GetOffset())
	switch {
	case skip < 0 && in.over:
		return refused(guestv1.Error_KIND_ENDED, "the command has ended"), nil
	case skip < 0, r.GetClose() && skip > int64(len(data)):
		return refused(guestv1.Error_KIND_INVALID, fmt.Sprintf("%d bytes were taken", in.committed)), nil
	}
	data = data[min(skip, int64(len(data))):]
	switch {
	case len(data) == 0 && (!r.GetClose() || in.closed):
		return told(), nil
	case in.over:
		return refused(guestv1.Error_KIND_ENDED, "the command has ended"), nil
	case in.closed:
		return refused(guestv1.Error_KIND_CLOSED, "the input is closed"), nil
	}
	n := min(len(data), InputBytes-len(in.data))
	in.data = append(in.data, data[:n]...)
	in.committed += int64(n)
	if n == len(data) {
		in.closed = r.GetClose()
	}
	if n > 0 || in.closed {
		in.changed()
	}
	if n < len(data) {
		wait = in.change
	}
	return told(), wait
}

func (sb *sandbox) writeInput(r *guestv1.WriteRequest, data []byte) *Answer {
	c, ok := sb.command(r.GetExecution())
	switch {
	case !ok:
		return refuse(guestv1.Error_KIND_NOT_FOUND, "no such command")
	case c.input == nil:
		return refuse(guestv1.Error_KIND_INVALID, "the input is not open")
	}
	timer := time.NewTimer(milliseconds(uint64(r.GetWaitMs())))
	defer timer.Stop()
	for {
		answer, wait := c.input.write(r, data)
		if wait == nil {
			return answer
		}
		select {
		case <-wait:
			continue
		case <-timer.C:
		case <-sb.done:
		}
		return answer
	}
}

func (sb *sandbox) resize(r *guestv1.ResizeRequest) *Answer {
	c, ok := sb.command(r.GetExecution())
	switch {
	case !ok:
		return refuse(guestv1.Error_KIND_NOT_FOUND, "no such command")
	case !c.terminal:
		return refuse(guestv1.Error_KIND_INVALID, "no terminal")
	case c.hasEnded():
		return refuse(guestv1.Error_KIND_ENDED, "the command has ended")
	}
	c.hear(fmt.Sprintf("resize %dx%d", r.GetSize().GetRows(), r.GetSize().GetColumns()))
	return &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Resize{Resize: &guestv1.ResizeResponse{}}}}
}

func (sb *sandbox) signal(r *guestv1.SignalRequest) *Answer {
	c, ok := sb.command(r.GetExecution())
	if !ok {
		return refuse(guestv1.Error_KIND_NOT_FOUND, "no such command")
	}
	select {
	case c.signals <- int32(r.GetSignal()):
		c.hear(fmt.Sprintf("signal %d %s", r.GetSignal(), r.GetScope()))
	case <-c.ended:
		return refuse(guestv1.Error_KIND_ENDED, "the command has ended")
	case <-sb.done:
	}
	return &Answer{Response: &guestv1.Response{Answer: &guestv1.Response_Signal{Signal: &guestv1.SignalResponse{}}}}
}

func (c *command) hear(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heard = append(c.heard, what)
}

// Heard are the resizes and signals that a command got, such as "resize 24x80" and
// "signal 15 SCOPE_TREE".
func (e *Engine) Heard(sandbox, execution string) []string {
	sb, ok := e.find(sandbox)
	if !ok {
		return nil
	}
	c, ok := sb.command(execution)
	if !ok {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.heard...)
}
