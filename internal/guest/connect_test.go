package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
	"github.com/harvest-run/executord/internal/guestclient"
)

// server serves one connection after another until the end of the test, and returns
// its port.
func server(t *testing.T, network, address string, serve func(*net.TCPConn)) uint16 {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		work.Wait()
	})
	work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(time.Minute))
				serve(conn.(*net.TCPConn))
			})
		}
	})
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

func connectThrough(t *testing.T, g *guestProcess, port uint16) *net.UnixConn {
	t.Helper()
	conn, err := guestclient.Connect(t.Context(), g, port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	return conn.(*net.UnixConn)
}

func TestConnect(t *testing.T) {
	g := startDaemon(t, "proc")
	for _, network := range []struct{ network, address string }{{"tcp4", "127.0.0.1:0"}, {"tcp6", "[::1]:0"}} {
		port := server(t, network.network, network.address, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
		for _, size := range []int{0, 1, 5000, 5 << 20} {
			conn := connectThrough(t, g, port)
			want := pattern(3, size)
			var work sync.WaitGroup
			work.Go(func() {
				if _, err := conn.Write(want); err != nil {
					t.Error(err)
				}
				if err := conn.CloseWrite(); err != nil {
					t.Error(err)
				}
			})
			if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s: %d bytes of %d came back, %v", network.address, len(got), size, err)
			}
			work.Wait()
		}
	}
}

// Each direction ends by itself, whichever is first.
func TestConnectHalves(t *testing.T) {
	g := startDaemon(t, "proc")
	served := make(chan error, 2)
	port := server(t, "tcp4", "127.0.0.1:0", func(conn *net.TCPConn) {
		served <- func() error {
			if _, err := conn.Write([]byte("greeting")); err != nil {
				return err
			}
			if err := conn.CloseWrite(); err != nil {
				return err
			}
			got, err := io.ReadAll(conn)
			if err == nil && string(got) != "answer" {
				err = fmt.Errorf("read %q", got)
			}
			return err
		}()
	})
	conn := connectThrough(t, g, port)
	if got, err := io.ReadAll(conn); err != nil || string(got) != "greeting" {
		t.Fatalf("%q, %v", got, err)
	}
	_, _ = conn.Write([]byte("answer"))
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// What is cut off is seen as such on the other side.
func TestConnectCutOff(t *testing.T) {
	g := startDaemon(t, "proc")
	ended := make(chan error, 1)
	port := server(t, "tcp4", "127.0.0.1:0", func(conn *net.TCPConn) {
		_, err := io.Copy(conn, neverEnding{})
		ended <- err
	})
	connectThrough(t, g, port).Close() // as it is when executord is killed
	if err := <-ended; err == nil {
		t.Error("writing to what is gone does not fail")
	}
	g.mustAnswer(t)
}

func TestConnectRefuses(t *testing.T) {
	g := startDaemon(t, "proc")
	free := func() uint16 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return uint16(l.Addr().(*net.TCPAddr).Port)
	}
	for port, want := range map[uint16]guestv1.Error_Kind{free(): guestv1.Error_KIND_NOT_FOUND, 0: guestv1.Error_KIND_INVALID} {
		if _, err := guestclient.Connect(t.Context(), g, port); guestclient.KindOf(err) != want {
			t.Errorf("port %d: %v, want %v", port, err, want)
		}
	}
	connect := func(port uint32) *guestv1.Request {
		return &guestv1.Request{Id: 2, Call: &guestv1.Request_Connect{Connect: &guestv1.ConnectRequest{Port: port}}}
	}
	for name, requests := range map[string][]*guestv1.Request{
		"behind another request": {{Id: 1, Call: &guestv1.Request_Info{Info: &guestv1.InfoRequest{}}}, connect(80)},
		"no port there is":       {connect(1<<16 + 80)},
	} {
		pipe, err := g.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range requests {
			_ = wire.Write(pipe, r)
		}
		invalid := 0
		for r := (&wire.Reader{R: pipe}); ; {
			resp := new(guestv1.Response)
			if _, err := r.Read(resp); err != nil {
				break
			}
			if resp.GetError().GetKind() == guestv1.Error_KIND_INVALID {
				invalid++
			}
		}
		if invalid != 1 {
			t.Errorf("%s: %d refusals", name, invalid)
		}
		pipe.Close()
	}
	g.mustAnswer(t)
}

// A server that takes no connections is not waited for by one who has gone.
func TestConnectGivenUp(t *testing.T) {
	g := startDaemon(t, "proc")
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	errLeft := errors.New("left")
	ctx, cancel := context.WithCancelCause(t.Context())
	var work sync.WaitGroup
	for range 100 {
		work.Go(func() {
			conn, err := guestclient.Connect(ctx, g, port)
			if err == nil {
				conn.Close() // the kernel took it for the server
			} else if !errors.Is(err, errLeft) {
				t.Error(err)
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	cancel(errLeft)
	work.Wait()
	g.mustAnswer(t) // and the daemon looks for goroutines that are left
}

func TestConnectMany(t *testing.T) {
	g := startDaemon(t, "proc")
	port := server(t, "tcp4", "127.0.0.1:0", func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) })
	var work sync.WaitGroup
	for i := range 200 {
		work.Go(func() {
			conn, err := guestclient.Connect(t.Context(), g, port)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			want := pattern(byte(i), 1000+i)
			_, _ = conn.Write(want)
			_ = conn.(*net.UnixConn).CloseWrite()
			if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d: %d bytes of %d, %v", i, len(got), len(want), err)
			}
		})
	}
	work.Wait()
}
