package store

import (
	"bytes"
	"database/sql"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/harvest-run/executord/internal/execution"
)

// filled makes a closed state directory with some executions and returns the path of
// its database and its content.
func filled(t *testing.T) (dir, file string, content []byte) {
	t.Helper()
	dir = t.TempDir()
	s := open(t, dir)
	for n := range 200 {
		if err := s.InsertExecution(t.Context(), newExecution(number(n))); err != nil {
			t.Fatal(err)
		}
	}
	closeStore(t, s)
	file = filepath.Join(dir, fileName)
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return dir, file, content
}

// refused fails the test unless Open returns an error with all of the words, leaves
// the file as it is and the directory unlocked.
func refused(t *testing.T, dir string, words ...string) {
	t.Helper()
	file := filepath.Join(dir, fileName)
	before, beforeErr := os.ReadFile(file)
	for range 2 { // the second time it would find the lock of the first
		s, err := Open(t.Context(), Config{Dir: dir})
		if err == nil {
			s.Close()
			t.Fatal("it opened")
		}
		for _, word := range words {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("the error is %q, without %q", err, word)
			}
		}
	}
	after, afterErr := os.ReadFile(file)
	if !bytes.Equal(before, after) || (beforeErr == nil) != (afterErr == nil) {
		t.Error("the file was changed")
	}
}

func TestDamagedFileIsRefused(t *testing.T) {
	const page = 4096
	noise := func(n int) []byte {
		random := rand.NewChaCha8([32]byte{1})
		b := make([]byte, n)
		random.Read(b)
		return b
	}
	tests := []struct {
		name   string
		damage func(content []byte) []byte
	}{
		{"empty", func([]byte) []byte { return nil }},
		{"shorter than a header", func(c []byte) []byte { return c[:50] }},
		{"only a header", func(c []byte) []byte { return c[:100] }},
		{"only a page", func(c []byte) []byte { return c[:page] }},
		{"half", func(c []byte) []byte { return c[:len(c)/2] }},
		{"last page missing", func(c []byte) []byte { return c[:len(c)-page] }},
		{"noise", func(c []byte) []byte { return noise(len(c)) }},
		{"noise after the header", func(c []byte) []byte { copy(c[100:], noise(page-100)); return c }},
		{"a page of noise", func(c []byte) []byte { copy(c[len(c)-page:], noise(page)); return c }},
		{"zeros after the first page", func(c []byte) []byte { clear(c[page:]); return c }},
		{"pages exchanged", func(c []byte) []byte {
			a, b := c[3*page:4*page], c[4*page:5*page]
			kept := bytes.Clone(a)
			copy(a, b)
			copy(b, kept)
			return c
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir, file, content := filled(t)
			if len(content) < 8*page {
				t.Fatalf("only %d bytes to damage", len(content))
			}
			if err := os.WriteFile(file, test.damage(content), 0o600); err != nil {
				t.Fatal(err)
			}
			refused(t, dir, file, "is damaged", "move it")
		})
	}
}

func TestDamagedLogLosesNothingElse(t *testing.T) {
	// What a power cut can leave of the write-ahead log: an end that makes no sense.
	dir, file, _ := filled(t)
	if err := os.WriteFile(file+"-wal", bytes.Repeat([]byte{0xa5}, 10000), 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	if page, err := s.ListExecutions(t.Context(), execution.Query{Limit: 1000}); err != nil || len(page) != 200 {
		t.Errorf("there are %d executions (%v), want 200", len(page), err)
	}
}

func TestForeignDatabaseIsRefused(t *testing.T) {
	dir := t.TempDir()
	db, err := openDatabase(filepath.Join(dir, fileName), 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec("CREATE TABLE theirs (a)"); err != nil {
		t.Fatal(err)
	}
	db.Close()
	refused(t, dir, "database of another program", "application id 0x0")
}

func TestNewerSchemaIsRefused(t *testing.T) {
	dir, file, _ := filled(t)
	db, err := openDatabase(file, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec("INSERT INTO goose_db_version (version_id, is_applied) VALUES (99, 1)"); err != nil {
		t.Fatal(err)
	}
	db.Close()
	refused(t, dir, file, "schema version 99", fmt.Sprintf("versions up to %d", newest(t)), "start an executord as new as", "another state directory")
}

func TestLogWithoutDatabaseIsRefused(t *testing.T) {
	dir, file, _ := filled(t)
	if err := os.Rename(file, file+".old"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file+"-wal", []byte("log"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, dir, file+"-wal", "without its database")
	if err := os.Remove(file + "-wal"); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
}

// An executord that died while it made the database left a draft.
func TestDraftIsReplaced(t *testing.T) {
	dir := t.TempDir()
	draft := filepath.Join(dir, fileName+".new")
	for _, suffix := range []string{"", "-wal", "-shm", "-journal"} {
		if err := os.WriteFile(draft+suffix, []byte("half"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	open(t, dir)
	left, err := filepath.Glob(draft + "*")
	if err != nil || len(left) != 0 {
		t.Errorf("left over: %v (%v)", left, err)
	}
}

// A step that fails leaves the schema as it was, and can be repeated.
func TestMigrationIsAllOrNothing(t *testing.T) {
	_, file, _ := filled(t)
	db, err := openDatabase(file, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	last := newest(t)
	steps := fstest.MapFS{}
	names, err := fs.Glob(migrations(), "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		data, err := fs.ReadFile(migrations(), name)
		if err != nil {
			t.Fatal(err)
		}
		steps[name] = &fstest.MapFile{Data: data}
	}
	next := fmt.Sprintf("%05d_next.sql", last+1)
	steps[next] = &fstest.MapFile{Data: []byte("-- +goose Up\nCREATE TABLE second (a INTEGER) STRICT;\n" +
		"INSERT INTO second SELECT 1 FROM executions;\nINSERT INTO nowhere VALUES (1);\n")}
	before := schemaOf(t, db)
	err = migrate(t.Context(), db, file, steps)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("migrate from schema version %d to %d", last, last+1)) {
		t.Errorf("migrate() = %v, want an error that names both versions", err)
	}
	if after := schemaOf(t, db); after != before {
		t.Errorf("the schema became %s", after)
	}
	steps[next].Data = bytes.Replace(steps[next].Data, []byte("nowhere"), []byte("second"), 1)
	if err := migrate(t.Context(), db, file, steps); err != nil {
		t.Fatal(err)
	}
	if after := schemaOf(t, db); !strings.Contains(after, "CREATE TABLE second") {
		t.Errorf("the schema is %s", after)
	}
	// And an executord that does not know the last step refuses from now on.
	if err := migrate(t.Context(), db, file, migrations()); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("schema version %d", last+1)) {
		t.Errorf("migrate() = %v, want a refusal", err)
	}
}

// newest is the number of the last migration.
func newest(t *testing.T) (number int) {
	t.Helper()
	names, err := fs.Glob(migrations(), "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		var n int
		if _, err := fmt.Sscanf(name, "%d_", &n); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		number = max(number, n)
	}
	return number
}

func schemaOf(t *testing.T, db *sql.DB) string {
	t.Helper()
	var schema string
	if err := db.QueryRow("SELECT group_concat(sql, '; ') || (SELECT max(version_id) FROM goose_db_version) FROM sqlite_schema").Scan(&schema); err != nil {
		t.Fatal(err)
	}
	return schema
}

// A value that no executord has written is an error and not a zero value.
func TestUnreadableColumnIsAnError(t *testing.T) {
	s := open(t, t.TempDir())
	if err := s.InsertExecution(t.Context(), newExecution("a")); err != nil {
		t.Fatal(err)
	}
	if err := s.InsertSession(t.Context(), newSession("a")); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"executions", "sessions"} {
		if _, err := s.writer.Exec("UPDATE " + table + " SET limits = '{'"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.GetExecution(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), `"a": decode limits`) {
		t.Errorf("GetExecution() = %v, want an error about limits", err)
	}
	if _, err := s.UnfinishedExecutions(t.Context()); err == nil {
		t.Error("UnfinishedExecutions() succeeded")
	}
	if _, err := s.GetSession(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), `"a": decode limits`) {
		t.Errorf("GetSession() = %v, want an error about limits", err)
	}
}
