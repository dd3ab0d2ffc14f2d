package modaltest

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// link is the fake's listener: its connections can be made as slow as those to a far
// place, and reset.
type link struct {
	net.Listener

	mu    sync.Mutex
	delay time.Duration // on each way
	conns map[string]*farConn
}

func newLink(l net.Listener, roundTrip time.Duration) *link {
	return &link{Listener: l, delay: roundTrip / 2, conns: make(map[string]*farConn)}
}

// Accept returns a connection that takes its time.
func (l *link) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	fc := newFarConn(c, l)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[c.RemoteAddr().String()] = fc
	return fc, nil
}

func (l *link) way() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.delay
}

func (l *link) setRoundTrip(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.delay = d / 2
}

// reset ends the connection of a client without a word.
func (l *link) reset(peer string) {
	l.mu.Lock()
	c := l.conns[peer]
	l.mu.Unlock()
	if c != nil {
		c.reset()
	}
}

func (l *link) resetAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.conns {
		c.reset()
	}
}

func (l *link) forget(c *farConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if name := c.RemoteAddr().String(); l.conns[name] == c {
		delete(l.conns, name)
	}
}

// SetRoundTrip makes everything that goes to and fro between a client and the fake take
// so long, half on each way, beginning with what is sent from now on. How much goes at a
// time is not limited by it.
func (f *Fake) SetRoundTrip(d time.Duration) { f.link.setRoundTrip(d) }

// farConn is a connection over which everything takes its time, in order.
type farConn struct {
	net.Conn
	link    *link
	in, out *way
	owner   sync.WaitGroup
	once    sync.Once
}

func newFarConn(c net.Conn, l *link) *farConn {
	f := &farConn{Conn: c, link: l, in: newWay(), out: newWay()}
	f.owner.Go(func() {
		buf := make([]byte, 256<<10)
		for {
			n, err := c.Read(buf)
			if n > 0 {
				f.in.put(buf[:n], l.way())
			}
			if err != nil {
				f.in.end(err)
				return
			}
		}
	})
	f.owner.Go(func() {
		buf := make([]byte, 256<<10)
		for {
			n, err := f.out.get(buf)
			if err == nil {
				_, err = c.Write(buf[:n])
			}
			if err != nil {
				f.out.end(err)
				return
			}
		}
	})
	return f
}

func (c *farConn) Read(p []byte) (int, error) { return c.in.get(p) }

func (c *farConn) Write(p []byte) (int, error) { return c.out.put(p, c.link.way()) }

// Close loses what is still on its way.
func (c *farConn) Close() error {
	var err error
	c.once.Do(func() {
		err = c.Conn.Close()
		c.in.end(net.ErrClosed)
		c.out.end(net.ErrClosed)
		c.link.forget(c)
	})
	c.owner.Wait()
	return err
}

func (c *farConn) reset() {
	if t, ok := c.Conn.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // closed already
	}
	_ = c.Conn.Close() // who reads it hears of it
}

// way is one direction: bytes, each with the time when they arrive.
type way struct {
	mu     sync.Mutex
	news   sync.Cond
	queue  []parcel
	queued int
	err    error
}

type parcel struct {
	data []byte
	due  time.Time
}

// room is how many bytes may be on their way: more than what any round trip here needs.
const room = 64 << 20

func newWay() *way {
	w := &way{}
	w.news.L = &w.mu
	return w
}

func (w *way) put(p []byte, delay time.Duration) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.queued > room && w.err == nil {
		w.news.Wait()
	}
	if w.err != nil {
		return 0, w.err
	}
	w.queue = append(w.queue, parcel{data: append([]byte(nil), p...), due: time.Now().Add(delay)})
	w.queued += len(p)
	w.news.Broadcast()
	return len(p), nil
}

func (w *way) get(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.queue) == 0 && w.err == nil {
		w.news.Wait()
	}
	if len(w.queue) == 0 {
		return 0, w.err
	}
	for wait := time.Until(w.queue[0].due); wait > 0; wait = time.Until(w.queue[0].due) {
		w.mu.Unlock()
		time.Sleep(wait)
		w.mu.Lock()
		if errors.Is(w.err, net.ErrClosed) {
			return 0, w.err
		}
	}
	n := 0
	for n < len(p) && len(w.queue) > 0 && time.Until(w.queue[0].due) <= 0 {
		head := &w.queue[0]
		m := copy(p[n:], head.data)
		n += m
		if head.data = head.data[m:]; len(head.data) == 0 {
			w.queue = w.queue[1:]
		}
	}
	w.queued -= n
	w.news.Broadcast()
	return n, nil
}

// end gives what is still there and then an error.
func (w *way) end(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil || errors.Is(err, net.ErrClosed) && !errors.Is(w.err, io.EOF) {
		w.err = err
	}
	w.news.Broadcast()
}
