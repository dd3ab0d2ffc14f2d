package guest

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// defaultPipe is what a pipe holds as the kernel makes it.
	defaultPipe = 64 << 10
	// largePipe lets a fast writer run on while it is being read: three times the
	// throughput of the default.
	largePipe = 1 << 20
)

// outputPipe makes a pipe: an end that is read without holding a thread, and the
// descriptor of the end for the program, which must be a blocking one.
func outputPipe() (r *os.File, w int, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, -1, err
	}
	if err := unix.SetNonblock(p[0], true); err != nil {
		unix.Close(p[0])
		unix.Close(p[1])
		return nil, -1, err
	}
	r = os.NewFile(uintptr(p[0]), "output")
	// Where the user has used up what epoll may watch, the file would be read like one
	// that never waits, and the first pause of the program would pass for its end.
	if err := r.SetReadDeadline(time.Time{}); err != nil {
		r.Close()
		unix.Close(p[1])
		return nil, -1, err
	}
	return r, p[1], nil
}

// pump moves what a program writes into a pipe to where it is kept. It returns at the
// end of the pipe or, when the pipe was given a deadline, with what was in it then.
func pump(pipe *os.File, to *source) {
	defer to.close()
	grown := false
	for {
		n, err := pipe.Read(to.space())
		to.commit(n)
		if n >= defaultPipe && !grown {
			// Only for those who fill it: the size of pipes is rationed per user, and
			// most commands hardly write. Refused where the ration is used up, which
			// costs only speed.
			grown = true
			control(pipe, func(fd int) { _, _ = unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, largePipe) })
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			pumpRest(pipe, to)
			return
		}
		if err != nil {
			return
		}
	}
}

// pumpRest moves what is in the pipe and no more: somebody who is none of ours holds
// the other end and may go on writing for ever.
func pumpRest(pipe *os.File, to *source) {
	left := 0
	control(pipe, func(fd int) {
		left, _ = unix.IoctlGetInt(fd, unix.TIOCINQ)
		if _, err := unix.IoctlGetInt(fd, unix.TIOCGPTN); err == nil {
			left = terminalRest // a terminal only tells of the first of its buffers
		}
	})
	for left > 0 {
		space := to.space()
		n, err := 0, error(nil)
		control(pipe, func(fd int) { n, err = unix.Read(fd, space) })
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n <= 0 {
			return
		}
		to.commit(n)
		left -= n
	}
}

// control calls f with the descriptor of a file that stays open meanwhile.
func control(file *os.File, f func(fd int)) {
	if raw, err := file.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { f(int(fd)) })
	}
}
