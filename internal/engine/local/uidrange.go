package local

import (
	"errors"
	"fmt"
	"os"
	"sync"

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
	return 0, nil, fmt.Errorf("all %d ranges of user ids are in use", r.count)
}
