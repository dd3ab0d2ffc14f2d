package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/hostimage"
	"github.com/harvest-run/executord/internal/fault"
)

// Deadline is none: a sandbox lives until it is ended.
func (sb *sandbox) Deadline() time.Time { return time.Time{} }

// CheckSpec refuses what there is not.
func (e *Engine) CheckSpec(spec engine.Spec) error {
	if err := e.CheckLimits(spec.Limits); err != nil {
		return err
	}
	if err := engine.CheckVolumes(spec.Volumes); err != nil {
		return fault.New(fault.Invalid, "VOLUMES", "%v", err)
	}
	if spec.Image != "" {
		if _, err := e.snapshots.find(spec.Image); err != nil {
			return err
		}
	}
	switch {
	case !spec.Placement.IsZero():
		return fault.New(fault.FailedPrecondition, "PLACEMENT_NOT_AVAILABLE", "the local engine runs sandboxes on this machine: ask for no placement")
	case len(spec.Secrets) > 0:
		return fault.New(fault.FailedPrecondition, "SECRETS_NOT_AVAILABLE", "the local engine has no provider that keeps secrets: ask for none by name")
	}
	return e.volumes.check(spec.Volumes)
}

// Images are the snapshots.
func (e *Engine) Images() engine.Images { return images{e.snapshots} }

// Volumes are directories.
func (e *Engine) Volumes() engine.Volumes { return e.volumes }

type images struct{ store *imageStore }

// Exists looks for the image.
func (i images) Exists(_ context.Context, ref engine.ImageRef) (bool, error) {
	_, err := i.store.find(ref)
	if fault.KindOf(err) == fault.NotFound {
		return false, nil
	}
	return err == nil, err
}

// Delete deletes the image. The files go when no sandbox is over them any more.
func (i images) Delete(_ context.Context, ref engine.ImageRef) error { return i.store.remove(ref) }

// hold takes what a sandbox needs that others can delete.
func (sb *sandbox) hold(spec engine.Spec) (err error) {
	if sb.layers, err = sb.engine.snapshots.hold(sb.id, spec.Image); err != nil {
		return err
	}
	sb.mounts = spec.Volumes
	sb.volumes, err = sb.engine.volumes.hold(sb.id, spec.Volumes)
	return err
}

// release gives that back.
func (sb *sandbox) release() {
	sb.engine.snapshots.release(sb.id)
	sb.engine.volumes.release(sb.id)
}

// imageLayers are the layers of the sandbox's image for each tree, the uppermost first.
func (e *Engine) imageLayers(sb *sandbox, img *hostimage.Image) (map[string][]string, error) {
	byTree := make(map[string][]string)
	names := make(map[string]string)
	for _, tree := range trees(img) {
		names[overlayName(tree)] = tree
	}
	for _, layer := range sb.layers {
		dir := filepath.Join(e.snapshots.layers, layer)
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("layer %s of the image is not there", layer)
		}
		if err != nil {
			return nil, err
		}
		for _, d := range entries {
			tree, ok := names[d.Name()]
			if !ok {
				return nil, fault.New(fault.FailedPrecondition, "IMAGE_BASE_CHANGED",
					"the image has changes of a directory %q that this host does not show to sandboxes any more", d.Name())
			}
			byTree[tree] = append(byTree[tree], filepath.Join(dir, d.Name()))
		}
	}
	return byTree, nil
}

// addVolumes names the volumes; layer makes a writable mount of a path.
func (e *Engine) addVolumes(s *setup, sb *sandbox, layer func(path string, readOnly bool) (*guestv1.Layer, error)) error {
	for _, m := range sb.mounts {
		l, err := layer(e.volumes.path(m.Name), false)
		if err != nil {
			return err
		}
		s.message.Volumes = append(s.message.Volumes, &guestv1.Volume{Source: l, Target: m.Path})
	}
	return nil
}

// CommitVolumes writes to disk what the sandbox, or anybody else, wrote to volumes. Others
// see it already.
func (sb *sandbox) CommitVolumes(ctx context.Context) error {
	if len(sb.volumes) == 0 {
		return nil
	}
	// The kernel may take its time, and cannot be told that nobody waits any more.
	done := make(chan error, 1)
	sb.engine.background.Go(func() { done <- sb.engine.volumes.sync() })
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("commit volumes %v: %w", slices.Clone(sb.volumes), err)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
