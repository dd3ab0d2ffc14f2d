package eventlog

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
)

// Open opens a log for reading and, unless it is sealed, appending. It cuts off what
// an unfinished write left at the end; see Repaired. If there is no log, the error
// wraps ErrNoLog.
//
// After a power cut, records can be gone that Append had returned for, and their
// sequences are then given to others. Who must know compares Sequence with what it
// has seen.
func Open(cfg Config) (*Log, error) {
	l, err := open(cfg)
	if err != nil {
		return nil, fmt.Errorf("open event log %q: %w", cfg.Dir, err)
	}
	return l, nil
}

func open(cfg Config) (*Log, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	l := newLogOf(cfg)
	epochs, err := l.readSegments()
	if err != nil {
		return nil, err
	}
	if err := l.dropBrokenEnd(); err != nil {
		return nil, err
	}
	l.epoch = epochs[len(l.segments)-1]
	l.connect(epochs)
	if err := l.readLast(); err != nil {
		return nil, err
	}
	for _, s := range l.segments {
		l.size += s.end
	}
	return l, nil
}

// readSegments looks at all files. The epochs are those of the segments.
func (l *Log) readSegments() ([]epoch, error) {
	bases, err := listSegments(l.dir)
	if err != nil {
		return nil, err
	}
	var epochs []epoch
	for _, base := range bases {
		s, e, err := readSegment(filepath.Join(l.dir, segmentName(base)), base)
		if err != nil {
			return nil, err
		}
		l.segments = append(l.segments, s)
		epochs = append(epochs, e)
	}
	return epochs, nil
}

// dropBrokenEnd deletes what begins with a broken header behind the last readable
// segment: the process was killed when it had begun a new segment, or a power cut
// took the header away.
func (l *Log) dropBrokenEnd() error {
	end := len(l.segments)
	for end > 0 && l.segments[end-1].broken {
		end--
	}
	if end == 0 {
		return ErrNoLog
	}
	// The last one first: should this be interrupted, the rest is still at the end.
	for i := len(l.segments) - 1; i >= end; i-- {
		if err := os.Remove(l.segments[i].path); err != nil {
			return err
		}
		l.repaired += l.segments[i].end
	}
	l.segments = l.segments[:end]
	return nil
}

// connect makes a log of the segments. Those that do not fit to the last count as
// broken.
func (l *Log) connect(epochs []epoch) {
	next := l.active()
	for i := len(l.segments) - 2; i >= 0; i-- {
		s := l.segments[i]
		s.last = l.segments[i+1].base - 1
		for n := range s.start.streams {
			if s.start.streams[n].size > next.start.streams[n].size {
				s.broken = true
			}
		}
		if epochs[i] != l.epoch {
			s.broken = true
		}
		if !s.broken {
			next = s
		}
	}
}

// readLast reads the last segment, to know what the log adds up to, and cuts off what
// is behind the last whole record.
func (l *Log) readLast() error {
	s := l.active()
	l.tail = s.start
	c := cursor{log: l, reuse: true}
	if err := c.open(place{segment: s, mark: s.marks[0], end: s.end, last: math.MaxUint64}); err != nil {
		return err
	}
	defer c.close()
	for !l.sealed {
		r, err := c.next()
		if errors.Is(err, io.EOF) || errors.Is(err, errDamaged) {
			break
		}
		if err != nil {
			return err
		}
		l.tail.sequence, l.tail.time = r.sequence, r.time
		if r.kind == KindOutput {
			t := &l.tail.streams[r.stream.index()]
			t.size += int64(len(r.data))
			t.crc = checksum(t.crc, r.data)
		}
		l.sealed = r.flags&flagLast != 0
	}
	s.last = l.tail.sequence
	if c.position < s.end {
		if err := os.Truncate(s.path, c.position); err != nil {
			return err
		}
		l.repaired += s.end - c.position
		s.end = c.position
	}
	return nil
}
