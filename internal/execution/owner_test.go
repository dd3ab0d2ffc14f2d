package execution_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

func owner(name string) caller.Caller { return caller.Caller{Owner: name} }

// calls are all that can be done to an execution by its name.
func calls(ctx context.Context, r *rig, ref execution.Ref) map[string]error {
	_, get := r.Get(ctx, ref)
	_, wait := r.Wait(ctx, ref)
	watcher, watch := r.Watch(ctx, ref, nil)
	if watcher != nil {
		watcher.Close()
	}
	_, read := r.ReadOutput(ctx, ref, "stdout", 0, make([]byte, 1))
	_, cancel := r.Cancel(ctx, ref, execution.Cancellation{By: "x"})
	return map[string]error{"get": get, "wait": wait, "watch": watch, "read": read, "cancel": cancel, "delete": r.Delete(ctx, ref)}
}

// Another's execution does not exist: in every call, while it runs, when it has ended and
// after a restart the answer is the one for a name that there never was.
func TestNotYoursIsNotThere(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "secret")}}))
		r.session("box")
		for _, session := range []string{"", "box"} {
			mine := r.start(execution.Request{Caller: owner("key:ann"), Session: session})
			mine.Caller = owner("key:ann")
			check := func(when string) {
				t.Helper()
				var mu sync.Mutex // the collector reads too
				reads := make(map[string]int)
				r.memory.hook(func(op string, e execution.Execution) error {
					mu.Lock()
					defer mu.Unlock()
					reads[op+" "+e.ID]++
					return nil
				}, nil)
				defer r.memory.hook(nil, nil)
				for _, stranger := range []caller.Caller{owner("key:bob"), owner(""), owner("key:an"), owner("key:ann ")} {
					foreign := execution.Ref{Session: mine.Session, ID: mine.ID, Caller: stranger}
					unknown := execution.Ref{Session: mine.Session, ID: "01jzzzzzzzzzzzzzzzzzzzzzzz", Caller: stranger}
					none := calls(t.Context(), r, unknown)
					for call, err := range calls(t.Context(), r, foreign) {
						wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
						// Nothing but the name tells them apart.
						got, want := strings.ReplaceAll(fmt.Sprintf("%#v", *asFault(t, err)), foreign.ID, "ID"), strings.ReplaceAll(fmt.Sprintf("%#v", *asFault(t, none[call])), unknown.ID, "ID")
						if got != want {
							t.Errorf("%s, %s: %s, but for one that never was %s", when, call, got, want)
						}
					}
				}
				// The store is asked as often, so that time does not tell either.
				mu.Lock()
				if n := reads["get "+mine.ID]; n == 0 || n != reads["get 01jzzzzzzzzzzzzzzzzzzzzzzz"] {
					t.Errorf("%s: the store was asked %v", when, reads)
				}
				mu.Unlock()
				if e := r.get(mine); e.Owner != "key:ann" {
					t.Errorf("%s: it is %q's", when, e.Owner)
				}
			}
			time.Sleep(time.Second)
			check("while it runs")
			if e := r.get(mine); e.State != execution.Running {
				t.Errorf("a stranger changed it: %v", e.State)
			}
			r.cancel(mine, 0)
			check("when it has ended")
			r.restart()
			check("after a restart")
			all := mine
			all.Caller = caller.Caller{Owner: "key:ops", All: true}
			if e := r.get(all); e.ID != mine.ID {
				t.Errorf("who sees all sees %v", e)
			}
			if err := r.Delete(t.Context(), all); err != nil {
				t.Error(err)
			}
		}
	})
}

func asFault(t *testing.T, err error) *fault.Error {
	t.Helper()
	e, ok := errors.AsType[*fault.Error](err)
	if !ok {
		t.Fatalf("%v is no fault", err)
	}
	return e
}

func TestListsAreOfOneOwner(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Exit: enginefake.Exit(0)}))
		for range 3 {
			r.wait(withCaller(r.start(execution.Request{Caller: owner("key:ann")}), "key:ann"))
			r.wait(withCaller(r.start(execution.Request{Caller: owner("key:bob")}), "key:bob"))
		}
		for who, want := range map[caller.Caller]int{
			owner("key:ann"): 3, owner("key:bob"): 3, owner("key:eve"): 0, {Owner: "key:eve", All: true}: 6,
		} {
			page, err := r.List(t.Context(), execution.Query{Caller: who, Limit: 10})
			if err != nil || len(page) != want {
				t.Errorf("%v sees %d (%v), want %d", who, len(page), err, want)
			}
		}
	})
}

func withCaller(ref execution.Ref, name string) execution.Ref {
	ref.Caller = owner(name)
	return ref
}

func TestQuotaOfRunning(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{}))
		r.quota = execution.Quota{Running: 2}
		r.restart()
		first := r.start(execution.Request{Caller: owner("key:ann")})
		r.start(execution.Request{Caller: owner("key:ann")})
		request := execution.Request{Caller: owner("key:ann"), Command: execution.Command{Args: []string{"x"}}}
		_, err := r.Start(t.Context(), request)
		wantFault(t, err, fault.Exhausted, "QUOTA_EXCEEDED")
		if e := asFault(t, err); len(e.Quotas) != 1 || e.Quotas[0] != (fault.Quota{Subject: "key:ann", Name: "running_executions", Limit: 2, Description: e.Message}) || e.RetryAfter <= 0 {
			t.Errorf("%+v", e)
		}
		if left := len(r.memory.all()); left != 2 {
			t.Errorf("there are %d records", left)
		}
		r.start(execution.Request{Caller: owner("key:bob")}) // another's is not touched
		r.restart()
		if _, err := r.Start(t.Context(), request); fault.ReasonOf(err) != "QUOTA_EXCEEDED" {
			t.Errorf("after a restart: %v", err)
		}
		r.cancel(withCaller(first, "key:ann"), 0)
		r.start(request)
	})
}

func TestQuotaOfStoredBytes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{
			Steps: []enginefake.Step{enginefake.Stdout(0, strings.Repeat("x", 600)), enginefake.Stderr(time.Minute, strings.Repeat("y", 500))}, Exit: enginefake.Exit(0),
		}))
		r.quota = execution.Quota{StoredBytes: 1000}
		r.restart()
		ann := withCaller(r.start(execution.Request{Caller: owner("key:ann")}), "key:ann")
		time.Sleep(time.Second)
		second := withCaller(r.start(execution.Request{Caller: owner("key:ann")}), "key:ann") // 600 are kept
		time.Sleep(time.Second)
		request := execution.Request{Caller: owner("key:ann"), Command: execution.Command{Args: []string{"x"}}}
		_, err := r.Start(t.Context(), request) // 1200, of what runs
		wantFault(t, err, fault.Exhausted, "QUOTA_EXCEEDED")
		r.start(execution.Request{Caller: owner("key:bob")})
		r.wait(ann)
		r.wait(second)
		_, err = r.Start(t.Context(), request) // 2200, of what has ended
		wantFault(t, err, fault.Exhausted, "QUOTA_EXCEEDED")
		if q := asFault(t, err).Quotas; len(q) != 1 || q[0].Name != "stored_bytes" || q[0].Limit != 1000 {
			t.Errorf("%+v", q)
		}
		for _, ref := range []execution.Ref{ann, second} {
			if err := r.Delete(t.Context(), ref); err != nil {
				t.Fatal(err)
			}
		}
		r.start(request)
	})
}
