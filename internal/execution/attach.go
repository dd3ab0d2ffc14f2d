package execution

import (
	"context"
	"errors"

	"github.com/harvest-run/executord/internal/fault"
)

// errTakenOver ends an attachment when another writer has taken over.
var errTakenOver error = fault.New(fault.FailedPrecondition, "WRITER_TAKEN_OVER", "another writer has taken over")

// errReplaced ends an attachment when its own writer has come back by another way.
var errReplaced error = fault.New(fault.FailedPrecondition, "WRITER_TAKEN_OVER", "the same writer has attached once more")

// errDetached ends what an attachment does when it is closed.
var errDetached = errors.New("the attachment is closed")

// Attachment is one writer's hold on the input of an execution. It is kept in memory:
// after a restart of executord whoever comes first has it.
type Attachment struct {
	service *Service
	ref     Ref
	writer  string
	run     *run // nil for an execution that has ended
	// lost is closed when another took over; cause then says so.
	lost  <-chan struct{}
	cause func() error
	take  context.CancelCauseFunc
	// whenLost has f called when it is lost or closed; what it returns undoes that.
	whenLost func(f func()) (undo func() bool)
}

// Attach makes a writer, named by an id that is unique to it or "", the one of an
// execution. It does not wait for one that is starting, and one that has ended can be
// attached to in vain. Faults: NotFound; FailedPrecondition (STDIN_NOT_OPEN;
// WRITER_ATTACHED, if another writer is attached and takeOver is not set).
func (s *Service) Attach(ctx context.Context, ref Ref, writer string, takeOver bool) (*Attachment, error) {
	losing, take := context.WithCancelCause(context.Background())
	a := &Attachment{
		service: s, ref: ref, writer: writer,
		lost: losing.Done(), cause: func() error { return context.Cause(losing) }, take: take,
		whenLost: func(f func()) func() bool { return context.AfterFunc(losing, f) },
	}
	r, ok := s.visible(ref)
	if !ok {
		e, err := s.Get(ctx, ref)
		if err == nil && !e.Command.takesInput() {
			err = errNotOpen(ref.ID)
		}
		if err != nil {
			take(errDetached)
			return nil, err
		}
		return a, nil
	}
	if !r.snapshot().Command.takesInput() {
		take(errDetached)
		return nil, errNotOpen(ref.ID)
	}
	r.inlet.mu.Lock()
	defer r.inlet.mu.Unlock()
	if old := r.inlet.writer; old != nil {
		switch {
		case writer != "" && writer == old.writer:
			old.take(errReplaced)
		case takeOver:
			old.take(errTakenOver)
		default:
			take(errDetached)
			return nil, fault.New(fault.FailedPrecondition, "WRITER_ATTACHED", "another writer is attached to execution %q", ref.ID)
		}
	}
	a.run = r
	r.inlet.writer = a
	return a, nil
}

// Lost is closed when another writer took over.
func (a *Attachment) Lost() <-chan struct{} { return a.lost }

// Err says why the attachment was lost: a fault FailedPrecondition
// (WRITER_TAKEN_OVER). nil as long as it was not.
func (a *Attachment) Err() error { return a.cause() }

// within makes a context that also ends when the attachment is lost.
func (a *Attachment) within(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	undo := a.whenLost(func() { cancel(a.Err()) })
	return ctx, func() {
		undo()
		cancel(nil)
	}
}

// Write writes a piece of input as WriteInput does.
func (a *Attachment) Write(ctx context.Context, in Input) (InputState, error) {
	if err := a.Err(); err != nil {
		return InputState{}, err
	}
	ctx, end := a.within(ctx)
	defer end()
	return a.service.WriteInput(ctx, a.ref, in)
}

// Resize changes the terminal's size as Service.Resize does.
func (a *Attachment) Resize(ctx context.Context, size TerminalSize) error {
	if err := a.Err(); err != nil {
		return err
	}
	ctx, end := a.within(ctx)
	defer end()
	return a.service.Resize(ctx, a.ref, size)
}

// Close gives the input to others. It may be called again.
func (a *Attachment) Close() {
	if a.run != nil {
		a.run.inlet.mu.Lock()
		if a.run.inlet.writer == a {
			a.run.inlet.writer = nil
		}
		a.run.inlet.mu.Unlock()
	}
	a.take(errDetached)
}
