package mux

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a session over a pipe to a guest's end that connects to a server.
func pair(t *testing.T, serve func(*net.UnixConn)) *Session {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "guest.sock"))
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer conn.Close()
				serve(conn.(*net.UnixConn))
			})
		}
	})
	ours, theirs := net.Pipe()
	work.Go(func() {
		err := Serve(theirs, func() (HalfConn, error) {
			conn, err := net.Dial("unix", l.Addr().String())
			if err != nil {
				return nil, err
			}
			return conn.(*net.UnixConn), nil
		})
		if err != nil {
			t.Errorf("the guest's end: %v", err)
		}
	})
	greeting := make([]byte, len(Greeting))
	if _, err := io.ReadFull(ours, greeting); err != nil || string(greeting) != Greeting {
		t.Fatalf("greeting %q, %v", greeting, err)
	}
	s, err := Open(ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close()
		l.Close()
		work.Wait()
	})
	return s
}

func dial(t *testing.T, s *Session) *Conn {
	t.Helper()
	c, err := s.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func echo(conn *net.UnixConn) {
	_, _ = io.Copy(conn, conn)
	_ = conn.CloseWrite()
}

func TestManyAtOnceAreExact(t *testing.T) {
	s := pair(t, echo)
	var work sync.WaitGroup
	for i := range 20 {
		work.Go(func() {
			c := dial(t, s)
			defer c.Close()
			data := make([]byte, 3<<20) // more than a window
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for j := range data {
				data[j] = byte(rng.Uint32())
			}
			var sender sync.WaitGroup
			sender.Go(func() {
				if _, err := c.Write(data); err != nil {
					t.Errorf("write: %v", err)
				}
				if err := c.CloseWrite(); err != nil {
					t.Errorf("close the write side: %v", err)
				}
			})
			got, err := io.ReadAll(c)
			sender.Wait()
			if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
				t.Errorf("%d bytes came back of %d: %v", len(got), len(data), err)
			}
		})
	}
	work.Wait()
	if n := s.Bytes(); n < 2*20*3<<20 {
		t.Errorf("%d bytes are counted", n)
	}
}

func TestAnEndOfOneDirection(t *testing.T) {
	s := pair(t, func(conn *net.UnixConn) {
		all, _ := io.ReadAll(conn) // which ends only if that direction does
		_, _ = conn.Write(append([]byte("got "), all...))
	})
	c := dial(t, s)
	if _, err := c.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "got question" {
		t.Errorf("%q, %v", got, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// What was written before a close arrives, though the other side is still sending.
func TestCloseDelivers(t *testing.T) {
	got := make(chan string, 1)
	s := pair(t, func(conn *net.UnixConn) {
		var sender sync.WaitGroup
		sender.Go(func() {
			for { // until nobody reads
				if _, err := conn.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		})
		all, _ := io.ReadAll(conn)
		sender.Wait()
		got <- string(all)
	})
	c := dial(t, s)
	if _, err := c.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if all := <-got; all != "last words" {
		t.Errorf("%q arrived", all)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after the close: %v", err)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after the close: %v", err)
	}
}

// A close right after the dial, before the guest's end has connected: nothing stays.
func TestCloseAtOnce(t *testing.T) {
	served := make(chan struct{}, 100)
	s := pair(t, func(conn *net.UnixConn) {
		for {
			if _, err := conn.Write(make([]byte, 64<<10)); err != nil {
				break
			}
		}
		served <- struct{}{}
	})
	var work sync.WaitGroup
	for range 100 {
		work.Go(func() {
			c, err := s.Dial(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			c.Close()
		})
	}
	work.Wait()
	for range 100 {
		<-served
	}
}

func TestCloseEndsARead(t *testing.T) {
	s := pair(t, echo)
	c := dial(t, s)
	var work sync.WaitGroup
	work.Go(func() {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read: %v", err)
		}
	})
	c.Close()
	work.Wait()
}

// Who writes to somebody that has gone is told, and does not write for ever.
func TestNobodyReads(t *testing.T) {
	s := pair(t, func(conn *net.UnixConn) {})
	c := dial(t, s)
	defer c.Close()
	for {
		if _, err := c.Write(make([]byte, 64<<10)); err != nil {
			if !errors.Is(err, syscall.EPIPE) {
				t.Errorf("write: %v", err)
			}
			break
		}
	}
	if got, err := io.ReadAll(c); err != nil || len(got) > 0 {
		t.Errorf("%q, %v", got, err)
	}
	again := dial(t, s)
	again.Close()
}

func TestTheEndOfTheSession(t *testing.T) {
	s := pair(t, echo)
	c := dial(t, s)
	s.Close()
	<-s.Done()
	if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("read after the session's end: %v, which looks like an end of the guest's", err)
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("a write after the session's end did not fail")
	}
	if _, err := s.Dial(t.Context()); err == nil {
		t.Error("a session that has ended opened a connection")
	}
	if s.Err() == nil {
		t.Error("the session does not say why it ended")
	}
	c.Close()
}

func TestDeadlines(t *testing.T) {
	s := pair(t, echo)
	c := dial(t, s)
	defer c.Close()
	_ = c.SetReadDeadline(time.Unix(1, 0))
	if _, err := c.Read(make([]byte, 1)); err == nil || !err.(net.Error).Timeout() {
		t.Errorf("read past its deadline: %v", err)
	}
	_ = c.SetReadDeadline(time.Time{})
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("read after the deadline was lifted: %v", err)
	}
}

// These are not in a bubble of synctest: yamux keeps timers of one for the next.
func TestSilenceEndsTheSession(t *testing.T) {
	ours, theirs := net.Pipe()
	var work sync.WaitGroup
	work.Go(func() { _, _ = io.Copy(io.Discard, theirs) }) // takes all, says nothing
	s, err := open(ours, 100*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	<-s.Done()
	if !errors.Is(s.Err(), ErrSilent) {
		t.Errorf("the session ended by %v", s.Err())
	}
	s.Close()
	theirs.Close()
	work.Wait()
}

// Signs of life keep a session that nobody uses.
func TestKeepAlive(t *testing.T) {
	ours, theirs := net.Pipe()
	over := make(chan error, 1)
	var work sync.WaitGroup
	work.Go(func() {
		over <- serve(theirs, func() (HalfConn, error) { return nil, errors.New("none") }, 100*time.Millisecond)
	})
	if _, err := io.ReadFull(ours, make([]byte, len(Greeting))); err != nil {
		t.Fatal(err)
	}
	s, err := open(ours, 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	for s.Bytes() < 10*2*headerSize { // ten pings and answers
		select {
		case err := <-over:
			t.Fatalf("it went while somebody was there: %v", err)
		case <-s.Done():
			t.Fatalf("it was given up: %v", s.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
	s.Close()
	<-over
	work.Wait()
}

// frame is a yamux header.
func frame(version, kind byte, flags uint16, stream, length uint32) []byte {
	b := []byte{version, kind}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return binary.BigEndian.AppendUint32(b, length)
}

func TestGuard(t *testing.T) {
	for name, c := range map[string]struct {
		in   []byte
		says string
	}{
		"window updates":      {frame(0, 1, 2, 1, 1<<20), ""},
		"data":                {append(frame(0, 0, 0, 1, 3), "abc"...), ""},
		"what follows data":   {append(append(frame(0, 0, 0, 1, 3), "abc"...), frame(0, 0, 1, 2, 0)...), "opened a stream"},
		"a ping":              {frame(0, 2, 1, 0, 7), ""},
		"an answer to one":    {bytes.Repeat(frame(0, 2, 2, 0, 7), 100), ""},
		"many pings":          {bytes.Repeat(frame(0, 2, 1, 0, 7), pingsAtOnce+1), "pinged too often"},
		"a new stream":        {frame(0, 1, 1, 2, 0), "opened a stream"},
		"too much at once":    {frame(0, 0, 0, 1, window+1), "bytes at once"},
		"another version":     {frame(1, 0, 0, 1, 0), "no known kind"},
		"an unknown kind":     {frame(0, 9, 0, 1, 0), "no known kind"},
		"text":                {[]byte("sh: cannot execute"), "no known kind"},
		"a header cut in two": {frame(0, 1, 2, 1, 1)[:5], ""},
	} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{1, 5, 4096} {
				g := newGuard(struct {
					io.Reader
					io.WriteCloser
				}{bytes.NewReader(c.in), nil})
				var err error
				for buffer := make([]byte, size); err == nil; {
					_, err = g.Read(buffer)
				}
				if c.says == "" && err != io.EOF || c.says != "" && !strings.Contains(err.Error(), c.says) {
					t.Errorf("in pieces of %d: %v, want %q", size, err, c.says)
				}
				if g.failure() != err {
					t.Errorf("told %v, remembered %v", err, g.failure())
				}
			}
		})
	}
}

func TestPingsComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		g := newGuard(struct {
			io.Reader
			io.WriteCloser
		}{r, nil})
		var work sync.WaitGroup
		work.Go(func() {
			for range 100 {
				time.Sleep(KeepAlive)
				_, _ = w.Write(frame(0, 2, 1, 0, 1))
			}
			w.Close()
		})
		if _, err := io.Copy(io.Discard, g); err != nil {
			t.Errorf("a ping in each %v: %v", KeepAlive, err)
		}
		work.Wait()
	})
}

func FuzzGuard(f *testing.F) {
	f.Add(frame(0, 1, 0, 1, 5), 3)
	f.Add(append(frame(0, 0, 0, 1, 3), "abcdefghi"...), 1)
	f.Fuzz(func(t *testing.T, in []byte, size int) {
		ours, theirs := net.Pipe()
		var work sync.WaitGroup
		work.Go(func() {
			_, _ = theirs.Write(in)
			theirs.Close()
		})
		work.Go(func() { _, _ = io.Copy(io.Discard, theirs) })
		s, err := Open(ours)
		if err == nil {
			c, err := s.Dial(t.Context())
			if err == nil {
				_, _ = io.Copy(io.Discard, c)
				c.Close()
			}
			s.Close()
		}
		theirs.Close()
		work.Wait()
	})
}
