package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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
	pid int
	fd  *os.File
}

// watchProcess wraps a pidfd so that waiting for its end holds no thread.
func watchProcess(pid, pidfd int) (*process, error) {
	if err := unix.SetNonblock(pidfd, true); err != nil {
		unix.Close(pidfd)
		return nil, err
	}
	return &process{pid: pid, fd: os.NewFile(uintptr(pidfd), "pidfd")}, nil
}

// wait returns nil when the process has ended and, if it is a child of this one, was
// reaped; an error when the context ended or stopWatching was called before.
func (p *process) wait(ctx context.Context) error {
	raw, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, p.stopWatching)
	defer stop()
	if err := raw.Read(func(fd uintptr) bool { return ended(int(fd)) }); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("wait for the guest's end: %w", err)
	}
	// A guest is a child of the process that forked it. Where that was killed, an
	// executord that is the host's first process, or stands for it, has its children.
	return raw.Control(func(fd uintptr) {
		for {
			if err := unix.Waitid(unix.P_PIDFD, int(fd), nil, unix.WEXITED|unix.WNOHANG, nil); err != unix.EINTR {
				return
			}
		}
	})
}

// ended says whether the process of a pidfd has.
func ended(pidfd int) bool {
	poll := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(poll, 0)
	return err == nil && n > 0
}

// hasEnded says whether the process has.
func (p *process) hasEnded() bool {
	gone := true
	if raw, err := p.fd.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { gone = ended(int(fd)) })
	}
	return gone
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

// stat is what the host tells of a process.
type stat struct {
	// ticks is when it started, which together with its id names it for as long as
	// the host runs.
	ticks uint64
}

// statOf reads it, of a zombie too; os.ErrProcessDone if there is no such process.
func statOf(pid int) (stat, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return stat{}, os.ErrProcessDone
	}
	if err != nil {
		return stat{}, err
	}
	// The second field, the name in parentheses, may hold anything.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 {
		return stat{}, fmt.Errorf("process %d: cannot read its state %q", pid, text)
	}
	ticks, err := strconv.ParseUint(fields[19], 10, 64)
	return stat{ticks}, err
}

// bootID changes with every start of the host.
func bootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
}

// findProcess opens the process that has this id and started then, in that run of the
// host. os.ErrProcessDone means that it has ended.
func findProcess(pid int, ticks uint64, boot string) (*process, error) {
	now, err := bootID()
	if err != nil {
		return nil, err
	}
	if now != boot || pid <= 0 {
		return nil, os.ErrProcessDone
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	switch {
	case errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT):
		// The latter two: the id is now that of a thread.
		return nil, os.ErrProcessDone
	case err != nil:
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	p, err := watchProcess(pid, pidfd)
	if err != nil {
		return nil, err
	}
	// Checked after it was opened: from now on the id cannot pass to another.
	s, err := statOf(pid)
	if err == nil && s.ticks != ticks {
		err = os.ErrProcessDone
	}
	if err == nil {
		// By the descriptor and not by the state: the first thread of a process can be a
		// zombie long before the last one, and all that its namespace holds, is gone.
		if ended(pidfd) {
			err = errors.Join(p.wait(context.Background()), os.ErrProcessDone)
		}
	}
	if err != nil {
		p.fd.Close()
		return nil, err
	}
	return p, nil
}

// findListener opens the process that listens at a socket; os.ErrProcessDone means
// that nobody does.
func findListener(path string) (*process, error) {
	var pid int
	err := withShortPath(path, func(short string) error {
		conn, err := net.Dial("unix", short)
		if err != nil {
			return err
		}
		defer conn.Close()
		raw, err := conn.(*net.UnixConn).SyscallConn()
		if err != nil {
			return err
		}
		var peer *unix.Ucred
		control := raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
		if err := errors.Join(control, err); err != nil {
			return err
		}
		pid = int(peer.Pid)
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, os.ErrProcessDone
	}
	if err != nil {
		return nil, err
	}
	s, err := statOf(pid)
	if err != nil {
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	return findProcess(pid, s.ticks, boot)
}

// descendants counts the children of a process and theirs. All processes of a
// namespace descend from its process 1, which inherits the orphans.
func descendants(pid int) int {
	count := 0
	for todo := []int{pid}; len(todo) > 0; {
		last := len(todo) - 1
		lists, _ := filepath.Glob("/proc/" + strconv.Itoa(todo[last]) + "/task/*/children") // the pattern is well formed
		todo = todo[:last]
		for _, list := range lists {
			text, _ := os.ReadFile(list) // one that ended meanwhile has none
			for field := range strings.FieldsSeq(string(text)) {
				if child, err := strconv.Atoi(field); err == nil {
					todo = append(todo, child)
					count++
				}
			}
		}
	}
	return count
}
