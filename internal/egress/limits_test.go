package egress

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func hangingDial(entered chan<- struct{}) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		entered <- struct{}{}
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
}

// A tunnel over which nothing passes ends; one over which something does, does not.
func TestIdleTunnel(t *testing.T) {
	for name, c := range map[string]struct {
		every time.Duration // something is sent
		ends  bool
	}{"silent": {0, true}, "rarely": {idleTime - time.Minute, false}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, inner := net.Pipe()
				outer, server := net.Pipe()
				up := &upstream{Conn: outer, closed: func() {}}
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					tunnel(inner, emptyReader(), up)
				}()
				go func() { _, _ = io.Copy(io.Discard, server) }()
				for begun := time.Now(); c.every > 0 && time.Since(begun) < 5*idleTime; {
					time.Sleep(c.every)
					if _, err := client.Write([]byte("x")); err != nil {
						t.Fatal(err)
					}
				}
				select {
				case <-ended:
					t.Fatal("it ended while it was in use")
				default:
				}
				begun := time.Now()
				<-ended
				if got := time.Since(begun); got > idleTime+2*time.Second {
					t.Errorf("it ended after %v", got)
				}
				client.Close()
				server.Close()
			})
		})
	}
}

// A target that does not answer is given up in time, and the client is told.
func TestConnectTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		entered := make(chan struct{}, 100)
		g, err := New(Config{Dial: hangingDial(entered), Resolver: resolves("a.example", "1.1.1.1 1.1.1.2 1.1.1.3 1.1.1.4 1.1.1.5")})
		if err != nil {
			t.Fatal(err)
		}
		d := NewDialer(g.cfg.dialing(policyOf(t, "a.example").Rules))
		begun := time.Now()
		_, err = d.connect(t.Context(), target{name: "a.example", port: 443})
		u, ok := errors.AsType[*unreachable](err)
		if !ok || u.status != 504 || !strings.Contains(err.Error(), "a.example") {
			t.Errorf("%v", err)
		}
		if got := time.Since(begun); got != connectTime || len(entered) < 3 || len(entered) > 4 {
			t.Errorf("after %v and %d addresses", got, len(entered))
		}
	})
}
