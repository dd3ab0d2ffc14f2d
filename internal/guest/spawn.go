package guest

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// programSlack is how late the timers of a program may be, unless it says otherwise.
const programSlack = 50 * time.Microsecond

// spawner starts programs, all on one thread. That thread has given up what the
// programs must not have (capabilities, the right to gain privileges, system calls,
// the cgroup of the guest), so that they are born without it and a start costs
// nothing extra, while the other threads of the guest can still mount.
type spawner struct {
	requests chan spawnRequest
	done     sync.WaitGroup
}

type spawnRequest struct {
	path   string
	args   []string
	attr   *syscall.ProcAttr
	answer chan spawnAnswer
	// release, if not nil, is what a program that is traced is held for: it is answered
	// twice, when the program stands before its first instruction and when it was let go.
	release chan error
}

type spawnAnswer struct {
	pid int
	err error
}

// newSpawner starts the thread and runs confine on it, once.
func newSpawner(confine func() error) (*spawner, error) {
	s := &spawner{requests: make(chan spawnRequest)}
	ready := make(chan error)
	s.done.Go(func() {
		// Never unlocked: a thread that was confined must not run other goroutines,
		// so it ends with this one.
		runtime.LockOSThread()
		// Programs get the kernel's default, and not what the guest has for itself.
		err := errors.Join(unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(programSlack.Nanoseconds()), 0, 0, 0), confine())
		ready <- err
		if err != nil {
			return
		}
		for r := range s.requests {
			pid, err := syscall.ForkExec(r.path, r.args, r.attr)
			if err != nil || r.release == nil {
				r.answer <- spawnAnswer{pid, err}
				continue
			}
			r.holdFor(pid)
		}
	})
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("confine the thread that starts programs: %w", err)
	}
	return s, nil
}

// close ends the thread.
func (s *spawner) close() {
	close(s.requests)
	s.done.Wait()
}

// start starts a program and returns its process id.
func (s *spawner) start(path string, args []string, attr *syscall.ProcAttr) (int, error) {
	answer := make(chan spawnAnswer, 1)
	s.requests <- spawnRequest{path, args, attr, answer, nil}
	a := <-answer
	return a.pid, a.err
}
