package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/journal"
)

const (
	// saveTime bounds the saving of what a session has, and commitTime that of its memory.
	saveTime   = 10 * time.Minute
	commitTime = time.Minute
	// commitEvery is how often the memory is committed while a session runs.
	commitEvery = 5 * time.Minute
	// savedTTL is how long a snapshot is kept that holds saved work.
	savedTTL = 30 * 24 * time.Hour
)

// wipRef is where the unfinished work of a session is put at a remote.
func wipRef(id string) string { return "refs/heads/wip/" + id }

// endTurns ends the turns of a session. After endTime its agent is ended with what still
// runs.
func (l *live) endTurns(ctx context.Context) bool {
	if l.snapshot().Details.Agent == nil {
		return true
	}
	return l.endAll(ctx, "turns", l.service.cfg.Parts.Turns.EndSession)
}

// saveAll keeps what the session's sandbox has and nothing else: work under a ref at the
// remote, or if that is not possible in a snapshot, and the memory.
func (l *live) saveAll(ctx context.Context) bool {
	record := l.snapshot()
	d := record.Details
	if l.sandbox == nil || d.Agent == nil && len(d.Checkouts) == 0 {
		return true
	}
	l.stopAgent(ctx)
	select {
	case <-l.sandbox.Done():
		return ctx.Err() == nil // there is nothing left to save from
	default:
	}
	saved, whole := l.saveWork(ctx, record)
	l.commitMemory(ctx, record)
	if !whole {
		saved = append(saved, l.saveSandbox(ctx))
	}
	if ctx.Err() != nil {
		return false
	}
	for _, s := range saved {
		l.tell(Event{Saved: &s})
	}
	_, ok := l.write(ctx, l.sandbox, func(r *Session) { r.Details.Saved = append(slices.Clone(r.Details.Saved), saved...) })
	return ok
}

// saveWork saves the work of each repository. whole is false if there is more than was
// saved.
func (l *live) saveWork(ctx context.Context, record Session) (all []SavedWork, whole bool) {
	whole = true
	for _, c := range record.Details.Checkouts {
		err := l.do(StepSave, c.Path, func() error {
			ctx, stop := context.WithTimeoutCause(ctx, saveTime, fmt.Errorf("not saved within %v", saveTime))
			defer stop()
			saved, all1, err := l.service.cfg.Parts.Workspace.Save(ctx, l.sandbox, c, wipRef(record.ID), record.Details.Identity)
			whole = whole && all1 && err == nil
			if saved.Commit != "" || saved.Detail != "" {
				saved.Path, saved.Time = c.Path, time.Now()
				all = append(all, saved)
			}
			return err
		})
		if err != nil {
			whole = false
			all = append(all, SavedWork{Path: c.Path, Time: time.Now(), Detail: clip("not saved from the repository: " + err.Error())})
		}
	}
	return all, whole
}

// saveSandbox keeps the whole sandbox as a snapshot, from which the session can be forked.
func (l *live) saveSandbox(ctx context.Context) SavedWork {
	saved := SavedWork{Time: time.Now()}
	on, err := l.engine()
	if err != nil {
		saved.Detail = clip("the sandbox could not be kept: " + err.Error())
		return saved
	}
	if why := lacks(on, "snapshot"); why != "" {
		saved.Detail = "the sandbox could not be kept: the engine makes no snapshots: " + why
		return saved
	}
	err = l.do(StepSnapshot, "", func() (err error) {
		ctx, stop := context.WithTimeoutCause(ctx, snapshotTime, fmt.Errorf("no snapshot within %v", snapshotTime))
		defer stop()
		saved.Snapshot, err = l.sandbox.Snapshot(ctx, engine.SnapshotRequest{TTL: savedTTL})
		return err
	})
	saved.Detail = fmt.Sprintf("the sandbox is kept for %d days; fork the session to go on with it", savedTTL/(24*time.Hour))
	if err != nil {
		saved.Detail = clip("the sandbox could not be kept: " + err.Error())
	}
	return saved
}

// stopAgent ends the agent's server, so that what it has on the disk is whole.
func (l *live) stopAgent(ctx context.Context) {
	if l.agent == nil {
		return
	}
	ctx, stop := context.WithTimeoutCause(ctx, commitTime, fmt.Errorf("not stopped within %v", commitTime))
	defer stop()
	if err := l.agent.Stop(ctx); err != nil {
		l.service.log.WarnContext(ctx, "stop the agent of a session", "session", l.id, "error", err)
	}
	l.closeAgent()
}

// commitMemory makes what the agent remembers lasting, and tells of it.
func (l *live) commitMemory(ctx context.Context, record Session) {
	if remembers(record) {
		_ = l.do(StepCommitMemory, "", func() error { return l.commit(ctx, true) }) // the step tells
	}
}

// commitQuietly is commitMemory on a timer: only what goes wrong is told.
func (l *live) commitQuietly(ctx context.Context, record Session) {
	if !remembers(record) {
		return
	}
	if err := l.commit(ctx, false); err != nil && ctx.Err() == nil {
		l.step(StepCommitMemory, StepFailed, "", err.Error())
	}
}

// remembers says whether a session has a memory.
func remembers(record Session) bool {
	return record.Details.Agent != nil && len(record.Details.Repositories) > 0
}

func (l *live) commit(ctx context.Context, last bool) error {
	ctx, stop := context.WithTimeoutCause(ctx, commitTime, fmt.Errorf("not committed within %v", commitTime))
	defer stop()
	return errors.Join(l.service.cfg.Parts.Workspace.CommitMemory(ctx, l.sandbox, last), l.sandbox.CommitVolumes(ctx))
}

// dropSnapshot removes the snapshot of a session that ends while it rests, unless its work
// is in that alone.
func (l *live) dropSnapshot(ctx context.Context) bool {
	record := l.snapshot()
	ref := record.Details.Snapshot
	switch {
	case ref == "":
		return true
	case len(record.Details.Checkouts) == 0 || record.Details.Borrowed:
		l.dropImage(ctx, ref, record.Details.Borrowed)
		return ctx.Err() == nil
	}
	saved := SavedWork{Snapshot: ref, Time: time.Now(), Detail: "the session ended while it was paused; its sandbox is kept: fork the session to go on with it"}
	l.tell(Event{Saved: &saved})
	_, ok := l.write(ctx, nil, func(r *Session) {
		r.Details.Saved = append(slices.Clone(r.Details.Saved), saved)
		r.Details.Snapshot = ""
	})
	return ok
}

// dropImage removes an image that nothing will be made from any more.
func (l *live) dropImage(ctx context.Context, ref engine.ImageRef, borrowed bool) {
	if ref == "" || borrowed {
		return
	}
	ctx, stop := context.WithTimeoutCause(ctx, sandboxTime, fmt.Errorf("not removed within %v", sandboxTime))
	defer stop()
	on, err := l.engine()
	if err == nil {
		err = on.Images().Delete(ctx, ref)
	}
	if err != nil {
		l.service.log.WarnContext(ctx, "a snapshot of a session is left", "session", l.id, "image", ref, "error", err)
	}
}

// tellEnd ends the log of a session, trying until it works: watchers wait for it.
func (l *live) tellEnd(ctx context.Context, record Session) bool {
	if l.journal == nil {
		return true
	}
	data, err := json.Marshal(Event{Ended: &record})
	if err != nil {
		l.service.log.ErrorContext(ctx, "encode the end of a session", "session", l.id, "error", err)
		return true
	}
	for wait := firstRetry; ; wait = min(2*wait, recordRetry) {
		_, err := l.journal.End(time.Now(), data)
		if err == nil || errors.Is(err, journal.ErrEnded) {
			return true
		}
		l.service.log.ErrorContext(ctx, "write the end of a session into its log, trying again", "session", l.id, "error", err)
		if !pause(ctx, wait) {
			return false
		}
	}
}
