package guest

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

const (
	// maxWrite bounds the payload of one write.
	maxWrite = 64 << 10
	// maxWriteWait bounds the wait for room. A write whose pipe was lost goes on as
	// long; then its repeat finds what it did.
	maxWriteWait = 10 * time.Second
	// leastWait is what a write gets that does not want to wait: a file with a deadline
	// that has passed would not even be tried.
	leastWait = 10 * time.Millisecond
)

// input is the way from executord to what a program reads: the writing end of a pipe,
// or a terminal. It keeps nothing of what is written: what the program does not read
// fills the pipe, and then it is executord that waits.
type input struct {
	file *os.File
	// terminal is set if file is one. It is read too, and stays open at the input's end.
	terminal *terminal
	// turn is held by whoever writes. It is a channel, so that others wait with a limit.
	turn chan struct{}

	mu        sync.Mutex
	committed int64 // what the kernel has taken
	closed    bool  // the program has been told the end, or reads no more
	over      bool  // the command has ended
	unended   bool  // of a terminal: the last byte written ends no line
}

func newInput(file *os.File, t *terminal) *input {
	return &input{file: file, terminal: t, turn: make(chan struct{}, 1)}
}

// state is what a writer is told.
func (in *input) state() (committed int64, closed, over bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.committed, in.closed, in.over
}

// write writes data, whose first byte has the position offset, from the committed
// offset on, as far as there is room within the wait, and with end the end.
func (in *input) write(offset int64, data []byte, end bool, wait time.Duration) (committed int64, closed bool, err error) {
	deadline := time.Now().Add(max(wait, leastWait))
	if !in.take(time.Until(deadline)) {
		committed, closed, _ = in.state()
		return committed, closed, nil
	}
	defer func() { <-in.turn }()
	committed, closed, over := in.state()
	skip := committed - offset
	switch {
	case skip < 0 && over:
		return 0, false, in.refuse(guestv1.Error_KIND_ENDED, "the command has ended")
	case skip < 0:
		return 0, false, in.refuse(guestv1.Error_KIND_INVALID, "offset %d is beyond the committed one, %d", offset, committed)
	case end && skip > int64(len(data)):
		return 0, false, in.refuse(guestv1.Error_KIND_INVALID, "the end at %d is before the committed offset, %d", offset+int64(len(data)), committed)
	}
	data = data[min(skip, int64(len(data))):]
	switch {
	case len(data) == 0 && (!end || closed):
		return committed, closed || over, nil // a repeat, which may come after the end
	case over:
		return 0, false, in.refuse(guestv1.Error_KIND_ENDED, "the command has ended")
	case closed:
		return 0, false, in.refuse(guestv1.Error_KIND_CLOSED, "the input is closed")
	}
	if err := in.put(data, deadline); err != nil {
		return 0, false, err
	}
	committed, closed, _ = in.state()
	if end && committed == offset+skip+int64(len(data)) {
		if closed, err = in.end(deadline); err != nil {
			return 0, false, err
		}
	}
	return committed, closed, nil
}

// take waits for the turn to write; false if it did not come in time.
func (in *input) take(wait time.Duration) bool {
	select {
	case in.turn <- struct{}{}:
		return true
	default:
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case in.turn <- struct{}{}:
		return true
	case <-t.C:
		return false
	}
}

// put writes what the kernel takes until the deadline and commits it.
func (in *input) put(data []byte, deadline time.Time) error {
	n, err := in.push(data, deadline)
	in.mu.Lock()
	in.committed += int64(n)
	if n > 0 {
		in.unended = data[n-1] != '\n' && data[n-1] != '\r'
	}
	in.closed = in.closed || errors.Is(err, syscall.EPIPE)
	in.mu.Unlock()
	return in.explain(err)
}

// push writes as much as the file takes until the deadline; that it did not take all is
// no error.
func (in *input) push(data []byte, deadline time.Time) (n int, err error) {
	for {
		until := deadline
		if in.terminal != nil {
			// The kernel can wake the writer of a terminal before there is room, and not
			// again when there is.
			until = earlier(deadline, time.Now().Add(terminalPause))
		}
		if err := in.limit(until); err != nil {
			return n, err
		}
		var more int
		more, err = in.file.Write(data[n:])
		n += more
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		if !time.Now().Before(deadline) {
			return n, nil
		}
		if _, _, over := in.state(); over {
			return n, os.ErrClosed
		}
	}
}

// limit sets the deadline of the next write, unless the command has ended: then that
// has set one.
func (in *input) limit(deadline time.Time) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.over {
		return os.ErrClosed
	}
	return in.file.SetWriteDeadline(deadline)
}

// end has the program read an end of file. closed is false if there is no room to tell
// a terminal.
func (in *input) end(deadline time.Time) (closed bool, err error) {
	if in.terminal != nil {
		in.mu.Lock()
		signs := in.terminal.endOfFile(in.unended)
		in.mu.Unlock()
		n, err := in.push(signs, deadline)
		if err != nil || n < len(signs) {
			in.mu.Lock()
			in.unended = in.unended && n == 0 // the first has ended the line
			in.mu.Unlock()
			return false, in.explain(err)
		}
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
	if in.terminal == nil && !in.over {
		in.file.Close()
	}
	return true, nil
}

// explain makes the guest's error of one of a write.
func (in *input) explain(err error) error {
	_, _, over := in.state()
	switch {
	case err == nil:
		return nil
	case over || errors.Is(err, os.ErrClosed) || errors.Is(err, syscall.EIO):
		// A terminal whose session has ended gives EIO.
		return in.refuse(guestv1.Error_KIND_ENDED, "the command has ended")
	case errors.Is(err, syscall.EPIPE):
		return in.refuse(guestv1.Error_KIND_CLOSED, "the program has closed its input")
	}
	return err
}

// refuse makes an error that tells how far the input has come.
func (in *input) refuse(kind guestv1.Error_Kind, format string, args ...any) error {
	committed, _, _ := in.state()
	offset := uint64(committed)
	e := newStartError(kind, format, args...)
	e.committed = &offset
	return e
}

// finish ends the input with its command: a write that waits for room ends at once.
func (in *input) finish() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.over {
		return
	}
	in.over = true
	_ = in.file.SetWriteDeadline(time.Unix(1, 0)) // of one that is closed already
	if in.terminal == nil && !in.closed {
		in.file.Close()
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
