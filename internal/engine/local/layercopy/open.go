package layercopy

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// directory is one that is open to be read.
type directory struct {
	file    *os.File
	restore func()
}

func (d *directory) fd() int { return int(d.file.Fd()) }

func (d *directory) close() {
	d.restore()
	d.file.Close()
}

func (d *directory) stat() (*unix.Stat_t, error) {
	st := new(unix.Stat_t)
	return st, unix.Fstat(d.fd(), st)
}

// openDirectory opens a directory that is no link.
func openDirectory(at int, name string) (*directory, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	f, restore, err := openFile(at, name, unix.O_RDONLY|unix.O_DIRECTORY, &st)
	if err != nil {
		return nil, err
	}
	return &directory{f, restore}, nil
}

// openFile opens a file for reading. An ordinary user may have closed it to himself: then
// it is opened for the time until restore.
func openFile(at int, name string, flags int, st *unix.Stat_t) (*os.File, func(), error) {
	flags |= unix.O_NOFOLLOW | unix.O_CLOEXEC
	nothing := func() {}
	fd, err := unix.Openat(at, name, flags, 0)
	need := uint32(0o400)
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		need = 0o500
	}
	closed := os.Geteuid() != 0 && int(st.Uid) == os.Geteuid() && st.Mode&need != need
	if err == nil && !closed {
		return os.NewFile(uintptr(fd), name), nothing, nil
	}
	if err == nil {
		unix.Close(fd) // a directory that can be listed and not entered
	} else if !errors.Is(err, unix.EACCES) || !closed {
		return nil, nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	handle, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(handle)
	if err := unix.Chmod("/proc/self/fd/"+strconv.Itoa(handle), st.Mode&0o7777|need); err != nil {
		return nil, nil, &os.PathError{Op: "chmod", Path: name, Err: err}
	}
	fd, err = unix.Open("/proc/self/fd/"+strconv.Itoa(handle), flags&^unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), func() { _ = unix.Fchmod(fd, st.Mode&0o7777) }, nil // as it was
}
