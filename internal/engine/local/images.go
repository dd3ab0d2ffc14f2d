package local

import (
	"context"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// Deadline is none: a sandbox lives until it is ended.
func (sb *sandbox) Deadline() time.Time { return time.Time{} }

// Snapshot is not there yet.
func (sb *sandbox) Snapshot(context.Context, engine.SnapshotRequest) (engine.ImageRef, error) {
	return "", fault.New(fault.FailedPrecondition, "SNAPSHOT_NOT_AVAILABLE", "the local engine makes no snapshots")
}

// CommitVolumes has nothing to do: there are none.
func (sb *sandbox) CommitVolumes(context.Context) error { return nil }

// Images are none.
func (e *Engine) Images() engine.Images { return noImages{} }

// Volumes are none.
func (e *Engine) Volumes() engine.Volumes { return noVolumes{} }

type noImages struct{}

func (noImages) Exists(context.Context, engine.ImageRef) (bool, error) { return false, nil }
func (noImages) Delete(context.Context, engine.ImageRef) error         { return nil }

type noVolumes struct{}

func (noVolumes) Ensure(context.Context, string) error {
	return fault.New(fault.FailedPrecondition, "VOLUMES_NOT_AVAILABLE", "the local engine has no volumes")
}

func (noVolumes) Delete(context.Context, string) error { return nil }
