package session_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/filter"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/session"
)

func newKey(method string) idempotency.Key {
	return idempotency.Key{ID: "r1", Method: method, Fingerprint: "f1"}
}

// TestCreateOnce: 50 equal requests at once make one session, over a restart too.
func TestCreateOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{Create: func(context.Context, string) error { time.Sleep(time.Second); return nil }})
		request := session.Request{Key: newKey("CreateSession")}
		var all sync.WaitGroup
		var mu sync.Mutex
		ids := make(map[string]int)
		for range 50 {
			all.Go(func() {
				s, err := r.Create(t.Context(), request)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				ids[s.ID]++
			})
		}
		all.Wait()
		time.Sleep(2 * time.Second)
		if len(ids) != 1 || len(r.fake.Made()) != 1 || r.Running() != 1 {
			t.Fatalf("ids %v, made %v", ids, r.fake.Made())
		}
		r.restart()
		for id := range ids {
			if s, err := r.Create(t.Context(), request); err != nil || s.ID != id || s.State != session.Running {
				t.Errorf("%+v, %v", s, err)
			}
			if _, err := r.Terminate(t.Context(), id, "me"); err != nil {
				t.Error(err)
			}
			if s, err := r.Create(t.Context(), request); err != nil || s.ID != id || s.State != session.Terminated {
				t.Errorf("%+v, %v", s, err)
			}
		}
		other := request
		other.Key.Fingerprint = "f2"
		_, err := r.Create(t.Context(), other)
		wantFault(t, err, fault.AlreadyExists, "REQUEST_ID_REUSED")
		if len(r.fake.Made()) != 1 {
			t.Errorf("made %v", r.fake.Made())
		}
	})
}

// TestCreateOnceAfterFailure: what was refused is not remembered.
func TestCreateOnceAfterFailure(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		request := session.Request{Lifetime: -1, Key: newKey("CreateSession")}
		_, err := r.Create(t.Context(), request)
		wantFault(t, err, fault.Invalid, "LIFETIME")
		request.Lifetime = time.Hour
		r.store.hook(func(string, session.Session) error { return fault.New(fault.Exhausted, "STATE_FULL", "no room") })
		_, err = r.Create(t.Context(), request)
		wantFault(t, err, fault.Exhausted, "STATE_FULL")
		r.store.hook(nil)
		r.running(request)
	})
}

func TestTerminateOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		id, other := r.running(session.Request{}), r.running(session.Request{})
		key := newKey("TerminateSession")
		_, err := r.Service.Terminate(t.Context(), session.Ref{ID: "none"}, "me", key)
		wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				s, err := r.Service.Terminate(t.Context(), session.Ref{ID: id}, "me", key)
				if err != nil || s.State != session.Terminated || s.Detail != "terminated by me" {
					t.Errorf("%+v, %v", s, err)
				}
			})
		}
		all.Wait()
		key.Fingerprint = "f2"
		_, err = r.Service.Terminate(t.Context(), session.Ref{ID: other}, "me", key)
		wantFault(t, err, fault.AlreadyExists, "REQUEST_ID_REUSED")
		if s := r.get(other); s.State != session.Running {
			t.Errorf("%+v", s)
		}
	})
}

// TestListFilters: sessions are compared as they are now, not as the store has them.
func TestListFilters(t *testing.T) {
	bubble(t, func(t *testing.T) {
		ending := make(chan struct{})
		r := newRig(t, enginefake.Hooks{Terminate: func(context.Context, string) error { <-ending; return nil }})
		list := func(text string, terminated bool, want ...string) {
			t.Helper()
			synctest.Wait()
			f, err := filter.Parse(text, filter.Schema{
				Enums: map[string][]string{"state": {"STARTING", "RUNNING", "TERMINATING", "TERMINATED"}, "end_reason": {"REQUESTED"}},
				Maps:  []string{"labels"}, Times: []string{"create_time", "end_time"},
			})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			q := session.Query{Filter: f, Terminated: terminated, Limit: 1, Ascending: true}
			for {
				page, err := r.List(t.Context(), q)
				if err != nil {
					t.Fatal(err)
				}
				if len(page) == 0 {
					break
				}
				got = append(got, page[0].ID)
				q.Before = page[0].ID
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("%s: %v, want %v", text, got, want)
			}
		}
		var ids []string
		for _, name := range []string{"a", "b", "c"} {
			ids = append(ids, r.running(session.Request{Labels: map[string]string{"name": name}}))
			time.Sleep(time.Second)
		}
		list("state = RUNNING", false, ids...)
		list("labels.name != a", false, ids[1], ids[2])
		list("labels.name = a AND state != TERMINATED", true, ids[0])
		var terminating sync.WaitGroup
		terminating.Go(func() { _, _ = r.Terminate(t.Context(), ids[0], "me") })
		list("state = TERMINATING", false, ids[0])
		list("end_reason = REQUESTED", false, ids[0])
		list("end_reason != REQUESTED AND state = RUNNING", false, ids[1], ids[2])
		close(ending)
		terminating.Wait()
		list("state = TERMINATED", true, ids[0])
		list("state = TERMINATED", false)
		list("end_time > '1999-01-01T00:00:00Z'", true, ids[0])
		list("end_time != '1999-01-01T00:00:00Z'", true, ids...)
		list("", true, ids...)
	})
}

func TestStateNames(t *testing.T) {
	for s := range session.State(10) {
		if name := s.String(); (name != "") != (s >= session.Starting && s <= session.Resuming) || name != "" && session.StateOf(name) != s {
			t.Errorf("%d is called %q", s, name)
		}
	}
	if s := session.StateOf("ENDED"); s != 0 {
		t.Errorf("ENDED is %d", s)
	}
}
