package guest

import (
	"os"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"golang.org/x/sys/unix"
)

const (
	// terminalPause lies between two attempts to write to a terminal that is full.
	terminalPause = 50 * time.Millisecond
	// terminalRest bounds what is taken from a terminal that others hold: more than the
	// kernel keeps of one.
	terminalRest = 256 << 10
	// maxSize is the most rows or columns that the kernel has room for.
	maxSize = 1<<16 - 1
)

// terminal is the guest's end of a pseudo-terminal, and the program's as long as that
// has to stay open.
type terminal struct {
	*os.File
	// line is the program's end. The guest holds it too: a program may close all it has
	// of its terminal and open it again, and what reads the other end must not take
	// that for the end.
	line int
}

// openTerminal makes a terminal of the sandbox's own.
func openTerminal(size *guestv1.TerminalSize) (*terminal, error) {
	if err := checkSize(size); err != nil {
		return nil, err
	}
	// What runs in the sandbox may have put something else there; what is no terminal
	// refuses what follows.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	t := &terminal{File: os.NewFile(uintptr(fd), "terminal"), line: -1}
	err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, winsize(size))
	}
	if err == nil {
		// By the file and not by a path, which could lead elsewhere.
		line, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
		if t.line = int(line); errno != 0 {
			t.line, err = -1, errno
		}
	}
	if err == nil {
		err = t.SetDeadline(time.Time{}) // as for a pipe
	}
	if err != nil {
		t.release()
		t.Close()
		return nil, err
	}
	return t, nil
}

// release gives up the program's end: once nobody else has it, what was written to it
// is read to its end.
func (t *terminal) release() {
	if t.line >= 0 {
		unix.Close(t.line)
		t.line = -1
	}
}

// resize changes the size; the kernel tells the programs in the foreground.
func (t *terminal) resize(size *guestv1.TerminalSize) error {
	err := checkSize(size)
	if err == nil {
		control(t.File, func(fd int) { err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, winsize(size)) })
	}
	return err
}

// foreground is the process group that the terminal's keys reach; 0 if there is none.
func (t *terminal) foreground() int {
	group := 0
	control(t.File, func(fd int) { group, _ = unix.IoctlGetInt(fd, unix.TIOCGPGRP) })
	return group
}

// endOfFile is what has to be written for a program to read an end of file. In a line
// that is not ended the first sign only ends that. Without lines there is no end of
// file, and the program sees the sign itself.
func (t *terminal) endOfFile(unended bool) []byte {
	const usual = 'D' - '@'
	sign, lines := byte(usual), true
	control(t.File, func(fd int) {
		if attributes, err := unix.IoctlGetTermios(fd, unix.TCGETS); err == nil {
			sign, lines = attributes.Cc[unix.VEOF], attributes.Lflag&unix.ICANON != 0
		}
	})
	if lines && unended {
		return []byte{sign, sign}
	}
	return []byte{sign}
}

func checkSize(size *guestv1.TerminalSize) error {
	if r, c := size.GetRows(), size.GetColumns(); r < 1 || r > maxSize || c < 1 || c > maxSize {
		return refuse(guestv1.Error_KIND_INVALID, "a terminal of %d by %d", r, c)
	}
	return nil
}

func winsize(size *guestv1.TerminalSize) *unix.Winsize {
	return &unix.Winsize{Row: uint16(size.GetRows()), Col: uint16(size.GetColumns())}
}
