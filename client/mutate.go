package client

import (
	"context"
	"crypto/rand"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// Start starts a command and returns as soon as it is recorded. When the connection
// breaks before the answer, it repeats the request, which starts nothing twice; a server
// that is out of reach from the start is an error at once. ErrUnconfirmed where the
// outage lasted for MaxOutage or ctx ended first.
func (c *Client) Start(ctx context.Context, request *executorv1.StartExecutionRequest) (*executorv1.Execution, error) {
	request = identified(request)
	var answer *executorv1.StartExecutionResponse
	err := c.mutate(ctx, "", func(option grpc.CallOption) (err error) {
		answer, err = c.executor.StartExecution(ctx, request, option)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	return answer.GetExecution(), nil
}

// Delete deletes an ended execution with its log. It repeats the request as Start does.
func (c *Client) Delete(ctx context.Context, request *executorv1.DeleteExecutionRequest) error {
	request = identified(request)
	err := c.mutate(ctx, request.GetName(), func(option grpc.CallOption) error {
		_, err := c.executor.DeleteExecution(ctx, request, option)
		return err
	})
	if err != nil {
		return fmt.Errorf("delete %s: %w", request.GetName(), err)
	}
	return nil
}

// CreateSession creates a session and returns it as it is, which is mostly
// STATE_STARTING. It repeats the request as Start does.
func (c *Client) CreateSession(ctx context.Context, request *executorv1.CreateSessionRequest) (*executorv1.Session, error) {
	request = identified(request)
	var answer *executorv1.CreateSessionResponse
	err := c.mutate(ctx, "", func(option grpc.CallOption) (err error) {
		answer, err = c.sessions.CreateSession(ctx, request, option)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("create a session: %w", err)
	}
	return answer.GetSession(), nil
}

// TerminateSession ends a session and returns it when everything of it is gone. It
// repeats the request as Start does.
func (c *Client) TerminateSession(ctx context.Context, request *executorv1.TerminateSessionRequest) (*executorv1.Session, error) {
	request = identified(request)
	var answer *executorv1.TerminateSessionResponse
	err := c.mutate(ctx, request.GetName(), func(option grpc.CallOption) (err error) {
		answer, err = c.sessions.TerminateSession(ctx, request, option)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("terminate %s: %w", request.GetName(), err)
	}
	return answer.GetSession(), nil
}

// DeleteImage removes an image with all its builds. It repeats the request as Start does.
func (c *Client) DeleteImage(ctx context.Context, request *executorv1.DeleteImageRequest) error {
	request = identified(request)
	err := c.mutate(ctx, request.GetName(), func(option grpc.CallOption) error {
		_, err := c.images.DeleteImage(ctx, request, option)
		return err
	})
	if err != nil {
		return fmt.Errorf("delete %s: %w", request.GetName(), err)
	}
	return nil
}

// identifiable is a request with a request_id.
type identifiable interface {
	proto.Message
	GetRequestId() string
}

// identified returns a request that can be repeated: with a request_id, a random one if
// the caller gave none. The caller's own request is not changed.
func identified[R identifiable](request R) R {
	if request.GetRequestId() != "" {
		return request
	}
	message := request.ProtoReflect()
	if message.IsValid() {
		message = proto.Clone(request).ProtoReflect()
	} else {
		message = message.New()
	}
	message.Set(message.Descriptor().Fields().ByName("request_id"), protoreflect.ValueOfString(rand.Text()))
	return message.Interface().(R)
}

// mutate makes a call with a request_id, and makes it again for as long as it is not
// known whether the server carried it out.
func (c *Client) mutate(ctx context.Context, name string, call func(grpc.CallOption) error) error {
	lost := c.newOutage(name)
	doubt := false
	for {
		var server peer.Peer
		err := call(grpc.Peer(&server))
		if err == nil {
			return nil
		}
		// Without an address there was no connection to send it on.
		doubt = doubt || server.Addr != nil && unanswered(ctx, err)
		if err := doubtful(ctx, &lost, doubt, err); err != nil {
			return err
		}
	}
}

// unanswered says whether err, of a request that went out, leaves open what became of
// it. With a reason it is the server's refusal; SLOW_CONSUMER it says of streams of
// executions that exist.
func unanswered(ctx context.Context, err error) bool {
	why := Reason(err)
	return (why == "" || why == "SLOW_CONSUMER") && (resumable(err) || ctx.Err() != nil)
}

// doubtful decides about a failed request with a request_id: nil means that it is to be
// made again now. doubt says whether it, or one before it, may have been carried out.
func doubtful(ctx context.Context, lost *outage, doubt bool, err error) error {
	switch {
	case !doubt:
		return err
	case ctx.Err() != nil:
		return fmt.Errorf("%w: %w", ErrUnconfirmed, context.Cause(ctx))
	case !resumable(err):
		return err // what the server knew of it, it would have said
	}
	if err := lost.wait(ctx, err); err != nil {
		return fmt.Errorf("%w: %w", ErrUnconfirmed, err)
	}
	return nil
}
