package execution_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

var errDisk = &os.PathError{Op: "write", Path: "/state", Err: syscall.ENOSPC}

// TestLife looks at one execution from all sides while it lives.
func TestLife(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{
			Limits: engine.Limits{MemoryBytes: 1 << 30, PIDs: 100},
			Script: func(*guestv1.StartRequest) enginefake.Script {
				return enginefake.Script{
					Steps: []enginefake.Step{
						enginefake.Stdout(time.Second, "one\n"), enginefake.Stderr(time.Second, "two\n"), enginefake.Stdout(time.Second, "three\n"),
					},
					Exit: enginefake.Exit(0),
				}
			},
			Hooks: enginefake.Hooks{Create: func(context.Context, string) error { time.Sleep(time.Second); return nil }},
		})
		request := execution.Request{
			Command: execution.Command{Args: []string{"program", "x"}, Env: map[string]string{"A": "secret"}},
			Limits:  engine.Limits{PIDs: 7}, Labels: map[string]string{"k": "v"}, RetainedBytes: 1 << 20,
		}
		begin := time.Now()
		e, err := r.Start(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		ref := execution.Ref{ID: e.ID}
		want := execution.Execution{
			ID: e.ID, Engine: "fake", Sandbox: "e-" + e.ID, State: execution.Starting, CreateTime: begin, Epoch: e.Epoch, Sequence: 1,
			Command: execution.Command{
				Args: []string{"program", "x"}, Env: map[string]string{"A": ""}, WorkingDirectory: "/workspace",
				Timeout: execution.DefaultTimeout, GracePeriod: ptr(execution.DefaultGracePeriod),
			},
			Limits: engine.Limits{MemoryBytes: 1 << 30, PIDs: 7}, Network: egress.None(), RetainedBytes: 1 << 20, Labels: map[string]string{"k": "v"},
			Policies: execution.Policies{OnLimit: execution.DropOldest, Detach: execution.KeepRunning},
		}
		if diff := cmp.Diff(want, e); diff != "" || e.Epoch == "" || len(e.ID) != 26 {
			t.Errorf("id %q, epoch %q (-want +got):\n%s", e.ID, e.Epoch, diff)
		}
		if stored, ok := r.memory.stored(e.ID); !ok || stored.State != execution.Starting {
			t.Errorf("stored: %+v", stored)
		}
		if r.Running() != 1 || len(r.fake.Started()) != 0 {
			t.Errorf("%d running, started %v", r.Running(), r.fake.Started())
		}
		time.Sleep(2500 * time.Millisecond)
		e = r.get(ref)
		if e.State != execution.Running || e.Sequence != 2 || !e.StartTime.Equal(begin.Add(time.Second)) || e.Result != nil {
			t.Errorf("while it runs: %+v", e)
		}
		time.Sleep(time.Second)
		if page, err := r.List(t.Context(), execution.Query{Limit: 10}); err != nil || len(page) != 1 || page[0].Sequence != 3 || page[0].State != execution.Running {
			t.Errorf("the list: %+v, %v", page, err)
		}
		if stored, _ := r.memory.stored(e.ID); stored.State != execution.Running || !stored.StartTime.Equal(begin.Add(time.Second)) {
			t.Errorf("stored after two seconds: %+v", stored)
		}
		e = r.wait(ref)
		if e.Sequence != 5 || time.Since(begin) != 4*time.Second || r.Running() != 0 {
			t.Errorf("at the end, after %v: %+v, %d running", time.Since(begin), e, r.Running())
		}
		if diff := cmp.Diff(e, r.get(ref)); diff != "" {
			t.Error(diff)
		}
		synctest.Wait()
		if left, _ := r.fake.List(t.Context()); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
		got := r.watch(ref, nil)
		if string(got.output["stdout"]) != "one\nthree\n" || string(got.output["stderr"]) != "two\n" {
			t.Errorf("%q", got.output)
		}
		if text := r.log.String(); text != "" {
			t.Errorf("an ordinary life is worth no line in the log: %s", text)
		}
	})
}

func TestStartRefused(t *testing.T) {
	full := func(op string, e execution.Execution) error {
		if op == "insert" {
			return fault.New(fault.Exhausted, "STATE_FULL", "no room for the state")
		}
		return nil
	}
	valid := execution.Command{Args: []string{"x"}}
	tests := map[string]struct {
		request execution.Request
		change  func(r *rig)
		kind    fault.Kind
		reason  string
	}{
		"command":                {execution.Request{}, nil, fault.Invalid, "COMMAND_EMPTY"},
		"limits":                 {execution.Request{Command: valid, Limits: engine.Limits{CPUMillis: 1}}, nil, fault.FailedPrecondition, "LIMIT_NOT_ENFORCEABLE"},
		"limits in a session":    {execution.Request{Command: valid, Session: "a", Limits: engine.Limits{PIDs: 1}}, nil, fault.Invalid, "LIMITS_WITH_PARENT"},
		"a session that is over": {execution.Request{Command: valid, Session: "b"}, nil, fault.FailedPrecondition, "SESSION_NOT_RUNNING"},
		"too much to keep":       {execution.Request{Command: valid, RetainedBytes: 1<<30 + 1}, nil, fault.Invalid, "RETAINED_BYTES"},
		"less than nothing":      {execution.Request{Command: valid, RetainedBytes: -1}, nil, fault.Invalid, "RETAINED_BYTES"},
		"the store is full":      {execution.Request{Command: valid}, func(r *rig) { r.memory.hook(full, nil) }, fault.Exhausted, "STATE_FULL"},
		"draining":               {execution.Request{Command: valid}, func(r *rig) { _ = r.Drain(r.t.Context()) }, fault.Unavailable, "SERVER_DRAINING"},
		"closed":                 {execution.Request{Command: valid}, func(r *rig) { _ = r.Close() }, fault.Unavailable, "SERVER_DRAINING"},
		"a session ends meanwhile": {execution.Request{Command: valid, Session: "a"}, func(r *rig) {
			// Between the first look at the session and the admission of the run.
			looks := 0
			r.sessions.hook = func() {
				if looks++; looks == 2 {
					r.sessions.end("a")
				}
			}
		}, fault.FailedPrecondition, "SESSION_NOT_RUNNING"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, enginefake.Config{})
				r.session("a")
				if test.change != nil {
					test.change(r)
				}
				_, err := r.Start(t.Context(), test.request)
				wantFault(t, err, test.kind, test.reason)
				if entries, err := os.ReadDir(r.dir); err != nil || len(entries) != 0 {
					t.Errorf("logs left: %v, %v", entries, err)
				}
				if r.Running() != 0 || len(r.memory.all()) != 0 || len(r.fake.Made()) != 1 {
					t.Errorf("%d running, %d records, sandboxes %v", r.Running(), len(r.memory.all()), r.fake.Made())
				}
				if err := r.Drain(t.Context()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestRecordFailsWhileOthersWait has those who found a run that then did not come to
// be return.
func TestRecordFailsWhileOthersWait(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{})
		inserting, fail := make(chan struct{}), make(chan struct{})
		r.memory.hook(func(op string, _ execution.Execution) error {
			if op == "insert" {
				close(inserting)
				<-fail
				return errDisk
			}
			return nil
		}, nil)
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}}); !errors.Is(err, syscall.ENOSPC) {
				t.Error(err)
			}
		})
		<-inserting
		wg.Go(func() {
			if err := r.StopAll(t.Context()); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if err := r.Drain(t.Context()); err != nil {
				t.Error(err)
			}
		})
		closed := make(chan struct{})
		wg.Go(func() { _ = r.Close(); close(closed) })
		synctest.Wait()
		select {
		case <-closed:
			t.Error("Close did not wait for a Start")
		default:
		}
		close(fail)
		wg.Wait()
		if len(r.fake.Made()) != 0 {
			t.Errorf("made %v", r.fake.Made())
		}
	})
}

// TestRecordIsNotDurable ends what was started, since nobody was told of it.
func TestRecordIsNotDurable(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{}))
		r.memory.hook(func(op string, _ execution.Execution) error {
			if op == "sync" {
				time.Sleep(time.Second)
				return errDisk
			}
			return nil
		}, nil)
		_, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}})
		wantFault(t, err, fault.Exhausted, "DISK_FULL")
		if err := r.Drain(t.Context()); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		for _, e := range r.memory.all() {
			if e.State != execution.Ended || e.Result.Reason != execution.ServerStopped || e.Result.Detail != "its record could not be made durable" {
				t.Errorf("%+v", e.Result)
			}
		}
		if left, _ := r.fake.List(t.Context()); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// TestCallerLeavesDuringTheStart leaves an execution that is whole, or none.
func TestCallerLeavesDuringTheStart(t *testing.T) {
	for _, at := range []string{"insert", "sync"} {
		bubble(t, func(t *testing.T) {
			r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(time.Second)}, Exit: enginefake.Exit(0)}))
			ctx, cancel := context.WithCancelCause(t.Context())
			because := errors.New("the client is gone")
			r.memory.hook(func(op string, _ execution.Execution) error {
				if op == at {
					cancel(because)
				}
				return nil
			}, nil)
			e, err := r.Start(ctx, execution.Request{Command: execution.Command{Args: []string{"x"}}})
			if at == "insert" {
				if !errors.Is(err, because) || len(r.memory.all()) != 0 || r.Running() != 0 {
					t.Errorf("%v, %d records, %d running", err, len(r.memory.all()), r.Running())
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if e := r.wait(execution.Ref{ID: e.ID}); e.Result.Reason != execution.Exited {
				t.Errorf("%+v", e.Result)
			}
		})
	}
}

// TestStopAllMeetsAStart has an execution that was ordered to stop before it was
// recorded end without having run.
func TestStopAllMeetsAStart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{})
		inserting, proceed := make(chan struct{}), make(chan struct{})
		r.memory.hook(func(op string, _ execution.Execution) error {
			if op == "insert" {
				close(inserting)
				<-proceed
			}
			return nil
		}, nil)
		var wg sync.WaitGroup
		wg.Go(func() {
			e, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}})
			if err != nil {
				t.Error(err)
				return
			}
			if res := r.wait(execution.Ref{ID: e.ID}).Result; res.Reason != execution.ServerStopped || !res.TreeEmpty {
				t.Errorf("%+v", res)
			}
		})
		<-inserting
		wg.Go(func() {
			if err := r.StopAll(t.Context()); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		close(proceed)
		wg.Wait()
		if len(r.fake.Made()) != 0 {
			t.Errorf("made %v", r.fake.Made())
		}
	})
}

func TestNewFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := execution.New(execution.Config{Dir: filepath.Join(file, "logs")}); err == nil || !strings.Contains(err.Error(), "event logs") {
		t.Errorf("%v", err)
	}
}

func TestNames(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(time.Minute)}, Exit: enginefake.Exit(0)}))
		r.session("a")
		one, inside := r.start(execution.Request{}), r.start(execution.Request{Session: "a"})
		wrong := []execution.Ref{
			{ID: "none"}, {Session: "a", ID: one.ID}, {ID: inside.ID}, {Session: "b", ID: inside.ID}, {Session: "a", ID: "none"},
		}
		ask := func() {
			for _, ref := range wrong {
				_, err := r.Get(t.Context(), ref)
				wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
				_, err = r.Wait(t.Context(), ref)
				wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
				_, err = r.Cancel(t.Context(), ref, execution.Cancellation{})
				wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
				_, err = r.Watch(t.Context(), ref, nil)
				wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
				_, err = r.ReadOutput(t.Context(), ref, "stdout", 0, make([]byte, 1))
				wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
				wantFault(t, r.Delete(t.Context(), ref), fault.NotFound, "EXECUTION_NOT_FOUND")
			}
		}
		ask()
		for _, ref := range []execution.Ref{one, inside} {
			if e := r.get(ref); e.State == execution.Stopping {
				t.Errorf("%v was ordered to stop under another's name", ref)
			}
			r.wait(ref)
		}
		ask()
	})
}

func TestLists(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{Script: func(q *guestv1.StartRequest) enginefake.Script {
			if q.GetArgs()[0] == "long" {
				return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "x")}}
			}
			return enginefake.Script{Exit: enginefake.Exit(0)}
		}})
		r.session("a")
		long := execution.Command{Args: []string{"long"}}
		want := []execution.State{execution.Running, execution.Running, execution.Ended}
		r.wait(r.start(execution.Request{}))
		time.Sleep(time.Millisecond)
		inside := r.start(execution.Request{Session: "a", Command: long})
		time.Sleep(time.Millisecond)
		one := r.start(execution.Request{Command: long})
		synctest.Wait()
		page, err := r.List(t.Context(), execution.Query{Limit: 5})
		if err != nil || len(page) != 3 {
			t.Fatalf("%v, %v", page, err)
		}
		for i, e := range page {
			if e.State != want[i] || e.Sequence != 2 {
				t.Errorf("%d: state %d, sequence %d", i, e.State, e.Sequence)
			}
		}
		if page, err := r.List(t.Context(), execution.Query{Limit: 5, Session: "a"}); err != nil || len(page) != 1 || page[0].ID != inside.ID {
			t.Errorf("%v, %v", page, err)
		}
		if page, err := r.List(t.Context(), execution.Query{Limit: 1, Before: one.ID}); err != nil || len(page) != 1 || page[0].ID != inside.ID {
			t.Errorf("%v, %v", page, err)
		}
		r.memory.hook(func(op string, _ execution.Execution) error { return errDisk }, nil)
		if page, err := r.List(t.Context(), execution.Query{Limit: 5}); !errors.Is(err, errDisk) || len(page) != 0 {
			t.Errorf("%v, %v", page, err)
		}
		if e, err := r.Get(t.Context(), one); err != nil || e.State != execution.Running {
			t.Errorf("one that runs needs no store: %v, %v", e.State, err)
		}
		r.memory.hook(nil, nil)
		if err := r.StopAll(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestDelete(t *testing.T) {
	ended := func(t *testing.T, script enginefake.Script) (*rig, execution.Ref) {
		r := newRig(t, scripted(script))
		ref := r.start(execution.Request{})
		return r, ref
	}
	gone := func(t *testing.T, r *rig, ref execution.Ref) {
		t.Helper()
		_, err := r.Get(t.Context(), ref)
		wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
		_, err = r.Watch(t.Context(), ref, nil)
		wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
		wantFault(t, r.Delete(t.Context(), ref), fault.NotFound, "EXECUTION_NOT_FOUND")
	}
	t.Run("running", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r, ref := ended(t, enginefake.Script{})
			time.Sleep(time.Second)
			wantFault(t, r.Delete(t.Context(), ref), fault.FailedPrecondition, "EXECUTION_NOT_ENDED")
			r.cancel(ref, 0)
			if err := r.Delete(t.Context(), ref); err != nil {
				t.Error(err)
			}
			gone(t, r, ref)
		})
	})
	t.Run("ended", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r, ref := ended(t, enginefake.Script{Exit: enginefake.Exit(0)})
			r.wait(ref)
			synctest.Wait()
			if err := r.Delete(t.Context(), ref); err != nil {
				t.Error(err)
			}
			gone(t, r, ref)
			if entries, _ := os.ReadDir(r.dir); len(entries) != 0 {
				t.Errorf("logs left: %v", entries)
			}
		})
	})
	t.Run("at once after the end", func(t *testing.T) {
		// The sandbox takes its time to end, which is nobody's business any more.
		bubble(t, func(t *testing.T) {
			r := newRig(t, enginefake.Config{Hooks: enginefake.Hooks{
				Terminate: func(context.Context, string) error { time.Sleep(time.Minute); return nil },
			}})
			ref := r.start(execution.Request{})
			r.wait(ref)
			if err := r.Delete(t.Context(), ref); err != nil {
				t.Error(err)
			}
			gone(t, r, ref)
			time.Sleep(2 * time.Minute)
			if entries, _ := os.ReadDir(r.dir); len(entries) != 0 || len(r.list()) != 0 {
				t.Errorf("left: %v, %v", entries, r.list())
			}
		})
	})
	t.Run("while its end is being recorded", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r, ref := ended(t, enginefake.Script{Exit: enginefake.Exit(0)})
			r.memory.hook(func(op string, _ execution.Execution) error {
				if op == "update" {
					time.Sleep(time.Minute)
				}
				return nil
			}, nil)
			if got := r.watch(ref, nil); got.result == nil {
				t.Error("no result")
			}
			if e := r.get(ref); e.State != execution.Ended {
				t.Errorf("state %d after the result was told", e.State)
			}
			begin := time.Now()
			if err := r.Delete(t.Context(), ref); err != nil || time.Since(begin) != time.Minute {
				t.Errorf("%v after %v", err, time.Since(begin))
			}
			gone(t, r, ref)
		})
	})
	t.Run("watched", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r, ref := ended(t, enginefake.Script{
				Steps: []enginefake.Step{enginefake.Stdout(0, strings.Repeat("x", 300<<10))}, Exit: enginefake.Exit(0),
			})
			w, err := r.Watch(t.Context(), ref, nil)
			if err != nil {
				t.Fatal(err)
			}
			if e, err := w.Next(t.Context()); err != nil || e.Started == nil {
				t.Fatalf("%+v, %v", e, err)
			}
			r.wait(ref)
			synctest.Wait()
			if err := r.Delete(t.Context(), ref); err != nil {
				t.Error(err)
			}
			gone(t, r, ref)
			got, err := read(t.Context(), w, ref, &execution.Cursor{Epoch: w.Cursor().Epoch, Sequence: 1})
			if err != nil || len(got.output["stdout"]) != 300<<10 || len(got.gaps) != 0 {
				t.Errorf("%d bytes, gaps %v, %v", len(got.output["stdout"]), got.gaps, err)
			}
			w.Close()
			w.Close()
			if entries, _ := os.ReadDir(r.dir); len(entries) != 0 {
				t.Errorf("logs left: %v", entries)
			}
		})
	})
	t.Run("from two sides", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r, ref := ended(t, enginefake.Script{Exit: enginefake.Exit(0)})
			r.wait(ref)
			var wg sync.WaitGroup
			errs := make(chan error, 8)
			for range cap(errs) {
				wg.Go(func() { errs <- r.Delete(t.Context(), ref) })
			}
			wg.Wait()
			close(errs)
			done := 0
			for err := range errs {
				if err == nil {
					done++
				} else {
					wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
				}
			}
			if done != 1 {
				t.Errorf("deleted %d times", done)
			}
		})
	})
}

func TestReadOutput(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{
			Steps: []enginefake.Step{enginefake.Stdout(0, "hello "), enginefake.Stderr(0, "oops"), enginefake.Stdout(time.Minute, "world")},
			Exit:  enginefake.Exit(0),
		}))
		ref := r.start(execution.Request{})
		time.Sleep(time.Second)
		at := func(stream string, offset int64, want string, wantErr error) {
			t.Helper()
			p := make([]byte, 100)
			n, err := r.ReadOutput(t.Context(), ref, stream, offset, p)
			if string(p[:n]) != want || !errors.Is(err, wantErr) {
				t.Errorf("%s at %d: %q, %v", stream, offset, p[:n], err)
			}
		}
		at("stdout", 0, "hello ", nil)
		at("stdout", 6, "", io.EOF)
		at("stderr", 1, "ops", nil)
		r.wait(ref)
		at("stdout", 4, "o world", nil)
		at("stdout", 11, "", io.EOF)
		at("stdout", 1<<40, "", io.EOF)
		for _, stream := range []string{"", "STDOUT", "stdin"} {
			_, err := r.ReadOutput(t.Context(), ref, stream, 0, make([]byte, 1))
			wantFault(t, err, fault.Invalid, "STREAM")
		}
		_, err := r.ReadOutput(t.Context(), ref, "stdout", -1, make([]byte, 1))
		wantFault(t, err, fault.Invalid, "OFFSET")
	})
}

// TestRetention drops the oldest output and says so, to readers and to watchers.
func TestRetention(t *testing.T) {
	bubble(t, func(t *testing.T) {
		piece := strings.Repeat("0123456789abcdef", 64<<10/16)
		script := enginefake.Script{Exit: enginefake.Exit(0)}
		const pieces = 40
		for range pieces {
			script.Steps = append(script.Steps, enginefake.Stdout(10*time.Millisecond, piece))
		}
		r := newRig(t, scripted(script))
		ref := r.start(execution.Request{RetainedBytes: 1 << 20})
		e := r.wait(ref)
		total := e.Result.Totals[0]
		if total.Size != pieces*64<<10 || total.Dropped == 0 || total.Dropped >= total.Size {
			t.Fatalf("%+v", total)
		}
		_, err := r.ReadOutput(t.Context(), ref, "stdout", 0, make([]byte, 10))
		wantFault(t, err, fault.OutOfRange, "OUTPUT_DROPPED")
		var fe *fault.Error
		if !errors.As(err, &fe) || fe.Meta["first_offset"] != fmt.Sprint(total.Dropped) {
			t.Errorf("%+v, dropped are %d", err, total.Dropped)
		}
		p := make([]byte, 16)
		if n, err := r.ReadOutput(t.Context(), ref, "stdout", total.Dropped, p); err != nil || n == 0 || p[0] != piece[total.Dropped%16] {
			t.Errorf("%q, %v", p[:n], err)
		}
		got := r.watch(ref, nil)
		if len(got.gaps) != 1 || got.gaps[0].Reason != execution.GapRetention || got.gaps[0].MissingEvents == 0 || got.from["stdout"] != total.Dropped {
			t.Errorf("gaps %+v, output from %d", got.gaps, got.from["stdout"])
		}
	})
}

func TestWait(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(time.Hour / 2)}, Exit: enginefake.Exit(0)}))
		ref := r.start(execution.Request{Command: execution.Command{Args: []string{"x"}, Timeout: time.Hour}})
		because := errors.New("enough")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, because)
		defer cancel()
		if e, err := r.Wait(ctx, ref); !errors.Is(err, because) || e.State != execution.Running {
			t.Errorf("%v, state %d", err, e.State)
		}
		if e, err := r.Cancel(ctx, ref, execution.Cancellation{By: "me"}); !errors.Is(err, because) || e.State != execution.Stopping {
			t.Errorf("%v, state %d", err, e.State)
		}
		if e := r.wait(ref); e.Result.Reason != execution.Cancelled {
			t.Errorf("the end did not go on: %+v", e.Result)
		}
	})
}

// TestDrain waits for what runs and refuses what is new.
func TestDrain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(time.Minute)}, Exit: enginefake.Exit(0)}))
		ref := r.start(execution.Request{})
		begin := time.Now()
		because := errors.New("too long")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, because)
		defer cancel()
		if err := r.Drain(ctx); !errors.Is(err, because) {
			t.Error(err)
		}
		_, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}})
		wantFault(t, err, fault.Unavailable, "SERVER_DRAINING")
		if err := r.Drain(t.Context()); err != nil || time.Since(begin) != time.Minute {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		if e := r.get(ref); e.State != execution.Ended {
			t.Errorf("state %d", e.State)
		}
		if err := r.Drain(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestStopAllAndEndSession(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{IgnoreTerm: true}))
		r.session("a")
		r.session("b")
		inA, inB, alone := r.start(execution.Request{Session: "a"}), r.start(execution.Request{Session: "b"}), r.start(execution.Request{})
		time.Sleep(time.Second)
		begin := time.Now()
		if err := r.EndSession(t.Context(), "a"); err != nil || time.Since(begin) != execution.DefaultGracePeriod {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		if res := r.wait(inA).Result; res.Reason != execution.SessionEnded || res.Outcome() != execution.CancelledByAny || res.Detail == "" {
			t.Errorf("%+v", res)
		}
		for _, ref := range []execution.Ref{inB, alone} {
			if e := r.get(ref); e.State != execution.Running {
				t.Errorf("state %d of one that nobody ended", e.State)
			}
		}
		if err := r.EndSession(t.Context(), "none"); err != nil {
			t.Error(err)
		}
		because := errors.New("no time")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, because)
		defer cancel()
		if err := r.StopAll(ctx); !errors.Is(err, because) {
			t.Error(err)
		}
		if err := r.StopAll(t.Context()); err != nil {
			t.Error(err)
		}
		for _, ref := range []execution.Ref{inB, alone} {
			if res := r.wait(ref).Result; res.Reason != execution.ServerStopped || !res.Killed || !res.TreeEmpty {
				t.Errorf("%+v", res)
			}
		}
	})
}

// TestClose leaves what runs unfinished, and ends those who wait.
func TestClose(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "x")}}))
		ref := r.start(execution.Request{})
		w, err := r.Watch(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		for range 2 {
			if _, err := w.Next(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		var wg sync.WaitGroup
		expect := func(what string, f func() error) {
			wg.Go(func() {
				if err := f(); !errors.Is(err, execution.ErrClosed) {
					t.Errorf("%s: %v", what, err)
				}
			})
		}
		expect("Next", func() error { _, err := w.Next(t.Context()); return err })
		expect("Wait", func() error { _, err := r.Wait(t.Context(), ref); return err })
		synctest.Wait()
		s := r.Service
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		wantFault(t, execution.ErrClosed, fault.Unavailable, "SERVER_STOPPING")
		for what, f := range map[string]func() error{
			"Next":       func() error { _, err := w.Next(t.Context()); return err },
			"Wait":       func() error { _, err := s.Wait(t.Context(), ref); return err },
			"Cancel":     func() error { _, err := s.Cancel(t.Context(), ref, execution.Cancellation{}); return err },
			"Watch":      func() error { _, err := s.Watch(t.Context(), ref, nil); return err },
			"ReadOutput": func() error { _, err := s.ReadOutput(t.Context(), ref, "stdout", 0, make([]byte, 1)); return err },
		} {
			if err := f(); !errors.Is(err, execution.ErrClosed) {
				t.Errorf("%s after Close: %v", what, err)
			}
		}
		if e := r.get(ref); e.State != execution.Running || !e.EndTime.IsZero() {
			t.Errorf("the record: %+v", e)
		}
		if live, _ := r.fake.List(t.Context()); len(live) != 1 {
			t.Errorf("sandboxes: %v", live)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestCloseDuringAStart starts what was promised, and does not wait for ever for it.
func TestCloseDuringAStart(t *testing.T) {
	for _, test := range []struct {
		takes, waits time.Duration
		want         execution.Reason
	}{{5 * time.Second, 5 * time.Second, execution.Exited}, {time.Minute, 10 * time.Second, execution.SandboxLost}} {
		bubble(t, func(t *testing.T) {
			cfg := scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(time.Minute, "x")}, Exit: enginefake.Exit(0)})
			cfg.Hooks.Create = func(ctx context.Context, _ string) error { return sleep(ctx, test.takes) }
			r := newRig(t, cfg)
			ref := r.start(execution.Request{Command: execution.Command{Args: []string{"x"}, Env: map[string]string{"TOKEN": "not stored"}}})
			begin := time.Now()
			r.restart()
			if took := time.Since(begin); took != test.waits {
				t.Errorf("closed after %v, want %v", took, test.waits)
			}
			e := r.wait(ref)
			if e.Result.Reason != test.want {
				t.Errorf("%+v", e.Result)
			}
			if started := e.StartTime.Sub(begin); test.want == execution.Exited && started != test.takes {
				t.Errorf("started after %v", started)
			}
		})
	}
}

// TestNothingIsLeft counts goroutines and files after many executions.
func TestNothingIsLeft(t *testing.T) {
	fake := enginefake.New(enginefake.Config{Script: func(q *guestv1.StartRequest) enginefake.Script {
		return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "x")}, Exit: enginefake.Exit(0)}
	}})
	t.Cleanup(fake.Shutdown)
	r := &rig{
		t: t, engine: fake, fake: fake, store: newMemory(), log: &lockedBuffer{},
		sessions: &sessions{running: make(map[string]engine.Sandbox)}, dir: filepath.Join(t.TempDir(), "logs"),
	}
	r.open()
	r.session("a")
	round := func(n int) {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				session := ""
				if i%2 == 0 {
					session = "a"
				}
				e, err := r.Start(t.Context(), execution.Request{Session: session, Command: execution.Command{Args: []string{"x"}}})
				if err != nil {
					t.Error(err)
					return
				}
				w, err := r.Watch(t.Context(), execution.Ref{Session: session, ID: e.ID}, nil)
				if err != nil {
					t.Error(err)
					return
				}
				defer w.Close()
				if _, err := read(t.Context(), w, execution.Ref{Session: session, ID: e.ID}, nil); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if err := eventually(func() error {
			if held := fake.Held("s-a"); len(held) > 0 || r.Running() > 0 {
				return fmt.Errorf("the guest holds %v, %d run", held, r.Running())
			}
			if live, _ := fake.List(t.Context()); len(live) != 1 {
				return fmt.Errorf("sandboxes: %v", live)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	round(20)
	before, files := runtime.NumGoroutine(), openFiles(t)
	round(200)
	if err := eventually(func() error {
		if now := runtime.NumGoroutine(); now > before+20 { // a leak would be one for each of the 200
			return fmt.Errorf("%d goroutines, %d before", now, before)
		}
		if now := openFiles(t); now > files+20 { // each spare log has one
			return fmt.Errorf("%d open files, %d before", now, files)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return len(entries)
}

// eventually asks until there is no error any more, for a long time.
func eventually(f func() error) error {
	deadline := time.Now().Add(time.Minute)
	for {
		err := f()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestWithoutALogger works.
func TestWithoutALogger(t *testing.T) {
	bubble(t, func(t *testing.T) {
		fake := enginefake.New(enginefake.Config{Hooks: enginefake.Hooks{
			Terminate: func(context.Context, string) error { return errors.New("not now") },
		}})
		t.Cleanup(fake.Shutdown)
		s, err := execution.New(execution.Config{Engines: engines.Set{fake}, Store: newMemory(), Dir: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		e, err := s.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Wait(t.Context(), execution.Ref{ID: e.ID}); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

// TestSessionIsTold of what begins and ends in it, also over a restart.
func TestSessionIsTold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(time.Minute, "x")}, Exit: enginefake.Exit(0)}))
		r.session("a")
		in := r.start(execution.Request{Session: "a", Command: execution.Command{Args: []string{"x"}}})
		out := r.start(execution.Request{Command: execution.Command{Args: []string{"x"}}})
		r.restart()
		r.wait(in)
		r.wait(out)
		synctest.Wait() // who waits is told of the end a moment before the session is
		want := []string{"a " + in.ID, "a " + in.ID, "a " + in.ID + " EXITED"}
		if diff := cmp.Diff(want, r.sessions.told); diff != "" {
			t.Error(diff)
		}
	})
}
