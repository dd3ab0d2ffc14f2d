package execution_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/idempotency"
)

var errKilled = errors.New("killed")

// mortal is what one executord sees of the world. When it is killed, nothing that it
// still does has any effect.
type mortal struct {
	execution.Store
	engine.Engine

	mu     sync.Mutex
	killed bool
	conns  []net.Conn
	// at is called at each step with its name, before and after it is done.
	at func(step string)
}

func (m *mortal) kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.killed = true
	for _, c := range m.conns {
		c.Close()
	}
}

func (m *mortal) step(name string) error {
	if m.at != nil {
		m.at(name)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.killed {
		return errKilled
	}
	return nil
}

func (m *mortal) InsertExecution(ctx context.Context, e execution.Execution) error {
	return m.around("insert", func() error { return m.Store.InsertExecution(ctx, e) })
}

func (m *mortal) InsertExecutionOnce(ctx context.Context, key idempotency.Key, e execution.Execution) error {
	return m.around("insert", func() error { return m.Store.InsertExecutionOnce(ctx, key, e) })
}

func (m *mortal) UpdateExecution(ctx context.Context, e execution.Execution) error {
	step := "note"
	if e.State == execution.Ended {
		step = "store the end"
	}
	return m.around(step, func() error { return m.Store.UpdateExecution(ctx, e) })
}

func (m *mortal) Sync(ctx context.Context) error {
	return m.around("sync", func() error { return m.Store.Sync(ctx) })
}

func (m *mortal) around(step string, f func() error) error {
	if err := m.step("before " + step); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	return m.step("after " + step)
}

func (m *mortal) Create(ctx context.Context, spec engine.Spec) (sb engine.Sandbox, err error) {
	err = m.around("create", func() error { sb, err = m.Engine.Create(ctx, spec); return err })
	if err != nil {
		return nil, err
	}
	return mortalSandbox{sb, m}, nil
}

func (m *mortal) Open(ctx context.Context, id string) (sb engine.Sandbox, err error) {
	err = m.around("open", func() error { sb, err = m.Engine.Open(ctx, id); return err })
	if err != nil {
		return nil, err
	}
	return mortalSandbox{sb, m}, nil
}

func (m *mortal) Sandbox(ctx context.Context, id string, _ caller.Caller) (engine.Sandbox, error) {
	return m.Open(ctx, "s-"+id)
}

func (m *mortal) EngineOf(context.Context, string) (string, error) { return m.Name(), nil }

// Began and Ended say nothing that matters here.
func (m *mortal) Began(string, string)         {}
func (m *mortal) Ended(string, string, string) {}

func (m *mortal) Expiry(context.Context, string) (time.Time, time.Duration, error) {
	return time.Time{}, 0, errKilled
}

type mortalSandbox struct {
	engine.Sandbox
	mortal *mortal
}

func (s mortalSandbox) Dial(ctx context.Context) (net.Conn, error) {
	if err := s.mortal.step("dial"); err != nil {
		return nil, err
	}
	conn, err := s.Sandbox.Dial(ctx)
	if err == nil {
		s.mortal.mu.Lock()
		s.mortal.conns = append(s.mortal.conns, conn)
		s.mortal.mu.Unlock()
	}
	return conn, err
}

func (s mortalSandbox) Usage(ctx context.Context) (u engine.Usage, err error) {
	err = s.mortal.around("usage", func() error { u, err = s.Sandbox.Usage(ctx); return err })
	return u, err
}

func (s mortalSandbox) Terminate(ctx context.Context) (r engine.Remains, err error) {
	err = s.mortal.around("terminate", func() error { r, err = s.Sandbox.Terminate(ctx); return err })
	return r, err
}

// world is what survives executords.
type world struct {
	t     *testing.T
	fake  *enginefake.Engine
	store *memory
	dir   string
	ready string // the sandbox that the pool has; "" for none
}

// executord is a Service and its view of the world.
type executord struct {
	*execution.Service
	mortal *mortal
}

func (w *world) executord(at func(step string)) *executord {
	w.t.Helper()
	m := &mortal{Store: w.store, Engine: w.fake, at: at}
	s, err := execution.New(execution.Config{
		Pool:    claims{m, w.ready},
		Engines: engines.Set{m}, Store: m, Sessions: m, Dir: w.dir, DefaultRetainedBytes: 1 << 20, MaxRetainedBytes: 1 << 20,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return &executord{s, m}
}

// freeze copies the logs as they are, for the executord that comes next: the one that
// was killed can still write into the old ones until it is closed.
func (w *world) freeze() {
	next := filepath.Join(w.t.TempDir(), "logs")
	if err := os.CopyFS(next, os.DirFS(w.dir)); err != nil {
		w.t.Error(err)
	}
	w.dir = next
}

// crash leads one execution in an executord that is killed at a step, and returns its
// name, which is "" if the start was not answered.
func (w *world) crash(point, session string, act func(s *executord, ref execution.Ref)) execution.Ref {
	w.t.Helper()
	reached, gone := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s := w.executord(func(step string) {
		if step == point {
			once.Do(func() {
				close(reached)
				<-gone
			})
		}
	})
	var ref execution.Ref
	var wg sync.WaitGroup
	wg.Go(func() {
		e, err := s.Start(w.t.Context(), execution.Request{Session: session, Command: execution.Command{Args: []string{"x"}}})
		if err != nil {
			return
		}
		ref = execution.Ref{Session: session, ID: e.ID}
		if act != nil {
			act(s, ref)
		}
	})
	select {
	case <-reached:
	case <-time.After(time.Hour):
		w.t.Fatalf("%q was never reached", point)
	}
	s.mortal.kill()
	w.freeze()
	close(gone)
	if err := s.Close(); err != nil {
		w.t.Error(err)
	}
	wg.Wait()
	return ref
}

// TestCrash kills executord between all steps of an execution's life. The next one
// has exactly one end for it, which is true, and leaves nothing behind.
func TestCrash(t *testing.T) {
	type want struct {
		reason execution.Reason
		detail string
		whole  bool // all output is there
	}
	exited := want{execution.Exited, "", true}
	points := map[string]struct {
		oneShot, inSession, cancelled want
	}{
		"before insert":        {want{}, want{}, want{}},
		"after insert":         {want{execution.SandboxLost, "gone when executord started again; whether the command was started is not known", false}, want{execution.StartFailed, "nothing ran", false}, want{execution.SandboxLost, "", false}},
		"before create":        {want{execution.SandboxLost, "gone when executord started again; whether the command was started is not known", false}, want{}, want{execution.SandboxLost, "", false}},
		"after create":         {want{execution.StartFailed, "nothing ran", false}, want{}, want{execution.StartFailed, "nothing ran", false}},
		"dial":                 {want{execution.StartFailed, "nothing ran", false}, want{execution.StartFailed, "nothing ran", false}, want{execution.StartFailed, "nothing ran", false}},
		"before note":          {exited, exited, exited},
		"after note":           {exited, exited, exited},
		"after usage":          {exited, want{execution.StartFailed, "nothing ran", false}, want{execution.Cancelled, "not known any more", false}},
		"before store the end": {exited, exited, want{execution.Cancelled, "cancelled by me", false}},
		"after store the end":  {exited, exited, want{execution.Cancelled, "cancelled by me", false}},
		"before terminate":     {exited, want{}, want{execution.Cancelled, "not known any more", false}},
		"after terminate":      {exited, want{}, want{execution.SandboxLost, "gone when executord started again; whether the command finished is not known", false}},
	}
	script := enginefake.Script{
		Steps: []enginefake.Step{enginefake.Stdout(0, "first "), enginefake.Stdout(10*time.Second, "second")}, Exit: enginefake.Exit(0),
	}
	for point, wants := range points {
		for kind, expected := range map[string]want{"one-shot": wants.oneShot, "session": wants.inSession, "cancelled": wants.cancelled} {
			if expected == (want{}) && point != "before insert" {
				continue // does not come to pass
			}
			t.Run(point+" "+kind, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					w := &world{t: t, fake: enginefake.New(scripted(script)), store: newMemory(), dir: filepath.Join(t.TempDir(), "logs")}
					t.Cleanup(w.fake.Shutdown)
					session, act := "", func(*executord, execution.Ref) {}
					switch kind {
					case "session":
						session = "a"
						if _, err := w.fake.Create(t.Context(), engine.Spec{ID: "s-a"}); err != nil {
							t.Fatal(err)
						}
					case "cancelled":
						act = func(s *executord, ref execution.Ref) {
							time.Sleep(5 * time.Second)
							_, _ = s.Cancel(t.Context(), ref, execution.Cancellation{By: "me"})
						}
					}
					ref := w.crash(point, session, act)

					next := w.executord(nil)
					defer next.Close()
					if err := next.Recover(t.Context()); err != nil {
						t.Fatal(err)
					}
					if expected == (want{}) {
						if entries, _ := os.ReadDir(w.dir); len(entries) != 0 || next.Running() != 0 {
							t.Errorf("%d running, logs left: %v", next.Running(), entries)
						}
						return
					}
					if ref.ID == "" { // its start was not answered; it is there all the same
						for _, e := range w.store.all() {
							ref = execution.Ref{Session: session, ID: e.ID}
						}
					}
					r := &rig{Service: next.Service, t: t, engine: w.fake, fake: w.fake, store: w.store, memory: w.store, dir: w.dir, sessions: &sessions{running: map[string]engine.Sandbox{}}}
					if session != "" {
						r.sessions.running[session] = nil
					}
					e := r.wait(ref)
					if e.Result.Reason != expected.reason {
						t.Errorf("%+v", e.Result)
					}
					contains(t, e.Result.Detail, expected.detail)
					got := r.watch(ref, nil)
					if diff := cmp.Diff(e.Result, got.result); diff != "" {
						t.Errorf("the log and the store tell two ends:\n%s", diff)
					}
					if text := string(got.output["stdout"]); expected.whole && text != "first second" {
						t.Errorf("output: %q", text)
					}
					inOrder(t, e.Result.Times)
					if stored, _ := w.store.stored(ref.ID); stored.State != execution.Ended {
						t.Errorf("stored state %d", stored.State)
					}
					// The next command in the session is what tidies it up.
					if session != "" {
						other := r.start(execution.Request{Session: session})
						r.wait(other)
					}
					synctest.Wait()
					// What a run leads to its end it also takes away; what ended before is swept.
					if left, _ := w.fake.List(t.Context()); len(left) != len(session) && point != "after store the end" && !(point == "before terminate" && kind == "one-shot") {
						t.Errorf("left before the sweep: %v", left)
					}
					if left := r.list(); len(left) != len(session) {
						t.Errorf("left: %v", left)
					}
					if held := w.fake.Held("s-a"); len(held) != 0 {
						t.Errorf("the guest holds %v", held)
					}
					if n := len(slices.DeleteFunc(w.fake.Started(), func(id string) bool { return id != ref.ID })); n > 1 {
						t.Errorf("started %d times", n)
					}
				})
			})
		}
	}
}

// TestRestartsAtAnyMoment closes the Service twenty times while a program writes. The
// next one goes on from the exact byte.
func TestRestartsAtAnyMoment(t *testing.T) {
	for _, session := range []string{"", "a"} {
		t.Run("session "+session, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				script := lines(2000)
				r := newRig(t, scripted(script))
				if session != "" {
					r.session(session)
				}
				want := map[string]string{}
				for _, s := range script.Steps {
					name := "stdout"
					if s.Stream == guestv1.Stream_STREAM_STDERR {
						name = "stderr"
					}
					want[name] += string(s.Data)
				}
				ref := r.start(execution.Request{Session: session})
				begin := r.get(ref)
				// Each watcher reads on where the one before was cut off.
				var cursor *execution.Cursor
				have := map[string]string{}
				var started time.Time
				for i := range 20 {
					w, err := r.Watch(t.Context(), ref, cursor)
					if err != nil {
						t.Fatal(err)
					}
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+i*i)*time.Millisecond*3)
					for {
						e, err := w.Next(ctx)
						if err != nil {
							break
						}
						if e.Output != nil {
							if int(e.Output.Offset) != len(have[e.Output.Stream]) {
								t.Fatalf("%s goes on at %d, not at %d", e.Output.Stream, e.Output.Offset, len(have[e.Output.Stream]))
							}
							have[e.Output.Stream] += string(e.Output.Data)
						}
						cursor = &e.Cursor
					}
					cancel()
					w.Close()
					if i == 10 {
						started = r.get(ref).StartTime
					}
					r.restart()
				}
				e := r.wait(ref)
				if e.Result.Reason != execution.Exited || *e.Result.ExitCode != 0 || e.Epoch != begin.Epoch {
					t.Errorf("%+v, epoch %s, was %s", e.Result, e.Epoch, begin.Epoch)
				}
				rest := r.watch(ref, cursor)
				for stream, text := range want {
					if have[stream]+string(rest.output[stream]) != text {
						t.Errorf("%s is not what the program wrote: %d bytes and %d, want %d", stream, len(have[stream]), len(rest.output[stream]), len(text))
					}
				}
				r.watch(ref, nil) // checks the sums
				if started.IsZero() || !e.StartTime.Equal(started) || len(r.fake.Started()) != 1 {
					t.Errorf("start time %v, was %v; started %v", e.StartTime, started, r.fake.Started())
				}
				synctest.Wait()
				if left := r.list(); len(left) != len(session) {
					t.Errorf("left: %v", left)
				}
			})
		})
	}
}

// TestEndsWhileExecutordIsAway reads out what ended long ago, with the times at which
// it did.
func TestEndsWhileExecutordIsAway(t *testing.T) {
	for name, noted := range map[string]bool{"start noted": true, "start not noted": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, scripted(enginefake.Script{
					Steps: []enginefake.Step{enginefake.Stdout(time.Second, "early "), enginefake.Stdout(59*time.Second, "late")}, Exit: enginefake.Exit(5),
				}))
				begin := time.Now()
				ref := r.start(execution.Request{})
				time.Sleep(500 * time.Millisecond)
				if !noted {
					r.memory.hook(func(op string, _ execution.Execution) error {
						if op == "update" {
							return errKilled
						}
						return nil
					}, nil)
				}
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Hour)
				r.memory.hook(nil, nil)
				r.open()
				if err := r.Recover(t.Context()); err != nil {
					t.Fatal(err)
				}
				e := r.wait(ref)
				got := r.watch(ref, nil)
				if *e.Result.ExitCode != 5 || string(got.output["stdout"]) != "early late" {
					t.Errorf("%+v, %q", e.Result, got.output)
				}
				inOrder(t, e.Result.Times)
				times := e.Result.Times
				if noted && (!times.Started.Equal(begin) || times.Ended.Sub(begin) != time.Minute || times.FirstOutput.Sub(begin) != time.Second) {
					t.Errorf("%+v", times)
				}
				if !noted && times.Ended.Sub(times.Started) != time.Minute {
					t.Errorf("%+v", times)
				}
			})
		})
	}
}
