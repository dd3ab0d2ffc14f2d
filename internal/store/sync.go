package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// syncer makes commits survive a power cut: it syncs the write-ahead log, as SQLite
// itself would with synchronous=FULL, but once for everybody who waits.
type syncer struct {
	wal   string
	asked atomic.Uint64

	mu   sync.Mutex
	done uint64 // every Sync up to this number is served
}

// Sync makes all that was committed before it durable.
func (s *Store) Sync(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return s.syncer.sync()
}

func (y *syncer) sync() error {
	mine := y.asked.Add(1)
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.done >= mine {
		return nil // the one before synced for us as well
	}
	all := y.asked.Load()
	// Opened each time: SQLite may put another file in its place.
	f, err := os.OpenFile(y.wal, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		y.done = all
		return nil // nothing is in the log that is not in the database
	}
	if err != nil {
		return fmt.Errorf("sync state: %w", err)
	}
	defer f.Close()
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return fmt.Errorf("sync state: %w", err)
	}
	y.done = all
	return nil
}
