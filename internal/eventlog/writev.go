package eventlog

import (
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxBuffers is the most that Linux takes in one call (IOV_MAX).
const maxBuffers = 1024

func appendBuffer(buffers []unix.Iovec, p []byte) []unix.Iovec {
	if len(p) == 0 {
		return buffers
	}
	b := unix.Iovec{Base: &p[0]}
	b.SetLen(len(p))
	return append(buffers, b)
}

// pwritev writes all of the buffers at a position of a file: with one system call, if
// there are not too many and the disk does not fill up. It changes the buffers.
//
// unix.Pwritev would do, but makes its own list of buffers each time, and with it an
// allocation for each Append.
func pwritev(file *os.File, buffers []unix.Iovec, position int64) error {
	fd := file.Fd()
	for len(buffers) > 0 {
		// The position is passed in two halves. A 64-bit kernel takes it from the first.
		n, _, errno := unix.Syscall6(unix.SYS_PWRITEV, fd,
			uintptr(unsafe.Pointer(&buffers[0])), uintptr(min(len(buffers), maxBuffers)),
			uintptr(position), uintptr(uint64(position)>>32), 0)
		switch {
		case errno == unix.EINTR:
			continue
		case errno != 0:
			return &os.PathError{Op: "pwritev", Path: file.Name(), Err: errno}
		case n == 0:
			return &os.PathError{Op: "pwritev", Path: file.Name(), Err: io.ErrShortWrite}
		}
		position += int64(n)
		buffers = advance(buffers, int(n))
	}
	return nil
}

// advance takes the first n bytes away.
func advance(buffers []unix.Iovec, n int) []unix.Iovec {
	for n > 0 {
		first := &buffers[0]
		if size := int(first.Len); n < size {
			first.Base = &unsafe.Slice(first.Base, size)[n]
			first.SetLen(size - n)
			break
		}
		n -= int(first.Len)
		buffers = buffers[1:]
	}
	return buffers
}
