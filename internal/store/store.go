// Package store keeps sessions, executions, turns, builds of images, API keys and the names
// of requests in an SQLite database in the state directory. It implements session.Store,
// execution.Store, turn.Store, image.Store and auth.KeyStore: a call that returned nil
// survives kill -9 and a power cut. One connection writes, a few read; the directory is
// locked against a second executord. It imports the domain's types and never an engine; it
// starts no goroutines but those of database/sql, which end in Close.
package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/session"
)

var (
	_ execution.Store = (*Store)(nil)
	_ session.Store   = (*Store)(nil)
	_ auth.KeyStore   = (*Store)(nil)

	_ idempotency.Expirer = (*Store)(nil)
)

// fileName is the database's, in the state directory.
const fileName = "executord.db"

// readers bounds the connections that read. A read is short; more would only take
// memory.
const readers = 4

// Config says where the state lives.
type Config struct {
	// Dir is the state directory. It is made, with mode 0700, if it is not there.
	Dir string
}

// Store is an open state directory. Its methods may be called from any goroutine.
type Store struct {
	lock *os.File
	// writer has one connection, reader a few. turn holds one token: who has it
	// writes. database/sql would queue too, but could not let go of a caller whose
	// context ended and yet finish the write of one that has begun.
	writer, reader *sql.DB
	turn           chan struct{}
	syncer         syncer

	insertExecution, updateExecution, deleteExecution *sql.Stmt
	deleteEnded, countEnded, listEnded, listExpired   *sql.Stmt
	insertSession, updateSession                      *sql.Stmt
	executionState, sessionState                      *sql.Stmt
	insertRequest, findRequestToWrite, deleteRequests *sql.Stmt

	findRequest *sql.Stmt

	getExecution, unfinishedExecutions                      *sql.Stmt
	listExecutions, listOfSession, listInSessions           *sql.Stmt
	getSession, listSessions, listAlive, unfinishedSessions *sql.Stmt

	storedBytesOfOwner *sql.Stmt

	turns turnStatements
}

// Open locks the state directory, opens its database and brings the schema up to
// date; on an empty directory it makes a new one. It refuses, and changes nothing,
// if another executord has the directory, if the file is damaged or not executord's,
// and if its schema is newer than this executord knows.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make state directory: %w", err)
	}
	// Absolute, so that a later change of the working directory does not matter when
	// a connection is opened again.
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("find state directory %q: %w", cfg.Dir, err)
	}
	s := &Store{turn: make(chan struct{}, 1)}
	if s.lock, err = lockDir(dir); err != nil {
		return nil, err
	}
	if err := s.open(ctx, filepath.Join(dir, fileName)); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Store) open(ctx context.Context, file string) error {
	s.syncer.wal = file + "-wal"
	if err := prepareFile(ctx, file); err != nil {
		return err
	}
	var err error
	if s.writer, err = openDatabase(file, 1, "_journal_mode=WAL"); err != nil {
		return err
	}
	if err := migrate(ctx, s.writer, file, migrations()); err != nil {
		return err
	}
	if s.reader, err = openDatabase(file, readers, "_query_only=1"); err != nil {
		return err
	}
	if err := s.prepare(ctx); err != nil {
		return fmt.Errorf("prepare state file %q: %w", file, err)
	}
	return nil
}

// openDatabase makes a pool of at most size connections; they are opened when they
// are needed. options are further parameters of the driver.
func openDatabase(file string, size int, options ...string) (*sql.DB, error) {
	// NORMAL leaves the write-ahead log unsynced at a commit: Sync does that, when it is
	// needed and once for all who wait. The size limit cuts the log back after a burst.
	query := "_busy_timeout=5000&_foreign_keys=1&_synchronous=NORMAL&_dqs=0&_defensive=1" +
		"&_txlock=immediate&_error_rc=1&_pragma=journal_size_limit(16777216)"
	for _, option := range options {
		query += "&" + option
	}
	// As a URL, so that no character of the path can be taken for an option.
	connector, err := sqlite.NewConnector((&url.URL{Scheme: "file", Path: file, RawQuery: query}).String())
	if err != nil {
		return nil, fmt.Errorf("open state file %q: %w", file, err)
	}
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(size)
	db.SetMaxIdleConns(size)
	return db, nil
}

func (s *Store) prepare(ctx context.Context) error {
	statements := []struct {
		db   *sql.DB
		stmt **sql.Stmt
		text string
	}{
		{s.writer, &s.insertExecution, insertExecution},
		{s.writer, &s.updateExecution, updateExecution},
		{s.writer, &s.deleteExecution, `DELETE FROM executions WHERE id = ?`},
		{s.writer, &s.executionState, `SELECT state FROM executions WHERE id = ?`},
		{s.writer, &s.deleteEnded, deleteEnded},
		{s.reader, &s.countEnded, countEnded},
		{s.reader, &s.listEnded, listEnded},
		{s.reader, &s.listExpired, listExpired},
		{s.writer, &s.insertSession, insertSession},
		{s.writer, &s.updateSession, updateSession},
		{s.writer, &s.sessionState, `SELECT state FROM sessions WHERE id = ?`},
		{s.writer, &s.insertRequest, insertRequest},
		{s.writer, &s.findRequestToWrite, findRequest},
		{s.writer, &s.deleteRequests, deleteRequests},
		{s.reader, &s.findRequest, findRequest},
		{s.reader, &s.getExecution, getExecution},
		{s.reader, &s.listExecutions, listExecutions},
		{s.reader, &s.listOfSession, listOfSession},
		{s.reader, &s.listInSessions, listInSessions},
		{s.reader, &s.unfinishedExecutions, unfinishedExecutions},
		{s.reader, &s.getSession, getSession},
		{s.reader, &s.listSessions, listSessions},
		{s.reader, &s.listAlive, listAlive},
		{s.reader, &s.unfinishedSessions, unfinishedSessions},
		{s.reader, &s.storedBytesOfOwner, storedBytesOfOwner},

		{s.writer, &s.turns.insert, insertTurn},
		{s.writer, &s.turns.insertAttachment, insertAttachment},
		{s.writer, &s.turns.update, updateTurn},
		{s.writer, &s.turns.state, `SELECT state FROM turns WHERE id = ?`},
		{s.writer, &s.turns.insertInteraction, insertInteraction},
		{s.writer, &s.turns.resolveInteraction, resolveInteraction},
		{s.writer, &s.turns.interactionState, `SELECT state FROM interactions WHERE id = ?`},
		{s.reader, &s.turns.get, getTurn},
		{s.reader, &s.turns.session, `SELECT session FROM turns WHERE id = ?`},
		{s.reader, &s.turns.list, listTurns},
		{s.reader, &s.turns.unfinished, unfinishedTurns},
		{s.reader, &s.turns.totals, turnTotals},
		{s.reader, &s.turns.data, attachmentData},
		{s.reader, &s.turns.sessions, sessionsWithTurns},
		{s.reader, &s.turns.getInteraction, getInteraction},
		{s.reader, &s.turns.interactionsOf, interactionsOf},
		{s.reader, &s.turns.listInteractions, listInteractions},
		{s.reader, &s.turns.listPending, listPending},
	}
	for _, statement := range statements {
		stmt, err := statement.db.PrepareContext(ctx, statement.text)
		if err != nil {
			return err
		}
		*statement.stmt = stmt
	}
	return nil
}

// Close waits for calls in progress, closes the database and lets the state
// directory go. Calls made later return an error. Close may be called again.
func (s *Store) Close() error {
	var errs []error
	// The last connection to close folds the write-ahead log into the database.
	for _, db := range []*sql.DB{s.reader, s.writer} {
		if db != nil {
			if err := db.Close(); err != nil {
				errs = append(errs, fmt.Errorf("close state: %w", err))
			}
		}
	}
	if err := s.lock.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		errs = append(errs, fmt.Errorf("let state directory go: %w", err))
	}
	return errors.Join(errs...)
}

// write runs f when it is its turn. Once f has begun, the end of ctx no longer stops
// it: a caller learns that its write was done or that it was not, never neither.
func (s *Store) write(ctx context.Context, f func(ctx context.Context) error) error {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if ctx.Err() != nil { // select chooses by chance
		return context.Cause(ctx)
	}
	return classify(f(context.WithoutCancel(ctx)))
}

// writeDurably is write, and what it wrote survives a power cut.
func (s *Store) writeDurably(ctx context.Context, f func(ctx context.Context) error) error {
	if err := s.write(ctx, f); err != nil {
		return err
	}
	return s.syncer.sync()
}

// classify turns what a caller can do something about into a fault. In none of
// these cases has anything been written.
func classify(err error) error {
	failure, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return err
	}
	switch failure.Code() & 0xff { // the rest of an extended code tells details
	case sqlite3.SQLITE_FULL:
		return fault.Wrap(err, fault.Exhausted, "STATE_FULL", "no room for the state")
	case sqlite3.SQLITE_BUSY:
		return fault.Wrap(err, fault.Unavailable, "STATE_BUSY", "another program locks the state")
	}
	return err
}
