package client

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// turnWait is how long one request waits for the end of a turn.
const turnWait = 60 * time.Second

// TurnStream follows the log of one turn and resumes by itself, as Stream does that of an
// execution. Recv is for one goroutine at a time; the other methods may be called from
// any. The turn does not care who follows it: it goes on.
type TurnStream struct {
	follower *follower[*executorv1.TurnEvent]
	result   *executorv1.TurnResult
}

// Prompt sends a prompt to the agent of a session and follows its turn. It returns when
// the turn exists: its Name is known then, and the first event that Recv returns is
// started. When the connection breaks before that, the request is repeated with its
// request_id, a random one if the caller gave none: nothing is asked twice. An error is
// the server's refusal, or tells that there is no server, or is ErrUnconfirmed where the
// outage lasted for MaxOutage or ctx ended after the request went out. When ctx ends later,
// the TurnStream ends and the turn goes on.
func (c *Client) Prompt(ctx context.Context, request *executorv1.SendPromptRequest) (*TurnStream, error) {
	if request.GetHeartbeatInterval() == nil && c.cfg.HeartbeatInterval != 0 {
		request = proto.CloneOf(request)
		request.HeartbeatInterval = durationpb.New(c.cfg.HeartbeatInterval)
	}
	request = identified(request)
	f := newFollower(ctx, c, c.turnLogs(), "", nil, request.GetHeartbeatInterval())
	err := f.start(func(ctx context.Context) (func() (*executorv1.TurnEvent, error), error) {
		stream, err := c.sessions.SendPrompt(ctx, request)
		if err != nil {
			return nil, err
		}
		return func() (*executorv1.TurnEvent, error) {
			m, err := stream.Recv()
			return m.GetEvent(), err
		}, nil
	}, func(e *executorv1.TurnEvent) string { return e.GetStarted().GetTurn() })
	if err != nil {
		return nil, fmt.Errorf("prompt %s: %w", request.GetParent(), err)
	}
	return &TurnStream{follower: f}, nil
}

// WatchTurn follows a turn from behind the cursor after, or from its first event if after
// is nil. It asks nothing yet: NOT_FOUND and the like come from the first Recv. The
// TurnStream ends when ctx does.
func (c *Client) WatchTurn(ctx context.Context, name string, after *executorv1.Cursor) (*TurnStream, error) {
	if name == "" {
		return nil, errors.New("watch: the turn has no name")
	}
	return &TurnStream{follower: newFollower(ctx, c, c.turnLogs(), name, after, nil)}, nil
}

func (c *Client) turnLogs() logKind[*executorv1.TurnEvent] {
	return logKind[*executorv1.TurnEvent]{
		watch: func(ctx context.Context, name string, after *executorv1.Cursor, every *durationpb.Duration) (func() (*executorv1.TurnEvent, error), error) {
			stream, err := c.sessions.WatchTurn(ctx, &executorv1.WatchTurnRequest{Name: name, After: after, HeartbeatInterval: every})
			if err != nil {
				return nil, err
			}
			return func() (*executorv1.TurnEvent, error) {
				m, err := stream.Recv()
				return m.GetEvent(), err
			}, nil
		},
		last:  func(e *executorv1.TurnEvent) bool { return e.GetResult() != nil },
		known: func(e *executorv1.TurnEvent) bool { return e.GetKind() != nil },
	}
}

// Recv returns the next event. It blocks until there is one, through as many connections
// as it takes. After the result it returns io.EOF. Any other error is final as well:
// ErrHole, ErrProtocol, ErrOutage with the last failure, the cause of the context,
// ErrClosed, or the server's refusal to go on.
func (s *TurnStream) Recv() (*executorv1.TurnEvent, error) {
	e, err := s.follower.recv()
	if r := e.GetResult(); r != nil {
		s.follower.mu.Lock()
		defer s.follower.mu.Unlock()
		s.result = r
	}
	return e, err
}

// Close ends the TurnStream; a Recv that waits returns ErrClosed. The turn goes on. It may
// be called more than once.
func (s *TurnStream) Close() { s.follower.end(ErrClosed) }

// Name is the turn's resource name.
func (s *TurnStream) Name() string { return s.follower.name() }

// Cursor is behind the last event that Recv returned. WatchTurn goes on there, also in
// another process. It is nil before the first event of a log read from its start.
func (s *TurnStream) Cursor() *executorv1.Cursor { return s.follower.at() }

// Result is the turn's result once it has come, nil before.
func (s *TurnStream) Result() *executorv1.TurnResult {
	s.follower.mu.Lock()
	defer s.follower.mu.Unlock()
	return s.result
}

// WaitTurn waits until a turn is over and returns it. It asks again for as long as it
// runs, and rides out a lost connection as a Stream does (ErrOutage). When ctx ends first
// it returns context.Cause(ctx).
func (c *Client) WaitTurn(ctx context.Context, name string) (*executorv1.Turn, error) {
	for {
		var answer *executorv1.GetTurnResponse
		err := c.persist(ctx, name, func() (err error) {
			answer, err = c.sessions.GetTurn(ctx, &executorv1.GetTurnRequest{Name: name, Wait: durationpb.New(turnWait)})
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("wait for %s: %w", name, err)
		}
		if t := answer.GetTurn(); t.GetState() == executorv1.Turn_STATE_ENDED {
			return t, nil
		}
	}
}

// CancelTurn ends a turn and returns it when it is over. It rides out a lost connection
// as Cancel does.
func (c *Client) CancelTurn(ctx context.Context, request *executorv1.CancelTurnRequest) (*executorv1.Turn, error) {
	request = identified(request)
	var answer *executorv1.CancelTurnResponse
	err := c.persist(ctx, request.GetName(), func() (err error) {
		answer, err = c.sessions.CancelTurn(ctx, request)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cancel %s: %w", request.GetName(), err)
	}
	return answer.GetTurn(), nil
}

// ResolveInteraction answers an agent. It repeats the request as Start does: an answer is
// given once.
func (c *Client) ResolveInteraction(ctx context.Context, request *executorv1.ResolveInteractionRequest) (*executorv1.Interaction, error) {
	request = identified(request)
	var answer *executorv1.ResolveInteractionResponse
	err := c.mutate(ctx, request.GetName(), func(option grpc.CallOption) (err error) {
		answer, err = c.sessions.ResolveInteraction(ctx, request, option)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", request.GetName(), err)
	}
	return answer.GetInteraction(), nil
}
