package layercopy

import (
	"context"
	"errors"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// Settle takes out of a merged layer the marks of deleted names that hide nothing of the
// directory base, over which the layer lies. Where a directory has nothing below it the
// kernel would show such a mark as a name that there is not.
func Settle(ctx context.Context, layer, base string) error {
	dir, err := openDirectory(unix.AT_FDCWD, layer)
	if err != nil {
		return err
	}
	defer dir.close()
	// The base is the host's: links in the path to it are its owner's.
	below, err := os.OpenFile(base, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer below.Close()
	return settle(ctx, dir, below, "", 0)
}

// settle does that for a directory; below is nil if there is none at its path.
func settle(ctx context.Context, dir *directory, below *os.File, at string, depth int) error {
	if depth >= MaxDepth {
		return ErrTooDeep
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	opaque, err := isOpaque(dir.file)
	if err != nil {
		return &os.PathError{Op: "settle", Path: at, Err: err}
	}
	if opaque {
		below = nil
	}
	var marks, directories []string
	for {
		names, err := dir.file.Readdirnames(512)
		for _, name := range names {
			var st unix.Stat_t
			if err := unix.Fstatat(dir.fd(), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return &os.PathError{Op: "stat", Path: path.Join(at, name), Err: err}
			}
			switch {
			case st.Mode&unix.S_IFMT == unix.S_IFDIR:
				directories = append(directories, name)
			case st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 && !hides(below, name):
				marks = append(marks, name)
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(dir.fd(), &st); err != nil {
		return err
	}
	for _, name := range marks {
		if err := unix.Unlinkat(dir.fd(), name, 0); err != nil {
			return &os.PathError{Op: "unlink", Path: path.Join(at, name), Err: err}
		}
	}
	if len(marks) > 0 {
		if err := unix.UtimesNanoAt(dir.fd(), ".", []unix.Timespec{st.Atim, st.Mtim}, 0); err != nil {
			return err
		}
	}
	for _, name := range directories {
		if err := settleIn(ctx, dir, below, name, path.Join(at, name), depth); err != nil {
			return err
		}
	}
	return nil
}

func settleIn(ctx context.Context, dir *directory, below *os.File, name, at string, depth int) error {
	in, err := openDirectory(dir.fd(), name)
	if err != nil {
		return err
	}
	defer in.close()
	if below != nil {
		fd, err := unix.Openat(int(below.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if below = nil; err == nil {
			below = os.NewFile(uintptr(fd), name)
			defer below.Close()
		}
	}
	return settle(ctx, in, below, at, depth+1)
}

// hides says whether a mark of this name stands for something below.
func hides(below *os.File, name string) bool {
	var st unix.Stat_t
	return below != nil && unix.Fstatat(int(below.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil
}
