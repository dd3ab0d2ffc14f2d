package cli

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// turn is a story with everything in it.
func turn(t *testing.T) []*executorv1.TurnEvent {
	t.Helper()
	input, err := structpb.NewStruct(map[string]any{"command": "go test ./...\n# all"})
	if err != nil {
		t.Fatal(err)
	}
	other, err := structpb.NewStruct(map[string]any{"x": 1})
	if err != nil {
		t.Fatal(err)
	}
	one, whole := int32(1), "Hello, all"
	kinds := []any{
		&executorv1.TurnEvent_Started{Started: &executorv1.TurnStarted{QueuePosition: 2}},
		&executorv1.TurnEvent_Text{Text: &executorv1.TextDelta{Part: "1", Text: "I will "}},
		&executorv1.TurnEvent_Text{Text: &executorv1.TextDelta{Part: "1", Text: "\x1b[31mtest\x07."}},
		&executorv1.TurnEvent_PartEnded{PartEnded: &executorv1.PartEnded{Part: "1"}},
		&executorv1.TurnEvent_ToolStarted{ToolStarted: &executorv1.ToolStarted{Call: "a", Tool: "bash", Input: input}},
		&executorv1.TurnEvent_ToolOutput{ToolOutput: &executorv1.ToolOutput{Call: "a", Text: "one\ntwo\n"}},
		&executorv1.TurnEvent_ToolStarted{ToolStarted: &executorv1.ToolStarted{Call: "b", Tool: "other", Input: other}},
		&executorv1.TurnEvent_ToolEnded{ToolEnded: &executorv1.ToolEnded{Call: "a", ExitCode: &one}},
		&executorv1.TurnEvent_ToolEnded{ToolEnded: &executorv1.ToolEnded{Call: "b", Error: "no\nway"}},
		&executorv1.TurnEvent_FileChanged{FileChanged: &executorv1.FileDiff{Path: "a.go", Additions: 1, Deletions: 1, Patch: "-x\n+y\n"}},
		&executorv1.TurnEvent_Todos{Todos: &executorv1.TodoList{Items: []*executorv1.TodoList_Item{{Text: "fix", Status: "completed"}, {Text: "test", Status: "in_progress"}, {Text: "push", Status: "pending"}}}},
		&executorv1.TurnEvent_InteractionRequested{InteractionRequested: &executorv1.Interaction{Name: "sessions/s/interactions/i", Request: &executorv1.Interaction_Permission{Permission: &executorv1.PermissionRequest{Permission: "bash", Patterns: []string{"rm *"}}}}},
		&executorv1.TurnEvent_Text{Text: &executorv1.TextDelta{Part: "2", Text: "Hel"}},
		&executorv1.TurnEvent_PartEnded{PartEnded: &executorv1.PartEnded{Part: "2", Text: &whole}},
		&executorv1.TurnEvent_Result{Result: &executorv1.TurnResult{Outcome: executorv1.TurnOutcome_TURN_OUTCOME_COMPLETED, Usage: &executorv1.AgentUsage{InputTokens: 10, OutputTokens: 5, CostMicros: 1500}}},
	}
	var events []*executorv1.TurnEvent
	for i, k := range kinds {
		e := &executorv1.TurnEvent{EventTime: timestamppb.New(time.Unix(int64(i)*2, 0))}
		switch k := k.(type) {
		case *executorv1.TurnEvent_Started:
			e.Kind = k
		case *executorv1.TurnEvent_Text:
			e.Kind = k
		case *executorv1.TurnEvent_PartEnded:
			e.Kind = k
		case *executorv1.TurnEvent_ToolStarted:
			e.Kind = k
		case *executorv1.TurnEvent_ToolOutput:
			e.Kind = k
		case *executorv1.TurnEvent_ToolEnded:
			e.Kind = k
		case *executorv1.TurnEvent_FileChanged:
			e.Kind = k
		case *executorv1.TurnEvent_Todos:
			e.Kind = k
		case *executorv1.TurnEvent_InteractionRequested:
			e.Kind = k
		case *executorv1.TurnEvent_Result:
			e.Kind = k
		}
		events = append(events, e)
	}
	return events
}

func TestTurnViewPlain(t *testing.T) {
	var out, talk strings.Builder
	v := &turnView{out: &out, talk: &talk}
	for _, e := range turn(t) {
		if err := v.event(e); err != nil {
			t.Fatal(err)
		}
	}
	if want := "I will [31mtest.\nHel\nHello, all\n"; out.String() != want {
		t.Errorf("stdout %q, want %q", out.String(), want)
	}
	want := `queued behind 2
✗ bash go test ./... # all (exit code 1) 6s
✗ other {"x":1}: no way 4s
a.go +1 -1
  -x
  +y
todo:
  [x] fix
  [~] test
  [ ] push
the agent asks for permission: bash rm *
hint: executorctl interactions resolve sessions/s/interactions/i
the whole of it:
completed (10 tokens in, 5 out, $0.0015)
`
	if talk.String() != want {
		t.Errorf("stderr:\n%s\nwant:\n%s", talk.String(), want)
	}
}

// TestTurnViewLive has the line of a tool grow.
func TestTurnViewLive(t *testing.T) {
	var screen strings.Builder
	v := &turnView{out: &screen, talk: &screen, live: true, width: 30}
	for _, e := range turn(t)[3:8] {
		if err := v.event(e); err != nil {
			t.Fatal(err)
		}
	}
	want := "\r\x1b[K· bash go test ./... # all\r\x1b[K· bash go test ./.… (2 lines)\n" + "\r\x1b[K· other {\"x\":1}\n✗ bash go test ./... # all (exit code 1) 6s\n"
	if screen.String() != want {
		t.Errorf("%q\nwant\n%q", screen.String(), want)
	}
}

func TestOneLine(t *testing.T) {
	if got := oneLine(" a\tb\r\n\x1b]0;x\x07 c\u202e " + strings.Repeat("d", 200)); strings.ContainsAny(got, "\x1b\x07\r\n\u202e") || len([]rune(got)) != 160 || !strings.HasPrefix(got, "a b ]0;x c ddd") {
		t.Errorf("%q", got)
	}
}
