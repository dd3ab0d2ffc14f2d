package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"google.golang.org/grpc"
)

// inputAhead is how many pieces of input of one client wait to be written. With them a
// client that keeps to its 65,536 bytes never waits for the program, so that a new size
// of its terminal is not stuck behind its input.
const inputAhead = 4

// attachStream is the stream of AttachExecution.
type attachStream = grpc.BidiStreamingServer[executorv1.AttachExecutionRequest, executorv1.AttachExecutionResponse]

// AttachExecution implements executorv1.ExecutorServiceServer. Events are sent as to a
// watcher; beside that one goroutine receives and one writes what was received.
func (s *executorService) AttachExecution(stream attachStream) error {
	first, err := stream.Recv()
	if errors.Is(err, io.EOF) {
		return errFirstMessage()
	}
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil {
		return errFirstMessage()
	}
	interval, err := heartbeatInterval(start.GetHeartbeatInterval())
	if err != nil {
		return err
	}
	ref, err := parseExecutionName(start.GetName())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	watcher, err := s.executions.Watch(ctx, ref, cursorOf(start.GetAfter()))
	if err != nil {
		cancel(nil)
		return err
	}
	input, err := s.executions.Attach(ctx, ref, start.GetWriter(), start.GetTakeOver())
	if err != nil {
		watcher.Close()
		cancel(nil)
		return err
	}
	a := &attached{stream: stream, input: input, pieces: make(chan execution.Input, inputAhead), end: cancel}
	// Neither is waited for here: Recv returns only when the handler has.
	s.senders.group.Go(func() { defer s.recovered(ctx, cancel); a.receive(ctx) })
	s.senders.group.Go(func() { defer s.recovered(ctx, cancel); a.write(ctx) })
	defer input.Close()
	defer cancel(context.Canceled)
	return s.follow(ctx, watcher, interval, func(event *executorv1.Event) error {
		return a.send(&executorv1.AttachExecutionResponse{Message: &executorv1.AttachExecutionResponse_Event{Event: event}})
	})
}

// recovered ends a stream of which one of the goroutines has panicked: the recovery
// interceptor sees only the handler's.
func (s *executorService) recovered(ctx context.Context, end context.CancelCauseFunc) {
	if v := recover(); v != nil {
		end(s.senders.statuses.recovered(ctx, v))
	}
}

func errFirstMessage() error {
	return fault.InvalidField(reasonInvalidField, "start", "must be the first message, and only that")
}

// attached is one attached client.
type attached struct {
	stream attachStream
	input  Attachment
	// pieces is what was received and is to be written. Only receive sends on it.
	pieces chan execution.Input
	// end ends the stream with an error.
	end context.CancelCauseFunc

	sending sync.Mutex // held by whoever sends
}

func (a *attached) send(m *executorv1.AttachExecutionResponse) error {
	a.sending.Lock()
	defer a.sending.Unlock()
	return a.stream.Send(m)
}

// receive takes the client's messages until there are no more.
func (a *attached) receive(ctx context.Context) {
	for {
		m, err := a.stream.Recv()
		if errors.Is(err, io.EOF) {
			return // it has nothing more to say, and listens
		}
		if err == nil {
			err = a.take(ctx, m)
		}
		if err != nil {
			a.end(err)
			return
		}
	}
}

func (a *attached) take(ctx context.Context, m *executorv1.AttachExecutionRequest) error {
	switch m := m.GetMessage().(type) {
	case *executorv1.AttachExecutionRequest_Input:
		return a.queue(ctx, execution.Input{Offset: m.Input.Offset, Data: m.Input.GetData()})
	case *executorv1.AttachExecutionRequest_CloseInput:
		return a.queue(ctx, execution.Input{Offset: m.CloseInput.Offset, Close: true})
	case *executorv1.AttachExecutionRequest_Resize:
		err := a.input.Resize(ctx, sizeOf(m.Resize))
		if fault.ReasonOf(err) == reasonEnded {
			err = nil // the result is on its way
		}
		return err
	default:
		return errFirstMessage()
	}
}

func (a *attached) queue(ctx context.Context, piece execution.Input) error {
	select {
	case a.pieces <- piece:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Reasons of the domain after which an attached client still gets the events.
const (
	reasonEnded  = "EXECUTION_ENDED"
	reasonClosed = "STDIN_CLOSED"
)

// write tells how far the input has come, writes what was received, and tells again.
func (a *attached) write(ctx context.Context) {
	state, err := a.input.Write(ctx, execution.Input{})
	for {
		switch reason := fault.ReasonOf(err); {
		case reason == reasonEnded || reason == reasonClosed:
			state.Closed = true
		case err != nil:
			a.end(err)
			return
		}
		if err := a.tell(state); err != nil {
			a.end(err)
			return
		}
		select {
		case piece := <-a.pieces:
			state, err = a.writeWhole(ctx, state, piece)
		case <-a.input.Lost():
			a.end(a.input.Err())
			return
		case <-ctx.Done():
			return
		}
	}
}

// writeWhole writes a piece to its end, however long the program takes to read.
func (a *attached) writeWhole(ctx context.Context, before execution.InputState, piece execution.Input) (execution.InputState, error) {
	if before.Closed {
		return before, nil
	}
	if piece.Offset == nil {
		piece.Offset = &before.Committed
	}
	end := *piece.Offset + int64(len(piece.Data))
	for {
		state, err := a.input.Write(ctx, piece)
		switch {
		case fault.ReasonOf(err) == reasonEnded || fault.ReasonOf(err) == reasonClosed:
			// How much of it was taken does not matter any more.
			before.Closed = true
			return before, nil
		case err != nil:
			return before, err
		case state.Closed || state.Committed >= end && !piece.Close:
			return state, nil
		}
		if state != before {
			if err := a.tell(state); err != nil {
				return state, err
			}
			before = state
		}
	}
}

func (a *attached) tell(state execution.InputState) error {
	err := a.send(&executorv1.AttachExecutionResponse{Message: &executorv1.AttachExecutionResponse_Input{
		Input: &executorv1.InputState{CommittedOffset: state.Committed, Closed: state.Closed},
	}})
	if err != nil {
		return fmt.Errorf("tell how far the input has come: %w", err)
	}
	return nil
}
