package session_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/session"
)

// TestAgentSession goes through a life with everything in it.
func TestAgentSession(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, f := agentRig(t, enginefake.Hooks{}, 0)
		id := r.running(withAgent())
		synctest.Wait()
		want := []string{`image ""`, "way 1", "configure Ann", "clone one", "clone two", "open memory", `agent 1 ""`, "attach"}
		if diff := cmp.Diff(want, f.take()); diff != "" {
			t.Error(diff)
		}
		spec := r.fake.Spec("s-" + id)
		if spec.Image != "base" || len(spec.Volumes) != 1 || spec.Volumes[0] != (engine.VolumeMount{Name: "memory-one", Path: "/root/.mcp-memory"}) {
			t.Errorf("%+v", spec)
		}
		s := r.get(id)
		d := s.Details
		if len(d.Checkouts) != 2 || d.Checkouts[1].Path != "/workspace/two" || d.Conversation != "ses_1" || d.Status.State != session.AgentReady || !slices.Equal(d.Inline, []string{"KEY"}) {
			t.Errorf("%+v", d)
		}
		diffs, err := r.Diff(t.Context(), session.Ref{ID: id})
		if err != nil || len(diffs) != 2 || diffs[0].Path != "/workspace/one" {
			t.Errorf("%+v, %v", diffs, err)
		}
		f.take()
		time.Sleep(6 * time.Minute)
		if diff := cmp.Diff([]string{"commit memory"}, f.take()); diff != "" {
			t.Errorf("on a timer: %s", diff)
		}
		r.Began(id, "e1")
		r.NoteTurn(id, session.TurnNote{ID: "t1", State: session.TurnQueued})
		r.Ended(id, "e1", "EXITED")
		if _, err := r.Terminate(t.Context(), id, "ann"); err != nil {
			t.Fatal(err)
		}
		want = []string{"end turns", "stop agent", "close agent", "save /workspace/one", "save /workspace/two", "commit memory"}
		if diff := cmp.Diff(want, f.take()); diff != "" {
			t.Error(diff)
		}
		s = r.ended(id)
		if len(s.Details.Saved) != 2 || s.Details.Saved[0].Ref != "refs/heads/wip/"+id || s.Details.Saved[0].Path != "/workspace/one" {
			t.Errorf("%+v", s.Details.Saved)
		}
		story := r.story(id)
		want = []string{
			"started", "IMAGE STARTED", "IMAGE PROGRESS", "IMAGE DONE", "SANDBOX STARTED s-" + id, "SANDBOX DONE s-" + id, "CREDENTIALS STARTED", "CREDENTIALS DONE",
			"IDENTITY STARTED", "IDENTITY DONE", "CLONE STARTED one", "CLONE PROGRESS one", "CLONE DONE one", "CLONE STARTED two", "CLONE PROGRESS two", "CLONE DONE two",
			"MEMORY STARTED", "MEMORY DONE", "AGENT STARTED opencode", "agent STARTING", "agent READY", "AGENT DONE opencode", "changed RUNNING",
			"changed TERMINATING", "SAVE STARTED /workspace/one", "SAVE DONE /workspace/one",
			"SAVE STARTED /workspace/two", "SAVE DONE /workspace/two", "COMMIT_MEMORY STARTED", "COMMIT_MEMORY DONE", "saved refs/heads/wip/" + id, "saved refs/heads/wip/" + id,
			"execution e1 false", "turn QUEUED", "execution e1 true", "ended REQUESTED",
		}
		if diff := cmp.Diff(want, story); diff != "" {
			t.Error(diff)
		}
	})
}

// TestStepFails lets each step fail: the session ends, says why, and nothing is left.
func TestStepFails(t *testing.T) {
	for _, step := range []string{`image ""`, "way 1", "configure Ann", "clone two", `agent 1 ""`} {
		t.Run(step, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r, f := agentRig(t, enginefake.Hooks{}, 0)
				f.hook = func(_ context.Context, call string) error {
					if call == step {
						return errFull
					}
					return nil
				}
				id := r.create(withAgent())
				s := r.ended(id)
				if s.Reason != session.StartFailed || !strings.Contains(s.Detail, "no room") {
					t.Errorf("%+v", s)
				}
				if slices.ContainsFunc(f.take(), func(c string) bool { return strings.HasPrefix(c, "save") }) {
					t.Error("saved what never ran")
				}
				r.story(id)
			})
		})
	}
	t.Run("memory", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			r, f := agentRig(t, enginefake.Hooks{}, 0)
			f.hook = func(_ context.Context, call string) error {
				if call == "open memory" {
					return errFull
				}
				return nil
			}
			id := r.running(withAgent())
			if _, err := r.Terminate(t.Context(), id, "x"); err != nil {
				t.Fatal(err)
			}
			if story := r.story(id); !slices.Contains(story, "MEMORY FAILED") {
				t.Errorf("%q", story)
			}
		})
	})
}

// TestTerminateWhileItStarts interrupts each step.
func TestTerminateWhileItStarts(t *testing.T) {
	for _, step := range []string{`image ""`, "way 1", "clone one", `agent 1 ""`} {
		t.Run(step, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r, f := agentRig(t, enginefake.Hooks{}, 0)
				f.hook = func(ctx context.Context, call string) error {
					if call == step {
						<-ctx.Done()
						return context.Cause(ctx)
					}
					return nil
				}
				id := r.create(withAgent())
				synctest.Wait()
				if _, err := r.Terminate(t.Context(), id, "x"); err != nil {
					t.Fatal(err)
				}
				if s := r.ended(id); s.Reason != session.Requested {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

func TestAgentRequests(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, _ := agentRig(t, enginefake.Hooks{}, 0)
		request := withAgent()
		request.Values = nil
		_, err := r.Create(t.Context(), request)
		wantFault(t, err, fault.FailedPrecondition, "CREDENTIALS_REQUIRED")
		request = withAgent()
		request.Repositories[1] = session.Repository{URL: "bad"}
		_, err = r.Create(t.Context(), request)
		wantFault(t, err, fault.Invalid, "REPOSITORY_URL")
		r.parts = session.Parts{}
		r.restart()
		_, err = r.Create(t.Context(), withAgent())
		wantFault(t, err, fault.FailedPrecondition, "NO_AGENTS")
	})
}

// TestHostNetwork is refused where credentials would be within reach of the host's programs.
func TestHostNetwork(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := hostRig(t)
		r.running(session.Request{Network: egress.Policy{Mode: engine.NetworkHost}})
		for _, change := range []func(*session.Request){func(*session.Request) {}, func(q *session.Request) { q.Agent = nil }, func(q *session.Request) { q.Repositories = nil }} {
			request := withAgent()
			request.Network = egress.Policy{Mode: engine.NetworkHost}
			change(&request)
			_, err := r.Create(t.Context(), request)
			wantFault(t, err, fault.FailedPrecondition, "NETWORK_NOT_ALLOWED")
		}
	})
}

// TestPauseAndResume goes on from the snapshot, with the agent's conversation.
func TestPauseAndResume(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, f := agentRig(t, enginefake.Hooks{}, 0)
		ref := session.Ref{ID: r.running(withAgent())}
		synctest.Wait()
		f.take()
		s, err := r.Pause(t.Context(), ref, idempotency.Key{})
		if err != nil || s.State != session.Paused || len(r.live()) != 0 || s.Details.Snapshot == "" {
			t.Fatalf("%+v, %v, left: %v", s, err, r.live())
		}
		want := []string{"detach: the session is paused", "stop agent", "close agent", "commit memory"}
		if diff := cmp.Diff(want, f.take()); diff != "" {
			t.Error(diff)
		}
		r.refused(ref.ID, "is paused")
		if again, err := r.Pause(t.Context(), ref, idempotency.Key{}); err != nil || again.State != session.Paused {
			t.Errorf("%+v, %v", again, err)
		}
		r.restart()
		if s := r.get(ref.ID); s.State != session.Paused {
			t.Fatalf("after a restart: %+v", s)
		}
		if s, err = r.Resume(t.Context(), ref, session.Resumption{Values: map[string]string{"KEY": "again"}}); err != nil || s.Details.Generation != 2 {
			t.Fatalf("%+v, %v", s, err)
		}
		s = r.is(ref.ID, session.Running)
		synctest.Wait()
		if diff := cmp.Diff([]string{"way 2", "configure Ann", "open memory", `agent 2 "ses_1"`, "attach"}, f.take()); diff != "" {
			t.Error(diff)
		}
		if got := f.ways[len(f.ways)-1].Values["KEY"]; got != "again" {
			t.Errorf("the key is %q", got)
		}
		if spec := r.fake.Spec("s-" + ref.ID + "-2"); spec.Image != "image-1" || s.Sandbox != spec.ID {
			t.Errorf("%+v in %+v", s, spec)
		}
		if held := r.fake.HeldImages(); !slices.Equal(held, []engine.ImageRef{"base"}) {
			t.Errorf("images: %v", held)
		}
		if _, err := r.Resume(t.Context(), ref, session.Resumption{}); err != nil {
			t.Errorf("resumed again: %v", err)
		}
		if _, err := r.Terminate(t.Context(), ref.ID, "x"); err != nil {
			t.Fatal(err)
		}
		if story := r.story(ref.ID); !slices.Contains(story, "replaced 2") || !slices.Contains(story, "changed PAUSED") {
			t.Errorf("%q", story)
		}
		_, err = r.Pause(t.Context(), ref, idempotency.Key{})
		wantFault(t, err, fault.FailedPrecondition, "SESSION_NOT_RUNNING")
	})
}

// TestPauseFails has a session go on of which no snapshot can be made, and a resume go back
// to rest that cannot make its sandbox.
func TestPauseFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var broken string
		hooks := enginefake.Hooks{
			Snapshot: func(context.Context, string) error { return map[string]error{"snapshot": errFull}[broken] },
			Create:   func(context.Context, string) error { return map[string]error{"create": errFull}[broken] },
		}
		r, f := agentRig(t, hooks, 0)
		ref := session.Ref{ID: r.running(withAgent())}
		broken = "snapshot"
		if _, err := r.Pause(t.Context(), ref, idempotency.Key{}); err == nil || !strings.Contains(err.Error(), "no room") {
			t.Fatal(err)
		}
		r.is(ref.ID, session.Running)
		synctest.Wait()
		if calls := f.take(); calls[len(calls)-1] != "attach" {
			t.Errorf("the agent is not there again: %q", calls)
		}
		broken = "create"
		if _, err := r.Pause(t.Context(), ref, idempotency.Key{}); err != nil {
			t.Fatal(err)
		}
		// It is told at once if it has failed by then.
		if _, err := r.Resume(t.Context(), ref, session.Resumption{}); err != nil && !strings.Contains(err.Error(), "no room") {
			t.Fatal(err)
		}
		r.is(ref.ID, session.Paused)
		broken = ""
		if _, err := r.Resume(t.Context(), ref, session.Resumption{}); err != nil {
			t.Fatal(err)
		}
		r.is(ref.ID, session.Running)
		if _, err := r.Terminate(t.Context(), ref.ID, "x"); err != nil {
			t.Fatal(err)
		}
		r.ended(ref.ID)
		if held := r.fake.HeldImages(); !slices.Equal(held, []engine.ImageRef{"base"}) {
			t.Errorf("images: %v", held)
		}
	})
}

// TestEndOfThePaused keeps the only place where its work is.
func TestEndOfThePaused(t *testing.T) {
	for _, how := range []string{"terminated", "expired"} {
		t.Run(how, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r, _ := agentRig(t, enginefake.Hooks{}, 0)
				ref := session.Ref{ID: r.running(withAgent())}
				if _, err := r.Pause(t.Context(), ref, idempotency.Key{}); err != nil {
					t.Fatal(err)
				}
				if how == "terminated" {
					if _, err := r.Terminate(t.Context(), ref.ID, "x"); err != nil {
						t.Fatal(err)
					}
				}
				s := r.ended(ref.ID)
				if n := len(s.Details.Saved); n != 1 || s.Details.Saved[0].Snapshot != "image-1" {
					t.Fatalf("%+v", s.Details)
				}
				forked, err := r.Fork(t.Context(), ref, session.Request{Values: map[string]string{"KEY": "x"}})
				if err != nil {
					t.Fatal(err)
				}
				r.is(forked.ID, session.Running)
				if held := r.fake.HeldImages(); !slices.Contains(held, "image-1") {
					t.Errorf("a fork took the saved work: %v", held)
				}
			})
		})
	}
}

func TestFork(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, f := agentRig(t, enginefake.Hooks{}, 0)
		ref := session.Ref{ID: r.running(withAgent())}
		synctest.Wait()
		f.take()
		key := idempotency.Key{ID: "r1", Method: "ForkSession", Fingerprint: "x"}
		forked, err := r.Fork(t.Context(), ref, session.Request{Labels: map[string]string{"a": "b"}, Key: key})
		if err != nil {
			t.Fatal(err)
		}
		if again, err := r.Fork(t.Context(), ref, session.Request{Labels: map[string]string{"a": "b"}, Key: key}); err != nil || again.ID != forked.ID {
			t.Errorf("%+v, %v", again, err)
		}
		s := r.is(forked.ID, session.Running)
		synctest.Wait()
		if s.Details.ForkedFrom != ref.ID || s.Details.Generation != 1 || s.Details.Conversation != "ses_1" || len(s.Details.Checkouts) != 2 || s.Labels["a"] != "b" {
			t.Errorf("%+v", s)
		}
		if diff := cmp.Diff([]string{"way 1", "configure Ann", "open memory", `agent 1 "ses_1"`, "attach"}, f.take()); diff != "" {
			t.Error(diff)
		}
		if f.ways[len(f.ways)-1].Values["KEY"] != "not stored" {
			t.Error("credentials were not taken over")
		}
		if held := r.fake.HeldImages(); !slices.Equal(held, []engine.ImageRef{"base"}) {
			t.Errorf("images: %v", held)
		}
		r.get(ref.ID)
		plain := session.Ref{ID: r.running(session.Request{})}
		if _, err := r.Terminate(t.Context(), plain.ID, "x"); err != nil {
			t.Fatal(err)
		}
		_, err = r.Fork(t.Context(), plain, session.Request{})
		wantFault(t, err, fault.FailedPrecondition, "NO_SNAPSHOT")
	})
}

// TestUnsavedWork keeps the sandbox where not everything could be saved.
func TestUnsavedWork(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, f := agentRig(t, enginefake.Hooks{}, 0)
		f.unsaved = true
		id := r.running(withAgent())
		if _, err := r.Terminate(t.Context(), id, "x"); err != nil {
			t.Fatal(err)
		}
		s := r.ended(id)
		last := s.Details.Saved[len(s.Details.Saved)-1]
		if last.Snapshot != "image-1" || !strings.Contains(last.Detail, "fork") {
			t.Errorf("%+v", s.Details.Saved)
		}
	})
}

// TestIdle ends or pauses what nothing runs in, and warns before; what runs puts it off.
func TestIdle(t *testing.T) {
	for _, action := range []session.IdleAction{session.IdleTerminate, session.IdlePause} {
		t.Run(string(action), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r, _ := agentRig(t, enginefake.Hooks{}, 0)
				begin := time.Now()
				id := r.running(session.Request{Lifetime: 24 * time.Hour, IdleTimeout: 10 * time.Minute, IdleAction: action})
				time.Sleep(5 * time.Minute)
				r.Began(id, "e")
				time.Sleep(time.Hour)
				r.NoteInteraction(id, session.AskedNote{ID: "i", Pending: true})
				r.Ended(id, "e", "EXITED")
				time.Sleep(time.Hour)
				r.NoteInteraction(id, session.AskedNote{ID: "i"})
				want := begin.Add(2*time.Hour + 15*time.Minute)
				if action == session.IdlePause {
					r.is(id, session.Paused)
					if late := time.Since(want); late < 0 || late > time.Minute {
						t.Errorf("%v late", late)
					}
					if _, err := r.Terminate(t.Context(), id, "x"); err != nil {
						t.Fatal(err)
					}
				}
				s := r.ended(id)
				if action == session.IdleTerminate && (s.Reason != session.Idle || s.EndTime.Sub(want).Abs() > time.Second) {
					t.Errorf("%+v, not at %v", s, want)
				}
				if n := len(slices.DeleteFunc(r.story(id), func(l string) bool { return l != "warning IDLE" })); n != 1 {
					t.Errorf("%d warnings", n)
				}
			})
		})
	}
}

// TestHandOver goes on in another sandbox before the engine ends the first.
func TestHandOver(t *testing.T) {
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprint(busy), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r, f := agentRig(t, enginefake.Hooks{}, 10*time.Hour)
				request := withAgent()
				request.Lifetime = 25 * time.Hour
				begin := time.Now()
				id := r.running(request)
				if busy {
					r.Began(id, "e")
				}
				time.Sleep(9*time.Hour + 39*time.Minute)
				if s := r.get(id); s.Details.Generation != 1 {
					t.Fatalf("%+v", s)
				}
				early := 2 * time.Minute
				if busy {
					early = 14 * time.Minute
				}
				time.Sleep(early)
				s := r.is(id, session.Running)
				if s.Details.Generation != 2 || !s.Details.SandboxDeadline.After(begin.Add(19*time.Hour)) || !slices.Equal(r.live(), []string{"s-" + id + "-2"}) {
					t.Errorf("%+v, %v", s.Details, r.live())
				}
				if !slices.Contains(f.take(), "detach: the session goes on in another sandbox") {
					t.Error("the agent was not told")
				}
				r.Ended(id, "e", "SESSION_ENDED")
				time.Sleep(request.Lifetime - time.Since(begin) - time.Minute)
				s = r.ended(id)
				if s.Reason != session.Expired || s.Details.Generation != 3 {
					t.Errorf("%+v", s)
				}
				story := r.story(id)
				if slices.Contains(story, "changed PAUSED") || !slices.Contains(story, "replaced 2") || slices.Contains(story, "warning SANDBOX_EXPIRY") != busy || !slices.Contains(story, "warning EXPIRY") {
					t.Errorf("%q", story)
				}
			})
		})
	}
}

// TestRestarts stops executord at each write of a record, in a life with everything in it,
// and starts it again: the life goes on, and ends with nothing left.
func TestRestarts(t *testing.T) {
	for stop := 1; stop < 30; stop++ {
		done := false
		t.Run(fmt.Sprint(stop), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r, _ := agentRig(t, enginefake.Hooks{}, 0)
				var writes atomic.Int64
				r.store.hook(func(op string, _ session.Session) error {
					if op == "update" || op == "insert" {
						if writes.Add(1) == int64(stop) {
							return errFull // tried again, by the one after a restart, too
						}
					}
					return nil
				})
				s, err := r.Create(t.Context(), withAgent())
				if err != nil {
					if stop != 1 {
						t.Fatal(err)
					}
					return
				}
				ref := session.Ref{ID: s.ID}
				step := func(f func() error) {
					t.Helper()
					before := writes.Load()
					go func() { _ = f() }()
					synctest.Wait()
					if before < int64(stop) && writes.Load() >= int64(stop) {
						r.restart()
						go func() { _ = f() }() // who was cut off repeats it
						synctest.Wait()
					}
				}
				step(func() error { return nil })
				r.is(ref.ID, session.Running)
				step(func() error {
					_, err := r.Pause(context.WithoutCancel(t.Context()), ref, idempotency.Key{})
					return err
				})
				r.is(ref.ID, session.Paused)
				step(func() error {
					_, err := r.Resume(context.WithoutCancel(t.Context()), ref, session.Resumption{})
					return err
				})
				r.is(ref.ID, session.Running)
				step(func() error { _, err := r.Terminate(context.WithoutCancel(t.Context()), ref.ID, "x"); return err })
				r.ended(ref.ID)
				// A snapshot that no record names is left to its TTL.
				if held := r.fake.HeldImages(); len(held) > 2 {
					t.Errorf("images: %v", held)
				}
				r.story(ref.ID)
				done = writes.Load() < int64(stop)
			})
		})
		if done {
			return
		}
	}
	t.Error("a life has more writes than were stopped at")
}

func TestUpdate(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, f := agentRig(t, enginefake.Hooks{}, 0)
		ref := session.Ref{ID: r.running(withAgent())}
		synctest.Wait()
		f.take()
		labels, later, idle, action := map[string]string{"x": "y"}, time.Now().Add(5*time.Hour), 2*time.Hour, session.IdlePause
		s, err := r.Update(t.Context(), ref, session.Update{
			Labels: &labels, ExpireTime: &later, IdleTimeout: &idle, IdleAction: &action, Values: map[string]string{"OTHER": "v"},
		})
		if err != nil || s.Labels["x"] != "y" || !s.ExpireTime().Equal(later) || s.Details.IdleTimeout != idle || s.Details.IdleAction != action {
			t.Fatalf("%+v, %v", s, err)
		}
		if way := f.ways[len(f.ways)-1]; way.Values["KEY"] == "" || way.Values["OTHER"] != "v" {
			t.Errorf("%+v", way)
		}
		if stored := r.store.stored(ref.ID); cmp.Diff(stored, s) != "" {
			t.Error(cmp.Diff(stored, s))
		}
		far := time.Now().Add(31 * 24 * time.Hour)
		_, err = r.Update(t.Context(), ref, session.Update{ExpireTime: &far})
		wantFault(t, err, fault.Invalid, "EXPIRE_TIME")
		idle = 0
		if _, err := r.Update(t.Context(), ref, session.Update{IdleTimeout: &idle}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Until(later) - time.Minute)
		if s := r.ended(ref.ID); s.Reason != session.Expired || !s.EndTime.Equal(later) {
			t.Errorf("%+v", s)
		}
		_, err = r.Update(t.Context(), ref, session.Update{Labels: &labels})
		wantFault(t, err, fault.FailedPrecondition, "SESSION_NOT_RUNNING")
	})
}

// TestWatch goes on from cursors, and knows the future from the past.
func TestWatch(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r, _ := agentRig(t, enginefake.Hooks{}, 0)
		ref := session.Ref{ID: r.running(session.Request{Lifetime: time.Minute})}
		w, err := r.Watch(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		first, err := w.Next(t.Context())
		if err != nil || first.Started == nil || first.Started.Session != ref.ID {
			t.Fatalf("%+v, %v", first, err)
		}
		_, err = r.Watch(t.Context(), ref, journalCursor(first.Cursor.Epoch, 1000))
		wantFault(t, err, fault.OutOfRange, "CURSOR_IN_FUTURE")
		_, err = r.Watch(t.Context(), session.Ref{ID: "none"}, nil)
		wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
		r.ended(ref.ID)
		last := first
		for {
			e, err := w.Next(t.Context())
			if err != nil {
				break
			}
			last = e
		}
		if last.Ended == nil || last.Ended.State != session.Terminated || last.Ended.Reason != session.Expired {
			t.Errorf("%+v", last)
		}
		again, err := r.Watch(t.Context(), ref, &last.Cursor)
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if e, err := again.Next(t.Context()); err == nil {
			t.Errorf("behind the end: %+v", e)
		}
	})
}
