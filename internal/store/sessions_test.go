package store

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
)

func TestSessionRoundTripAndUpdate(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	want := newSession("a")
	want.Labels = map[string]string{"k": "ü", "": ""}
	if err := s.InsertSession(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		got, err := s.GetSession(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("differs (-want +got):\n%s", diff)
		}
	}
	check()

	update := session.Session{
		ID: "a", State: session.Terminated, Reason: session.Expired, Detail: "lived\x00long", Engine: "e", Sandbox: "b",
		Limits: engine.Limits{MemoryBytes: 7}, EndTime: someTime.Add(5),
		Lifetime: 1, Labels: map[string]string{"other": ""}, Details: session.Details{Generation: 2, Snapshot: "x"},
		// This is not replaced.
		CreateTime: someTime.Add(1),
	}
	if err := s.UpdateSession(t.Context(), update); err != nil {
		t.Fatal(err)
	}
	update.CreateTime = want.CreateTime
	want = update
	check()
	closeStore(t, s)
	s = open(t, dir)
	check()
}

// TestSessionPhases keeps the states within a stage, and lets them follow one another.
func TestSessionPhases(t *testing.T) {
	s := open(t, t.TempDir())
	one := newSession("a")
	if err := s.InsertSession(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	for _, state := range []session.State{session.Running, session.Pausing, session.Paused, session.Resuming, session.Running, session.Pausing} {
		one.State = state
		if err := s.UpdateSession(t.Context(), one); err != nil {
			t.Fatal(err)
		}
		if got, err := s.GetSession(t.Context(), "a"); err != nil || got.State != state {
			t.Errorf("%v, %v; want %v", got.State, err, state)
		}
		if all, err := s.UnfinishedSessions(t.Context()); err != nil || len(all) != 1 {
			t.Errorf("%v, %v", all, err)
		}
	}
	one.State = session.Terminated
	if err := s.UpdateSession(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	one.State = session.Paused
	wantFault(t, s.UpdateSession(t.Context(), one), fault.FailedPrecondition, "SESSION_ENDED")
}

func TestSessionFaults(t *testing.T) {
	s := open(t, t.TempDir())
	if err := s.InsertSession(t.Context(), newSession("a")); err != nil {
		t.Fatal(err)
	}
	wantFault(t, s.InsertSession(t.Context(), newSession("a")), fault.AlreadyExists, "SESSION_EXISTS")
	wantFault(t, s.UpdateSession(t.Context(), newSession("b")), fault.NotFound, "SESSION_NOT_FOUND")
	_, err := s.GetSession(t.Context(), "b")
	wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
	// Sessions and executions do not share their ids.
	_, err = s.GetExecution(t.Context(), "a")
	wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
}

func TestSessionStateNeverGoesBack(t *testing.T) {
	s := open(t, t.TempDir())
	states := []session.State{session.Starting, session.Running, session.Terminating, session.Terminated}
	for _, from := range states {
		for _, to := range states {
			one := newSession(fmt.Sprintf("%d-%d", from, to))
			one.State, one.Detail = from, "before"
			if err := s.InsertSession(t.Context(), one); err != nil {
				t.Fatal(err)
			}
			one.State, one.Detail = to, "after"
			err := s.UpdateSession(t.Context(), one)
			got, getErr := s.GetSession(t.Context(), one.ID)
			if getErr != nil {
				t.Fatal(getErr)
			}
			if to >= from {
				if err != nil || got.State != to || got.Detail != "after" {
					t.Errorf("%d to %d: %v, and it is %v", from, to, err, got)
				}
				continue
			}
			wantFault(t, err, fault.FailedPrecondition, "SESSION_ENDED")
			if got.State != from || got.Detail != "before" {
				t.Errorf("%d to %d was refused and yet changed: %v", from, to, got)
			}
		}
	}
}

func TestListSessions(t *testing.T) {
	s := open(t, t.TempDir())
	for n, state := range []session.State{session.Running, session.Terminated, session.Starting, session.Terminating, session.Terminated} {
		one := newSession(number(n))
		one.State = state
		if err := s.InsertSession(t.Context(), one); err != nil {
			t.Fatal(err)
		}
	}
	names := func(all []session.Session) []string {
		var got []string
		for _, one := range all {
			got = append(got, one.ID)
		}
		return got
	}
	tests := []struct {
		name string
		q    session.Query
		want []string
	}{
		{"alive", session.Query{Limit: 10}, []string{number(3), number(2), number(0)}},
		{"page of alive", session.Query{Limit: 1, Before: number(2)}, []string{number(0)}},
		{"all", session.Query{Limit: 10, Terminated: true}, []string{number(4), number(3), number(2), number(1), number(0)}},
		{"page of all", session.Query{Limit: 2, Before: number(3), Terminated: true}, []string{number(2), number(1)}},
		{"after the last", session.Query{Limit: 2, Before: number(0), Terminated: true}, nil},
	}
	for _, test := range tests {
		page, err := s.ListSessions(t.Context(), test.q)
		if got := names(page); err != nil || !slices.Equal(got, test.want) {
			t.Errorf("%s: got %v (%v), want %v", test.name, got, err, test.want)
		}
	}
	if _, err := s.ListSessions(t.Context(), session.Query{}); err == nil {
		t.Error("a limit of 0 is accepted")
	}
	unfinished, err := s.UnfinishedSessions(t.Context())
	if got := names(unfinished); err != nil || !slices.Equal(got, []string{number(0), number(2), number(3)}) {
		t.Errorf("unfinished are %v (%v)", got, err)
	}
}
