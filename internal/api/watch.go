package api

import (
	"context"
	"errors"
	"io"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/execution"
	"google.golang.org/grpc"
)

const (
	// defaultHeartbeat is how long a stream may be silent.
	defaultHeartbeat = 15 * time.Second
	// maxChunk is the most output bytes in a message. With it the largest encoded
	// message stays within grpc-go's 32 KiB buffers; the next size is 1 MiB.
	maxChunk = 31744
)

// Execute implements executorv1.ExecutorServiceServer.
func (s *executorService) Execute(req *executorv1.ExecuteRequest, stream grpc.ServerStreamingServer[executorv1.ExecuteResponse]) error {
	interval, err := heartbeatInterval(req.GetHeartbeatInterval())
	if err != nil {
		return err
	}
	request, err := newRequest(stream.Context(), req)
	if err != nil {
		return err
	}
	request.Command.Trace = traceparent(stream.Context())
	request.Attended = true
	if request.Key, err = s.keys.of(stream.Context(), req); err != nil {
		return err
	}
	e, err := s.executions.Start(stream.Context(), request)
	if err != nil {
		return err
	}
	send := func(event *executorv1.Event) error { return stream.Send(&executorv1.ExecuteResponse{Event: event}) }
	watcher, err := s.greet(stream.Context(), e, send)
	if err != nil {
		return err
	}
	return s.follow(stream.Context(), watcher, interval, send)
}

// greet sends the first event of an execution; the watcher that it returns tells what
// comes behind that.
func (s *executorService) greet(ctx context.Context, e execution.Execution, send func(*executorv1.Event) error) (Watcher, error) {
	ref := execution.Ref{Session: e.Session, ID: e.ID, Caller: callerOf(ctx)}
	var watcher Watcher
	_, err := greet(ctx, greeting[execution.Event]{
		watch: func(behind *execution.Event) (source[execution.Event], error) {
			var after *execution.Cursor
			if behind != nil {
				after = &behind.Cursor
			}
			var err error
			watcher, err = s.executions.Watch(ctx, ref, after)
			return watcher, err
		},
		first: func(event execution.Event) bool { return event.Started != nil },
		made: func(execution.Event) execution.Event {
			first := execution.Cursor{Epoch: e.Epoch, Sequence: 1}
			return execution.Event{Cursor: first, Time: e.CreateTime, Started: &execution.Started{Execution: ref}}
		},
	}, func(event execution.Event) error { return send(eventProto(event)) })
	return watcher, err
}

// WatchExecution implements executorv1.ExecutorServiceServer.
func (s *executorService) WatchExecution(req *executorv1.WatchExecutionRequest, stream grpc.ServerStreamingServer[executorv1.WatchExecutionResponse]) error {
	interval, err := heartbeatInterval(req.GetHeartbeatInterval())
	if err != nil {
		return err
	}
	ref, err := parseExecutionName(stream.Context(), req.GetName())
	if err != nil {
		return err
	}
	watcher, err := s.executions.Watch(stream.Context(), ref, cursorOf(req.GetAfter()))
	if err != nil {
		return err
	}
	return s.follow(stream.Context(), watcher, interval,
		func(event *executorv1.Event) error {
			return stream.Send(&executorv1.WatchExecutionResponse{Event: event})
		})
}

// follow sends the events that a watcher tells until the result, and closes it.
func (s *executorService) follow(ctx context.Context, watcher Watcher, interval time.Duration, send func(*executorv1.Event) error) error {
	return follow(ctx, s.senders, following[execution.Event, *executorv1.Event]{
		source: watcher, interval: interval, convert: eventProto, send: send,
		beat: func() *executorv1.Event { return heartbeatProto(watcher.Cursor(), watcher.LastEventTime()) },
	})
}

// ReadOutput implements executorv1.ExecutorServiceServer.
func (s *executorService) ReadOutput(req *executorv1.ReadOutputRequest, stream grpc.ServerStreamingServer[executorv1.ReadOutputResponse]) error {
	ref, err := parseExecutionName(stream.Context(), req.GetName())
	if err != nil {
		return err
	}
	name, err := streamName(req.GetStream())
	if err != nil {
		return err
	}
	ctx := stream.Context()
	return s.senders.run(ctx, func(p *pace) error {
		offset, left := req.GetOffset(), req.GetLimit()
		for {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			size := int64(maxChunk)
			if req.GetLimit() > 0 {
				size = min(size, left)
			}
			// grpc-go may hold on to the bytes of a message: so a new piece for each.
			piece := make([]byte, size)
			n, err := s.executions.ReadOutput(ctx, ref, name, offset, piece)
			if n > 0 {
				p.begin()
				sendErr := stream.Send(&executorv1.ReadOutputResponse{Offset: offset, Data: piece[:n]})
				p.end()
				if sendErr != nil {
					return sendErr
				}
				offset, left = offset+int64(n), left-int64(n)
			}
			switch {
			case errors.Is(err, io.EOF):
				return nil
			case err != nil:
				return err
			case req.GetLimit() > 0 && left == 0:
				return nil
			}
		}
	})
}
