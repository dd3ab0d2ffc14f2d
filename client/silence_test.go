package client_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
)

// inBubble gives a test a server and a client in a synctest bubble, where time only
// passes when everybody waits.
func inBubble(t *testing.T, cfg client.Config, test func(t *testing.T, s *clienttest.Server, c *client.Client)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		listener := bufconn.Listen(1 << 16)
		s := clienttest.New()
		s.Serve(listener, "127.0.0.1:7070")
		cfg.DialOptions = append(cfg.DialOptions, grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return listener.DialContext(ctx)
		}))
		c, err := client.Dial(cfg)
		if err != nil {
			t.Fatal(err)
		}
		test(t, s, c)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		s.Close()
	})
}

func TestSilentServerCountsAsBroken(t *testing.T) {
	inBubble(t, client.Config{}, func(t *testing.T, s *clienttest.Server, c *client.Client) {
		log := sample()
		s.Put(ended(), log...)
		s.Play(func(p *clienttest.Play) error {
			if err := p.Send(p.Log[:2]...); err != nil {
				return err
			}
			<-p.Done // neither events nor heartbeats
			return nil
		})
		stream, err := c.Watch(t.Context(), name, nil)
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		got, err := drain(stream)
		if err != nil {
			t.Fatal(err)
		}
		wantEvents(t, got, log)
		if d := time.Since(begin); d < 45*time.Second || d > 46*time.Second {
			t.Errorf("it took %v, want the 45 s of three heartbeats", d)
		}
	})
}

func TestHeartbeatsKeepAStreamOpen(t *testing.T) {
	inBubble(t, client.Config{HeartbeatInterval: 5 * time.Second}, func(t *testing.T, s *clienttest.Server, c *client.Client) {
		log := sample()
		s.Put(ended(), log...)
		s.Play(func(p *clienttest.Play) error {
			if err := p.Send(p.Log[:2]...); err != nil {
				return err
			}
			for range 1000 {
				time.Sleep(5 * time.Second)
				if err := p.Send(heartbeat(2)); err != nil {
					return err
				}
			}
			return p.Send(p.Log[2:]...)
		})
		stream, err := c.Watch(t.Context(), name, nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := drain(stream)
		if err != nil {
			t.Fatal(err)
		}
		wantEvents(t, got, log)
		if n := len(s.Calls("WatchExecution")); n != 1 {
			t.Errorf("%d connections", n)
		}
	})
}

func TestSlowReaderIsNoSilentServer(t *testing.T) {
	inBubble(t, client.Config{}, func(t *testing.T, s *clienttest.Server, c *client.Client) {
		log := sample()
		s.Put(ended(), log...)
		s.Play(func(p *clienttest.Play) error {
			for _, e := range p.Log {
				if err := p.Send(e); err != nil {
					return err
				}
				// Well within the hour that the reader sleeps, so that it never waits.
				time.Sleep(30 * time.Minute)
			}
			return nil
		})
		stream, err := c.Watch(t.Context(), name, nil)
		if err != nil {
			t.Fatal(err)
		}
		for range log {
			if _, err := stream.Recv(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Hour)
		}
		if n := len(s.Calls("WatchExecution")); n != 1 {
			t.Errorf("%d connections", n)
		}
		stream.Close()
	})
}

// TestStreamGivesUp: whatever the server does instead of getting on, it is tried for
// MaxOutage and no longer.
func TestStreamGivesUp(t *testing.T) {
	storm := func(*clienttest.Play) error { return status.Error(codes.Unavailable, "storm") }
	for what, test := range map[string]struct {
		limit  time.Duration
		script clienttest.Script
	}{
		"unavailable for ever":     {0, storm},
		"for a time of its own":    {7 * time.Second, storm},
		"without result for ever":  {0, func(*clienttest.Play) error { return nil }},
		"the same events for ever": {0, func(p *clienttest.Play) error { return p.Send(p.Log[:2]...) }},
		"at once":                  {-1, storm},
	} {
		t.Run(what, func(t *testing.T) {
			inBubble(t, client.Config{MaxOutage: test.limit}, func(t *testing.T, s *clienttest.Server, c *client.Client) {
				s.Put(ended(), sample()...)
				s.Play(func(p *clienttest.Play) error { return p.Send(p.Log[:2]...) })
				for range 100 {
					s.Play(test.script)
				}
				stream, err := c.Watch(t.Context(), name, nil)
				if err != nil {
					t.Fatal(err)
				}
				begin := time.Now()
				got, err := drain(stream)
				wantEvents(t, got, sample()[:2])
				calls := len(s.Calls("WatchExecution"))
				if test.limit < 0 {
					if err == nil || errors.Is(err, client.ErrOutage) || calls != 1 || time.Since(begin) != 0 {
						t.Errorf("error %v after %d calls and %v", err, calls, time.Since(begin))
					}
					return
				}
				limit := test.limit
				if limit == 0 {
					limit = client.DefaultMaxOutage
				}
				if !errors.Is(err, client.ErrOutage) || calls < 5 || calls > 40 {
					t.Errorf("error %v after %d calls", err, calls)
				}
				if d := time.Since(begin); d != limit {
					t.Errorf("it lasted %v, want %v", d, limit)
				}
				if stream.Cursor().GetSequence() != 2 || stream.Result() != nil {
					t.Errorf("cursor %v, result %v", stream.Cursor(), stream.Result())
				}
			})
		})
	}
}

// TestResultWithoutStatus: a server that sends the result and then hangs does not
// take the end away.
func TestResultWithoutStatus(t *testing.T) {
	inBubble(t, client.Config{}, func(t *testing.T, s *clienttest.Server, c *client.Client) {
		log := sample()
		s.Put(ended(), log...)
		s.Play(func(p *clienttest.Play) error {
			if err := p.Send(p.Log...); err != nil {
				return err
			}
			<-p.Done
			return nil
		})
		stream, err := c.Watch(t.Context(), name, nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := drain(stream)
		if err != nil {
			t.Fatal(err)
		}
		wantEvents(t, got, log)
	})
}
