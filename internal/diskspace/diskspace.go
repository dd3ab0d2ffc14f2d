// Package diskspace says whether a file system has room for new work. It asks the
// kernel at most once a second, however often it is asked itself, and keeps no
// goroutine: room that comes back is seen by the next question.
package diskspace

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/harvest-run/executord/internal/fault"
)

const (
	// fresh is how long an answer of the kernel is good for.
	fresh = time.Second
	// retry is when a caller may come back.
	retry = 10 * time.Second
)

// Config of a Floor.
type Config struct {
	// Dir lies on the file system.
	Dir string
	// MinFree is how many bytes must be free; 0 looks at nothing.
	MinFree int64
	// Free asks for the free bytes of Dir's file system; nil asks the kernel.
	Free func(dir string) (int64, error)
}

// Floor is the least room that must be free.
type Floor struct {
	cfg Config

	mu   sync.Mutex
	at   time.Time // of the last answer
	free int64
	err  error
}

// New makes a Floor.
func New(cfg Config) *Floor {
	if cfg.Free == nil {
		cfg.Free = free
	}
	return &Floor{cfg: cfg}
}

// Check returns a fault Exhausted (DISK_FULL) while less than the floor is free. When
// that cannot be found out there is no fault: who writes will see.
func (f *Floor) Check() error {
	if f == nil || f.cfg.MinFree <= 0 {
		return nil
	}
	free, err := f.Free()
	if err != nil || free >= f.cfg.MinFree {
		return nil
	}
	return &fault.Error{
		Kind: fault.Exhausted, Reason: "DISK_FULL", RetryAfter: retry,
		Message: fmt.Sprintf("the disk under executord's state directory has %d bytes free, new work needs %d", free, f.cfg.MinFree),
	}
}

// Free is how many bytes an unprivileged user can write at most.
func (f *Floor) Free() (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); f.at.IsZero() || now.Sub(f.at) >= fresh {
		f.free, f.err = f.cfg.Free(f.cfg.Dir)
		f.at = now
	}
	return f.free, f.err
}

func free(dir string) (int64, error) {
	var stat unix.Statfs_t
	for {
		err := unix.Statfs(dir, &stat)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("look at the file system of %q: %w", dir, err)
		}
		return int64(stat.Bavail) * stat.Frsize, nil
	}
}
