package client

import (
	"context"
	"fmt"

	"google.golang.org/grpc"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// sessionAnswer is an answer with a session.
type sessionAnswer interface {
	GetSession() *executorv1.Session
}

// UpdateSession changes a session. It repeats the request as Start does.
func (c *Client) UpdateSession(ctx context.Context, request *executorv1.UpdateSessionRequest) (*executorv1.Session, error) {
	return changeSession(ctx, c, "update", request.GetSession().GetName(), request, c.sessions.UpdateSession)
}

// PauseSession pauses a session and returns it when it rests. It repeats the request as
// Start does.
func (c *Client) PauseSession(ctx context.Context, request *executorv1.PauseSessionRequest) (*executorv1.Session, error) {
	return changeSession(ctx, c, "pause", request.GetName(), request, c.sessions.PauseSession)
}

// ResumeSession has a paused session go on and returns it as it is then, which is mostly
// STATE_RESUMING. It repeats the request as Start does.
func (c *Client) ResumeSession(ctx context.Context, request *executorv1.ResumeSessionRequest) (*executorv1.Session, error) {
	return changeSession(ctx, c, "resume", request.GetName(), request, c.sessions.ResumeSession)
}

// ForkSession makes a session from another one and returns it as it is, which is mostly
// STATE_STARTING. It repeats the request as Start does.
func (c *Client) ForkSession(ctx context.Context, request *executorv1.ForkSessionRequest) (*executorv1.Session, error) {
	return changeSession(ctx, c, "fork", request.GetName(), request, c.sessions.ForkSession)
}

// changeSession makes a call that can be repeated and is answered with a session.
func changeSession[R identifiable, A sessionAnswer](
	ctx context.Context, c *Client, what, name string, request R, call func(context.Context, R, ...grpc.CallOption) (A, error),
) (*executorv1.Session, error) {
	request = identified(request)
	var answer A
	err := c.mutate(ctx, name, func(option grpc.CallOption) (err error) {
		answer, err = call(ctx, request, option)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, name, err)
	}
	return answer.GetSession(), nil
}
