package guest

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"golang.org/x/sys/unix"
)

// connect makes what the command's standard files are connected to, and puts the
// program's ends into attr. done gives those up, once the program has them; undo
// gives up everything.
func (c *command) connect(g *Guest, r *guestv1.StartRequest, attr *syscall.ProcAttr) (done, undo func(), err error) {
	if r.GetTerminal() != nil {
		t, err := openTerminal(r.GetTerminal())
		if err != nil {
			return nil, nil, terminalError(err)
		}
		line := uintptr(t.line)
		attr.Files = []uintptr{line, line, line}
		attr.Sys.Setctty, attr.Sys.Ctty = true, 0
		c.pipes = []*os.File{t.File}
		c.terminal = t
		c.input = newInput(t.File, t)
		return func() {}, func() { t.release(); t.Close() }, nil
	}
	var theirs []int
	done = func() {
		for _, fd := range theirs {
			unix.Close(fd)
		}
	}
	undo = func() {
		for _, p := range c.pipes {
			p.Close()
		}
		if c.input != nil {
			c.input.file.Close()
		}
	}
	refused := func(err error) (func(), func(), error) {
		done()
		undo()
		return nil, nil, refuse(guestv1.Error_KIND_EXHAUSTED, "make a pipe: %v", err)
	}
	attr.Files = []uintptr{g.null.Fd()}
	if r.GetStdin() {
		fd, w, err := inputPipe()
		if err != nil {
			return refused(err)
		}
		theirs = append(theirs, fd)
		c.input = newInput(w, nil)
		attr.Files[0] = uintptr(fd)
	}
	for range 2 {
		p, fd, err := outputPipe()
		if err != nil {
			return refused(err)
		}
		theirs = append(theirs, fd)
		c.pipes = append(c.pipes, p)
		attr.Files = append(attr.Files, uintptr(fd))
	}
	return done, undo, nil
}

// terminalError says why there is no terminal.
func terminalError(err error) error {
	if _, ok := errors.AsType[*startError](err); ok {
		return err
	}
	return resourceError(fmt.Errorf("open a terminal: %w", err))
}

// inputPipe makes a pipe: the descriptor of the end for the program, which must be a
// blocking one, and an end that is written without holding a thread.
func inputPipe() (r int, w *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return -1, nil, err
	}
	if err := unix.SetNonblock(p[1], true); err != nil {
		unix.Close(p[0])
		unix.Close(p[1])
		return -1, nil, err
	}
	w = os.NewFile(uintptr(p[1]), "input")
	// As in outputPipe: a file that cannot be waited for would not be written to the end.
	if err := w.SetWriteDeadline(time.Time{}); err != nil {
		w.Close()
		unix.Close(p[0])
		return -1, nil, err
	}
	return p[0], w, nil
}
