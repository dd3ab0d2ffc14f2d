package turn_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/turn"
	"github.com/harvest-run/executord/internal/turn/turntest"
)

var errKilled = errors.New("executord was killed")

// mortal is a store of an executord that can be killed between any two steps.
type mortal struct {
	turn.Store
	at func(step string)

	mu   sync.Mutex
	dead bool
}

func (m *mortal) kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.dead = true
}

func (m *mortal) alive() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return errKilled
	}
	return nil
}

// around does one step; who is killed in it does nothing any more.
func (m *mortal) around(step string, f func() error) error {
	m.at("before " + step)
	if err := m.alive(); err != nil {
		return err
	}
	err := f()
	m.at("after " + step)
	return errors.Join(err, m.alive())
}

func (m *mortal) InsertTurn(ctx context.Context, key idempotency.Key, t turn.Turn) error {
	return m.around("insert", func() error { return m.Store.InsertTurn(ctx, key, t) })
}

func (m *mortal) UpdateTurn(ctx context.Context, t turn.Turn) error {
	return m.around("store "+t.State.String(), func() error { return m.Store.UpdateTurn(ctx, t) })
}

func (m *mortal) InsertInteraction(ctx context.Context, i turn.Interaction) error {
	return m.around("ask", func() error { return m.Store.InsertInteraction(ctx, i) })
}

func (m *mortal) ResolveInteraction(ctx context.Context, key idempotency.Key, i turn.Interaction) error {
	return m.around("resolve", func() error { return m.Store.ResolveInteraction(ctx, key, i) })
}

// mortalAgent is the agent as an executord sees it that can be killed.
type mortalAgent struct {
	agent.Conversation
	mortal *mortal
}

func (a mortalAgent) Prompt(ctx context.Context, p agent.Prompt, tell func(agent.Event) error) (agent.Outcome, error) {
	var outcome agent.Outcome
	err := a.mortal.around("prompt", func() error {
		var err error
		outcome, err = a.Conversation.Prompt(ctx, p, a.tell(tell))
		return err
	})
	return outcome, err
}

func (a mortalAgent) tell(tell func(agent.Event) error) func(agent.Event) error {
	return func(e agent.Event) error {
		if e.Text == nil {
			return tell(e)
		}
		return a.mortal.around("event "+e.Text.Text, func() error { return tell(e) })
	}
}

func (a mortalAgent) Answer(ctx context.Context, id string, answer agent.Answer) error {
	return a.mortal.around("answer", func() error { return a.Conversation.Answer(ctx, id, answer) })
}

func (a mortalAgent) Abort(ctx context.Context) error {
	return a.mortal.around("abort", func() error { return a.Conversation.Abort(ctx) })
}

// TestCrash kills executord between all steps of a turn's life. The next one joins the
// turn, tells nothing twice and leaves nothing out; a client goes on at its cursor.
func TestCrash(t *testing.T) {
	points := []string{
		"before insert", "after insert", "before store RUNNING", "after store RUNNING", "before prompt", "before event one", "after event one",
		"before ask", "after ask", "before resolve", "after resolve", "before answer", "after answer", "after event two",
		"after prompt", "before store ENDED", "after store ENDED",
	}
	for _, point := range points {
		t.Run(point, func(t *testing.T) { crash(t, point, false) })
	}
	for _, point := range []string{"before abort", "after abort", "before store ENDED", "after store ENDED"} {
		t.Run("cancel, "+point, func(t *testing.T) { crash(t, point, true) })
	}
}

func crash(t *testing.T, point string, cancel bool) {
	bubble(t, func(t *testing.T) {
		script := turntest.Script{Steps: []turntest.Step{
			turntest.Text(time.Second, "one"), turntest.Cost(3), turntest.Permit("per_1"), turntest.Text(10*time.Second, "two"),
		}, Outcome: agent.Outcome{Usage: agent.Usage{CostMicros: 3}}}
		w := newWorld(t, script)
		w.home.profile.Policy = turn.Policy{Mode: turn.Ask, Timeout: 5 * time.Second, Allow: true}
		reached, gone := make(chan struct{}), make(chan struct{})
		var once sync.Once
		m := &mortal{Store: w.store, at: func(step string) {
			if step == point {
				once.Do(func() {
					close(reached)
					<-gone
				})
			}
		}}
		s := w.executord(func(c *turn.Config) { c.Store = m })
		s.Attach("s1", mortalAgent{w.agent, m})
		key := named("r1")
		var ref turn.Ref
		var clients sync.WaitGroup
		clients.Go(func() {
			one, err := s.Send(t.Context(), turn.Request{Caller: ann, Session: "s1", Prompt: turn.Prompt{Text: "a"}, Key: key})
			if err != nil {
				return
			}
			ref = turn.Ref{Session: "s1", ID: one.ID, Caller: ann}
			if cancel {
				time.Sleep(2 * time.Second)
				_, _ = s.Cancel(t.Context(), ref, turn.Cancellation{By: "ann"})
			}
		})
		<-reached
		m.kill()
		w.freeze()
		close(gone)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		clients.Wait()

		// The client repeats what was not answered, and goes on where it was.
		s = w.executord()
		defer s.Close()
		s.Attach("s1", w.agent)
		again, err := s.Send(t.Context(), turn.Request{Caller: ann, Session: "s1", Prompt: turn.Prompt{Text: "a"}, Key: key})
		if err != nil || ref.ID != "" && again.ID != ref.ID {
			t.Fatalf("%v, %v, before it was %q", again.ID, err, ref.ID)
		}
		ref = turn.Ref{Session: "s1", ID: again.ID, Caller: ann}
		one := wait(t, s, ref)
		events := log(t, s, ref, nil)
		if cancel {
			// Whether the cancel was still heard depends on when executord died: not before
			// the abort.
			want := []string{"started", "running m", "one", "cost 3", "requested per_1 PENDING"}
			if len(events) < 7 || !slices.Equal(events[:5], want) || !strings.HasPrefix(events[len(events)-1], "result ") || (point != "before abort") != (one.Result.Outcome == agent.Aborted) {
				t.Errorf("%q", events)
			}
		} else {
			equal(t, events, "started", "running m", "one", "cost 3", "requested per_1 PENDING", "resolved per_1 EXPIRED", "two", "result COMPLETED")
		}
		if one.Result.Usage.CostMicros != 3 && !cancel {
			t.Errorf("%+v", one.Result.Usage)
		}
		if n := len(answers(w, "per_1")); n > 1 || n == 0 && !cancel {
			t.Errorf("%d answers were given", n)
		}
		if len(w.agent.Given) != 1 {
			t.Errorf("%d prompts were given", len(w.agent.Given))
		}
		page, err := s.List(t.Context(), turn.Query{Caller: ann, Session: "s1", Limit: 9})
		if err != nil || len(page) != 1 || page[0].State != turn.Ended {
			t.Errorf("%+v, %v", page, err)
		}
		unfinished, err := w.store.UnfinishedTurns(t.Context())
		if err != nil || len(unfinished) != 0 || len(open(t, s)) != 0 {
			t.Errorf("left: %v, %v", unfinished, err)
		}
		if used, err := s.Usage(t.Context(), "s1"); err != nil || used.CostMicros != one.Result.Usage.CostMicros {
			t.Errorf("%+v, %v", used, err)
		}
	})
}

// TestQueueSurvives: what waits waits on, in its order; cursors stay good.
func TestQueueSurvives(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		s := w.executord()
		s.Attach("s1", w.agent)
		refs := []turn.Ref{send(t, s, "a"), send(t, s, "b"), send(t, s, "c")}
		time.Sleep(time.Second)
		watcher, err := s.Watch(t.Context(), refs[0], nil)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, err := watcher.Next(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		at := watcher.Cursor()
		watcher.Close()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) // the agent goes on meanwhile

		s = w.executord()
		defer s.Close()
		if one, err := s.Get(t.Context(), refs[2]); err != nil || one.State != turn.Queued || one.Before != 2 {
			t.Errorf("%+v, %v", one, err)
		}
		fresh := send(t, s, "d") // before the agent is there again
		s.Attach("s1", w.agent)
		equal(t, log(t, s, refs[0], &at), "two", "cost 5", "result COMPLETED")
		for _, ref := range append(refs, fresh) {
			if one := wait(t, s, ref); one.Result.Outcome != agent.Completed {
				t.Errorf("%+v", one.Result)
			}
		}
		for i, text := range []string{"a", "b", "c", "d"} {
			if w.agent.Given[i].Text != text {
				t.Errorf("prompt %d is %s", i, w.agent.Given[i].Text)
			}
		}
	})
}

// TestStraysAreRemoved: a journal without a record is gone after the next start.
func TestStraysAreRemoved(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		m := &mortal{Store: w.store, at: func(string) {}}
		s := w.executord(func(c *turn.Config) { c.Store = m })
		m.kill()
		if _, err := s.Send(t.Context(), turn.Request{Caller: ann, Session: "s1", Prompt: turn.Prompt{Text: "a"}}); !errors.Is(err, errKilled) {
			t.Errorf("%v", err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		left(t, w.dir, 0)
	})
}

// TestSessionEndsWhileAway: nobody can ask the agent any more, and that is what the turn
// says.
func TestSessionEndsWhileAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		s := w.executord()
		s.Attach("s1", w.agent)
		running, waiting := send(t, s, "a"), send(t, s, "b")
		synctest.Wait()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = w.executord()
		defer s.Close()
		for range 2 { // the second time there is nothing to do
			if err := s.EndSession(t.Context(), "s1"); err != nil {
				t.Fatal(err)
			}
		}
		if one := wait(t, s, running); one.Result.Outcome != agent.Lost {
			t.Errorf("%+v", one.Result)
		}
		if one := wait(t, s, waiting); one.Result.Outcome != agent.Aborted || !one.StartTime.IsZero() {
			t.Errorf("%+v", one.Result)
		}
	})
}
