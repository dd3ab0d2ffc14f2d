package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/image"
)

var _ image.Store = (*Store)(nil)

const (
	insertBuild = `INSERT INTO image_builds (id, image, engine, recipe, sandbox, state, ref, size_bytes, create_time, end_time, failure)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`

	// The condition on state keeps a build from going back, whoever writes last.
	updateBuild = `UPDATE image_builds SET state = ?1, ref = ?2, size_bytes = ?3, end_time = ?4, failure = ?5 WHERE id = ?6 AND state <= ?1`

	selectBuild = `SELECT id, image, engine, recipe, sandbox, state, ref, size_bytes, create_time, end_time, failure FROM image_builds `

	listBuilds = selectBuild + `WHERE (?1 = '' OR engine = ?1) AND (?2 = '' OR image = ?2) ORDER BY id DESC`
)

// InsertBuild implements image.Store.
func (s *Store) InsertBuild(ctx context.Context, key idempotency.Key, b image.Build) error {
	failure, err := failureColumn(b.Failure)
	if err != nil {
		return fmt.Errorf("insert build %q: %w", b.ID, err)
	}
	args := []any{
		b.ID, b.Image, b.Engine, b.Recipe, b.Sandbox, b.State, b.Ref, b.SizeBytes,
		b.CreateTime.UnixNano(), timeColumn(b.EndTime), failure,
	}
	insert := func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, insertBuild, args...)
		return err
	}
	if key.ID != "" {
		err = s.once(ctx, idempotency.NewRecord(key, b.ID), insert)
	} else {
		err = s.inTransaction(ctx, func(_ context.Context, tx *sql.Tx) error { return insert(tx) })
	}
	if err == nil {
		err = s.syncer.sync()
	}
	if isDuplicate(err) {
		return fault.New(fault.AlreadyExists, "BUILD_EXISTS", "build %q exists", b.ID)
	}
	if err != nil {
		return fmt.Errorf("insert build %q: %w", b.ID, err)
	}
	return nil
}

// UpdateBuild implements image.Store. A fault NotFound also if it would move State back.
func (s *Store) UpdateBuild(ctx context.Context, b image.Build) error {
	failure, err := failureColumn(b.Failure)
	if err != nil {
		return fmt.Errorf("update build %q: %w", b.ID, err)
	}
	return buildError("update", b.ID, s.writeDurably(ctx, func(ctx context.Context) error {
		done, err := changed(s.writer.ExecContext(ctx, updateBuild, b.State, b.Ref, b.SizeBytes, timeColumn(b.EndTime), failure, b.ID))
		if err == nil && !done {
			return sql.ErrNoRows
		}
		return err
	}))
}

// GetBuild implements image.Store.
func (s *Store) GetBuild(ctx context.Context, id string) (image.Build, error) {
	b, err := scanBuild(s.reader.QueryRowContext(ctx, selectBuild+`WHERE id = ?`, id))
	return b, buildError("read", id, err)
}

// ListBuilds implements image.Store.
func (s *Store) ListBuilds(ctx context.Context, engine, name string) ([]image.Build, error) {
	rows, err := s.reader.QueryContext(ctx, listBuilds, engine, name)
	all, err := collect(rows, err, scanBuild)
	if err != nil {
		return nil, fmt.Errorf("list builds: %w", err)
	}
	return all, nil
}

// DeleteBuild implements image.Store.
func (s *Store) DeleteBuild(ctx context.Context, id string) error {
	return buildError("delete", id, s.writeDurably(ctx, func(ctx context.Context) error {
		_, err := s.writer.ExecContext(ctx, `DELETE FROM image_builds WHERE id = ?`, id)
		return err
	}))
}

// buildError says what was being done, and that there is no such build.
func buildError(action, id string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return fault.New(fault.NotFound, "BUILD_NOT_FOUND", "there is no build %q", id)
	default:
		return fmt.Errorf("%s build %q: %w", action, id, err)
	}
}

// failureColumn is the column of a failure: NULL for none.
func failureColumn(f *image.Failure) (sql.NullString, error) {
	if f == nil {
		return sql.NullString{}, nil
	}
	text, err := toJSON("failure", f)
	return sql.NullString{String: text, Valid: true}, err
}

func scanBuild(r row) (image.Build, error) {
	var (
		b       image.Build
		create  int64
		end     sql.NullInt64
		failure sql.NullString
	)
	err := r.Scan(&b.ID, &b.Image, &b.Engine, &b.Recipe, &b.Sandbox, &b.State, &b.Ref, &b.SizeBytes, &create, &end, &failure)
	if err != nil {
		return image.Build{}, err
	}
	b.CreateTime = fromTimeColumn(sql.NullInt64{Int64: create, Valid: true})
	b.EndTime = fromTimeColumn(end)
	if failure.Valid {
		b.Failure = new(image.Failure)
		if err := fromJSON("failure", failure, b.Failure); err != nil {
			return image.Build{}, fmt.Errorf("build %q: %w", b.ID, err)
		}
	}
	return b, nil
}
