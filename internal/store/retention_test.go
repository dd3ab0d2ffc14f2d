package store

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/execution"
)

// insertEnded inserts an execution that ended after so many seconds.
func insertEnded(t *testing.T, s *Store, n int, after, retention time.Duration) {
	t.Helper()
	e := newExecution(number(n))
	if err := s.InsertExecution(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	e.State, e.EndTime, e.LogBytes = execution.Ended, someTime.Add(after), int64(n)
	e.Policies.Retention = retention
	if err := s.UpdateExecution(t.Context(), e); err != nil {
		t.Fatal(err)
	}
}

func TestEndedExecutions(t *testing.T) {
	s := open(t, t.TempDir())
	const sec = time.Second
	// Not in the order of their ids; two end at the same moment.
	insertEnded(t, s, 1, 30*sec, 0)
	insertEnded(t, s, 2, 10*sec, time.Hour)
	insertEnded(t, s, 3, 20*sec, 0)
	insertEnded(t, s, 4, 20*sec, time.Minute)
	if err := s.InsertExecution(t.Context(), newExecution(number(5))); err != nil { // runs
		t.Fatal(err)
	}
	if sum, err := s.CountEnded(t.Context()); err != nil || sum != (execution.Stored{Executions: 4, Bytes: 10}) {
		t.Errorf("%+v, %v", sum, err)
	}
	kept := func(n int, after time.Duration) execution.Kept {
		return execution.Kept{ID: number(n), LogBytes: int64(n), Time: someTime.Add(after).UTC()}
	}
	for name, test := range map[string]struct {
		q    execution.KeptQuery
		want []execution.Kept
	}{
		"all":              {execution.KeptQuery{Before: someTime.Add(time.Hour)}, []execution.Kept{kept(2, 10*sec), kept(3, 20*sec), kept(4, 20*sec), kept(1, 30*sec)}},
		"a first page":     {execution.KeptQuery{Before: someTime.Add(time.Hour), Limit: 2}, []execution.Kept{kept(2, 10*sec), kept(3, 20*sec)}},
		"the next":         {execution.KeptQuery{Before: someTime.Add(time.Hour), After: kept(3, 20*sec), Limit: 2}, []execution.Kept{kept(4, 20*sec), kept(1, 30*sec)}},
		"the last":         {execution.KeptQuery{Before: someTime.Add(time.Hour), After: kept(1, 30*sec)}, nil},
		"only old ones":    {execution.KeptQuery{Before: someTime.Add(20 * sec)}, []execution.Kept{kept(2, 10*sec)}},
		"none old enough":  {execution.KeptQuery{Before: someTime}, nil},
		"their own":        {execution.KeptQuery{Expired: true, Before: someTime.Add(24 * time.Hour)}, []execution.Kept{kept(4, 80*sec), kept(2, time.Hour+10*sec)}},
		"their own, later": {execution.KeptQuery{Expired: true, Before: someTime.Add(24 * time.Hour), After: kept(4, 80*sec)}, []execution.Kept{kept(2, time.Hour+10*sec)}},
		"their own, over":  {execution.KeptQuery{Expired: true, Before: someTime.Add(81 * sec)}, []execution.Kept{kept(4, 80*sec)}},
	} {
		t.Run(name, func(t *testing.T) {
			if test.q.Limit == 0 {
				test.q.Limit = 10
			}
			got, err := s.ListEnded(t.Context(), test.q)
			if diff := cmp.Diff(test.want, got); diff != "" || err != nil {
				t.Errorf("%v (-want +got)\n%s", err, diff)
			}
		})
	}
	if _, err := s.ListEnded(t.Context(), execution.KeptQuery{}); err == nil {
		t.Error("a page without a limit")
	}
	// What runs stays, what is not there is no error.
	if err := s.DeleteEnded(t.Context(), []string{number(1), number(2), number(5), "nosuch"}); err != nil {
		t.Fatal(err)
	}
	if sum, err := s.CountEnded(t.Context()); err != nil || sum != (execution.Stored{Executions: 2, Bytes: 7}) {
		t.Errorf("%+v, %v", sum, err)
	}
	if _, err := s.GetExecution(t.Context(), number(5)); err != nil {
		t.Error(err)
	}
}

// TestMigrationOfPolicies takes over what was written before there were any.
func TestMigrationOfPolicies(t *testing.T) {
	dir, _, _ := filled(t)
	s := open(t, dir)
	if _, err := s.writer.Exec(`INSERT INTO executions (id, session, command, limits, retained_bytes, engine, sandbox, state, epoch, sequence, create_time, end_time)
		VALUES ('old', '', '{}', '{}', 5, 'local', 'box', 4, 'e', 7, 1, 2)`); err != nil {
		t.Fatal(err)
	}
	e, err := s.GetExecution(t.Context(), "old")
	if err != nil || e.LogBytes != 0 || e.Warned != 0 || e.Policies != (execution.Policies{}) {
		t.Errorf("%+v, %v", e, err)
	}
	got, err := s.ListEnded(t.Context(), execution.KeptQuery{Before: time.Unix(1, 0), Limit: 1})
	if err != nil || len(got) != 1 || got[0].ID != "old" {
		t.Errorf("%+v, %v", got, err)
	}
}
