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

const (
	// inputAhead is how much input of one client waits to be written. A client that keeps
	// to it never waits for the program, so that a new size of its terminal is not stuck
	// behind its input.
	inputAhead = 65536
	// piecesAhead bounds the pieces of that which cannot be joined.
	piecesAhead = 64
)

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
	ref, err := parseExecutionName(stream.Context(), start.GetName())
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
	a := &attached{stream: stream, input: input, changed: make(chan struct{}), end: cancel}
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
	// end ends the stream with an error.
	end context.CancelCauseFunc

	sending sync.Mutex // held by whoever sends

	mu      sync.Mutex
	pieces  []execution.Input // what was received and is to be written
	ahead   int               // bytes of it
	changed chan struct{}     // closed when there is more or less of it
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

// queue adds a piece to what is to be written. For a client that is too far ahead it
// waits.
func (a *attached) queue(ctx context.Context, piece execution.Input) error {
	a.mu.Lock()
	for len(a.pieces) > 0 && (a.ahead+len(piece.Data) > inputAhead || len(a.pieces) == piecesAhead) {
		changed := a.changed
		a.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		a.mu.Lock()
	}
	defer a.mu.Unlock()
	a.ahead += len(piece.Data)
	if n := len(a.pieces); n == 0 || !join(&a.pieces[n-1], piece) {
		a.pieces = append(a.pieces, piece)
	}
	a.change()
	return nil
}

// join adds a piece to the one before it, if it follows on that: keys that are pressed
// one by one are written together when they have to wait.
func join(before *execution.Input, piece execution.Input) bool {
	follows := before.Offset == nil && piece.Offset == nil ||
		before.Offset != nil && piece.Offset != nil && *before.Offset+int64(len(before.Data)) == *piece.Offset
	if !follows || before.Close || len(before.Data)+len(piece.Data) > execution.MaxInputBytes {
		return false
	}
	before.Data = append(before.Data[:len(before.Data):len(before.Data)], piece.Data...)
	before.Close = piece.Close
	return true
}

// change tells those who wait. The caller holds mu.
func (a *attached) change() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// dequeue takes the next piece; changed closes when there may be one.
func (a *attached) dequeue() (piece execution.Input, ok bool, changed <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.pieces) == 0 {
		return execution.Input{}, false, a.changed
	}
	piece = a.pieces[0]
	a.pieces = a.pieces[1:]
	a.ahead -= len(piece.Data)
	a.change()
	return piece, true, nil
}

// await takes the next piece when there is one.
func (a *attached) await(ctx context.Context) (execution.Input, error) {
	for {
		piece, ok, changed := a.dequeue()
		if ok {
			return piece, nil
		}
		select {
		case <-changed:
		case <-a.input.Lost():
			return piece, a.input.Err()
		case <-ctx.Done():
			return piece, context.Cause(ctx)
		}
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
		piece, wrong := a.await(ctx)
		if wrong != nil {
			a.end(wrong)
			return
		}
		state, err = a.writeWhole(ctx, state, piece)
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
