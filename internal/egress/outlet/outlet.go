// Package outlet takes the connections that programs in a sandbox make to a listener
// on its loopback, as http.Server wants them: bounded for each sandbox and for all
// together, and paced, so that what a sandbox makes executord do is bounded. What is
// spoken over them is its caller's.
package outlet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guestclient"
)

const (
	// IdleTime ends a connection whose client takes nothing for so long.
	IdleTime = 10 * time.Minute
	// MaxAll is how many connections of all sandboxes there may be at a time by default,
	// which bounds the memory for what passes: 64 KiB each.
	MaxAll = 2048
	// acceptors wait for a sandbox's connections at a time.
	acceptors = 4
	// maxConnections bounds the connections of one sandbox at a time. Further ones wait
	// in the guest, which resets what waits too long.
	maxConnections = 256
	// A sandbox can open burst connections at once and then one every pace: what it
	// makes executord do and log is bounded.
	burst = 512
	pace  = 10 * time.Millisecond
	// firstRetry lies between two attempts to reach a guest; it doubles up to lastRetry.
	firstRetry = 50 * time.Millisecond
	lastRetry  = 5 * time.Second
)

// Sandbox is what connections come out of. An engine.Sandbox is meant.
type Sandbox interface {
	ID() string
	Dial(ctx context.Context) (net.Conn, error)
	Done() <-chan struct{}
}

// Source waits for the next connection to a sandbox's listener.
type Source func(ctx context.Context) (net.Conn, error)

// Guest takes the connections to the listener of this name and port, which it makes
// where it is missing: in a sandbox whose maker was cut off.
func Guest(sb Sandbox, name string, port uint16) Source {
	return func(ctx context.Context) (net.Conn, error) {
		conn, err := guestclient.Accept(ctx, sb, name)
		if guestclient.KindOf(err) == guestv1.Error_KIND_NOT_FOUND {
			if err = Listen(ctx, sb, name, port); err == nil {
				conn, err = guestclient.Accept(ctx, sb, name)
			}
		}
		return conn, err
	}
}

// Listen makes the listener of this name in a sandbox, or finds that it is there. When
// it returns nil connections are taken.
func Listen(ctx context.Context, sb Sandbox, name string, port uint16) error {
	client := guestclient.New(sb)
	defer client.Close()
	got, err := client.Listen(ctx, name, port)
	if err != nil {
		return fmt.Errorf("listen for the %s proxy in sandbox %s: %w", name, sb.ID(), err)
	}
	if got != port {
		return fmt.Errorf("listen for the %s proxy in sandbox %s: the guest took port %d", name, sb.ID(), got)
	}
	return nil
}

// Listener is a sandbox's listener as http.Server wants it. Some goroutines ask the
// guest for the next connection, so that one is always expected.
type Listener struct {
	cancel context.CancelCauseFunc
	done   <-chan struct{} // closed by cancel
	source Source
	port   uint16
	ready  chan net.Conn
	slots  chan struct{} // of this sandbox
	all    chan struct{} // of all of them
	work   sync.WaitGroup

	mu   sync.Mutex
	open map[*clientConn]struct{}
	next time.Time // when the pace allows the next connection
}

// Open starts a Listener, which Close ends. all has room for the connections of all
// sandboxes.
func Open(s Source, port uint16, all chan struct{}) *Listener {
	ctx, cancel := context.WithCancelCause(context.Background())
	l := &Listener{
		cancel: cancel, done: ctx.Done(), source: s, port: port, ready: make(chan net.Conn),
		slots: make(chan struct{}, maxConnections), all: all, open: make(map[*clientConn]struct{}),
	}
	for range acceptors {
		l.work.Go(func() { l.accept(ctx) })
	}
	return l
}

// accept hands over connections until the listener is closed.
func (l *Listener) accept(ctx context.Context) {
	retry := firstRetry
	for ctx.Err() == nil {
		conn, err := l.source(ctx)
		if err != nil {
			// The guest does not answer now, or the sandbox has ended and nobody has
			// closed this yet.
			pause(ctx, retry)
			retry = min(2*retry, lastRetry)
			continue
		}
		retry = firstRetry
		c, ok := l.admit(ctx, conn)
		if !ok {
			conn.Close()
			return
		}
		select {
		case l.ready <- c:
		case <-l.done:
			_ = c.Close()
		}
	}
}

// admit waits until there is room for one more connection; false if the listener is
// closed before.
func (l *Listener) admit(ctx context.Context, conn net.Conn) (*clientConn, bool) {
	if !pause(ctx, l.turn(time.Now())) {
		return nil, false
	}
	for _, room := range []chan struct{}{l.slots, l.all} {
		select {
		case room <- struct{}{}:
		case <-l.done:
			if room == l.all {
				<-l.slots
			}
			return nil, false
		}
	}
	c := &clientConn{Conn: conn, home: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[c] = struct{}{}
	l.work.Add(1)
	return c, true
}

// turn says how long the next connection has to wait.
func (l *Listener) turn(now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if earliest := now.Add(-burst * pace); l.next.Before(earliest) {
		l.next = earliest
	}
	l.next = l.next.Add(pace)
	return l.next.Sub(now)
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close ends the listener and all its connections.
func (l *Listener) Close() error {
	l.cancel(net.ErrClosed)
	l.mu.Lock()
	var all []*clientConn
	for c := range l.open {
		all = append(all, c)
	}
	l.mu.Unlock()
	for _, c := range all {
		_ = c.Close()
	}
	return nil
}

// Wait returns when nothing of the Listener is left. It comes after Close.
func (l *Listener) Wait() { l.work.Wait() }

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr {
	return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(l.port)}
}

// clientConn is a connection out of a sandbox.
type clientConn struct {
	net.Conn
	home     *Listener
	once     sync.Once
	extended atomic.Int64 // when the deadline of writing was last set
}

// Write gives up on a client that reads nothing for too long.
func (c *clientConn) Write(p []byte) (int, error) {
	now := time.Now()
	if last := c.extended.Load(); now.UnixNano()-last > int64(time.Second) {
		c.extended.Store(now.UnixNano())
		_ = c.SetWriteDeadline(now.Add(IdleTime)) // fails only for a closed connection
	}
	return c.Conn.Write(p)
}

// Close gives its place to another one.
func (c *clientConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.home.mu.Lock()
		delete(c.home.open, c)
		c.home.mu.Unlock()
		<-c.home.slots
		<-c.home.all
		c.home.work.Done()
	})
	return err
}

// CloseWrite tells the client that nothing more comes.
func (c *clientConn) CloseWrite() error { return CloseWrite(c.Conn) }

// RemoteAddr is the same for all: what connects is somewhere in the sandbox.
func (c *clientConn) RemoteAddr() net.Addr { return c.home.Addr() }

// CloseWrite ends one direction of a connection. One that cannot do that is ended
// whole, by its error.
func CloseWrite(conn net.Conn) error {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// pause waits; false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
