package eventlog

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
)

// ReadStream reads the bytes of one stream from an offset on. It fills p as far as
// they reach and are there; n can be 0 only with an error. The errors are io.EOF if
// nothing is there yet at the offset, also of a sealed log, *DroppedError if it is not
// there any more, ErrClosed, and those of reading files.
func (l *Log) ReadStream(s Stream, offset int64, p []byte) (n int, err error) {
	if !s.valid() {
		return 0, fmt.Errorf("read event log %q: stream %d does not exist", l.dir, s)
	}
	if offset < 0 {
		return 0, fmt.Errorf("read event log %q: offset %d is negative", l.dir, offset)
	}
	c := cursor{log: l, reuse: true}
	defer c.close()
	for n < len(p) && err == nil {
		var read int
		read, err = l.readStream(&c, s, offset+int64(n), p[n:])
		n += read
	}
	if n > 0 {
		return n, nil // the error, if it lasts, is for who asks for more
	}
	return 0, err
}

// readStream reads from the segment in which the offset lies.
func (l *Log) readStream(c *cursor, s Stream, offset int64, p []byte) (int, error) {
	if l.closed.Load() {
		return 0, ErrClosed
	}
	at, err := l.locateOffset(s, offset)
	if err != nil {
		return 0, err
	}
	if at.reason != 0 {
		return 0, &DroppedError{First: at.mark.offsets[s.index()]}
	}
	err = c.open(at)
	if errors.Is(err, fs.ErrNotExist) {
		// Whether it was dropped since it was located or was taken away.
		return 0, &DroppedError{First: l.resumeAfter(at.segment).offsets[s.index()]}
	}
	if err != nil {
		return 0, l.readError(err)
	}
	defer c.close()
	n := 0
	for n < len(p) {
		r, err := c.next()
		if n > 0 && err != nil {
			break // the next call finds out what it means
		}
		if errors.Is(err, io.EOF) || errors.Is(err, errDamaged) {
			// The segment's start says that the byte was here.
			return 0, &DroppedError{First: l.resumeAfter(at.segment).offsets[s.index()]}
		}
		if err != nil {
			return 0, l.readError(err)
		}
		if end := r.offset + int64(len(r.data)); r.stream == s && end > offset {
			n += copy(p[n:], r.data[max(0, offset-r.offset):])
		}
	}
	return n, nil
}
