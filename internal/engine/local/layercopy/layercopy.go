// Package layercopy copies layers of overlays: what an overlay wrote into its upper
// directory, with all by which the kernel knows it again as a lower one. Owners, modes,
// times, attributes, links, holes, deleted names and directories that hide what is below
// them come out as they went in. Sockets are left out: nobody listens at a copy.
//
// What is copied must not change meanwhile. It may be hostile: nothing here follows a
// link, and no more than MaxDepth directories are open at a time.
package layercopy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// MaxDepth is how deep directories may lie in one another.
const MaxDepth = 256

// ErrTooDeep is in the error for a layer with deeper directories.
var ErrTooDeep = fmt.Errorf("directories lie more than %d deep", MaxDepth)

// Copy copies the layer in the directory from into the new directory to. skip, which may
// be nil, says what is left out, with all below it, by its path in the layer. On an error
// there is a part of the copy.
func Copy(ctx context.Context, from, to string, skip func(path string) bool) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	return run(ctx, from, to, skip, true)
}

// Merge adds to a copied layer what another shows through it that lies below: the two
// become one that looks the same.
func Merge(ctx context.Context, below, into string) error {
	return run(ctx, below, into, nil, false)
}

func run(ctx context.Context, from, to string, skip func(string) bool, attributes bool) (err error) {
	src, err := openDirectory(unix.AT_FDCWD, from)
	if err != nil {
		return err
	}
	defer src.close()
	dst, err := openDirectory(unix.AT_FDCWD, to)
	if err != nil {
		return err
	}
	defer dst.close()
	if skip == nil {
		skip = func(string) bool { return false }
	}
	c := &copier{ctx: ctx, skip: skip, top: dst, root: os.Geteuid() == 0, linked: make(map[inode]string)}
	if err := c.contents(src, dst, "", 0); err != nil {
		return err
	}
	if !attributes {
		return nil
	}
	st, err := src.stat()
	if err != nil {
		return err
	}
	return c.attributes(src.file, dst.file, st)
}

type inode struct{ device, number uint64 }

type copier struct {
	ctx    context.Context // of this one copy; nobody keeps it longer
	skip   func(string) bool
	top    *directory // of the copy
	root   bool       // may give files away
	linked map[inode]string
}

// contents copies or merges what is in a directory, which is at a path in the layer.
func (c *copier) contents(src, dst *directory, at string, depth int) error {
	if depth >= MaxDepth {
		return ErrTooDeep
	}
	for {
		names, err := src.file.Readdirnames(512)
		for _, name := range names {
			if c.ctx.Err() != nil {
				return context.Cause(c.ctx)
			}
			where := path.Join(at, name)
			if c.skip(where) {
				continue
			}
			if err := c.entry(src, dst, name, where, depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (c *copier) entry(src, dst *directory, name, where string, depth int) error {
	var st, there unix.Stat_t
	if err := unix.Fstatat(src.fd(), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "stat", Path: where, Err: err}
	}
	err := unix.Fstatat(dst.fd(), name, &there, unix.AT_SYMLINK_NOFOLLOW)
	switch {
	case err == nil:
		err = c.shine(src, dst, name, where, depth, &st, &there)
	case !errors.Is(err, unix.ENOENT):
		return &os.PathError{Op: "stat", Path: where, Err: err}
	default:
		err = c.create(src, dst, name, where, depth, &st)
	}
	if err == nil || errors.Is(err, ErrTooDeep) || c.ctx.Err() != nil {
		return err
	}
	if _, named := errors.AsType[*os.PathError](err); named {
		return err
	}
	return &os.PathError{Op: "copy", Path: where, Err: err}
}

// shine adds what of a name is seen through the layer above, which has it too: something
// only if both are directories and the upper one hides nothing.
func (c *copier) shine(src, dst *directory, name, where string, depth int, st, there *unix.Stat_t) error {
	if there.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	upper, err := openDirectory(dst.fd(), name)
	if err != nil {
		return err
	}
	defer upper.close()
	opaque, err := isOpaque(upper.file)
	if err != nil || opaque {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		lower, err := openDirectory(src.fd(), name)
		if err != nil {
			return err
		}
		defer lower.close()
		if err := c.contents(lower, upper, where, depth+1); err != nil {
			return err
		}
		if opaque, err = isOpaque(lower.file); err != nil || !opaque {
			return err
		}
	}
	// Here the one below ends what is seen of those below it.
	return unix.Fsetxattr(upper.fd(), opaqueName, []byte("y"), 0)
}

// create copies what the copy does not have.
func (c *copier) create(src, dst *directory, name, where string, depth int, st *unix.Stat_t) error {
	kind := st.Mode & unix.S_IFMT
	if st.Nlink > 1 && kind != unix.S_IFDIR {
		key := inode{st.Dev, st.Ino}
		if first, ok := c.linked[key]; ok && len(first) < unix.PathMax {
			err := unix.Linkat(c.top.fd(), first, dst.fd(), name, 0)
			if err == nil || !errors.Is(err, unix.EMLINK) {
				return err
			}
		}
		c.linked[key] = where
	}
	switch kind {
	case unix.S_IFDIR:
		return c.directory(src, dst, name, where, depth, st)
	case unix.S_IFREG:
		return c.regular(src, dst, name, st)
	case unix.S_IFLNK:
		return c.symlink(src, dst, name, st)
	case unix.S_IFSOCK:
		return nil
	default: // a named pipe, or the device that stands for a deleted name
		if err := unix.Mknodat(dst.fd(), name, st.Mode, int(st.Rdev)); err != nil {
			return err
		}
		return c.pathAttributes(dst, name, st)
	}
}

func (c *copier) directory(src, dst *directory, name, where string, depth int, st *unix.Stat_t) error {
	from, err := openDirectory(src.fd(), name)
	if err != nil {
		return err
	}
	defer from.close()
	if err := unix.Mkdirat(dst.fd(), name, 0o700); err != nil {
		return err
	}
	to, err := openDirectory(dst.fd(), name)
	if err != nil {
		return err
	}
	defer to.close()
	if err := c.contents(from, to, where, depth+1); err != nil {
		return err
	}
	return c.attributes(from.file, to.file, st)
}

func (c *copier) symlink(src, dst *directory, name string, st *unix.Stat_t) error {
	target := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(src.fd(), name, target)
	if err != nil {
		return err
	}
	if err := unix.Symlinkat(string(target[:n]), dst.fd(), name); err != nil {
		return err
	}
	return c.pathAttributes(dst, name, st)
}

func (c *copier) regular(src, dst *directory, name string, st *unix.Stat_t) (err error) {
	from, restore, err := openFile(src.fd(), name, unix.O_RDONLY|unix.O_NONBLOCK, st)
	if err != nil {
		return err
	}
	defer from.Close()
	defer restore()
	fd, err := unix.Openat(dst.fd(), name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	to := os.NewFile(uintptr(fd), name)
	defer func() { err = errors.Join(err, to.Close()) }()
	if err := c.data(from, to, st.Size); err != nil {
		return err
	}
	return c.attributes(from, to, st)
}
