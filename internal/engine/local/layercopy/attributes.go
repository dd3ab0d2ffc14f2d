package layercopy

import (
	"bytes"
	"errors"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// opaqueName marks a directory that hides what layers below have at its path. The
// overlays of sandboxes are mounted in user namespaces, which write no other names.
const opaqueName = "user.overlay.opaque"

// left are the attributes by which an overlay finds things in the layers below its own
// upper one. They mean nothing in a copy.
func left() []string {
	return []string{
		"user.overlay.origin", "user.overlay.impure", "user.overlay.nlink", "user.overlay.upper", "user.overlay.uuid",
		"user.overlay.redirect", "user.overlay.metacopy",
	}
}

func isOpaque(dir *os.File) (bool, error) {
	value := make([]byte, 8)
	n, err := unix.Fgetxattr(int(dir.Fd()), opaqueName, value)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ERANGE) {
		return false, nil
	}
	return err == nil && string(value[:n]) == "y", err
}

// attributes gives an open copy the owner, extended attributes, mode and times of st.
// The order matters: giving it away clears others.
func (c *copier) attributes(from, to *os.File, st *unix.Stat_t) error {
	if c.root {
		if err := unix.Fchown(int(to.Fd()), int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	if err := extended(int(from.Fd()), int(to.Fd())); err != nil {
		return err
	}
	if err := unix.Fchmod(int(to.Fd()), st.Mode&0o7777); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(int(to.Fd())), []unix.Timespec{st.Atim, st.Mtim}, 0)
}

// pathAttributes does that for what cannot be opened, and has no extended attributes that
// a sandbox can set.
func (c *copier) pathAttributes(dst *directory, name string, st *unix.Stat_t) error {
	if c.root {
		if err := unix.Fchownat(dst.fd(), name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	if st.Mode&unix.S_IFMT == unix.S_IFIFO {
		// Made by this process in a directory that nobody else has: it is no link.
		if err := unix.Fchmodat(dst.fd(), name, st.Mode&0o7777, 0); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(dst.fd(), name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

// extended copies extended attributes.
func extended(from, to int) error {
	names, err := sized(func(buf []byte) (int, error) { return unix.Flistxattr(from, buf) })
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return err
	}
	for raw := range bytes.SplitSeq(names, []byte{0}) {
		name := string(raw)
		if name == "" || slices.Contains(left(), name) {
			continue
		}
		value, err := sized(func(buf []byte) (int, error) { return unix.Fgetxattr(from, name, buf) })
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err == nil {
			err = unix.Fsetxattr(to, name, value, 0)
		}
		if err != nil {
			return &os.PathError{Op: "copy attribute " + strconv.Quote(name) + " of", Path: "a file", Err: err}
		}
	}
	return nil
}

// sized calls f with nothing, to hear how much there is, and with as much room.
func sized(f func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := f(nil)
		if err != nil || n == 0 {
			return nil, err
		}
		buf := make([]byte, n)
		if n, err = f(buf); errors.Is(err, unix.ERANGE) {
			continue
		}
		return buf[:max(n, 0)], err
	}
}
