package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/fault"
)

const (
	insertKey = `INSERT INTO api_keys (id, name, role, hash, create_time, expire_time, revoke_time, last_use_time)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?)`

	// A key that is revoked stays so, whoever writes last.
	updateKey = `UPDATE api_keys SET revoke_time = COALESCE(revoke_time, ?), last_use_time = ? WHERE id = ?`

	allKeys = `SELECT id, name, role, hash, create_time, expire_time, revoke_time, last_use_time FROM api_keys ORDER BY id`
)

// InsertKey implements auth.KeyStore.
func (s *Store) InsertKey(ctx context.Context, k auth.Key) error {
	err := s.writeDurably(ctx, func(ctx context.Context) error {
		_, err := s.writer.ExecContext(ctx, insertKey, k.ID, k.Name, k.Role, k.Hash[:],
			k.CreateTime.UnixNano(), timeColumn(k.ExpireTime), timeColumn(k.RevokeTime), timeColumn(k.LastUseTime))
		return err
	})
	if isDuplicate(err) {
		return fault.New(fault.AlreadyExists, "KEY_EXISTS", "API key %q exists", k.ID)
	}
	if err != nil {
		return fmt.Errorf("insert API key %q: %w", k.ID, err)
	}
	return nil
}

// UpdateKey implements auth.KeyStore.
func (s *Store) UpdateKey(ctx context.Context, k auth.Key) error {
	err := s.writeDurably(ctx, func(ctx context.Context) error {
		done, err := changed(s.writer.ExecContext(ctx, updateKey, timeColumn(k.RevokeTime), timeColumn(k.LastUseTime), k.ID))
		if err == nil && !done {
			return sql.ErrNoRows
		}
		return err
	})
	if errors.Is(err, sql.ErrNoRows) {
		return fault.New(fault.NotFound, "KEY_NOT_FOUND", "there is no API key %q", k.ID)
	}
	if err != nil {
		return fmt.Errorf("update API key %q: %w", k.ID, err)
	}
	return nil
}

// AllKeys implements auth.KeyStore.
func (s *Store) AllKeys(ctx context.Context) ([]auth.Key, error) {
	rows, err := s.reader.QueryContext(ctx, allKeys)
	all, err := collect(rows, err, scanKey)
	if err != nil {
		return nil, fmt.Errorf("read API keys: %w", err)
	}
	return all, nil
}

func scanKey(r row) (auth.Key, error) {
	var (
		k                    auth.Key
		hash                 []byte
		create               int64
		expire, revoke, used sql.NullInt64
	)
	if err := r.Scan(&k.ID, &k.Name, &k.Role, &hash, &create, &expire, &revoke, &used); err != nil {
		return auth.Key{}, err
	}
	copy(k.Hash[:], hash) // the table's rule is that it has 32 bytes
	k.CreateTime = fromTimeColumn(sql.NullInt64{Int64: create, Valid: true})
	k.ExpireTime, k.RevokeTime, k.LastUseTime = fromTimeColumn(expire), fromTimeColumn(revoke), fromTimeColumn(used)
	return k, nil
}
