package local

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/disk"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guest/wire"
	"golang.org/x/sys/unix"
)

// bindSocket binds a unix socket at a path of any length.
func bindSocket(path string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	err = withShortPath(path, func(short string) error { return unix.Bind(fd, &unix.SockaddrUnix{Name: short}) })
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind the guest's socket: %w", err)
	}
	return os.NewFile(uintptr(fd), socketName), nil
}

// withShortPath calls f with a path for the same file that fits into a socket
// address, which has 108 bytes.
func withShortPath(path string, f func(string) error) error {
	if len(path) < 100 {
		return f(path)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return f("/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + filepath.Base(path))
}

// setup is the guest's setup message and the descriptors that go with it.
type setup struct {
	message *guestv1.Setup
	files   []*os.File
	disk    *disk.Disk // nil where there is no limit of disk
	layers  *os.File   // the first mount of the disk, until it is one of files
}

// newSetup is what a guest is told of itself; the rest is added.
func newSetup(id string, e *Engine, limits engine.Limits) *setup {
	s := &setup{message: &guestv1.Setup{
		Hostname: id, Seccomp: e.filter, Capabilities: keptCapabilities(), RuntimeDirectory: runtimeDirectory,
		ShmBytes: uint64(defaultShm), SingleUser: !e.root,
	}}
	if limits.MemoryBytes > 0 {
		s.message.ShmBytes = uint64(limits.MemoryBytes / 2) // it counts against the limit too
	}
	return s
}

// add takes over a file and returns its index in the message.
func (s *setup) add(f *os.File) uint32 {
	s.files = append(s.files, f)
	return uint32(len(s.files) - 1)
}

func (s *setup) close() {
	for _, f := range s.files {
		f.Close()
	}
	if s.layers != nil {
		s.layers.Close()
	}
	if s.disk != nil {
		_ = s.disk.Close() // it stays where it is mounted
	}
}

// send hands the setup over and waits until the guest has built the sandbox.
func (s *setup) send(ctx context.Context, socket *net.UnixConn) error {
	stop := context.AfterFunc(ctx, func() { _ = socket.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var frame bytes.Buffer
	if err := wire.Write(&frame, s.message); err != nil {
		return err
	}
	fds := make([]int, len(s.files))
	for i, f := range s.files {
		fds[i] = int(f.Fd())
	}
	n, _, err := socket.WriteMsgUnix(frame.Bytes(), unix.UnixRights(fds...), nil)
	if err == nil && n < frame.Len() {
		_, err = socket.Write(frame.Bytes()[n:])
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	errEnded := errors.New("the guest ended before the sandbox was built")
	if errors.Is(err, syscall.EPIPE) {
		return errEnded
	}
	if err != nil {
		return fmt.Errorf("send the guest its setup: %w", err)
	}
	result := new(guestv1.SetupResult)
	_, err = (&wire.Reader{R: bufio.NewReader(socket)}).Read(result)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET):
		return errEnded
	case err != nil:
		return fmt.Errorf("read how the guest's setup went: %w", err)
	case result.GetError() != "":
		return fault.New(fault.Internal, "SANDBOX_SETUP_FAILED", "%s", result.GetError())
	}
	return nil
}
