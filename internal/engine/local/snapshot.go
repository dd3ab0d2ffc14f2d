package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/disk"
	"github.com/harvest-run/executord/internal/engine/local/layercopy"
	"github.com/harvest-run/executord/internal/fault"
	"golang.org/x/sys/unix"
)

const (
	// maxLayers bounds the layers of an image. A snapshot that would have more is made one
	// layer, for as much time as it takes to copy them.
	maxLayers = 8
	// freezeTime is how long processes may take to stand still.
	freezeTime = 10 * time.Second
)

// snapshotting is what one sandbox's snapshots share: one is made at a time, and none
// once the sandbox is being ended.
type snapshotting struct {
	turn chan struct{} // has room for whoever works

	mu     sync.Mutex
	ending bool
	cancel context.CancelCauseFunc // of who has the turn
}

var errEnding = errors.New("the sandbox is being ended")

func newSnapshotting() *snapshotting { return &snapshotting{turn: make(chan struct{}, 1)} }

// begin takes the turn, until done is called. ctx ends when the sandbox is being ended.
func (s *snapshotting) begin(ctx context.Context) (_ context.Context, done func(), err error) {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending {
		<-s.turn
		return nil, nil, errEnding
	}
	ctx, s.cancel = context.WithCancelCause(ctx)
	cancel := s.cancel
	return ctx, func() {
		cancel(nil)
		<-s.turn
	}, nil
}

// end gives up what is being made and waits for it; none is begun until again is called.
func (s *snapshotting) end(ctx context.Context) error {
	s.mu.Lock()
	s.ending = true
	if s.cancel != nil {
		s.cancel(errEnding)
	}
	s.mu.Unlock()
	select {
	case s.turn <- struct{}{}:
		<-s.turn
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of a snapshot: %w", context.Cause(ctx))
	}
}

func (s *snapshotting) again() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ending = false
}

// Snapshot copies what the sandbox wrote into a new layer, while its processes are
// frozen. The layers of the image that it was made from are shared.
func (sb *sandbox) Snapshot(ctx context.Context, r engine.SnapshotRequest) (engine.ImageRef, error) {
	ctx, done, err := sb.snapshots.begin(ctx)
	if err != nil {
		return "", fmt.Errorf("make a snapshot of sandbox %s: %w", sb.id, err)
	}
	defer done()
	select {
	case <-sb.done:
		return "", fmt.Errorf("make a snapshot of sandbox %s: it has ended", sb.id)
	default:
	}
	store := sb.engine.snapshots
	layer, dir := store.begin()
	ref, err := sb.snapshot(ctx, layer, dir, r.TTL)
	if err != nil {
		store.over(layer) // whereupon what there is of it is removed
		switch {
		case ctx.Err() != nil:
			err = context.Cause(ctx)
		case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT):
			err = fault.Wrap(err, fault.Exhausted, "NO_SPACE", "there is no room for the snapshot on the host")
		case errors.Is(err, layercopy.ErrTooDeep):
			err = fault.Wrap(err, fault.FailedPrecondition, "SNAPSHOT_TOO_DEEP", "the sandbox has files that no snapshot can have")
		}
		return "", fmt.Errorf("make a snapshot of sandbox %s: %w", sb.id, err)
	}
	return ref, nil
}

func (sb *sandbox) snapshot(ctx context.Context, layer, dir string, ttl time.Duration) (engine.ImageRef, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	if err := sb.copyOwn(ctx, dir); err != nil {
		return "", err
	}
	layers := append([]string{layer}, sb.layers...)
	if len(layers) > maxLayers {
		if err := sb.flatten(ctx, dir); err != nil {
			return "", fmt.Errorf("make one layer of %d: %w", len(layers), err)
		}
		layers = layers[:1]
	}
	// An image outlives the run of the host in which it was made.
	if err := syncFileSystem(dir); err != nil {
		return "", err
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	return sb.engine.snapshots.commit(layers, ttl)
}

func syncFileSystem(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("write the snapshot to disk: %w", err)
	}
	return nil
}

// copyOwn copies what the sandbox wrote, as it is at one moment.
func (sb *sandbox) copyOwn(ctx context.Context, dir string) (err error) {
	own, err := sb.openOwn()
	if err != nil {
		return err
	}
	defer own.Close()
	if !sb.engine.commandGroups() {
		if err := sb.mustBeIdle(); err != nil {
			return err
		}
		// Something was started meanwhile, and may have written half of what it had to.
		defer func() { err = errors.Join(err, sb.mustBeIdle()) }()
	} else {
		limited, cancel := context.WithTimeoutCause(ctx, freezeTime, fmt.Errorf("not within %v", freezeTime))
		defer cancel()
		defer func() { err = errors.Join(err, sb.group.Thaw()) }()
		if err := sb.group.Freeze(limited); err != nil {
			return err
		}
	}
	root := "/proc/self/fd/" + strconv.Itoa(int(own.Fd()))
	trees, err := os.ReadDir(root + "/.")
	if err != nil {
		return err
	}
	for _, t := range trees {
		if !strings.HasPrefix(t.Name(), overlayName("/")) {
			continue // of the file system, such as lost+found
		}
		upper := filepath.Join(root, t.Name(), "upper")
		if empty, err := isEmpty(upper); err != nil || empty {
			if err != nil {
				return err
			}
			continue // nothing was written there
		}
		skip := func(string) bool { return false }
		if t.Name() == overlayName("/") {
			skip = leaveOut(upper)
		}
		if err := layercopy.Copy(ctx, upper, filepath.Join(dir, t.Name()), skip); err != nil {
			return err
		}
	}
	return nil
}

// openOwn opens the directory of the sandbox's own layers. A disk is mounted once more for
// it: as long as it is open it stays.
func (sb *sandbox) openOwn() (*os.File, error) {
	if sb.loop == nil {
		return os.Open(filepath.Join(sb.dir, layerName))
	}
	return disk.Open(filepath.Join(sb.dir, diskName), *sb.loop)
}

// mustBeIdle refuses while anything but the guest runs, where nothing can be frozen.
func (sb *sandbox) mustBeIdle() error {
	if n := sb.processes(); n > 0 {
		return fault.New(fault.FailedPrecondition, "SNAPSHOT_NOT_AVAILABLE",
			"%d processes run in the sandbox, and without control groups of version 2 they cannot be made to stand still: end them, or run executord as root", n)
	}
	return nil
}

func isEmpty(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	names, err := f.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return len(names) == 0, err
}

// leaveOut says what of the root's layer is executord's own: the guest's directory, and
// how the host resolves names, which only sandboxes with the host's network are told.
func leaveOut(upper string) func(string) bool {
	return func(path string) bool {
		switch path {
		case strings.TrimPrefix(runtimeDirectory, "/"):
			return true
		case "etc/resolv.conf", "etc/hosts":
			return sameFile(filepath.Join(upper, path), "/"+path)
		}
		return false
	}
}

// sameFile says whether two small regular files have the same content. One that a
// sandbox wrote may be anything.
func sameFile(path, host string) bool {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() > 1<<20 {
		return false
	}
	theirs, err := os.ReadFile(path)
	if err != nil {
		return false
	}
	ours, err := os.ReadFile(host)
	return err == nil && bytes.Equal(ours, theirs)
}

// flatten adds to a copy of the sandbox's own layer all layers below it.
func (sb *sandbox) flatten(ctx context.Context, dir string) error {
	for _, name := range sb.layers {
		below := filepath.Join(sb.engine.snapshots.layers, name)
		trees, err := os.ReadDir(below)
		if err != nil {
			return err
		}
		for _, t := range trees {
			from, to := filepath.Join(below, t.Name()), filepath.Join(dir, t.Name())
			_, err := os.Lstat(to)
			switch {
			case errors.Is(err, fs.ErrNotExist):
				err = layercopy.Copy(ctx, from, to, nil)
			case err == nil:
				err = layercopy.Merge(ctx, from, to)
			}
			if err != nil {
				return err
			}
		}
	}
	img, err := sb.engine.images.Prepare()
	if err != nil {
		return err
	}
	for _, tree := range trees(img) {
		base, layer := tree, filepath.Join(dir, overlayName(tree))
		if tree == "/" {
			base = img.Skeleton
		}
		if _, err := os.Lstat(layer); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := layercopy.Settle(ctx, layer, base); err != nil {
			return err
		}
	}
	return nil
}

// canSnapshot says whether snapshots can be made, and whether while processes run.
func (e *Engine) canSnapshot() (ok bool, detail, remedy string) {
	if e.commandGroups() {
		return true, "a copy of what was written, while processes stand still", ""
	}
	if e.root {
		return false, "processes can be frozen only by control groups of version 2", "mount the cgroup2 file system"
	}
	return false, "only while nothing runs: an ordinary user cannot freeze processes", "run executord as root"
}
