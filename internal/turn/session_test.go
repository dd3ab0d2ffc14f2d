package turn_test

import (
	"context"
	"errors"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/turn"
	"github.com/harvest-run/executord/internal/turn/turntest"
)

// left checks how many journals there are.
func left(t *testing.T, dir string, want int) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != want {
		t.Errorf("%d journals are left, %v; want %d", len(entries), err, want)
	}
}

// TestDetach: the running turn ends, the waiting one waits for another agent.
func TestDetach(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		s := w.started()
		running, waiting := send(t, s, "a"), send(t, s, "b")
		time.Sleep(time.Second)
		if err := s.Detach(t.Context(), "s1", errors.New("the session is paused")); err != nil {
			t.Fatal(err)
		}
		if one := wait(t, s, running); one.Result.Outcome != agent.Aborted || one.Result.Detail != "the session is paused" {
			t.Errorf("%+v", one.Result)
		}
		time.Sleep(time.Hour)
		if one, err := s.Get(t.Context(), waiting); err != nil || one.State != turn.Queued || one.Before != 0 {
			t.Errorf("%+v, %v", one, err)
		}
		if busy, _ := s.Activity("s1"); busy {
			t.Error("what waits in a paused session is activity")
		}
		other := &turntest.Agent{Scripts: []turntest.Script{{}}}
		defer other.Wait()
		s.Attach("s1", other)
		if one := wait(t, s, waiting); one.Result.Outcome != agent.Completed || len(other.Given) != 1 || len(w.agent.Given) != 1 {
			t.Errorf("%+v", one.Result)
		}
	})
}

// TestDetachInTime: an agent that does not stop does not hold up who detaches it; its turn
// is joined later.
func TestDetachInTime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		w.agent.AbortErr = errors.New("away")
		s := w.started()
		ref := send(t, s, "a")
		time.Sleep(time.Second)
		late := errors.New("late")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 3*time.Second, late)
		defer cancel()
		begun := time.Now()
		if err := s.Detach(ctx, "s1", errors.New("hand-over")); !errors.Is(err, late) || time.Since(begun) != 3*time.Second {
			t.Errorf("%v after %v", err, time.Since(begun))
		}
		if one, err := s.Get(t.Context(), ref); err != nil || one.State != turn.Running {
			t.Errorf("%+v, %v", one, err)
		}
		s.Attach("s1", w.agent)
		if one := wait(t, s, ref); one.Result.Outcome != agent.Completed {
			t.Errorf("%+v", one.Result) // it was through before it could be stopped
		}
	})
}

// TestAttachAgain: another conversation with the same agent takes over, and nothing is
// told twice.
func TestAttachAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		s := w.started()
		ref := send(t, s, "a")
		for range 5 {
			time.Sleep(time.Second)
			s.Attach("s1", w.agent)
		}
		wait(t, s, ref)
		equal(t, log(t, s, ref, nil), "started", "running m", "one", "two", "cost 5", "result COMPLETED")
	})
}

func TestEndSession(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		s := w.started()
		running, waiting := send(t, s, "a"), send(t, s, "b")
		time.Sleep(time.Second)
		if err := s.EndSession(t.Context(), "s1"); err != nil {
			t.Fatal(err)
		}
		for _, ref := range []turn.Ref{running, waiting} {
			one, err := s.Get(t.Context(), ref)
			if err != nil || one.State != turn.Ended || one.Result.Outcome != agent.Aborted || one.Result.Detail != "the session was ended" {
				t.Errorf("%+v, %v", one, err)
			}
		}
		if used, err := s.Usage(t.Context(), "s1"); err != nil || used != (agent.Usage{}) {
			t.Errorf("%+v, %v", used, err)
		}
	})
}

// TestNothingIsSentIntoAnEnd: a prompt that comes while the session ends is either ended
// with it or refused.
func TestNothingIsSentIntoAnEnd(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, turntest.Script{})
		s := w.started()
		sent := make(chan turn.Ref, 1000)
		go func() {
			defer close(sent)
			for {
				one, err := s.Send(t.Context(), turn.Request{Caller: ann, Session: "s1", Prompt: turn.Prompt{Text: "a"}})
				if fault.ReasonOf(err) == "QUEUE_FULL" {
					continue
				}
				if err != nil {
					wantFault(t, err, fault.FailedPrecondition, "SESSION_NOT_RUNNING")
					return
				}
				sent <- turn.Ref{Session: "s1", ID: one.ID, Caller: ann}
			}
		}()
		<-sent
		w.home.set(func(h *home) { h.refusal = fault.New(fault.FailedPrecondition, "SESSION_NOT_RUNNING", "it ends") })
		if err := s.EndSession(t.Context(), "s1"); err != nil {
			t.Fatal(err)
		}
		for ref := range sent {
			if one, err := s.Get(t.Context(), ref); err != nil || one.State != turn.Ended {
				t.Errorf("%+v, %v", one, err)
			}
		}
	})
}

// TestRetention: the turns of a session that ended long ago are gone, with all that was
// said.
func TestRetention(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, turntest.Script{Steps: []turntest.Step{turntest.Permit("per_1")}})
		record := session.Session{ID: "s1", Owner: "ann", State: session.Running, CreateTime: time.Now(), Network: egress.Policy{}}
		if err := w.store.InsertSession(t.Context(), record); err != nil {
			t.Fatal(err)
		}
		s := w.started(func(c *turn.Config) { c.MaxAge = time.Hour })
		ref := send(t, s, "a")
		wait(t, s, ref)
		time.Sleep(2 * time.Hour)
		left(t, w.dir, 1) // the session lives
		record.State, record.EndTime = session.Terminated, time.Now()
		if err := s.EndSession(t.Context(), "s1"); err != nil {
			t.Fatal(err)
		}
		if err := w.store.UpdateSession(t.Context(), record); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Minute)
		left(t, w.dir, 1)
		time.Sleep(32 * time.Minute)
		synctest.Wait()
		left(t, w.dir, 0)
		_, err := s.Get(t.Context(), ref)
		wantFault(t, err, fault.NotFound, "TURN_NOT_FOUND")
		if all, err := s.ListInteractions(t.Context(), turn.InteractionQuery{Caller: ann, Session: "s1", Limit: 10}); err != nil || len(all) != 0 {
			t.Errorf("%v, %v", all, err)
		}
	})
}

// TestJoinIsTriedAgain: an agent that is on its way is waited for; one that stays away is
// lost.
func TestJoinIsTriedAgain(t *testing.T) {
	for _, back := range []bool{true, false} {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, slow())
			s := w.started()
			ref := send(t, s, "a")
			time.Sleep(time.Second)
			w.agent.Set(func(a *turntest.Agent) { a.JoinErr = errors.New("connection refused") })
			s.Attach("s1", w.agent)
			time.Sleep(30 * time.Second)
			want := agent.Lost
			if back {
				w.agent.Set(func(a *turntest.Agent) { a.JoinErr = nil })
				want = agent.Completed
			}
			if one := wait(t, s, ref); one.Result.Outcome != want {
				t.Errorf("%+v", one.Result)
			}
			if back {
				equal(t, log(t, s, ref, nil), "started", "running m", "one", "two", "cost 5", "result COMPLETED")
			}
		})
	}
}
