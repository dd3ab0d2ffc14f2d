package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
	"github.com/harvest-run/executord/internal/guestclient"
)

// listenOn makes a listener and returns where programs find it.
func listenOn(t *testing.T, g *guestProcess, name string) string {
	t.Helper()
	port, err := g.Listen(t.Context(), name, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", port)
}

func connectTo(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	return conn.(*net.TCPConn)
}

func acceptFrom(t *testing.T, g *guestProcess, name string) *net.UnixConn {
	t.Helper()
	conn, err := guestclient.Accept(t.Context(), g, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	return conn.(*net.UnixConn)
}

// pattern is data that shows when a byte is missing, doubled or elsewhere.
func pattern(seed byte, n int) []byte {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(i*7+i/251) ^ seed
	}
	return data
}

func TestForward(t *testing.T) {
	g := startDaemon(t, "proc")
	address := listenOn(t, g, "web")
	for _, size := range []int{0, 1, 5000, 5 << 20} {
		inside := connectTo(t, address)
		outside := acceptFrom(t, g, "web")
		out, in := pattern(1, size), pattern(2, size+1)
		var work sync.WaitGroup
		send := func(conn interface {
			io.Writer
			CloseWrite() error
		}, data []byte) {
			work.Go(func() {
				if _, err := conn.Write(data); err != nil {
					t.Error(err)
				}
				if err := conn.CloseWrite(); err != nil {
					t.Error(err)
				}
			})
		}
		send(inside, out)
		send(outside, in)
		work.Go(func() {
			if got, err := io.ReadAll(inside); err != nil || !bytes.Equal(got, in) {
				t.Errorf("inside came %d bytes of %d, %v", len(got), len(in), err)
			}
		})
		if got, err := io.ReadAll(outside); err != nil || !bytes.Equal(got, out) {
			t.Errorf("outside came %d bytes of %d, %v", len(got), len(out), err)
		}
		work.Wait()
	}
}

// One direction goes on after the other has ended, whichever is first.
func TestForwardHalves(t *testing.T) {
	g := startDaemon(t, "proc")
	address := listenOn(t, g, "web")
	type half interface {
		net.Conn
		CloseWrite() error
	}
	for name, swap := range map[string]bool{"inside ends first": false, "outside ends first": true} {
		t.Run(name, func(t *testing.T) {
			var first, second half = connectTo(t, address), acceptFrom(t, g, "web")
			if swap {
				first, second = second, first
			}
			if err := first.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if n, err := second.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
				t.Fatalf("%d, %v", n, err)
			}
			for range 3 {
				if _, err := second.Write([]byte("more")); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, 4)
				if _, err := io.ReadFull(first, got); err != nil || string(got) != "more" {
					t.Fatalf("%q, %v", got, err)
				}
			}
			if err := second.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if n, err := first.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
				t.Fatalf("%d, %v", n, err)
			}
		})
	}
}

// An end that cuts something off is seen as such on the other side.
func TestForwardCutOff(t *testing.T) {
	g := startDaemon(t, "proc")
	address := listenOn(t, g, "web")

	inside := connectTo(t, address)
	outside := acceptFrom(t, g, "web")
	_, _ = inside.Write([]byte("half of it"))
	_ = inside.SetLinger(0)
	inside.Close()
	if _, err := io.ReadAll(outside); err != nil && !strings.Contains(err.Error(), "reset") {
		t.Errorf("outside: %v", err)
	}

	inside = connectTo(t, address)
	outside = acceptFrom(t, g, "web")
	outside.Close() // as it is when executord is killed
	if _, err := io.Copy(inside, neverEnding{}); err == nil {
		t.Error("writing to what is gone does not fail")
	}
}

type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) { return len(p), nil }

func TestListenIsIdempotent(t *testing.T) {
	g := startDaemon(t, "proc")
	one := listenOn(t, g, "web")
	if again := listenOn(t, g, "web"); again != one {
		t.Errorf("%s, then %s", one, again)
	}
	other := listenOn(t, g, "other")
	if other == one {
		t.Errorf("two listeners at %s", one)
	}
	// Each has its own connections.
	a, b := connectTo(t, one), connectTo(t, other)
	_, _ = a.Write([]byte("a"))
	_, _ = b.Write([]byte("b"))
	for name, want := range map[string]string{"other": "b", "web": "a"} {
		got := make([]byte, 1)
		if _, err := io.ReadFull(acceptFrom(t, g, name), got); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestListenRefuses(t *testing.T) {
	g := startDaemon(t, "proc")
	wants := func(what string, err error, want guestv1.Error_Kind) {
		t.Helper()
		if guestclient.KindOf(err) != want {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	for _, name := range []string{"", "A", "a b", strings.Repeat("a", 64), "a/b"} {
		_, err := g.Listen(t.Context(), name, 0)
		wants("name "+name, err, guestv1.Error_KIND_INVALID)
	}
	_, err := guestclient.Accept(t.Context(), g, "none")
	wants("accept from none", err, guestv1.Error_KIND_NOT_FOUND)
	var taken uint16
	for i := range maxListeners {
		port, err := g.Listen(t.Context(), fmt.Sprintf("l%d", i), 0)
		if err != nil {
			t.Fatal(err)
		}
		taken = port
	}
	_, err = g.Listen(t.Context(), "one-more", 0)
	wants("one more", err, guestv1.Error_KIND_EXHAUSTED)

	other := startDaemon(t, "proc")
	_, err = other.Listen(t.Context(), "web", taken)
	wants("a port that is taken", err, guestv1.Error_KIND_INTERNAL)
	if _, err := other.Listen(t.Context(), "web", 0); err != nil {
		t.Errorf("after a refusal: %v", err)
	}
}

// A connection that nobody asks for, because executord is away, is reset; the listener
// goes on, also for what is asked for later.
func TestNobodyAsks(t *testing.T) {
	g := startDaemon(t, "proc")
	address := listenOn(t, g, "web")
	var waiting []*net.TCPConn
	for range maxWaiting + 3 {
		waiting = append(waiting, connectTo(t, address))
	}
	for _, conn := range waiting {
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil || !strings.Contains(err.Error(), "reset") {
			t.Fatalf("%d, %v", n, err)
		}
	}
	late := connectTo(t, address)
	time.Sleep(100 * time.Millisecond) // well within its patience
	_, _ = late.Write([]byte("x"))
	got := make([]byte, 1)
	if _, err := io.ReadFull(acceptFrom(t, g, "web"), got); err != nil || got[0] != 'x' {
		t.Errorf("%q, %v", got, err)
	}
	g.mustAnswer(t)
}

func (g *guestProcess) mustAnswer(t *testing.T) {
	t.Helper()
	if _, err := g.Info(t.Context()); err != nil {
		t.Error(err)
	}
}

// One who asks for a connection and goes takes none.
func TestAcceptGivenUp(t *testing.T) {
	g := startDaemon(t, "proc")
	address := listenOn(t, g, "web")
	errLeft := errors.New("left")
	ctx, cancel := context.WithCancelCause(t.Context())
	var work sync.WaitGroup
	for range 100 {
		work.Go(func() {
			if conn, err := guestclient.Accept(ctx, g, "web"); !errors.Is(err, errLeft) {
				t.Errorf("%v, %v", conn, err)
			}
		})
	}
	time.Sleep(200 * time.Millisecond)
	cancel(errLeft)
	work.Wait()
	time.Sleep(200 * time.Millisecond) // for the guest to see it
	for range 20 {
		inside := connectTo(t, address)
		_, _ = inside.Write([]byte("x"))
		got := make([]byte, 1)
		if _, err := io.ReadFull(acceptFrom(t, g, "web"), got); err != nil || got[0] != 'x' {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

// What does not keep to the protocol ends its own pipe and nothing else.
func TestAcceptMisused(t *testing.T) {
	g := startDaemon(t, "proc")
	address := listenOn(t, g, "web")
	accept := &guestv1.Request{Id: 2, Call: &guestv1.Request_Accept{Accept: &guestv1.AcceptRequest{Listener: "web"}}}
	dial := func() net.Conn {
		conn, err := g.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}

	pipe := dial()
	_ = wire.Write(pipe, &guestv1.Request{Id: 1, Call: &guestv1.Request_Info{Info: &guestv1.InfoRequest{}}})
	_ = wire.Write(pipe, accept)
	kinds := make(map[guestv1.Error_Kind]int)
	for r := (&wire.Reader{R: pipe}); ; {
		resp := new(guestv1.Response)
		if _, err := r.Read(resp); err != nil {
			break
		}
		kinds[resp.GetError().GetKind()]++
	}
	if kinds[guestv1.Error_KIND_INVALID] != 1 {
		t.Errorf("a second request is answered with %v", kinds)
	}

	pipe = dial()
	_ = wire.Write(pipe, accept)
	_, _ = pipe.Write([]byte("too early"))
	if got, err := io.ReadAll(pipe); len(got) != 0 {
		t.Errorf("%q, %v", got, err)
	}

	inside := connectTo(t, address)
	_, _ = inside.Write([]byte("x"))
	if _, err := io.ReadFull(acceptFrom(t, g, "web"), make([]byte, 1)); err != nil {
		t.Error(err)
	}
	g.mustAnswer(t)
}

// Many connections at once, each to its own, and all are gone at the end: the daemon
// looks for goroutines that are left.
func TestForwardMany(t *testing.T) {
	g := startDaemon(t, "proc")
	address := listenOn(t, g, "web")
	errDone := errors.New("done")
	ctx, cancel := context.WithCancelCause(t.Context())
	var work, servers sync.WaitGroup
	for range 8 {
		servers.Go(func() {
			for {
				conn, err := guestclient.Accept(ctx, g, "web")
				if errors.Is(err, errDone) {
					return
				}
				if err != nil {
					t.Error(err)
					continue
				}
				_, _ = io.Copy(conn, conn)
				conn.Close()
			}
		})
	}
	for i := range 200 {
		work.Go(func() {
			conn := connectTo(t, address)
			want := pattern(byte(i), 1000+i)
			_, _ = conn.Write(want)
			_ = conn.CloseWrite()
			if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d: %d bytes of %d, %v", i, len(got), len(want), err)
			}
		})
	}
	work.Wait()
	cancel(errDone)
	servers.Wait()
}
