package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/cgroup"
)

// sandbox is one local sandbox.
type sandbox struct {
	engine  *Engine
	id      string
	dir     string
	limits  engine.Limits
	group   *cgroup.Group // nil for an ordinary user
	process *process

	done chan struct{} // closed when the guest has ended

	ending  sync.Mutex // held by the one Terminate that works
	ended   bool
	remains engine.Remains
}

// adopt finds a sandbox that an executord before this one made. If it is dead,
// what is left of it is removed.
func (e *Engine) adopt(id string) (*sandbox, error) {
	sb := &sandbox{engine: e, id: id, dir: e.sandboxDir(id), done: make(chan struct{})}
	if e.groups != nil {
		sb.group = e.groups.Open(id)
	}
	text, err := os.ReadFile(filepath.Join(sb.dir, recordName))
	var r record
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err == nil {
		sb.limits = r.Limits
		sb.process, err = findProcess(r.PID, r.StartTicks)
	}
	if err == nil {
		return sb, nil
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
	if sb.process.wait() {
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
		conn, err = new(net.Dialer).DialContext(ctx, "unix", path)
		return err
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
	u := sb.group.Usage()
	return engine.Usage{PeakMemoryBytes: u.PeakMemoryBytes, CPU: u.CPU, OOMKills: u.OOMKills, PIDsRefused: u.PIDsRefused}, nil
}

// Terminate kills all processes, waits for the guest's end, which the kernel
// reports only when nothing of its process namespace is left, and removes the rest.
func (sb *sandbox) Terminate(ctx context.Context) (engine.Remains, error) {
	sb.ending.Lock()
	defer sb.ending.Unlock()
	if sb.ended {
		return sb.remains, nil
	}
	if sb.group != nil {
		sb.remains.Processes = max(sb.remains.Processes, len(sb.group.Processes()))
	}
	if err := sb.remove(ctx); err != nil {
		return sb.remains, fmt.Errorf("terminate sandbox %s: %w", sb.id, err)
	}
	sb.ended = true
	sb.engine.forget(sb)
	sb.process.fd.Close()
	return sb.remains, nil
}

// remove ends what runs and removes what is there, however much of it was made.
func (sb *sandbox) remove(ctx context.Context) error {
	if sb.process != nil {
		sb.process.kill()
	}
	if sb.group != nil {
		if err := sb.group.Kill(ctx); err != nil {
			return err
		}
	}
	if err := sb.awaitGuest(ctx); err != nil {
		return err
	}
	if sb.group != nil {
		if err := sb.group.Remove(); err != nil {
			return err
		}
	}
	return removeTree(sb.dir)
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
		sb.process.wait()
		return nil
	}
	select {
	case <-sb.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the guest has not ended: %w", context.Cause(ctx))
	}
}

// removeTree removes a directory in which a sandbox could make what it liked.
func removeTree(dir string) error {
	err := os.RemoveAll(dir)
	if err == nil || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	// An ordinary user cannot look into directories that the sandbox, or the overlay,
	// closed to everybody; as their owner it can open them.
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(path, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}
