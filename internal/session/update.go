package session

import (
	"context"
	"time"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
)

// Update says what is to be changed; nil fields stay.
type Update struct {
	Labels      *map[string]string
	ExpireTime  *time.Time
	IdleTimeout *time.Duration
	IdleAction  *IdleAction
	// Values and Auth are credentials, as in Request; they take the place of those of the
	// same name.
	Values map[string]string
	Auth   string
	Key    idempotency.Key
}

// Update changes a session that has not ended. Faults: NotFound, FailedPrecondition
// (SESSION_NOT_RUNNING), Invalid.
func (s *Service) Update(ctx context.Context, ref Ref, u Update) (Session, error) {
	l, record, err := s.alive(ctx, ref)
	if err != nil {
		return Session{}, err
	}
	if record.State.Stage() == Terminating {
		return Session{}, notRunning(record)
	}
	if at := u.ExpireTime; at != nil && time.Until(*at) > MaxLifetime {
		return Session{}, fault.InvalidField("EXPIRE_TIME", "session.expire_time", "must be at most %v from now", MaxLifetime)
	}
	if err := s.requests.Note(ctx, u.Key, ref.ID); err != nil {
		return Session{}, err
	}
	if len(u.Values) > 0 || u.Auth != "" {
		l.mu.Lock()
		l.give(u.Values, u.Auth)
		sandbox := l.sandbox
		l.mu.Unlock()
		if sandbox != nil && s.cfg.Parts.Credentials != nil {
			if err := s.cfg.Parts.Credentials.Open(ctx, sandbox, l.way(record.Details)); err != nil {
				return Session{}, err
			}
		}
	}
	return l.update(ctx, func(r *Session) {
		if u.Labels != nil {
			r.Labels = *u.Labels
		}
		if u.ExpireTime != nil {
			r.Lifetime = max(u.ExpireTime.Sub(r.CreateTime), 0)
		}
		if u.IdleTimeout != nil {
			r.Details.IdleTimeout = *u.IdleTimeout
		}
		if u.IdleAction != nil {
			r.Details.IdleAction = *u.IdleAction
		}
	})
}

// update changes the record on somebody's behalf, who is told if that does not work.
func (l *live) update(ctx context.Context, change func(*Session)) (Session, error) {
	l.writing.Lock()
	defer l.writing.Unlock()
	record := l.snapshot()
	if record.State.Stage() == Terminating || record.State == Terminated {
		return Session{}, notRunning(record)
	}
	change(&record)
	if err := l.service.cfg.Store.UpdateSession(ctx, record); err != nil {
		return Session{}, err
	}
	l.mu.Lock()
	// The state can have been shown as Terminating meanwhile, before it is recorded.
	record.State, record.Reason, record.Detail = l.record.State, l.record.Reason, l.record.Detail
	l.record = record
	l.notify()
	l.look()
	l.mu.Unlock()
	l.tell(Event{Changed: &record})
	return record, nil
}
