package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/session"
)

const (
	// A name that is taken changes nothing: who wrote it first keeps it.
	insertRequest = `INSERT INTO request_ids (owner, request_id, method, fingerprint, resource, create_time)
		VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING`

	findRequest = `SELECT owner, request_id, method, fingerprint, resource, create_time FROM request_ids
		WHERE owner = ? AND request_id = ?`

	deleteRequests = `DELETE FROM request_ids WHERE (owner, request_id) IN
		(SELECT owner, request_id FROM request_ids WHERE create_time < ? ORDER BY create_time LIMIT ?)`
)

// FindRequest implements idempotency.Store.
func (s *Store) FindRequest(ctx context.Context, owner, id string) (idempotency.Record, error) {
	return scanRequest(s.findRequest.QueryRowContext(ctx, owner, id))
}

// InsertRequest implements idempotency.Store.
func (s *Store) InsertRequest(ctx context.Context, r idempotency.Record) error {
	return s.inTransaction(ctx, func(ctx context.Context, tx *sql.Tx) error {
		done, err := changed(s.insert(ctx, tx, r))
		if done || err != nil {
			return err
		}
		earlier, err := scanRequest(tx.StmtContext(ctx, s.findRequestToWrite).QueryRowContext(ctx, r.Owner, r.ID))
		if err != nil {
			return err
		}
		return earlier.Check(r.Key)
	})
}

// DeleteRequests implements idempotency.Expirer.
func (s *Store) DeleteRequests(ctx context.Context, before time.Time, limit int) (int, error) {
	var deleted int64
	err := s.write(ctx, func(ctx context.Context) error {
		result, err := s.deleteRequests.ExecContext(ctx, before.UnixNano(), limit)
		if err == nil {
			deleted, err = result.RowsAffected()
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("delete requests: %w", err)
	}
	return int(deleted), nil
}

// InsertExecutionOnce implements execution.Store.
func (s *Store) InsertExecutionOnce(ctx context.Context, key idempotency.Key, e execution.Execution) error {
	return s.insertExecutionWith(ctx, e, func(ctx context.Context, args ...any) error {
		return s.once(ctx, idempotency.NewRecord(key, e.ID), func(tx *sql.Tx) error {
			_, err := tx.StmtContext(ctx, s.insertExecution).ExecContext(ctx, args...)
			return err
		})
	})
}

// DeleteExecutionOnce implements execution.Store.
func (s *Store) DeleteExecutionOnce(ctx context.Context, key idempotency.Key, id string) error {
	err := s.once(ctx, idempotency.NewRecord(key, id), func(tx *sql.Tx) error {
		done, err := changed(tx.StmtContext(ctx, s.deleteExecution).ExecContext(ctx, id))
		if err == nil && !done {
			return sql.ErrNoRows
		}
		return err
	})
	if err == nil {
		err = s.syncer.sync()
	}
	return executionError("delete", id, err)
}

// InsertSessionOnce implements session.Store.
func (s *Store) InsertSessionOnce(ctx context.Context, key idempotency.Key, one session.Session) error {
	err := s.insertSessionWith(ctx, one, func(ctx context.Context, args ...any) error {
		return s.once(ctx, idempotency.NewRecord(key, one.ID), func(tx *sql.Tx) error {
			_, err := tx.StmtContext(ctx, s.insertSession).ExecContext(ctx, args...)
			return err
		})
	})
	if err != nil {
		return err
	}
	return s.syncer.sync()
}

// once records a request and does f in one transaction. A fault AlreadyExists
// (REQUEST_ID_REUSED) if its name is taken, be it by a request that is equal: who comes
// here did not know of that.
func (s *Store) once(ctx context.Context, r idempotency.Record, f func(tx *sql.Tx) error) error {
	return s.inTransaction(ctx, func(ctx context.Context, tx *sql.Tx) error {
		done, err := changed(s.insert(ctx, tx, r))
		if err != nil {
			return err
		}
		if !done {
			return fault.New(fault.AlreadyExists, "REQUEST_ID_REUSED", "request_id %q was used for another request", r.ID)
		}
		return f(tx)
	})
}

func (s *Store) insert(ctx context.Context, tx *sql.Tx, r idempotency.Record) (sql.Result, error) {
	return tx.StmtContext(ctx, s.insertRequest).ExecContext(ctx,
		r.Owner, r.ID, r.Method, r.Fingerprint, r.Resource, r.CreateTime.UnixNano())
}

// inTransaction is write with several statements, of which all are done or none.
func (s *Store) inTransaction(ctx context.Context, f func(ctx context.Context, tx *sql.Tx) error) error {
	return s.write(ctx, func(ctx context.Context) error {
		tx, err := s.writer.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		if err := f(ctx, tx); err != nil {
			return errors.Join(err, tx.Rollback())
		}
		return tx.Commit()
	})
}

func scanRequest(r row) (idempotency.Record, error) {
	var found idempotency.Record
	var create int64
	err := r.Scan(&found.Owner, &found.ID, &found.Method, &found.Fingerprint, &found.Resource, &create)
	if errors.Is(err, sql.ErrNoRows) {
		return found, fault.New(fault.NotFound, "REQUEST_NOT_FOUND", "there is no such request")
	}
	found.CreateTime = time.Unix(0, create).UTC()
	return found, err
}
