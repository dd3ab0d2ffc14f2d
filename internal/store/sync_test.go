package store

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

func TestSyncServesEverybodyWhoAskedBefore(t *testing.T) {
	wal := filepath.Join(t.TempDir(), "wal")
	if err := os.WriteFile(wal, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	y := &syncer{wal: wal}
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if err := y.sync(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if y.done != 50 || y.asked.Load() != 50 {
		t.Errorf("%d of %d are served", y.done, y.asked.Load())
	}
}

// Who waited while another was syncing is served by one sync, not by its own.
func TestSyncIsShared(t *testing.T) {
	y := &syncer{wal: filepath.Join(t.TempDir(), "wal")}
	y.mu.Lock()
	var all sync.WaitGroup
	for range 10 {
		all.Go(func() {
			if err := y.sync(); err != nil {
				t.Error(err)
			}
		})
	}
	for y.asked.Load() < 10 {
	}
	y.done = 10 // as if the one who holds the lock had begun after all ten had asked
	y.mu.Unlock()
	// With no file to sync, only an unserved caller would notice; a directory in its
	// place makes that an error.
	if err := os.Mkdir(y.wal, 0o700); err != nil {
		t.Fatal(err)
	}
	all.Wait()
}

func TestSyncFails(t *testing.T) {
	dir := t.TempDir() // a directory cannot be opened for writing
	y := &syncer{wal: dir}
	if err := y.sync(); err == nil {
		t.Error("a log that cannot be synced was said to be")
	}
	if y.done != 0 {
		t.Error("a failed sync counts as done")
	}
	y.wal = filepath.Join(dir, "none")
	if err := y.sync(); err != nil {
		t.Errorf("with no log there is nothing to sync: %v", err)
	}
}

func TestSyncOfAnEndedContext(t *testing.T) {
	s, err := Open(t.Context(), Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if err := s.Sync(ctx); !errors.Is(err, cause) {
		t.Errorf("%v", err)
	}
	if err := s.Sync(t.Context()); err != nil {
		t.Error(err)
	}
}
