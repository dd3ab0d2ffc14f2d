package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/turn"
)

var _ turn.Store = (*Store)(nil)

const (
	// maxShownText is how many characters of a text lists show, maxShownFiles how many
	// changed files.
	maxShownText  = 2048
	maxShownFiles = 100
)

const (
	insertTurn = `INSERT INTO turns (id, session, number, owner, state, text, author, attachments, prompt_model, create_time)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	insertAttachment = `INSERT INTO turn_attachments (turn, position, data) VALUES (?, ?, ?)`

	// The condition on state keeps a life from going back, whoever writes last.
	updateTurn = `UPDATE turns SET state = ?1, model = ?2, summary = ?3, result = ?4, start_time = ?5, end_time = ?6
		WHERE id = ?7 AND state < 3 AND state <= ?1`

	turnColumns = `id, session, number, owner, state, author, attachments, prompt_model, model, create_time, start_time, end_time`

	getTurn   = `SELECT ` + turnColumns + `, text, result FROM turns WHERE id = ?`
	listTurns = `SELECT ` + turnColumns + `, substr(text, 1, 2048), summary FROM turns
		WHERE session = ? AND number < ? ORDER BY number DESC LIMIT ?`
	unfinishedTurns = `SELECT ` + turnColumns + `, substr(text, 1, 2048), summary FROM turns
		WHERE state < 3 ORDER BY session, number`
	turnTotals = `SELECT COALESCE(MAX(number), 0), COUNT(start_time), MAX(end_time),
		COALESCE(SUM(json_extract(summary, '$.usage.input_tokens')), 0),
		COALESCE(SUM(json_extract(summary, '$.usage.output_tokens')), 0),
		COALESCE(SUM(json_extract(summary, '$.usage.reasoning_tokens')), 0),
		COALESCE(SUM(json_extract(summary, '$.usage.cache_read_tokens')), 0),
		COALESCE(SUM(json_extract(summary, '$.usage.cache_write_tokens')), 0),
		COALESCE(SUM(json_extract(summary, '$.usage.cost_micros')), 0) FROM turns WHERE session = ?`
	attachmentData = `SELECT data FROM turn_attachments WHERE turn = ? ORDER BY position`

	sessionsWithTurns = `SELECT id FROM sessions WHERE state = ? AND end_time < ?
		AND EXISTS (SELECT 1 FROM turns WHERE turns.session = sessions.id) ORDER BY id LIMIT ?`
)

// turnStatements are those about turns and interactions.
type turnStatements struct {
	insert, insertAttachment, update, state                 *sql.Stmt
	get, list, unfinished, totals, data, sessions, session  *sql.Stmt
	insertInteraction, resolveInteraction, interactionState *sql.Stmt
	getInteraction, interactionsOf                          *sql.Stmt
	listInteractions, listPending                           *sql.Stmt
}

// attachment is one as a turn's row tells of it.
type attachment struct {
	Filename  string `json:"filename,omitempty"`
	MediaType string `json:"media_type"`
}

// InsertTurn implements turn.Store.
func (s *Store) InsertTurn(ctx context.Context, key idempotency.Key, t turn.Turn) error {
	attachments, err := attachmentsColumn(t.Prompt.Attachments)
	if err != nil {
		return fmt.Errorf("insert turn %q: %w", t.ID, err)
	}
	model, err := modelColumn(t.Prompt.Model)
	if err != nil {
		return fmt.Errorf("insert turn %q: %w", t.ID, err)
	}
	insert := func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.StmtContext(ctx, s.turns.insert).ExecContext(ctx, t.ID, t.Session, t.Number, t.Owner, t.State,
			t.Prompt.Text, t.Prompt.Author, attachments, model, t.CreateTime.UnixNano())
		for i, a := range t.Prompt.Attachments {
			if err != nil {
				break
			}
			data := a.Data
			if data == nil {
				data = []byte{}
			}
			_, err = tx.StmtContext(ctx, s.turns.insertAttachment).ExecContext(ctx, t.ID, i, data)
		}
		return err
	}
	if key.ID == "" {
		err = s.inTransaction(ctx, insert)
	} else {
		err = s.once(ctx, idempotency.NewRecord(key, t.ID), func(tx *sql.Tx) error { return insert(context.WithoutCancel(ctx), tx) })
	}
	if err == nil {
		err = s.syncer.sync()
	}
	if isDuplicate(err) {
		return fault.New(fault.AlreadyExists, "TURN_EXISTS", "turn %q exists", t.ID)
	}
	if err != nil {
		return fmt.Errorf("insert turn %q: %w", t.ID, err)
	}
	return nil
}

func attachmentsColumn(all []turn.Attachment) (sql.NullString, error) {
	if len(all) == 0 {
		return sql.NullString{}, nil
	}
	shown := make([]attachment, len(all))
	for i, a := range all {
		shown[i] = attachment{a.Filename, a.MediaType}
	}
	text, err := toJSON("attachments", shown)
	return sql.NullString{String: text, Valid: true}, err
}

func modelColumn(m agent.Model) (sql.NullString, error) {
	if m == (agent.Model{}) {
		return sql.NullString{}, nil
	}
	text, err := toJSON("model", m)
	return sql.NullString{String: text, Valid: true}, err
}

// UpdateTurn implements turn.Store.
func (s *Store) UpdateTurn(ctx context.Context, t turn.Turn) error {
	model, err := modelColumn(t.Model)
	if err != nil {
		return fmt.Errorf("update turn %q: %w", t.ID, err)
	}
	summary, result, err := resultColumns(t.Result)
	if err != nil {
		return fmt.Errorf("update turn %q: %w", t.ID, err)
	}
	err = s.writeDurably(ctx, func(ctx context.Context) error {
		done, err := changed(s.turns.update.ExecContext(ctx, t.State, model, summary, result, timeColumn(t.StartTime), timeColumn(t.EndTime), t.ID))
		if done || err != nil {
			return err
		}
		var state turn.State
		if err := s.turns.state.QueryRowContext(ctx, t.ID).Scan(&state); err != nil {
			return err
		}
		return fault.New(fault.FailedPrecondition, "TURN_ENDED", "its state %v must not become %v", state, t.State)
	})
	return turnError("update", t.ID, err)
}

// resultColumns are those of a result: what lists show, and all of it.
func resultColumns(r *turn.Result) (summary, whole sql.NullString, err error) {
	if r == nil {
		return summary, whole, nil
	}
	short := *r
	short.Text = cut(short.Text, maxShownText)
	short.Diffs = nil
	for _, d := range r.Diffs[:min(len(r.Diffs), maxShownFiles)] {
		d.Patch = ""
		short.Diffs = append(short.Diffs, d)
	}
	if summary.String, err = toJSON("summary", short); err != nil {
		return summary, whole, err
	}
	if whole.String, err = toJSON("result", r); err != nil {
		return summary, whole, err
	}
	summary.Valid, whole.Valid = true, true
	return summary, whole, nil
}

// GetTurn implements turn.Store.
func (s *Store) GetTurn(ctx context.Context, id string) (turn.Turn, error) {
	t, err := scanTurn(s.turns.get.QueryRowContext(ctx, id))
	return t, turnError("read", id, err)
}

// TurnSession implements turn.Store.
func (s *Store) TurnSession(ctx context.Context, id string) (string, error) {
	var session string
	err := s.turns.session.QueryRowContext(ctx, id).Scan(&session)
	return session, turnError("find", id, err)
}

// GetPrompt implements turn.Store.
func (s *Store) GetPrompt(ctx context.Context, id string) (turn.Prompt, error) {
	t, err := s.GetTurn(ctx, id)
	if err != nil {
		return turn.Prompt{}, err
	}
	rows, err := s.turns.data.QueryContext(ctx, id)
	data, err := collect(rows, err, func(r row) ([]byte, error) {
		var data []byte
		err := r.Scan(&data)
		return data, err
	})
	if err == nil && len(data) != len(t.Prompt.Attachments) {
		err = fmt.Errorf("it has %d attachments, and the data of %d", len(t.Prompt.Attachments), len(data))
	}
	if err != nil {
		return turn.Prompt{}, fmt.Errorf("read the attachments of turn %q: %w", id, err)
	}
	for i := range data {
		t.Prompt.Attachments[i].Data = data[i]
	}
	return t.Prompt, nil
}

// ListTurns implements turn.Store.
func (s *Store) ListTurns(ctx context.Context, q turn.Query) ([]turn.Turn, error) {
	if q.Limit < 1 {
		return nil, fmt.Errorf("list turns: limit %d is less than 1", q.Limit)
	}
	before := int64(q.Before)
	if before == 0 {
		before = 1 << 62
	}
	rows, err := s.turns.list.QueryContext(ctx, q.Session, before, q.Limit)
	page, err := collect(rows, err, scanTurn)
	if err != nil {
		return nil, fmt.Errorf("list turns: %w", err)
	}
	return page, nil
}

// UnfinishedTurns implements turn.Store.
func (s *Store) UnfinishedTurns(ctx context.Context) ([]turn.Turn, error) {
	rows, err := s.turns.unfinished.QueryContext(ctx)
	all, err := collect(rows, err, scanTurn)
	if err != nil {
		return nil, fmt.Errorf("list unfinished turns: %w", err)
	}
	return all, nil
}

// Totals implements turn.Store.
func (s *Store) Totals(ctx context.Context, session string) (turn.Totals, error) {
	var t turn.Totals
	var end sql.NullInt64
	u := &t.Usage
	err := s.turns.totals.QueryRowContext(ctx, session).Scan(&t.Last, &t.Begun, &end,
		&u.InputTokens, &u.OutputTokens, &u.ReasoningTokens, &u.CacheReadTokens, &u.CacheWriteTokens, &u.CostMicros)
	if err != nil {
		return turn.Totals{}, fmt.Errorf("sum up the turns of session %q: %w", session, err)
	}
	t.LastEnd = fromTimeColumn(end)
	return t, nil
}

// SessionsWithTurns implements turn.Store.
func (s *Store) SessionsWithTurns(ctx context.Context, endedBefore time.Time, limit int) ([]string, error) {
	rows, err := s.turns.sessions.QueryContext(ctx, session.Terminated, endedBefore.UnixNano(), limit)
	ids, err := collect(rows, err, scanID)
	if err != nil {
		return nil, fmt.Errorf("find sessions with turns: %w", err)
	}
	return ids, nil
}

func scanID(r row) (string, error) {
	var id string
	err := r.Scan(&id)
	return id, err
}

// DeleteTurns implements turn.Store.
func (s *Store) DeleteTurns(ctx context.Context, session string) ([]string, error) {
	var ids []string
	err := s.inTransaction(ctx, func(ctx context.Context, tx *sql.Tx) error {
		for _, text := range []string{
			`DELETE FROM turn_attachments WHERE turn IN (SELECT id FROM turns WHERE session = ?)`,
			`DELETE FROM interactions WHERE session = ?`,
		} {
			if _, err := tx.ExecContext(ctx, text, session); err != nil {
				return err
			}
		}
		rows, err := tx.QueryContext(ctx, `DELETE FROM turns WHERE session = ? RETURNING id`, session)
		ids, err = collect(rows, err, scanID)
		return err
	})
	if err == nil {
		err = s.syncer.sync()
	}
	if err != nil {
		return nil, fmt.Errorf("delete the turns of session %q: %w", session, err)
	}
	return ids, nil
}

// turnError says what was being done, and that there is no such turn.
func turnError(action, id string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return fault.New(fault.NotFound, "TURN_NOT_FOUND", "there is no turn %q", id)
	default:
		return fmt.Errorf("%s turn %q: %w", action, id, err)
	}
}

func scanTurn(r row) (turn.Turn, error) {
	var (
		t                                       turn.Turn
		attachments, promptModel, model, result sql.NullString
		create                                  int64
		start, end                              sql.NullInt64
	)
	err := r.Scan(&t.ID, &t.Session, &t.Number, &t.Owner, &t.State, &t.Prompt.Author, &attachments, &promptModel, &model,
		&create, &start, &end, &t.Prompt.Text, &result)
	if err != nil {
		return turn.Turn{}, err
	}
	t.CreateTime = fromTimeColumn(sql.NullInt64{Int64: create, Valid: true})
	t.StartTime, t.EndTime = fromTimeColumn(start), fromTimeColumn(end)
	var shown []attachment
	err = errors.Join(
		fromJSON("attachments", attachments, &shown),
		fromJSON("prompt_model", promptModel, &t.Prompt.Model),
		fromJSON("model", model, &t.Model),
	)
	if result.Valid && err == nil {
		t.Result = new(turn.Result)
		err = fromJSON("result", result, t.Result)
	}
	if err != nil {
		return turn.Turn{}, fmt.Errorf("turn %q: %w", t.ID, err)
	}
	for _, a := range shown {
		t.Prompt.Attachments = append(t.Prompt.Attachments, turn.Attachment{Filename: a.Filename, MediaType: a.MediaType})
	}
	return t, nil
}
