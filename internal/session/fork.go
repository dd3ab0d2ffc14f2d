package session

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// Fork makes a session that goes on from a snapshot of another, which is made now if that
// one runs; of one that has ended, from the newest that its work was saved in. The new
// session's agent goes on with the conversation. Of r, what the other one decides is not
// looked at: limits, network, repositories, agent, image. Faults as Create's, and
// FailedPrecondition (NO_SNAPSHOT, SNAPSHOT_NOT_AVAILABLE).
func (s *Service) Fork(ctx context.Context, ref Ref, r Request) (Session, error) {
	earlier, done, err := s.requests.Begin(ctx, r.Key)
	if err != nil {
		return Session{}, err
	}
	defer done()
	if earlier != "" {
		return s.Get(ctx, Ref{ID: earlier, Caller: r.Caller})
	}
	parent, err := s.Get(ctx, ref)
	if err != nil {
		return Session{}, err
	}
	on, err := s.cfg.Engines.Get(parent.Engine)
	if err != nil {
		return Session{}, err
	}
	from, borrowed, err := s.forkable(ctx, on, parent)
	if err != nil {
		return Session{}, err
	}
	if l, ok := s.find(parent.ID); ok {
		l.mu.Lock()
		values := l.values
		auth := l.auth
		l.mu.Unlock()
		r.Values = merge(values, r.Values)
		if r.Auth == "" {
			r.Auth = auth
		}
	}
	d := parent.Details
	r.Engine, r.Placement, r.Limits, r.Network = parent.Engine, d.Placement, parent.Limits, parent.Network
	inherited := Details{
		Repositories: d.Repositories, Checkouts: d.Checkouts, Identity: d.Identity, Agent: d.Agent, Conversation: d.Conversation,
		Secrets: merge(d.Secrets, r.Secrets), IdleTimeout: d.IdleTimeout, IdleAction: d.IdleAction, Image: d.Image, Base: d.Base,
		Snapshot: from, Borrowed: borrowed, ForkedFrom: parent.ID, Prepared: true,
	}
	made, err := s.create(ctx, r, inherited)
	if err != nil && !borrowed {
		bounded, stop := context.WithTimeoutCause(context.WithoutCancel(ctx), sandboxTime, fmt.Errorf("not removed within %v", sandboxTime))
		defer stop()
		if err := on.Images().Delete(bounded, from); err != nil {
			s.log.WarnContext(ctx, "a snapshot for a fork is left", "session", parent.ID, "image", from, "error", err)
		}
	}
	return made, err
}

// forkable is what a fork of a session is made from. borrowed says that it is not the
// fork's own.
func (s *Service) forkable(ctx context.Context, on engine.Engine, parent Session) (ref engine.ImageRef, borrowed bool, err error) {
	switch {
	case parent.State == Paused && parent.Details.Snapshot != "":
		return parent.Details.Snapshot, true, nil
	case parent.State == Terminated:
		for _, saved := range slices.Backward(parent.Details.Saved) {
			if saved.Snapshot == "" {
				continue
			}
			there, err := on.Images().Exists(ctx, saved.Snapshot)
			if err != nil {
				return "", false, fmt.Errorf("look for the snapshot of session %s: %w", parent.ID, err)
			}
			if there {
				return saved.Snapshot, true, nil
			}
		}
		return "", false, fault.New(fault.FailedPrecondition, "NO_SNAPSHOT", "session %q has ended, and there is no snapshot of it", parent.ID)
	case parent.State != Running:
		return "", false, fault.New(fault.FailedPrecondition, "NO_SNAPSHOT", "session %q is %s; one that runs, is paused or has ended with saved work can be forked", parent.ID, parent.State)
	}
	l, ok := s.find(parent.ID)
	if !ok {
		return "", false, s.forsaken(parent)
	}
	sandbox, err := l.running()
	if err != nil {
		return "", false, err
	}
	if why := lacks(on, "snapshot"); why != "" {
		return "", false, fault.New(fault.FailedPrecondition, "SNAPSHOT_NOT_AVAILABLE", "the engine %s makes no snapshots: %s", on.Name(), why)
	}
	bounded, stop := context.WithTimeoutCause(ctx, snapshotTime, fmt.Errorf("no snapshot within %v", snapshotTime))
	defer stop()
	ref, err = sandbox.Snapshot(bounded, engine.SnapshotRequest{TTL: savedTTL})
	if err != nil {
		return "", false, fmt.Errorf("make a snapshot of session %s: %w", parent.ID, err)
	}
	return ref, false, nil
}

// merge returns a with what b has put over it.
func merge(a, b map[string]string) map[string]string {
	if len(a)+len(b) == 0 {
		return nil
	}
	all := make(map[string]string, len(a)+len(b))
	maps.Copy(all, a)
	maps.Copy(all, b)
	return all
}

// Diff tells what differs in each repository of a running session from what was checked
// out. Faults as Sandbox's.
func (s *Service) Diff(ctx context.Context, ref Ref) ([]RepositoryDiff, error) {
	sandbox, err := s.Sandbox(ctx, ref.ID, ref.Caller)
	if err != nil {
		return nil, err
	}
	record, err := s.Get(ctx, ref)
	if err != nil {
		return nil, err
	}
	var all []RepositoryDiff
	for _, c := range record.Details.Checkouts {
		d, err := s.cfg.Parts.Workspace.Diff(ctx, sandbox, c)
		if err != nil {
			return nil, fmt.Errorf("compare %s: %w", c.Path, err)
		}
		all = append(all, d)
	}
	return all, nil
}
