package clienttest

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"sync"

	"google.golang.org/grpc/codes"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// InputRoom is how much input a program can leave unread.
const InputRoom = 64 << 10

// input is what a program has yet to read, and what else comes to it.
type input struct {
	mu        sync.Mutex
	unread    []byte
	committed int64
	closed    bool
	sizes     []*executorv1.TerminalSize
	signals   []string
	writer    *writer
	changed   chan struct{} // closed when something of the above changes
}

// writer is an attached client.
type writer struct {
	name string
	lost chan struct{}
}

// change changes something and tells those who wait.
func (in *input) change(f func()) {
	in.mu.Lock()
	defer in.mu.Unlock()
	f()
	close(in.changed)
	in.changed = make(chan struct{})
}

// await calls take until it returns true, whenever something has changed; false if the
// program is to stop first.
func (x *execution) await(take func(in *input) bool) bool {
	in := x.input
	for {
		in.mu.Lock()
		ok, changed := take(in), in.changed
		in.mu.Unlock()
		if ok {
			in.change(func() {}) // there may be room now
			return true
		}
		select {
		case <-changed:
		case <-x.stopped:
			return false
		}
	}
}

// interact does a statement about input; false if the verb is another.
func interact(x *execution, verb, rest string) (end *executorv1.Result, ok bool) {
	var data []byte
	done := true
	switch verb {
	case "cat":
		for atEnd := false; done && !atEnd; {
			done = x.await(func(in *input) bool {
				data, in.unread, atEnd = in.unread, nil, len(in.unread) == 0 && in.closed
				return len(data) > 0 || atEnd
			})
			if len(data) > 0 {
				x.write(executorv1.Stream_STREAM_STDOUT, data)
			}
		}
	case "line":
		done = x.await(func(in *input) bool {
			n := bytes.IndexAny(in.unread, "\r\n") + 1
			if n == 0 && in.closed {
				n = len(in.unread)
			}
			data, in.unread = in.unread[:n:n], in.unread[n:]
			return n > 0 || in.closed
		})
		x.write(executorv1.Stream_STREAM_STDOUT, append(bytes.TrimRight(data, "\r\n"), '\n'))
	case "size":
		var size *executorv1.TerminalSize
		if done = x.await(func(in *input) bool {
			if len(in.sizes) > 0 {
				size = in.sizes[len(in.sizes)-1]
				in.sizes = nil
			}
			return size != nil
		}); done {
			x.write(executorv1.Stream_STREAM_STDOUT, fmt.Appendf(nil, "%dx%d\n", size.GetRows(), size.GetColumns()))
		}
	case "signalled":
		done = x.await(func(in *input) bool {
			if len(in.signals) == 0 {
				return false
			}
			data, in.signals = []byte(in.signals[0]+"\n"), in.signals[1:]
			return true
		})
		x.write(executorv1.Stream_STREAM_STDOUT, data)
	case "shut":
		x.input.change(func() { x.input.closed, x.input.unread = true, nil })
	default:
		return nil, false
	}
	if !done {
		return x.ending(), true
	}
	return nil, true
}

func (x *execution) ended() bool {
	record, _, _ := x.snapshot()
	return record.GetState() == executorv1.Execution_STATE_ENDED
}

// take takes what there is room for.
func (x *execution) take(offset *int64, data []byte, end bool) (*executorv1.InputState, error) {
	if x.ended() {
		return nil, Error(codes.FailedPrecondition, "EXECUTION_ENDED", nil, "it has ended")
	}
	in := x.input
	var state *executorv1.InputState
	var err error
	in.change(func() {
		at := in.committed
		if offset != nil {
			at = *offset
		}
		skip := in.committed - at
		facts := map[string]string{"committed_offset": strconv.FormatInt(in.committed, 10)}
		switch {
		case skip < 0 || end && skip > int64(len(data)):
			err = Error(codes.OutOfRange, "INPUT_OFFSET", facts, "the offset does not fit")
			return
		case in.closed && int64(len(data)) > skip:
			err = Error(codes.FailedPrecondition, "STDIN_CLOSED", facts, "the input is closed")
			return
		}
		data = data[min(skip, int64(len(data))):]
		n := min(len(data), InputRoom-len(in.unread))
		in.unread = append(in.unread, data[:n]...)
		in.committed += int64(n)
		in.closed = in.closed || end && n == len(data)
		state = &executorv1.InputState{CommittedOffset: in.committed, Closed: in.closed}
	})
	return state, err
}

func (s *Server) interactive(name string) (*execution, error) {
	x, err := s.execution(name)
	if err != nil {
		return nil, err
	}
	if record, _, _ := x.snapshot(); !record.GetCommand().GetStdin() && record.GetCommand().GetTerminal() == nil {
		return nil, Error(codes.FailedPrecondition, "STDIN_NOT_OPEN", nil, "the input of "+name+" is not open")
	}
	return x, nil
}

// WriteInput implements ExecutorService.
func (s *Server) WriteInput(_ context.Context, r *executorv1.WriteInputRequest) (*executorv1.WriteInputResponse, error) {
	x, err := s.interactive(r.GetName())
	if err != nil {
		return nil, err
	}
	state, err := x.take(r.Offset, r.GetData(), r.GetClose())
	if err != nil {
		return nil, err
	}
	return &executorv1.WriteInputResponse{CommittedOffset: state.GetCommittedOffset(), Closed: state.GetClosed()}, nil
}

// SignalExecution implements ExecutorService.
func (s *Server) SignalExecution(_ context.Context, r *executorv1.SignalExecutionRequest) (*executorv1.SignalExecutionResponse, error) {
	x, err := s.execution(r.GetName())
	if err != nil {
		return nil, err
	}
	return once(s, r, func() (*executorv1.SignalExecutionResponse, error) {
		if x.ended() {
			return nil, Error(codes.FailedPrecondition, "EXECUTION_ENDED", nil, r.GetName()+" has ended")
		}
		x.input.change(func() {
			x.input.signals = append(x.input.signals, fmt.Sprintf("signal %d %s", r.GetSignal(), r.GetScope()))
		})
		return &executorv1.SignalExecutionResponse{}, nil
	})
}

// attach makes a client the writer.
func (x *execution) attach(start *executorv1.AttachStart) (*writer, error) {
	w := &writer{name: start.GetWriter(), lost: make(chan struct{})}
	x.input.mu.Lock()
	defer x.input.mu.Unlock()
	if old := x.input.writer; old != nil {
		if !start.GetTakeOver() && (w.name == "" || w.name != old.name) {
			return nil, Error(codes.FailedPrecondition, "WRITER_ATTACHED", nil, "another writer is attached to "+start.GetName())
		}
		close(old.lost)
	}
	x.input.writer = w
	return w, nil
}

func (x *execution) detach(w *writer) {
	x.input.mu.Lock()
	defer x.input.mu.Unlock()
	if x.input.writer == w {
		x.input.writer = nil
	}
}

// AttachExecution implements ExecutorService.
func (s *Server) AttachExecution(stream executorv1.ExecutorService_AttachExecutionServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	start := first.GetStart()
	x, err := s.interactive(start.GetName())
	if err != nil {
		return err
	}
	w, err := x.attach(start)
	if err != nil {
		return err
	}
	defer x.detach(w)
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	var sending sync.Mutex
	send := func(m *executorv1.AttachExecutionResponse) error {
		sending.Lock()
		defer sending.Unlock()
		return stream.Send(m)
	}
	var reading sync.WaitGroup
	pieces := make(chan *executorv1.AttachExecutionRequest, 1024)
	s.programs.Go(func() { // its Recv returns when the handler has
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			if size := m.GetResize(); size != nil {
				x.input.change(func() { x.input.sizes = append(x.input.sizes, size) })
				continue
			}
			select {
			case pieces <- m:
			case <-ctx.Done():
				return
			}
		}
	})
	reading.Go(func() {
		if err := x.takeAll(ctx, w, pieces, send); err != nil {
			cancel(err)
		}
	})
	err = s.follow(ctx, x, start.GetAfter(), func(e *executorv1.Event) error {
		return send(&executorv1.AttachExecutionResponse{Message: &executorv1.AttachExecutionResponse_Event{Event: e}})
	})
	cancel(nil)
	reading.Wait()
	return err
}

// takeAll takes an attached client's input as there is room for it.
func (x *execution) takeAll(ctx context.Context, w *writer, pieces <-chan *executorv1.AttachExecutionRequest, send func(*executorv1.AttachExecutionResponse) error) error {
	tell := func(state *executorv1.InputState) error {
		return send(&executorv1.AttachExecutionResponse{Message: &executorv1.AttachExecutionResponse_Input{Input: state}})
	}
	x.input.mu.Lock()
	state := &executorv1.InputState{CommittedOffset: x.input.committed, Closed: x.input.closed}
	x.input.mu.Unlock()
	for {
		if err := tell(state); err != nil {
			return err
		}
		var m *executorv1.AttachExecutionRequest
		select {
		case m = <-pieces:
		case <-w.lost:
			return Error(codes.FailedPrecondition, "WRITER_TAKEN_OVER", nil, "another writer has taken over")
		case <-ctx.Done():
			return nil
		}
		var offset *int64
		end := false
		if in := m.GetInput(); in != nil {
			offset = in.Offset
		}
		if c := m.GetCloseInput(); c != nil {
			offset, end = c.Offset, true
		}
		for {
			x.input.mu.Lock()
			changed := x.input.changed
			x.input.mu.Unlock()
			next, err := x.take(offset, m.GetInput().GetData(), end)
			if err != nil {
				state = &executorv1.InputState{CommittedOffset: state.GetCommittedOffset(), Closed: true}
				break
			}
			state = next
			if offset == nil || state.GetClosed() || state.GetCommittedOffset() >= *offset+int64(len(m.GetInput().GetData())) {
				break
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return nil
			}
		}
	}
}
