package execution

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/harvest-run/executord/internal/eventlog"
	"github.com/harvest-run/executord/internal/fault"
)

// Cursor is a place in a log: behind the event that carries it.
type Cursor struct {
	Epoch    string
	Sequence uint64
}

// Event is one entry of a log or a Gap. One of Started, Output, Gap, Warning and Result
// is set; none for an entry that a later executord wrote, of which only the place is known.
type Event struct {
	Cursor  Cursor
	Time    time.Time
	Started *Started
	Output  *Output
	Gap     *Gap
	Warning *Warning
	Result  *Result
}

// Started opens every log.
type Started struct{ Execution Ref }

// Output is a piece of one stream. Data is never changed afterwards.
type Output struct {
	// Stream is "stdout" or "stderr".
	Stream string
	Offset int64
	Data   []byte
}

// Gap says that something is missing.
type Gap struct {
	Reason GapReason
	// MissingEvents is 0 if it is not known.
	MissingEvents uint64
	// Resume says where each stream goes on.
	Resume []StreamPosition
}

// StreamPosition is a place in a stream.
type StreamPosition struct {
	Stream string
	Offset int64
}

// GapReason says why something is missing. The names are those of the API.
type GapReason string

// The reasons of gaps.
const (
	GapRetention    GapReason = "RETENTION"
	GapEpochChanged GapReason = "EPOCH_CHANGED"
	GapDamaged      GapReason = "DAMAGED"
)

// Watcher follows one log at its own pace. It is for one goroutine.
type Watcher struct {
	service *Service
	ref     Ref
	run     *run // whose audience it belongs to; nil if that had ended
	log     *logHandle
	reader  *eventlog.Reader
	cursor  Cursor
	first   *Event // to be told before what the reader has
	// forsaken, if not nil, is why nothing is going to be added to the log.
	forsaken error
	ended    bool
	closed   bool
}

// Watch follows an execution from behind a cursor on; nil is the log's start. A
// fault OutOfRange (CURSOR_IN_FUTURE) if the log has not got there.
func (s *Service) Watch(ctx context.Context, ref Ref, after *Cursor) (*Watcher, error) {
	handle, err := s.openLog(ctx, ref)
	if err != nil {
		return nil, err
	}
	w := &Watcher{service: s, ref: ref, log: handle, cursor: Cursor{Epoch: handle.Epoch()}}
	switch {
	case after == nil:
	case after.Epoch != handle.Epoch():
		w.first = &Event{Cursor: w.cursor, Time: time.Now(), Gap: &Gap{Reason: GapEpochChanged, Resume: []StreamPosition{{"stdout", 0}, {"stderr", 0}}}}
	case after.Sequence > handle.Sequence():
		defer handle.release()
		return nil, fault.New(fault.OutOfRange, "CURSOR_IN_FUTURE", "the log of execution %q has %d events, the cursor is at %d", ref.ID, handle.Sequence(), after.Sequence).
			With("sequence", fmt.Sprint(handle.Sequence()))
	default:
		w.cursor.Sequence = after.Sequence
	}
	w.reader = handle.NewReader(w.cursor.Sequence)
	if r, ok := s.find(ref.ID); ok && r.session == ref.Session {
		w.run = r
		r.audience.join(w, w.cursor.Sequence)
	} else if !handle.Sealed() {
		e, err := s.Get(ctx, ref)
		if err == nil && e.State != Ended {
			w.forsaken = s.forsaken(e)
		}
	}
	return w, nil
}

// Next returns the next event, waiting for it. io.EOF comes after the result;
// ErrClosed when the Service is closed; ctx's cause when ctx ends, after which Next
// may be called again.
func (w *Watcher) Next(ctx context.Context) (Event, error) {
	if w.run != nil && w.run.record.Policies.OnLimit == Block {
		w.run.audience.through(w, w.cursor.Sequence)
	}
	if w.first != nil {
		e := *w.first
		w.first = nil
		return e, nil
	}
	if w.ended {
		return Event{}, io.EOF
	}
	if w.forsaken != nil && w.cursor.Sequence >= w.log.Sequence() {
		return Event{}, w.forsaken
	}
	rec, err := w.reader.Next(ctx)
	switch {
	case errors.Is(err, eventlog.ErrClosed):
		return Event{}, ErrClosed
	case errors.Is(err, io.EOF):
		return w.storedResult(ctx, w.cursor.Sequence+1) // the Gap before told that the log's end is damaged
	case err != nil:
		return Event{}, err
	}
	e := Event{Cursor: Cursor{w.cursor.Epoch, rec.Sequence}, Time: rec.Time}
	switch {
	case rec.Gap != nil:
		e.Gap = gapOf(rec.Gap)
	case rec.Kind == eventlog.KindOutput:
		e.Output = &Output{Stream: streamName(rec.Stream), Offset: rec.Offset, Data: rec.Data}
	case rec.Kind == kindStarted:
		e.Started = &Started{Execution: w.ref}
	case rec.Kind == kindWarning:
		e.Warning = decodeWarning(rec.Data) // one in a form of later days is an entry like other unknown ones
	case rec.Kind == kindResult:
		if e.Result, err = decodeResult(rec.Data); err != nil {
			return w.storedResult(ctx, rec.Sequence)
		}
		w.ended = true
	}
	w.cursor = e.Cursor
	return e, nil
}

// storedResult is the last event of a log whose own cannot be read.
func (w *Watcher) storedResult(ctx context.Context, sequence uint64) (Event, error) {
	e, err := w.service.Get(ctx, w.ref)
	if err != nil {
		return Event{}, err
	}
	if e.Result == nil {
		return Event{}, fmt.Errorf("the log of execution %s has an end and no result", e.ID)
	}
	w.ended, w.cursor.Sequence = true, sequence
	return Event{Cursor: w.cursor, Time: e.EndTime, Result: e.Result}, nil
}

// Cursor is that of the last event told.
func (w *Watcher) Cursor() Cursor { return w.cursor }

// LastEventTime is when something was last added to the log.
func (w *Watcher) LastEventTime() time.Time { return w.log.LastTime() }

// Close gives the log up. It may be called again.
func (w *Watcher) Close() {
	if !w.closed {
		w.closed = true
		if w.run != nil {
			w.run.audience.leave(w, w.run.record.Policies.OnLimit == Block && !w.ended)
		}
		_ = w.reader.Close() // of what was only read
		w.log.release()
	}
}

func gapOf(g *eventlog.Gap) *Gap {
	out := &Gap{
		Reason: GapRetention, MissingEvents: g.MissingEvents,
		Resume: []StreamPosition{{"stdout", g.Resume[0]}, {"stderr", g.Resume[1]}},
	}
	if g.Reason == eventlog.GapDamaged {
		out.Reason = GapDamaged
	}
	return out
}

func streamName(s eventlog.Stream) string {
	if s == eventlog.Stderr {
		return "stderr"
	}
	return "stdout"
}
