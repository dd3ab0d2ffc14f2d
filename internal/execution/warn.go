package execution

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	"github.com/harvest-run/executord/internal/eventlog"
)

// Deadline is what can end an execution at a time that is known before.
type Deadline string

// The deadlines. The names are those of the API.
const (
	DeadlineTimeout       Deadline = "TIMEOUT"
	DeadlineSessionExpiry Deadline = "SESSION_EXPIRY"
	DeadlineIdle          Deadline = "IDLE"
)

// Deadlines is a set of them.
type Deadlines uint8

// bit is the set of one deadline.
func (d Deadline) bit() Deadlines {
	return 1 << slices.Index([]Deadline{DeadlineTimeout, DeadlineSessionExpiry, DeadlineIdle}, d)
}

// Warning says that a deadline comes near. Its JSON form is the payload of its record.
type Warning struct {
	Deadline   Deadline  `json:"deadline"`
	ExpireTime time.Time `json:"expire_time"`
}

const (
	// leastWarned is the shortest time whose end is warned of.
	leastWarned = 10 * time.Second
	// maxLead is the longest time between a warning and its deadline.
	maxLead = time.Minute
	// warnRetry lies between two attempts to note a warning.
	warnRetry = time.Second
)

// warnLead is how long before the end of a time a warning of it is given: when a tenth of
// it is left; 0 for one that is too short for any.
func warnLead(whole time.Duration) time.Duration {
	if whole < leastWarned {
		return 0
	}
	return min(whole/10, maxLead)
}

// deadlines are those that a run warns of. Only its leading goroutine uses them.
type deadlines struct {
	pending []pendingDeadline
	idle    time.Duration // the idle time-out; 0 without one that is warned of
	// idleLook is when to ask how long the command has been idle; zero: a warning has been
	// given, and only activity makes another necessary.
	idleLook time.Time
	// nearIdle is when idleness will end the command, once that is near; else zero.
	nearIdle time.Time
}

type pendingDeadline struct {
	what     Deadline
	warnAt   time.Time
	expireAt time.Time
}

// foresee finds out which deadlines a run that began at a time has.
func (r *run) foresee(ctx context.Context, begun time.Time) {
	command := r.record.Command.withDefaults()
	add := func(what Deadline, expires time.Time, whole time.Duration) {
		if lead := warnLead(whole); lead > 0 && r.record.Warned&what.bit() == 0 {
			r.deadlines.pending = append(r.deadlines.pending, pendingDeadline{what, expires.Add(-lead), expires})
		}
	}
	add(DeadlineTimeout, begun.Add(command.Timeout), command.Timeout)
	if r.session != "" {
		if expires, lifetime, err := r.service.cfg.Sessions.Expiry(ctx, r.session); err == nil {
			add(DeadlineSessionExpiry, expires, lifetime)
		}
	}
	if lead := warnLead(command.IdleTimeout); lead > 0 {
		r.deadlines.idle = command.IdleTimeout
		r.deadlines.idleLook = time.Now().Add(command.IdleTimeout - lead)
	}
}

// nextWarning is when the next warning may be due; zero if none is known.
func (d *deadlines) nextWarning() (next time.Time) {
	for _, p := range d.pending {
		if next.IsZero() || p.warnAt.Before(next) {
			next = p.warnAt
		}
	}
	if !d.idleLook.IsZero() && (next.IsZero() || d.idleLook.Before(next)) {
		next = d.idleLook
	}
	return next
}

// observe notes for how long the guest says that the command has been idle.
func (r *run) observe(now time.Time, idle time.Duration) {
	d := &r.deadlines
	if d.idle == 0 {
		return
	}
	left, lead := d.idle-idle, warnLead(d.idle)
	switch {
	case left > lead:
		// It was active: of the next time that it is not, another warning is given.
		d.nearIdle, d.idleLook = time.Time{}, now.Add(left-lead)
		r.setWarned(0, DeadlineIdle.bit())
	case r.record.Warned&DeadlineIdle.bit() != 0:
		d.nearIdle, d.idleLook = time.Time{}, time.Time{}
	default:
		d.nearIdle = now.Add(left)
	}
}

// setWarned changes which deadlines the run has warned of.
func (r *run) setWarned(add, remove Deadlines) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.record.Warned = r.record.Warned&^remove | add
}

// remind does what is due at a time beside the moving of output: it tells the store that
// the command runs, and watchers that a deadline comes near. It says whether it did.
func (r *run) remind(ctx context.Context, now time.Time) (did bool) {
	if !r.noteAt.IsZero() && !now.Before(r.noteAt) {
		r.note(ctx)
		did = true
	}
	d := &r.deadlines
	for i := 0; i < len(d.pending); {
		p := &d.pending[i]
		if now.Before(p.warnAt) || p.what == DeadlineSessionExpiry && r.postponed(ctx, p, now) || !r.warn(ctx, p.what, p.expireAt) {
			if !now.Before(p.warnAt) {
				p.warnAt = now.Add(warnRetry)
			}
			i++
			continue
		}
		d.pending = slices.Delete(d.pending, i, i+1)
		did = true
	}
	if !d.nearIdle.IsZero() {
		if r.warn(ctx, DeadlineIdle, d.nearIdle) {
			d.nearIdle, d.idleLook = time.Time{}, time.Time{}
			did = true
		} else {
			d.idleLook = now.Add(warnRetry)
		}
	}
	return did
}

// postponed asks once more when the session ends: that can have been put off.
func (r *run) postponed(ctx context.Context, p *pendingDeadline, now time.Time) bool {
	expires, lifetime, err := r.service.cfg.Sessions.Expiry(ctx, r.session)
	if err != nil || !expires.After(p.expireAt) {
		return false
	}
	p.expireAt, p.warnAt = expires, expires.Add(-warnLead(lifetime))
	return now.Before(p.warnAt)
}

// warn adds a warning to the log, at most once: that it does is noted before, so that a
// crash cannot make it two. It says whether the matter is settled.
func (r *run) warn(ctx context.Context, what Deadline, expires time.Time) bool {
	if r.ordered() != nil {
		return true // it ends for another reason
	}
	data, err := json.Marshal(Warning{Deadline: what, ExpireTime: expires.UTC()})
	if err == nil {
		r.setWarned(what.bit(), 0)
		err = r.update(ctx, r.snapshot())
	}
	if err != nil {
		r.setWarned(0, what.bit())
		r.service.log.WarnContext(ctx, "cannot note a warning", "execution", r.id, "deadline", what, "error", err)
		return false
	}
	if err := r.log.Append(time.Now(), eventlog.Entry{Kind: kindWarning, Data: data}); err != nil {
		r.service.log.WarnContext(ctx, "cannot tell of a deadline", "execution", r.id, "deadline", what, "error", err)
	}
	return true
}

// decodeWarning is nil for one that cannot be read.
func decodeWarning(data []byte) *Warning {
	w := new(Warning)
	if json.Unmarshal(data, w) != nil {
		return nil
	}
	return w
}
