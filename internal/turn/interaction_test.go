package turn_test

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/turn"
	"github.com/harvest-run/executord/internal/turn/turntest"
)

// asking asks for a permission and then says something.
func asking() turntest.Script {
	return turntest.Script{Steps: []turntest.Step{turntest.Permit("per_1"), turntest.Text(time.Second, "done")}}
}

func question(multiple, custom bool) turntest.Step {
	return turntest.Step{Event: agent.Event{Asked: &agent.Asked{ID: "que_1", Question: &agent.Question{Items: []agent.QuestionItem{
		{Text: "which?", Options: []agent.Option{{Label: "a"}, {Label: "b"}}, Multiple: multiple, Custom: custom}, {Text: "why?", Custom: true},
	}}}}}
}

func answers(w *world, id string) []agent.Answer {
	return turntest.Seen(w.agent, func(a *turntest.Agent) []agent.Answer { return a.Answers[id] })
}

func TestSomebodyAnswers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, asking())
		w.home.profile.Policy.Mode = turn.Ask
		s := w.started()
		ref := send(t, s, "a")
		synctest.Wait()
		i := open(t, s)[0]
		if i.State != turn.Pending || i.Turn != ref.ID || i.Asked.Permission.Kind != "bash" || i.ExpireTime.Sub(i.CreateTime) != turn.DefaultAnswerTime {
			t.Errorf("%+v", i)
		}
		if busy, _ := s.Activity("s1"); !busy {
			t.Error("an open interaction is no activity")
		}
		time.Sleep(time.Minute)
		got, err := s.Resolve(t.Context(), refOf(i), agent.Answer{Decision: agent.AllowAlways}, "ann at home", named("r1"))
		if err != nil || got.State != turn.Resolved || got.ResolvedBy != "ann at home" || got.Answer.Decision != agent.AllowAlways || got.ResolveTime.Sub(i.CreateTime) != time.Minute {
			t.Errorf("%+v, %v", got, err)
		}
		// A repeat is answered with the same, another is too late.
		again, err := s.Resolve(t.Context(), refOf(i), agent.Answer{Decision: agent.AllowAlways}, "ann at home", named("r1"))
		if err != nil || again.ResolvedBy != "ann at home" {
			t.Errorf("%+v, %v", again, err)
		}
		_, err = s.Resolve(t.Context(), refOf(i), agent.Answer{Decision: agent.Reject}, "bob", named("r2"))
		wantFault(t, err, fault.FailedPrecondition, "INTERACTION_NOT_PENDING")
		if one := wait(t, s, ref); one.Result.Outcome != agent.Completed {
			t.Errorf("%+v", one.Result)
		}
		if got := answers(w, "per_1"); len(got) != 1 || got[0].Decision != agent.AllowAlways {
			t.Errorf("answered %v", got)
		}
		equal(t, log(t, s, ref, nil), "started", "running m", "requested per_1 PENDING", "resolved per_1 RESOLVED", "done", "result COMPLETED")
		if told := w.home.summary(); told != "RUNNING PENDING RESOLVED ENDED" {
			t.Errorf("the session was told %s", told)
		}
		if len(open(t, s)) != 0 {
			t.Error("it is still open")
		}
	})
}

// TestManyAnswerAtOnce: one of them does.
func TestManyAnswerAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, asking())
		w.home.profile.Policy.Mode = turn.Ask
		s := w.started()
		ref := send(t, s, "a")
		synctest.Wait()
		i := open(t, s)[0]
		var won atomic.Int32
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				_, err := s.Resolve(t.Context(), refOf(i), agent.Answer{Decision: agent.AllowOnce}, "somebody", named(""))
				if err == nil {
					won.Add(1)
				} else if fault.ReasonOf(err) != "INTERACTION_NOT_PENDING" {
					t.Error(err)
				}
			})
		}
		all.Wait()
		wait(t, s, ref)
		if won.Load() != 1 || len(answers(w, "per_1")) != 1 {
			t.Errorf("%d resolved it, %d answers were given", won.Load(), len(answers(w, "per_1")))
		}
	})
}

func TestPolicies(t *testing.T) {
	for name, test := range map[string]struct {
		policy  turn.Policy
		step    turntest.Step
		state   turn.InteractionState
		by      string
		answer  agent.Decision
		outcome agent.OutcomeKind
		after   time.Duration
	}{
		"default":              {turn.Policy{}, turntest.Permit("per_1"), turn.Resolved, "policy", agent.AllowOnce, agent.Completed, 0},
		"allow":                {turn.Policy{Mode: turn.Allow}, turntest.Permit("per_1"), turn.Resolved, "policy", agent.AllowOnce, agent.Completed, 0},
		"allow has no answers": {turn.Policy{Mode: turn.Allow}, question(false, false), turn.Resolved, "policy", agent.Reject, agent.Rejected, 0},
		"deny":                 {turn.Policy{Mode: turn.Deny}, turntest.Permit("per_1"), turn.Resolved, "policy", agent.Reject, agent.Rejected, 0},
		"deadline":             {turn.Policy{Mode: turn.Ask, Timeout: 7 * time.Second}, turntest.Permit("per_1"), turn.Expired, "deadline", agent.Reject, agent.Rejected, 7 * time.Second},
		"default of 300 s":     {turn.Policy{Mode: turn.Ask}, turntest.Permit("per_1"), turn.Expired, "deadline", agent.Reject, agent.Rejected, 300 * time.Second},
		"deadline allows":      {turn.Policy{Mode: turn.Ask, Timeout: 7 * time.Second, Allow: true}, turntest.Permit("per_1"), turn.Expired, "deadline", agent.AllowOnce, agent.Completed, 7 * time.Second},
		"but no question":      {turn.Policy{Mode: turn.Ask, Timeout: 7 * time.Second, Allow: true}, question(false, true), turn.Expired, "deadline", agent.Reject, agent.Rejected, 7 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, turntest.Script{Steps: []turntest.Step{test.step}})
				w.home.profile.Policy = test.policy
				s := w.started()
				ref := send(t, s, "a")
				one := wait(t, s, ref)
				all, err := s.ListInteractions(t.Context(), turn.InteractionQuery{Caller: ann, Session: "s1", Limit: 10})
				if err != nil || len(all) != 1 {
					t.Fatalf("%v, %v", all, err)
				}
				i := all[0]
				if i.State != test.state || i.ResolvedBy != test.by || i.Answer.Decision != test.answer || one.Result.Outcome != test.outcome || i.ResolveTime.Sub(i.CreateTime) != test.after {
					t.Errorf("%+v, %+v, %+v", i, i.Answer, one.Result)
				}
			})
		})
	}
}

// TestEndMakesVoid: what is open when the turn ends is void, and told before the result.
func TestEndMakesVoid(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, asking())
		w.home.profile.Policy.Mode = turn.Ask
		s := w.started()
		ref := send(t, s, "a")
		synctest.Wait()
		i := open(t, s)[0]
		if _, err := s.Cancel(t.Context(), ref, turn.Cancellation{By: "ann"}); err != nil {
			t.Fatal(err)
		}
		equal(t, log(t, s, ref, nil), "started", "running m", "requested per_1 PENDING", "resolved per_1 VOID", "result ABORTED")
		_, err := s.Resolve(t.Context(), refOf(i), agent.Answer{Decision: agent.AllowOnce}, "ann", named(""))
		wantFault(t, err, fault.FailedPrecondition, "INTERACTION_NOT_PENDING")
		if len(answers(w, "per_1")) != 0 {
			t.Error("the agent was given an answer")
		}
	})
}

// TestAgentWithdraws: what the agent no longer waits for is void.
func TestAgentWithdraws(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, asking())
		w.home.profile.Policy.Mode = turn.Ask
		s := w.started()
		ref := send(t, s, "a")
		synctest.Wait()
		w.agent.Withdraw("per_1")
		wait(t, s, ref)
		equal(t, log(t, s, ref, nil), "started", "running m", "requested per_1 PENDING", "resolved per_1 VOID", "done", "result COMPLETED")
	})
}

// TestAnswerIsDelivered: an agent that is away gets the answer when it is back.
func TestAnswerIsDelivered(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, asking())
		w.home.profile.Policy.Mode = turn.Ask
		s := w.started()
		ref := send(t, s, "a")
		synctest.Wait()
		w.agent.Set(func(a *turntest.Agent) { a.AnswerErr = errors.New("away") })
		if _, err := s.Resolve(t.Context(), refOf(open(t, s)[0]), agent.Answer{Decision: agent.AllowOnce}, "ann", named("")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		w.agent.Set(func(a *turntest.Agent) { a.AnswerErr = nil })
		if one := wait(t, s, ref); one.Result.Outcome != agent.Completed || len(answers(w, "per_1")) != 1 {
			t.Errorf("%+v, %v", one.Result, answers(w, "per_1"))
		}
	})
}

// TestOfferedAgain: after a restart of executord the same is asked, and answered, once.
func TestOfferedAgain(t *testing.T) {
	for _, answered := range []string{"never", "while it was away", "before it was"} {
		t.Run(answered, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, asking())
				w.home.profile.Policy = turn.Policy{Mode: turn.Ask, Timeout: time.Minute}
				s := w.executord()
				s.Attach("s1", w.agent)
				ref := send(t, s, "a")
				synctest.Wait()
				i := open(t, s)[0]
				answer := func(s *turn.Service) {
					if _, err := s.Resolve(t.Context(), refOf(i), agent.Answer{Decision: agent.AllowOnce}, "ann", named("")); err != nil {
						t.Error(err)
					}
				}
				if answered == "before it was" {
					w.agent.Set(func(a *turntest.Agent) { a.AnswerErr = errors.New("away") })
					answer(s)
					w.agent.Set(func(a *turntest.Agent) { a.AnswerErr = nil })
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				s = w.executord()
				defer s.Close()
				if answered == "while it was away" {
					answer(s)
				}
				s.Attach("s1", w.agent)
				want := []string{"started", "running m", "requested per_1 PENDING", "resolved per_1 RESOLVED", "done", "result COMPLETED"}
				if answered == "never" {
					want[3], want[4], want[5] = "resolved per_1 EXPIRED", "result REJECTED", ""
					want = want[:5]
				}
				one := wait(t, s, ref)
				equal(t, log(t, s, ref, nil), want...)
				if len(answers(w, "per_1")) != 1 {
					t.Errorf("%d answers were given", len(answers(w, "per_1")))
				}
				if answered == "never" && one.EndTime.Sub(i.CreateTime) != time.Minute {
					t.Errorf("it expired after %v", one.EndTime.Sub(i.CreateTime))
				}
			})
		})
	}
}

// TestTooLateWhileAway: the deadline holds although nobody could act on it.
func TestTooLateWhileAway(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t, asking())
		w.home.profile.Policy = turn.Policy{Mode: turn.Ask, Timeout: time.Minute}
		s := w.executord()
		s.Attach("s1", w.agent)
		ref := send(t, s, "a")
		synctest.Wait()
		i := open(t, s)[0]
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		s = w.executord()
		defer s.Close()
		_, err := s.Resolve(t.Context(), refOf(i), agent.Answer{Decision: agent.AllowOnce}, "ann", named(""))
		wantFault(t, err, fault.FailedPrecondition, "INTERACTION_NOT_PENDING")
		s.Attach("s1", w.agent)
		if one := wait(t, s, ref); one.Result.Outcome != agent.Rejected {
			t.Errorf("%+v", one.Result)
		}
	})
}

func TestAnswersMustFit(t *testing.T) {
	for _, test := range []struct {
		step   turntest.Step
		answer agent.Answer
		ok     bool
	}{
		{turntest.Permit("per_1"), agent.Answer{Decision: agent.AllowOnce}, true},
		{turntest.Permit("per_1"), agent.Answer{Decision: agent.Reject, Message: "not now"}, true},
		{turntest.Permit("per_1"), agent.Answer{}, false},
		{turntest.Permit("per_1"), agent.Answer{Decision: agent.AllowOnce, Labels: [][]string{{"a"}}}, false},
		{turntest.Permit("per_1"), agent.Answer{Decision: agent.AllowOnce, Message: "well"}, false},
		{turntest.Permit("per_1"), agent.Answer{Decision: agent.Reject, Message: strings.Repeat("x", 5000)}, false},
		{question(false, false), agent.Answer{Labels: [][]string{{"a"}, {"because"}}}, true},
		{question(false, false), agent.Answer{Decision: agent.Reject}, true},
		{question(false, false), agent.Answer{Decision: agent.AllowOnce}, false},
		{question(false, false), agent.Answer{}, false},
		{question(false, false), agent.Answer{Labels: [][]string{{"a"}}}, false},
		{question(false, false), agent.Answer{Labels: [][]string{{"a", "b"}, {"x"}}}, false},
		{question(true, false), agent.Answer{Labels: [][]string{{"a", "b"}, {"x"}}}, true},
		{question(false, false), agent.Answer{Labels: [][]string{{"c"}, {"x"}}}, false},
		{question(false, true), agent.Answer{Labels: [][]string{{"c"}, {"x"}}}, true},
		{question(false, true), agent.Answer{Labels: [][]string{{""}, {"x"}}}, false},
		{question(false, true), agent.Answer{Labels: [][]string{{}, {"x"}}}, false},
		{question(false, true), agent.Answer{Labels: [][]string{{strings.Repeat("x", 70000)}, {"x"}}}, false},
		{question(false, true), agent.Answer{Decision: agent.Reject, Labels: [][]string{{"a"}, {"x"}}}, false},
	} {
		bubble(t, func(t *testing.T) {
			w := newWorld(t, turntest.Script{Steps: []turntest.Step{test.step}})
			w.home.profile.Policy.Mode = turn.Ask
			s := w.started()
			send(t, s, "a")
			synctest.Wait()
			_, err := s.Resolve(t.Context(), refOf(open(t, s)[0]), test.answer, "ann", named(""))
			if test.ok && err != nil {
				t.Errorf("%+v: %v", test.answer, err)
			}
			if !test.ok {
				wantFault(t, err, fault.Invalid, "RESOLUTION")
			}
		})
	}
}
