package session

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	// A deadline is warned of when a tenth of its time is left, but at most maxWarning; of
	// times below minWarned there is no warning.
	maxWarning = time.Minute
	minWarned  = 10 * time.Second
	// Before the engine ends a sandbox by a limit of its own, its session goes on in another
	// one: when nothing runs handOverEarly before, and at handOverLate whatever runs.
	handOverEarly = 20 * time.Minute
	handOverLate  = 8 * time.Minute
)

// warned is how long before a deadline it is warned of; 0 for not at all.
func warned(of time.Duration) time.Duration {
	if of < minWarned {
		return 0
	}
	return min(of/10, maxWarning)
}

// await waits for a reason to do something else, warning of those that lie ahead.
func (l *live) await(ctx context.Context) bool {
	var told deadlines
	for {
		record := l.snapshot()
		now := time.Now()
		wait, acted, going := l.due(ctx, record, now, &told)
		if acted || !going {
			return going
		}
		clock := time.NewTimer(wait)
		select {
		case <-l.ending:
		case <-l.sandbox.Done():
			l.end(SandboxLost, "its sandbox ended by itself")
		case <-ctx.Done():
		case <-l.nudge:
			clock.Stop()
			continue
		case <-clock.C:
			continue
		}
		clock.Stop()
		return ctx.Err() == nil
	}
}

// deadlines are those that were warned of, and when the memory is committed next.
type deadlines struct{ expiry, idle, sandbox, commit time.Time }

// due does what is to be done now, and returns how long nothing is. acted means that the
// session has another state, or is to end.
func (l *live) due(ctx context.Context, record Session, now time.Time, told *deadlines) (wait time.Duration, acted, going bool) {
	l.mu.Lock()
	pausing := l.pausing
	l.mu.Unlock()
	if pausing {
		return 0, true, l.enter(ctx, Pausing, l.sandbox, func(*Session) {})
	}
	expiry := record.ExpireTime()
	if !now.Before(expiry) {
		l.expire()
		return 0, true, true
	}
	wait = l.warn("EXPIRY", expiry, record.Lifetime, now, &told.expiry)

	if record.Details.Agent != nil {
		if told.commit.IsZero() {
			told.commit = now.Add(commitEvery)
		}
		if !now.Before(told.commit) {
			l.commitQuietly(ctx, record)
			told.commit = time.Now().Add(commitEvery)
		}
		wait = min(wait, time.Until(told.commit))
	}
	wait = min(wait, l.tellNotes(now))
	busy, last := l.activity(now)
	if timeout := record.Details.IdleTimeout; timeout > 0 {
		switch deadline := last.Add(timeout); {
		case busy:
			told.idle = time.Time{} // its end is noted
		case !now.Before(deadline):
			return 0, true, l.idle(ctx, record)
		default:
			wait = min(wait, l.warn("IDLE", deadline, timeout, now, &told.idle))
		}
	}
	if deadline := record.Details.SandboxDeadline; !deadline.IsZero() && deadline.Before(expiry) {
		switch left := deadline.Sub(now); {
		case left <= handOverLate, left <= handOverEarly && !busy:
			return 0, true, l.enter(ctx, Pausing, l.sandbox, func(r *Session) { r.Details.HandOver = true })
		case left <= handOverEarly:
			wait = min(wait, left-handOverLate, 5*time.Second)
			if !told.sandbox.Equal(deadline) {
				told.sandbox = deadline
				l.tell(Event{Warning: &Warning{Cause: "SANDBOX_EXPIRY", Expire: deadline.Add(-handOverLate)}})
			}
		default:
			wait = min(wait, left-handOverEarly)
		}
	}
	return wait, false, true
}

// warn warns of a deadline if it is time to, once, and returns when to look again.
func (l *live) warn(cause string, deadline time.Time, of time.Duration, now time.Time, told *time.Time) time.Duration {
	if from := deadline.Add(-warned(of)); now.Before(from) {
		return from.Sub(now)
	}
	if !told.Equal(deadline) && warned(of) > 0 {
		*told = deadline
		l.tell(Event{Warning: &Warning{Cause: cause, Expire: deadline}})
	}
	return deadline.Sub(now)
}

// idle does what is to be done with a session in which nothing runs.
func (l *live) idle(ctx context.Context, record Session) bool {
	if record.Details.IdleAction == IdlePause {
		return l.enter(ctx, Pausing, l.sandbox, func(*Session) {})
	}
	l.end(Idle, fmt.Sprintf("nothing ran in it for %v", record.Details.IdleTimeout))
	return true
}

var errHandedOver = errors.New("the session goes on in another sandbox")
