package modal

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"

	sdk "github.com/modal-labs/modal-client/go"
)

const (
	// maxBatch is how much is gathered for one write to a program's standard input: each is
	// a call that is waited for.
	maxBatch = 2 << 20
	// linger is how long the first bytes wait for those that are written right after them,
	// in the same moment. It is little beside any call.
	linger = 150 * time.Microsecond
)

// execPipe is the standard input and output of a program in a sandbox as a pipe. The SDK
// cannot end a write; so that one never holds up anybody, what is written is gathered and
// sent by a goroutine of its own, everything that came meanwhile at once.
type execPipe struct {
	stdin  io.WriteCloser
	stdout io.ReadCloser
	// over says that the sandbox has ended, and calls to it are not worth it.
	over func() bool

	mu       sync.Mutex
	news     sync.Cond // something was gathered or sent, or the end
	gathered []byte
	closed   bool
	err      error
}

func newExecPipe(p *sdk.ContainerProcess, over func() bool) *execPipe {
	e := &execPipe{stdin: p.Stdin, stdout: p.Stdout, over: over}
	e.news.L = &e.mu
	return e
}

func (e *execPipe) Read(p []byte) (int, error) { return e.stdout.Read(p) }

func (e *execPipe) Write(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.gathered) >= maxBatch && !e.closed && e.err == nil {
		e.news.Wait()
	}
	if err := e.failure(); err != nil {
		return 0, err
	}
	e.gathered = append(e.gathered, p...)
	e.news.Broadcast()
	return len(p), nil
}

func (e *execPipe) failure() error {
	if e.err != nil {
		return e.err
	}
	if e.closed {
		return net.ErrClosed
	}
	return nil
}

// Close ends reads and writes; the program's input ends when the sender has got to it.
func (e *execPipe) Close() error {
	e.mu.Lock()
	e.closed = true
	e.news.Broadcast()
	e.mu.Unlock()
	return e.stdout.Close()
}

// send sends what is written until the pipe is closed. It is a goroutine of its own.
func (e *execPipe) send() {
	for {
		// A batch is not used again: what reads it may be a call that is still being sent
		// when its answer, or its end, has come.
		batch, ok := e.next()
		if !ok {
			break
		}
		if _, err := e.stdin.Write(batch); err != nil {
			e.mu.Lock()
			e.err = err
			e.news.Broadcast()
			e.mu.Unlock()
			_ = e.stdout.Close() // always nil
			break
		}
	}
	if !e.over() {
		_ = e.stdin.Close() // the program ends by itself when nobody talks to it any more
	}
}

// next waits for something to send; false at the end.
func (e *execPipe) next() ([]byte, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.gathered) == 0 && !e.closed {
		e.news.Wait()
	}
	if e.closed {
		return nil, false
	}
	if len(e.gathered) < maxBatch {
		e.mu.Unlock()
		time.Sleep(linger)
		e.mu.Lock()
	}
	batch := e.gathered
	e.gathered = nil
	e.news.Broadcast()
	return batch, !e.closed
}

// errNotGreeted means that the program that was started is not the guest's end of a pipe.
var errNotGreeted = errors.New("what was started in the sandbox is not an executor-guest")
