package eventlog

import (
	"fmt"
	"io"
)

// place is where something can be read: in a segment, from a mark that is not behind
// it. With a reason, it cannot be read any more, and mark is where the log goes on.
// The zero place says that it is not there yet.
type place struct {
	segment *segment
	mark    mark
	end     int64
	last    uint64
	reason  GapReason
}

// locate finds a record; io.EOF if the log was sealed before it.
func (l *Log) locate(sequence uint64) (place, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if sequence > l.tail.sequence {
		if l.sealed {
			return place{}, io.EOF
		}
		return place{}, nil
	}
	i := l.containing(sequence)
	if i < 0 {
		return place{mark: l.segments[l.readableFrom(0)].marks[0], reason: GapRetention}, nil
	}
	s := l.segments[i]
	if s.broken {
		return place{mark: l.resumeAfterLocked(s), reason: GapDamaged}, nil
	}
	return place{segment: s, mark: s.markOf(sequence), end: s.end, last: s.last}, nil
}

// locateOffset finds a byte of a stream; io.EOF if there is no such byte yet.
func (l *Log) locateOffset(stream Stream, offset int64) (place, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := stream.index()
	if offset >= l.tail.streams[n].size {
		return place{}, io.EOF
	}
	for i := len(l.segments) - 1; i >= 0; i-- {
		if s := l.segments[i]; !s.broken && s.start.streams[n].size <= offset {
			return place{segment: s, mark: s.markAt(stream, offset), end: s.end, last: s.last}, nil
		}
	}
	return place{mark: l.segments[l.readableFrom(0)].marks[0], reason: GapRetention}, nil
}

// outlook says what is behind a cursor's end.
type outlook int

const (
	hasMore      outlook = iota + 1 // more can be read
	hasMoreLater                    // it is the segment being written
	isComplete                      // all of the segment was read
	isCutOff                        // the file is over, but not all of the segment was read
)

// refresh tells a cursor what has been appended to its segment.
func (l *Log) refresh(c *cursor) outlook {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.end, c.last = c.segment.end, c.segment.last
	switch {
	case c.sequence <= c.last && c.position < c.end:
		return hasMore
	case c.sequence <= c.last:
		return isCutOff
	case c.segment == l.active() && !l.sealed:
		return hasMoreLater
	}
	return isComplete
}

// resumeAfter is where reading goes on when the rest of a segment cannot be read: in
// the next readable segment or behind the last record.
func (l *Log) resumeAfter(s *segment) mark {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.resumeAfterLocked(s)
}

func (l *Log) resumeAfterLocked(s *segment) mark {
	for _, next := range l.segments[l.containing(s.base)+1:] {
		if !next.broken {
			return next.marks[0]
		}
	}
	active := l.active()
	m := mark{sequence: l.tail.sequence + 1, position: active.end, offsets: l.tail.sizes()}
	// Whoever comes to read what is appended from now on must not walk over the
	// damage again.
	if active.marks[len(active.marks)-1].sequence < m.sequence {
		active.marks = append(active.marks, m)
	}
	return m
}

// wasDropped says whether retention has dropped a segment.
func (l *Log) wasDropped(s *segment) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return s.dropped
}

func (l *Log) readError(err error) error {
	return fmt.Errorf("read event log %q: %w", l.dir, err)
}
