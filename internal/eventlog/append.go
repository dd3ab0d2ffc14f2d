package eventlog

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// writer is what appending needs besides the Log. Log.writing guards it.
type writer struct {
	// file is the active segment; nil until something is appended.
	file *os.File
	// dirty says that the file may be longer than the segment's end: a write did not
	// succeed and could not be taken back. The rest could pass for records later.
	dirty bool
	// full says that the active segment must not be continued.
	full bool
	// marked is the position of the last mark.
	marked int64
	// writeback takes the files of complete segments.
	writeback writeback

	// What follows is kept from one Append to the next only to be used again.
	checksums checksums
	headers   []byte
	buffers   []unix.Iovec
	marks     []mark
	recent    []recentEntry
}

// keepEntries bounds what a writer keeps for the next Append.
const keepEntries = 1024

func (w *writer) close() error {
	if w.file == nil {
		return nil
	}
	file := w.file
	w.file = nil
	return file.Close()
}

// Append adds records, in one write. When it returns nil, readers see them and
// they survive the end of the process, however it ends. When it returns an error,
// the log is as it was, and a later Append may succeed. When the process ends before
// it returns, the first few of the records, or all, can be there.
func (l *Log) Append(now time.Time, entries ...Entry) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	if err := l.append(now, entries, 0); err != nil {
		return fmt.Errorf("append to event log %q: %w", l.dir, err)
	}
	return nil
}

// Seal adds the last record. When it returns nil, the whole log is on the disk and
// readers end behind that record. When it returns an error, the log is as it was,
// and a later Seal may succeed.
func (l *Log) Seal(now time.Time, last Entry) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	// Open reads the whole last segment. A small one makes that cheap for all the
	// finished logs that are looked into.
	if l.active().end > segmentHeaderSize+markStep {
		l.writer.full = true
	}
	if err := l.append(now, []Entry{last}, flagLast); err != nil {
		return fmt.Errorf("seal event log %q: %w", l.dir, err)
	}
	// Nothing is written any more. An error has nothing to tell after the sync.
	_ = l.writer.close()
	l.writer.writeback.group.Wait() // what it began is done, so it holds a file for no longer
	return nil
}

// Sync puts all that is kept on the disk. A sealed log can need it: it was sealed, but
// its process ended before Seal returned.
func (l *Log) Sync() error {
	l.writing.Lock()
	defer l.writing.Unlock()
	if l.closed.Load() {
		return fmt.Errorf("sync event log %q: %w", l.dir, ErrClosed)
	}
	if err := l.sync(); err != nil {
		return fmt.Errorf("sync event log %q: %w", l.dir, err)
	}
	return nil
}

// append does the work of Append and Seal. The caller holds writing, so that what mu
// guards cannot change and may be read without it.
func (l *Log) append(now time.Time, entries []Entry, flags uint8) error {
	if l.closed.Load() {
		return ErrClosed
	}
	if l.sealed {
		return ErrSealed
	}
	size := int64(0)
	for i := range entries {
		if err := entries[i].check(); err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		size += recordHeaderSize + int64(len(entries[i].Data))
	}
	if len(entries) == 0 {
		return nil
	}
	if err := l.prepare(size); err != nil {
		return err
	}
	w, active := &l.writer, l.active()
	tail := l.encode(now, entries, flags)
	w.dirty = true
	err := pwritev(w.file, w.buffers, active.end)
	if err == nil && flags&flagLast != 0 {
		err = l.sync()
	}
	defer w.release()
	if err != nil {
		return errors.Join(err, l.cutBack())
	}
	w.dirty = false

	l.mu.Lock()
	active.end += size
	active.last = tail.sequence
	for _, m := range w.marks {
		active.addMark(m)
		w.marked = m.position
	}
	l.recent.add(w.recent)
	l.size += size
	l.tail = tail
	l.sealed = flags&flagLast != 0
	wake := l.takeWake()
	l.mu.Unlock()
	if wake != nil {
		close(wake)
	}
	l.retain()
	return nil
}

func (e *Entry) check() error {
	switch {
	case len(e.Data) > MaxData:
		return fmt.Errorf("%d bytes of data are more than %d", len(e.Data), MaxData)
	case e.Kind == 0:
		return errors.New("kind is not set")
	case e.Kind == KindOutput && !e.Stream.valid():
		return fmt.Errorf("stream %d does not exist", e.Stream)
	}
	return nil
}

// prepare makes the active segment ready for size more bytes.
func (l *Log) prepare(size int64) error {
	w, active := &l.writer, l.active()
	if w.file == nil {
		file, err := os.OpenFile(active.path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		w.file = file
		l.mu.Lock()
		w.marked = active.marks[len(active.marks)-1].position
		l.mu.Unlock()
	}
	if w.dirty {
		if err := l.cutBack(); err != nil {
			return err
		}
	}
	if active.last < active.base {
		w.full = false // it has no record yet; its successor would have the same name
		return nil
	}
	if w.full || active.end+size > l.segmentBytes {
		return l.rotate()
	}
	return nil
}

// rotate begins a new segment. Nothing is synced here: records need not survive a
// power cut before Seal, and if one takes a part of a segment away, the next one's
// header still tells what is missing.
func (l *Log) rotate() error {
	w := &l.writer
	// If this fails and leaves a file behind, the sequence in its name must not come
	// into the old segment.
	w.full = true
	s := newSegment(l.dir, l.tail)
	file, err := createSegment(s, l.epoch)
	if err != nil {
		return err
	}
	if l.willStay() {
		w.writeback.begin(w.file)
	} else {
		_ = w.close() // all writes have succeeded
	}
	w.file, w.full, w.marked = file, false, segmentHeaderSize
	l.mu.Lock()
	defer l.mu.Unlock()
	l.segments = append(l.segments, s)
	l.size += s.end
	return nil
}

// createSegment makes the file of an empty segment.
func createSegment(s *segment, e epoch) (*os.File, error) {
	file, err := os.OpenFile(s.path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err := file.Write(encodeSegmentHeader(e, s.start)); err != nil {
		return nil, errors.Join(err, file.Close(), os.Remove(s.path))
	}
	return file, nil
}

// encode fills the writer's buffers and returns the tally behind the entries.
func (l *Log) encode(now time.Time, entries []Entry, flags uint8) tally {
	w, tail := &l.writer, l.tail
	// The buffers point into headers, which therefore must not move.
	w.headers = slices.Grow(w.headers[:0], len(entries)*recordHeaderSize)
	w.buffers = slices.Grow(w.buffers[:0], 2*len(entries))
	w.marks = w.marks[:0]
	followed := l.followed()
	position, marked := l.active().end, w.marked
	tail.time = now.UnixNano()
	for i := range entries {
		e := &entries[i]
		tail.sequence++
		if position >= marked+markStep {
			w.marks = append(w.marks, mark{tail.sequence, position, tail.sizes()})
			marked = position
		}
		r := record{sequence: tail.sequence, time: tail.time, kind: e.Kind, flags: flags, data: e.Data}
		var stream *streamTally
		if e.Kind == KindOutput {
			stream = &tail.streams[e.Stream.index()]
			r.stream, r.offset = e.Stream, stream.size
		}
		start := len(w.headers)
		w.headers = appendHeader(w.headers, &r)
		crc := checksum(0, w.headers[start+4:])
		if stream != nil {
			stream.size += int64(len(e.Data))
			crc, stream.crc = w.checksums.update(crc, stream.crc, e.Data)
		} else {
			crc = checksum(crc, e.Data)
		}
		setCRC(w.headers[start:], crc)
		w.buffers = appendBuffer(w.buffers, w.headers[start:])
		w.buffers = appendBuffer(w.buffers, e.Data)
		position += recordHeaderSize + int64(len(e.Data))
		if followed {
			// One piece for each record: a client that stands still then holds on only to
			// those that it was sent.
			r.data = slices.Clip(append([]byte(nil), e.Data...))
			w.recent = append(w.recent, recentEntry{r, l.active(), mark{tail.sequence + 1, position, tail.sizes()}})
		}
	}
	return tail
}

// release lets go of the entries' data, and of memory that only a large Append needs.
func (w *writer) release() {
	clear(w.buffers)
	clear(w.recent)
	w.recent = w.recent[:0]
	if cap(w.buffers) > 2*keepEntries {
		w.headers, w.buffers, w.recent = nil, nil, nil
	}
}

// cutBack takes away what a write left behind that did not succeed.
func (l *Log) cutBack() error {
	if err := l.writer.file.Truncate(l.active().end); err != nil {
		return err
	}
	l.writer.dirty = false
	return nil
}

// retain drops the oldest segments until the log is within its bound.
func (l *Log) retain() {
	if l.retainedBytes > 0 {
		l.drop(l.retainedBytes, math.MaxUint64)
	}
}

// drop drops the oldest segments until the log has at most size bytes, but none with
// records behind upTo, and not the active one.
func (l *Log) drop(size int64, upTo uint64) {
	for l.size > size && len(l.segments) > 1 && l.segments[1].base-1 <= upTo {
		l.mu.Lock()
		s := l.segments[0]
		s.dropped = true
		l.segments = slices.Delete(l.segments, 0, 1)
		l.size -= s.end
		l.mu.Unlock()
		if err := os.Remove(s.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			// What was appended is there all the same. The next Append tries again.
			l.mu.Lock()
			s.dropped = false
			l.segments = slices.Insert(l.segments, 0, s)
			l.size += s.end
			l.mu.Unlock()
			return
		}
	}
}

// sync puts all kept segments and their names on the disk.
func (l *Log) sync() error {
	active := l.active()
	for _, s := range l.segments {
		if s.synced || s.broken {
			continue
		}
		var err error
		if s == active && l.writer.file != nil {
			err = l.writer.file.Sync()
		} else {
			err = syncPath(s.path)
		}
		if err != nil {
			return err
		}
		s.synced = s != active || l.sealed
	}
	if err := syncPath(l.dir); err != nil {
		return err
	}
	return syncPath(filepath.Dir(l.dir))
}

func syncPath(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close())
}
