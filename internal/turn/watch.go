package turn

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/harvest-run/executord/internal/journal"
)

// Watcher follows the journal of one turn at its own pace. It is for one goroutine.
type Watcher struct {
	*journal.Watcher
	service *Service
	ref     Ref
	ended   bool
}

// Watch follows a turn from behind a cursor on; nil is its start. Faults: NotFound,
// OutOfRange (CURSOR_IN_FUTURE).
func (s *Service) Watch(ctx context.Context, ref Ref, after *journal.Cursor) (*Watcher, error) {
	if err := s.check(ctx, ref); err != nil {
		return nil, err
	}
	w, err := s.journals.Watch(ref.ID, after)
	if errors.Is(err, journal.ErrClosed) {
		err = ErrClosed
	}
	if err != nil {
		return nil, err
	}
	return &Watcher{Watcher: w, service: s, ref: ref, ended: after != nil && w.AtEnd()}, nil
}

// Next returns the next event, waiting for it. io.EOF comes after the result; ErrClosed
// when the Service is closed; ctx's cause when ctx ends, after which Next may be called
// again.
func (w *Watcher) Next(ctx context.Context) (Event, error) {
	entry, err := w.Watcher.Next(ctx)
	switch {
	case errors.Is(err, io.EOF) && !w.ended:
		return w.storedResult(ctx)
	case errors.Is(err, journal.ErrClosed):
		return Event{}, ErrClosed
	case err != nil:
		return Event{}, err
	}
	e := decode(entry)
	w.ended = w.ended || e.Result != nil
	return e, nil
}

// storedResult is the last event of a journal whose own cannot be read.
func (w *Watcher) storedResult(ctx context.Context) (Event, error) {
	t, err := w.service.get(ctx, w.ref)
	if err != nil {
		return Event{}, err
	}
	if t.Result == nil {
		return Event{}, fmt.Errorf("the journal of turn %s has an end and no result", t.ID)
	}
	w.ended = true
	at := w.Cursor()
	at.Sequence++
	return Event{Cursor: at, Time: t.EndTime, Result: t.Result}, nil
}
