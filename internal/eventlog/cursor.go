package eventlog

import (
	"errors"
	"io"
	"os"
)

// readAhead is the most that is read at a time, and so the most that a reader holds
// in memory. It must be more than a record. Two full records are enough: larger reads
// were not measurably faster, but add up when many clients stand still.
const readAhead = 64 << 10

// cursor walks over the records of one segment. The zero value is closed.
type cursor struct {
	log     *Log
	segment *segment
	file    *os.File
	// mark is where the next record begins, and what it must be to follow its
	// predecessor.
	mark
	// end and last are those of the segment when somebody last looked.
	end  int64
	last uint64
	// marked is the position of the last mark that this cursor knows of.
	marked int64
	// buffer is what was read ahead: the file from mark.position on.
	buffer []byte
	// reuse says that spare may be read into again and again; the data of a record is
	// then valid only until the next call.
	reuse bool
	spare []byte
}

// open goes to a place.
func (c *cursor) open(p place) error {
	file, err := os.Open(p.segment.path)
	if err != nil {
		return err
	}
	c.segment, c.file, c.end, c.last = p.segment, file, p.end, p.last
	c.mark, c.marked = p.mark, p.mark.position
	return nil
}

// close lets go of the file and of the buffer.
func (c *cursor) close() {
	if c.file != nil {
		_ = c.file.Close() // it was only read from
	}
	*c = cursor{log: c.log, reuse: c.reuse, spare: c.spare}
}

// next returns the next record. io.EOF means that there is none before end,
// errDamaged that what is there is not the record that must follow.
func (c *cursor) next() (record, error) {
	if c.position >= c.end || c.sequence > c.last {
		return record{}, io.EOF
	}
	r, size, err := decodeRecord(c.buffer)
	if errors.Is(err, errShort) {
		if err := c.fill(); err != nil {
			return record{}, err
		}
		r, size, err = decodeRecord(c.buffer)
	}
	if err != nil || r.sequence != c.sequence {
		return record{}, errDamaged
	}
	if r.kind == KindOutput {
		if r.offset != c.offsets[r.stream.index()] {
			return record{}, errDamaged
		}
		c.offsets[r.stream.index()] += int64(len(r.data))
	}
	c.sequence++
	c.position += int64(size)
	if c.buffer = c.buffer[size:]; len(c.buffer) == 0 {
		c.buffer = nil // who waits for more keeps no memory
	}
	if c.position >= c.marked+markStep {
		c.log.addMark(c.segment, c.mark)
		c.marked = c.position
	}
	return r, nil
}

// fill reads ahead. The beginning of a record that is still in the buffer is read
// again, so that records never lie in two pieces.
func (c *cursor) fill() error {
	n := min(c.end-c.position, readAhead)
	switch {
	case !c.reuse:
		// Fresh memory each time, for who got the records keeps them.
		c.buffer = make([]byte, n)
	case int64(len(c.spare)) < n:
		c.spare = make([]byte, n)
		fallthrough
	default:
		c.buffer = c.spare[:n]
	}
	read, err := c.file.ReadAt(c.buffer, c.position)
	c.buffer = c.buffer[:read]
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
