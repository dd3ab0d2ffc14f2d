package opencode

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/testmodel"
)

func isRetry(e agent.Event) bool { return e.Retry != nil }
func isText(e agent.Event) bool  { return e.Text != nil }

// The providers' failures: what is told, and how the turn ends.
func TestProviderFails(t *testing.T) {
	st := sharedStage(t)
	for name, failure := range map[string]testmodel.Failure{
		"401": {Status: 401, Message: "the key is bad"},
		"400": {Status: 400, Message: "the request is bad"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			st.model.Script("fails"+name, testmodel.Step{Failures: []testmodel.Failure{failure}})
			k := begin(t, st.conversation(t, ConversationConfig{}), prompt("fails"+name)).wait()
			k.ended(agent.Failed)
			k.compare("error APIError " + name + " " + failure.Message)
			if want := (agent.Error{Name: "APIError", Message: failure.Message, StatusCode: int32(failure.Status)}); k.outcome.Error == nil || *k.outcome.Error != want {
				t.Errorf("error %+v, want %+v", k.outcome.Error, want)
			}
			// The conversation goes on.
			st.model.Script("after"+name, testmodel.Say("It works again."))
			begin(t, k.c, prompt("after"+name)).wait().ended(agent.Completed)
		})
	}
	retried := map[string]struct {
		failure testmodel.Failure
		want    []string
	}{
		"429": {testmodel.Failure{Status: 429, Message: "slow down", RetryAfter: time.Second}, []string{"retry 1 slow down"}},
		"500": {testmodel.Failure{Status: 500, Message: "oh no"}, []string{"retry 1 oh no"}},
		"529": {testmodel.Failure{Status: 529, Message: "too many"}, []string{"retry 1 too many"}},
		"error event": {testmodel.Failure{After: 2, Event: true, Message: "overloaded"},
			[]string{"text part1 It is ", "dropped part1", `retry 1 {"type":"overloaded_error","message":"overloaded"}`}},
	}
	for name, c := range retried {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			script := "retried-" + strings.ReplaceAll(name, " ", "-")
			st.model.Script(script, testmodel.Step{Parts: []testmodel.Part{testmodel.Text("It is said.")}, Failures: []testmodel.Failure{c.failure}})
			k := begin(t, st.conversation(t, ConversationConfig{}), prompt(script)).wait()
			k.ended(agent.Completed)
			part := "part1"
			if len(c.want) > 1 {
				part = "part2"
			}
			k.compare(append(c.want, "text "+part+" It is said.", "ended "+part, step)...)
			if k.outcome.Text != "It is said." {
				t.Errorf("text %q", k.outcome.Text)
			}
		})
	}
	t.Run("cut stream", func(t *testing.T) {
		t.Parallel()
		st.model.Script("cut", testmodel.Step{Parts: []testmodel.Part{testmodel.Text("It is said.")}, Failures: []testmodel.Failure{{After: 2}}})
		k := begin(t, st.conversation(t, ConversationConfig{}), prompt("cut")).wait()
		k.ended(agent.Completed)
		if got := final(k.events); got != "It is said." {
			t.Errorf("what is left of the text is %q:\n%s", got, k)
		}
	})
	t.Run("no such model", func(t *testing.T) {
		t.Parallel()
		p := prompt("never")
		p.Model = agent.Model{Provider: "nope", Model: "nope"}
		k := begin(t, st.conversation(t, ConversationConfig{}), p).wait()
		k.ended(agent.Failed)
		if k.outcome.Error == nil || !strings.Contains(k.outcome.Error.Message, "Model not found: nope/nope") || len(k.events) != 1 {
			t.Errorf("%+v\n%s", k.outcome, k)
		}
	})
}

// final is the text that a client has in the end.
func final(events []agent.Event) string {
	parts := make(map[string]string)
	var order []string
	for _, e := range events {
		switch {
		case e.Text != nil || e.Reasoning != nil:
			d := cmp.Or(e.Text, e.Reasoning)
			if _, ok := parts[d.Part]; !ok {
				order = append(order, d.Part)
			}
			parts[d.Part] += d.Text
		case e.PartEnded != nil && e.PartEnded.Text != nil:
			parts[e.PartEnded.Part] = *e.PartEnded.Text
		case e.PartsDropped != nil:
			for _, id := range e.PartsDropped.Parts {
				delete(parts, id)
			}
		}
	}
	var b strings.Builder
	for _, id := range order {
		b.WriteString(parts[id])
	}
	return b.String()
}

func TestAbort(t *testing.T) {
	st := sharedStage(t)
	abort := func(t *testing.T, k *take) {
		t.Helper()
		ctx, stop := context.WithTimeout(t.Context(), 20*time.Second)
		defer stop()
		if err := k.c.Abort(ctx); err != nil {
			t.Fatal(err)
		}
		busy, err := k.c.api.busy(ctx)
		if _, is := busy[k.c.id]; err != nil || is {
			t.Errorf("busy after the abort: %v %v", busy, err)
		}
		k.wait().ended(agent.Aborted)
		st.model.Script("again", testmodel.Say("Here I am."))
		begin(t, k.c, prompt("again")).wait().ended(agent.Completed)
	}
	t.Run("in a tool", func(t *testing.T) {
		st.model.Script("abort-tool", testmodel.Say("Long. ", bash("echo begun; sleep 3141 & sleep 3142; wait")))
		k := begin(t, st.conversation(t, ConversationConfig{}), prompt("abort-tool"))
		k.until("output", func(e agent.Event) bool { return e.ToolOutput != nil })
		if len(st.place.processes(true)) == 0 {
			t.Fatal("no process of the tool was found")
		}
		abort(t, k)
		for deadline := time.Now().Add(10 * time.Second); len(st.place.processes(true)) > 0; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("processes of the tool are left: %v", st.place.processes(true))
			}
		}
		if ended := k.until("the tool's end", func(e agent.Event) bool { return e.ToolEnded != nil }).ToolEnded; !strings.Contains(ended.Output+ended.Error, "abort") {
			t.Errorf("the tool ended %+v", ended)
		}
	})
	t.Run("in a retry", func(t *testing.T) {
		st.model.Script("abort-retry", testmodel.Step{Failures: slices.Repeat([]testmodel.Failure{{Status: 429, Message: "later", RetryAfter: time.Hour}}, 9)})
		k := begin(t, st.conversation(t, ConversationConfig{}), prompt("abort-retry"))
		if next := k.until("retry", isRetry).Retry.Next; time.Until(next) < 30*time.Minute {
			t.Errorf("the next attempt is at %v", next)
		}
		abort(t, k)
	})
	t.Run("stalled", func(t *testing.T) {
		st.model.Script("abort-stalled", testmodel.Step{Parts: []testmodel.Part{testmodel.Text("Some words and then")}, Failures: []testmodel.Failure{{After: 2, Stall: true}}})
		k := begin(t, st.conversation(t, ConversationConfig{}), prompt("abort-stalled"))
		k.until("text", isText)
		abort(t, k)
		if got := final(k.events); got != "Some words " {
			t.Errorf("text %q", got)
		}
	})
	t.Run("in a sub-agent", func(t *testing.T) {
		st.model.Script("abort-parent", testmodel.Say("Delegating. ", testmodel.Tool("task", map[string]any{"description": "look", "prompt": "Look [[script:abort-child]]", "subagent_type": "general"})))
		st.model.Script("abort-child", testmodel.Say("Long. ", bash("echo begun; sleep 3143")))
		k := begin(t, st.conversation(t, ConversationConfig{}), prompt("abort-parent"))
		k.until("output", func(e agent.Event) bool { return e.ToolOutput != nil })
		abort(t, k)
		k.until("the sub-agent's end", func(e agent.Event) bool { return e.SubAgentEnded != nil })
	})
	t.Run("at rest", func(t *testing.T) {
		if err := st.conversation(t, ConversationConfig{}).Abort(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// The stream of events is cut while the answer comes: nothing is missing and nothing
// twice.
func TestEventsAreLost(t *testing.T) {
	st := sharedStage(t)
	words := "a b c d e f g h i j k l m n o p q r s t u v w x y z"
	st.model.Script("lossy",
		testmodel.Step{Parts: []testmodel.Part{testmodel.Reasoning(words), testmodel.Text(words), bash("for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.1; done")}, Pace: 20 * time.Millisecond},
		testmodel.Step{Parts: []testmodel.Part{testmodel.Text(words), bash("echo last")}, Pace: 20 * time.Millisecond},
		testmodel.Say("Done."))
	for name, all := range map[string]bool{"events": false, "everything": true} {
		t.Run(name, func(t *testing.T) {
			k := begin(t, st.conversation(t, ConversationConfig{}), prompt("lossy"))
			for cut := true; cut; {
				select {
				case <-k.done:
					cut = false
				case <-time.After(170 * time.Millisecond):
					st.place.cut(all)
				}
			}
			k.wait().ended(agent.Completed)
			if got, want := final(k.events), words+words+words+"Done."; got != want {
				t.Errorf("text %q, want %q", got, want)
			}
			count := make(map[string]int)
			var output string
			for _, e := range k.events {
				switch {
				case e.ToolStarted != nil:
					count["start"]++
				case e.ToolEnded != nil:
					count["end"]++
				case e.ToolOutput != nil:
					output += e.ToolOutput.Text
				case e.Usage != nil:
					count["usage"]++
				case e.PartEnded != nil:
					count["part"]++
				}
			}
			if d := gocmp.Diff(map[string]int{"start": 2, "end": 2, "usage": 3, "part": 4}, count); d != "" {
				t.Errorf("events (-want +got):\n%s\n%s", d, k)
			}
			if k.outcome.Usage.InputTokens != 300 {
				t.Errorf("usage %+v", k.outcome.Usage)
			}
			if whole := "1\n2\n3\n4\n5\n6\n7\n8\nlast\n"; !subsequence(output, whole) {
				t.Errorf("output %q is not of %q", output, whole)
			}
		})
	}
}

// subsequence says whether a text is another with pieces left out.
func subsequence(part, whole string) bool {
	for _, r := range part {
		i := strings.IndexRune(whole, r)
		if i < 0 {
			return false
		}
		whole = whole[i+1:]
	}
	return true
}

// Another executord goes on with a turn: it is told the events of before, and tells what is
// new.
func TestJoin(t *testing.T) {
	st := sharedStage(t)
	words := "a b c d e f g h i j k l m n o p"
	st.model.Script("joined",
		testmodel.Step{Parts: []testmodel.Part{testmodel.Reasoning("hm "), testmodel.Text("first "), bash("echo 1; sleep 1; echo 2")}},
		testmodel.Step{Parts: []testmodel.Part{testmodel.Text(words)}, Pace: 20 * time.Millisecond})
	c := st.conversation(t, ConversationConfig{})
	if _, err := c.Join(t.Context(), "nobody", slices.Values([]agent.Event(nil)), nil); err != agent.ErrNoPrompt {
		t.Errorf("joined a prompt that was not given: %v", err)
	}
	p := prompt("joined")
	for name, leave := range map[string]func(agent.Event) bool{
		"in a tool": func(e agent.Event) bool { return e.ToolOutput != nil },
		"in a text": func(e agent.Event) bool {
			return e.Text != nil && strings.HasPrefix(e.Text.Text, "a ")
		},
		"after it": func(agent.Event) bool { return false },
	} {
		t.Run(name, func(t *testing.T) {
			p := p
			p.ID = promptID()
			ctx, stop := context.WithCancelCause(t.Context())
			defer stop(nil)
			var before []agent.Event
			_, err := c.Prompt(ctx, p, func(e agent.Event) error {
				before = append(before, e)
				if leave(e) {
					stop(context.Canceled)
				}
				return nil
			})
			if name != "after it" && err == nil {
				t.Fatal("the turn was not left")
			}
			// Another conversation of the same name stands for another executord.
			again, err := st.server.Resume(t.Context(), c.ID(), ConversationConfig{})
			if err != nil {
				t.Fatal(err)
			}
			k := beginWith(t, again, func(ctx context.Context, tell func(agent.Event) error) (agent.Outcome, error) {
				return again.Join(ctx, p.ID, slices.Values(before), tell)
			}).wait()
			k.ended(agent.Completed)
			k.events = append(before, k.events...)
			k.compare(
				"reasoning part1 hm ", "ended part1", "text part2 first ", "ended part2", `tool call1 bash {"command":"echo 1; sleep 1; echo 2","description":"run"}`,
				"output call1 1\n2\n", `tool ended call1 exit 0 output "1\n2\n"`, step,
				"text part3 "+words, "ended part3", step,
			)
			if k.outcome.Usage.InputTokens != 200 {
				t.Errorf("usage %+v", k.outcome.Usage)
			}
		})
	}
}

func TestAgentIsKilled(t *testing.T) {
	var statuses struct {
		lockedBuffer
	}
	st := ownStage(t, func(c *Config) {
		c.Tell = func(s Status) { statuses.Write([]byte(string(s.State) + " ")) }
	})
	st.model.Script("killed", testmodel.Say("Long. ", bash("echo begun; sleep 3144")))
	k := begin(t, st.conversation(t, ConversationConfig{}), prompt("killed"))
	k.until("output", func(e agent.Event) bool { return e.ToolOutput != nil })
	st.place.kill()
	k.wait().ended(agent.Failed)
	k.compare(
		"text part1 Long. ", "ended part1", `tool call1 bash {"command":"echo begun; sleep 3144","description":"run"}`, "output call1 begun\n",
		"restarted signal: killed", `tool ended call1 error "interrupted: the agent died (signal: killed)"`,
	)
	if e := k.outcome.Error; e == nil || e.Name != "AgentDied" || !e.Retryable {
		t.Errorf("error %+v", e)
	}
	if left := st.place.processes(true); len(left) > 0 {
		t.Errorf("what it had started is left: %v", left)
	}
	if got := statuses.String(); !strings.HasPrefix(got, "STARTING READY") || !strings.Contains(got, "RESTARTING READY") {
		t.Errorf("statuses: %s", got)
	}
	st.model.Script("later", testmodel.Say("I am back."))
	k = begin(t, k.c, prompt("later")).wait()
	k.ended(agent.Completed)
	messages, err := k.c.Messages(t.Context())
	if err != nil || len(messages) != 4 {
		t.Errorf("messages after the death: %+v %v", messages, err)
	}

	// Let go and found again, as by another executord.
	st.server.Close()
	cfg := st.server.cfg
	cfg.Join = true
	joined, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	st.server = joined
	if joined.secret() == "" || !strings.Contains(strings.Join(st.place.last.Args, " "), "opencode-") {
		t.Error("the server was not found")
	}
	c, err := joined.Resume(t.Context(), k.c.ID(), ConversationConfig{})
	if err != nil {
		t.Fatal(err)
	}
	st.model.Script("joined-server", testmodel.Say("Still here."))
	begin(t, c, prompt("joined-server")).wait().ended(agent.Completed)

	// No secret is where others see it.
	for _, arg := range st.place.last.Args {
		if strings.Contains(arg, joined.secret()) {
			t.Errorf("the password is in the arguments: %q", arg)
		}
	}
	if strings.Contains(st.log.String(), joined.secret()) {
		t.Error("the password is in the log")
	}
	if err := joined.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	if left := st.place.processes(false); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
}
