package execution

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
	"github.com/harvest-run/executord/internal/idempotency"
)

const (
	// MaxInputBytes is the most input that one call can carry.
	MaxInputBytes = 31744
	// inputPatience is how long one call waits for the program to make room.
	inputPatience = 5 * time.Second
	// inputWait is how long the guest is asked to wait for it at a time.
	inputWait = time.Second
)

// TerminalSize is how much a terminal shows.
type TerminalSize struct {
	// Rows and Columns are 1 to 65,535.
	Rows    int `json:"rows"`
	Columns int `json:"columns"`
}

const maxTerminal = 1<<16 - 1

// Validate returns a fault (Invalid) that names the field under path that is wrong.
func (s TerminalSize) Validate(path string) error {
	if s.Rows < 1 || s.Rows > maxTerminal {
		return fault.InvalidField("TERMINAL_SIZE", path+".rows", "must be 1 to %d, not %d", maxTerminal, s.Rows)
	}
	if s.Columns < 1 || s.Columns > maxTerminal {
		return fault.InvalidField("TERMINAL_SIZE", path+".columns", "must be 1 to %d, not %d", maxTerminal, s.Columns)
	}
	return nil
}

func (s TerminalSize) proto() *guestv1.TerminalSize {
	return &guestv1.TerminalSize{Rows: uint32(s.Rows), Columns: uint32(s.Columns)}
}

// takesInput says whether a command's input is open.
func (c Command) takesInput() bool { return c.Stdin || c.Terminal != nil }

// Input is a piece of input.
type Input struct {
	// Offset is the position of the first byte; nil for behind all that was taken.
	Offset *int64
	// Data is at most MaxInputBytes.
	Data []byte
	// Close ends the input behind Data.
	Close bool
}

// InputState is how far the input of an execution has come.
type InputState struct {
	// Committed is how much of it the program's pipe or terminal has taken.
	Committed int64
	// Closed says that nothing more is taken.
	Closed bool
}

// Scope says who of an execution gets a signal.
type Scope uint8

// The scopes.
const (
	// ScopeProcess is the program itself.
	ScopeProcess Scope = iota
	// ScopeGroup is the group in the foreground of the terminal, or the program's own.
	ScopeGroup
	// ScopeTree is every process that comes from the program.
	ScopeTree
)

// inlet is what a run knows of its input. The guest knows how far it has come, also
// when executord is started again.
type inlet struct {
	// turn is held by whoever writes: the pieces of one writer are not mixed with
	// another's. It is a channel, so that a caller whose turn does not come can go.
	turn chan struct{}

	mu     sync.Mutex
	writer *Attachment // the one that is attached; nil if none is
}

func newInlet() *inlet { return &inlet{turn: make(chan struct{}, 1)} }

// WriteInput writes to the input of a running execution as far as there is room
// within some seconds, and waits for one that is starting. Faults: NotFound,
// FailedPrecondition (EXECUTION_ENDED, STDIN_NOT_OPEN, STDIN_CLOSED), OutOfRange
// (INPUT_OFFSET), Unavailable (GUEST_UNREACHABLE).
func (s *Service) WriteInput(ctx context.Context, ref Ref, in Input) (InputState, error) {
	if len(in.Data) > MaxInputBytes {
		return InputState{}, fault.InvalidField("INPUT_SIZE", "data", "has %d bytes, at most %d are allowed", len(in.Data), MaxInputBytes)
	}
	if in.Offset != nil && *in.Offset < 0 {
		return InputState{}, fault.InvalidField("OFFSET", "offset", "%d is negative", *in.Offset)
	}
	r, err := s.interactive(ctx, ref, Command.takesInput, errNotOpen)
	if err != nil {
		return InputState{}, err
	}
	return r.writeInput(ctx, in)
}

// Resize changes the size of a running execution's terminal. Faults: NotFound,
// FailedPrecondition (EXECUTION_ENDED, NOT_A_TERMINAL), Unavailable
// (GUEST_UNREACHABLE).
func (s *Service) Resize(ctx context.Context, ref Ref, size TerminalSize) error {
	if err := size.Validate("resize"); err != nil {
		return err
	}
	r, err := s.interactive(ctx, ref, func(c Command) bool { return c.Terminal != nil }, errNoTerminal)
	if err != nil {
		return err
	}
	return r.explain(ctx, r.guest.Resize(ctx, r.id, size.proto()))
}

// Signal sends a signal, 1 to 64, to processes of a running execution. A repeat, by its
// key, of one that was sent sends nothing. Faults: NotFound, FailedPrecondition
// (EXECUTION_ENDED), AlreadyExists (REQUEST_ID_REUSED), Unavailable (GUEST_UNREACHABLE).
func (s *Service) Signal(ctx context.Context, ref Ref, signal int32, scope Scope, key idempotency.Key) error {
	scopes := [...]guestv1.SignalRequest_Scope{
		ScopeProcess: guestv1.SignalRequest_SCOPE_PROCESS, ScopeGroup: guestv1.SignalRequest_SCOPE_GROUP, ScopeTree: guestv1.SignalRequest_SCOPE_TREE,
	}
	if signal < 1 || signal > 64 {
		return fault.InvalidField("SIGNAL", "signal", "must be 1 to 64, not %d", signal)
	}
	if int(scope) >= len(scopes) {
		return fault.InvalidField("SIGNAL_SCOPE", "scope", "%d is none", scope)
	}
	earlier, done, err := s.requests.Begin(ctx, key)
	if err != nil {
		return err
	}
	defer done()
	if earlier != "" {
		return nil
	}
	r, err := s.interactive(ctx, ref, nil, nil)
	if err != nil {
		return err
	}
	if err := r.guest.Signal(ctx, r.id, signal, scopes[scope]); err != nil {
		return r.explain(ctx, err)
	}
	// Behind it: a signal that was not sent must not pass for one that was.
	if err := s.requests.Note(context.WithoutCancel(ctx), key, ref.ID); err != nil {
		return err
	}
	return s.requests.Sync(ctx, key)
}

func errEnded(id string) error {
	return fault.New(fault.FailedPrecondition, "EXECUTION_ENDED", "execution %q has ended", id)
}

func errNotOpen(id string) error {
	return fault.New(fault.FailedPrecondition, "STDIN_NOT_OPEN", "the input of execution %q is not open: it was started without stdin and without a terminal", id)
}

func errNoTerminal(id string) error {
	return fault.New(fault.FailedPrecondition, "NOT_A_TERMINAL", "execution %q has no terminal", id)
}

// interactive returns the run of an execution once its program runs. suits, if not
// nil, says whether its command can do what is wanted, unfit what to say if not.
func (s *Service) interactive(ctx context.Context, ref Ref, suits func(Command) bool, unfit func(id string) error) (*run, error) {
	r, ok := s.visible(ref)
	if !ok {
		e, err := s.Get(ctx, ref)
		switch {
		case err != nil:
			return nil, err
		case e.State != Ended:
			return nil, ErrClosed // nobody leads it any more
		case suits != nil && !suits(e.Command):
			return nil, unfit(ref.ID)
		}
		return nil, errEnded(ref.ID)
	}
	if suits != nil && !suits(r.snapshot().Command) {
		return nil, unfit(ref.ID)
	}
	select {
	case <-r.launched:
		return r, nil
	default:
	}
	select {
	case <-r.launched:
		return r, nil
	case <-r.done:
		return nil, errEnded(ref.ID)
	case <-r.left:
		select {
		case <-r.done:
			return nil, errEnded(ref.ID)
		default:
			return nil, ErrClosed
		}
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// writeInput hands a piece of input to the guest, which waits for room.
func (r *run) writeInput(ctx context.Context, in Input) (InputState, error) {
	select {
	case r.inlet.turn <- struct{}{}:
	case <-ctx.Done():
		return InputState{}, context.Cause(ctx)
	}
	defer func() { <-r.inlet.turn }()
	offset := in.Offset
	if offset == nil {
		// Asked for now and written there, so that a repeat over a lost pipe is one.
		state, err := r.inputState(ctx)
		if err != nil || len(in.Data) == 0 && !in.Close {
			return state, err
		}
		offset = &state.Committed
	}
	end := *offset + int64(len(in.Data))
	for patience := time.Now().Add(inputPatience); ; {
		wait := max(min(inputWait, time.Until(patience)), 0)
		written, err := r.guest.Write(ctx, r.id, *offset, in.Data, in.Close, wait)
		if err != nil {
			return InputState{}, r.explain(ctx, err)
		}
		all := written.Committed >= end && !in.Close
		if all || written.Closed || wait == 0 {
			return InputState(written), nil
		}
		if ctx.Err() != nil {
			return InputState{}, context.Cause(ctx)
		}
	}
}

// inputState asks the guest how far the input has come.
func (r *run) inputState(ctx context.Context) (InputState, error) {
	written, err := r.guest.Input(ctx, r.id)
	if err != nil {
		return InputState{}, r.explain(ctx, err)
	}
	return InputState(written), nil
}

// explain makes a fault of what came from the guest.
func (r *run) explain(ctx context.Context, err error) error {
	told, ok := errors.AsType[*guestclient.Error](err)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case !ok && (ended(r.sandbox) || r.log.Sealed()), guestclient.KindOf(err) == guestv1.Error_KIND_ENDED, guestclient.KindOf(err) == guestv1.Error_KIND_NOT_FOUND:
		return errEnded(r.id)
	case !ok:
		return &fault.Error{
			Kind: fault.Unavailable, Reason: "GUEST_UNREACHABLE", RetryAfter: time.Second, Err: err,
			Message: "the guest of the execution's sandbox does not answer",
		}
	case told.Kind == guestv1.Error_KIND_CLOSED:
		return committed(fault.New(fault.FailedPrecondition, "STDIN_CLOSED", "the input of execution %q is closed", r.id), told)
	case told.Kind == guestv1.Error_KIND_INVALID && told.Committed >= 0:
		return committed(fault.New(fault.OutOfRange, "INPUT_OFFSET", "the offset does not fit the input of execution %q, of which %d bytes were taken", r.id, told.Committed), told)
	}
	return err
}

// committed adds how far the input has come, if that was told.
func committed(e *fault.Error, told *guestclient.Error) error {
	if told.Committed >= 0 {
		e = e.With("committed_offset", strconv.FormatInt(told.Committed, 10))
	}
	return e
}
