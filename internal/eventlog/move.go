package eventlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Move gives a log that was created ahead of its need, and that nobody reads yet, its
// place and its bounds: Create takes the file system far longer than a rename does. The
// new directory must not exist and lie on the same file system. The log must be empty,
// else it is refused; on an error it is where it was.
func (l *Log) Move(cfg Config) error {
	if err := cfg.complete(); err != nil {
		return fmt.Errorf("move event log %q: %w", l.dir, err)
	}
	l.writing.Lock()
	defer l.writing.Unlock()
	switch {
	case l.closed.Load():
		return fmt.Errorf("move event log %q: %w", l.dir, ErrClosed)
	case l.tail.sequence != 0 || len(l.segments) != 1:
		return fmt.Errorf("move event log %q: %w", l.dir, errors.New("it has records"))
	}
	if err := os.Rename(l.dir, cfg.Dir); err != nil {
		return fmt.Errorf("move event log %q: %w", l.dir, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dir, l.retainedBytes, l.segmentBytes = cfg.Dir, cfg.bound(), cfg.SegmentBytes
	l.segments[0].path = filepath.Join(cfg.Dir, filepath.Base(l.segments[0].path))
	return nil
}
