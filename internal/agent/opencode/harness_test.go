package opencode

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/testmodel"
)

// stage is a real OpenCode with a scripted model behind it.
type stage struct {
	model  *testmodel.Server
	place  *hostPlace
	server *Server
	dir    string // a git repository
	root   string
	log    *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// settings are OpenCode's for tests: two providers, both of them the scripted model.
func settings(url string) json.RawMessage {
	data, _ := json.Marshal(map[string]any{
		"share": "disabled", "autoupdate": false, "disabled_providers": []string{"opencode"},
		"model": "anthropic/claude-sonnet-4-5", "small_model": "anthropic/claude-sonnet-4-5",
		"permission": map[string]any{"*": "allow", "external_directory": "allow", "doom_loop": "allow"},
		// Rules of a conversation are not those of its sub-agents.
		"agent": map[string]any{"general": map[string]any{"permission": map[string]any{"bash": map[string]any{"*": "allow", "printf *": "ask"}}}},
		"provider": map[string]any{
			"anthropic": map[string]any{"options": map[string]any{"baseURL": url, "apiKey": "key-of-the-test"}},
			"local": map[string]any{
				"npm": "@ai-sdk/openai-compatible", "name": "Local", "options": map[string]any{"baseURL": url, "apiKey": "key-of-the-other"},
				"models": map[string]any{"big": map[string]any{"name": "Big"}, "small": map[string]any{
					"name": "Small", "limit": map[string]any{"context": 20000, "output": 1000},
				}},
			},
		},
	})
	return data
}

func newStage(change func(*Config)) (*stage, error) {
	binary, err := program()
	if err != nil {
		return nil, err
	}
	root, err := os.MkdirTemp("", "executord-opencode-")
	if err != nil {
		return nil, err
	}
	st := &stage{root: root, dir: filepath.Join(root, "repo"), model: testmodel.New(), log: new(lockedBuffer)}
	home := filepath.Join(root, "home")
	for _, d := range []string{home, st.dir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(st.dir, "main.txt"), []byte("one\ntwo\nthree\n"), 0o600); err != nil {
		return nil, err
	}
	for _, args := range [][]string{{"init", "-q", "-b", "main"}, {"add", "-A"}, {"commit", "-q", "-m", "first"}} {
		if err := git(st.dir, args...); err != nil {
			return nil, err
		}
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	st.place = newHostPlace(root, home)
	cfg := Config{
		Place: st.place, Logger: slog.New(slog.NewTextHandler(st.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Program: binary, Dir: st.dir, Home: home, Port: port, Content: settings(st.model.URL()),
	}
	if change != nil {
		change(&cfg)
	}
	st.server, err = Start(context.Background(), cfg)
	return st, err
}

func (st *stage) close() error {
	ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
	defer stop()
	var err error
	if st.server != nil {
		err = st.server.Stop(ctx)
	}
	st.model.Close()
	if left := st.place.processes(false); len(left) > 0 {
		err = fmt.Errorf("processes are left: %v", left)
	}
	os.RemoveAll(st.root)
	return err
}

// shared is the stage of the tests that leave it as it was.
var shared struct {
	once  sync.Once
	stage *stage
	err   error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.stage != nil {
		if err := shared.stage.close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func sharedStage(t *testing.T) *stage {
	t.Helper()
	shared.once.Do(func() { shared.stage, shared.err = newStage(nil) })
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.stage
}

// ownStage is one for a test that breaks it.
func ownStage(t *testing.T, change func(*Config)) *stage {
	t.Helper()
	st, err := newStage(change)
	if st != nil {
		t.Cleanup(func() {
			if err := st.close(); err != nil {
				t.Error(err)
			}
			if t.Failed() {
				t.Log(st.log.String())
			}
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func (st *stage) conversation(t *testing.T, cfg ConversationConfig) *Conversation {
	t.Helper()
	c, err := st.server.NewConversation(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// take is a turn as it was told.
type take struct {
	t       *testing.T
	c       *Conversation
	mu      sync.Mutex
	events  []agent.Event // guarded by mu
	seen    chan struct{} // closed and made anew with each event; guarded by mu
	done    chan struct{}
	outcome agent.Outcome
	err     error
}

var promptCount struct {
	sync.Mutex
	n int
}

func promptID() string {
	promptCount.Lock()
	defer promptCount.Unlock()
	promptCount.n++
	return fmt.Sprintf("t%d-%d", os.Getpid(), promptCount.n)
}

func prompt(script string) agent.Prompt {
	return agent.Prompt{ID: promptID(), Text: "Do it. [[script:" + script + "]]", Model: agent.Model{Provider: "anthropic", Model: "claude-sonnet-4-5"}}
}

// begin gives a prompt and does not wait for its end.
func begin(t *testing.T, c *Conversation, p agent.Prompt) *take {
	return beginWith(t, c, func(ctx context.Context, tell func(agent.Event) error) (agent.Outcome, error) {
		return c.Prompt(ctx, p, tell)
	})
}

func beginWith(t *testing.T, c *Conversation, run func(context.Context, func(agent.Event) error) (agent.Outcome, error)) *take {
	k := &take{t: t, c: c, seen: make(chan struct{}), done: make(chan struct{})}
	ctx, stop := context.WithTimeout(context.Background(), 60*time.Second)
	go func() {
		defer stop()
		defer close(k.done)
		k.outcome, k.err = run(ctx, func(e agent.Event) error {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.events = append(k.events, e)
			close(k.seen)
			k.seen = make(chan struct{})
			return nil
		})
	}()
	t.Cleanup(func() { <-k.done })
	return k
}

// until waits for an event.
func (k *take) until(what string, is func(agent.Event) bool) agent.Event {
	k.t.Helper()
	deadline := time.After(30 * time.Second)
	for from := 0; ; {
		k.mu.Lock()
		events, seen := k.events, k.seen
		k.mu.Unlock()
		for ; from < len(events); from++ {
			if is(events[from]) {
				return events[from]
			}
		}
		select {
		case <-seen:
		case <-k.done:
			k.t.Fatalf("the turn ended without %s: %v %+v\n%s", what, k.err, k.outcome, k.String())
		case <-deadline:
			k.t.Fatalf("no %s:\n%s", what, k.String())
		}
	}
}

// wait waits for the end.
func (k *take) wait() *take {
	k.t.Helper()
	<-k.done
	if k.err != nil {
		k.t.Fatalf("%v\n%s", k.err, k.String())
	}
	return k
}

func (k *take) String() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return strings.Join(story(k.events), "\n")
}

// story tells events in short lines, with names for ids; the pieces of a part are joined.
func story(events []agent.Event) []string {
	names := make(map[string]string)
	count := make(map[string]int)
	name := func(kind, id string) string {
		if id == "" {
			return "-"
		}
		if names[id] == "" {
			count[kind]++
			names[id] = fmt.Sprintf("%s%d", kind, count[kind])
		}
		return names[id]
	}
	var lines []string
	open := make(map[string]int) // part or call: the line that its pieces go to
	for _, e := range events {
		who := ""
		if e.SubAgent != "" {
			who = name("agent", e.SubAgent) + ": "
		}
		add := func(format string, args ...any) { lines = append(lines, who+fmt.Sprintf(format, args...)) }
		piece := func(kind, id, text string) {
			if at, ok := open[id]; ok {
				lines[at] += text
				return
			}
			open[id] = len(lines)
			add("%s %s", kind, text)
		}
		switch {
		case e.Text != nil:
			piece("text "+name("part", e.Text.Part), e.Text.Part, e.Text.Text)
		case e.Reasoning != nil:
			piece("reasoning "+name("part", e.Reasoning.Part), e.Reasoning.Part, e.Reasoning.Text)
		case e.PartEnded != nil:
			delete(open, e.PartEnded.Part)
			if e.PartEnded.Text != nil {
				add("ended %s is %q", name("part", e.PartEnded.Part), *e.PartEnded.Text)
			} else {
				add("ended %s", name("part", e.PartEnded.Part))
			}
		case e.PartsDropped != nil:
			var ids []string
			for _, id := range e.PartsDropped.Parts {
				ids = append(ids, name("part", id))
			}
			add("dropped %s", strings.Join(ids, " "))
		case e.ToolStarted != nil:
			add("tool %s %s %s", name("call", e.ToolStarted.Call), e.ToolStarted.Tool, e.ToolStarted.Input)
		case e.ToolOutput != nil:
			piece("output "+name("call", e.ToolOutput.Call), "output"+e.ToolOutput.Call, e.ToolOutput.Text)
		case e.ToolEnded != nil:
			d := e.ToolEnded
			line := fmt.Sprintf("tool ended %s", name("call", d.Call))
			if d.ExitCode != nil {
				line += fmt.Sprintf(" exit %d", *d.ExitCode)
			}
			if d.Output != "" {
				line += fmt.Sprintf(" output %q", d.Output)
			}
			if d.Error != "" {
				line += fmt.Sprintf(" error %q", d.Error)
			}
			add("%s", line)
		case e.FileChanged != nil:
			add("file %s %s +%d -%d patch %t", filepath.Base(e.FileChanged.Path), e.FileChanged.Change, e.FileChanged.Additions, e.FileChanged.Deletions, e.FileChanged.Patch != "")
		case e.Todos != nil:
			var items []string
			for _, i := range e.Todos.Items {
				items = append(items, i.Text+"="+i.Status)
			}
			add("todos %s", strings.Join(items, ","))
		case e.Asked != nil && e.Asked.Permission != nil:
			add("asked %s %s %s for %s", name("ask", e.Asked.ID), e.Asked.Permission.Kind, strings.Join(e.Asked.Permission.Patterns, ","), name("call", e.Asked.Call))
		case e.Asked != nil:
			add("asked %s %q for %s", name("ask", e.Asked.ID), e.Asked.Question.Items[0].Text, name("call", e.Asked.Call))
		case e.Answered != nil:
			add("answered %s", name("ask", e.Answered.ID))
		case e.SubAgentStarted != nil:
			add("sub-agent %s for %s", name("agent", e.SubAgentStarted.ID), name("call", e.SubAgentStarted.Call))
		case e.SubAgentEnded != nil:
			add("sub-agent ended %s %s", name("agent", e.SubAgentEnded.ID), used(e.SubAgentEnded.Usage))
		case e.Usage != nil:
			add("usage %s", used(*e.Usage))
		case e.Retry != nil:
			add("retry %d %s", e.Retry.Attempt, e.Retry.Message)
		case e.Compaction != nil:
			add("compaction automatic=%t", e.Compaction.Automatic)
		case e.Error != nil:
			add("error %s %d %s", e.Error.Name, e.Error.StatusCode, e.Error.Message)
		case e.Restarted != nil:
			add("restarted %s", e.Restarted.Detail)
		default:
			add("nothing")
		}
	}
	return lines
}

func used(u agent.Usage) string {
	return fmt.Sprintf("in=%d out=%d read=%d write=%d", u.InputTokens, u.OutputTokens, u.CacheReadTokens, u.CacheWriteTokens)
}
