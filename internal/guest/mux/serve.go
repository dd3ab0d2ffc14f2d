package mux

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// HalfConn is a connection whose directions end one by one, such as that to a unix socket.
type HalfConn interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
}

// server is the guest's end.
type server struct {
	connect func() (HalfConn, error)
	control io.ReadWriter

	mu   sync.Mutex
	open map[uint32]*bridged
	// last is the newest stream that was accepted. They come in the order of their numbers.
	last uint32
	// early are streams to come that nobody reads any more.
	early map[uint32]bool
}

// bridged is a stream and the connection that it is connected with.
type bridged struct {
	stream *yamux.Stream
	conn   HalfConn // nil until there is one
	gone   bool     // nobody reads the stream
}

// stop stops what is sent. The lock is held.
func (b *bridged) stop() {
	_ = b.stream.SetWriteDeadline(time.Unix(1, 0)) // always nil
	if b.conn != nil {
		_ = b.conn.CloseRead() // it may have ended by itself
	}
}

// Serve is the guest's end: it greets, and connects every stream with what connect
// returns, until the session ends or nobody is at the other end any more.
func Serve(pipe io.ReadWriteCloser, connect func() (HalfConn, error)) error {
	return serve(pipe, connect, KeepAlive)
}

func serve(pipe io.ReadWriteCloser, connect func() (HalfConn, error), keepAlive time.Duration) error {
	if _, err := io.WriteString(pipe, Greeting); err != nil {
		return fmt.Errorf("greet: %w", err)
	}
	c := config()
	c.EnableKeepAlive, c.KeepAliveInterval = true, keepAlive
	session, err := yamux.Server(joinedPipe{&joiner{w: pipe}, pipe}, c)
	if err != nil {
		return err
	}
	control, err := session.AcceptStream()
	if err != nil {
		return ended(err)
	}
	s := &server{connect: connect, control: control, open: make(map[uint32]*bridged), early: make(map[uint32]bool)}
	var work sync.WaitGroup
	work.Go(func() { readGone(control, s.gone) })
	for {
		stream, err := session.AcceptStream()
		if err != nil {
			s.closeAll()
			work.Wait()
			return ended(err)
		}
		b := s.accepted(stream)
		work.Go(func() { s.bridge(b) })
	}
}

// joinedPipe is a pipe with a joiner before it.
type joinedPipe struct {
	*joiner
	pipe io.ReadWriteCloser
}

func (p joinedPipe) Read(b []byte) (int, error) { return p.pipe.Read(b) }
func (p joinedPipe) Close() error               { return p.pipe.Close() }

// ended says why a session did; nil if the other end closed it.
func ended(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, yamux.ErrSessionShutdown) {
		return nil
	}
	return err
}

// accepted notes a stream.
func (s *server) accepted(stream *yamux.Stream) *bridged {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := stream.StreamID()
	b := &bridged{stream: stream, gone: s.early[id]}
	delete(s.early, id)
	s.last = id
	s.open[id] = b
	return b
}

// connected notes the connection of a stream.
func (s *server) connected(b *bridged, conn HalfConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.conn = conn
	if b.gone {
		b.stop()
	}
}

// gone stops what is sent on a stream that nobody reads. The message may be faster than
// the stream that it is about.
func (s *server) gone(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.open[id]; b != nil {
		b.gone = true
		b.stop()
	} else if id > s.last {
		s.early[id] = true
	}
}

func (s *server) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range s.open {
		if b.conn != nil {
			b.conn.Close()
		}
	}
}

// bridge moves bytes both ways until both directions have ended.
func (s *server) bridge(b *bridged) {
	stream, id := b.stream, b.stream.StreamID()
	defer func() {
		s.mu.Lock()
		delete(s.open, id)
		s.mu.Unlock()
	}()
	conn, err := s.connect()
	if err != nil {
		_ = sendGone(s.control, id)
		_ = stream.Close() // the session may have ended
		discard(stream)
		return
	}
	defer conn.Close()
	s.connected(b, conn)
	var outward sync.WaitGroup
	outward.Go(func() {
		_, err := io.Copy(stream, conn)
		_ = stream.Close() // an end is an end, whatever caused it
		if err != nil {
			// Whoever waits for room to write learns so that nobody reads.
			_ = conn.CloseRead()
			discard(conn)
		}
	})
	if _, err := io.Copy(onlyWriter{conn}, stream); err != nil {
		// Whichever side it was, nothing that comes is for anybody.
		_ = sendGone(s.control, id)
		_ = conn.CloseRead()
		discard(stream)
	} else {
		_ = conn.CloseWrite() // the other side may be gone
	}
	outward.Wait()
}

// onlyWriter hides what io.Copy would use instead of Write, so that an error is known to
// be of one of the two sides.
type onlyWriter struct{ io.Writer }

// discard reads a stream to its end, so that what is on its way does not stay in memory.
func discard(stream io.Reader) { _, _ = io.Copy(io.Discard, stream) }
