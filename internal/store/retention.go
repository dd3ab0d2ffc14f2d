package store

import (
	"context"
	"database/sql"
	"fmt"
	"time"

	"github.com/harvest-run/executord/internal/execution"
)

const (
	countEnded = `SELECT COUNT(*), COALESCE(SUM(log_bytes), 0) FROM executions INDEXED BY executions_ended WHERE state = 4`

	listEnded = `SELECT id, log_bytes, end_time FROM executions INDEXED BY executions_ended
		WHERE state = 4 AND end_time < ?1 AND (end_time, id) > (?2, ?3) ORDER BY end_time, id LIMIT ?4`
	listExpired = `SELECT id, log_bytes, expire_time FROM executions INDEXED BY executions_expiring
		WHERE expire_time IS NOT NULL AND expire_time < ?1 AND (expire_time, id) > (?2, ?3) ORDER BY expire_time, id LIMIT ?4`

	deleteEnded = `DELETE FROM executions WHERE id = ? AND state = 4`
)

// CountEnded implements execution.Store.
func (s *Store) CountEnded(ctx context.Context) (execution.Stored, error) {
	var sum execution.Stored
	if err := s.countEnded.QueryRowContext(ctx).Scan(&sum.Executions, &sum.Bytes); err != nil {
		return execution.Stored{}, fmt.Errorf("count ended executions: %w", err)
	}
	return sum, nil
}

// ListEnded implements execution.Store.
func (s *Store) ListEnded(ctx context.Context, q execution.KeptQuery) ([]execution.Kept, error) {
	if q.Limit < 1 {
		return nil, fmt.Errorf("list ended executions: limit %d is less than 1", q.Limit)
	}
	statement := s.listEnded
	if q.Expired {
		statement = s.listExpired
	}
	var after int64
	if !q.After.Time.IsZero() {
		after = q.After.Time.UnixNano()
	}
	rows, err := statement.QueryContext(ctx, q.Before.UnixNano(), after, q.After.ID, q.Limit)
	page, err := collect(rows, err, func(r row) (execution.Kept, error) {
		var k execution.Kept
		var at sql.NullInt64
		err := r.Scan(&k.ID, &k.LogBytes, &at)
		k.Time = fromTimeColumn(at)
		return k, err
	})
	if err != nil {
		return nil, fmt.Errorf("list ended executions: %w", err)
	}
	return page, nil
}

// DeleteEnded implements execution.Store.
func (s *Store) DeleteEnded(ctx context.Context, ids []string) error {
	err := s.writeDurably(ctx, func(ctx context.Context) error {
		tx, err := s.writer.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		defer func() { _ = tx.Rollback() }() // of one that was committed it does nothing
		one := tx.StmtContext(ctx, s.deleteEnded)
		for _, id := range ids {
			if _, err := one.ExecContext(ctx, id); err != nil {
				return err
			}
		}
		return tx.Commit()
	})
	if err != nil {
		return fmt.Errorf("delete %d ended executions: %w", len(ids), err)
	}
	return nil
}

// expireColumn is when an ended execution's own retention is over.
func expireColumn(e execution.Execution) sql.NullInt64 {
	if e.State != execution.Ended || e.Policies.Retention <= 0 || e.EndTime.IsZero() {
		return sql.NullInt64{}
	}
	return timeColumn(e.EndTime.Add(min(e.Policies.Retention, maxRetention)))
}

// maxRetention keeps the sum of a time and a retention from overflowing.
const maxRetention = 100 * 365 * 24 * time.Hour
