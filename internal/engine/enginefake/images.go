package enginefake

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// Spec is what a sandbox was last made after.
func (e *Engine) Spec(id string) engine.Spec {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.specs[id]
}

// HeldImages are those that were made and are still there, sorted.
func (e *Engine) HeldImages() []engine.ImageRef {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.DeleteFunc(slices.Sorted(maps.Keys(e.images)), func(ref engine.ImageRef) bool { return !e.hasImage(ref) })
}

// HeldVolumes are those that were made and not deleted, sorted.
func (e *Engine) HeldVolumes() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Sorted(maps.Keys(e.volumes))
}

// AddImage makes an image of nothing.
func (e *Engine) AddImage(ref engine.ImageRef) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.images[ref] = time.Time{}
}

// Snapshot is one that was made.
type Snapshot struct {
	Ref engine.ImageRef
	// Sandbox is its id, Image what that was made from.
	Sandbox string
	Image   engine.ImageRef
	Request engine.SnapshotRequest
}

// Snapshots are all that were ever made, in order.
func (e *Engine) Snapshots() []Snapshot {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.snapshots)
}

// Commits is how often a volume was committed.
func (e *Engine) Commits(volume string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.volumes[volume]
}

// hasImage says whether an image is there now. The caller holds mu.
func (e *Engine) hasImage(ref engine.ImageRef) bool {
	until, ok := e.images[ref]
	return ok && (until.IsZero() || time.Now().Before(until))
}

// Snapshot notes an image.
func (sb *sandbox) Snapshot(ctx context.Context, r engine.SnapshotRequest) (engine.ImageRef, error) {
	if err := call(ctx, sb.engine.cfg.Hooks.Snapshot, sb.id); err != nil {
		return "", err
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if sb.isDead() {
		return "", fmt.Errorf("make a snapshot of sandbox %s: %w", sb.id, errDead)
	}
	e := sb.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	ref := engine.ImageRef(fmt.Sprintf("image-%d", len(e.snapshots)+1))
	e.snapshots = append(e.snapshots, Snapshot{Ref: ref, Sandbox: sb.id, Image: sb.spec.Image, Request: r})
	e.images[ref] = time.Time{}
	if r.TTL > 0 {
		e.images[ref] = time.Now().Add(r.TTL)
	}
	return ref, nil
}

// CommitVolumes counts: there is nothing in them.
func (sb *sandbox) CommitVolumes(ctx context.Context) error {
	if err := call(ctx, sb.engine.cfg.Hooks.Commit, sb.id); err != nil {
		return err
	}
	if sb.isDead() {
		return fmt.Errorf("commit the volumes of sandbox %s: %w", sb.id, errDead)
	}
	e := sb.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, m := range sb.spec.Volumes {
		e.volumes[m.Name]++
	}
	return nil
}

// Images are the Engine's.
func (e *Engine) Images() engine.Images { return images{e} }

// Volumes are the Engine's.
func (e *Engine) Volumes() engine.Volumes { return volumes{e} }

type images struct{ engine *Engine }

func (i images) Exists(ctx context.Context, ref engine.ImageRef) (bool, error) {
	if err := call(ctx, i.engine.cfg.Hooks.ImageExists, string(ref)); err != nil {
		return false, err
	}
	i.engine.mu.Lock()
	defer i.engine.mu.Unlock()
	return i.engine.hasImage(ref), nil
}

func (i images) Delete(ctx context.Context, ref engine.ImageRef) error {
	if err := call(ctx, i.engine.cfg.Hooks.DeleteImage, string(ref)); err != nil {
		return err
	}
	i.engine.mu.Lock()
	defer i.engine.mu.Unlock()
	delete(i.engine.images, ref)
	return nil
}

type volumes struct{ engine *Engine }

func (v volumes) Ensure(ctx context.Context, name string) error {
	if err := call(ctx, v.engine.cfg.Hooks.EnsureVolume, name); err != nil {
		return err
	}
	if err := (engine.VolumeMount{Name: name, Path: "/x"}).Check(); err != nil {
		return fault.New(fault.Invalid, "VOLUMES", "%v", err)
	}
	v.engine.mu.Lock()
	defer v.engine.mu.Unlock()
	v.engine.volumes[name] += 0
	return nil
}

// Delete refuses while a sandbox that lives has the volume.
func (v volumes) Delete(ctx context.Context, name string) error {
	if err := call(ctx, v.engine.cfg.Hooks.DeleteVolume, name); err != nil {
		return err
	}
	v.engine.mu.Lock()
	defer v.engine.mu.Unlock()
	for id, sb := range v.engine.sandboxes {
		if slices.ContainsFunc(sb.spec.Volumes, func(m engine.VolumeMount) bool { return m.Name == name }) && !sb.isDead() {
			return fault.New(fault.FailedPrecondition, "VOLUME_IN_USE", "sandbox %s has volume %q", id, name)
		}
	}
	delete(v.engine.volumes, name)
	return nil
}
