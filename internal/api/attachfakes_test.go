package api

import (
	"context"
	"fmt"
	"time"

	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
)

// fakeAttachment is a writer of a fakeLog's input.
type fakeAttachment struct {
	fake   *fakeExecutions
	ref    execution.Ref
	writer string
	lost   chan struct{}
}

func (f *fakeExecutions) WriteInput(ctx context.Context, ref execution.Ref, in execution.Input) (execution.InputState, error) {
	if err := f.before(ctx, "WriteInput"); err != nil {
		return execution.InputState{}, err
	}
	l, err := f.log(ref)
	if err != nil {
		return execution.InputState{}, err
	}
	state, err := l.write(in)
	if err == nil && state.Committed == int64(l.room) && l.room > 0 {
		// As the real one: it waits a while for room.
		_, changed := l.from(0)
		select {
		case <-changed:
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	return state, err
}

func (l *fakeLog) write(in execution.Input) (execution.InputState, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	offset := int64(len(l.input))
	if in.Offset != nil {
		offset = *in.Offset
	}
	skip := int64(len(l.input)) - offset
	switch {
	case l.record.State == execution.Ended:
		return execution.InputState{}, fault.New(fault.FailedPrecondition, "EXECUTION_ENDED", "it has ended")
	case skip < 0:
		return execution.InputState{}, fault.New(fault.OutOfRange, "INPUT_OFFSET", "it is at %d", len(l.input)).With("committed_offset", fmt.Sprint(len(l.input)))
	}
	data := in.Data[min(skip, int64(len(in.Data))):]
	if l.closed && len(data) > 0 {
		return execution.InputState{}, fault.New(fault.FailedPrecondition, "STDIN_CLOSED", "it is closed")
	}
	if l.room > 0 {
		data = data[:min(len(data), l.room-len(l.input))]
	}
	l.input = append(l.input, data...)
	l.closed = l.closed || in.Close
	return execution.InputState{Committed: int64(len(l.input)), Closed: l.closed}, nil
}

func (l *fakeLog) written() (string, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.input), l.closed
}

// makeRoom has the input take so much.
func (l *fakeLog) makeRoom(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.room = n
	close(l.changed)
	l.changed = make(chan struct{})
}

func (f *fakeExecutions) Signal(ctx context.Context, ref execution.Ref, signal int32, scope execution.Scope, key idempotency.Key) error {
	if err := f.before(ctx, "Signal"); err != nil {
		return err
	}
	if _, err := f.log(ref); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.keys = append(f.keys, key)
	f.signals = append(f.signals, fmt.Sprint(signal, " ", scope))
	return nil
}

func (f *fakeExecutions) Attach(ctx context.Context, ref execution.Ref, writer string, takeOver bool) (Attachment, error) {
	if err := f.before(ctx, "Attach"); err != nil {
		return nil, err
	}
	if _, err := f.log(ref); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if old := f.writers[bare(ref)]; old != nil {
		if !takeOver && (writer == "" || writer != old.writer) {
			return nil, fault.New(fault.FailedPrecondition, "WRITER_ATTACHED", "another writer is attached")
		}
		close(old.lost)
	}
	if f.writers == nil {
		f.writers = make(map[execution.Ref]*fakeAttachment)
	}
	f.writers[bare(ref)] = &fakeAttachment{fake: f, ref: ref, writer: writer, lost: make(chan struct{})}
	return f.writers[bare(ref)], nil
}

func (f *fakeExecutions) attached(ref execution.Ref) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.writers[bare(ref)] != nil
}

func (a *fakeAttachment) Write(ctx context.Context, in execution.Input) (execution.InputState, error) {
	if err := a.Err(); err != nil {
		return execution.InputState{}, err
	}
	return a.fake.WriteInput(ctx, a.ref, in)
}

func (a *fakeAttachment) Resize(ctx context.Context, size execution.TerminalSize) error {
	if err := a.fake.before(ctx, "Resize"); err != nil {
		return err
	}
	a.fake.mu.Lock()
	defer a.fake.mu.Unlock()
	a.fake.sizes = append(a.fake.sizes, size)
	return nil
}

func (a *fakeAttachment) Lost() <-chan struct{} { return a.lost }

func (a *fakeAttachment) Err() error {
	select {
	case <-a.lost:
		return fault.New(fault.FailedPrecondition, "WRITER_TAKEN_OVER", "another writer has taken over")
	default:
		return nil
	}
}

func (a *fakeAttachment) Close() {
	a.fake.mu.Lock()
	defer a.fake.mu.Unlock()
	if a.fake.writers[bare(a.ref)] == a {
		delete(a.fake.writers, bare(a.ref))
	}
}
