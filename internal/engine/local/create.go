package local

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/cgroup"
	"github.com/harvest-run/executord/internal/engine/local/hostimage"
	"github.com/harvest-run/executord/internal/guest/forkserver"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	socketName = "guest.sock"
	recordName = "sandbox.json"
	// layerName is the directory of what the sandbox writes, with an upper and a work
	// directory for each overlay.
	layerName = "layer"
	// diskName is the file in which those directories are if the sandbox has a limit of disk.
	diskName = "disk.ext4"
	// runtimeDirectory is where the guest keeps source files, in the sandbox.
	runtimeDirectory = "/run/executor"
	// defaultShm is the size of /dev/shm of a sandbox without a memory limit.
	defaultShm = 1 << 30
)

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
	sb := e.newSandbox(spec.ID)
	sb.limits = spec.Limits.Or(e.DefaultLimits())
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
	s := newSetup(spec.ID, e, sb.limits)
	defer s.close()
	request := forkserver.Request{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()), IDs: 1}
	if e.root {
		first, held, err := e.uids.claim()
		if err != nil {
			return nil, err
		}
		s.message.HeldFds = append(s.message.HeldFds, s.add(held))
		request = forkserver.Request{UID: first, GID: first, IDs: idsPerSandbox, Setgroups: true}
		sb.group = e.groups.Open(sb.id)
	}
	if spec.Network == engine.NetworkHost {
		request.HostNetwork, s.message.HostNetwork = true, true
	}
	// Written down before there are control groups: wherever executord dies, they are found.
	rec, err := newRecordFile(sb)
	if err != nil {
		return nil, err
	}
	defer rec.close()
	var guestGroup *os.File
	if sb.group != nil {
		if guestGroup, err = sb.group.CreateForGuest(); err != nil {
			return nil, err
		}
	}
	if guestGroup != nil {
		defer guestGroup.Close()
		request.Cgroup = true
	}
	ours, theirs, err := setupSocket()
	if err != nil {
		return nil, err
	}
	defer func() { _ = ours.Close() }()

	// What takes no guest is made while it is being forked.
	var (
		beside errgroup.Group
		img    *hostimage.Image
	)
	beside.Go(func() (err error) {
		img, err = e.besideTheFork(ctx, sb, s, int(request.UID))
		return err
	})
	sb.process, err = e.forker.fork(ctx, request, theirs, guestGroup)
	theirs.Close() // so that the end of the guest's is noticed
	if err := errors.Join(err, beside.Wait()); err != nil {
		return nil, err
	}
	// Before the guest knows what to do: if executord dies from here on, either the
	// guest notices the end of the socket and goes, or it is found by this record.
	if err := rec.write(sb, e.boot); err != nil {
		return nil, err
	}
	if err := e.addLayers(s, sb, img); err != nil {
		return nil, err
	}
	if err := s.send(ctx, ours); err != nil {
		return nil, err
	}
	return sb, nil
}

// besideTheFork makes what takes no guest: the layers' directories, the socket and the
// control groups of the commands, which belong to the user owner of the host.
func (e *Engine) besideTheFork(ctx context.Context, sb *sandbox, s *setup, owner int) (*hostimage.Image, error) {
	img, err := e.images.Prepare()
	if err != nil {
		return nil, err
	}
	if err := e.ownLayers(ctx, s, sb, img); err != nil {
		return nil, fmt.Errorf("make the layers of the sandbox: %w", err)
	}
	if s.message.GetHostNetwork() {
		if err := shareNames(filepath.Join(sb.dir, layerName, overlayName("/"), "upper")); err != nil {
			return nil, err
		}
	}
	listener, err := bindSocket(filepath.Join(sb.dir, socketName))
	if err != nil {
		return nil, err
	}
	s.message.ListenerFd = s.add(listener)
	if sb.group == nil {
		return img, nil
	}
	err = sb.group.CreateForCommands(cgroup.Limits{
		MemoryBytes: sb.limits.MemoryBytes, PIDs: sb.limits.PIDs, CPUMillis: sb.limits.CPUMillis,
	}, owner)
	if err != nil {
		return nil, err
	}
	tasks, err := sb.group.OpenTasks()
	if err != nil {
		return nil, fmt.Errorf("open control groups: %w", err)
	}
	for _, f := range tasks {
		s.message.TaskFds = append(s.message.TaskFds, s.add(f))
	}
	commands, err := sb.group.OpenCommands()
	if err != nil {
		return nil, fmt.Errorf("open control groups: %w", err)
	}
	if commands != nil {
		i := s.add(commands)
		s.message.CgroupFd = &i
	}
	return img, nil
}

// setupSocket is the pair over which a guest gets its Setup.
func setupSocket() (ours *net.UnixConn, theirs *os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	mine, theirs := os.NewFile(uintptr(pair[0]), "setup"), os.NewFile(uintptr(pair[1]), "setup")
	defer mine.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn.(*net.UnixConn), theirs, nil
}
