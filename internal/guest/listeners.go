package guest

import (
	"bufio"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

const (
	maxListeners = 8
	// maxWaiting bounds the connections of a listener that executord has not asked for;
	// further ones stay with the kernel. Each waits for connectionPatience: long enough for
	// a restart of executord that goes well.
	maxWaiting         = 256
	connectionPatience = 3 * time.Second
	// maxForwarded bounds the pipes of a listener, those that wait for a connection
	// included.
	maxForwarded = 1024
)

// listeners are the places on the sandbox's loopback from which connections go out
// through pipes. Nothing here knows what they are for.
type listeners struct {
	mu     sync.Mutex
	named  map[string]*listener
	closed bool
}

// listener hands connections to those who ask for them.
type listener struct {
	tcp     *net.TCPListener
	port    uint32
	arrived chan *net.TCPConn // unbuffered
	waiting chan struct{}     // has room for those that wait
	pipes   chan struct{}     // has room for those that are asked for or forwarded
	ended   chan struct{}
	work    sync.WaitGroup
}

// listen makes a listener and returns its port.
func (l *listeners) listen(name string, port uint32) (uint32, error) {
	if !validID(name) || port > 65535 {
		return 0, refuse(guestv1.Error_KIND_INVALID, "listener %q on port %d", name, port)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if known, ok := l.named[name]; ok {
		return known.port, nil
	}
	if l.closed || len(l.named) >= maxListeners {
		return 0, refuse(guestv1.Error_KIND_EXHAUSTED, "%d listeners are open already", len(l.named))
	}
	tcp, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(port)})
	if err != nil {
		return 0, resourceError(err)
	}
	made := &listener{
		tcp: tcp, port: uint32(tcp.Addr().(*net.TCPAddr).Port), arrived: make(chan *net.TCPConn),
		waiting: make(chan struct{}, maxWaiting), pipes: make(chan struct{}, maxForwarded), ended: make(chan struct{}),
	}
	if l.named == nil {
		l.named = make(map[string]*listener)
	}
	l.named[name] = made
	made.work.Go(made.accept)
	return made.port, nil
}

// close ends all listeners and waits for what is connected through them.
func (l *listeners) close() {
	l.mu.Lock()
	l.closed = true
	all := l.named
	l.named = nil
	l.mu.Unlock()
	for _, one := range all {
		close(one.ended)
		_ = one.tcp.Close() // fails only if it is closed already
		one.work.Wait()
	}
}

// accept takes connections until the listener is closed.
func (l *listener) accept() {
	for {
		conn, err := l.tcp.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors or memory
			continue
		}
		select {
		case l.waiting <- struct{}{}:
			l.work.Go(func() {
				defer func() { <-l.waiting }()
				l.offer(conn)
			})
		case <-l.ended:
			reset(conn)
			return
		}
	}
}

// offer hands a connection to whoever asks for one. When nobody does, executord is
// away, and a client that is told so at once can do better than wait.
func (l *listener) offer(conn *net.TCPConn) {
	patience := time.NewTimer(connectionPatience)
	defer patience.Stop()
	select {
	case l.arrived <- conn:
	case <-patience.C:
		reset(conn)
	case <-l.ended:
		reset(conn)
	}
}

func reset(conn *net.TCPConn) {
	_ = conn.SetLinger(0) // without it the client would take the end for a whole answer
	_ = conn.Close()
}

// serve makes a pipe the next connection to a listener. Its caller closes the pipe.
func (l *listeners) serve(name string, id uint64, pipe io.ReadWriteCloser, buffered *bufio.Reader, only bool, out *answerer) {
	l.mu.Lock()
	from, ok := l.named[name]
	l.mu.Unlock()
	var err error
	switch {
	case !only:
		err = refuse(guestv1.Error_KIND_INVALID, "accept is not the first request of its pipe")
	case !ok:
		err = refuse(guestv1.Error_KIND_NOT_FOUND, "no listener %q", name)
	default:
		select {
		case from.pipes <- struct{}{}:
			defer func() { <-from.pipes }()
		default:
			err = refuse(guestv1.Error_KIND_EXHAUSTED, "%d pipes of listener %q are open already", maxForwarded, name)
		}
	}
	if err != nil {
		_ = out.refuse(id, err) // a pipe that is broken ends in any case
		return
	}
	answer := func() error {
		return out.write(&guestv1.Response{Id: id, Answer: &guestv1.Response_Accept{Accept: &guestv1.AcceptResponse{}}})
	}
	from.forward(pipe, buffered, answer)
}

// forward waits for a connection, answers, and moves bytes both ways until both
// directions have ended or one has failed.
func (l *listener) forward(pipe io.ReadWriteCloser, buffered *bufio.Reader, answer func() error) {
	var work sync.WaitGroup
	defer work.Wait()
	defer pipe.Close()
	// executord sends nothing before the answer, so what is seen of the pipe until then
	// can only be its end.
	seen := make(chan error, 1)
	work.Go(func() {
		_, err := buffered.Peek(1)
		seen <- err
	})
	var conn *net.TCPConn
	select {
	case conn = <-l.arrived:
	case <-seen: //nolint:errcheck // an end is an end, whatever caused it
		return // given up, or somebody who does not know the protocol
	case <-l.ended:
		return
	}
	select {
	case <-seen: //nolint:errcheck // an end is an end, whatever caused it
		l.offer(conn) // to somebody who is still there
		return
	default:
	}
	if answer() != nil {
		l.offer(conn)
		return
	}
	defer func() { _ = conn.Close() }() // what was sent has been sent
	join(pipe, buffered, conn, seen)
}

// join moves bytes both ways until both directions have ended or one has failed. seen
// gets the first that is to be seen of the pipe, a byte or its end. The caller closes
// both.
func join(pipe io.ReadWriteCloser, buffered *bufio.Reader, conn *net.TCPConn, seen <-chan error) {
	var work sync.WaitGroup
	defer work.Wait()
	outward := make(chan error, 1)
	work.Go(func() {
		err := errors.Join(ignoreEOF(moveOut(pipe, conn)), closeWrite(pipe))
		if err != nil {
			pipe.Close() // so that the other direction does not wait for it
		}
		outward <- err
	})
	err := <-seen
	if err == nil {
		err = moveIn(conn, pipe, buffered)
	}
	if ignoreEOF(err) != nil || conn.CloseWrite() != nil {
		reset(conn) // half of what should have come is no whole
	}
	if <-outward != nil {
		reset(conn)
	}
}

// moveOut copies what the client sends. On sockets the kernel moves it.
func moveOut(pipe io.Writer, conn *net.TCPConn) error {
	_, err := io.Copy(pipe, conn)
	return err
}

// moveIn copies what executord sends, what has been read already first.
func moveIn(conn *net.TCPConn, pipe io.Reader, buffered *bufio.Reader) error {
	if _, err := io.CopyN(conn, buffered, int64(buffered.Buffered())); err != nil {
		return err
	}
	_, err := io.Copy(conn, pipe)
	return err
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// closeWrite ends one direction of a pipe. One of an engine that cannot do that is
// ended whole, by the error.
func closeWrite(pipe io.Closer) error {
	if half, ok := pipe.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}
