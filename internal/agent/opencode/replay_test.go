package opencode

import (
	"bufio"
	"compress/gzip"
	"encoding/json"
	"flag"
	"io"
	"os"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/agent"
)

var update = flag.Bool("update", false, "write the golden files")

func unzip(t testing.TB, name string) io.Reader {
	t.Helper()
	file, err := os.Open("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	r, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// follower is the translation of one recorded turn.
type follower struct {
	title string
	x     *translation
	told  []agent.Event
}

// What OpenCode 1.18.33 was recorded to tell, in some forty situations, with what becomes
// of it. A later OpenCode that tells otherwise shows here first.
func TestRecorded(t *testing.T) {
	var turns []*follower
	asked := make(map[string]bool)
	children := make(map[string]bool)
	lines := bufio.NewReader(unzip(t, "recorded.jsonl.gz"))
	scenario := ""
	finish := func() {
		for _, f := range turns {
			f.x.close("over")
		}
	}
	var all []*follower
	for {
		line, err := readLine(lines)
		if err != nil {
			break
		}
		var labelled struct{ Scenario string }
		if err := json.Unmarshal(line, &labelled); err != nil {
			t.Fatal(err)
		}
		if labelled.Scenario != scenario {
			finish()
			scenario, turns = labelled.Scenario, nil
		}
		e, err := decodeEvent(line)
		if err != nil {
			t.Fatalf("%s: %v: %s", scenario, err, line)
		}
		if e.session != nil && e.session.ParentID != "" {
			children[e.session.ID] = true
		}
		if m := e.message; m != nil && m.Role == "user" && !asked[m.ID] && !children[m.SessionID] {
			asked[m.ID] = true
			f := &follower{title: scenario}
			f.x = newTranslation(m.SessionID, m.ID, "/workspace/app", func(e agent.Event) error { f.told = append(f.told, e); return nil })
			turns, all = append(turns, f), append(all, f)
		}
		for _, f := range turns {
			f.x.event(e)
		}
	}
	finish()
	var got strings.Builder
	for _, f := range all {
		got.WriteString("== " + f.title + "\n" + strings.Join(story(f.told), "\n") + "\n" + used(f.x.usage) + "\n\n")
	}
	const golden = "testdata/recorded.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := gocmp.Diff(strings.Split(string(want), "\n"), strings.Split(got.String(), "\n")); d != "" {
		t.Errorf("events (-want +got):\n%s", d)
	}
}

// Events that come once more, as after a loss, are not told once more.
func TestRecordedTwice(t *testing.T) {
	lines := bufio.NewReader(unzip(t, "recorded.jsonl.gz"))
	type turn struct {
		x    *translation
		told []agent.Event
	}
	turns := make(map[string]*turn)
	for {
		line, err := readLine(lines)
		if err != nil {
			break
		}
		e, err := decodeEvent(line)
		if err != nil {
			t.Fatal(err)
		}
		if m := e.message; m != nil && m.Role == "user" && turns[m.SessionID] == nil {
			f := new(turn)
			f.x = newTranslation(m.SessionID, m.ID, "/", func(e agent.Event) error { f.told = append(f.told, e); return nil })
			turns[m.SessionID] = f
		}
		f := turns[e.SessionID]
		if f == nil || e.Type == "message.part.delta" || e.Type == "session.status" || e.Type == "permission.asked" || e.Type == "question.asked" {
			if f != nil {
				f.x.event(e)
			}
			continue
		}
		f.x.event(e)
		before := len(f.told)
		f.x.event(e)
		if len(f.told) > before {
			t.Fatalf("told again: %s of %s", story(f.told[before:]), line)
		}
	}
	if len(turns) < 30 {
		t.Errorf("only %d turns were recorded", len(turns))
	}
}

// Every line that the events may have, and every order of them, is survived, and makes
// events that go into a log.
func FuzzEvents(f *testing.F) {
	lines := bufio.NewReader(unzip(f, "recorded.jsonl.gz"))
	for n := 0; ; n++ {
		line, err := readLine(lines)
		if err != nil {
			break
		}
		if n%37 == 0 {
			f.Add(string(line))
		}
	}
	f.Add(`{"payload":{"type":"message.part.updated","properties":{"sessionID":"ses_1","part":{"type":"tool","id":"p","messageID":"m","state":{"status":"completed","metadata":{"sessionId":"ses_1","exit":1e400}}}}}}`)
	f.Fuzz(func(t *testing.T, data string) {
		var told []agent.Event
		x := newTranslation("ses_1", "msg_1", "/w", func(e agent.Event) error { told = append(told, e); return nil })
		x.event(event{Type: "message.updated", SessionID: "ses_1", message: &message{ID: "m", Role: "assistant", ParentID: "msg_1"}})
		for line := range strings.SplitSeq(data, "\n") {
			e, err := decodeEvent([]byte(line))
			if err != nil {
				continue
			}
			e.SessionID = "ses_1"
			if e.MessageID != "" {
				e.MessageID = "m"
			}
			if e.Part != nil {
				e.Part.MessageID = "m"
			}
			x.event(e)
			x.event(e)
		}
		x.close("over")
		if _, err := json.Marshal(told); err != nil {
			t.Fatal(err)
		}
	})
}

// The calls and the fields that are used are in OpenCode's own description of its API.
func TestContract(t *testing.T) {
	var spec struct {
		Paths      map[string]map[string]any
		Components struct {
			Schemas map[string]struct{ Properties map[string]any }
		}
	}
	if err := json.NewDecoder(unzip(t, "openapi.json.gz")).Decode(&spec); err != nil {
		t.Fatal(err)
	}
	for _, call := range []string{
		"get /global/health", "get /global/event", "get /mcp", "post /session", "get /session/{sessionID}", "get /session/status",
		"post /session/{sessionID}/message", "get /session/{sessionID}/message", "get /session/{sessionID}/message/{messageID}",
		"post /session/{sessionID}/abort", "get /session/{sessionID}/todo", "get /session/{sessionID}/diff",
		"get /permission", "post /permission/{requestID}/reply", "get /question", "post /question/{requestID}/reply", "post /question/{requestID}/reject",
	} {
		method, path, _ := strings.Cut(call, " ")
		if spec.Paths[path][method] == nil {
			t.Errorf("there is no %s", call)
		}
	}
	for schema, fields := range map[string]string{
		"Session":           "id parentID title",
		"UserMessage":       "id sessionID role time summary",
		"AssistantMessage":  "id sessionID role parentID finish error tokens cost path time summary",
		"TextPart":          "id messageID type text time",
		"ReasoningPart":     "id messageID type text time",
		"ToolPart":          "id messageID type callID tool state",
		"StepFinishPart":    "id messageID type cost tokens",
		"CompactionPart":    "id messageID type auto",
		"PermissionRequest": "id sessionID permission patterns metadata tool",
		"QuestionRequest":   "id sessionID questions tool",
		"SnapshotFileDiff":  "file patch additions deletions status",
		"Todo":              "content status priority",
	} {
		for field := range strings.FieldsSeq(fields) {
			if _, ok := spec.Components.Schemas[schema].Properties[field]; !ok {
				t.Errorf("%s has no %s", schema, field)
			}
		}
	}
}
