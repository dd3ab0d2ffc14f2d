package guest

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"golang.org/x/sys/unix"
)

// A limit of open files must hold before a program's first instruction, and for good:
// hard and soft. The guest cannot lower its own for the time of a fork, because nobody in
// a sandbox can raise a hard limit again. The thread that starts programs may set the
// limits of no other process (the filter), and the runtime sets none in a child. So the
// program is started as one that is traced, which stops when it has been executed and
// before it does anything; another thread of the guest sets the limit, and the thread
// that started it, the tracer, lets it go. That costs no program in between, which would
// need memory, threads and time under the limits of the command.

// startLimited starts a program of which no process has more than openFiles files open;
// 0 means what the guest has. On an error there is no program.
func (s *spawner) startLimited(path string, args []string, attr *syscall.ProcAttr, openFiles uint64) (int, error) {
	if openFiles == 0 {
		return s.start(path, args, attr)
	}
	attr.Sys.Ptrace = true
	answer := make(chan spawnAnswer, 1)
	release := make(chan error, 1)
	s.requests <- spawnRequest{path, args, attr, answer, release}
	a := <-answer
	if a.err != nil {
		return 0, a.err
	}
	limit := unix.Rlimit{Cur: openFiles, Max: openFiles}
	err := unix.Prlimit(a.pid, unix.RLIMIT_NOFILE, &limit, nil)
	if errors.Is(err, unix.ESRCH) {
		err = nil // somebody killed it: its end is told as any other
	}
	if err != nil {
		err = refuse(guestv1.Error_KIND_INTERNAL, "limit the open files to %d: %v", openFiles, err)
	}
	release <- err
	a = <-answer
	return a.pid, a.err
}

// holdFor holds the program of the request for startLimited, on the tracer's thread. The
// caller keeps the reaper from taking the child away.
func (r spawnRequest) holdFor(pid int) {
	err := hold(pid)
	if err == nil {
		r.answer <- spawnAnswer{pid, nil}
		err = <-r.release
	}
	if err == nil {
		err = letGo(pid)
	}
	if err != nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		buried(pid)
	}
	r.answer <- spawnAnswer{pid, err}
}

// hold waits until the traced child has executed its program, so that it stands before
// its first instruction. Whoever else signals it meanwhile is not in the way.
func hold(pid int) error {
	for {
		sig, stopped, err := tracedStop(pid)
		if err != nil || !stopped || sig == syscall.SIGTRAP {
			return err // dead is what the reaper will tell
		}
		// The signal is its own affair, and what was to come comes after it.
		if err := ptrace(unix.PTRACE_CONT, pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
}

// tracedStop waits for a stop, or the end, of a traced child, and takes nothing away from
// the reaper. stopped is false at its end.
func tracedStop(pid int) (sig syscall.Signal, stopped bool, err error) {
	var info unix.Siginfo
	for {
		err = unix.Waitid(unix.P_PID, pid, &info, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT, nil)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return 0, false, fmt.Errorf("wait for the program to be executed: %w", err)
	}
	const cldTrapped, cldStopped = 4, 5
	if info.Code != cldTrapped && info.Code != cldStopped {
		return 0, false, nil
	}
	// si_status of struct siginfo, behind the code, the process id and the user id.
	const status = 24
	return syscall.Signal(*(*int32)(unsafe.Add(unsafe.Pointer(&info), status))), true, nil
}

// letGo ends the tracing. The program goes on as if it had never been traced.
func letGo(pid int) error {
	if err := ptrace(unix.PTRACE_DETACH, pid, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("let the program go: %w", err)
	}
	return nil
}

// ptrace does a request that a tracer's thread makes of a tracee.
func ptrace(request, pid int, sig syscall.Signal) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(pid), 0, uintptr(sig), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// buried takes away a child that was killed, which may stop once more before.
func buried(pid int) {
	for {
		var status syscall.WaitStatus
		_, err := syscall.Wait4(pid, &status, 0, nil)
		if err == nil && !status.Stopped() || err != nil && err != syscall.EINTR {
			return
		}
	}
}
