package layercopy

import (
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// piece is how much is copied before it is seen whether somebody still waits.
const piece = 64 << 20

// data copies what a file of this size has, and leaves its holes.
func (c *copier) data(from, to *os.File, size int64) error {
	if size == 0 {
		return nil
	}
	if unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) == nil {
		return nil // btrfs and xfs share it until one of them is written
	}
	if err := to.Truncate(size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		begin, err := unix.Seek(int(from.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // the rest is a hole
		}
		if err != nil {
			return err
		}
		end, err := unix.Seek(int(from.Fd()), begin, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		for at = begin; at < end; {
			if c.ctx.Err() != nil {
				return context.Cause(c.ctx)
			}
			n := min(end-at, piece)
			if err := copyRange(from, to, at, n); err != nil {
				return err
			}
			at += n
		}
	}
	return nil
}

// copyRange copies n bytes; the kernel does where it can.
func copyRange(from, to *os.File, at, n int64) error {
	if _, err := from.Seek(at, io.SeekStart); err != nil {
		return err
	}
	if _, err := to.Seek(at, io.SeekStart); err != nil {
		return err
	}
	_, err := io.CopyN(to, from, n)
	return err
}
