package execution_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
)

func newKey(method string) idempotency.Key {
	return idempotency.Key{ID: "r1", Method: method, Fingerprint: "f1"}
}

// counting is the Config of a fake engine that counts the commands that it starts.
func counting(started *atomic.Int32, script enginefake.Script) enginefake.Config {
	return enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script {
		started.Add(1)
		return script
	}}
}

func program(key idempotency.Key) execution.Request {
	return execution.Request{Command: execution.Command{Args: []string{"program"}}, Key: key}
}

// TestStartOnce: 50 equal requests at once start one command and are answered with it.
func TestStartOnce(t *testing.T) {
	for _, session := range []string{"", "s1"} {
		bubble(t, func(t *testing.T) {
			var started atomic.Int32
			r := newRig(t, counting(&started, enginefake.Script{}))
			if session != "" {
				r.session(session)
			}
			request := program(newKey("Execute"))
			request.Session = session
			var all sync.WaitGroup
			var mu sync.Mutex
			names := make(map[execution.Ref]int)
			for range 50 {
				all.Go(func() {
					e, err := r.Start(t.Context(), request)
					if err != nil {
						t.Error(err)
					}
					mu.Lock()
					defer mu.Unlock()
					names[execution.Ref{Session: e.Session, ID: e.ID}]++
				})
			}
			all.Wait()
			time.Sleep(time.Second)
			if len(names) != 1 || started.Load() != 1 || r.Running() != 1 || len(r.memory.all()) != 1 {
				t.Errorf("names %v, %d started, %d running", names, started.Load(), r.Running())
			}
			for ref := range names {
				// Whenever the repeat comes, it is told of the same as it is.
				if e, err := r.Start(t.Context(), request); err != nil || e.State != execution.Running || e.ID != ref.ID {
					t.Errorf("%+v, %v", e, err)
				}
				r.cancel(ref, 0)
				if e, err := r.Start(t.Context(), request); err != nil || e.Result.Reason != execution.Cancelled || e.ID != ref.ID {
					t.Errorf("%+v, %v", e, err)
				}
				r.sessions.end(session)
				if e, err := r.Start(t.Context(), request); err != nil || e.ID != ref.ID {
					t.Errorf("when its session has ended: %+v, %v", e, err)
				}
				if err := r.Delete(t.Context(), ref); err != nil {
					t.Error(err)
				}
			}
			_, err := r.Start(t.Context(), request)
			wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
			if started.Load() != 1 {
				t.Errorf("%d started", started.Load())
			}
		})
	}
}

func TestStartReused(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var started atomic.Int32
		r := newRig(t, counting(&started, enginefake.Script{Exit: enginefake.Exit(0)}))
		first, err := r.Start(t.Context(), program(newKey("Execute")))
		if err != nil {
			t.Fatal(err)
		}
		other := newKey("Execute")
		other.Fingerprint = "f2"
		for _, key := range []idempotency.Key{other, newKey("StartExecution")} {
			_, err := r.Start(t.Context(), program(key))
			wantFault(t, err, fault.AlreadyExists, "REQUEST_ID_REUSED")
		}
		stranger := newKey("Execute")
		stranger.Owner = "bob"
		second, err := r.Start(t.Context(), program(stranger))
		if err != nil || second.ID == first.ID {
			t.Errorf("another owner's: %+v, %v", second, err)
		}
		time.Sleep(time.Second)
		if started.Load() != 2 {
			t.Errorf("%d started", started.Load())
		}
	})
}

// TestStartOnceAfterFailure: what failed is not remembered, and each of those who waited
// for it may try.
func TestStartOnceAfterFailure(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var started, inserts atomic.Int32
		r := newRig(t, counting(&started, enginefake.Script{}))
		full := fault.New(fault.Exhausted, "STATE_FULL", "no room")
		r.memory.hook(func(op string, _ execution.Execution) error {
			if op != "insert" {
				return nil
			}
			time.Sleep(time.Second) // the others have come
			if inserts.Add(1) <= 3 {
				return full
			}
			return nil
		}, nil)
		invalid := program(newKey("Execute"))
		invalid.Command.Args = nil
		_, err := r.Start(t.Context(), invalid)
		wantFault(t, err, fault.Invalid, "COMMAND_EMPTY")
		var failed atomic.Int32
		var all sync.WaitGroup
		for range 50 {
			all.Go(func() {
				if _, err := r.Start(t.Context(), program(newKey("Execute"))); errors.Is(err, full) {
					failed.Add(1)
				} else if err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		time.Sleep(time.Second)
		if failed.Load() != 3 || started.Load() != 1 || len(r.memory.all()) != 1 {
			t.Errorf("%d failed, %d started, %d recorded", failed.Load(), started.Load(), len(r.memory.all()))
		}
		if entries, err := os.ReadDir(r.dir); err != nil || len(entries) != 1 {
			t.Errorf("%d logs, %v", len(entries), err)
		}
	})
}

// TestStartOnceWhileDraining: a repeat is no new work.
func TestStartOnceWhileDraining(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{}))
		first, err := r.Start(t.Context(), program(newKey("Execute")))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_ = r.Drain(ctx)
		if e, err := r.Start(t.Context(), program(newKey("Execute"))); err != nil || e.ID != first.ID {
			t.Errorf("%+v, %v", e, err)
		}
		_, err = r.Start(t.Context(), program(idempotency.Key{ID: "r2", Method: "Execute"}))
		wantFault(t, err, fault.Unavailable, "SERVER_DRAINING")
	})
}

func TestCancelOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{}))
		ref := r.start(execution.Request{})
		time.Sleep(time.Second)
		cancellation := execution.Cancellation{By: "ada", Key: newKey("CancelExecution")}
		_, err := r.Cancel(t.Context(), execution.Ref{ID: "none"}, cancellation)
		wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				e, err := r.Cancel(t.Context(), ref, cancellation)
				if err != nil || e.Result == nil || e.Result.Reason != execution.Cancelled || e.Result.CancelledBy != "ada" {
					t.Errorf("%+v, %v", e, err)
				}
			})
		}
		all.Wait()
		if e, err := r.Cancel(t.Context(), ref, cancellation); err != nil || e.Result.CancelledBy != "ada" {
			t.Errorf("%+v, %v", e, err)
		}
		running := r.start(execution.Request{})
		cancellation.Key.Fingerprint = "f2"
		_, err = r.Cancel(t.Context(), running, cancellation)
		wantFault(t, err, fault.AlreadyExists, "REQUEST_ID_REUSED")
		if e := r.get(running); e.State > execution.Running {
			t.Errorf("state %v", e.State)
		}
	})
}

func TestDeleteOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Exit: enginefake.Exit(0)}))
		ref, other := r.start(execution.Request{}), r.start(execution.Request{})
		r.wait(ref)
		r.wait(other)
		synctest.Wait()
		key := newKey("DeleteExecution")
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				if err := r.Service.Delete(t.Context(), ref, key); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		wantFault(t, r.Service.Delete(t.Context(), ref, idempotency.Key{}), fault.NotFound, "EXECUTION_NOT_FOUND")
		key.Fingerprint = "f2"
		wantFault(t, r.Service.Delete(t.Context(), other, key), fault.AlreadyExists, "REQUEST_ID_REUSED")
		if e := r.get(other); e.State != execution.Ended {
			t.Errorf("%+v", e)
		}
	})
}

// TestCrashOnce kills executord between all steps of a start that has a name. The repeat
// starts something where nothing was recorded, and joins otherwise; there is never a
// second one.
func TestCrashOnce(t *testing.T) {
	for point, joins := range map[string]bool{
		"before insert": false, "after insert": true, "before create": true, "after create": true, "before sync": true, "after sync": true,
	} {
		t.Run(point, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var started atomic.Int32
				fake := enginefake.New(counting(&started, enginefake.Script{}))
				t.Cleanup(fake.Shutdown)
				w := &world{t: t, fake: fake, store: newMemory(), dir: t.TempDir()}
				reached, gone := make(chan struct{}), make(chan struct{})
				var once sync.Once
				first := w.executord(func(step string) {
					if step == point {
						once.Do(func() { close(reached); <-gone })
					}
				})
				var starting sync.WaitGroup
				starting.Go(func() { _, _ = first.Start(t.Context(), program(newKey("Execute"))) })
				<-reached
				synctest.Wait()
				first.mortal.kill()
				w.freeze()
				close(gone)
				if err := first.Close(); err != nil {
					t.Error(err)
				}
				starting.Wait()

				recorded := w.store.all()
				if (len(recorded) == 1) != joins {
					t.Fatalf("recorded: %+v", recorded)
				}
				before := started.Load()
				second := w.executord(nil)
				defer second.Close()
				if err := second.Recover(t.Context()); err != nil {
					t.Fatal(err)
				}
				e, err := second.Start(t.Context(), program(newKey("Execute")))
				if err != nil || joins && e.ID != recorded[0].ID {
					t.Fatalf("%+v, %v", e, err)
				}
				time.Sleep(time.Minute)
				if total := started.Load(); total > 1 || joins && total != before || len(w.store.all()) != 1 {
					t.Errorf("%d started, %d of them before the crash", total, before)
				}
				if err := second.StopAll(t.Context()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestListFiltersTheLive: what the store does not know yet of those that run does not
// matter.
func TestListFiltersTheLive(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{Script: func(s *guestv1.StartRequest) enginefake.Script {
			if strings.HasPrefix(s.GetArgs()[0], "true") {
				return enginefake.Script{Exit: enginefake.Exit(0)}
			}
			return enginefake.Script{IgnoreTerm: true}
		}})
		start := func(name string) execution.Ref {
			return r.start(execution.Request{Command: execution.Command{Args: []string{name}}, Labels: map[string]string{"name": name}})
		}
		check := func(when, filter string, want ...execution.Ref) {
			t.Helper()
			synctest.Wait()
			for _, ascending := range []bool{false, true} {
				var got []string
				q := execution.Query{Filter: parseFilter(t, filter), Limit: 1, Ascending: ascending}
				for { // one by one
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
				var ids []string
				for i := range want {
					if ascending {
						ids = append(ids, want[i].ID)
					} else {
						ids = append(ids, want[len(want)-1-i].ID)
					}
				}
				if fmt.Sprint(got) != fmt.Sprint(ids) {
					t.Errorf("%s, %s: %v, want %v", when, filter, got, ids)
				}
			}
		}
		ended := start("true")
		r.wait(ended)
		time.Sleep(time.Second)
		first := start("sleep")
		time.Sleep(time.Second)
		middle := time.Now().UTC().Format(time.RFC3339Nano)
		second := start("sleep")
		time.Sleep(10 * time.Millisecond)
		// The store is told after seconds only.
		if e, _ := r.memory.stored(second.ID); e.State != execution.Starting {
			t.Fatalf("the store knows: %v", e.State)
		}
		check("running", "state = RUNNING", first, second)
		check("running", "state != RUNNING", ended)
		check("running", "state = STARTING")
		check("running", "state != ENDED AND labels.name = sleep", first, second)
		check("running", "state = RUNNING AND labels.name != sleep")
		check("running", "reason = EXITED", ended)
		check("running", "reason != EXITED", first, second)
		check("running", fmt.Sprintf("create_time >= %q", middle), second)
		check("running", fmt.Sprintf("create_time < %q AND state = RUNNING", middle), first)
		check("running", fmt.Sprintf("end_time < %q", middle), ended)

		var stopping sync.WaitGroup
		stopping.Go(func() {
			grace := time.Minute
			_, _ = r.Cancel(t.Context(), first, execution.Cancellation{Grace: &grace, By: "me"})
		})
		check("stopping", "state = STOPPING", first)
		check("stopping", "state = RUNNING", second)
		// The end is told before the store has it.
		r.memory.hook(func(op string, e execution.Execution) error {
			if op == "update" && e.State == execution.Ended {
				time.Sleep(time.Minute)
			}
			return nil
		}, nil)
		r.watch(first, nil)
		if e, _ := r.memory.stored(first.ID); e.State == execution.Ended {
			t.Fatalf("the store knows: %v", e.State)
		}
		check("ended", "state = ENDED", ended, first)
		check("ended", "reason = CANCELLED", first)
		check("ended", "state != ENDED", second)
		check("ended", fmt.Sprintf("end_time >= %q", middle), first)
		stopping.Wait()
		check("settled", "state = ENDED", ended, first)
		r.memory.hook(nil, nil)
		r.cancel(second, 0)
		check("at last", "state = ENDED", ended, first, second)
		check("at last", "", ended, first, second)
	})
}
