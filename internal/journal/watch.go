package journal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/harvest-run/executord/internal/eventlog"
	"github.com/harvest-run/executord/internal/fault"
)

// Cursor is a place in a journal: behind the event that carries it.
type Cursor struct {
	Epoch    string
	Sequence uint64
}

// Event is an entry or a Gap.
type Event struct {
	Cursor Cursor
	Time   time.Time
	// Data belongs to the receiver and must not be changed.
	Data []byte
	// Gap, if not nil, says that entries are missing here.
	Gap *Gap
	// Last is behind which there is nothing.
	Last bool
}

// Gap says that entries are missing, and why.
type Gap struct {
	Reason GapReason
	// MissingEvents is 0 if it is not known.
	MissingEvents uint64
}

// GapReason says why entries are missing. The names are those of the API.
type GapReason string

// The reasons of gaps.
const (
	GapRetention    GapReason = "RETENTION"
	GapEpochChanged GapReason = "EPOCH_CHANGED"
	GapDamaged      GapReason = "DAMAGED"
)

// Watcher follows one journal at its own pace. It is for one goroutine.
type Watcher struct {
	journal *Journal
	reader  *eventlog.Reader
	cursor  Cursor
	pending *Event // to be told before what the reader has
	pieces  []byte // of the entry with this number, whose last one is to come
	number  uint64
	broken  GapReason // why entries may be missing here
	last    bool
	closed  bool
}

// Watch follows a journal from behind a cursor on; nil is its start. It shares the
// journal with its writer, and lets go of it when it is closed. A fault OutOfRange
// (CURSOR_IN_FUTURE) if the journal has not got there.
func (s *Set) Watch(id string, after *Cursor) (*Watcher, error) {
	j, err := s.Open(id)
	if err != nil {
		return nil, err
	}
	at := j.Cursor()
	w := &Watcher{journal: j, cursor: Cursor{Epoch: at.Epoch}}
	switch {
	case after == nil:
	case after.Epoch != at.Epoch:
		w.pending = &Event{Cursor: w.cursor, Time: time.Now(), Gap: &Gap{Reason: GapEpochChanged}}
	case after.Sequence > at.Sequence:
		j.Close()
		return nil, fault.New(fault.OutOfRange, "CURSOR_IN_FUTURE", "the log of %s %q has %d events, the cursor is at %d", s.cfg.What, id, at.Sequence, after.Sequence).
			With("sequence", fmt.Sprint(at.Sequence))
	default:
		w.cursor.Sequence = after.Sequence
	}
	// An entry is at least one record: so none behind the cursor lies before this.
	w.reader = j.log.NewReader(w.cursor.Sequence)
	return w, nil
}

// Next returns the next event, waiting for it. io.EOF comes after the last; ErrClosed
// when the Set is closed; ctx's cause when ctx ends, after which Next may be called again.
func (w *Watcher) Next(ctx context.Context) (Event, error) {
	if e := w.pending; e != nil {
		w.pending = nil
		return w.tell(*e), nil
	}
	for {
		if w.last {
			return Event{}, io.EOF
		}
		record, err := w.reader.Next(ctx)
		if errors.Is(err, eventlog.ErrClosed) {
			return Event{}, ErrClosed
		}
		if err != nil {
			return Event{}, err // also io.EOF, where the end itself could not be read
		}
		if e, ok := w.take(record); ok {
			return w.tell(e), nil
		}
	}
}

func (w *Watcher) tell(e Event) Event {
	w.cursor, w.last = e.Cursor, e.Last
	return e
}

// take puts the pieces of entries together; false if there is nothing to tell yet.
func (w *Watcher) take(record eventlog.Record) (Event, bool) {
	if record.Gap != nil {
		w.broken = GapRetention
		if record.Gap.Reason == eventlog.GapDamaged {
			w.broken = GapDamaged
		}
		w.pieces = nil
		return Event{}, false // how much is missing the next entry says
	}
	if len(record.Data) < headerSize {
		w.broken = GapDamaged
		return Event{}, false
	}
	number, data := binary.BigEndian.Uint64(record.Data), record.Data[headerSize:]
	if number <= w.cursor.Sequence {
		return Event{}, false
	}
	switch record.Kind {
	case kindEntry:
		w.pieces = nil
	case kindFirst:
		w.number, w.pieces = number, slices.Clone(data)
		return Event{}, false
	case kindNext, kindFinal:
		if w.pieces == nil || w.number != number {
			return Event{}, false // the rest of one that was lost
		}
		data = append(w.pieces, data...)
		if w.pieces = nil; record.Kind == kindNext {
			w.pieces = data
			return Event{}, false
		}
	}
	e := Event{Cursor: Cursor{w.cursor.Epoch, number}, Time: record.Time, Data: data, Last: w.isLast(record)}
	missing, why := number-w.cursor.Sequence-1, w.broken
	w.broken = ""
	if missing == 0 {
		return e, true
	}
	if why == "" {
		why = GapDamaged
	}
	w.pending = &e
	return Event{Cursor: Cursor{w.cursor.Epoch, number - 1}, Time: record.Time, Gap: &Gap{Reason: why, MissingEvents: missing}}, true
}

func (w *Watcher) isLast(record eventlog.Record) bool {
	return w.journal.log.Sealed() && record.Sequence == w.journal.log.Sequence()
}

// Cursor is that of the last event told.
func (w *Watcher) Cursor() Cursor { return w.cursor }

// AtEnd says whether nothing is behind the last event told, or behind the cursor.
func (w *Watcher) AtEnd() bool {
	return w.pending == nil && w.journal.Ended() && w.journal.Cursor() == w.cursor
}

// LastEventTime is when something was last added to the journal.
func (w *Watcher) LastEventTime() time.Time { return w.journal.LastTime() }

// Close gives the journal up. It may be called again.
func (w *Watcher) Close() {
	if !w.closed {
		w.closed = true
		_ = w.reader.Close() // of what was only read
		w.journal.Close()
	}
}
