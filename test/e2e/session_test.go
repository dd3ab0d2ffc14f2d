package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/testmodel"
)

// sums is a repository with a bug that its test finds.
func sums() map[string]string {
	return map[string]string{
		"sums.py":      "def add(a, b):\n    return a - b\n",
		"test_sums.py": "import unittest\nimport sums\n\nclass Test(unittest.TestCase):\n    def test_add(self):\n        self.assertEqual(sums.add(2, 3), 5)\n",
		"page.html":    "<title>Sums</title><h1>Two and three are five</h1>\n",
		".gitignore":   "__pycache__\n",
	}
}

func settled(e *executorv1.SessionEvent) bool {
	return e.GetChanged().GetState() == executorv1.Session_STATE_RUNNING || e.GetEnded() != nil
}

// steps are what was done, in order, as KIND when it began and KIND/STATE when it was over.
func steps(events []*executorv1.SessionEvent) []string {
	var all []string
	for _, e := range events {
		s := e.GetStep()
		kind := strings.TrimPrefix(s.GetKind().String(), "KIND_")
		switch {
		case s == nil || s.GetState() == executorv1.SessionStep_STATE_PROGRESS:
		case s.GetState() == executorv1.SessionStep_STATE_STARTED:
			all = append(all, kind)
		default:
			all = append(all, kind+"/"+strings.TrimPrefix(s.GetState().String(), "STATE_"))
		}
	}
	return all
}

// TestAgentSessions is one executord from its first session on: that builds the image.
func TestAgentSessions(t *testing.T) {
	h := newHouse(t)
	url := h.git.Repository("acme/sums", sums())
	created, err := h.c.CreateSession(t.Context(), h.request(url))
	if err != nil {
		t.Fatal(err)
	}
	name := created.GetName()
	if created.GetState() != executorv1.Session_STATE_STARTING {
		t.Errorf("it is %v at once", created.GetState())
	}
	t.Run("start", func(t *testing.T) { testStart(h.in(t), name) })
	h.running(name)
	for _, sub := range []struct {
		name string
		f    func(h *house, session string)
	}{
		{"fix", testFix},
		{"sub-agent", testSubAgent},
		{"provider", testProvider},
		{"cancel", testCancel},
		{"agent killed", testAgentKilled},
		{"executord killed", testExecutordKilled},
		{"pause and fork", testPauseAndFork},
		{"terminate", testTerminate},
	} {
		if !t.Run(sub.name, func(t *testing.T) { sub.f(h.in(t), name) }) {
			t.Logf("the session: %v", h.get(name, 0))
		}
	}
	t.Run("the next session", func(t *testing.T) { testNext(h.in(t), url) })
	t.Run("hostile repository", func(t *testing.T) { testHostile(h.in(t)) })
}

// testStart: every step is told, in order, with the clone's own progress.
func testStart(h *house, name string) {
	events := h.watchSession(name, settled)
	var want []string
	for _, kind := range []string{"IMAGE", "SANDBOX", "CREDENTIALS", "IDENTITY", "CLONE", "MEMORY", "AGENT"} {
		want = append(want, kind, kind+"/DONE")
	}
	if got := steps(events); !slices.Equal(got, want) {
		h.t.Errorf("steps %v, want %v: %v", got, want, events[len(events)-1])
	}
	var built, cloned bool
	var states []string
	for i, e := range events {
		if e.GetCursor().GetSequence() != uint64(i+1) {
			h.t.Errorf("event %d has %v", i, e.GetCursor())
		}
		built = built || e.GetStep().GetKind() == executorv1.SessionStep_KIND_IMAGE && strings.Contains(e.GetStep().GetText(), "configuration")
		cloned = cloned || e.GetStep().GetKind() == executorv1.SessionStep_KIND_CLONE && e.GetStep().GetText() == "receiving objects" && e.GetStep().GetPercent() == 100
		if a := e.GetAgent(); a != nil {
			states = append(states, a.GetState().String())
		}
	}
	if !built || !cloned || !slices.Contains(states, "STATE_READY") {
		h.t.Errorf("image %v, clone %v, agent %v", built, cloned, states)
	}
}

// testFix: the agent finds out what is wrong, mends it, tries it, commits and pushes,
// remembers, and looks at a page. Two watchers see the same.
func testFix(h *house, name string) {
	t := h.t
	site, err := h.c.Start(t.Context(), &executorv1.StartExecutionRequest{
		Parent: name, Command: bash("cd /workspace/sums && exec python3 -m http.server --bind 127.0.0.1 8123"),
	})
	if err != nil {
		t.Fatal(err)
	}
	h.model.Script("fix",
		testmodel.Step{Parts: []testmodel.Part{testmodel.Reasoning("What is wrong? "), testmodel.Text("I read it. "),
			testmodel.Tool("read", map[string]any{"filePath": "/workspace/sums/sums.py"})}},
		testmodel.Say("It fails. ", shell("python3 -m unittest -q test_sums")),
		testmodel.Say("I mend it. ", testmodel.Tool("edit", map[string]any{"filePath": "/workspace/sums/sums.py", "oldString": "a - b", "newString": "a + b"})),
		testmodel.Say("It works. ", shell("python3 -m unittest -q test_sums && echo all is well")),
		testmodel.Say("I push it. ", shell("git switch -qc fix/sums && git commit -qam 'sums: add' && git push -q && echo pushed")),
		testmodel.Say("I remember it. ", testmodel.Tool("memory_create_entities", map[string]any{"entities": []any{map[string]any{
			"name": "sums", "entityType": "package", "observations": []string{"tests run with unittest"}}}})),
		testmodel.Say("I look at it. ", testmodel.Tool("playwright_browser_navigate", map[string]any{"url": "http://127.0.0.1:8123/page.html"})),
		testmodel.Say("", testmodel.Tool("playwright_browser_snapshot", map[string]any{})),
		testmodel.Say("All is done."),
	)
	f := h.prompt(name, say("fix"))
	other := h.watch(f.name, nil)
	r := f.completed()
	other.result()
	if len(f.events) != len(other.events) {
		t.Errorf("one watcher has %d events, the other %d", len(f.events), len(other.events))
	} else if i := slices.IndexFunc(f.events, func(e *executorv1.TurnEvent) bool {
		return !proto.Equal(e, other.events[e.GetCursor().GetSequence()-f.events[0].GetCursor().GetSequence()])
	}); i >= 0 {
		t.Errorf("event %d: %v and %v", i, f.events[i], other.events[i])
	}

	var tools, order []string
	var output strings.Builder
	for _, line := range tellTurn(f.events) {
		switch word, rest, _ := strings.Cut(line, " "); {
		case strings.HasPrefix(line, "tool ended"):
			output.WriteString(line + "\n")
		case word == "tool":
			tools = append(tools, rest)
		case word == "started" || word == "running" || word == "result":
			order = append(order, word)
		}
	}
	wantTools := []string{"read", "bash", "edit", "bash", "bash", "memory_create_entities", "playwright_browser_navigate", "playwright_browser_snapshot"}
	if !slices.Equal(tools, wantTools) || !slices.Equal(order, []string{"started", "running", "result"}) {
		t.Errorf("tools %v, order %v\n%s", tools, order, f.story())
	}
	for _, want := range []string{"FAIL: test_add", "all is well", "pushed"} {
		if !strings.Contains(output.String(), want) {
			t.Errorf("no tool said %q:\n%s", want, f.story())
		}
	}
	requests := h.model.Requests("fix")
	if last := requests[len(requests)-1]; !strings.Contains(fmt.Sprint(last.Messages), "Two and three are five") {
		t.Errorf("the browser showed %.500s", last.LastResult())
	}
	if r.GetText() != "All is done." || r.GetUsage().GetOutputTokens() != 90 || r.GetUsage().GetCostMicros() == 0 {
		t.Errorf("the result: %v", r)
	}
	changed := f.until("a change", func(e *executorv1.TurnEvent) bool { return e.GetFileChanged() != nil }).GetFileChanged()
	if !strings.HasSuffix(changed.GetPath(), "sums.py") || changed.GetAdditions() != 1 || !strings.Contains(changed.GetPatch(), "+    return a + b") {
		t.Errorf("changed: %v", changed)
	}
	if len(r.GetDiffs()) != 1 || !strings.Contains(r.GetDiffs()[0].GetPatch(), "+    return a + b") {
		t.Errorf("diffs of the turn: %v", r.GetDiffs())
	}

	if got := h.git.Git("acme/sums", "log", "-1", "--format=%an <%ae> %cn %s", "fix/sums"); got != "Ada Lovelace (Harvest) <ada@example.com> Ada Lovelace (Harvest) sums: add" {
		t.Errorf("what was pushed: %s", got)
	}
	if got := h.git.Git("acme/sums", "show", "fix/sums:sums.py"); !strings.Contains(got, "a + b") {
		t.Errorf("what was pushed: %s", got)
	}
	for _, q := range requests {
		if q.Header.Get("X-Api-Key") != modelSecret {
			t.Errorf("the model was shown %q", q.Header.Get("X-Api-Key"))
		}
	}
	secretless(h, name)
	if _, err := h.c.Executor().CancelExecution(t.Context(), &executorv1.CancelExecutionRequest{Name: site.GetName()}); err != nil {
		t.Error(err)
	}
}

// secretless: credentials are neither in the sandbox nor in what executord keeps or tells.
func secretless(h *house, name string) {
	h.t.Helper()
	// The pattern does not match itself where it lies as a script.
	if got := h.run(name, "grep -rlsa 'e2e-[c]anary' /root /workspace /app /tmp /dev/shm /etc /run /var /proc/[0-9]*/environ /proc/[0-9]*/cmdline || true"); got != "" {
		h.t.Errorf("a credential is in the sandbox: %s", got)
	}
	_ = filepath.WalkDir(filepath.Join(h.dir), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.Contains(path, "/local/") {
			return nil
		}
		if text, err := os.ReadFile(path); err == nil && strings.Contains(string(text), "e2e-canary") {
			h.t.Errorf("a credential is in %s", path)
		}
		return nil
	})
}

func testSubAgent(h *house, name string) {
	h.model.Script("parent",
		testmodel.Say("I delegate. ", testmodel.Tool("task", map[string]any{"description": "look", "prompt": "Look around. [[script:child]]", "subagent_type": "general"})),
		testmodel.Say("It has reported."))
	h.model.Script("child", testmodel.Say("Looking. ", shell("printf found")), testmodel.Say("There it is."))
	f := h.prompt(name, say("parent"))
	r := f.completed()
	begun := f.until("a sub-agent", func(e *executorv1.TurnEvent) bool { return e.GetSubAgentStarted() != nil }).GetSubAgentStarted()
	inside := f.until("its tool", func(e *executorv1.TurnEvent) bool { return e.GetSubAgent() != "" && e.GetToolEnded() != nil })
	ended := f.until("its end", func(e *executorv1.TurnEvent) bool { return e.GetSubAgentEnded() != nil }).GetSubAgentEnded()
	if inside.GetSubAgent() != begun.GetId() || inside.GetToolEnded().GetOutput() != "found" || ended.GetUsage().GetOutputTokens() != 20 {
		h.t.Errorf("%v, %v, %v", begun, inside, ended)
	}
	if r.GetUsage().GetOutputTokens() != 40 { // its own and the sub-agent's
		h.t.Errorf("usage %v", r.GetUsage())
	}
}

// testProvider: a provider that is busy is asked again, pieces of a broken answer are taken
// back, and a credential that is refused ends the turn and not the session.
func testProvider(h *house, name string) {
	h.model.Script("troubled", testmodel.Step{
		Parts: []testmodel.Part{testmodel.Text("one two three")}, Pace: 300 * time.Millisecond,
		Failures: []testmodel.Failure{
			{Status: 429, Message: "slow down", RetryAfter: 50 * time.Millisecond}, {After: 2},
		},
	})
	f := h.prompt(name, say("troubled"))
	r := f.completed()
	retry := f.until("a retry", func(e *executorv1.TurnEvent) bool { return e.GetRetry() != nil }).GetRetry()
	f.until("dropped parts", func(e *executorv1.TurnEvent) bool { return len(e.GetPartsDropped().GetParts()) > 0 })
	if r.GetText() != "one two three" || retry.GetAttempt() != 1 {
		h.t.Errorf("%v, %v\n%s", r, retry, f.story())
	}
	h.model.Script("refused", testmodel.Step{Failures: []testmodel.Failure{{Status: 401, Message: "this key is not known"}}})
	r = h.prompt(name, say("refused")).result()
	if r.GetOutcome() != executorv1.TurnOutcome_TURN_OUTCOME_FAILED || r.GetError().GetStatusCode() != 401 || !strings.Contains(r.GetError().GetMessage(), "this key is not known") {
		h.t.Errorf("%v", r)
	}
}
