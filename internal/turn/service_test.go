package turn_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/turn"
	"github.com/harvest-run/executord/internal/turn/turntest"
)

// slow tells two pieces of text, the second after ten seconds.
func slow() turntest.Script {
	return turntest.Script{
		Steps:   []turntest.Step{turntest.Text(0, "one"), turntest.Text(10*time.Second, "two"), turntest.Cost(5)},
		Outcome: agent.Outcome{Text: "two", Usage: agent.Usage{CostMicros: 5, InputTokens: 1}},
	}
}

func TestTurn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		s := w.started()
		begun := time.Now()
		made, err := s.Send(t.Context(), turn.Request{Caller: ann, Session: "s1", Prompt: turn.Prompt{
			Text: "hello", Author: "Ann", Model: agent.Model{Provider: "q", Model: "other"},
			Attachments: []turn.Attachment{{Filename: "a.png", MediaType: "image/png", Data: []byte{1, 2}}, {MediaType: "text/plain"}},
		}})
		if err != nil {
			t.Fatal(err)
		}
		ref := turn.Ref{Session: "s1", ID: made.ID, Caller: ann}
		ended := wait(t, s, ref)
		if ended.State != turn.Ended || ended.Result.Outcome != agent.Completed || ended.Result.Text != "two" || ended.Result.Usage.CostMicros != 5 {
			t.Errorf("%+v, %+v", ended, ended.Result)
		}
		if ended.Owner != "ann" || ended.Prompt.Text != "hello" || ended.Prompt.Author != "Ann" || ended.Model.Model != "other" || len(ended.Prompt.Attachments) != 2 || ended.Prompt.Attachments[0].Data != nil {
			t.Errorf("%+v", ended)
		}
		if took := ended.EndTime.Sub(ended.StartTime); took != 10*time.Second || ended.CreateTime.Before(begun) {
			t.Errorf("took %v", took)
		}
		given := w.agent.Given[0]
		if given.ID != made.ID || given.Text != "hello" || given.Author != "Ann" || given.Model.Model != "other" ||
			len(given.Attachments) != 2 || string(given.Attachments[0].Data) != "\x01\x02" || given.Attachments[0].MediaType != "image/png" {
			t.Errorf("%+v", given)
		}
		equal(t, log(t, s, ref, nil), "started", "running other", "one", "two", "cost 5", "result COMPLETED")
		if told := w.home.summary(); told != "RUNNING ENDED" {
			t.Errorf("the session was told %s", told)
		}
		if used, err := s.Usage(t.Context(), "s1"); err != nil || used.CostMicros != 5 {
			t.Errorf("%+v, %v", used, err)
		}
		if busy, last := s.Activity("s1"); busy || !last.Equal(ended.EndTime) {
			t.Errorf("busy %t, last %v", busy, last)
		}
	})
}

// TestQueue: prompts are run one at a time and in their order, and tell their place.
func TestQueue(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		s := w.started()
		refs := []turn.Ref{send(t, s, "a"), send(t, s, "b"), send(t, s, "c")}
		synctest.Wait()
		if busy, _ := s.Activity("s1"); !busy || s.Running("s1") != refs[0].ID {
			t.Error("nothing runs")
		}
		page, err := s.List(t.Context(), turn.Query{Caller: ann, Session: "s1", Limit: 10})
		if err != nil {
			t.Fatal(err)
		}
		var states []string
		for _, one := range page {
			states = append(states, fmt.Sprintf("%s %v %d %d", one.Prompt.Text, one.State, one.Number, one.Before))
		}
		equal(t, states, "c QUEUED 3 2", "b QUEUED 2 1", "a RUNNING 1 0")
		for _, ref := range refs {
			wait(t, s, ref)
		}
		for i, text := range []string{"a", "b", "c"} {
			if w.agent.Given[i].Text != text {
				t.Errorf("prompt %d is %s", i, w.agent.Given[i].Text)
			}
		}
		rest, err := s.List(t.Context(), turn.Query{Caller: ann, Session: "s1", Before: 3, Limit: 1})
		if err != nil || len(rest) != 1 || rest[0].Number != 2 || rest[0].State != turn.Ended {
			t.Errorf("%+v, %v", rest, err)
		}
	})
}

func TestQueueIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		s := w.started()
		w.agent.Scripts = []turntest.Script{slow()}
		for range turn.MaxWaiting + 1 {
			send(t, s, "x")
			synctest.Wait()
		}
		_, err := s.Send(t.Context(), turn.Request{Caller: ann, Session: "s1", Prompt: turn.Prompt{Text: "x"}})
		wantFault(t, err, fault.Exhausted, "QUEUE_FULL")
		if err := s.EndSession(t.Context(), "s1"); err != nil {
			t.Fatal(err)
		}
		page, err := s.List(t.Context(), turn.Query{Caller: ann, Session: "s1", Limit: 500})
		if err != nil || len(page) != turn.MaxWaiting+1 {
			t.Fatalf("%d turns, %v", len(page), err)
		}
		for _, one := range page {
			if one.State != turn.Ended || one.Result.Outcome != agent.Aborted || one.Result.Detail != "the session was ended" {
				t.Errorf("%v %+v", one.State, one.Result)
			}
		}
	})
}

func TestRefusals(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		full := fault.New(fault.Exhausted, "DISK_FULL", "no room")
		room := error(nil)
		s := w.started(func(c *turn.Config) { c.CheckRoom = func() error { return room } })
		request := func(p turn.Prompt) error {
			_, err := s.Send(t.Context(), turn.Request{Caller: ann, Session: "s1", Prompt: p})
			return err
		}
		hello := turn.Prompt{Text: "hello"}
		wantFault(t, request(turn.Prompt{}), fault.Invalid, "EMPTY_PROMPT")
		wantFault(t, request(turn.Prompt{Text: strings.Repeat("x", turn.MaxText+1)}), fault.Invalid, "PROMPT_SIZE")
		wantFault(t, request(turn.Prompt{Attachments: []turn.Attachment{{Data: make([]byte, turn.MaxAttachments+1)}}}), fault.Invalid, "PROMPT_SIZE")
		room = full
		wantFault(t, request(hello), fault.Exhausted, "DISK_FULL")
		room = nil
		w.home.set(func(h *home) { h.refusal = fault.New(fault.FailedPrecondition, "NO_AGENT", "none") })
		wantFault(t, request(hello), fault.FailedPrecondition, "NO_AGENT")
		w.home.set(func(h *home) { h.refusal = nil })
		for name, by := range map[string]caller.Caller{"s1": {Owner: "bob"}, "s2": ann} {
			_, err := s.Send(t.Context(), turn.Request{Caller: by, Session: name, Prompt: hello})
			wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
		}
		s.Drain()
		wantFault(t, request(hello), fault.Unavailable, "SERVER_DRAINING")
		page, err := s.List(t.Context(), turn.Query{Caller: ann, Session: "s1", Limit: 9})
		if err != nil || len(page) != 0 {
			t.Errorf("%v, %v", page, err)
		}
	})
}

// TestNotYours: what somebody else has is not there.
func TestNotYours(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, turntest.Script{Steps: []turntest.Step{turntest.Permit("per_1")}})
		w.home.profile.Policy.Mode = turn.Ask
		s := w.started()
		ref := send(t, s, "a")
		synctest.Wait()
		asked := refOf(open(t, s)[0])
		for _, change := range []func(*turn.Ref){
			func(r *turn.Ref) { r.Caller = caller.Caller{Owner: "bob"} },
			func(r *turn.Ref) { r.Session = "s2" },
		} {
			other, interaction := ref, asked
			change(&other)
			change(&interaction)
			_, err := s.Get(t.Context(), other)
			wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
			_, err = s.Wait(t.Context(), other)
			wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
			_, err = s.Watch(t.Context(), other, nil)
			wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
			_, err = s.Cancel(t.Context(), other, turn.Cancellation{By: "bob"})
			wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
			_, err = s.Resolve(t.Context(), interaction, agent.Answer{Decision: agent.AllowOnce}, "bob", named(""))
			wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
			_, err = s.List(t.Context(), turn.Query{Session: other.Session, Caller: other.Caller, Limit: 1})
			wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
			_, err = s.Messages(t.Context(), other.Session, other.Caller, "", 1)
			wantFault(t, err, fault.NotFound, "SESSION_NOT_FOUND")
		}
		_, err := s.Get(t.Context(), turn.Ref{Session: "s1", ID: "none", Caller: ann})
		wantFault(t, err, fault.NotFound, "TURN_NOT_FOUND")
		_, err = s.Resolve(t.Context(), turn.Ref{Session: "s1", ID: "none", Caller: ann}, agent.Answer{Decision: agent.AllowOnce}, "ann", named(""))
		wantFault(t, err, fault.NotFound, "INTERACTION_NOT_FOUND")
	})
}

func TestCancel(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		s := w.started()
		running, waiting, last := send(t, s, "a"), send(t, s, "b"), send(t, s, "c")
		synctest.Wait()
		for _, ref := range []turn.Ref{waiting, running} {
			ended, err := s.Cancel(t.Context(), ref, turn.Cancellation{By: "ann at home", Key: named("r" + ref.ID)})
			if err != nil || ended.State != turn.Ended || ended.Result.Outcome != agent.Aborted || ended.Result.CancelledBy != "ann at home" || ended.Result.Detail != "cancelled by ann at home" {
				t.Errorf("%+v, %v", ended.Result, err)
			}
			// Again: it is as it is.
			again, err := s.Cancel(t.Context(), ref, turn.Cancellation{By: "bob", Key: named("r" + ref.ID)})
			if err != nil || again.Result.CancelledBy != "ann at home" {
				t.Errorf("%+v, %v", again.Result, err)
			}
		}
		equal(t, log(t, s, waiting, nil), "started", "result ABORTED")
		equal(t, log(t, s, running, nil), "started", "running m", "one", "result ABORTED")
		if done := wait(t, s, last); done.Result.Outcome != agent.Completed {
			t.Errorf("%+v", done.Result)
		}
		if len(w.agent.Given) != 2 || w.agent.Aborts != 1 {
			t.Errorf("%d prompts, %d aborts", len(w.agent.Given), w.agent.Aborts)
		}
		reused := named("r" + running.ID)
		reused.Fingerprint = "g"
		_, err := s.Cancel(t.Context(), last, turn.Cancellation{By: "ann", Key: reused})
		wantFault(t, err, fault.AlreadyExists, "REQUEST_ID_REUSED")
	})
}

// TestAbortIsVerified: an agent that does not stop is asked again, and given up in the end.
func TestAbortIsVerified(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		w.agent.Scripts[0].Steps[1].After = 24 * time.Hour
		s := w.started(func(c *turn.Config) {})
		w.home.set(func(h *home) { h.profile.Limit.TurnTimeout = 24 * time.Hour })
		w.agent.AbortErr = errors.New("away")
		ref := send(t, s, "a")
		synctest.Wait()
		go func() {
			time.Sleep(20 * time.Second)
			w.agent.Set(func(a *turntest.Agent) { a.AbortErr = nil })
		}()
		ended, err := s.Cancel(t.Context(), ref, turn.Cancellation{By: "ann"})
		if err != nil || ended.Result.Outcome != agent.Aborted || turntest.Seen(w.agent, func(a *turntest.Agent) int { return a.Aborts }) < 10 {
			t.Errorf("%+v, %v", ended.Result, err)
		}
		// It stops, and does not tell.
		w.agent.Set(func(a *turntest.Agent) { a.Silent = true })
		ref = send(t, s, "b")
		synctest.Wait()
		ended, err = s.Cancel(t.Context(), ref, turn.Cancellation{By: "ann"})
		if err != nil || ended.Result.Outcome != agent.Aborted || !strings.Contains(ended.Result.Detail, "did not tell how") {
			t.Errorf("%+v, %v", ended.Result, err)
		}
		// It never stops: how it ended is not known.
		w.agent.Set(func(a *turntest.Agent) { a.AbortErr = errors.New("away") })
		ref = send(t, s, "c")
		synctest.Wait()
		ended, err = s.Cancel(t.Context(), ref, turn.Cancellation{By: "ann"})
		if err != nil || ended.Result.Outcome != agent.Lost || ended.Result.CancelledBy != "ann" || !strings.Contains(ended.Result.Detail, "could not be stopped: away") {
			t.Errorf("%+v, %v", ended.Result, err)
		}
	})
}

func TestLimits(t *testing.T) {
	bubble(t, func(t *testing.T) {
		costly := turntest.Script{Steps: []turntest.Step{
			turntest.Cost(40), turntest.Text(time.Second, "x"), turntest.Cost(40), turntest.Text(time.Second, "y"),
		}}
		costly.Outcome.Usage.CostMicros = 80
		w := newWorld(t, costly)
		w.home.profile.Limit = turn.Limit{CostMicros: 150, Turns: 5}
		s := w.started()
		first, second, third := send(t, s, "a"), send(t, s, "b"), send(t, s, "c")
		if one := wait(t, s, first); one.Result.Outcome != agent.Completed {
			t.Errorf("%+v", one.Result)
		}
		// 80 + 40 is within, 80 + 80 is not.
		if one := wait(t, s, second); one.Result.Outcome != agent.Aborted || one.Result.Usage.CostMicros != 80 || one.Result.CancelledBy != "" ||
			one.Result.Detail != "the session's turns have used $0.000160, and may use $0.000150" {
			t.Errorf("%+v", one.Result)
		}
		if one := wait(t, s, third); one.Result.Outcome != agent.Aborted || !one.StartTime.IsZero() || !strings.HasPrefix(one.Result.Detail, "not begun: ") {
			t.Errorf("%+v, began %v", one.Result, one.StartTime)
		}
		try := func() error {
			_, err := s.Send(t.Context(), turn.Request{Caller: ann, Session: "s1", Prompt: turn.Prompt{Text: "x"}})
			return err
		}
		wantFault(t, try(), fault.Exhausted, "SPEND_LIMIT")
		w.home.set(func(h *home) { h.profile.Limit = turn.Limit{Turns: 2} })
		wantFault(t, try(), fault.Exhausted, "TURN_LIMIT")
		// A turn that was never begun does not count.
		w.home.set(func(h *home) { h.profile.Limit = turn.Limit{Turns: 3} })
		if err := try(); err != nil {
			t.Error(err)
		}
		wantFault(t, try(), fault.Exhausted, "TURN_LIMIT")
	})
}

func TestTurnTimeout(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		w.home.profile.Limit.TurnTimeout = 4 * time.Second
		s := w.started()
		one := wait(t, s, send(t, s, "a"))
		if one.Result.Outcome != agent.Aborted || one.Result.Detail != "it ran longer than the turn timeout of 4s" || one.EndTime.Sub(one.StartTime) != 4*time.Second {
			t.Errorf("%+v after %v", one.Result, one.EndTime.Sub(one.StartTime))
		}
	})
}

// TestAgentsEnds: what an agent tells of its end is what the turn ends with.
func TestAgentsEnds(t *testing.T) {
	for name, test := range map[string]struct {
		script turntest.Script
		lose   bool
		want   turn.Result
	}{
		"failed": {
			turntest.Script{Outcome: agent.Outcome{Kind: agent.Failed, Detail: "d", Error: &agent.Error{Name: "APIError", StatusCode: 401}}},
			false, turn.Result{Outcome: agent.Failed, Detail: "d"},
		},
		"truncated": {turntest.Script{Outcome: agent.Outcome{Kind: agent.Truncated}}, false, turn.Result{Outcome: agent.Truncated}},
		"refused":   {turntest.Script{Err: errors.New("no such model")}, false, turn.Result{Outcome: agent.Failed, Detail: "the agent did not take the prompt"}},
		"lost":      {slow(), true, turn.Result{Outcome: agent.Lost, Detail: "the agent is lost"}},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, test.script)
				s := w.started()
				ref := send(t, s, "a")
				synctest.Wait()
				if test.lose {
					w.agent.Lose()
				}
				got := wait(t, s, ref).Result
				if got.Outcome != test.want.Outcome || got.Detail != test.want.Detail || (got.Error != nil) != (got.Outcome == agent.Failed) {
					t.Errorf("%+v", got)
				}
			})
		})
	}
}

// TestSubAgentsCount: what sub-agents use is counted once, whether they tell each step,
// their end, or both.
func TestSubAgentsCount(t *testing.T) {
	bubble(t, func(t *testing.T) {
		usage := func(sub string, micros int64) turntest.Step {
			return turntest.Step{Event: agent.Event{SubAgent: sub, Usage: &agent.Usage{CostMicros: micros}}}
		}
		end := func(sub string, micros int64) turntest.Step {
			return turntest.Step{Event: agent.Event{SubAgentEnded: &agent.SubAgentEnded{ID: sub, Usage: agent.Usage{CostMicros: micros}}}}
		}
		w := newWorld(t, turntest.Script{Steps: []turntest.Step{
			usage("", 1), usage("x", 10), usage("x", 20), end("x", 30), end("y", 100), usage("", 2), usage("z", 1000), end("z", 0),
		}})
		s := w.started()
		if one := wait(t, s, send(t, s, "a")); one.Result.Usage.CostMicros != 1133 {
			t.Errorf("%+v", one.Result.Usage)
		}
	})
}

// TestSendIsRepeatable: a repeat joins the turn; the name for something else is refused.
func TestSendIsRepeatable(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		s := w.started()
		request := turn.Request{Caller: ann, Session: "s1", Prompt: turn.Prompt{Text: "a"}, Key: named("r1")}
		first, err := s.Send(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		again, err := s.Send(t.Context(), request)
		if err != nil || again.ID != first.ID {
			t.Errorf("%v, %v", again.ID, err)
		}
		other := request
		other.Key.Fingerprint = "g"
		_, err = s.Send(t.Context(), other)
		wantFault(t, err, fault.AlreadyExists, "REQUEST_ID_REUSED")
		ref := turn.Ref{Session: "s1", ID: first.ID, Caller: ann}
		wait(t, s, ref)
		if again, err = s.Send(t.Context(), request); err != nil || again.State != turn.Ended {
			t.Errorf("%v, %v", again.State, err)
		}
		if len(w.agent.Given) != 1 {
			t.Errorf("%d prompts were given", len(w.agent.Given))
		}
	})
}

// TestWatchers: several follow one turn, each from its own cursor.
func TestWatchers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		s := w.started()
		ref := send(t, s, "a")
		first, err := s.Watch(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer first.Close()
		for range 2 {
			if _, err := first.Next(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		at := first.Cursor()
		wait(t, s, ref)
		equal(t, log(t, s, ref, &at), "one", "two", "cost 5", "result COMPLETED")
		equal(t, log(t, s, ref, nil), "started", "running m", "one", "two", "cost 5", "result COMPLETED")
		for range 4 {
			if _, err := first.Next(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		end := first.Cursor()
		equal(t, log(t, s, ref, &end))
		end.Sequence++
		_, err = s.Watch(t.Context(), ref, &end)
		wantFault(t, err, fault.OutOfRange, "CURSOR_IN_FUTURE")
		end.Epoch = "other"
		if all := log(t, s, ref, &end); len(all) != 7 || all[0] != "gap EPOCH_CHANGED" {
			t.Errorf("%q", all)
		}
	})
}

func TestWaitEnds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow())
		s := w.started()
		ref := send(t, s, "a")
		left := errors.New("left")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, left)
		defer cancel()
		one, err := s.Wait(ctx, ref)
		if !errors.Is(err, left) || one.State != turn.Running {
			t.Errorf("%v, %v", one.State, err)
		}
		go func() {
			time.Sleep(time.Second)
			_ = s.Close()
		}()
		if _, err = s.Wait(t.Context(), ref); !errors.Is(err, turn.ErrClosed) {
			t.Errorf("%v", err)
		}
	})
}

func TestMessages(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, turntest.Script{})
		s := w.executord()
		defer s.Close()
		_, err := s.Messages(t.Context(), "s1", ann, "", 10)
		wantFault(t, err, fault.FailedPrecondition, "SESSION_NOT_RUNNING")
		s.Attach("s1", w.agent)
		ref := send(t, s, "a")
		wait(t, s, ref)
		const foreign = "01hzzzzzzzzzzzzzzzzzzzzzzz"
		w.agent.Said = []agent.Message{
			{ID: foreign, Prompt: foreign, FromUser: true, Text: "from before the fork"},
			{ID: ref.ID, Prompt: ref.ID, FromUser: true, Text: "a"},
			{ID: "msg_x", Prompt: ref.ID, Text: "b"}, {ID: "odd", Prompt: "odd"},
		}
		all, err := s.Messages(t.Context(), "s1", ann, "", 3)
		if err != nil || len(all) != 3 || all[0].Prompt != "" || all[1].Prompt != ref.ID || all[2].Prompt != ref.ID {
			t.Errorf("%+v, %v", all, err)
		}
		rest, err := s.Messages(t.Context(), "s1", ann, "msg_x", 3)
		if err != nil || len(rest) != 1 || rest[0].ID != "odd" || rest[0].Prompt != "" {
			t.Errorf("%+v, %v", rest, err)
		}
	})
}

// TestBusyAgent: what is left of something before does not get in the way of a prompt.
func TestBusyAgent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, slow(), turntest.Script{})
		w.agent.Scripts[0].Steps[1].After = time.Hour
		s := w.started()
		ref := send(t, s, "a")
		synctest.Wait()
		// The first one is given up, while the agent is at it.
		w.agent.Set(func(a *turntest.Agent) { a.AbortErr = errors.New("away") })
		if one, err := s.Cancel(t.Context(), ref, turn.Cancellation{By: "ann"}); err != nil || one.Result.Outcome != agent.Lost {
			t.Fatalf("%+v, %v", one.Result, err)
		}
		ref = send(t, s, "b")
		time.Sleep(10 * time.Second)
		w.agent.Set(func(a *turntest.Agent) { a.AbortErr = nil })
		if one := wait(t, s, ref); one.Result.Outcome != agent.Completed {
			t.Errorf("%+v", one.Result)
		}
		equal(t, log(t, s, ref, nil), "started", "running m", "result COMPLETED")
	})
}
