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

// pipes is a source of as many connections as somebody asks for.
type pipes struct{ theirs chan net.Conn }

func (p pipes) accept(ctx context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case p.theirs <- theirs:
		return ours, nil
	case <-ctx.Done():
		ours.Close()
		theirs.Close()
		return nil, context.Cause(ctx)
	}
}

func TestConnectionsAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := pipes{make(chan net.Conn)}
		all := make(chan struct{}, maxAllConnections)
		l := listen(s, all)
		var taken []net.Conn
		clients := make(chan net.Conn, 1000)
		stop := make(chan struct{})
		done := make(chan struct{})
		go func() { // who wants in
			defer close(done)
			for {
				select {
				case c := <-s.theirs:
					clients <- c
				case <-stop:
					return
				}
			}
		}()
		for range maxConnections {
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			taken = append(taken, c)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(clients); n != maxConnections+acceptors {
			t.Errorf("%d connections were taken from the guest", n)
		}
		select {
		case <-l.ready:
			t.Error("one more than may be is handed over")
		default:
		}
		taken[0].Close()
		taken[0].Close() // gives one place, not two
		synctest.Wait()
		if c, err := l.Accept(); err != nil {
			t.Error(err)
		} else {
			defer c.Close()
		}
		synctest.Wait()
		select {
		case <-l.ready:
			t.Error("two closes of one connection made room for two")
		default:
		}
		l.Close()
		l.wait()
		close(stop)
		<-done
		if len(all) != 0 {
			t.Errorf("%d places are still taken", len(all))
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		for len(clients) > 0 {
			(<-clients).Close()
		}
	})
}

// A sandbox that does nothing but connect is slowed down.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &listener{}
		begun := time.Now()
		const n = burst + 1000
		for range n {
			pause(context.Background(), l.turn(time.Now()))
		}
		if got, want := time.Since(begun), 1000*pace; got < want-pace || got > want+pace {
			t.Errorf("%d connections took %v, want about %v", n, got, want)
		}
		time.Sleep(time.Hour) // rest is not saved up beyond the burst
		begun = time.Now()
		for range n {
			pause(context.Background(), l.turn(time.Now()))
		}
		if got := time.Since(begun); got < 999*pace {
			t.Errorf("after a rest %d connections took %v", n, got)
		}
	})
}

// A guest that does not answer is asked ever more rarely, and again at once when it does.
func TestSourceThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := make(chan time.Time, 10000)
		l := listen(sourceFunc(func(ctx context.Context) (net.Conn, error) {
			asked <- time.Now()
			return nil, errors.New("no answer")
		}), make(chan struct{}, 1))
		time.Sleep(10 * time.Minute)
		if n := len(asked); n < 4*100 || n > 4*140 {
			t.Errorf("it was asked %d times in 10 minutes", n)
		}
		l.Close()
		l.wait()
	})
}

type sourceFunc func(context.Context) (net.Conn, error)

func (f sourceFunc) accept(ctx context.Context) (net.Conn, error) { return f(ctx) }

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
		p := &Proxy{gateway: g, rules: compile(policyOf(t, "a.example"), nil)}
		begun := time.Now()
		_, err = p.connect(t.Context(), target{name: "a.example", port: 443})
		u, ok := errors.AsType[*unreachable](err)
		if !ok || u.status != 504 || !strings.Contains(err.Error(), "a.example") {
			t.Errorf("%v", err)
		}
		if got := time.Since(begun); got != connectTime || len(entered) < 3 || len(entered) > 4 {
			t.Errorf("after %v and %d addresses", got, len(entered))
		}
	})
}
