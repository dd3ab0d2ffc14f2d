package session

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
)

// snapshotTime bounds the making of a snapshot.
const snapshotTime = 20 * time.Minute

var errPaused = errors.New("the session is paused")

// resumption is what a session was given to go on with.
type resumption struct{ slot *admission.Slot }

// Pause makes a snapshot of a running session, gives its sandbox back, and returns it when
// it rests. One that is paused is returned as it is. Faults: NotFound, FailedPrecondition
// (SESSION_NOT_RUNNING, SNAPSHOT_NOT_AVAILABLE).
func (s *Service) Pause(ctx context.Context, ref Ref, key idempotency.Key) (Session, error) {
	l, record, err := s.alive(ctx, ref)
	if err != nil {
		return Session{}, err
	}
	if err := s.requests.Note(ctx, key, ref.ID); err != nil {
		return Session{}, err
	}
	switch record.State {
	case Paused:
		return record, nil
	case Running, Pausing:
	default:
		return Session{}, notRunning(record)
	}
	on, err := l.engine()
	if err != nil {
		return Session{}, err
	}
	if why := lacks(on, "snapshot"); why != "" {
		return Session{}, fault.New(fault.FailedPrecondition, "SNAPSHOT_NOT_AVAILABLE", "the engine %s makes no snapshots: %s", on.Name(), why)
	}
	l.mu.Lock()
	l.pausing, l.failed = true, nil
	l.look()
	l.mu.Unlock()
	return l.until(ctx, func(r Session) bool { return r.State == Paused })
}

// lacks says why an engine cannot do something; "" if it can.
func lacks(e engine.Engine, capability string) string {
	for _, c := range e.Capabilities() {
		if c.Name == capability && !c.Available {
			return c.Detail
		}
	}
	return ""
}

// alive returns a session that has not ended. Faults NotFound, and FailedPrecondition for
// one that has.
func (s *Service) alive(ctx context.Context, ref Ref) (*live, Session, error) {
	if l, ok := s.visible(ref); ok {
		return l, l.snapshot(), nil
	}
	record, err := s.Get(ctx, ref)
	if err != nil {
		return nil, Session{}, err
	}
	if record.State != Terminated {
		return nil, Session{}, s.forsaken(record)
	}
	return nil, record, notRunning(record)
}

// until waits until a session is as it should be, has failed to become so, or ends.
func (l *live) until(ctx context.Context, is func(Session) bool) (Session, error) {
	for {
		l.mu.Lock()
		record, failed, changed := l.record, l.failed, l.changed
		l.mu.Unlock()
		switch {
		case is(record):
			return record, nil
		case failed != nil:
			return record, failed
		case record.State.Stage() != Running:
			return record, notRunning(record)
		}
		if err := l.wait(ctx, changed); err != nil {
			return record, err
		}
	}
}

// halt makes a snapshot of a session's sandbox and ends it.
func (l *live) halt(ctx context.Context) bool {
	record := l.snapshot()
	if l.sandbox == nil { // of an executord before this one
		sandbox, err := l.open(ctx)
		switch {
		case err == nil:
			l.publish(sandbox)
		case ctx.Err() != nil:
			return false
		case fault.KindOf(err) == fault.NotFound && record.Details.Snapshot != "":
			return l.halted(ctx)
		case fault.KindOf(err) == fault.NotFound:
			l.end(SandboxLost, "its sandbox was gone when executord started again")
			return true
		default:
			l.service.log.ErrorContext(ctx, "open the sandbox of a session, trying again", "session", l.id, "error", err)
			return pause(ctx, time.Second)
		}
	}
	if record.Details.Snapshot == "" {
		working, done, going := l.interruptible(ctx)
		ref, err := engine.ImageRef(""), error(nil)
		if going {
			ref, err = l.freeze(working, record)
		}
		done()
		if !going || ctx.Err() != nil {
			return ctx.Err() == nil
		}
		if err != nil {
			return l.haltFailed(ctx, err)
		}
		// Recorded while there still is the sandbox: one of the two is always there.
		if _, ok := l.write(ctx, l.sandbox, func(r *Session) { r.Details.Snapshot, r.Details.Borrowed = ref, false }); !ok {
			return false
		}
	}
	if !l.terminate(ctx) {
		return false
	}
	return l.halted(ctx)
}

// freeze ends what runs and makes the snapshot.
func (l *live) freeze(ctx context.Context, record Session) (engine.ImageRef, error) {
	why := errPaused
	if record.Details.HandOver {
		why = errHandedOver
	}
	if record.Details.Agent != nil {
		if err := l.service.cfg.Parts.Turns.Detach(ctx, l.id, why); err != nil {
			return "", fmt.Errorf("end what the agent does: %w", err)
		}
	}
	if !l.endExecutions(ctx) {
		return "", context.Cause(ctx)
	}
	l.stopAgent(ctx)
	l.commitMemory(ctx, record)
	var ref engine.ImageRef
	err := l.do(StepSnapshot, "", func() (err error) {
		ctx, stop := context.WithTimeoutCause(ctx, snapshotTime, fmt.Errorf("no snapshot within %v", snapshotTime))
		defer stop()
		// It is removed with what is made from it. If executord dies before the record names
		// it, its time passes.
		ref, err = l.sandbox.Snapshot(ctx, engine.SnapshotRequest{TTL: max(time.Until(record.ExpireTime()), 0) + savedTTL})
		return err
	})
	return ref, err
}

// haltFailed lets a session go on of which no snapshot could be made.
func (l *live) haltFailed(ctx context.Context, why error) bool {
	handOver := l.snapshot().Details.HandOver
	l.mu.Lock()
	l.pausing = false
	l.mu.Unlock()
	if !l.enter(ctx, Running, l.sandbox, func(r *Session) {
		r.Details.HandOver = false
		if handOver {
			r.Details.SandboxDeadline = time.Time{} // its work is saved when the sandbox ends, if it can be
		}
	}) {
		return false
	}
	l.fail(fmt.Errorf("pause session %s: %w", l.id, why))
	if handOver {
		l.end(Expired, "its sandbox is about to be ended by the engine, and no snapshot could be made of it: "+why.Error())
		return true
	}
	return l.rejoin(ctx)
}

// halted goes on to rest, or to another sandbox.
func (l *live) halted(ctx context.Context) bool {
	if l.snapshot().Details.HandOver {
		return l.enter(ctx, Resuming, nil, func(r *Session) {
			r.Details.HandOver = false
			l.advance(r)
		})
	}
	l.mu.Lock()
	l.pausing = false
	l.mu.Unlock()
	if !l.enter(ctx, Paused, nil, func(r *Session) { r.Details.SandboxDeadline = time.Time{} }) {
		return false
	}
	l.slot.Release()
	return true
}

// advance names the next sandbox.
func (l *live) advance(r *Session) {
	r.Details.Generation++
	r.Sandbox = sandboxID(r.ID, r.Details.Generation)
	r.Details.SandboxDeadline = time.Time{}
}

// rest waits until a paused session is to go on or to end.
func (l *live) rest(ctx context.Context) bool {
	expiry := time.NewTimer(time.Until(l.snapshot().ExpireTime()))
	defer expiry.Stop()
	l.mu.Lock()
	given := l.resumes
	l.resumes = nil
	l.mu.Unlock()
	if given != nil {
		l.slot = given.slot
		return l.enter(ctx, Resuming, nil, l.advance)
	}
	select {
	case <-l.nudge: // it goes on, or has another lifetime
	case <-l.ending:
	case <-expiry.C:
		if !time.Now().Before(l.snapshot().ExpireTime()) {
			l.expire()
		}
	case <-ctx.Done():
		return false
	}
	return true
}

// Resumption says what a session goes on with.
type Resumption struct {
	// Values and Auth are credentials, as in Request; those that it has stay.
	Values map[string]string
	Auth   string
	Key    idempotency.Key
}

// Resume has a paused session go on, when there is a place for it, and returns it at once.
// One that runs or is being resumed is returned as it is. Faults: NotFound,
// FailedPrecondition (SESSION_NOT_PAUSED), those of Create about places.
func (s *Service) Resume(ctx context.Context, ref Ref, r Resumption) (Session, error) {
	l, record, err := s.alive(ctx, ref)
	if err != nil {
		return Session{}, err
	}
	if err := s.requests.Note(ctx, r.Key, ref.ID); err != nil {
		return Session{}, err
	}
	switch record.State {
	case Running, Resuming:
		return record, nil
	case Paused:
	default:
		return Session{}, fault.New(fault.FailedPrecondition, "SESSION_NOT_PAUSED", "session %q is %s; only a paused one can be resumed", record.ID, record.State)
	}
	slot, err := s.cfg.Admission.Acquire(ctx, admission.Need{Sandbox: true})
	if err != nil {
		return Session{}, err
	}
	l.mu.Lock()
	switch {
	case l.resumes != nil || l.asked || l.record.State != Paused:
		slot.Release() // somebody else was first
	default:
		l.resumes, l.failed = &resumption{slot: slot}, nil
		l.give(r.Values, r.Auth)
		l.look()
	}
	l.mu.Unlock()
	return l.until(ctx, func(r Session) bool { return r.State == Resuming || r.State == Running })
}

// give adds credentials to those that a session has. The caller holds mu.
func (l *live) give(values map[string]string, auth string) {
	l.values = merge(l.values, values) // a new one: somebody may be reading the other
	if auth != "" {
		l.auth = auth
	}
}
