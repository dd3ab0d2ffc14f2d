package eventlog

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"sync/atomic"
	"time"
)

// Log is an open event log. Its methods may be called at the same time. A directory
// must not be open for appending twice. A Log that nobody appends to and reads from
// holds no file descriptor.
type Log struct {
	dir           string
	retainedBytes int64
	segmentBytes  int64
	epoch         epoch
	repaired      int64

	// writing is held while something is appended, synced or closed. Readers never
	// wait for it.
	writing sync.Mutex
	writer  writer

	// mu guards what readers need to know. It is held for moments only, never while
	// a file is used.
	mu sync.Mutex
	// segments are the kept ones, the oldest first. There is always one; the last is
	// the one being written and is not broken.
	segments []*segment
	// size is the sum of the segments' ends.
	size   int64
	tail   tally
	sealed bool
	// recent are the last records, if somebody follows them.
	recent recent
	// wake, if not nil, is closed when something changes. Only a waiting reader makes it.
	wake chan struct{}
	// closed is set under mu; it is atomic so that it can be looked at without.
	closed atomic.Bool
}

// Create makes a log and, if need be, its directory (mode 0700), whose parent must
// exist. If there is a log already, the error wraps fs.ErrExist.
func Create(cfg Config) (*Log, error) {
	l, err := create(cfg)
	if err != nil {
		return nil, fmt.Errorf("create event log %q: %w", cfg.Dir, err)
	}
	return l, nil
}

func create(cfg Config) (*Log, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	if err := os.Mkdir(cfg.Dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	bases, err := listSegments(cfg.Dir)
	if err != nil {
		return nil, err
	}
	for _, base := range bases {
		path := filepath.Join(cfg.Dir, segmentName(base))
		s, _, err := readSegment(path, base)
		if err != nil {
			return nil, err
		}
		// A header that was not completed is left by a Create that was killed. There
		// is nothing in it to lose.
		if !s.broken || s.end > segmentHeaderSize {
			return nil, fmt.Errorf("%q: %w", path, fs.ErrExist)
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l := newLogOf(cfg)
	if _, err := rand.Read(l.epoch[:]); err != nil {
		return nil, err
	}
	s := newSegment(cfg.Dir, tally{})
	file, err := createSegment(s, l.epoch)
	if err != nil {
		return nil, err
	}
	l.writer.file = file
	l.segments, l.size = []*segment{s}, s.end
	return l, nil
}

func newLogOf(cfg Config) *Log {
	l := &Log{dir: cfg.Dir, retainedBytes: cfg.bound(), segmentBytes: cfg.SegmentBytes}
	l.recent.abandon() // the first generation
	return l
}

// Remove deletes a log and its directory. A directory that is not there is not an
// error. No Log may be open for appending to it; readers find a Gap.
func Remove(dir string) error {
	bases, err := listSegments(dir)
	if err != nil {
		return fmt.Errorf("remove event log %q: %w", dir, err)
	}
	// The oldest first, so that what a crash leaves behind is a log that tells what
	// it has dropped.
	for _, base := range bases {
		err := os.Remove(filepath.Join(dir, segmentName(base)))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove event log %q: %w", dir, err)
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove event log %q: %w", dir, err)
	}
	return nil
}

// Epoch names this log. It is made at random by Create and never changes.
func (l *Log) Epoch() string { return hex.EncodeToString(l.epoch[:]) }

// Repaired is how many bytes of unfinished writes Open cut off.
func (l *Log) Repaired() int64 { return l.repaired }

// Sequence is that of the last record; 0 if there is none.
func (l *Log) Sequence() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tail.sequence
}

// LastTime is that of the last record; zero if there is none.
func (l *Log) LastTime() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.tail.sequence == 0 {
		return time.Time{}
	}
	return time.Unix(0, l.tail.time).UTC()
}

// Totals sums up all output that was ever appended.
func (l *Log) Totals() (stdout, stderr Total) {
	l.mu.Lock()
	defer l.mu.Unlock()
	start := l.segments[l.readableFrom(0)].start
	total := func(i int) Total {
		return Total{
			Size:    l.tail.streams[i].size,
			CRC32C:  l.tail.streams[i].crc,
			Dropped: start.streams[i].size,
		}
	}
	return total(0), total(1)
}

// Sealed says whether the last record was appended.
func (l *Log) Sealed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sealed
}

// Close ends appending and reading: waiting readers return with ErrClosed, and so does
// every later call that reads or appends. What was appended stays.
func (l *Log) Close() error {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	l.closed.Store(true)
	l.recent.abandon()
	wake := l.takeWake()
	l.mu.Unlock()
	if wake != nil {
		close(wake)
	}
	l.writer.writeback.group.Wait()
	if err := l.writer.close(); err != nil {
		return fmt.Errorf("close event log %q: %w", l.dir, err)
	}
	return nil
}

// active is the segment being written. The caller holds mu or writing.
func (l *Log) active() *segment { return l.segments[len(l.segments)-1] }

// readableFrom is the place of the first segment from i on that is not broken. The
// caller holds mu.
func (l *Log) readableFrom(i int) int {
	for l.segments[i].broken {
		i++
	}
	return i
}

// containing is the place of the segment in which a sequence lies or would lie; -1 if
// it is older than all. The caller holds mu.
func (l *Log) containing(sequence uint64) int {
	return sort.Search(len(l.segments), func(i int) bool { return l.segments[i].base > sequence }) - 1
}

// addMark remembers a place in a segment that was found by reading.
func (l *Log) addMark(s *segment, m mark) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s.addMark(m)
}

// waiting returns what will be closed at the next change.
func (l *Log) waiting() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.wake == nil {
		l.wake = make(chan struct{})
	}
	return l.wake
}

// takeWake returns what the caller must close once it has let go of mu; nil if nobody
// waits. The caller holds mu.
func (l *Log) takeWake() chan struct{} {
	wake := l.wake
	l.wake = nil
	return wake
}
