package opencode

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/testmodel"
)

func bash(command string) testmodel.Part {
	return testmodel.Tool("bash", map[string]any{"command": command, "description": "run"})
}

// compare looks at a whole turn, event by event.
func (k *take) compare(want ...string) {
	k.t.Helper()
	k.mu.Lock()
	got := story(k.events)
	k.mu.Unlock()
	for i := range got {
		got[i] = strings.ReplaceAll(got[i], k.c.cfg.Directory, "DIR")
	}
	if d := cmp.Diff(want, got); d != "" {
		k.t.Errorf("events (-want +got):\n%s", d)
	}
}

func (k *take) ended(kind agent.OutcomeKind) {
	k.t.Helper()
	if k.outcome.Kind != kind {
		k.t.Errorf("the outcome is %s, want %s: %+v", k.outcome.Kind, kind, k.outcome)
	}
}

const step = "usage in=100 out=10 read=5 write=7"

func TestTurn(t *testing.T) {
	st := sharedStage(t)
	st.model.Script("tools",
		testmodel.Step{Parts: []testmodel.Part{testmodel.Reasoning("I think about it. "), testmodel.Text("A list. "), testmodel.Tool("todowrite", map[string]any{
			"todos": []any{map[string]any{"content": "x", "status": "in_progress", "priority": "high"}},
		})}},
		testmodel.Say("Now a file. ", testmodel.Tool("write", map[string]any{"filePath": st.dir + "/new.txt", "content": "a\nb\n"})),
		testmodel.Say("And a change. ", testmodel.Tool("edit", map[string]any{"filePath": st.dir + "/new.txt", "oldString": "b", "newString": "c"})),
		testmodel.Say("A command fails. ", bash("echo out; echo err >&2; exit 3")),
		testmodel.Say("All is done."),
	)
	k := begin(t, st.conversation(t, ConversationConfig{}), prompt("tools")).wait()
	k.ended(agent.Completed)
	k.compare(
		"reasoning part1 I think about it. ", "ended part1",
		"text part2 A list. ", "ended part2",
		"todos x=in_progress",
		`tool call1 todowrite {"todos":[{"content":"x","priority":"high","status":"in_progress"}]}`,
		`tool ended call1 output "[\n  {\n    \"content\": \"x\",\n    \"status\": \"in_progress\",\n    \"priority\": \"high\"\n  }\n]"`,
		step,
		"text part3 Now a file. ", "ended part3",
		`tool call2 write {"content":"a\nb\n","filePath":"DIR/new.txt"}`,
		`tool ended call2 output "Wrote file successfully."`,
		"file new.txt ADDED +2 -0 patch true",
		step,
		"text part4 And a change. ", "ended part4",
		`tool call3 edit {"filePath":"DIR/new.txt","newString":"c","oldString":"b"}`,
		`tool ended call3 output "Edit applied successfully."`,
		"file new.txt MODIFIED +1 -1 patch true",
		step,
		"text part5 A command fails. ", "ended part5",
		`tool call4 bash {"command":"echo out; echo err >&2; exit 3","description":"run"}`,
		"output call4 out\nerr\n",
		`tool ended call4 exit 3 output "out\nerr\n"`,
		step,
		"text part6 All is done.", "ended part6",
		step,
	)
	if want := (agent.Usage{InputTokens: 500, OutputTokens: 50, CacheReadTokens: 25, CacheWriteTokens: 35}); !sameTokens(k.outcome.Usage, want) || k.outcome.Usage.CostMicros == 0 {
		t.Errorf("usage %+v, want %+v and a cost", k.outcome.Usage, want)
	}
	if k.outcome.Text != "All is done." {
		t.Errorf("text %q", k.outcome.Text)
	}
	if d := k.outcome.Diffs; len(d) != 1 || d[0].Path != st.dir+"/new.txt" || d[0].Change != agent.FileAdded || !strings.Contains(d[0].Patch, "+a\n+c\n") {
		t.Errorf("changes of the whole turn: %+v", d)
	}

	requests := st.model.Requests("tools")
	if first := requests[0]; first.Header.Get("X-Api-Key") != "key-of-the-test" || first.Model != "claude-sonnet-4-5" || !slices.Contains(first.Tools, "bash") {
		t.Errorf("the model was asked as %q with %v and key %q", first.Model, first.Tools, first.Header.Get("X-Api-Key"))
	}
	if last := requests[len(requests)-1].LastResult(); last != "out\nerr\n" {
		t.Errorf("the model was told %q", last)
	}

	messages, err := k.c.Messages(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(messages) != 6 || !messages[0].FromUser || messages[0].ID != messages[1].Prompt || messages[1].Tools[0].Tool != "todowrite" || messages[5].Text != "All is done." {
		t.Errorf("messages %+v", messages)
	}
	if status, err := st.server.MCP(t.Context()); err != nil || len(status) != 0 {
		t.Errorf("tools of servers: %v %v", status, err)
	}
	if err := os.Remove(st.dir + "/new.txt"); err != nil {
		t.Error(err)
	}
}

func sameTokens(a, b agent.Usage) bool {
	a.CostMicros, b.CostMicros = 0, 0
	return a == b
}

// Two providers, two conversations, at once.
func TestConversationsAtOnce(t *testing.T) {
	st := sharedStage(t)
	st.model.Script("one", testmodel.Step{Parts: []testmodel.Part{testmodel.Text("one two three four five six")}, Pace: 30 * time.Millisecond})
	st.model.Script("other",
		testmodel.Step{Parts: []testmodel.Part{testmodel.Reasoning("hm hm "), testmodel.Text("tools "), bash("until [ -e mark ]; do sleep 0.05; done; rm mark; echo A"), bash("touch mark; echo B")}},
		testmodel.Say("both done"),
	)
	a, b := st.conversation(t, ConversationConfig{}), st.conversation(t, ConversationConfig{})
	one := begin(t, a, prompt("one"))
	p := prompt("other")
	p.Model = agent.Model{Provider: "local", Model: "big"}
	other := begin(t, b, p)
	one.until("text", func(e agent.Event) bool { return e.Text != nil })
	if _, err := a.Prompt(t.Context(), prompt("one"), nil); err != agent.ErrBusy {
		t.Errorf("a prompt at the same time: %v", err)
	}
	one.wait().compare("text part1 one two three four five six", "ended part1", step)
	one.ended(agent.Completed)
	other.wait().ended(agent.Completed)
	var started, ended []string
	for _, e := range other.events {
		switch {
		case e.ToolStarted != nil && ended == nil:
			started = append(started, e.ToolStarted.Call)
		case e.ToolEnded != nil:
			ended = append(ended, e.ToolEnded.Call+" "+e.ToolEnded.Output)
		}
	}
	// The first needs the second: they run at the same time.
	slices.Sort(ended)
	if want := []string{started[0] + " A\n", started[1] + " B\n"}; !slices.Equal(ended, want) {
		t.Errorf("tools ended %q, want %q", ended, want)
	}
	if got := final(other.events); got != "hm hm tools both done" {
		t.Errorf("text %q", got)
	}
	request := st.model.Requests("other")[0]
	if request.Path != "/v1/chat/completions" || request.Header.Get("Authorization") != "Bearer key-of-the-other" {
		t.Errorf("asked at %s as %q", request.Path, request.Header.Get("Authorization"))
	}
}

func TestPermissions(t *testing.T) {
	st := sharedStage(t)
	ask := ConversationConfig{Permissions: []Rule{{"bash", "*", "ask"}}}
	asked := func(e agent.Event) bool { return e.Asked != nil }
	t.Run("once and always", func(t *testing.T) {
		st.model.Script("ask",
			testmodel.Say("One. ", bash("echo 1")), testmodel.Say("Two. ", bash("echo 2")), testmodel.Say("Three. ", bash("echo 3")), testmodel.Say("Done."))
		k := begin(t, st.conversation(t, ask), prompt("ask"))
		first := k.until("a request", asked).Asked
		if err := k.c.Answer(t.Context(), first.ID, agent.Answer{Decision: agent.AllowOnce}); err != nil {
			t.Fatal(err)
		}
		if err := k.c.Answer(t.Context(), first.ID, agent.Answer{Decision: agent.AllowOnce}); err != agent.ErrNotAsked {
			t.Errorf("answered twice: %v", err)
		}
		second := k.until("a second request", func(e agent.Event) bool { return asked(e) && e.Asked.ID != first.ID }).Asked
		if err := k.c.Answer(t.Context(), second.ID, agent.Answer{Decision: agent.AllowAlways}); err != nil {
			t.Fatal(err)
		}
		k.wait().ended(agent.Completed)
		k.compare(
			"text part1 One. ", "ended part1", `tool call1 bash {"command":"echo 1","description":"run"}`, "asked ask1 bash echo 1 for call1", "answered ask1",
			"output call1 1\n", `tool ended call1 exit 0 output "1\n"`, step,
			"text part2 Two. ", "ended part2", `tool call2 bash {"command":"echo 2","description":"run"}`, "asked ask2 bash echo 2 for call2", "answered ask2",
			"output call2 2\n", `tool ended call2 exit 0 output "2\n"`, step,
			"text part3 Three. ", "ended part3", `tool call3 bash {"command":"echo 3","description":"run"}`,
			"output call3 3\n", `tool ended call3 exit 0 output "3\n"`, step,
			"text part4 Done.", "ended part4", step,
		)
	})
	t.Run("reject", func(t *testing.T) {
		st.model.Script("reject", testmodel.Say("One. ", bash("rm -rf x")), testmodel.Say("never"))
		k := begin(t, st.conversation(t, ask), prompt("reject"))
		id := k.until("a request", asked).Asked.ID
		if err := k.c.Answer(t.Context(), id, agent.Answer{Decision: agent.Reject}); err != nil {
			t.Fatal(err)
		}
		k.wait().ended(agent.Rejected)
		k.compare(
			"text part1 One. ", "ended part1", `tool call1 bash {"command":"rm -rf x","description":"run"}`, "asked ask1 bash rm -rf x for call1", "answered ask1",
			`tool ended call1 error "The user rejected permission to use this specific tool call."`, step,
		)
	})
	t.Run("question", func(t *testing.T) {
		st.model.Script("question", testmodel.Say("Which? ", testmodel.Tool("question", map[string]any{"questions": []any{map[string]any{
			"question": "Which database?", "header": "Database", "options": []any{map[string]any{"label": "Postgres", "description": "relational"}, map[string]any{"label": "Redis", "description": "fast"}},
		}}})), testmodel.Say("Good."))
		c := st.conversation(t, ConversationConfig{Permissions: []Rule{{"question", "*", "allow"}}})
		k := begin(t, c, prompt("question"))
		q := k.until("a question", asked).Asked
		if o := q.Question.Items[0].Options; len(o) != 2 || o[1].Label != "Redis" {
			t.Errorf("options %+v", o)
		}
		if err := c.Answer(t.Context(), q.ID, agent.Answer{Labels: [][]string{{"Redis"}}}); err != nil {
			t.Fatal(err)
		}
		k.wait().ended(agent.Completed)
		if r := st.model.Requests("question"); !strings.Contains(r[len(r)-1].LastResult(), "Redis") {
			t.Errorf("the model was told %q", r[len(r)-1].LastResult())
		}
		k = begin(t, c, prompt("question"))
		q = k.until("a question", asked).Asked
		if err := c.Answer(t.Context(), q.ID, agent.Answer{Decision: agent.Reject}); err != nil {
			t.Fatal(err)
		}
		k.wait().ended(agent.Rejected)
	})
}

func TestSubAgent(t *testing.T) {
	st := sharedStage(t)
	st.model.Script("parent",
		testmodel.Say("Delegating. ", testmodel.Tool("task", map[string]any{"description": "look", "prompt": "Look around [[script:child]]", "subagent_type": "general"})),
		testmodel.Say("It has reported."))
	st.model.Script("child", testmodel.Say("Looking. ", bash("printf found")), testmodel.Say("There it is."))
	c := st.conversation(t, ConversationConfig{})
	k := begin(t, c, prompt("parent"))
	e := k.until("a request", func(e agent.Event) bool { return e.Asked != nil })
	if e.SubAgent == "" {
		t.Errorf("the request is not the sub-agent's: %+v", e)
	}
	if err := c.Answer(t.Context(), e.Asked.ID, agent.Answer{Decision: agent.AllowOnce}); err != nil {
		t.Fatal(err)
	}
	k.wait().ended(agent.Completed)
	var got []string
	for _, line := range story(k.events) {
		if line = strings.ReplaceAll(line, e.SubAgent, "ID"); strings.HasPrefix(line, "tool call1") {
			line = "tool call1 task"
		}
		got = append(got, line)
	}
	want := []string{
		"text part1 Delegating. ", "ended part1", "tool call1 task", "sub-agent agent1 for call1",
		"agent1: text part2 Looking. ", "agent1: ended part2", `agent1: tool call2 bash {"command":"printf found","description":"run"}`,
		"agent1: asked ask1 bash printf found for call2", "agent1: answered ask1", "agent1: output call2 found", `agent1: tool ended call2 exit 0 output "found"`, "agent1: " + step,
		"agent1: text part3 There it is.", "agent1: ended part3", "agent1: " + step,
		"sub-agent ended agent1 in=200 out=20 read=10 write=14",
		`tool ended call1 output "<task id=\"ID\" state=\"completed\">\n<task_result>\nThere it is.\n</task_result>\n</task>"`, step,
		"text part4 It has reported.", "ended part4", step,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("events (-want +got):\n%s", d)
	}
	if k.outcome.Usage.InputTokens != 400 {
		t.Errorf("the sub-agent's use is not in %+v", k.outcome.Usage)
	}
}

func TestAnswerIsCutOff(t *testing.T) {
	st := sharedStage(t)
	st.model.Script("long", testmodel.Step{Parts: []testmodel.Part{testmodel.Text("It goes on and")}, Stop: "max_tokens"})
	k := begin(t, st.conversation(t, ConversationConfig{}), prompt("long")).wait()
	k.ended(agent.Truncated)
	k.compare("text part1 It goes on and", "ended part1", step)
}

// A history that is too long for the model is made shorter in the turn, and the turn goes
// on.
func TestCompaction(t *testing.T) {
	st := sharedStage(t)
	st.model.Script("full", testmodel.Step{Parts: []testmodel.Part{testmodel.Text("Much. "), bash("echo much")}, Usage: testmodel.Usage{Input: 19900, Output: 50}})
	st.model.Script("full"+testmodel.Continued, testmodel.Say("On with it."))
	p := prompt("full")
	p.Model = agent.Model{Provider: "local", Model: "small"}
	k := begin(t, st.conversation(t, ConversationConfig{}), p).wait()
	k.ended(agent.Completed)
	if k.outcome.Text != "On with it." {
		t.Errorf("the last text is %q", k.outcome.Text)
	}
	k.compare(
		"text part1 Much. ", `tool call1 bash {"command":"echo much","description":"run"}`, "ended part1", "output call1 much\n", `tool ended call1 exit 0 output "much\n"`,
		"usage in=19900 out=50 read=0 write=0", "compaction automatic=true", "usage in=100 out=10 read=5 write=0",
		"text part2 On with it.", "ended part2", "usage in=100 out=10 read=5 write=0",
	)
}

// A repository's own configuration would have a program started. Nor is anything fetched.
func TestHostileRepository(t *testing.T) {
	st := sharedStage(t)
	dir := filepath.Join(st.root, "a hostile repo")
	if err := os.MkdirAll(filepath.Join(dir, ".opencode"), 0o700); err != nil {
		t.Fatal(err)
	}
	config := `{"mcp":{"evil":{"type":"local","command":["/bin/sh","-c","touch ` + st.root + `/evil"]}},"permission":{"*":"deny"}}`
	for _, name := range []string{"opencode.json", ".opencode/opencode.json"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := git(dir, "init", "-q"); err != nil {
		t.Fatal(err)
	}
	st.model.Script("hostile", testmodel.Say("Where? ", bash("pwd")), testmodel.Say("There."))
	k := begin(t, st.conversation(t, ConversationConfig{Directory: dir}), prompt("hostile")).wait()
	k.ended(agent.Completed)
	if ended := k.until("the tool's end", func(e agent.Event) bool { return e.ToolEnded != nil }).ToolEnded; ended.Output != dir+"\n" {
		t.Errorf("it works in %q, want %q", ended.Output, dir)
	}
	if servers, err := st.server.MCP(t.Context()); err != nil || len(servers) != 0 {
		t.Errorf("servers of tools: %+v %v", servers, err)
	}
	if _, err := os.Stat(st.root + "/evil"); err == nil {
		t.Error("the repository's program was started")
	}
	for _, name := range []string{".config/opencode/node_modules/*", ".cache/opencode/packages/*", ".local/share/opencode/bin/*"} {
		if found, _ := filepath.Glob(filepath.Join(st.place.home, name)); len(found) > 0 {
			t.Errorf("fetched: %v", found)
		}
	}
}

func TestProcess(t *testing.T) {
	s := &Server{cfg: Config{
		Program: "/opt/opencode", Dir: "/workspace", Home: "/root", Port: 8080, ConfigFile: "/app/opencode.json",
		Content: []byte(`{"model":"a/b"}`), Auth: `{"anthropic":{"type":"oauth","refresh":"secret"}}`, Env: []string{"X=1"},
	}}
	p := s.process("opencode-x", "password")
	for _, want := range []string{
		"HOME=/root", "OPENCODE_SERVER_PASSWORD=password", "OPENCODE_CONFIG=/app/opencode.json", `OPENCODE_CONFIG_CONTENT={"model":"a/b"}`,
		`OPENCODE_AUTH_CONTENT={"anthropic":{"type":"oauth","refresh":"secret"}}`, "OPENCODE_DISABLE_PROJECT_CONFIG=1", "OPENCODE_DISABLE_MODELS_FETCH=1",
		"OPENCODE_DISABLE_AUTOUPDATE=1", "OPENCODE_DISABLE_DEFAULT_PLUGINS=1", "OPENCODE_DISABLE_LSP_DOWNLOAD=1", "X=1",
	} {
		if !slices.Contains(p.Env, want) {
			t.Errorf("the environment has no %s", want)
		}
	}
	args := strings.Join(p.Args, " ")
	if !strings.HasSuffix(args, "/opt/opencode serve --port 8080 --hostname 127.0.0.1 --print-logs --log-level INFO") || strings.Contains(args, "password\n") || strings.Contains(args, "secret") {
		t.Errorf("arguments %q", args)
	}
}
