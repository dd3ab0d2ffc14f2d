package store

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/execution"
)

// maxSource is how many bytes of a command's source are kept.
const maxSource = 4096

// afterAll sorts after every id: the upper bound of a first page.
const afterAll = "\U0010ffff"

// storable is what of a command may be written: names of variables without their
// values, because values may be secrets, and the beginning of the source.
func storable(c execution.Command) execution.Command {
	if c.Env != nil {
		env := make(map[string]string, len(c.Env))
		for name := range c.Env {
			env[name] = ""
		}
		c.Env = env
	}
	c.Source = cut(c.Source, maxSource)
	return c
}

// cut returns the first n bytes of s at most, without a part of a character at the end.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for i := n; i > n-utf8.UTFMax; i-- {
		if utf8.RuneStart(s[i]) {
			return s[:i]
		}
	}
	return s[:n] // no UTF-8
}

// toJSON encodes a value for a column.
func toJSON(column string, value any) (string, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return "", fmt.Errorf("encode %s: %w", column, err)
	}
	return string(data), nil
}

// labelsColumn is the column of labels: NULL for none.
func labelsColumn(labels map[string]string) (sql.NullString, error) {
	if len(labels) == 0 {
		return sql.NullString{}, nil
	}
	text, err := toJSON("labels", labels)
	return sql.NullString{String: text, Valid: true}, err
}

// networkColumn is the column of a network policy: NULL for one that was not decided.
func networkColumn(p egress.Policy) (sql.NullString, error) {
	if p.Mode == "" {
		return sql.NullString{}, nil
	}
	text, err := toJSON("network", p)
	return sql.NullString{String: text, Valid: true}, err
}

// fromJSON decodes a column; NULL leaves the value as it is.
func fromJSON(column string, text sql.NullString, value any) error {
	if !text.Valid {
		return nil
	}
	if err := json.Unmarshal([]byte(text.String), value); err != nil {
		return fmt.Errorf("decode %s: %w", column, err)
	}
	return nil
}

// timeColumn is the column of a time: NULL for one that has not come.
func timeColumn(t time.Time) sql.NullInt64 {
	if t.IsZero() {
		return sql.NullInt64{}
	}
	return sql.NullInt64{Int64: t.UnixNano(), Valid: true}
}

// fromTimeColumn is the inverse of timeColumn, in UTC.
func fromTimeColumn(nanos sql.NullInt64) time.Time {
	if !nanos.Valid {
		return time.Time{}
	}
	return time.Unix(0, nanos.Int64).UTC()
}

// row is what *sql.Row and *sql.Rows have in common.
type row interface{ Scan(targets ...any) error }

// collect reads all rows of a query.
func collect[T any](rows *sql.Rows, err error, scan func(row) (T, error)) ([]T, error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []T
	for rows.Next() {
		one, err := scan(rows)
		if err != nil {
			return nil, err
		}
		all = append(all, one)
	}
	return all, rows.Err()
}
