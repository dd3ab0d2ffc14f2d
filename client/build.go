package client

import (
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// BuildImage has an image made, or joins in its making, and tells every event of the
// build until its result, which it returns; a build that failed is a result too. It repeats
// the request as Start does until it knows the build, and rides out lost connections as a
// Stream does: it goes on behind the last event. tell may be nil; its error ends the
// following, and the build goes on.
func (c *Client) BuildImage(ctx context.Context, request *executorv1.BuildImageRequest, tell func(*executorv1.BuildEvent) error) (*executorv1.Build, error) {
	request = identified(request)
	f := &buildFollower{client: c, tell: tell, lost: c.newOutage(request.GetName())}
	f.open = func(ctx context.Context) (receiver, error) {
		stream, err := c.images.BuildImage(ctx, request)
		return receiverOf(stream, err, (*executorv1.BuildImageResponse).GetEvent)
	}
	build, err := f.follow(ctx)
	if err != nil {
		return nil, fmt.Errorf("build %s: %w", request.GetName(), err)
	}
	return build, nil
}

// WatchBuild follows a build as BuildImage does, behind request's cursor.
func (c *Client) WatchBuild(ctx context.Context, request *executorv1.WatchBuildRequest, tell func(*executorv1.BuildEvent) error) (*executorv1.Build, error) {
	f := &buildFollower{client: c, tell: tell, lost: c.newOutage(request.GetName()), name: request.GetName(), after: request.GetAfter()}
	build, err := f.follow(ctx)
	if err != nil {
		return nil, fmt.Errorf("follow %s: %w", request.GetName(), err)
	}
	return build, nil
}

// receiver returns the events of one stream.
type receiver func() (*executorv1.BuildEvent, error)

func receiverOf[T any](stream grpc.ServerStreamingClient[T], err error, event func(*T) *executorv1.BuildEvent) (receiver, error) {
	if err != nil {
		return nil, err
	}
	return func() (*executorv1.BuildEvent, error) {
		message, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		return event(message), nil
	}, nil
}

// buildFollower follows one build over as many streams as it takes.
type buildFollower struct {
	client *Client
	tell   func(*executorv1.BuildEvent) error
	lost   outage
	// open begins the build, while its name is not known.
	open  func(ctx context.Context) (receiver, error)
	name  string
	after *executorv1.Cursor
}

// errTold ends a following because whoever is told wants no more.
type errTold struct{ err error }

func (e errTold) Error() string { return e.err.Error() }

func (f *buildFollower) follow(ctx context.Context) (*executorv1.Build, error) {
	for {
		build, err := f.once(ctx)
		if err == nil {
			return build, nil
		}
		if told, ok := errors.AsType[errTold](err); ok {
			return nil, told.err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !resumable(err) {
			return nil, err
		}
		if err := f.lost.wait(ctx, err); err != nil {
			return nil, err
		}
	}
}

// once follows one stream.
func (f *buildFollower) once(ctx context.Context) (*executorv1.Build, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(ErrClosed)
	open := f.open
	if f.name != "" {
		open = func(ctx context.Context) (receiver, error) {
			stream, err := f.client.images.WatchBuild(ctx, &executorv1.WatchBuildRequest{Name: f.name, After: f.after})
			return receiverOf(stream, err, (*executorv1.WatchBuildResponse).GetEvent)
		}
	}
	next, err := open(ctx)
	if err != nil {
		return nil, err
	}
	for {
		event, err := next()
		if errors.Is(err, io.EOF) {
			return nil, errCutOff // it ended without a result
		}
		if err != nil {
			return nil, err
		}
		f.lost.over()
		if started := event.GetStarted(); started != nil {
			f.name = started.GetBuild()
		}
		if event.GetHeartbeat() != nil {
			continue
		}
		f.after = event.GetCursor()
		if f.tell != nil {
			if err := f.tell(event); err != nil {
				return nil, errTold{err}
			}
		}
		if build := event.GetResult(); build != nil {
			return build, nil
		}
	}
}
