package store

import (
	"context"
	"database/sql"
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pressly/goose/v3"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

//go:embed migrations/*.sql
var embedded embed.FS

// applicationID marks a database as executord's: "exed" in ASCII.
const applicationID = 0x65786564

// headerSize is the length of an SQLite file's header, headerMagic its beginning.
const (
	headerSize  = 100
	headerMagic = "SQLite format 3\x00"
)

// migrations are the schema's, in the order of their numbers.
func migrations() fs.FS {
	dir, err := fs.Sub(embedded, "migrations")
	if err != nil {
		panic(err) // only for a path that is malformed
	}
	return dir
}

// prepareFile sees to it that file is a database of executord's, which only its
// owner can read. A new one is made under another name and moved into place when it
// is complete: whatever is found under file's name, also a file without any content,
// was complete once.
func prepareFile(ctx context.Context, file string) error {
	// Once SQLite has the file open, it must not be opened and closed here: that
	// would take SQLite's locks away.
	err := checkFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return createFile(ctx, file)
	}
	if err != nil {
		return err
	}
	// The files beside it get the mode of the database.
	if err := os.Chmod(file, 0o600); err != nil {
		return fmt.Errorf("protect state file: %w", err)
	}
	return nil
}

// checkFile reads the header. It is complete in the file itself, whatever the
// write-ahead log holds, because a new database is moved into place without one.
func checkFile(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open state file: %w", err)
	}
	defer file.Close()
	header := make([]byte, headerSize)
	if _, err := io.ReadFull(file, header); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return damaged(path, errors.New("it is shorter than a header"))
		}
		return fmt.Errorf("read state file: %w", err)
	}
	if string(header[:len(headerMagic)]) != headerMagic {
		return damaged(path, errors.New("it is not an SQLite database"))
	}
	if id := binary.BigEndian.Uint32(header[68:]); id != applicationID {
		return fmt.Errorf("%q is a database of another program (application id %#x): move it away or give another state directory", path, id)
	}
	return nil
}

func damaged(path string, err error) error {
	return fmt.Errorf("state file %q is damaged: %w; "+
		"put a backup in its place, or move it and the files that begin with its name away to start without state", path, err)
}

// createFile makes a new database.
func createFile(ctx context.Context, file string) error {
	// SQLite would play the log of a database that is gone into the new one.
	if _, err := os.Lstat(file + "-wal"); err == nil {
		return fmt.Errorf("%q is there without its database %q: put that back, or move the log away too", file+"-wal", file)
	}
	draft := file + ".new"
	// What an executord that died here has left. Without its log and index SQLite
	// would take those for the new file's.
	for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
		if err := os.Remove(draft + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove draft of state file: %w", err)
		}
	}
	empty, err := os.OpenFile(draft, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("create state file: %w", err)
	}
	if err := empty.Close(); err != nil {
		return fmt.Errorf("create state file: %w", err)
	}
	if err := fillFile(ctx, draft); err != nil {
		return err
	}
	if err := os.Rename(draft, file); err != nil {
		return fmt.Errorf("create state file: %w", err)
	}
	return syncDir(filepath.Dir(file))
}

func fillFile(ctx context.Context, draft string) (err error) {
	db, err := openDatabase(draft, 1, "_journal_mode=WAL")
	if err != nil {
		return err
	}
	defer func() {
		// This folds the write-ahead log in and syncs the file.
		if e := db.Close(); err == nil && e != nil {
			err = fmt.Errorf("create state file: %w", e)
		}
	}()
	if _, err := db.ExecContext(ctx, fmt.Sprintf("PRAGMA application_id = %d", applicationID)); err != nil {
		return fmt.Errorf("create state file: %w", err)
	}
	return migrate(ctx, db, draft, migrations())
}

// syncDir makes a change of names durable.
func syncDir(dir string) error {
	file, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync state directory: %w", err)
	}
	defer file.Close()
	if err := file.Sync(); err != nil {
		return fmt.Errorf("sync state directory: %w", err)
	}
	return nil
}

// migrate verifies the database and brings its schema to the newest version in
// steps. Each step is one transaction: it happens as a whole or not at all.
func migrate(ctx context.Context, db *sql.DB, file string, steps fs.FS) error {
	if err := verify(ctx, db, file); err != nil {
		return err
	}
	// Without the global registry and the global logger of goose.
	provider, err := goose.NewProvider(goose.DialectSQLite3, db, steps,
		goose.WithDisableGlobalRegistry(true), goose.WithLogger(goose.NopLogger()))
	if err != nil {
		return fmt.Errorf("read migrations: %w", err)
	}
	version, known, err := provider.GetVersions(ctx)
	if err != nil {
		return explain(file, fmt.Errorf("read schema version: %w", err))
	}
	if version > known {
		return fmt.Errorf("state file %q has schema version %d, and this executord knows versions up to %d: "+
			"start an executord as new as the one that wrote it, or give another state directory", file, version, known)
	}
	if _, err := provider.Up(ctx); err != nil {
		return explain(file, fmt.Errorf("migrate from schema version %d to %d: %w", version, known, err))
	}
	return nil
}

// verify reads the whole database and fails if its structure is broken.
func verify(ctx context.Context, db *sql.DB, file string) error {
	var finding string
	if err := db.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&finding); err != nil {
		return explain(file, err)
	}
	if finding != "ok" {
		return damaged(file, errors.New(finding))
	}
	return nil
}

// explain tells damage from other errors.
func explain(file string, err error) error {
	if failure, ok := errors.AsType[*sqlite.Error](err); ok {
		switch failure.Code() & 0xff {
		case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
			return damaged(file, err)
		}
	}
	return fmt.Errorf("open state file %q: %w", file, err)
}
