package opencode

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/store"
	"github.com/harvest-run/executord/internal/testmodel"
	turns "github.com/harvest-run/executord/internal/turn"
)

// anySession takes prompts and asks people.
type anySession struct{}

func (anySession) Visible(context.Context, string, caller.Caller) error { return nil }
func (anySession) Profile(context.Context, string, caller.Caller) (turns.Profile, error) {
	return turns.Profile{Model: agent.Model{Provider: "anthropic", Model: "claude-sonnet-4-5"}, Policy: turns.Policy{Mode: turns.Ask}}, nil
}
func (anySession) Note(string, turns.Note) {}

// TestTurnsOverRestarts: with the real agent, a turn goes on while executord is closed and
// opened again at each of its events: everything is told once and whole, and an answer
// reaches the agent.
func TestTurnsOverRestarts(t *testing.T) {
	st := sharedStage(t)
	words := "a b c d e f g h i j k l m n o p"
	st.model.Script("restarts",
		testmodel.Step{Parts: []testmodel.Part{testmodel.Text("first "), bash("echo 1; sleep 1; echo 2")}},
		testmodel.Step{Parts: []testmodel.Part{bash("printf asked")}},
		testmodel.Step{Parts: []testmodel.Part{testmodel.Text(words)}, Pace: 50 * time.Millisecond})
	c := st.conversation(t, ConversationConfig{Permissions: []Rule{{"bash", "*", "allow"}, {"bash", "printf *", "ask"}}})
	records, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer records.Close()
	dir := filepath.Join(t.TempDir(), "turns")
	var s *turns.Service
	executord := func() {
		t.Helper()
		if s, err = turns.New(turns.Config{Store: records, Sessions: anySession{}, Dir: dir}); err != nil {
			t.Fatal(err)
		}
		if err := s.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		again, err := st.server.Resume(t.Context(), c.ID(), ConversationConfig{})
		if err != nil {
			t.Fatal(err)
		}
		s.Attach("s1", again)
	}
	executord()
	defer func() { s.Close() }()
	made, err := s.Send(t.Context(), turns.Request{Session: "s1", Prompt: turns.Prompt{Text: "Do it. [[script:restarts]]"}})
	if err != nil {
		t.Fatal(err)
	}
	ref := turns.Ref{Session: "s1", ID: made.ID}
	ctx, stop := context.WithTimeout(t.Context(), 90*time.Second)
	defer stop()
	w, err := s.Watch(ctx, ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	// Text by part, as a client puts it together.
	texts, order := make(map[string]string), []string{}
	tools, asked, restarts := 0, 0, 0
	var result *turns.Result
	for n := uint64(1); ; n++ {
		e, err := w.Next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if e.Cursor.Sequence != n || e.Gap != nil {
			t.Fatalf("event %d has number %d, gap %v", n, e.Cursor.Sequence, e.Gap)
		}
		again := false
		switch {
		case e.Result != nil:
			result = e.Result
		case e.Requested != nil:
			asked++
			again = true
			if _, err := s.Resolve(ctx, turns.Ref{Session: "s1", ID: e.Requested.ID}, agent.Answer{Decision: agent.AllowOnce}, "ann", turns.Request{}.Key); err != nil {
				t.Fatal(err)
			}
		case e.Agent == nil:
		case e.Agent.Text != nil:
			if _, ok := texts[e.Agent.Text.Part]; !ok {
				order = append(order, e.Agent.Text.Part)
			}
			texts[e.Agent.Text.Part] += e.Agent.Text.Text
			again = restarts < 8
		case e.Agent.PartEnded != nil && e.Agent.PartEnded.Text != nil:
			texts[e.Agent.PartEnded.Part] = *e.Agent.PartEnded.Text
		case e.Agent.ToolStarted != nil:
			again = true
		case e.Agent.ToolEnded != nil:
			tools++
			if e.Agent.ToolEnded.Error != "" {
				t.Errorf("%+v", e.Agent.ToolEnded)
			}
		}
		if again {
			restarts++
			at := w.Cursor()
			w.Close()
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			executord()
			if w, err = s.Watch(ctx, ref, &at); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.Close()
	if result == nil || result.Outcome != agent.Completed || result.Text != words {
		t.Errorf("%+v", result)
	}
	if len(order) != 2 || texts[order[0]] != "first " || texts[order[1]] != words || tools != 2 || asked != 1 || restarts < 5 {
		t.Errorf("texts %q, %d tools, asked %d times, %d restarts", texts, tools, asked, restarts)
	}
	all, err := s.Messages(ctx, "s1", caller.Caller{}, "", 50)
	if err != nil || len(all) < 2 || all[0].Prompt != made.ID || all[len(all)-1].Prompt != made.ID {
		t.Errorf("%+v, %v", all, err)
	}

	// Cancelled in a tool: it is over when the answer comes, and the next one is taken.
	st.model.Script("slow-tool", testmodel.Step{Parts: []testmodel.Part{bash("sleep 60")}})
	st.model.Script("after-it", testmodel.Step{Parts: []testmodel.Part{testmodel.Text("well")}})
	slow, err := s.Send(ctx, turns.Request{Session: "s1", Prompt: turns.Prompt{Text: "Do it. [[script:slow-tool]]"}})
	if err != nil {
		t.Fatal(err)
	}
	next, err := s.Send(ctx, turns.Request{Session: "s1", Prompt: turns.Prompt{Text: "Do it. [[script:after-it]]"}})
	if err != nil {
		t.Fatal(err)
	}
	if w, err = s.Watch(ctx, turns.Ref{Session: "s1", ID: slow.ID}, nil); err != nil {
		t.Fatal(err)
	}
	defer func() { w.Close() }()
	for {
		e, err := w.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if e.Agent != nil && e.Agent.ToolStarted != nil {
			break
		}
	}
	one, err := s.Cancel(ctx, turns.Ref{Session: "s1", ID: slow.ID}, turns.Cancellation{By: "ann"})
	if err != nil || one.Result.Outcome != agent.Aborted || one.Result.CancelledBy != "ann" {
		t.Errorf("%+v, %v", one.Result, err)
	}
	one, err = s.Wait(ctx, turns.Ref{Session: "s1", ID: next.ID})
	if err != nil || one.Result.Outcome != agent.Completed || one.Result.Text != "well" {
		t.Errorf("%+v, %v", one.Result, err)
	}
}
