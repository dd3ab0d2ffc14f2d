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

// errSilent is the cause when a stream was silent for a heartbeat interval.
var errSilent = errors.New("nothing new for a heartbeat interval")

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

// greet sends the first event, which is in the log already, also when the server
// began to stop meanwhile: to a caller who has no name for the execution,
// SERVER_DRAINING would say that there is none. The watcher that it returns tells what
// comes behind that.
func (s *executorService) greet(ctx context.Context, e execution.Execution, send func(*executorv1.Event) error) (Watcher, error) {
	ref := execution.Ref{Session: e.Session, ID: e.ID, Caller: callerOf(ctx)}
	watcher, err := s.executions.Watch(ctx, ref, nil)
	if err != nil {
		return nil, err
	}
	event, err := watcher.Next(context.WithoutCancel(ctx))
	if err == nil && event.Started == nil {
		// A repeat came so late that the log's beginning is no longer kept. What it began
		// with is known, and the name is what the caller needs first.
		watcher.Close()
		first := execution.Cursor{Epoch: e.Epoch, Sequence: 1}
		if watcher, err = s.executions.Watch(ctx, ref, &first); err != nil {
			return nil, err
		}
		event = execution.Event{Cursor: first, Time: e.CreateTime, Started: &execution.Started{Execution: ref}}
	}
	if err == nil {
		err = send(eventProto(event))
	}
	if err != nil {
		watcher.Close()
		return nil, err
	}
	return watcher, nil
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
	return s.senders.run(ctx, func(p *pace) error {
		defer watcher.Close()
		sender := &eventSender{watcher: watcher, interval: interval, pace: p, send: send}
		return sender.run(ctx)
	})
}

// eventSender is the sending side of one stream of events.
type eventSender struct {
	watcher  Watcher
	interval time.Duration
	pace     *pace
	send     func(*executorv1.Event) error
	// last is when a message was last sent.
	last time.Time
}

// run sends one event after the other, and a heartbeat after each interval of silence.
func (s *eventSender) run(ctx context.Context) error {
	s.last = time.Now()
	for {
		err := s.untilAwake(ctx, s.interval-time.Since(s.last))
		if errors.Is(err, io.EOF) {
			return nil
		}
		if !errors.Is(err, errSilent) {
			return err
		}
		if time.Since(s.last) < s.interval {
			// Something was sent since the clock was set.
			continue
		}
		if err := s.tell(heartbeatProto(s.watcher.Cursor(), s.watcher.LastEventTime())); err != nil {
			return err
		}
	}
}

// untilAwake sends events for the duration d and returns errSilent then. The clock is
// set once and not for each event: that costs a busy stream nothing, and whether it was
// silent run looks up when it fires.
func (s *eventSender) untilAwake(ctx context.Context, d time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d, errSilent)
	defer cancel()
	for {
		event, err := s.watcher.Next(ctx)
		if err != nil {
			return err
		}
		if err := s.tell(eventProto(event)); err != nil {
			return err
		}
	}
}

func (s *eventSender) tell(event *executorv1.Event) error {
	s.pace.begin()
	err := s.send(event)
	s.last = s.pace.end()
	return err
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
