package store

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
)

func TestKeysRoundTrip(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	plain := auth.Key{ID: "a", Name: "ann", Role: auth.User, Hash: [32]byte{1, 0, 255}, CreateTime: someTime}
	full := auth.Key{ID: "b", Name: "bob", Role: auth.Admin, Hash: [32]byte{2}, CreateTime: someTime,
		ExpireTime: someTime.Add(1), RevokeTime: someTime.Add(2), LastUseTime: someTime.Add(3)}
	for _, k := range []auth.Key{plain, full} {
		if err := s.InsertKey(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	}
	wantFault(t, s.InsertKey(t.Context(), plain), fault.AlreadyExists, "KEY_EXISTS")
	wantFault(t, s.UpdateKey(t.Context(), auth.Key{ID: "c"}), fault.NotFound, "KEY_NOT_FOUND")
	check := func(want ...auth.Key) {
		t.Helper()
		got, err := s.AllKeys(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("differs (-want +got):\n%s", diff)
		}
	}
	check(plain, full)
	closeStore(t, s)
	s = open(t, dir)
	check(plain, full)

	// Only two of its times are replaced, and a revocation is never taken back.
	update := auth.Key{ID: "a", Name: "eve", Role: auth.Admin, Hash: [32]byte{9}, RevokeTime: someTime.Add(5), LastUseTime: someTime.Add(4)}
	if err := s.UpdateKey(t.Context(), update); err != nil {
		t.Fatal(err)
	}
	update.RevokeTime = time.Time{}
	if err := s.UpdateKey(t.Context(), update); err != nil {
		t.Fatal(err)
	}
	plain.RevokeTime, plain.LastUseTime = someTime.Add(5), someTime.Add(4)
	check(plain, full)

	for label, bad := range map[string]auth.Key{
		"no role":   {ID: "x", CreateTime: someTime},
		"a role up": {ID: "y", Role: auth.Admin + 1, CreateTime: someTime},
	} {
		if err := s.InsertKey(t.Context(), bad); err == nil {
			t.Errorf("%s is kept", label)
		}
	}
}

func TestListsOfOneOwner(t *testing.T) {
	s := open(t, t.TempDir())
	owners := []string{"key:ann", "key:bob", "", "local"}
	for n := range 40 {
		e := newExecution(number(n))
		e.Owner, e.Labels = owners[n%4], map[string]string{"a": "x"}
		if n%8 >= 4 {
			e.Session = "s1"
		}
		one := newSession(number(n))
		one.Owner = owners[n%4]
		if n%8 >= 4 {
			one.State = session.Terminated
		}
		if err := errors.Join(s.InsertExecution(t.Context(), e), s.InsertSession(t.Context(), one)); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]struct {
		query execution.Query
		want  int
	}{
		"all":                    {execution.Query{Caller: caller.Caller{All: true}}, 40},
		"all of a session":       {execution.Query{Caller: caller.Caller{All: true}, Session: "s1"}, 20},
		"ann's":                  {execution.Query{Caller: caller.Caller{Owner: "key:ann"}}, 10},
		"ann's of a session":     {execution.Query{Caller: caller.Caller{Owner: "key:ann"}, Session: "s1"}, 5},
		"ann's of any session":   {execution.Query{Caller: caller.Caller{Owner: "key:ann"}, InAnySession: true}, 5},
		"ann's of another":       {execution.Query{Caller: caller.Caller{Owner: "key:ann"}, Session: "s2"}, 0},
		"ann's by a label":       {execution.Query{Caller: caller.Caller{Owner: "key:ann"}, Filter: parse(t, "labels.a = x")}, 10},
		"ann's without a label":  {execution.Query{Caller: caller.Caller{Owner: "key:ann"}, Filter: parse(t, "labels.b != x")}, 10},
		"a stranger's by label":  {execution.Query{Caller: caller.Caller{Owner: "key:eve"}, Filter: parse(t, "labels.a = x")}, 0},
		"all by a label":         {execution.Query{Caller: caller.Caller{All: true}, Filter: parse(t, "labels.a = x")}, 40},
		"nobody's":               {execution.Query{}, 10},
		"a stranger's":           {execution.Query{Caller: caller.Caller{Owner: "key:eve"}}, 0},
		"a stranger's, a part":   {execution.Query{Caller: caller.Caller{Owner: "key:an"}}, 0},
		"a stranger's, a syntax": {execution.Query{Caller: caller.Caller{Owner: "' OR 1 --"}}, 0},
	} {
		for _, size := range []int{1, 3, 100} {
			var ids []string
			for q := test.query; ; {
				q.Limit = size
				page, err := s.ListExecutions(t.Context(), q)
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range page {
					if !q.Caller.Sees(e.Owner) {
						t.Errorf("%s: there is one of %q", name, e.Owner)
					}
					ids = append(ids, e.ID)
				}
				if len(page) < size {
					break
				}
				q.Before = ids[len(ids)-1]
			}
			if len(ids) != test.want || !slices.IsSortedFunc(ids, func(a, b string) int { return strings.Compare(b, a) }) {
				t.Errorf("%s by %d: %d, want %d: %q", name, size, len(ids), test.want, ids)
			}
		}
	}
	for name, test := range map[string]struct {
		query session.Query
		want  int
	}{
		"all alive": {session.Query{Caller: caller.Caller{All: true}}, 20}, "all": {session.Query{Caller: caller.Caller{All: true}, Terminated: true}, 40},
		"ann's alive": {session.Query{Caller: caller.Caller{Owner: "key:ann"}}, 5}, "ann's": {session.Query{Caller: caller.Caller{Owner: "key:ann"}, Terminated: true}, 10},
		"a stranger's": {session.Query{Caller: caller.Caller{Owner: "key:eve"}, Terminated: true}, 0},
	} {
		test.query.Limit = 100
		page, err := s.ListSessions(t.Context(), test.query)
		if err != nil || len(page) != test.want {
			t.Errorf("%s: %d (%v), want %d", name, len(page), err, test.want)
		}
	}
}

func TestStoredBytes(t *testing.T) {
	s := open(t, t.TempDir())
	for n, who := range []string{"key:ann", "key:ann", "key:bob"} {
		e := newExecution(number(n))
		e.Owner = who
		if err := s.InsertExecution(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	sum := func(owner string) int64 {
		t.Helper()
		n, err := s.StoredBytes(t.Context(), owner)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if sum("key:ann") != 0 || sum("key:eve") != 0 {
		t.Error("what runs is counted, or nobody's")
	}
	for n := range 3 {
		e := newExecution(number(n))
		e.State = execution.Ended
		e.Result = &execution.Result{Reason: execution.Exited, Totals: []execution.StreamTotal{
			{Stream: "stdout", Size: 100, Dropped: 30}, {Stream: "stderr", Size: 5},
		}}
		if err := s.UpdateExecution(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	if got := sum("key:ann"); got != 150 {
		t.Errorf("%d, want 150", got)
	}
	if err := s.DeleteExecution(t.Context(), number(0)); err != nil {
		t.Fatal(err)
	}
	if got := sum("key:ann"); got != 75 || sum("key:bob") != 75 {
		t.Errorf("%d after a deletion, want 75", got)
	}
}

// oldState is a state directory as the first executord left it, with an execution "a" that
// has the label k=v.
func oldState(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), fileName)
	db, err := openDatabase(file, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	const name = "00001_initial.sql"
	first, err := fs.ReadFile(migrations(), name)
	if err != nil {
		t.Fatal(err)
	}
	if err := migrate(t.Context(), db, file, fstest.MapFS{name: {Data: first}}); err != nil {
		t.Fatal(err)
	}
	for _, statement := range []string{
		`INSERT INTO executions (id, session, command, limits, retained_bytes, labels, engine, sandbox, state, epoch, sequence, create_time)
			VALUES ('a', '', '{}', '{}', 1, '{"k":"v"}', 'local', 'e-a', 4, 'e', 2, 5)`,
		fmt.Sprintf("PRAGMA application_id = %d", applicationID),
	} {
		if _, err := db.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Dir(file)
}

// What an executord before this one wrote has no owner, and is there for who sees all.
func TestMigrationKeepsWhatHasNoOwner(t *testing.T) {
	s := open(t, oldState(t))
	for who, want := range map[caller.Caller]int{{All: true}: 1, {Owner: "key:ann"}: 0} {
		page, err := s.ListExecutions(t.Context(), execution.Query{Caller: who, Limit: 5})
		if err != nil || len(page) != want {
			t.Errorf("%+v sees %d (%v), want %d", who, len(page), err, want)
		}
	}
	if keys, err := s.AllKeys(t.Context()); err != nil || len(keys) != 0 {
		t.Errorf("%v, %v", keys, err)
	}
}

// What a caller's own lists are read by.
func TestListsOfOneOwnerUseIndexes(t *testing.T) {
	s := open(t, t.TempDir())
	ann := caller.Caller{Owner: "key:ann"}
	plan := func(text string, args []any) (plan string) {
		t.Helper()
		var id, parent, unused int
		if err := s.writer.QueryRow("EXPLAIN QUERY PLAN "+text, args...).Scan(&id, &parent, &unused, &plan); err != nil {
			t.Fatal(err)
		}
		return plan
	}
	for want, q := range map[string]execution.Query{
		"SEARCH executions USING INDEX executions_by_owner (owner=? AND id<?)":     {Caller: ann, Limit: 5},
		"SEARCH executions USING INDEX executions_by_owner (owner=? AND id>?)":     {Caller: ann, Limit: 5, Ascending: true},
		"SEARCH executions USING INDEX executions_by_session (session=? AND id<?)": {Caller: ann, Limit: 5, Session: "s1"},
	} {
		if got := plan(executionsQuery(q)); got != want {
			t.Errorf("%+v is read by %s, want %s", q, got, want)
		}
	}
	for _, terminated := range []bool{false, true} {
		want := "SEARCH sessions USING INDEX sessions_by_owner (owner=? AND id<?)"
		if got := plan(sessionsQuery(session.Query{Caller: ann, Limit: 5, Terminated: terminated})); got != want && !strings.Contains(got, "sessions_unfinished") {
			t.Errorf("it is read by %s, want %s", got, want)
		}
	}
}
