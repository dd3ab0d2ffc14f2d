package mux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
)

// silence is how long nothing may come from the guest's end, which asks for a sign of
// life all the while, before it is given up.
const silence = 5 * KeepAlive / 2

// ErrSilent ends a session whose guest's end says nothing any more.
var ErrSilent = fmt.Errorf("nothing came from the sandbox for %v", silence)

// Session is executord's end.
type Session struct {
	mux     *yamux.Session
	control *yamux.Stream
	guarded *guard
	work    sync.WaitGroup
	opening sync.Mutex

	mu    sync.Mutex
	conns map[uint32]*Conn
	cause error
}

// Open makes executord's end of a session over a pipe on which the Greeting has been
// read. The session owns the pipe; Close of the pipe must end a Read and a Write.
func Open(pipe io.ReadWriteCloser) (*Session, error) { return open(pipe, silence) }

func open(pipe io.ReadWriteCloser, silence time.Duration) (*Session, error) {
	s := &Session{guarded: newGuard(pipe), conns: make(map[uint32]*Conn)}
	c := config()
	c.AcceptBacklog = 64 // as many streams may wait to be known to the guest's end
	var err error
	if s.mux, err = yamux.Client(s.guarded, c); err != nil {
		return nil, err
	}
	if s.control, err = s.mux.OpenStream(); err != nil {
		return nil, errors.Join(err, s.mux.Close())
	}
	s.work.Go(func() { readGone(s.control, s.gone) })
	s.work.Go(func() { s.listen(silence) })
	return s, nil
}

// listen gives the session up when nothing comes any more.
func (s *Session) listen(silence time.Duration) {
	for tick := time.NewTimer(silence); ; {
		select {
		case <-tick.C:
			left := silence - s.guarded.quiet()
			if left <= 0 {
				s.end(ErrSilent)
				return
			}
			tick.Reset(left)
		case <-s.mux.CloseChan():
			tick.Stop()
			return
		}
	}
}

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Err says why the session ended, as far as this end knows.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cause != nil {
		return s.cause
	}
	return s.guarded.failure()
}

// Bytes is how much was read and written.
func (s *Session) Bytes() int64 { return s.guarded.bytes() }

func (s *Session) end(cause error) {
	s.mu.Lock()
	if s.cause == nil {
		s.cause = cause
	}
	s.mu.Unlock()
	_ = s.mux.Close() // always nil
}

// Close ends the session and every connection, and waits.
func (s *Session) Close() {
	s.end(net.ErrClosed)
	s.work.Wait()
}

// Dial opens a connection to the guest. It does not wait for the guest's end: one that
// cannot connect ends the connection.
func (s *Session) Dial(ctx context.Context) (*Conn, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	// One by one, so that they come in the order of their numbers.
	s.opening.Lock()
	stream, err := s.mux.OpenStream()
	s.opening.Unlock()
	if err != nil {
		return nil, fmt.Errorf("open a pipe to the guest: %w", err)
	}
	c := &Conn{stream: stream, session: s}
	s.mu.Lock()
	s.conns[stream.StreamID()] = c
	s.mu.Unlock()
	return c, nil
}

// Conns are the open connections.
func (s *Session) Conns() []*Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	open := make([]*Conn, 0, len(s.conns))
	for _, c := range s.conns {
		open = append(open, c)
	}
	return open
}

// gone stops what is sent on a connection that nobody reads.
func (s *Session) gone(id uint32) {
	s.mu.Lock()
	c := s.conns[id]
	s.mu.Unlock()
	if c != nil {
		c.breakWrites()
	}
}

// leave tells the guest's end that a connection is closed, and, if there may be more to
// read, that nobody does. The caller does not wait for a pipe that may be stuck.
func (s *Session) leave(c *Conn, tell bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c.stream.StreamID())
	if s.cause != nil {
		return
	}
	s.work.Go(func() {
		// An error is the end of the session, which is told elsewhere.
		_ = c.stream.Close()
		if tell {
			_ = sendGone(s.control, c.stream.StreamID())
		}
	})
}

// Conn is a connection to the guest's socket.
type Conn struct {
	stream  *yamux.Stream
	session *Session

	mu      sync.Mutex
	closed  bool
	over    bool // everything was read
	broken  bool // nobody reads what is written
	movable bool
}

// MayMove says that the one who holds the connection dials again when it is closed, and
// loses nothing by it.
func (c *Conn) MayMove() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.movable = true
}

// Movable says whether MayMove was called.
func (c *Conn) Movable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.movable
}

// Read reads what the guest sent.
func (c *Conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	closed := c.closed
	c.mu.Unlock()
	if closed {
		return 0, net.ErrClosed
	}
	n, err := c.stream.Read(p)
	if err == nil {
		return n, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return n, net.ErrClosed
	case errors.Is(err, yamux.ErrTimeout):
		return n, os.ErrDeadlineExceeded
	}
	if errors.Is(err, io.EOF) {
		select {
		case <-c.session.Done():
			// The session's end looks like the connection's own.
			return n, fmt.Errorf("%w: the pipe to the sandbox ended", io.ErrUnexpectedEOF)
		default:
		}
		c.over = true
	}
	return n, err
}

// Write sends to the guest.
func (c *Conn) Write(p []byte) (int, error) {
	if err := c.writable(); err != nil {
		return 0, err
	}
	n, err := c.stream.Write(p)
	if err == nil {
		return n, nil
	}
	if now := c.writable(); now != nil {
		return n, now
	}
	if errors.Is(err, yamux.ErrTimeout) {
		return n, os.ErrDeadlineExceeded
	}
	return n, err
}

func (c *Conn) writable() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return net.ErrClosed
	case c.broken:
		return syscall.EPIPE
	}
	return nil
}

// breakWrites makes writes fail, now and later.
func (c *Conn) breakWrites() {
	c.mu.Lock()
	c.broken = true
	c.mu.Unlock()
	_ = c.stream.SetWriteDeadline(time.Unix(1, 0)) // always nil
}

// CloseWrite ends what is sent; what the guest sends can still be read.
func (c *Conn) CloseWrite() error { return c.stream.Close() }

// Close ends both directions. What was written is delivered.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	tell := !c.over
	c.mu.Unlock()
	_ = c.stream.SetDeadline(time.Unix(1, 0)) // ends a Read and a Write; always nil
	c.session.leave(c, tell)
	return nil
}

// LocalAddr is executord's end, by no name.
func (c *Conn) LocalAddr() net.Addr { return address{} }

// RemoteAddr is the guest's socket, by no name.
func (c *Conn) RemoteAddr() net.Addr { return address{} }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error { return c.stream.SetDeadline(t) }

// SetReadDeadline bounds reads.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.stream.SetReadDeadline(t) }

// SetWriteDeadline bounds writes.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.stream.SetWriteDeadline(t) }

type address struct{}

func (address) Network() string { return "guest" }
func (address) String() string  { return "guest" }
