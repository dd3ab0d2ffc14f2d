package egress

import (
	"bufio"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/harvest-run/executord/internal/egress/outlet"
)

// copyBytes is the most that is read at a time: two TLS records.
const copyBytes = 32 << 10

// flows are the connections to targets, also those that are being made.
type flows struct {
	mu    sync.Mutex
	ended bool
	stops map[*upstream]func()
	work  sync.WaitGroup
}

// begin notes a connection that is about to be made; false if none may be any more.
func (f *flows) begin(u *upstream, stop func()) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return false
	}
	if f.stops == nil {
		f.stops = make(map[*upstream]func())
	}
	f.stops[u] = stop
	f.work.Add(1)
	return true
}

// connected completes a connection; false, and it is closed, if it came too late.
func (f *flows) connected(u *upstream, conn net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		conn.Close()
		return false
	}
	u.Conn = conn
	f.stops[u] = func() { u.Conn.Close() } // whoever uses it notices and ends it
	return true
}

// end forgets a connection.
func (f *flows) end(u *upstream) {
	f.mu.Lock()
	delete(f.stops, u)
	f.mu.Unlock()
	f.work.Done()
}

// close ends all and waits until they have ended.
func (f *flows) close() {
	f.mu.Lock()
	f.ended = true
	var all []func()
	for _, stop := range f.stops {
		all = append(all, stop)
	}
	f.mu.Unlock()
	for _, stop := range all {
		stop()
	}
	f.work.Wait()
}

// upstream is a connection to a target. It counts what passes and ends when nothing
// does for too long.
type upstream struct {
	net.Conn
	sent, received atomic.Int64
	extended       atomic.Int64 // when its deadline was last set, in nanoseconds
	once           sync.Once
	closed         func() // called by the first Close
	// client is the other end of a tunnel, which is as idle as this one.
	client net.Conn
}

// extend moves the deadlines, though not for every read. It fails only for a
// connection that is closed.
func (u *upstream) extend() {
	now := time.Now()
	if last := u.extended.Load(); now.UnixNano()-last > int64(time.Second) {
		u.extended.Store(now.UnixNano())
		_ = u.Conn.SetDeadline(now.Add(idleTime))
		if u.client != nil {
			_ = u.client.SetDeadline(now.Add(idleTime))
		}
	}
}

func (u *upstream) Read(p []byte) (int, error) {
	n, err := u.Conn.Read(p)
	u.received.Add(int64(n))
	if n > 0 {
		u.extend()
	}
	return n, err
}

func (u *upstream) Write(p []byte) (int, error) {
	n, err := u.Conn.Write(p)
	u.sent.Add(int64(n))
	if n > 0 {
		u.extend()
	}
	return n, err
}

// CloseWrite tells the target that nothing more comes.
func (u *upstream) CloseWrite() error { return outlet.CloseWrite(u.Conn) }

// Close ends it.
func (u *upstream) Close() error {
	err := u.Conn.Close()
	u.once.Do(u.closed)
	return err
}

// tunnel moves bytes both ways until both have ended, one has failed or nothing has
// passed for too long. The ends are the caller's to close.
func tunnel(client net.Conn, buffered *bufio.Reader, up *upstream) {
	up.client = client
	up.extended.Store(0)
	up.extend()
	var both sync.WaitGroup
	half := func(to, from net.Conn, r io.Reader) {
		if err := copyHalf(to, r); err != nil || outlet.CloseWrite(to) != nil {
			// Nothing more can pass this way: the other one must not wait for it.
			to.Close()
			from.Close()
		}
	}
	// What the client sent together with its request lies in the buffer.
	var early io.Reader = client
	if n := buffered.Buffered(); n > 0 {
		early = io.MultiReader(io.LimitReader(buffered, int64(n)), client)
	}
	both.Go(func() { half(up, client, early) })
	both.Go(func() { half(client, up, up) })
	both.Wait()
}

// copyHalf moves bytes of one direction to their end.
func copyHalf(to io.Writer, from io.Reader) error {
	buffer := make([]byte, copyBytes)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
