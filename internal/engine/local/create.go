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
	"github.com/harvest-run/executord/internal/fault"
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

// create makes a sandbox: out of a guest that is ready, or from nothing. On an error
// nothing of it is left.
func (e *Engine) create(ctx context.Context, spec engine.Spec) (*sandbox, error) {
	if spec.Network != engine.NetworkHost { // a blank one has a network of its own
		if b := e.blanks.take(); b != nil {
			sb, err := e.createIn(ctx, spec, b)
			if err == nil || ctx.Err() != nil {
				return sb, err
			}
			// Whatever was wrong with it, a fresh one has it not, or tells it.
			e.cfg.Logger.Warn("a guest that was ready could not be used, another is made", "sandbox", spec.ID, "error", err)
		}
	}
	b, err := e.reserve(spec.ID)
	if fault.KindOf(err) == fault.Exhausted {
		// The last of the user ids may be those of a guest that nobody needs yet.
		if spare := e.blanks.take(); spare != nil {
			if err := spare.discard(ctx); err != nil {
				return nil, err
			}
			b, err = e.reserve(spec.ID)
		}
	}
	if err != nil {
		return nil, err
	}
	return e.createIn(ctx, spec, b)
}

// createIn makes a sandbox out of b, whose guest is forked if it is not yet, and which
// is used up.
func (e *Engine) createIn(ctx context.Context, spec engine.Spec, b *blank) (_ *sandbox, err error) {
	sb := e.newSandbox(spec.ID)
	sb.limits = spec.Limits.Or(e.DefaultLimits())
	sb.group, sb.process = b.group, b.process
	defer func() {
		if err != nil {
			// The caller's context may be what ended this: the clean-up has its own.
			clean, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), time.Minute, errors.New("clean-up took too long"))
			defer cancel()
			err = errors.Join(err, sb.remove(clean), b.forget())
			if sb.process != nil {
				sb.process.fd.Close()
			}
		}
	}()
	defer b.close()
	if err := sb.hold(spec); err != nil {
		return nil, err
	}
	s := newSetup(spec.ID, e, sb.limits)
	defer s.close()
	if b.ids != nil {
		s.message.HeldFds = append(s.message.HeldFds, s.add(b.ids))
		b.ids = nil
	}
	s.message.HostNetwork = spec.Network == engine.NetworkHost
	// Written down before there are control groups: wherever executord dies, they are found.
	rec, err := newRecordFile(sb)
	if err != nil {
		return nil, err
	}
	defer rec.close()
	waiting := b.process != nil
	if !waiting {
		if err := b.prepare(); err != nil {
			return nil, err
		}
	}

	// What takes no guest is made while it is being forked.
	var (
		beside errgroup.Group
		img    *hostimage.Image
	)
	beside.Go(func() (err error) {
		img, err = e.besideTheFork(ctx, sb, s, b, waiting)
		return err
	})
	if !waiting {
		err = b.fork(ctx, s.message.GetHostNetwork())
		sb.process = b.process
	}
	if err := errors.Join(err, beside.Wait()); err != nil {
		return nil, err
	}
	// Before the guest knows what to do: if executord dies from here on, either the
	// guest notices the end of the socket and goes, or it is found by this record.
	if err := errors.Join(rec.write(sb, e.boot), b.forget()); err != nil {
		return nil, err
	}
	if err := e.addLayers(s, sb, img); err != nil {
		return nil, err
	}
	if waiting {
		// It has shown no sign of life yet.
		limited, cancel := context.WithTimeoutCause(ctx, e.blanks.patience, errors.New("the guest that was ready did not answer"))
		defer cancel()
		ctx = limited
	}
	if err := s.send(ctx, b.setup); err != nil {
		return nil, err
	}
	return sb, nil
}

// besideTheFork makes what takes no guest: the layers' directories, the socket and the
// control groups of the commands with their limits; a guest that waited has its groups.
func (e *Engine) besideTheFork(ctx context.Context, sb *sandbox, s *setup, b *blank, waiting bool) (*hostimage.Image, error) {
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
	if !waiting {
		if err := sb.group.CreateForCommands(b.owner()); err != nil {
			return nil, err
		}
	}
	err = sb.group.Limit(cgroup.Limits{MemoryBytes: sb.limits.MemoryBytes, PIDs: sb.limits.PIDs, CPUMillis: sb.limits.CPUMillis})
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
