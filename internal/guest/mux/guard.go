package mux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// headerSize is that of a yamux frame: version, type, flags, stream and length.
	headerSize = 12
	// Types of frames, and the flag that opens a stream or asks for an answer.
	typeData    = 0
	typePing    = 2
	typeLast    = 3 // the end of the session
	flagSYN     = 1
	pingsAtOnce = 16
)

// guard is a pipe on which only frames pass that an honest guest's end sends. yamux
// starts something for each ping that comes and each stream that is opened; the end in
// the sandbox, which code that nobody trusts can take over, never opens a stream and
// pings once in a KeepAlive.
type guard struct {
	pipe io.ReadWriteCloser

	// Of the reader, which is one goroutine.
	header [headerSize]byte
	have   int // bytes of a header that are there
	body   int // bytes of a frame's data that are to come
	// Of the writer, which is another.
	joined joiner

	mu     sync.Mutex
	moved  int64
	last   time.Time
	pings  int       // that may come now
	refill time.Time // when pings was last topped up
	err    error
}

func newGuard(pipe io.ReadWriteCloser) *guard {
	now := time.Now()
	return &guard{pipe: pipe, joined: joiner{w: pipe}, last: now, pings: pingsAtOnce, refill: now}
}

func (g *guard) Read(p []byte) (int, error) {
	n, err := g.pipe.Read(p)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.moved += int64(n)
	if n > 0 {
		g.last = time.Now()
		if bad := g.check(p[:n]); bad != nil {
			n, err = 0, bad
		}
	}
	if err != nil && g.err == nil {
		g.err = err
	}
	return n, err
}

// check looks at the headers in what came.
func (g *guard) check(p []byte) error {
	for len(p) > 0 {
		if g.body > 0 {
			n := min(g.body, len(p))
			g.body -= n
			p = p[n:]
			continue
		}
		n := copy(g.header[g.have:], p)
		g.have += n
		p = p[n:]
		if g.have < headerSize {
			return nil
		}
		g.have = 0
		if err := g.frame(); err != nil {
			return fmt.Errorf("the sandbox's end of the pipe: %w", err)
		}
	}
	return nil
}

func (g *guard) frame() error {
	kind, flags := g.header[1], binary.BigEndian.Uint16(g.header[2:])
	length := binary.BigEndian.Uint32(g.header[8:])
	switch {
	case kind > typeLast || g.header[0] != 0:
		return errors.New("sent a frame of no known kind")
	case kind == typeData && length > window:
		return fmt.Errorf("sent %d bytes at once", length)
	case kind == typeData:
		g.body = int(length)
	case kind == typePing && flags&flagSYN != 0:
		now := time.Now()
		if gained := int(now.Sub(g.refill) / (KeepAlive / 2)); gained > 0 {
			g.pings, g.refill = min(g.pings+gained, pingsAtOnce), now
		}
		if g.pings--; g.pings < 0 {
			return errors.New("pinged too often")
		}
		return nil
	}
	if flags&flagSYN != 0 {
		return errors.New("opened a stream")
	}
	return nil
}

func (g *guard) Write(p []byte) (int, error) {
	n, err := g.joined.Write(p)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.moved += int64(n)
	if err != nil && g.err == nil {
		g.err = err
	}
	return n, err
}

// Close ends the pipe.
func (g *guard) Close() error { return g.pipe.Close() }

func (g *guard) bytes() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.moved
}

// quiet is how long nothing has come.
func (g *guard) quiet() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Since(g.last)
}

func (g *guard) failure() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// joiner writes a frame's header together with its data, which yamux writes right after
// it: a write may be a call to a provider far away.
type joiner struct {
	w    io.Writer
	held []byte
}

func (j *joiner) Write(p []byte) (int, error) {
	if len(p) == headerSize && len(j.held) == 0 && p[1] == typeData && binary.BigEndian.Uint32(p[8:]) > 0 {
		j.held = append(j.held, p...)
		return len(p), nil
	}
	if len(j.held) == 0 {
		return j.w.Write(p)
	}
	j.held = append(j.held, p...)
	_, err := j.w.Write(j.held)
	j.held = j.held[:0]
	if err != nil {
		return 0, err
	}
	return len(p), nil
}
