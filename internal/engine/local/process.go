package local

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// guestFile puts the guest binary into memory: started from there, it needs no path
// that a sandbox's root could see, and all guests share its pages.
func guestFile(binary []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("executor-guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3 every memfd may be executed
		fd, err = unix.MemfdCreate("executor-guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("put the guest into memory: %w", err)
	}
	w := os.NewFile(uintptr(fd), "executor-guest")
	defer w.Close() // a file that is open for writing cannot be executed
	if _, err := w.Write(binary); err != nil {
		return nil, fmt.Errorf("put the guest into memory: %w", err)
	}
	if err := unix.Fchmod(fd, 0o555); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		return nil, fmt.Errorf("seal the guest: %w", err)
	}
	return os.Open("/proc/self/fd/" + strconv.Itoa(fd))
}

// process is a guest as the host sees it: its descriptor stands for this one
// process even when its id is used again.
type process struct {
	pid   int
	child bool // this executord started it and must reap it
	fd    *os.File
}

// watchProcess wraps a pidfd so that waiting for its end holds no thread.
func watchProcess(pid, pidfd int, child bool) (*process, error) {
	if err := unix.SetNonblock(pidfd, true); err != nil {
		unix.Close(pidfd)
		return nil, err
	}
	return &process{pid: pid, child: child, fd: os.NewFile(uintptr(pidfd), "pidfd")}, nil
}

// wait returns true when the process has ended and, if it is a child, was reaped;
// false when stopWatching was called.
func (p *process) wait() bool {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Read(func(fd uintptr) bool { return ended(int(fd)) })
	if err != nil {
		return false
	}
	if p.child {
		var status syscall.WaitStatus
		for {
			if _, err := syscall.Wait4(p.pid, &status, 0, nil); err != syscall.EINTR {
				break
			}
		}
	}
	return true
}

// ended says whether the process of a pidfd has.
func ended(pidfd int) bool {
	poll := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(poll, 0)
	return err == nil && n > 0
}

// kill ends the process; process 1 of its namespace takes all others with it.
func (p *process) kill() {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { _ = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
}

func (p *process) stopWatching() { _ = p.fd.SetReadDeadline(time.Unix(1, 0)) }

// startTicks is when a process started, which together with its id names it for as
// long as the host runs. false if there is no such process, or it is a zombie.
func startTicks(pid int) (uint64, bool) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, false
	}
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return 0, false
	}
	ticks, err := strconv.ParseUint(fields[19], 10, 64)
	return ticks, err == nil
}

// findProcess opens the process that has this id and started then.
func findProcess(pid int, ticks uint64) (*process, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	// Checked after it was opened: from now on the id cannot pass to another.
	if now, ok := startTicks(pid); !ok || now != ticks {
		unix.Close(pidfd)
		return nil, os.ErrProcessDone
	}
	return watchProcess(pid, pidfd, false)
}
