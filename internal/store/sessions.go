package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
)

const (
	insertSession = `INSERT INTO sessions (id, state, reason, detail, engine, sandbox, limits, lifetime, labels,
		create_time, end_time, owner, network, details, phase) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`

	// The condition on state keeps a life from going back, whoever writes last.
	updateSession = `UPDATE sessions SET state = ?1, reason = ?2, detail = ?3, engine = ?4, sandbox = ?5,
		limits = ?6, end_time = ?7, lifetime = ?8, labels = ?9, details = ?10, phase = ?11 WHERE id = ?12 AND state <= ?1`

	selectSession = `SELECT id, state, reason, detail, engine, sandbox, limits, lifetime, labels,
		create_time, end_time, owner, network, details, phase FROM sessions `

	getSession         = selectSession + `WHERE id = ?`
	listSessions       = selectSession + `WHERE id < ? ORDER BY id DESC LIMIT ?`
	listAlive          = selectSession + `WHERE state < 4 AND id < ? ORDER BY id DESC LIMIT ?`
	unfinishedSessions = selectSession + `WHERE state < 4 ORDER BY id`
)

// InsertSession implements session.Store.
func (s *Store) InsertSession(ctx context.Context, one session.Session) error {
	return s.insertSessionWith(ctx, one, func(ctx context.Context, args ...any) error {
		return s.writeDurably(ctx, func(ctx context.Context) error {
			_, err := s.insertSession.ExecContext(ctx, args...)
			return err
		})
	})
}

// insertSessionWith has insert write the columns of a session.
func (s *Store) insertSessionWith(ctx context.Context, one session.Session, insert func(ctx context.Context, args ...any) error) error {
	limits, err := toJSON("limits", one.Limits)
	if err != nil {
		return fmt.Errorf("insert session %q: %w", one.ID, err)
	}
	labels, err := labelsColumn(one.Labels)
	if err != nil {
		return fmt.Errorf("insert session %q: %w", one.ID, err)
	}
	network, err := networkColumn(one.Network)
	if err != nil {
		return fmt.Errorf("insert session %q: %w", one.ID, err)
	}
	details, err := toJSON("details", one.Details)
	if err != nil {
		return fmt.Errorf("insert session %q: %w", one.ID, err)
	}
	err = insert(ctx, one.ID, one.State.Stage(), one.Reason, one.Detail, one.Engine, one.Sandbox,
		limits, one.Lifetime, labels, one.CreateTime.UnixNano(), timeColumn(one.EndTime), one.Owner, network, details, phaseColumn(one.State))
	if isDuplicate(err) {
		return fault.New(fault.AlreadyExists, "SESSION_EXISTS", "session %q exists", one.ID)
	}
	if err != nil {
		return fmt.Errorf("insert session %q: %w", one.ID, err)
	}
	return nil
}

// UpdateSession implements session.Store. A fault FailedPrecondition (SESSION_ENDED)
// if it would move State back; nothing is changed then.
func (s *Store) UpdateSession(ctx context.Context, one session.Session) error {
	limits, err := toJSON("limits", one.Limits)
	if err != nil {
		return fmt.Errorf("update session %q: %w", one.ID, err)
	}
	labels, err := labelsColumn(one.Labels)
	if err != nil {
		return fmt.Errorf("update session %q: %w", one.ID, err)
	}
	details, err := toJSON("details", one.Details)
	if err != nil {
		return fmt.Errorf("update session %q: %w", one.ID, err)
	}
	err = s.writeDurably(ctx, func(ctx context.Context) error {
		done, err := changed(s.updateSession.ExecContext(ctx, one.State.Stage(), one.Reason, one.Detail, one.Engine, one.Sandbox,
			limits, timeColumn(one.EndTime), one.Lifetime, labels, details, phaseColumn(one.State), one.ID))
		if done || err != nil {
			return err
		}
		var state session.State
		if err := s.sessionState.QueryRowContext(ctx, one.ID).Scan(&state); err != nil {
			return err
		}
		return fault.New(fault.FailedPrecondition, "SESSION_ENDED",
			"its state %d must not go back to %d", state, one.State.Stage())
	})
	return sessionError("update", one.ID, err)
}

// GetSession implements session.Store.
func (s *Store) GetSession(ctx context.Context, id string) (session.Session, error) {
	one, err := scanSession(s.getSession.QueryRowContext(ctx, id))
	return one, sessionError("read", id, err)
}

// ListSessions implements session.Store.
func (s *Store) ListSessions(ctx context.Context, q session.Query) ([]session.Session, error) {
	if q.Limit < 1 {
		return nil, fmt.Errorf("list sessions: limit %d is less than 1", q.Limit)
	}
	before := q.Before
	if before == "" {
		before = afterAll
	}
	var rows *sql.Rows
	var err error
	switch {
	case !q.Caller.All || q.Ascending || q.Last != "" || len(q.Filter.Terms) > 0:
		text, args := sessionsQuery(q)
		rows, err = s.reader.QueryContext(ctx, text, args...)
	case q.Terminated:
		rows, err = s.listSessions.QueryContext(ctx, before, q.Limit)
	default:
		rows, err = s.listAlive.QueryContext(ctx, before, q.Limit)
	}
	page, err := collect(rows, err, scanSession)
	if err != nil {
		return nil, fmt.Errorf("list sessions: %w", err)
	}
	return page, nil
}

// UnfinishedSessions implements session.Store.
func (s *Store) UnfinishedSessions(ctx context.Context) ([]session.Session, error) {
	rows, err := s.unfinishedSessions.QueryContext(ctx)
	all, err := collect(rows, err, scanSession)
	if err != nil {
		return nil, fmt.Errorf("list unfinished sessions: %w", err)
	}
	return all, nil
}

// sessionError says what was being done, and that there is no such session.
func sessionError(action, id string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return fault.New(fault.NotFound, "SESSION_NOT_FOUND", "there is no session %q", id)
	default:
		return fmt.Errorf("%s session %q: %w", action, id, err)
	}
}

// phaseColumn is a state within a stage; 0 where it is the stage's own.
func phaseColumn(s session.State) session.State {
	if s == s.Stage() {
		return 0
	}
	return s
}

func scanSession(r row) (session.Session, error) {
	var (
		one                     session.Session
		limits, labels, network sql.NullString
		details                 sql.NullString
		create                  int64
		end                     sql.NullInt64
		phase                   session.State
	)
	err := r.Scan(&one.ID, &one.State, &one.Reason, &one.Detail, &one.Engine, &one.Sandbox,
		&limits, &one.Lifetime, &labels, &create, &end, &one.Owner, &network, &details, &phase)
	if err != nil {
		return session.Session{}, err
	}
	if phase != 0 {
		one.State = phase
	}
	one.CreateTime = fromTimeColumn(sql.NullInt64{Int64: create, Valid: true})
	one.EndTime = fromTimeColumn(end)
	err = errors.Join(
		fromJSON("limits", limits, &one.Limits),
		fromJSON("labels", labels, &one.Labels),
		fromJSON("network", network, &one.Network),
		fromJSON("details", details, &one.Details),
	)
	if err != nil {
		return session.Session{}, fmt.Errorf("session %q: %w", one.ID, err)
	}
	return one, nil
}
