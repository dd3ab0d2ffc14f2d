package local

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/cgroup"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guest/wire"
	"golang.org/x/sys/unix"
)

const (
	socketName = "guest.sock"
	recordName = "sandbox.json"
	// layerName is the directory of what the sandbox writes, with an upper and a work
	// directory for each overlay.
	layerName = "layer"
	// runtimeDirectory is where the guest keeps source files, in the sandbox.
	runtimeDirectory = "/run/executor"
	// defaultShm is the size of /dev/shm of a sandbox without a memory limit.
	defaultShm = 1 << 30
)

// record is what executord must know to find a sandbox again.
type record struct {
	Limits engine.Limits `json:"limits"`
	Groups cgroup.Paths  `json:"groups,omitzero"`
	// The guest: its process id, when it started, and in which run of the host. 0 and
	// empty until there is one.
	PID        int    `json:"pid"`
	StartTicks uint64 `json:"start_ticks"`
	Boot       string `json:"boot"`
}

// keptCapabilities are those of a Docker container: enough for package managers and
// for changing users, nothing that reaches beyond the sandbox.
func keptCapabilities() []uint32 {
	return []uint32{
		unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FSETID, unix.CAP_FOWNER, unix.CAP_MKNOD, unix.CAP_NET_RAW, unix.CAP_SETGID,
		unix.CAP_SETUID, unix.CAP_SETFCAP, unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_SYS_CHROOT, unix.CAP_KILL, unix.CAP_AUDIT_WRITE,
	}
}

// create makes a sandbox from nothing. On an error nothing of it is left.
func (e *Engine) create(ctx context.Context, spec engine.Spec) (_ *sandbox, err error) {
	limits := spec.Limits.Or(e.DefaultLimits())
	img, err := e.image()
	if err != nil {
		return nil, err
	}
	sb := e.newSandbox(spec.ID)
	sb.limits = limits
	defer func() {
		if err != nil {
			// The caller's context may be what ended this: the clean-up has its own.
			clean, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), time.Minute, errors.New("clean-up took too long"))
			defer cancel()
			err = errors.Join(err, sb.remove(clean))
			if sb.process != nil {
				sb.process.fd.Close()
			}
		}
	}()
	for _, tree := range append([]string{"/"}, img.Trees...) {
		for _, half := range []string{"upper", "work"} {
			dir := filepath.Join(sb.dir, layerName, overlayName(tree), half)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return nil, err
			}
			// The mode of the upper one is that of the sandbox's root: everybody in it
			// must get through, whatever umask executord was started with.
			if err := os.Chmod(dir, 0o755); err != nil {
				return nil, err
			}
		}
	}

	s := &setup{message: &guestv1.Setup{
		Hostname: spec.ID, Seccomp: e.filter, Capabilities: keptCapabilities(), RuntimeDirectory: runtimeDirectory,
		ShmBytes: uint64(defaultShm), SingleUser: !e.root,
	}}
	defer s.close()
	if limits.MemoryBytes > 0 {
		s.message.ShmBytes = uint64(limits.MemoryBytes / 2) // it counts against the limit too
	}
	attr := &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET |
			syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWCGROUP,
		// Without it the execve into the new user namespace drops all capabilities.
		Credential:  &syscall.Credential{NoSetGroups: !e.root},
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}},
		Setsid:      true,
	}
	if e.root {
		if err := e.grantGroups(sb, s, attr); err != nil {
			return nil, err
		}
	}
	listener, err := bindSocket(filepath.Join(sb.dir, socketName))
	if err != nil {
		return nil, err
	}
	s.message.ListenerFd = s.add(listener)

	socket, err := e.startGuest(sb, attr)
	if err != nil {
		return nil, err
	}
	defer func() { _ = socket.Close() }()
	// Before the guest knows what to do: if executord dies from here on, either the
	// guest notices the end of the socket and goes, or it is found by this record.
	if err := sb.writeRecord(); err != nil {
		return nil, err
	}
	if err := e.addLayers(s, sb, append([]string{"/"}, img.Trees...), img.Skeleton); err != nil {
		return nil, err
	}
	if err := s.send(ctx, socket); err != nil {
		return nil, err
	}
	return sb, nil
}

// grantGroups gives a sandbox its user ids and control groups.
func (e *Engine) grantGroups(sb *sandbox, s *setup, attr *syscall.SysProcAttr) error {
	first, held, err := e.uids.claim()
	if err != nil {
		return err
	}
	s.message.HeldFds = append(s.message.HeldFds, s.add(held))
	ids := []syscall.SysProcIDMap{{HostID: int(first), Size: idsPerSandbox}}
	attr.UidMappings, attr.GidMappings, attr.GidMappingsEnableSetgroups = ids, ids, true

	// Written down before they are made: wherever executord dies, they are found.
	sb.group = e.groups.Open(sb.id)
	if err := sb.writeRecord(); err != nil {
		return err
	}
	err = sb.group.Create(cgroup.Limits{
		MemoryBytes: sb.limits.MemoryBytes, PIDs: sb.limits.PIDs, CPUMillis: sb.limits.CPUMillis,
	}, int(first))
	if err != nil {
		return err
	}
	tasks, err := sb.group.OpenTasks()
	if err != nil {
		return fmt.Errorf("open control groups: %w", err)
	}
	for _, f := range tasks {
		s.message.TaskFds = append(s.message.TaskFds, s.add(f))
	}
	commands, err := sb.group.OpenCommands()
	if err != nil {
		return fmt.Errorf("open control groups: %w", err)
	}
	if commands != nil {
		i := s.add(commands)
		s.message.CgroupFd = &i
	}
	guest, err := sb.group.OpenGuest()
	if err != nil {
		return fmt.Errorf("open control groups: %w", err)
	}
	if guest != nil {
		s.hold(guest)
		attr.UseCgroupFD, attr.CgroupFD = true, int(guest.Fd())
	}
	return nil
}

// startGuest clones the guest into its namespaces, where it waits for its setup on
// the returned socket.
func (e *Engine) startGuest(sb *sandbox, attr *syscall.SysProcAttr) (*net.UnixConn, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "setup"), os.NewFile(uintptr(pair[1]), "setup")
	defer ours.Close()
	defer theirs.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	// What executord was started with, such as the sockets of a service manager or what
	// a shell forgot to close, would go on to the guest and from it to every command.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("keep open files from the guest: %w", err)
	}
	pidfd := -1
	attr.PidFD = &pidfd
	// No environment and nowhere to write: the guest must know nothing of the host.
	files := []uintptr{null.Fd(), null.Fd(), null.Fd(), theirs.Fd()}
	pid, _, err := syscall.StartProcess("/proc/self/fd/"+strconv.Itoa(int(e.guest.Fd())), []string{"executor-guest", "init"},
		&syscall.ProcAttr{Env: []string{}, Files: files, Sys: attr})
	if err != nil {
		return nil, fmt.Errorf("start the guest in new namespaces: %w", err)
	}
	if pidfd < 0 {
		if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			_, _ = syscall.Wait4(pid, nil, 0, nil)
			return nil, fmt.Errorf("open the guest's process: %w", err)
		}
	}
	if sb.process, err = watchProcess(pid, pidfd, true); err != nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		_, _ = syscall.Wait4(pid, nil, 0, nil)
		return nil, err
	}
	if err := unprotect(pid, "/proc/self/oom_score_adj"); err != nil {
		return nil, err
	}
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
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
		return fmt.Errorf("let the guest be killed for memory: %w", err)
	}
	return nil
}

// addLayers names the layers of each tree: as mounts that shift the ids on disk to
// those of the sandbox, so that all sandboxes share them, or for an ordinary user,
// who cannot make such mounts, as paths.
func (e *Engine) addLayers(s *setup, sb *sandbox, trees []string, skeleton string) error {
	var layer func(path string, readOnly bool) (*guestv1.Layer, error)
	if e.root {
		userns, err := os.Open("/proc/" + strconv.Itoa(sb.process.pid) + "/ns/user")
		if err != nil {
			return fmt.Errorf("open the guest's user namespace: %w", err)
		}
		defer userns.Close()
		layer = func(path string, readOnly bool) (*guestv1.Layer, error) {
			f, err := shiftedMount(path, int(userns.Fd()), readOnly)
			if err != nil {
				return nil, err
			}
			return &guestv1.Layer{Source: &guestv1.Layer_MountFd{MountFd: s.add(f)}}, nil
		}
	} else {
		layer = func(path string, _ bool) (*guestv1.Layer, error) {
			return &guestv1.Layer{Source: &guestv1.Layer_Path{Path: path}}, nil
		}
	}
	for _, tree := range trees {
		lower := tree
		if tree == "/" {
			lower = skeleton
		}
		below, err := layer(lower, true)
		if err != nil {
			return err
		}
		// One mount for each overlay: two of them may not share an upper's mount.
		own, err := layer(filepath.Join(sb.dir, layerName), false)
		if err != nil {
			return err
		}
		s.message.Overlays = append(s.message.Overlays, &guestv1.Overlay{
			Target: tree, Lower: []*guestv1.Layer{below}, Writable: own, WritableName: overlayName(tree),
		})
	}
	return nil
}

// overlayName is the directory of a tree's own layer.
func overlayName(tree string) string {
	if tree == "/" {
		return "root"
	}
	return "root" + strings.ReplaceAll(tree, "/", "-")
}

// shiftedMount clones the mount at path with the ids of a user namespace: what
// belongs to 0 on disk belongs to that namespace's root in the mount.
func shiftedMount(path string, userns int, readOnly bool) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("clone the mount of %s: %w", path, err)
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV, Userns_fd: uint64(userns)}
	if readOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("shift the ids of a mount of %s: %w", path, &shiftError{err})
	}
	return os.NewFile(uintptr(fd), path), nil
}

// shiftError marks that a file system has no id-mapped mounts.
type shiftError struct{ err error }

func (e *shiftError) Error() string { return e.err.Error() }
func (e *shiftError) Unwrap() error { return e.err }

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
	held    []*os.File
}

// add takes over a file and returns its index in the message.
func (s *setup) add(f *os.File) uint32 {
	s.files = append(s.files, f)
	return uint32(len(s.files) - 1)
}

// hold takes over a file that is not sent.
func (s *setup) hold(f *os.File) { s.held = append(s.held, f) }

func (s *setup) close() {
	for _, f := range append(s.files, s.held...) {
		f.Close()
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

// writeRecord writes down what is known by now. The old record is there until the
// new one is whole.
func (sb *sandbox) writeRecord() error {
	r := record{Limits: sb.limits}
	if sb.group != nil {
		r.Groups = sb.group.Paths()
	}
	if sb.process != nil {
		s, err := statOf(sb.process.pid)
		if err != nil {
			return fmt.Errorf("look at the guest's process: %w", err)
		}
		r.PID, r.StartTicks = sb.process.pid, s.ticks
		if r.Boot, err = bootID(); err != nil {
			return err
		}
	}
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := filepath.Join(sb.dir, recordName)
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
