package store

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
)

func newKey(id string) idempotency.Key {
	return idempotency.Key{Owner: "ada", ID: id, Method: "Execute", Fingerprint: "f-" + id}
}

func wantRequest(t *testing.T, s *Store, key idempotency.Key, resource string) {
	t.Helper()
	got, err := s.FindRequest(t.Context(), key.Owner, key.ID)
	if resource == "" {
		wantFault(t, err, fault.NotFound, "REQUEST_NOT_FOUND")
		return
	}
	if err != nil || got.Key != key || got.Resource != resource || time.Since(got.CreateTime) > time.Hour {
		t.Errorf("got %+v (%v), want %+v for %q", got, err, key, resource)
	}
}

// What a request made and the request are recorded together, or neither is.
func TestInsertOnce(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	first, second := newKey("r1"), newKey("r2")
	if err := s.InsertExecutionOnce(t.Context(), first, fullExecution("a")); err != nil {
		t.Fatal(err)
	}
	if err := s.InsertSessionOnce(t.Context(), second, newSession("b")); err != nil {
		t.Fatal(err)
	}
	// The name is taken: nothing is made.
	wantFault(t, s.InsertExecutionOnce(t.Context(), first, newExecution("c")), fault.AlreadyExists, "REQUEST_ID_REUSED")
	wantFault(t, s.InsertSessionOnce(t.Context(), first, newSession("c")), fault.AlreadyExists, "REQUEST_ID_REUSED")
	_, err := s.GetExecution(t.Context(), "c")
	wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
	_, err = s.GetSession(t.Context(), "c")
	wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
	// The id is taken: the name is not.
	third := newKey("r3")
	wantFault(t, s.InsertExecutionOnce(t.Context(), third, newExecution("a")), fault.AlreadyExists, "EXECUTION_EXISTS")
	wantFault(t, s.InsertSessionOnce(t.Context(), third, newSession("b")), fault.AlreadyExists, "SESSION_EXISTS")
	wantRequest(t, s, third, "")

	stranger := first
	stranger.Owner = "bob"
	if err := s.InsertExecutionOnce(t.Context(), stranger, newExecution("d")); err != nil {
		t.Errorf("another owner's: %v", err)
	}
	for range 2 { // as written, and after a reopen
		wantRequest(t, s, first, "a")
		wantRequest(t, s, second, "b")
		wantRequest(t, s, stranger, "d")
		got, err := s.GetExecution(t.Context(), "a")
		if diff := cmp.Diff(fullExecution("a"), got); diff != "" || err != nil {
			t.Errorf("differs (-want +got), %v:\n%s", err, diff)
		}
		closeStore(t, s)
		s = open(t, dir)
	}
}

func TestDeleteOnce(t *testing.T) {
	s := open(t, t.TempDir())
	key := newKey("r1")
	wantFault(t, s.DeleteExecutionOnce(t.Context(), key, "a"), fault.NotFound, "EXECUTION_NOT_FOUND")
	wantRequest(t, s, key, "")
	if err := s.InsertExecution(t.Context(), newExecution("a")); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteExecutionOnce(t.Context(), key, "a"); err != nil {
		t.Fatal(err)
	}
	wantRequest(t, s, key, "a")
	_, err := s.GetExecution(t.Context(), "a")
	wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
	if err := s.InsertExecution(t.Context(), newExecution("b")); err != nil {
		t.Fatal(err)
	}
	wantFault(t, s.DeleteExecutionOnce(t.Context(), key, "b"), fault.AlreadyExists, "REQUEST_ID_REUSED")
	if _, err := s.GetExecution(t.Context(), "b"); err != nil {
		t.Errorf("it is deleted all the same: %v", err)
	}
}

func TestInsertRequest(t *testing.T) {
	s := open(t, t.TempDir())
	key, other := newKey("r1"), newKey("r1")
	other.Fingerprint = "f2"
	for range 2 {
		if err := s.InsertRequest(t.Context(), idempotency.NewRecord(key, "a")); err != nil {
			t.Error(err)
		}
	}
	wantFault(t, s.InsertRequest(t.Context(), idempotency.NewRecord(other, "a")), fault.AlreadyExists, "REQUEST_ID_REUSED")
	wantRequest(t, s, key, "a")
}

// Of requests with one name that come at once, whatever they are for, one makes something.
func TestOnceTogether(t *testing.T) {
	s := open(t, t.TempDir())
	key := newKey("r1")
	var made atomic.Int32
	var all sync.WaitGroup
	for n := range 20 {
		all.Go(func() {
			var err error
			if n%2 == 0 {
				err = s.InsertExecutionOnce(t.Context(), key, newExecution(number(n)))
			} else {
				err = s.InsertSessionOnce(t.Context(), key, newSession(number(n)))
			}
			switch {
			case err == nil:
				made.Add(1)
			case fault.ReasonOf(err) != "REQUEST_ID_REUSED":
				t.Error(err)
			}
		})
	}
	all.Wait()
	executions, err := s.ListExecutions(t.Context(), execution.Query{Limit: 100})
	if err != nil {
		t.Fatal(err)
	}
	sessions, err := s.UnfinishedSessions(t.Context())
	if err != nil || made.Load() != 1 || len(executions)+len(sessions) != 1 {
		t.Errorf("%d were made: %d executions, %d sessions, %v", made.Load(), len(executions), len(sessions), err)
	}
}

func TestDeleteRequests(t *testing.T) {
	s := open(t, t.TempDir())
	for n := range 10 {
		r := idempotency.NewRecord(newKey(number(n)), "a")
		r.CreateTime = someTime.Add(time.Duration(n) * time.Hour)
		if err := s.InsertRequest(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	before := someTime.Add(6 * time.Hour)
	for _, want := range []int{4, 2, 0} {
		if n, err := s.DeleteRequests(t.Context(), before, 4); err != nil || n != want {
			t.Errorf("%d are deleted (%v), want %d", n, err, want)
		}
	}
	for n := range 10 {
		_, err := s.FindRequest(t.Context(), "ada", number(n))
		if gone := fault.KindOf(err) == fault.NotFound; err != nil && !gone || gone != (n < 6) {
			t.Errorf("number %d: %v", n, err)
		}
	}
}

func TestRequestStatementsUseIndexes(t *testing.T) {
	s := open(t, t.TempDir())
	for statement, want := range map[string]string{
		findRequest:    "SEARCH request_ids USING PRIMARY KEY (owner=? AND request_id=?)",
		deleteRequests: "SEARCH request_ids USING COVERING INDEX request_ids_by_time (create_time<?)",
	} {
		if plan := planOf(t, s, statement, 0, 0); !strings.Contains(plan, want) {
			t.Errorf("%s\n\tis done by %s, want %s", statement, plan, want)
		}
	}
}

// planOf returns all steps of a statement's plan.
func planOf(t *testing.T, s *Store, statement string, args ...any) string {
	t.Helper()
	rows, err := s.writer.Query("EXPLAIN QUERY PLAN "+statement, args...)
	if err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
	defer rows.Close()
	var steps []string
	for rows.Next() {
		var id, parent, unused int
		var step string
		if err := rows.Scan(&id, &parent, &unused, &step); err != nil {
			t.Fatal(err)
		}
		steps = append(steps, step)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return strings.Join(steps, "; ")
}

// Executions from before their labels were kept apart are found by them.
func TestLabelsOfOldExecutions(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := s.InsertExecution(t.Context(), fullExecution("a")); err != nil {
		t.Fatal(err)
	}
	for _, undo := range []string{
		"DROP TABLE request_ids", "DROP TABLE execution_labels", "DROP TRIGGER executions_insert_labels",
		"DROP TRIGGER executions_delete_labels", "DROP INDEX executions_ended", "DROP INDEX executions_expiring",
		"ALTER TABLE executions DROP COLUMN policies", "ALTER TABLE executions DROP COLUMN log_bytes",
		"ALTER TABLE executions DROP COLUMN warned", "ALTER TABLE executions DROP COLUMN expire_time",
		"ALTER TABLE executions DROP COLUMN network", "ALTER TABLE sessions DROP COLUMN network", "DELETE FROM goose_db_version WHERE version_id >= 2",
	} {
		if _, err := s.writer.Exec(undo); err != nil {
			t.Fatalf("%s: %v", undo, err)
		}
	}
	closeStore(t, s)
	s = open(t, dir)
	if page, err := s.ListExecutions(t.Context(), execution.Query{Limit: 5, Filter: parse(t, "labels.k = v")}); err != nil || len(page) != 1 {
		t.Errorf("%v, %v", ids(page), err)
	}
}

// Nothing of the labels is left when their executions are gone.
func TestLabelsGoWithTheirExecution(t *testing.T) {
	s := open(t, t.TempDir())
	count := func(want int) {
		t.Helper()
		var n int
		if err := s.writer.QueryRow("SELECT count(*) FROM execution_labels").Scan(&n); err != nil || n != want {
			t.Errorf("%d labels (%v), want %d", n, err, want)
		}
	}
	for _, id := range []string{"a", "b"} {
		if err := s.InsertExecution(t.Context(), fullExecution(id)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.InsertExecution(t.Context(), newExecution("c")); err != nil {
		t.Fatal(err)
	}
	count(4)
	if err := s.DeleteExecution(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	count(2)
	if err := s.DeleteExecutionOnce(t.Context(), newKey("r1"), "b"); err != nil {
		t.Fatal(err)
	}
	count(0)
}

// A fingerprint is all that is kept of the parameters.
func TestRequestsKeepNoParameters(t *testing.T) {
	const canary = "canary-31f0"
	dir := t.TempDir()
	s := open(t, dir)
	e := newExecution("a")
	e.Command.Env = map[string]string{"TOKEN": canary}
	if err := s.InsertExecutionOnce(t.Context(), newKey("r1"), e); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "executord.db*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(data), canary) {
			t.Errorf("%s has the value of a variable", file)
		}
	}
}

func BenchmarkInsertExecution(b *testing.B) {
	for _, once := range []bool{false, true} {
		b.Run(fmt.Sprintf("once=%t", once), func(b *testing.B) {
			s := open(b, b.TempDir())
			for n := 0; b.Loop(); n++ {
				var err error
				if once {
					err = s.InsertExecutionOnce(b.Context(), newKey(number(n)), newExecution(number(n)))
				} else {
					err = s.InsertExecution(b.Context(), newExecution(number(n)))
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
