package client

import (
	"context"
	"errors"

	"google.golang.org/protobuf/types/known/durationpb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// SessionStream follows the log of one session and resumes by itself, as Stream does that
// of an execution. Recv is for one goroutine at a time; the other methods may be called
// from any.
type SessionStream struct {
	follower *follower[*executorv1.SessionEvent]
}

// WatchSession follows a session from behind the cursor after, or from its first event if
// after is nil. It asks nothing yet: NOT_FOUND and the like come from the first Recv. The
// SessionStream ends when ctx does.
func (c *Client) WatchSession(ctx context.Context, name string, after *executorv1.Cursor) (*SessionStream, error) {
	if name == "" {
		return nil, errors.New("watch: the session has no name")
	}
	kind := logKind[*executorv1.SessionEvent]{
		watch: func(ctx context.Context, name string, after *executorv1.Cursor, every *durationpb.Duration) (func() (*executorv1.SessionEvent, error), error) {
			stream, err := c.sessions.WatchSession(ctx, &executorv1.WatchSessionRequest{Name: name, After: after, HeartbeatInterval: every})
			if err != nil {
				return nil, err
			}
			return func() (*executorv1.SessionEvent, error) {
				m, err := stream.Recv()
				return m.GetEvent(), err
			}, nil
		},
		last:  func(e *executorv1.SessionEvent) bool { return e.GetEnded() != nil },
		known: func(e *executorv1.SessionEvent) bool { return e.GetKind() != nil },
	}
	return &SessionStream{follower: newFollower(ctx, c, kind, name, after, nil)}, nil
}

// Recv returns the next event, as TurnStream.Recv does; io.EOF after ended.
func (s *SessionStream) Recv() (*executorv1.SessionEvent, error) { return s.follower.recv() }

// Close ends the SessionStream; a Recv that waits returns ErrClosed. It may be called more
// than once.
func (s *SessionStream) Close() { s.follower.end(ErrClosed) }

// Name is the session's resource name.
func (s *SessionStream) Name() string { return s.follower.name() }

// Cursor is behind the last event that Recv returned. It is nil before the first event of
// a log read from its start.
func (s *SessionStream) Cursor() *executorv1.Cursor { return s.follower.at() }
