package eventlog

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"time"
)

// Reader follows a log. It holds at most one file descriptor and one buffer of
// 64 KiB, or as much less as there is to read; at the end of a log that grows, where it
// gets what is in memory anyway, neither. Its methods must not be called at the same
// time.
type Reader struct {
	log    *Log
	want   uint64 // sequence of the next record to return
	cursor cursor
	closed bool

	following following
	// recalled is what was last returned from memory, to go on behind it in the file.
	recalled recalled
}

// recalled is a place behind a record.
type recalled struct {
	segment *segment
	next    mark
}

// NewReader starts reading behind a record: 0 is the log's start, Sequence its end.
// A sequence that is not there yet is waited for.
func (l *Log) NewReader(after uint64) *Reader {
	// max is for the greatest sequence that a client can make up.
	return &Reader{log: l, want: max(after, after+1), cursor: cursor{log: l}}
}

// Next returns the next record or Gap, and waits until there is one. Its errors are
// io.EOF behind the last record of a sealed log, ErrClosed when the Log or the Reader
// was closed, ctx's cause, and those of reading files, after which it may be called
// again.
func (r *Reader) Next(ctx context.Context) (Record, error) {
	var wake <-chan struct{}
	for {
		if ctx.Err() != nil {
			return Record{}, context.Cause(ctx)
		}
		rec, ok, err := r.TryNext()
		if ok || err != nil {
			return rec, err
		}
		if wake == nil {
			// What is appended from here on closes wake. What was appended just before
			// is found by looking once more.
			wake = r.log.waiting()
			continue
		}
		select {
		case <-wake:
			wake = nil
		case <-ctx.Done():
		}
	}
}

// TryNext returns the next record or Gap, or false if there is none yet. Its errors
// are those of Next, but for ctx's.
func (r *Reader) TryNext() (Record, bool, error) {
	for {
		if r.closed || r.log.closed.Load() {
			r.cursor.close()
			return Record{}, false, ErrClosed
		}
		if e, ok := r.log.recall(r.want); ok {
			if r.cursor.segment != nil {
				r.cursor.close()
			}
			r.recalled = recalled{e.segment, e.next}
			r.want++
			return e.public(), true, nil
		}
		rec, err := r.cursor.next()
		switch {
		case err == nil && rec.sequence < r.want:
			continue // between the mark and what was asked for
		case err == nil:
			r.want++
			return rec.public(), true, nil
		case errors.Is(err, errDamaged):
			return r.skip(r.cursor.segment), true, nil
		case !errors.Is(err, io.EOF):
			return Record{}, false, r.log.readError(err)
		}
		gap, more, err := r.advance()
		if gap.Gap != nil || !more {
			return gap, gap.Gap != nil, err
		}
	}
}

// Close lets go of what the Reader holds.
func (r *Reader) Close() error {
	r.cursor.close()
	r.closed = true
	r.log.leave(&r.following)
	return nil
}

// advance takes the cursor, which is at its end, to where there is more; it returns
// false if there is nothing more now, and a Gap if what is wanted cannot be read.
func (r *Reader) advance() (gap Record, more bool, err error) {
	l, c := r.log, &r.cursor
	if s := c.segment; s != nil {
		switch l.refresh(c) {
		case hasMore:
			return Record{}, true, nil
		case hasMoreLater:
			return Record{}, !l.atEnd(&r.following, r.want), nil
		case isCutOff:
			return r.skip(s), true, nil
		case isComplete:
			c.close()
		}
	}
	p, err := l.locate(r.want)
	if err != nil {
		return Record{}, false, err
	}
	if p.segment == nil && p.reason == 0 {
		return Record{}, !l.atEnd(&r.following, r.want), nil
	}
	if p.reason != 0 {
		return r.gap(p.reason, p.mark), true, nil
	}
	if at := &r.recalled; at.segment == p.segment && at.next.sequence == r.want {
		p.mark = at.next // rather than to read what it has again
	}
	err = c.open(p)
	if errors.Is(err, fs.ErrNotExist) {
		if l.wasDropped(p.segment) {
			return Record{}, true, nil // since it was located; look again
		}
		return r.skip(p.segment), true, nil
	}
	if err != nil {
		return Record{}, false, l.readError(err)
	}
	return Record{}, true, nil
}

// skip gives the rest of a segment up.
func (r *Reader) skip(s *segment) Record {
	r.cursor.close()
	return r.gap(GapDamaged, r.log.resumeAfter(s))
}

// gap is what to return when reading goes on at m.
func (r *Reader) gap(reason GapReason, m mark) Record {
	missing := m.sequence - r.want
	r.want = m.sequence
	return Record{
		Sequence: m.sequence - 1,
		Gap:      &Gap{Reason: reason, MissingEvents: missing, Resume: m.offsets},
	}
}

// public is the record as a Reader returns it.
func (r *record) public() Record {
	return Record{
		Sequence: r.sequence,
		Time:     time.Unix(0, r.time).UTC(),
		Kind:     r.kind,
		Stream:   r.stream,
		Offset:   r.offset,
		Data:     r.data,
	}
}
