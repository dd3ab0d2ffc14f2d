package outlet

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

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
		all := make(chan struct{}, MaxAll)
		l := Open(s.accept, 1, all)
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
		l.Wait()
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
		l := &Listener{}
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
		l := Open(func(ctx context.Context) (net.Conn, error) {
			asked <- time.Now()
			return nil, errors.New("no answer")
		}, 1, make(chan struct{}, 1))
		time.Sleep(10 * time.Minute)
		if n := len(asked); n < 4*100 || n > 4*140 {
			t.Errorf("it was asked %d times in 10 minutes", n)
		}
		l.Close()
		l.Wait()
	})
}
