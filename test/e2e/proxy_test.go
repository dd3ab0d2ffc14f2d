package e2e

import (
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// proxy stands between a client and executord and does what bad networks do.
type proxy struct {
	listener net.Listener
	server   string // path of executord's socket
	work     sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]bool
	// hole swallows everything and tells nobody; a connection that fell into it stays
	// dead, as what was lost would never be sent again. delay holds every piece back for up
	// to so long; piece cuts what comes into parts of at most so many bytes.
	hole   bool
	delay  time.Duration
	piece  int
	closed bool
}

func startProxy(t *testing.T, d *daemon) *proxy {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(d.dir, "p"))
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: l, server: filepath.Join(d.dir, "s"), conns: make(map[net.Conn]bool)}
	p.work.Go(p.accept)
	t.Cleanup(func() {
		p.mu.Lock()
		p.closed = true
		p.mu.Unlock()
		l.Close()
		p.cut()
		p.work.Wait()
	})
	return p
}

func (p *proxy) address() string { return "unix:" + p.listener.Addr().String() }

func (p *proxy) accept() {
	for {
		near, err := p.listener.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("unix", p.server)
		if err != nil {
			near.Close()
			continue
		}
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			near.Close()
			far.Close()
			return
		}
		p.conns[near], p.conns[far] = true, true
		p.mu.Unlock()
		p.work.Go(func() { p.forward(near, far) })
		p.work.Go(func() { p.forward(far, near) })
	}
}

func (p *proxy) forward(from, to net.Conn) {
	defer p.drop(from, to)
	buf := make([]byte, 64<<10)
	dead := false
	for {
		p.mu.Lock()
		size := len(buf)
		if p.piece > 0 {
			size = 1 + rand.IntN(p.piece)
		}
		p.mu.Unlock()
		n, err := from.Read(buf[:size])
		p.mu.Lock()
		dead = dead || p.hole
		delay := p.delay
		p.mu.Unlock()
		if delay > 0 {
			time.Sleep(time.Duration(rand.Int64N(int64(delay))))
		}
		if n > 0 && !dead {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func (p *proxy) drop(conns ...net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range conns {
		c.Close()
		delete(p.conns, c)
	}
}

// cut breaks every connection.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}

// set changes what the network is like.
func (p *proxy) set(f func(p *proxy)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(p)
}
