// Package forkserver is the small process from which guests are forked, and the
// messages between it and executord. A clone into a new user namespace copies the page
// tables of the process that makes it: executord's own are large, and what it holds in
// memory is nobody else's business. It is linked into the guest: x/sys and the standard
// library only.
//
// It is the guest's program in another role. It lives as long as the socket that it is
// given; guests go on living without it.
package forkserver

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The descriptors that the process is started with, beside the standard ones, which
// are /dev/null.
const (
	// Control is the socket (SOCK_SEQPACKET) on which requests come.
	Control = 3
	// Program is the guest's program, open for reading.
	Program = 4
)

// Request asks for one guest in new namespaces. With it come the descriptors of the
// socket on which the guest gets its Setup, and if Cgroup is set of the directory of
// the cgroup v2 in which it is born.
type Request struct {
	// UID and GID are the first ids of the host that the guest's user namespace gets.
	UID, GID uint32
	// IDs is how many, from 0 on inside.
	IDs uint32
	// Setgroups allows that call inside, which takes the host's root.
	Setgroups bool
	// Cgroup says that a directory comes along.
	Cgroup bool
	// HostNetwork leaves the guest in the network that it is forked in.
	HostNetwork bool
}

const (
	requestSize = 16
	// maxAnswer bounds an answer.
	maxAnswer   = 4096
	setgroupBit = 1
	cgroupBit   = 2
	networkBit  = 4
	// guestSlack is how late the timers of a guest may be.
	guestSlack = time.Millisecond
)

// Encode is the request as it is sent.
func (r Request) Encode() []byte {
	var flags uint32
	if r.Setgroups {
		flags |= setgroupBit
	}
	if r.Cgroup {
		flags |= cgroupBit
	}
	if r.HostNetwork {
		flags |= networkBit
	}
	b := make([]byte, 0, requestSize)
	for _, n := range []uint32{r.UID, r.GID, r.IDs, flags} {
		b = binary.BigEndian.AppendUint32(b, n)
	}
	return b
}

func decode(b []byte) (Request, error) {
	if len(b) != requestSize {
		return Request{}, fmt.Errorf("a request of %d bytes", len(b))
	}
	flags := binary.BigEndian.Uint32(b[12:])
	return Request{
		UID: binary.BigEndian.Uint32(b), GID: binary.BigEndian.Uint32(b[4:]), IDs: binary.BigEndian.Uint32(b[8:]),
		Setgroups: flags&setgroupBit != 0, Cgroup: flags&cgroupBit != 0,
		HostNetwork: flags&networkBit != 0,
	}, nil
}

// Call sends a request over the socket and waits for the guest's process id and the
// descriptor that stands for its process. One call at a time is made on a socket.
// ErrBroken is in the chain if the process that forks is of no more use.
func Call(socket *os.File, r Request, setup, cgroup *os.File) (pid, pidfd int, err error) {
	fds := []int{int(setup.Fd())}
	if r.Cgroup {
		fds = append(fds, int(cgroup.Fd()))
	}
	conn, err := socket.SyscallConn()
	if err != nil {
		return 0, -1, errors.Join(ErrBroken, err)
	}
	var result error
	err = conn.Write(func(fd uintptr) bool {
		result = unix.Sendmsg(int(fd), r.Encode(), unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL)
		return result != unix.EAGAIN
	})
	if err := errors.Join(err, result); err != nil {
		return 0, -1, fmt.Errorf("%w: send: %w", ErrBroken, err)
	}
	answer, oob := make([]byte, maxAnswer), make([]byte, unix.CmsgSpace(4))
	var n, oobn int
	err = conn.Read(func(fd uintptr) bool {
		n, oobn, _, _, result = unix.Recvmsg(int(fd), answer, oob, unix.MSG_CMSG_CLOEXEC)
		return result != unix.EAGAIN
	})
	if err := errors.Join(err, result); err != nil {
		return 0, -1, fmt.Errorf("%w: receive: %w", ErrBroken, err)
	}
	got, err := rights(oob[:oobn])
	if err == nil {
		pid, err = decodeAnswer(answer[:n], len(got))
	}
	if err != nil {
		closeAll(got)
		return 0, -1, err
	}
	return pid, got[0], nil
}

// ErrBroken says that nothing more can be asked of this process.
var ErrBroken = errors.New("the process that forks guests has ended or is out of order")

// An answer is the process id, or 0, the number of an error and its text.
func encodeAnswer(pid int, err error) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(pid))
	if err == nil {
		return b
	}
	var errno syscall.Errno
	_ = errors.As(err, &errno)
	b = binary.BigEndian.AppendUint32(b, uint32(errno))
	text := err.Error()
	return append(b, text[:min(len(text), maxAnswer-len(b))]...)
}

func decodeAnswer(b []byte, fds int) (pid int, err error) {
	switch {
	case len(b) == 4 && fds == 1:
		if pid = int(int32(binary.BigEndian.Uint32(b))); pid > 0 {
			return pid, nil
		}
	case len(b) >= 8 && fds == 0:
		if errno := syscall.Errno(binary.BigEndian.Uint32(b[4:])); errno != 0 {
			return 0, errno
		}
		return 0, errors.New(string(b[8:]))
	}
	return 0, fmt.Errorf("%w: an answer of %d bytes with %d descriptors", ErrBroken, len(b), fds)
}

// rights are the descriptors in a control message.
func rights(oob []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrBroken, err)
	}
	var fds []int
	for _, m := range messages {
		if got, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// Run answers requests until the other end of the socket is closed.
func Run() error {
	runtime.GOMAXPROCS(1) // one request at a time
	// A guest inherits it from the thread that forks it, and all its threads do. A
	// runtime that looks every 20 µs, after each time that something happened, whether
	// somebody has to make room, would interrupt the programs beside it as often.
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(guestSlack.Nanoseconds()), 0, 0, 0); err != nil {
		return fmt.Errorf("let timers be late: %w", err)
	}
	// Not waited for: the kernel takes the dead away. Whoever wants to know has their
	// descriptors.
	signal.Ignore(syscall.SIGCHLD)
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("keep open files from guests: %w", err)
	}
	request, oob := make([]byte, requestSize+1), make([]byte, unix.CmsgSpace(2*4))
	for {
		n, oobn, _, _, err := unix.Recvmsg(Control, request, oob, unix.MSG_CMSG_CLOEXEC)
		switch {
		case err == unix.EINTR:
			continue
		case err == nil && n == 0 || err == unix.ECONNRESET: // the latter when an answer was never read
			return nil
		case err != nil:
			return fmt.Errorf("receive a request: %w", err)
		}
		if err := answer(request[:n], oob[:oobn]); err != nil {
			return fmt.Errorf("answer a request: %w", err)
		}
	}
}

// answer does one request and says how it went.
func answer(request, oob []byte) error {
	fds, err := rights(oob)
	defer func() { closeAll(fds) }()
	var r Request
	if err == nil {
		r, err = decode(request)
	}
	pid, pidfd := 0, -1
	if err == nil {
		pid, pidfd, err = fork(r, fds)
	}
	var along []byte
	if err == nil {
		defer unix.Close(pidfd)
		along = unix.UnixRights(pidfd)
	}
	text := encodeAnswer(pid, err)
	for {
		if err := unix.Sendmsg(Control, text, along, nil, unix.MSG_NOSIGNAL); err != unix.EINTR {
			return err
		}
	}
}

// fork clones a guest, which waits for its Setup on the socket.
func fork(r Request, fds []int) (pid, pidfd int, err error) {
	want := 1
	if r.Cgroup {
		want++
	}
	if len(fds) != want {
		return 0, -1, fmt.Errorf("a request with %d descriptors, not %d", len(fds), want)
	}
	pidfd = -1
	attr := &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET |
			syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWCGROUP,
		// Without it the execve into the new user namespace drops all capabilities.
		Credential:                 &syscall.Credential{NoSetGroups: !r.Setgroups},
		UidMappings:                []syscall.SysProcIDMap{{HostID: int(r.UID), Size: int(r.IDs)}},
		GidMappings:                []syscall.SysProcIDMap{{HostID: int(r.GID), Size: int(r.IDs)}},
		GidMappingsEnableSetgroups: r.Setgroups,
		Setsid:                     true,
		PidFD:                      &pidfd,
	}
	if r.HostNetwork {
		attr.Cloneflags &^= syscall.CLONE_NEWNET
	}
	if r.Cgroup {
		attr.UseCgroupFD, attr.CgroupFD = true, fds[1]
	}
	// No environment and nowhere to write: the guest must know nothing of the host.
	pid, _, err = syscall.StartProcess("/proc/self/fd/"+strconv.Itoa(Program), []string{"executor-guest", "init"},
		&syscall.ProcAttr{Env: []string{}, Files: []uintptr{0, 0, 0, uintptr(fds[0])}, Sys: attr})
	if err != nil {
		return 0, -1, err
	}
	if pidfd < 0 { // a kernel without CLONE_PIDFD
		if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			return 0, -1, fmt.Errorf("open the guest's process: %w", err)
		}
	}
	return pid, pidfd, nil
}
