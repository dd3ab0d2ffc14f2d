package client_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// mutation is one of the Client's calls that change something, done to a fresh server.
type mutation struct {
	method string
	// prepare makes what is to be changed.
	prepare func(t *testing.T, s *clienttest.Server)
	// call does it with a request_id, "" for a random one.
	call func(ctx context.Context, c *client.Client, id string) error
}

func mutations() []mutation {
	nothing := func(*testing.T, *clienttest.Server) {}
	return []mutation{
		{"StartExecution", nothing, func(ctx context.Context, c *client.Client, id string) error {
			r := &executorv1.StartExecutionRequest{Command: execute("exit 0").GetCommand(), RequestId: id}
			e, err := c.Start(ctx, r)
			if err == nil && e.GetName() != "executions/x1" {
				err = errors.New("started " + e.GetName())
			}
			if r.GetRequestId() != id {
				err = errors.New("the caller's request was changed")
			}
			return err
		}},
		{"CreateSession", nothing, func(ctx context.Context, c *client.Client, id string) error {
			s, err := c.CreateSession(ctx, &executorv1.CreateSessionRequest{RequestId: id})
			if err == nil && s.GetName() != "sessions/s1" {
				err = errors.New("created " + s.GetName())
			}
			return err
		}},
		{"DeleteExecution", func(_ *testing.T, s *clienttest.Server) { s.Put(ended(), sample()...) },
			func(ctx context.Context, c *client.Client, id string) error {
				return c.Delete(ctx, &executorv1.DeleteExecutionRequest{Name: name, RequestId: id})
			}},
		{"SignalExecution", func(_ *testing.T, s *clienttest.Server) {
			s.Put(&executorv1.Execution{Name: name, State: executorv1.Execution_STATE_RUNNING})
		}, func(ctx context.Context, c *client.Client, id string) error {
			return c.Signal(ctx, &executorv1.SignalExecutionRequest{Name: name, Signal: 15, RequestId: id})
		}},
		{"TerminateSession", func(t *testing.T, s *clienttest.Server) {
			if _, err := s.CreateSession(t.Context(), &executorv1.CreateSessionRequest{}); err != nil {
				t.Fatal(err)
			}
		}, func(ctx context.Context, c *client.Client, id string) error {
			s, err := c.TerminateSession(ctx, &executorv1.TerminateSessionRequest{Name: "sessions/s1", RequestId: id})
			if err == nil && s.GetState() != executorv1.Session_STATE_TERMINATED {
				err = errors.New("not ended")
			}
			return err
		}},
	}
}

// lostAnswers has the server carry out a method and lose its answer, a number of times.
func lostAnswers(s *clienttest.Server, method string, times int, lost error) {
	s.Lose(func(m string, nth int) error {
		if m == method && nth <= times {
			return lost
		}
		return nil
	})
}

// TestMutations: an answer that is lost does not keep a change from being made once.
func TestMutations(t *testing.T) {
	t.Parallel()
	for _, m := range mutations() {
		t.Run(m.method, func(t *testing.T) {
			t.Parallel()
			start := func(t *testing.T, cfg client.Config) (*clienttest.Server, *client.Client) {
				s := clienttest.Start(t)
				m.prepare(t, s)
				cfg.Address = s.Address()
				return s, dial(t, cfg)
			}
			t.Run("answers are lost", func(t *testing.T) {
				t.Parallel()
				s, c := start(t, client.Config{})
				lostAnswers(s, m.method, 2, status.Error(codes.Unavailable, "reset"))
				if err := m.call(bounded(t), c, ""); err != nil {
					t.Error(err)
				}
				calls := s.Calls(m.method)
				if len(calls) != 3 || !proto.Equal(calls[0], calls[2]) || len(requestID(calls[0])) < 20 {
					t.Errorf("calls %v", calls)
				}
			})
			t.Run("the caller's request_id", func(t *testing.T) {
				t.Parallel()
				s, c := start(t, client.Config{})
				for range 2 {
					if err := m.call(bounded(t), c, "mine"); err != nil {
						t.Error(err)
					}
				}
				if calls := s.Calls(m.method); len(calls) != 2 || requestID(calls[1]) != "mine" {
					t.Errorf("calls %v", calls)
				}
			})
			t.Run("refused", func(t *testing.T) {
				t.Parallel()
				s, c := start(t, client.Config{})
				for _, reason := range []string{"SERVER_DRAINING", "STATE_BUSY"} {
					s.Hook(func(string, int) error { return clienttest.Error(codes.Unavailable, reason, nil, "not now") })
					err := m.call(bounded(t), c, "")
					if client.Reason(err) != reason || errors.Is(err, client.ErrUnconfirmed) {
						t.Errorf("error %v", err)
					}
				}
				if n := len(s.Calls(m.method)); n != 2 {
					t.Errorf("%d calls", n)
				}
			})
			t.Run("no server", func(t *testing.T) {
				t.Parallel()
				s, c := start(t, client.Config{})
				s.Stop()
				if err := m.call(bounded(t), c, ""); !client.Unavailable(err) || errors.Is(err, client.ErrUnconfirmed) {
					t.Errorf("error %v", err)
				}
			})
			t.Run("the server does not come back", func(t *testing.T) {
				t.Parallel()
				s, c := start(t, client.Config{MaxOutage: 300 * time.Millisecond})
				lostAnswers(s, m.method, 1000, status.Error(codes.Unavailable, "reset"))
				if err := m.call(bounded(t), c, ""); !errors.Is(err, client.ErrUnconfirmed) || !errors.Is(err, client.ErrOutage) {
					t.Errorf("error %v", err)
				}
			})
			t.Run("the context ends", func(t *testing.T) {
				t.Parallel()
				s, c := start(t, client.Config{})
				enough := errors.New("enough")
				ctx, cancel := context.WithCancelCause(bounded(t))
				s.Lose(func(string, int) error { cancel(enough); return status.Error(codes.Unavailable, "reset") })
				if err := m.call(ctx, c, ""); !errors.Is(err, client.ErrUnconfirmed) || !errors.Is(err, enough) {
					t.Errorf("error %v", err)
				}
			})
		})
	}
}

func requestID(m proto.Message) string {
	if r, ok := m.(interface{ GetRequestId() string }); ok {
		return r.GetRequestId()
	}
	return ""
}

// TestMutationsOfNothing: a request that is nil is an empty one.
func TestMutationsOfNothing(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	c := dial(t, client.Config{Address: s.Address()})
	created, err := c.CreateSession(bounded(t), nil)
	if err != nil || created.GetName() != "sessions/s1" {
		t.Errorf("%v, %v", created, err)
	}
	if _, err := c.Cancel(bounded(t), nil); !client.NotFound(err) {
		t.Errorf("error %v", err)
	}
}
