// Package confine takes away from one thread, and so from every program it starts,
// what code that nobody trusts must not have. It is linked into the guest: x/sys
// and the standard library only.
package confine

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxRecords is the kernel's BPF_MAXINSNS.
const maxRecords = 4096

// Thread says what the calling thread gives up and joins. Whoever calls Apply has
// locked the goroutine to its thread and never unlocks it.
type Thread struct {
	// Capabilities to keep in the bounding set, by number; all others are dropped.
	Capabilities []uint32
	// Seccomp is the filter: struct sock_filter records. Empty loads none.
	Seccomp []byte
	// Tasks are tasks files of cgroup v1 hierarchies to join.
	Tasks []*os.File
}

// Apply confines the calling thread. The order matters: the cgroups need files that
// the filter's right to be loaded does not depend on, and after the filter nothing
// else may be possible.
func (t Thread) Apply() error {
	for _, f := range t.Tasks {
		// "0" moves the thread that writes, without the lock over all forks of the host
		// that naming a process would take.
		if _, err := f.Write([]byte("0")); err != nil {
			return fmt.Errorf("join the cgroup of %s: %w", f.Name(), err)
		}
	}
	if err := dropBounding(t.Capabilities); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return loadFilter(t.Seccomp)
}

// dropBounding leaves only keep in the bounding set: execve cannot give more to
// anybody, root included.
func dropBounding(keep []uint32) error {
	kept := make(map[uint32]bool, len(keep))
	for _, c := range keep {
		kept[c] = true
	}
	for c := uint32(0); c < 64; c++ {
		if kept[c] {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			return nil // past the last capability of this kernel
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return nil
}

// loadFilter loads the filter for the calling thread alone.
func loadFilter(program []byte) error {
	if len(program) == 0 {
		return nil
	}
	const record = int(unsafe.Sizeof(unix.SockFilter{}))
	if len(program)%record != 0 {
		return fmt.Errorf("seccomp filter of %d bytes is not a whole number of records", len(program))
	}
	if len(program)/record > maxRecords {
		return fmt.Errorf("seccomp filter has %d records, more than the %d that the kernel takes", len(program)/record, maxRecords)
	}
	prog := unix.SockFprog{
		Len:    uint16(len(program) / record),
		Filter: (*unix.SockFilter)(unsafe.Pointer(&program[0])),
	}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("load the seccomp filter: %w", errno)
	}
	return nil
}
