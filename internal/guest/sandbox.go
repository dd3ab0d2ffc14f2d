package guest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"syscall"
	"unsafe"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/confine"
	"github.com/harvest-run/executord/internal/guest/rootfs"
	"github.com/harvest-run/executord/internal/guest/wire"
	"golang.org/x/sys/unix"
)

// backlog is how many pipes may be dialled before the guest takes them: as many as it
// takes connections at a time.
const backlog = 1024

// maxSetupFDs is the most descriptors that come with a Setup.
const maxSetupFDs = 250

// RunInit is the guest as process 1 of a local sandbox: it reads its Setup from
// the given socket, builds the sandbox around itself, says so, and serves until it
// is killed. It returns only on an error, which executord has been told.
func RunInit(setupSocket int) error {
	// Enough to move output while requests are answered; more would only cost
	// memory in each of a thousand sandboxes.
	runtime.GOMAXPROCS(min(runtime.NumCPU(), 2))
	shrugOffSignals()
	socket := os.NewFile(uintptr(setupSocket), "setup")
	defer socket.Close()
	// What needs no setup is done while that is on its way and being read.
	var (
		early    sync.WaitGroup
		earlyErr error
	)
	early.Go(func() { earlyErr = loopbackUp() })
	rehearse(func() bool { return awaited(setupSocket) })
	setup, fds, err := receiveSetup(setupSocket)
	if err != nil {
		early.Wait()
		return err
	}
	listener, g, err := build(setup, fds)
	early.Wait()
	if !setup.GetHostNetwork() { // the host's loopback is not for the guest to touch, and it cannot
		err = errors.Join(err, earlyErr)
	}
	result := &guestv1.SetupResult{}
	if err != nil {
		result.Error = err.Error()
	}
	if err := errors.Join(err, wire.Write(socket, result)); err != nil {
		return err
	}
	socket.Close()
	return g.Serve(listener)
}

// shrugOffSignals gives every signal its default action, which the kernel does not
// carry out on process 1 for those who are in its namespace: what runs in the sandbox
// cannot end the guest. The Go runtime has handlers for nearly all of them and would
// take a SEGV that somebody sent for a fault of its own. A fault of its own still
// ends the guest.
func shrugOffSignals() {
	var byDefault [4]uint64 // the kernel's struct sigaction, all zero
	for sig := syscall.Signal(1); sig <= 64; sig++ {
		switch sig {
		case syscall.SIGURG, syscall.SIGCHLD: // the runtime's own, harmless
		default:
			_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&byDefault)), 0, 8, 0, 0)
		}
	}
}

// receiveSetup reads the one frame and the descriptors that come with its first bytes.
func receiveSetup(socket int) (*guestv1.Setup, []int, error) {
	r := &setupReader{socket: socket}
	setup := new(guestv1.Setup)
	if _, err := (&wire.Reader{R: r}).Read(setup); err != nil {
		return nil, nil, fmt.Errorf("read setup: %w", err)
	}
	return setup, r.fds, nil
}

// setupReader collects the descriptors that come along.
type setupReader struct {
	socket int
	fds    []int
}

func (r *setupReader) Read(p []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(maxSetupFDs*4))
	n, oobn, flags, _, err := unix.Recvmsg(r.socket, p, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return 0, err
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return 0, errors.New("more descriptors than expected")
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return 0, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return 0, err
		}
		r.fds = append(r.fds, fds...)
	}
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

// build makes the sandbox and the Guest in it.
func build(setup *guestv1.Setup, fds []int) (net.Listener, *Guest, error) {
	fd := func(i uint32, name string) (*os.File, error) {
		if int(i) >= len(fds) {
			return nil, fmt.Errorf("setup names descriptor %d of %d for %s", i, len(fds), name)
		}
		return os.NewFile(uintptr(fds[i]), name), nil
	}
	cfg := Config{RuntimeDirectory: setup.GetRuntimeDirectory()}
	thread := confine.Thread{Capabilities: setup.GetCapabilities(), Seccomp: setup.GetSeccomp()}
	for _, i := range setup.GetTaskFds() {
		f, err := fd(i, "tasks")
		if err != nil {
			return nil, nil, err
		}
		thread.Tasks = append(thread.Tasks, f)
	}
	if setup.CgroupFd != nil {
		f, err := fd(setup.GetCgroupFd(), "cgroup")
		if err != nil {
			return nil, nil, err
		}
		cfg.Cgroups = f
	}
	// Listening is the guest's own act: the socket is answered as long as the guest
	// lives, whatever becomes of executord.
	socket, err := fd(setup.GetListenerFd(), "listener")
	if err != nil {
		return nil, nil, err
	}
	if err := unix.Listen(int(socket.Fd()), backlog); err != nil {
		return nil, nil, fmt.Errorf("listen: %w", err)
	}
	listener, err := net.FileListener(socket)
	if err != nil {
		return nil, nil, fmt.Errorf("listen: %w", err)
	}
	socket.Close()
	listener.(*net.UnixListener).SetUnlinkOnClose(false)

	syscall.Umask(0o022)
	if err := forbidUserNamespaces(); err != nil {
		return nil, nil, err
	}
	if err := rootfs.Build(setup, fds); err != nil {
		return nil, nil, err
	}
	var (
		leaving sync.WaitGroup
		left    error
	)
	leaving.Go(func() { left = rootfs.LetGo() })
	g, err := inside(setup, cfg, thread)
	leaving.Wait()
	return listener, g, errors.Join(err, left)
}

// inside does what is done in the new root.
func inside(setup *guestv1.Setup, cfg Config, thread confine.Thread) (*Guest, error) {
	if err := unix.Sethostname([]byte(setup.GetHostname())); err != nil {
		return nil, fmt.Errorf("set the host name: %w", err)
	}
	if err := os.MkdirAll(setup.GetRuntimeDirectory(), 0o700); err != nil {
		return nil, err
	}
	// Hides the guest's memory and descriptors from root in the sandbox.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become undumpable: %w", err)
	}
	cfg.Confine = thread.Apply
	return New(cfg)
}

// forbidUserNamespaces keeps any from being made in the sandbox, whichever system call
// is tried: the filter cannot look into the arguments of clone3.
func forbidUserNamespaces() error {
	if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0); err != nil {
		return fmt.Errorf("forbid user namespaces: %w", err)
	}
	return nil
}

// loopbackUp brings up the sandbox's own loopback interface.
func loopbackUp() error {
	err := func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		ifr, err := unix.NewIfreq("lo")
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_UP)
		return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
	}()
	if err != nil {
		return fmt.Errorf("bring up the loopback interface: %w", err)
	}
	return nil
}
