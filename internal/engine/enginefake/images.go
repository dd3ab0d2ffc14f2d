package enginefake

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/harvest-run/executord/internal/engine"
)

// Spec is what a sandbox was last made after.
func (e *Engine) Spec(id string) engine.Spec {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.specs[id]
}

// HeldImages are those that were made and not deleted, sorted.
func (e *Engine) HeldImages() []engine.ImageRef {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Sorted(maps.Keys(e.images))
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
	e.images[ref] = ""
}

// Snapshot notes an image; TTLs never pass.
func (sb *sandbox) Snapshot(ctx context.Context, _ engine.SnapshotRequest) (engine.ImageRef, error) {
	if err := call(ctx, sb.engine.cfg.Hooks.Snapshot, sb.id); err != nil {
		return "", err
	}
	if sb.isDead() {
		return "", fmt.Errorf("make a snapshot of sandbox %s: %w", sb.id, errDead)
	}
	e := sb.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	e.snapshots++
	ref := engine.ImageRef(fmt.Sprintf("image-%d", e.snapshots))
	e.images[ref] = sb.id
	return ref, nil
}

// CommitVolumes does nothing: there is nothing in them.
func (sb *sandbox) CommitVolumes(ctx context.Context) error {
	return call(ctx, sb.engine.cfg.Hooks.Commit, sb.id)
}

// Images are the Engine's.
func (e *Engine) Images() engine.Images { return images{e} }

// Volumes are the Engine's.
func (e *Engine) Volumes() engine.Volumes { return volumes{e} }

type images struct{ engine *Engine }

func (i images) Exists(_ context.Context, ref engine.ImageRef) (bool, error) {
	i.engine.mu.Lock()
	defer i.engine.mu.Unlock()
	_, ok := i.engine.images[ref]
	return ok, nil
}

func (i images) Delete(_ context.Context, ref engine.ImageRef) error {
	i.engine.mu.Lock()
	defer i.engine.mu.Unlock()
	delete(i.engine.images, ref)
	return nil
}

type volumes struct{ engine *Engine }

func (v volumes) Ensure(_ context.Context, name string) error {
	if err := (engine.VolumeMount{Name: name, Path: "/x"}).Check(); err != nil {
		return err
	}
	v.engine.mu.Lock()
	defer v.engine.mu.Unlock()
	v.engine.volumes[name] = true
	return nil
}

func (v volumes) Delete(_ context.Context, name string) error {
	v.engine.mu.Lock()
	defer v.engine.mu.Unlock()
	delete(v.engine.volumes, name)
	return nil
}
