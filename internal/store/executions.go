package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

const (
	insertExecution = `INSERT INTO executions (id, session, command, limits, retained_bytes, labels,
		engine, sandbox, state, result, epoch, sequence, create_time, start_time, end_time,
		policies, log_bytes, warned, expire_time,
		owner, stored_bytes, network)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?,
		?, ?, ?)`

	// The condition on state keeps a life from going back, whoever writes last.
	updateExecution = `UPDATE executions SET state = ?1, result = ?2, engine = ?3, sandbox = ?4, limits = ?5,
		epoch = ?6, sequence = ?7, start_time = ?8, end_time = ?9, log_bytes = ?10, warned = ?11, expire_time = ?12,
		stored_bytes = ?13 WHERE id = ?14 AND state <= ?1`

	selectExecution = `SELECT id, session, command, limits, retained_bytes, labels,
		engine, sandbox, state, result, epoch, sequence, create_time, start_time, end_time,
		policies, log_bytes, warned, owner, network FROM executions `

	getExecution         = selectExecution + `WHERE id = ?`
	listExecutions       = selectExecution + `WHERE id < ? ORDER BY id DESC LIMIT ?`
	listOfSession        = selectExecution + `WHERE session = ? AND session <> '' AND id < ? ORDER BY id DESC LIMIT ?`
	listInSessions       = selectExecution + `WHERE session <> '' AND id < ? ORDER BY id DESC LIMIT ?`
	unfinishedExecutions = selectExecution + `WHERE state < 4 ORDER BY id`

	// The second condition lets SQLite use the partial index.
	storedBytesOfOwner = `SELECT COALESCE(SUM(stored_bytes), 0) FROM executions WHERE owner = ? AND owner <> 'local'`
)

// InsertExecution implements execution.Store. Of the command's environment only the
// names are written, of its source the first 4,096 bytes.
func (s *Store) InsertExecution(ctx context.Context, e execution.Execution) error {
	return s.insertExecutionWith(ctx, e, func(ctx context.Context, args ...any) error {
		return s.write(ctx, func(ctx context.Context) error {
			_, err := s.insertExecution.ExecContext(ctx, args...)
			return err
		})
	})
}

// insertExecutionWith has insert write the columns of an execution.
func (s *Store) insertExecutionWith(ctx context.Context, e execution.Execution, insert func(ctx context.Context, args ...any) error) error {
	command, err := toJSON("command", storable(e.Command))
	if err != nil {
		return fmt.Errorf("insert execution %q: %w", e.ID, err)
	}
	changing, err := encodeExecution(e)
	if err != nil {
		return fmt.Errorf("insert execution %q: %w", e.ID, err)
	}
	labels, err := labelsColumn(e.Labels)
	if err != nil {
		return fmt.Errorf("insert execution %q: %w", e.ID, err)
	}
	network, err := networkColumn(e.Network)
	if err != nil {
		return fmt.Errorf("insert execution %q: %w", e.ID, err)
	}
	err = insert(ctx, e.ID, e.Session, command, changing.limits, e.RetainedBytes, labels,
		e.Engine, e.Sandbox, e.State, changing.result, e.Epoch, int64(e.Sequence),
		e.CreateTime.UnixNano(), timeColumn(e.StartTime), timeColumn(e.EndTime),
		changing.policies, e.LogBytes, e.Warned, expireColumn(e),
		e.Owner, storedBytes(e.Result), network)
	if isDuplicate(err) {
		return fault.New(fault.AlreadyExists, "EXECUTION_EXISTS", "execution %q exists", e.ID)
	}
	if err != nil {
		return fmt.Errorf("insert execution %q: %w", e.ID, err)
	}
	return nil
}

// UpdateExecution implements execution.Store. A fault FailedPrecondition
// (EXECUTION_ENDED) if it would move State back; nothing is changed then.
func (s *Store) UpdateExecution(ctx context.Context, e execution.Execution) error {
	changing, err := encodeExecution(e)
	if err != nil {
		return fmt.Errorf("update execution %q: %w", e.ID, err)
	}
	err = s.write(ctx, func(ctx context.Context) error {
		done, err := changed(s.updateExecution.ExecContext(ctx, e.State, changing.result, e.Engine, e.Sandbox, changing.limits,
			e.Epoch, int64(e.Sequence), timeColumn(e.StartTime), timeColumn(e.EndTime),
			e.LogBytes, e.Warned, expireColumn(e),
			storedBytes(e.Result), e.ID))
		if done || err != nil {
			return err
		}
		var state execution.State
		if err := s.executionState.QueryRowContext(ctx, e.ID).Scan(&state); err != nil {
			return err
		}
		return fault.New(fault.FailedPrecondition, "EXECUTION_ENDED",
			"its state %d must not go back to %d", state, e.State)
	})
	return executionError("update", e.ID, err)
}

// GetExecution implements execution.Store.
func (s *Store) GetExecution(ctx context.Context, id string) (execution.Execution, error) {
	e, err := scanExecution(s.getExecution.QueryRowContext(ctx, id))
	return e, executionError("read", id, err)
}

// ListExecutions implements execution.Store.
func (s *Store) ListExecutions(ctx context.Context, q execution.Query) ([]execution.Execution, error) {
	if q.Limit < 1 {
		return nil, fmt.Errorf("list executions: limit %d is less than 1", q.Limit)
	}
	before := q.Before
	if before == "" {
		before = afterAll
	}
	var rows *sql.Rows
	var err error
	switch {
	case !q.Caller.All || q.Ascending || q.Unfinished || q.MinID != "" || q.MaxID != "" || len(q.Filter.Terms) > 0:
		text, args := executionsQuery(q)
		rows, err = s.reader.QueryContext(ctx, text, args...)
	case q.Session != "":
		rows, err = s.listOfSession.QueryContext(ctx, q.Session, before, q.Limit)
	case q.InAnySession:
		rows, err = s.listInSessions.QueryContext(ctx, before, q.Limit)
	default:
		rows, err = s.listExecutions.QueryContext(ctx, before, q.Limit)
	}
	page, err := collect(rows, err, scanExecution)
	if err != nil {
		return nil, fmt.Errorf("list executions: %w", err)
	}
	return page, nil
}

// UnfinishedExecutions implements execution.Store.
func (s *Store) UnfinishedExecutions(ctx context.Context) ([]execution.Execution, error) {
	rows, err := s.unfinishedExecutions.QueryContext(ctx)
	all, err := collect(rows, err, scanExecution)
	if err != nil {
		return nil, fmt.Errorf("list unfinished executions: %w", err)
	}
	return all, nil
}

// DeleteExecution implements execution.Store.
func (s *Store) DeleteExecution(ctx context.Context, id string) error {
	err := s.writeDurably(ctx, func(ctx context.Context) error {
		done, err := changed(s.deleteExecution.ExecContext(ctx, id))
		if err == nil && !done {
			return sql.ErrNoRows
		}
		return err
	})
	return executionError("delete", id, err)
}

// StoredBytes implements execution.Store.
func (s *Store) StoredBytes(ctx context.Context, owner string) (int64, error) {
	var sum int64
	if err := s.storedBytesOfOwner.QueryRowContext(ctx, owner).Scan(&sum); err != nil {
		return 0, fmt.Errorf("sum up the output of %q: %w", owner, err)
	}
	return sum, nil
}

// storedBytes is how much output is kept of an execution with this result.
func storedBytes(r *execution.Result) int64 {
	if r == nil {
		return 0
	}
	var sum int64
	for _, total := range r.Totals {
		sum += total.Size - total.Dropped
	}
	return sum
}

// executionError says what was being done, and that there is no such execution.
func executionError(action, id string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return fault.New(fault.NotFound, "EXECUTION_NOT_FOUND", "there is no execution %q", id)
	default:
		return fmt.Errorf("%s execution %q: %w", action, id, err)
	}
}

// executionColumns are the columns that need encoding, beside the command and the labels.
type executionColumns struct {
	limits   string
	policies string
	result   sql.NullString
}

func encodeExecution(e execution.Execution) (executionColumns, error) {
	var columns executionColumns
	var err error
	if columns.limits, err = toJSON("limits", e.Limits); err != nil {
		return columns, err
	}
	if columns.policies, err = toJSON("policies", e.Policies); err != nil {
		return columns, err
	}
	if e.Result != nil {
		columns.result.Valid = true
		columns.result.String, err = toJSON("result", e.Result)
	}
	return columns, err
}

func scanExecution(r row) (execution.Execution, error) {
	var (
		e                                                  execution.Execution
		command, limits, labels, result, policies, network sql.NullString
		sequence, create                                   int64
		start, end                                         sql.NullInt64
	)
	err := r.Scan(&e.ID, &e.Session, &command, &limits, &e.RetainedBytes, &labels,
		&e.Engine, &e.Sandbox, &e.State, &result, &e.Epoch, &sequence, &create, &start, &end,
		&policies, &e.LogBytes, &e.Warned, &e.Owner, &network)
	if err != nil {
		return execution.Execution{}, err
	}
	e.Sequence = uint64(sequence)
	e.CreateTime = fromTimeColumn(sql.NullInt64{Int64: create, Valid: true})
	e.StartTime, e.EndTime = fromTimeColumn(start), fromTimeColumn(end)
	err = errors.Join(
		fromJSON("command", command, &e.Command),
		fromJSON("limits", limits, &e.Limits),
		fromJSON("labels", labels, &e.Labels),
		fromJSON("result", result, &e.Result),
		fromJSON("policies", policies, &e.Policies),
		fromJSON("network", network, &e.Network),
	)
	if err != nil {
		return execution.Execution{}, fmt.Errorf("execution %q: %w", e.ID, err)
	}
	return e, nil
}

// changed says whether a statement found its row.
func changed(result sql.Result, err error) (bool, error) {
	if err != nil {
		return false, err
	}
	n, err := result.RowsAffected()
	return n > 0, err
}

// isDuplicate says whether an insert failed because its id is taken.
func isDuplicate(err error) bool {
	failure, ok := errors.AsType[*sqlite.Error](err)
	return ok && (failure.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY || failure.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE)
}
