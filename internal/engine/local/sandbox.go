package local

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/cgroup"
	"github.com/harvest-run/executord/internal/engine/local/disk"
)

// sandbox is one local sandbox.
type sandbox struct {
	engine  *Engine
	id      string
	dir     string
	limits  engine.Limits
	group   *cgroup.Group // nil for an ordinary user
	process *process
	layers  []string             // of its image, the uppermost first
	volumes []string             // the names of those that it has
	mounts  []engine.VolumeMount // of one that is being made
	loop    *int                 // the number of the loop device of its disk; nil if it has none

	done chan struct{} // closed when the guest has ended

	snapshots *snapshotting

	ending  chan struct{} // has room for the one Terminate that works
	ended   bool
	remains engine.Remains
}

func (e *Engine) newSandbox(id string) *sandbox {
	return &sandbox{engine: e, id: id, dir: e.sandboxDir(id), done: make(chan struct{}), ending: make(chan struct{}, 1), snapshots: newSnapshotting()}
}

// adopt finds a sandbox that an executord before this one made. If it is dead, or
// cannot be known because its record is damaged, what is left of it is removed. Any
// other error, such as that there are no descriptors left, must not end a sandbox.
func (e *Engine) adopt(id string) (*sandbox, error) {
	sb := e.newSandbox(id)
	r, err := readRecord(filepath.Join(sb.dir, recordName))
	if err == nil {
		sb.limits, sb.loop, sb.layers, sb.volumes = r.Limits, r.Loop, r.Layers, r.Volumes
		sb.process, err = findProcess(r.PID, r.StartTicks, r.Boot)
	}
	if e.groups != nil {
		sb.group = e.groups.OpenAt(id, r.Groups)
	}
	if err == nil {
		// An executord before this one may have died while it made a snapshot.
		if sb.group != nil {
			err = sb.group.Thaw()
		}
		if err != nil {
			sb.process.fd.Close()
			return nil, fmt.Errorf("open sandbox %s: %w", id, err)
		}
		return sb, nil
	}
	if errors.Is(err, errDamaged) {
		e.cfg.Logger.Warn("the record of a sandbox is damaged, it is ended", "sandbox", id, "error", err)
		sb.process, err = findListener(filepath.Join(sb.dir, socketName))
	}
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return nil, fmt.Errorf("see whether sandbox %s is alive: %w", id, err)
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), time.Minute, errors.New("clean-up took too long"))
	defer cancel()
	if err := sb.remove(ctx); err != nil {
		return nil, fmt.Errorf("remove what is left of sandbox %s: %w", id, err)
	}
	return nil, notFound(id)
}

// watch closes done when the guest ends.
func (sb *sandbox) watch() {
	if sb.process.wait(context.Background()) == nil {
		close(sb.done)
	}
}

// ID is the Spec's.
func (sb *sandbox) ID() string { return sb.id }

// Limits are those in force.
func (sb *sandbox) Limits() engine.Limits { return sb.limits }

// Done is closed when the guest has ended, and so every process of the sandbox.
func (sb *sandbox) Done() <-chan struct{} { return sb.done }

// Dial connects to the guest's socket.
func (sb *sandbox) Dial(ctx context.Context) (conn net.Conn, err error) {
	err = withShortPath(filepath.Join(sb.dir, socketName), func(path string) error {
		// The kernel does not wait where the guest has not taken those before this one.
		for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
			if conn, err = new(net.Dialer).DialContext(ctx, "unix", path); !errors.Is(err, syscall.EAGAIN) {
				return err
			}
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("dial the guest of sandbox %s: %w", sb.id, err)
	}
	return conn, nil
}

// Usage reads the control groups; an ordinary user has none, and everything is 0.
func (sb *sandbox) Usage(context.Context) (engine.Usage, error) {
	if sb.group == nil {
		return engine.Usage{}, nil
	}
	u, err := sb.group.Usage()
	if err != nil {
		return engine.Usage{}, fmt.Errorf("read what sandbox %s used: %w", sb.id, err)
	}
	return engine.Usage{PeakMemoryBytes: u.PeakMemoryBytes, CPU: u.CPU, OOMKills: u.OOMKills, PIDsRefused: u.PIDsRefused}, nil
}

// Terminate kills all processes, waits for the guest's end, which the kernel
// reports only when nothing of its process namespace is left, and removes the rest.
func (sb *sandbox) Terminate(ctx context.Context) (engine.Remains, error) {
	select {
	case sb.ending <- struct{}{}:
		defer func() { <-sb.ending }()
	case <-ctx.Done():
		return engine.Remains{}, fmt.Errorf("terminate sandbox %s: %w", sb.id, context.Cause(ctx))
	}
	if sb.ended {
		return sb.remains, nil
	}
	if err := sb.snapshots.end(ctx); err != nil {
		return sb.remains, fmt.Errorf("terminate sandbox %s: %w", sb.id, err)
	}
	// After a try that did not end everything the first count stands.
	sb.remains.Processes = max(sb.remains.Processes, sb.processes())
	if err := sb.remove(ctx); err != nil {
		sb.snapshots.again()
		return sb.remains, fmt.Errorf("terminate sandbox %s: %w", sb.id, err)
	}
	sb.ended = true
	sb.engine.forget(sb)
	sb.process.fd.Close()
	return sb.remains, nil
}

// processes counts those alive, without the guest.
func (sb *sandbox) processes() int {
	if sb.group != nil {
		if pids, ok := sb.group.Processes(); ok {
			return len(pids)
		}
	}
	return descendants(sb.process.pid)
}

// remove ends what runs and removes what is there, however much of it was made.
func (sb *sandbox) remove(ctx context.Context) error {
	if sb.process != nil {
		sb.process.kill()
	}
	image := filepath.Join(sb.dir, diskName)
	if sb.loop != nil {
		// Where it cannot be, the end only takes longer: it is written before it is removed.
		_ = disk.Discard(image, *sb.loop)
	}
	// With the guest, process 1 of its namespace, the kernel ends all others before it
	// says that the guest has ended: nothing has to be asked for again and again.
	if err := sb.awaitGuest(ctx); err != nil {
		return err
	}
	if sb.group != nil {
		if err := errors.Join(sb.group.Kill(ctx), sb.group.Remove()); err != nil {
			return err
		}
	}
	if sb.loop != nil {
		if err := disk.AwaitDetached(ctx, image, *sb.loop); err != nil {
			return err
		}
	}
	if err := removeTree(sb.dir); err != nil {
		return err
	}
	sb.release()
	return nil
}

// awaitGuest waits until the guest was reaped. A sandbox that is kept has a watcher
// that does so; one whose creation failed has not.
func (sb *sandbox) awaitGuest(ctx context.Context) error {
	if sb.process == nil {
		return nil
	}
	sb.engine.mu.Lock()
	kept := sb.engine.sandboxes[sb.id] == sb
	sb.engine.mu.Unlock()
	if !kept {
		return sb.process.wait(ctx)
	}
	select {
	case <-sb.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the guest has not ended: %w", context.Cause(ctx))
	}
}
