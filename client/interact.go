package client

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// maxPiece is the most input that one message carries.
const maxPiece = 31744

// WriteInput writes data to the input of an execution, beginning at the position
// offset, and with end the end of it. It goes on until all of it is taken, however
// long the program takes to read, and rides out a lost connection as a Stream does
// (ErrOutage): what was taken already is not written again. It returns how far the
// input has come, which it also does with an error, as far as it knows.
func (c *Client) WriteInput(ctx context.Context, name string, offset int64, data []byte, end bool) (int64, error) {
	for at := offset; ; {
		piece := data[min(at-offset, int64(len(data))):]
		last := len(piece) <= maxPiece
		if !last {
			piece = piece[:maxPiece]
		}
		request := &executorv1.WriteInputRequest{Name: name, Offset: &at, Data: piece, Close: end && last}
		var answer *executorv1.WriteInputResponse
		err := c.persist(ctx, name, func() (err error) {
			answer, err = c.executor.WriteInput(ctx, request)
			return err
		})
		if err != nil {
			return at, fmt.Errorf("write input of %s: %w", name, err)
		}
		committed := answer.GetCommittedOffset()
		if committed < at {
			return at, fmt.Errorf("write input of %s: %w: %d bytes were taken, and then %d", name, ErrProtocol, at, committed)
		}
		if committed >= offset+int64(len(data)) && (answer.GetClosed() || !end) {
			return committed, nil
		}
		at = committed
	}
}

// Signal sends a signal to an execution. When the connection breaks before the answer it
// is asked again, with the request's request_id or a random one; ErrUnconfirmed if that
// does not do.
func (c *Client) Signal(ctx context.Context, request *executorv1.SignalExecutionRequest) error {
	request = identified(request)
	err := c.mutate(ctx, request.GetName(), func(option grpc.CallOption) error {
		_, err := c.executor.SignalExecution(ctx, request, option)
		return err
	})
	if err != nil {
		return fmt.Errorf("signal %s: %w", request.GetName(), err)
	}
	return nil
}

// AttachOptions say how to attach.
type AttachOptions struct {
	// After is the cursor to go on behind, as in Watch.
	After *executorv1.Cursor
	// TakeOver ends the attachment of another writer.
	TakeOver bool
}

// Attachment is a Stream on an execution together with its input. Beside Recv, for
// which the rules of Stream hold, Write, CloseInput and Resize may be called from any
// goroutine. Recv has to be called all the time: it also learns what was taken. When
// the connection breaks, Recv connects again, at its cursor and at the input that was
// taken last; input is kept until then, at most 64 KiB of it.
//
// Another writer may take over: then Recv fails with the reason WRITER_TAKEN_OVER.
type Attachment struct {
	*Stream
	in *inlet
}

// Attach attaches to an execution. Like Watch it asks nothing yet: what is refused,
// WRITER_ATTACHED included, comes from the first Recv.
func (c *Client) Attach(ctx context.Context, name string, o AttachOptions) (*Attachment, error) {
	s, err := c.Watch(ctx, name, o.After)
	if err != nil {
		return nil, errors.New("attach: the execution has no name")
	}
	return newAttachment(s, o.TakeOver), nil
}

// Interact starts a command whose stdin is open, or that has a terminal, and attaches
// to it. Its errors are those of Execute.
func (c *Client) Interact(ctx context.Context, request *executorv1.ExecuteRequest) (*Attachment, error) {
	s, err := c.Execute(ctx, request)
	if err != nil {
		return nil, err
	}
	// The stream that started it only told its name.
	s.current.close()
	s.current = nil
	return newAttachment(s, false), nil
}

func newAttachment(s *Stream, takeOver bool) *Attachment {
	in := newInlet(s.within().Done(), func() error { return context.Cause(s.within()) }, takeOver)
	s.inlet = in
	return &Attachment{Stream: s, in: in}
}

// Write sends input. It blocks while more than 64 KiB wait to be taken, and returns
// how much it has accepted; that the program has it is known by Committed. The error
// is ErrInputClosed, or what Recv failed with.
func (a *Attachment) Write(p []byte) (int, error) { return a.in.write(p) }

// CloseInput has the program read an end of file behind what was written. Further
// calls do nothing.
func (a *Attachment) CloseInput() { a.in.close() }

// Resize changes the size of the terminal, now or when there is a connection. The
// last size counts.
func (a *Attachment) Resize(rows, columns int) { a.in.resize(rows, columns) }

// Committed is how much of the input was taken, as far as the server told.
func (a *Attachment) Committed() int64 { return a.in.taken() }

// openAttached opens AttachExecution where the books and the inlet are.
func (s *Stream) openAttached() (*attempt[*executorv1.Event], error) {
	start := &executorv1.AttachStart{Name: s.name, HeartbeatInterval: s.beatEvery, Writer: s.inlet.writer, TakeOver: s.inlet.takeOver}
	if s.books.sequence != 0 || s.books.epoch != "" {
		start.After = s.books.cursor()
	}
	return open(s.within(), s.limit(), func(ctx context.Context) (func() (*executorv1.Event, error), error) {
		stream, err := s.client.executor.AttachExecution(ctx)
		if err != nil {
			return nil, err
		}
		// A failed Send is explained by Recv.
		_ = stream.Send(&executorv1.AttachExecutionRequest{Message: &executorv1.AttachExecutionRequest_Start{Start: start}})
		s.inlet.disconnect()
		return func() (*executorv1.Event, error) {
			for {
				m, err := stream.Recv()
				if err != nil {
					s.inlet.disconnect()
					return nil, err
				}
				state := m.GetInput()
				if state == nil {
					return m.GetEvent(), nil
				}
				// From now on this writer only takes over from itself.
				s.inlet.takeOver = false
				if err := s.inlet.advance(state, stream.Send); err != nil {
					return nil, err
				}
			}
		}, nil
	})
}
