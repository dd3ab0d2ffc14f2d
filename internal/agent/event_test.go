package agent

import (
	"encoding/json"
	"flag"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

func examples() []Event {
	exit, whole := int32(2), "the whole"
	return []Event{
		{Text: &Delta{Part: "p1", Text: "Hello "}},
		{Reasoning: &Delta{Part: "p0", Text: "hm"}, SubAgent: "s1"},
		{PartEnded: &PartEnded{Part: "p1"}},
		{PartEnded: &PartEnded{Part: "p1", Text: &whole}},
		{PartsDropped: &PartsDropped{Parts: []string{"p1", "p2"}}},
		{ToolStarted: &ToolStarted{Call: "c", Tool: "bash", Title: "ls", Input: json.RawMessage(`{"command":"ls"}`)}},
		{ToolOutput: &ToolOutput{Call: "c", Text: "a\n"}},
		{ToolEnded: &ToolEnded{Call: "c", Tool: "bash", Output: "a\n", Error: "e", Title: "ls", ExitCode: &exit, Metadata: json.RawMessage(`{"x":1}`)}},
		{FileChanged: &FileDiff{Path: "/w/a", Change: FileModified, Patch: "@@", Additions: 1, Deletions: 2}},
		{Todos: &TodoList{Items: []TodoItem{{Text: "t", Status: "pending", Priority: "high"}}}},
		{Asked: &Asked{ID: "per_1", Call: "c", Permission: &Permission{Kind: "bash", Patterns: []string{"rm *"}, Metadata: json.RawMessage(`{}`)}}},
		{Asked: &Asked{ID: "que_1", Question: &Question{Items: []QuestionItem{{Header: "h", Text: "which?", Options: []Option{{Label: "l", Description: "d"}}, Multiple: true, Custom: true}}}}},
		{Answered: &Answered{ID: "per_1"}},
		{SubAgentStarted: &SubAgentStarted{ID: "s1", Call: "c", Title: "look"}},
		{SubAgentEnded: &SubAgentEnded{ID: "s1", Usage: Usage{InputTokens: 1}}},
		{Usage: &Usage{InputTokens: 1, OutputTokens: 2, ReasoningTokens: 3, CacheReadTokens: 4, CacheWriteTokens: 5, CostMicros: 6}},
		{Retry: &Retry{Attempt: 1, Message: "overloaded", Next: time.Unix(1795422408, 0).UTC()}},
		{Compaction: &Compaction{Automatic: true}},
		{Error: &Error{Name: "APIError", Message: "no", StatusCode: 401, Retryable: true}},
		{Restarted: &Restarted{Detail: "killed"}},
	}
}

// What lies in the logs of turns is read again by later versions.
func TestEventsStayAsTheyAreStored(t *testing.T) {
	const golden = "testdata/events.jsonl"
	var got strings.Builder
	for _, e := range examples() {
		line, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		got.Write(append(line, '\n'))
	}
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got.String()); d != "" {
		t.Errorf("stored form (-want +got):\n%s", d)
	}
	var read []Event
	for line := range strings.Lines(string(want)) {
		var e Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		read = append(read, e)
	}
	if d := cmp.Diff(examples(), read); d != "" {
		t.Errorf("read again (-want +got):\n%s", d)
	}
}

func TestEveryKindHasAnExample(t *testing.T) {
	seen := make(map[string]bool)
	for _, e := range examples() {
		v := reflect.ValueOf(e)
		for i := range v.NumField() {
			if f := v.Field(i); f.Kind() == reflect.Pointer && !f.IsNil() {
				seen[v.Type().Field(i).Name] = true
			}
		}
	}
	for f := range reflect.TypeFor[Event]().Fields() {
		if f.Type.Kind() == reflect.Pointer && !seen[f.Name] {
			t.Errorf("no example of %s", f.Name)
		}
	}
}

func TestEventOfALaterVersion(t *testing.T) {
	var e Event
	if err := json.Unmarshal([]byte(`{"sub_agent":"s","hologram":{"x":[1]}}`), &e); err != nil {
		t.Fatal(err)
	}
	if e != (Event{SubAgent: "s"}) {
		t.Errorf("got %+v", e)
	}
}

func TestUsageAdd(t *testing.T) {
	a := Usage{1, 2, 3, 4, 5, 6}
	if got, want := a.Add(a), (Usage{2, 4, 6, 8, 10, 12}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
