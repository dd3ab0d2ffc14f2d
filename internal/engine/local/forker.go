package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"time"

	"github.com/harvest-run/executord/internal/guest/forkserver"
	"golang.org/x/sys/unix"
)

// forker has guests forked by a small process (internal/guest/forkserver), which is
// started when it is first needed, and again if it was killed.
type forker struct {
	program *os.File
	turn    chan struct{} // has room for the one who asks

	// Of whoever has the turn: the process that runs, if one does.
	process *os.Process
	socket  *os.File
}

// newForker takes over the guest's program.
func newForker(program *os.File) *forker {
	return &forker{program: program, turn: make(chan struct{}, 1)}
}

// take waits for the turn, until leave is called.
func (f *forker) take(ctx context.Context) error {
	select {
	case f.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if ctx.Err() != nil {
		f.leave()
		return context.Cause(ctx)
	}
	return nil
}

func (f *forker) leave() { <-f.turn }

// fork starts a guest, which waits for its Setup on the socket. cgroup may be nil.
func (f *forker) fork(ctx context.Context, r forkserver.Request, setup, cgroup *os.File) (*process, error) {
	if err := f.take(ctx); err != nil {
		return nil, err
	}
	defer f.leave()
	for again := f.process != nil; ; again = false {
		if err := f.start(); err != nil {
			return nil, err
		}
		pid, pidfd, err := f.call(ctx, r, setup, cgroup)
		if err == nil {
			return watchProcess(pid, pidfd)
		}
		broken := errors.Is(err, forkserver.ErrBroken)
		if broken {
			// If it forked a guest and could not say so, that one sees its socket end.
			f.stop()
		}
		if broken && ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !broken || !again {
			return nil, fmt.Errorf("start the guest in new namespaces: %w", err)
		}
	}
}

// patience is how long a fork is waited for that nobody wants any more: it takes
// milliseconds, and a guest that is known is ended in order.
const patience = time.Second

// call asks the process that runs. If it does not answer within patience of the end of
// the context it is out of order.
func (f *forker) call(ctx context.Context, r forkserver.Request, setup, cgroup *os.File) (pid, pidfd int, err error) {
	limited := make(chan struct{})
	socket := f.socket
	stop := context.AfterFunc(ctx, func() {
		defer close(limited)
		_ = socket.SetDeadline(time.Now().Add(patience))
	})
	pid, pidfd, err = forkserver.Call(socket, r, setup, cgroup)
	if !stop() {
		<-limited
		_ = socket.SetDeadline(time.Time{})
	}
	return pid, pidfd, err
}

// start starts the process if none runs.
func (f *forker) start() error {
	if f.process != nil {
		return nil
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	theirs := os.NewFile(uintptr(pair[1]), "fork server")
	defer theirs.Close()
	if err := unix.SetNonblock(pair[0], true); err != nil {
		unix.Close(pair[0])
		return err
	}
	ours := os.NewFile(uintptr(pair[0]), "fork server")
	if f.process, err = f.startProcess(theirs); err != nil {
		ours.Close()
		return fmt.Errorf("start the process that forks guests: %w", err)
	}
	f.socket = ours
	if err := unprotect(f.process.Pid, "/proc/self/oom_score_adj"); err != nil {
		f.stop()
		return err
	}
	return nil
}

func (f *forker) startProcess(control *os.File) (*os.Process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	// What executord was started with, such as the sockets of a service manager or what
	// a shell forgot to close, would go on to the guests and from them to every command.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("keep open files from guests: %w", err)
	}
	// The path is as the new process sees it.
	return os.StartProcess("/proc/self/fd/"+strconv.Itoa(forkserver.Program), []string{"executor-guest", "fork"}, &os.ProcAttr{
		Env: []string{}, Files: []*os.File{null, null, null, control, f.program},
		// A signal to executord's terminal is not meant for it.
		Sys: &unix.SysProcAttr{Setsid: true},
	})
}

// stop ends the process. Guests that it forked go on living.
func (f *forker) stop() {
	if f.process == nil {
		return
	}
	f.socket.Close()
	_ = f.process.Kill() // it has nothing to lose, and may hang
	_, _ = f.process.Wait()
	f.process, f.socket = nil, nil
}

// close ends the process for good.
func (f *forker) close() error {
	_ = f.take(context.Background()) // whoever asks has its answer soon, or gives up with its context
	f.stop()
	return f.program.Close()
}

// unprotect takes from a process the protection from the host's out-of-memory killer
// that it inherited if the file, which is executord's, says so: what sandboxes run must
// not outlive the host's own programs.
func unprotect(pid int, file string) error {
	adjusted, err := os.ReadFile(file)
	if err != nil || !bytes.HasPrefix(adjusted, []byte("-")) {
		return err
	}
	if err := os.WriteFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", []byte("0"), 0); err != nil {
		return fmt.Errorf("let guests be killed for memory: %w", err)
	}
	return nil
}
