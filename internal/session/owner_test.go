package session_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/session"
)

// Another's session does not exist, exactly as one that there never was.
func TestNotYoursIsNotThere(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		ann := caller.Caller{Owner: "key:ann"}
		s, err := r.Create(t.Context(), session.Request{Caller: ann})
		if err != nil {
			t.Fatal(err)
		}
		mine := session.Ref{ID: s.ID, Caller: ann}
		if s, err := r.Service.WaitStarted(t.Context(), mine); err != nil || s.State != session.Running || s.Owner != "key:ann" {
			t.Fatalf("%+v, %v", s, err)
		}
		calls := func(ref session.Ref) map[string]error {
			_, get := r.Service.Get(t.Context(), ref)
			_, wait := r.Service.WaitStarted(t.Context(), ref)
			_, end := r.Service.Terminate(t.Context(), ref, "x", idempotency.Key{})
			_, use := r.Service.Sandbox(t.Context(), ref.ID, ref.Caller)
			return map[string]error{"get": get, "wait": wait, "terminate": end, "sandbox": use}
		}
		check := func(when string) {
			t.Helper()
			for _, stranger := range []caller.Caller{{Owner: "key:bob"}, {}} {
				const never = "01jzzzzzzzzzzzzzzzzzzzzzzz"
				none := calls(session.Ref{ID: never, Caller: stranger})
				for call, err := range calls(session.Ref{ID: s.ID, Caller: stranger}) {
					wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
					got, want := strings.ReplaceAll(all(err), s.ID, "ID"), strings.ReplaceAll(all(none[call]), never, "ID")
					if got != want {
						t.Errorf("%s, %s: %s, but for one that never was %s", when, call, got, want)
					}
				}
				if page, err := r.List(t.Context(), session.Query{Caller: stranger, Limit: 5, Terminated: true}); err != nil || len(page) != 0 {
					t.Errorf("%s: %v lists %v, %v", when, stranger, page, err)
				}
			}
			for _, who := range []caller.Caller{ann, {Owner: "key:ops", All: true}} {
				if page, err := r.List(t.Context(), session.Query{Caller: who, Limit: 5, Terminated: true}); err != nil || len(page) != 1 {
					t.Errorf("%s: %v lists %v, %v", when, who, page, err)
				}
			}
		}
		check("while it runs")
		if s, err := r.Service.Get(t.Context(), mine); err != nil || s.State != session.Running {
			t.Errorf("a stranger changed it: %+v, %v", s, err)
		}
		r.restart()
		check("after a restart")
		if s, err := r.Service.Terminate(t.Context(), session.Ref{ID: s.ID, Caller: caller.Caller{All: true}}, "ops", idempotency.Key{}); err != nil || s.State != session.Terminated {
			t.Errorf("%+v, %v", s, err)
		}
		check("when it has ended")
	})
}

func all(err error) string {
	e, ok := errors.AsType[*fault.Error](err)
	if !ok {
		return fmt.Sprint(err)
	}
	return fmt.Sprintf("%#v", *e)
}

func TestQuota(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Hooks{})
		r.quota = 2
		r.restart()
		ann := session.Request{Caller: caller.Caller{Owner: "key:ann"}}
		first := r.create(ann)
		r.create(ann)
		_, err := r.Create(t.Context(), ann)
		wantFault(t, err, fault.Exhausted, "QUOTA_EXCEEDED")
		if e, _ := errors.AsType[*fault.Error](err); len(e.Quotas) != 1 || e.Quotas[0] != (fault.Quota{Subject: "key:ann", Name: "sessions", Limit: 2, Description: e.Message}) || e.RetryAfter <= 0 {
			t.Errorf("%+v", e)
		}
		r.create(session.Request{Caller: caller.Caller{Owner: "key:bob"}})
		r.restart()
		if _, err := r.Create(t.Context(), ann); fault.ReasonOf(err) != "QUOTA_EXCEEDED" {
			t.Errorf("after a restart: %v", err)
		}
		if _, err := r.Service.Terminate(t.Context(), session.Ref{ID: first, Caller: ann.Caller}, "me", idempotency.Key{}); err != nil {
			t.Fatal(err)
		}
		r.create(ann)
	})
}
