package local

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// maxOpen bounds the directories that are open at a time while a tree is removed.
const maxOpen = 32

// removeTree removes a directory in which a sandbox could make what it liked, and in
// which nothing runs any more. os.RemoveAll holds a descriptor for each level: a
// sandbox that nests directories a hundred thousand deep would take all that
// executord has. Here what lies deep is first moved up. Links are removed, never
// followed.
func removeTree(dir string) error {
	parent, err := os.Open(filepath.Dir(dir))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	top, err := openOwn(parent, filepath.Base(dir))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer top.Close()
	r := &remover{top: top}
	if err := r.contents(top, 1); err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return os.Remove(dir)
}

// remover empties the directory top.
type remover struct {
	top    *os.File
	lifted int // how many directories from the deep it has got
}

// contents removes everything in a directory.
func (r *remover) contents(dir *os.File, depth int) error {
	for {
		// From the start each time: what is removed, or lifted into top, changes what
		// there is to read. A part at a time: a sandbox can make millions of names.
		if _, err := dir.Seek(0, io.SeekStart); err != nil {
			return err
		}
		names, err := dir.Readdirnames(1024)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := r.entry(dir, name, depth); err != nil {
				return err
			}
		}
	}
}

// entry removes one name and, if it is a directory, all that is in it.
func (r *remover) entry(dir *os.File, name string, depth int) error {
	err := unix.Unlinkat(int(dir.Fd()), name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) {
		return &os.PathError{Op: "unlink", Path: name, Err: err}
	}
	below, err := openOwn(dir, name)
	if err != nil {
		return err
	}
	if depth == maxOpen {
		below.Close()
		return r.lift(dir, name)
	}
	err = r.contents(below, depth+1)
	if err := errors.Join(err, below.Close()); err != nil {
		return err
	}
	if err := unix.Unlinkat(int(dir.Fd()), name, unix.AT_REMOVEDIR); err != nil {
		return &os.PathError{Op: "rmdir", Path: name, Err: err}
	}
	return nil
}

// lift moves a directory up into top.
func (r *remover) lift(dir *os.File, name string) error {
	for {
		r.lifted++
		to := "deep-" + strconv.Itoa(r.lifted)
		err := unix.Renameat(int(dir.Fd()), name, int(r.top.Fd()), to)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.ENOTDIR):
			// The name is taken, perhaps by an attempt before this one.
		default:
			return &os.LinkError{Op: "rename", Old: name, New: to, Err: err}
		}
	}
}

// openOwn opens a directory and makes sure that its entries can be removed: an
// ordinary user cannot look into those that the sandbox, or the overlay, closed to
// everybody, but as their owner can open them.
func openOwn(dir *os.File, name string) (*os.File, error) {
	const flags = unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	handle, err := unix.Openat(int(dir.Fd()), name, unix.O_PATH|flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(handle)
	var st unix.Stat_t
	if err := unix.Fstat(handle, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&0o700 != 0o700 {
		if err := unix.Chmod("/proc/self/fd/"+strconv.Itoa(handle), 0o700); err != nil {
			return nil, &os.PathError{Op: "chmod", Path: name, Err: err}
		}
	}
	fd, err := unix.Openat(handle, ".", unix.O_RDONLY|flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}
