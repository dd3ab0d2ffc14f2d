package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// fullExecution has every field set.
func fullExecution(id string) execution.Execution {
	grace := time.Duration(0) // not nil, and not the default
	code := int32(3)
	return execution.Execution{
		ID: id, Session: "s1",
		Command: execution.Command{
			Language: execution.Python, Source: "print('ü\x00<&>\u2028')", Args: []string{"", "a b", "\"'\n"},
			Env: map[string]string{"A": "", "B=": ""}, WorkingDirectory: "/w", Timeout: 90 * time.Second, GracePeriod: &grace, IdleTimeout: time.Minute,
		},
		Policies: execution.Policies{OnLimit: execution.Kill, Retention: time.Hour, Detach: execution.CancelDetached, DetachGrace: &grace},
		LogBytes: 1 << 41, Warned: 5,
		Limits:        engine.Limits{MemoryBytes: 1, CPUMillis: 2, PIDs: 3},
		RetainedBytes: 1 << 40, Labels: map[string]string{"k": "v", "": "ü"},
		Engine: "local", Sandbox: "box", State: execution.Ended,
		Result: &execution.Result{
			Reason: execution.Exited, ExitCode: &code, Signal: 9, Detail: "a\x00b", CancelledBy: "me",
			Totals:   []execution.StreamTotal{{Stream: "stdout", Size: 1 << 40, CRC32C: 0xffffffff, Dropped: 5}},
			Times:    execution.Times{Queued: someTime, Ended: someTime.Add(time.Nanosecond)},
			Usage:    execution.Usage{CPUUser: 1, CPUSystem: 2, PeakMemoryBytes: 3},
			Reaped:   2,
			Evidence: map[string]string{"oom_kills": "1"}, TreeEmpty: true, Killed: true,
		},
		Epoch: "e", Sequence: 1<<63 + 5,
		CreateTime: someTime, StartTime: someTime.Add(1), EndTime: someTime.Add(2),
	}
}

func TestExecutionRoundTrip(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	full, plain := fullExecution("full"), newExecution("plain")
	for _, e := range []execution.Execution{full, plain} {
		if err := s.InsertExecution(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // as written, and after a reopen
		for _, want := range []execution.Execution{full, plain} {
			got, err := s.GetExecution(t.Context(), want.ID)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s differs (-written +read):\n%s", want.ID, diff)
			}
		}
		closeStore(t, s)
		s = open(t, dir)
	}
}

func TestInsertExecutionTwice(t *testing.T) {
	s := open(t, t.TempDir())
	first := newExecution("a")
	if err := s.InsertExecution(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	second := newExecution("a")
	second.Engine = "other"
	wantFault(t, s.InsertExecution(t.Context(), second), fault.AlreadyExists, "EXECUTION_EXISTS")
	if got, err := s.GetExecution(t.Context(), "a"); err != nil || got.Engine != "local" {
		t.Errorf("the first became %v (%v)", got, err)
	}
}

func TestInsertExecutionWithoutState(t *testing.T) {
	s := open(t, t.TempDir())
	e := newExecution("a")
	e.State = 0
	if err := s.InsertExecution(t.Context(), e); err == nil || fault.KindOf(err) != fault.Internal {
		t.Errorf("the insert returned %v, want an internal error", err)
	}
}

// Only what the contract names is replaced.
func TestUpdateExecution(t *testing.T) {
	s := open(t, t.TempDir())
	before := newExecution("a")
	before.Labels = map[string]string{"k": "v"}
	if err := s.InsertExecution(t.Context(), before); err != nil {
		t.Fatal(err)
	}
	update := fullExecution("a")
	if err := s.UpdateExecution(t.Context(), update); err != nil {
		t.Fatal(err)
	}
	want := update
	want.Session, want.Command, want.Labels = before.Session, before.Command, before.Labels
	want.RetainedBytes, want.CreateTime, want.Policies = before.RetainedBytes, before.CreateTime, before.Policies
	got, err := s.GetExecution(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("differs (-want +got):\n%s", diff)
	}
	wantFault(t, s.UpdateExecution(t.Context(), newExecution("b")), fault.NotFound, "EXECUTION_NOT_FOUND")
}

func TestExecutionStateNeverGoesBack(t *testing.T) {
	s := open(t, t.TempDir())
	states := []execution.State{execution.Starting, execution.Running, execution.Stopping, execution.Ended}
	for _, from := range states {
		for _, to := range states {
			e := newExecution(fmt.Sprintf("%d-%d", from, to))
			e.State = from
			if err := s.InsertExecution(t.Context(), e); err != nil {
				t.Fatal(err)
			}
			e.State, e.Sandbox = to, "changed"
			err := s.UpdateExecution(t.Context(), e)
			got, getErr := s.GetExecution(t.Context(), e.ID)
			if getErr != nil {
				t.Fatal(getErr)
			}
			if to >= from {
				if err != nil || got.State != to || got.Sandbox != "changed" {
					t.Errorf("%d to %d: %v, and it is %v", from, to, err, got)
				}
				continue
			}
			wantFault(t, err, fault.FailedPrecondition, "EXECUTION_ENDED")
			if got.State != from || got.Sandbox != "" {
				t.Errorf("%d to %d was refused and yet changed: %v", from, to, got)
			}
		}
	}
}

func TestDeleteExecution(t *testing.T) {
	s := open(t, t.TempDir())
	if err := s.InsertExecution(t.Context(), newExecution("a")); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteExecution(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	_, err := s.GetExecution(t.Context(), "a")
	wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
	wantFault(t, s.DeleteExecution(t.Context(), "a"), fault.NotFound, "EXECUTION_NOT_FOUND")
}

func ids(page []execution.Execution) []string {
	var all []string
	for _, e := range page {
		all = append(all, e.ID)
	}
	return all
}

func TestListExecutions(t *testing.T) {
	s := open(t, t.TempDir())
	for n, sessionID := range []string{"", "s1", "s2", "s1", "", "s1"} {
		e := newExecution(number(n))
		e.Session = sessionID
		if err := s.InsertExecution(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct {
		name string
		q    execution.Query
		want []int
	}{
		{"all", execution.Query{Limit: 10}, []int{5, 4, 3, 2, 1, 0}},
		{"first page", execution.Query{Limit: 2}, []int{5, 4}},
		{"next page", execution.Query{Limit: 3, Before: number(4)}, []int{3, 2, 1}},
		{"after the last", execution.Query{Limit: 3, Before: number(0)}, nil},
		{"before one that is gone", execution.Query{Limit: 1, Before: number(3) + "x"}, []int{3}},
		{"of a session", execution.Query{Limit: 10, Session: "s1"}, []int{5, 3, 1}},
		{"page of a session", execution.Query{Limit: 1, Session: "s1", Before: number(5)}, []int{3}},
		{"of an unknown session", execution.Query{Limit: 10, Session: "s"}, nil},
		{"in any session", execution.Query{Limit: 10, InAnySession: true}, []int{5, 3, 2, 1}},
		{"page in any session", execution.Query{Limit: 2, InAnySession: true, Before: number(3)}, []int{2, 1}},
		{"one session wins over any", execution.Query{Limit: 10, Session: "s2", InAnySession: true}, []int{2}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			page, err := s.ListExecutions(t.Context(), test.q)
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for _, n := range test.want {
				want = append(want, number(n))
			}
			if got := ids(page); !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
	for _, limit := range []int{0, -1} { // SQLite takes a negative one for no limit
		if page, err := s.ListExecutions(t.Context(), execution.Query{Limit: limit}); err == nil {
			t.Errorf("limit %d: got %v, want an error", limit, ids(page))
		}
	}
}

// What was there when paging began is told exactly once, whatever is added meanwhile.
func TestListExecutionsWhileInserting(t *testing.T) {
	s := open(t, t.TempDir())
	const there = 200
	for n := range there {
		if err := s.InsertExecution(t.Context(), newExecution(number(n))); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		for n := there; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if err := s.InsertExecution(t.Context(), newExecution(number(n))); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var all []string
	for before := ""; ; {
		page, err := s.ListExecutions(t.Context(), execution.Query{Limit: 7, Before: before})
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		all = append(all, ids(page)...)
		before = page[len(page)-1].ID
	}
	close(stop)
	wait.Wait()
	if !slices.IsSortedFunc(all, func(a, b string) int { return strings.Compare(b, a) }) {
		t.Error("the pages are not in descending order")
	}
	if all = slices.Compact(all); len(all) < there || all[len(all)-1] != number(0) || all[len(all)-there] != number(there-1) {
		t.Errorf("the pages hold %d ids from %s to %s", len(all), all[0], all[len(all)-1])
	}
}

func TestUnfinishedExecutions(t *testing.T) {
	s := open(t, t.TempDir())
	for n, state := range []execution.State{execution.Running, execution.Ended, execution.Starting, execution.Stopping} {
		e := newExecution(number(n))
		e.State = state
		if err := s.InsertExecution(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	check := func(want ...string) {
		t.Helper()
		all, err := s.UnfinishedExecutions(t.Context())
		if got := ids(all); err != nil || !slices.Equal(got, want) {
			t.Errorf("got %v (%v), want %v", got, err, want)
		}
	}
	check(number(0), number(2), number(3))
	ended := newExecution(number(2))
	ended.State = execution.Ended
	if err := s.UpdateExecution(t.Context(), ended); err != nil {
		t.Fatal(err)
	}
	check(number(0), number(3))
}

// A statement without its index would become slow only with the years.
func TestStatementsUseIndexes(t *testing.T) {
	s := open(t, t.TempDir())
	for statement, want := range map[string]string{
		getExecution:         "SEARCH executions USING INDEX sqlite_autoindex_executions_1 (id=?)",
		listExecutions:       "SEARCH executions USING INDEX sqlite_autoindex_executions_1 (id<?)",
		listOfSession:        "SEARCH executions USING INDEX executions_by_session (session=? AND id<?)",
		listInSessions:       "SEARCH executions USING INDEX executions_in_sessions (id<?)",
		unfinishedExecutions: "SCAN executions USING INDEX executions_unfinished",
		updateExecution:      "SEARCH executions USING INDEX sqlite_autoindex_executions_1 (id=?)",
		countEnded:           "SCAN executions USING COVERING INDEX executions_ended",
		listEnded:            "SEARCH executions USING COVERING INDEX executions_ended ((end_time,id)>(?,?) AND end_time<?)",
		listExpired:          "SEARCH executions USING COVERING INDEX executions_expiring ((expire_time,id)>(?,?) AND expire_time<?)",
		deleteEnded:          "SEARCH executions USING INDEX sqlite_autoindex_executions_1 (id=?)",
		listSessions:         "SEARCH sessions USING INDEX sqlite_autoindex_sessions_1 (id<?)",
		listAlive:            "SEARCH sessions USING INDEX sessions_unfinished (id<?)",
		unfinishedSessions:   "SCAN sessions USING INDEX sessions_unfinished",
		storedBytesOfOwner:   "SEARCH executions USING COVERING INDEX executions_by_owner (owner=?)",
	} {
		var id, parent, unused int
		var got string
		args := make([]any, strings.Count(statement, "?"))
		for n := len(args); n > 0; n-- {
			if strings.Contains(statement, fmt.Sprintf("?%d", n)) {
				args = args[:n] // numbered
				break
			}
		}
		if err := s.writer.QueryRow("EXPLAIN QUERY PLAN "+statement, args...).Scan(&id, &parent, &unused, &got); err != nil {
			t.Errorf("%s: %v", statement, err)
		} else if got != want {
			t.Errorf("%s\n\tis done by %s, want %s", statement, got, want)
		}
	}
}

func TestSecretsNeverReachTheDisk(t *testing.T) {
	const canary = "canary-7d1f0c2e"
	dir := t.TempDir()
	s := open(t, dir)
	for n := range 100 {
		e := newExecution(number(n))
		e.Command.Env = map[string]string{"TOKEN": canary, "NAME-7d1f0c2e": canary}
		e.Command.Source = strings.Repeat("x", maxSource) + canary
		if err := s.InsertExecution(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		if e.Command.Env["TOKEN"] != canary || !strings.HasSuffix(e.Command.Source, canary) {
			t.Fatal("the caller's command was changed")
		}
		e.State = execution.Running
		if err := s.UpdateExecution(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.GetExecution(t.Context(), number(0))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"TOKEN": "", "NAME-7d1f0c2e": ""}, got.Command.Env); diff != "" {
		t.Errorf("the names differ (-want +got):\n%s", diff)
	}
	search := func(when string) {
		found := 0
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			// Reading SQLite's files here takes its locks away, which is harmless: nothing
			// else opens this directory.
			content, err := os.ReadFile(filepath.Join(dir, entry.Name()))
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Contains(content, []byte(canary)) {
				t.Errorf("%s: %s holds the value of a variable or the end of the source", when, entry.Name())
			}
			if bytes.Contains(content, []byte("NAME-7d1f0c2e")) {
				found++
			}
		}
		if found == 0 {
			t.Errorf("%s: no file holds the name of the variable, so this test looks in the wrong place", when)
		}
	}
	search("open")
	closeStore(t, s)
	search("closed")
}

func TestCut(t *testing.T) {
	tests := []struct {
		name, in string
		n        int
		want     string
	}{
		{"short", "abc", 4, "abc"},
		{"exact", "abcd", 4, "abcd"},
		{"long", "abcde", 4, "abcd"},
		{"before a character of two bytes", "abcü", 4, "abc"},
		{"after a character of two bytes", "abüc", 4, "abü"},
		{"before a character of four bytes", "a😀", 4, "a"},
		{"no UTF-8", "\x80\x80\x80\x80\x80\x80\x80", 5, "\x80\x80\x80\x80\x80"},
		{"nothing", "", 0, ""},
	}
	for _, test := range tests {
		if got := cut(test.in, test.n); got != test.want {
			t.Errorf("%s: cut(%q, %d) = %q, want %q", test.name, test.in, test.n, got, test.want)
		}
	}
}

func FuzzCut(f *testing.F) {
	f.Add("aü😀", 3)
	f.Fuzz(func(t *testing.T, s string, n int) {
		if n < 0 || n < utf8.UTFMax {
			return
		}
		got := cut(s, n)
		if !strings.HasPrefix(s, got) || len(got) > n || len(s) > n && len(got) <= n-utf8.UTFMax {
			t.Errorf("cut(%q, %d) = %q", s, n, got)
		}
		if utf8.ValidString(s) && !utf8.ValidString(got) {
			t.Errorf("cut(%q, %d) = %q is no UTF-8", s, n, got)
		}
	})
}

func TestConcurrentUse(t *testing.T) {
	s := open(t, t.TempDir())
	const workers, each = 50, 10
	var wait sync.WaitGroup
	for w := range workers {
		wait.Go(func() {
			for n := range each {
				if err := life(t.Context(), s, fmt.Sprintf("w%02d-%02d", w, n)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	// One id that all fight for: one wins.
	var won sync.WaitGroup
	wins := make(chan int, workers)
	for w := range workers {
		won.Go(func() {
			if err := s.InsertExecution(t.Context(), newExecution("z")); err == nil {
				wins <- w
			} else if fault.KindOf(err) != fault.AlreadyExists {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	won.Wait()
	if len(wins) != 1 {
		t.Errorf("%d inserts of one id succeeded", len(wins))
	}
	page, err := s.ListExecutions(t.Context(), execution.Query{Limit: 1000})
	if err != nil || len(page) != workers*each/2+1 {
		t.Errorf("there are %d executions (%v), want %d", len(page), err, workers*each/2+1)
	}
	if left, err := s.UnfinishedExecutions(t.Context()); err != nil || len(left) != 1 {
		t.Errorf("%d are unfinished (%v), want one", len(left), err)
	}
}

// life takes an execution through all states and deletes every other one.
func life(ctx context.Context, s *Store, id string) error {
	e := newExecution(id)
	if err := s.InsertExecution(ctx, e); err != nil {
		return err
	}
	for state := execution.Running; state <= execution.Ended; state++ {
		e.State = state
		if err := s.UpdateExecution(ctx, e); err != nil {
			return err
		}
		if got, err := s.GetExecution(ctx, id); err != nil || got.State != state {
			return errors.Join(fmt.Errorf("%s has state %d after it was set to %d", id, got.State, state), err)
		}
	}
	if id[len(id)-1]%2 == 0 {
		return s.DeleteExecution(ctx, id)
	}
	return nil
}

func BenchmarkInsert(b *testing.B) {
	s := open(b, b.TempDir())
	for n := 0; b.Loop(); n++ {
		if err := s.InsertExecution(b.Context(), newExecution(number(n))); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkUpdate(b *testing.B) {
	s := open(b, b.TempDir())
	e := newExecution("a")
	if err := s.InsertExecution(b.Context(), e); err != nil {
		b.Fatal(err)
	}
	e.State = execution.Running
	for b.Loop() {
		e.Sequence++
		if err := s.UpdateExecution(b.Context(), e); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGet(b *testing.B) {
	s := open(b, b.TempDir())
	if err := s.InsertExecution(b.Context(), fullExecution("a")); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := s.GetExecution(b.Context(), "a"); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOpen opens a state of 100,000 executions: the price of reading it all.
func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir()
	s := open(b, dir)
	tx, err := s.writer.Begin()
	if err != nil {
		b.Fatal(err)
	}
	stmt := tx.Stmt(s.insertExecution)
	result := strings.Repeat("r", 1000)
	for n := range 100000 {
		if _, err := stmt.Exec(number(n), "", strings.Repeat("c", 500), "{}", 1, nil, "local", "box", 4, result, "e", 1, 1, 1, 1); err != nil {
			b.Fatal(err)
		}
	}
	if err := tx.Commit(); err != nil {
		b.Fatal(err)
	}
	closeStore(b, s)
	for b.Loop() {
		closeStore(b, open(b, dir))
	}
}
