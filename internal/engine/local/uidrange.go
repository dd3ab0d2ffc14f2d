package local

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/harvest-run/executord/internal/fault"
	"golang.org/x/sys/unix"
)

// idsPerSandbox is the size of a range of user and group ids.
const idsPerSandbox = 65536

// uidRanges gives each sandbox ids that no other sandbox on this host has. A range
// is held by an abstract socket that bears its number: the guest keeps it open, so
// that it is taken as long as the guest lives, for every executord on the host, and
// free the moment it dies.
type uidRanges struct {
	base, count uint32

	mu   sync.Mutex
	next uint32
}

// newUIDRanges checks the ranges. Each begins at a multiple of its size, so that those
// of two executords are the same or apart, never half of each.
func newUIDRanges(base, count uint32) (*uidRanges, error) {
	end := uint64(base) + uint64(count)*idsPerSandbox
	// The last range of all is left out: its last id means "no user" to the kernel.
	if base == 0 || base%idsPerSandbox != 0 || count == 0 || end > 1<<32-idsPerSandbox {
		return nil, fmt.Errorf("%d ranges of user ids from %d on: there must be one or more, from a multiple of %d that is not 0, up to %d at most",
			count, base, idsPerSandbox, uint64(1<<32-idsPerSandbox-1))
	}
	return &uidRanges{base: base, count: count}, nil
}

// claim takes a free range and returns its first id.
func (r *uidRanges) claim() (first uint32, held *os.File, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, nil, fmt.Errorf("hold a range of user ids: %w", err)
	}
	for range r.count {
		first = r.base + r.next*idsPerSandbox
		r.next = (r.next + 1) % r.count
		err := unix.Bind(fd, &unix.SockaddrUnix{Name: fmt.Sprintf("@executord-ids-%d", first)})
		if errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		if err != nil {
			unix.Close(fd)
			return 0, nil, fmt.Errorf("hold a range of user ids: %w", err)
		}
		return first, os.NewFile(uintptr(fd), "ids"), nil
	}
	unix.Close(fd)
	return 0, nil, fault.New(fault.Exhausted, "NO_FREE_USER_IDS", "all %d ranges of user ids are in use, one for each sandbox that is alive", r.count)
}
