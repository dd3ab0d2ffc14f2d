package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/testgit"
	"github.com/harvest-run/executord/internal/testmodel"
)

// What executord has, and sandboxes must not.
const (
	gitSecret   = "ghp-e2e-canary-8812"
	modelSecret = "sk-e2e-canary-2967"
)

// house is an executord with what sessions with agents need: a git server that wants a
// credential, and a model that answers by scripts.
type house struct {
	*daemon
	t     *testing.T
	c     *client.Client
	git   *testgit.Server
	model *testmodel.Server
}

// newHouse starts it. The image of agents is made of what scripts/test-tools installed.
func newHouse(t *testing.T, flags ...string) *house {
	t.Helper()
	needRoot(t)
	h := &house{t: t, git: testgit.New(t, testgit.Config{Token: gitSecret}), model: testmodel.Start(t)}
	cache := cacheDir()
	if _, err := os.Stat(filepath.Join(cache, "base/node_modules")); err != nil {
		t.Fatalf("%v: run scripts/test-tools", err)
	}
	secrets := t.TempDir()
	for name, value := range map[string]string{"git": gitSecret, "model": modelSecret} {
		if err := os.WriteFile(filepath.Join(secrets, name), []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h.daemon = start(t, append([]string{
		"--images-tools-dir", filepath.Join(cache, "base"),
		"--broker-private-upstreams", strings.TrimPrefix(h.git.URL, "http://"),
		"--broker-private-upstreams", hostOf(t, h.model.URL()),
		"--broker-secrets", "git=file:" + secrets + "/git", "--broker-secrets", "model=file:" + secrets + "/model",
	}, flags...)...)
	h.c = h.dial()
	return h
}

// cacheDir is where scripts/test-tools puts what it installs.
func cacheDir() string {
	if dir := os.Getenv("EXECUTORD_TEST_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/executord-test"
}

func hostOf(t *testing.T, url string) string {
	t.Helper()
	_, rest, _ := strings.Cut(url, "://")
	host, _, _ := strings.Cut(rest, "/")
	if _, _, err := net.SplitHostPort(host); err != nil {
		t.Fatal(err)
	}
	return host
}

// request asks for a session with the scripted model and these repositories.
func (h *house) request(repositories ...string) *executorv1.CreateSessionRequest {
	r := &executorv1.CreateSessionRequest{
		Identity: &executorv1.Identity{Name: "Ada Lovelace", Email: "ada@example.com"},
		Agent: &executorv1.AgentSpec{
			Kind:  executorv1.AgentSpec_KIND_OPENCODE,
			Model: &executorv1.Model{Provider: "anthropic", Model: "claude-sonnet-4-5", BaseUrl: h.model.URL()},
		},
		Credentials: &executorv1.Credentials{Secrets: map[string]string{"GIT_TOKEN": "git", "ANTHROPIC_API_KEY": "model"}},
	}
	for _, url := range repositories {
		r.Repositories = append(r.Repositories, &executorv1.Repository{Url: url})
	}
	return r
}

// in is the house for a subtest.
func (h *house) in(t *testing.T) *house {
	c := *h
	c.t = t
	return &c
}

// session creates one and waits until it runs.
func (h *house) session(r *executorv1.CreateSessionRequest) *executorv1.Session {
	h.t.Helper()
	s, err := h.c.CreateSession(h.t.Context(), r)
	if err != nil {
		h.t.Fatal(err)
	}
	return h.running(s.GetName())
}

// running waits until a session runs.
func (h *house) running(name string) *executorv1.Session {
	h.t.Helper()
	s := h.get(name, 5*time.Minute)
	if s.GetState() != executorv1.Session_STATE_RUNNING {
		h.t.Fatalf("%s is %v: %v %s", name, s.GetState(), s.GetEndReason(), s.GetDetail())
	}
	return s
}

// get is a session, once it no longer starts.
func (h *house) get(name string, wait time.Duration) *executorv1.Session {
	h.t.Helper()
	answer, err := h.c.Sessions().GetSession(h.t.Context(), &executorv1.GetSessionRequest{Name: name, Wait: durationpb.New(wait)})
	if err != nil {
		h.t.Fatal(err)
	}
	return answer.GetSession()
}

// terminate ends a session.
func (h *house) terminate(name string) *executorv1.Session {
	h.t.Helper()
	s, err := h.c.TerminateSession(h.t.Context(), &executorv1.TerminateSessionRequest{Name: name})
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

// run runs a script in a session, which must succeed, and returns what it wrote.
func (h *house) run(session, script string) string {
	h.t.Helper()
	var out, errs strings.Builder
	result, err := h.c.Run(h.t.Context(), &executorv1.ExecuteRequest{Parent: session, Command: bash("set -eu\n" + script)}, &out, &errs)
	if err != nil || result.GetReason() != executorv1.Reason_REASON_EXITED || result.GetExitCode() != 0 {
		h.t.Fatalf("%s: %v %v\n%s\n%s", script, result, err, out.String(), errs.String())
	}
	return out.String()
}

// events of a session so far, until one is as it should be.
func (h *house) watchSession(name string, until func(*executorv1.SessionEvent) bool) []*executorv1.SessionEvent {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 3*time.Minute)
	defer cancel()
	stream, err := h.c.Sessions().WatchSession(ctx, &executorv1.WatchSessionRequest{Name: name})
	if err != nil {
		h.t.Fatal(err)
	}
	var all []*executorv1.SessionEvent
	for {
		answer, err := stream.Recv()
		if err != nil {
			h.t.Fatalf("events of %s: %v after %v", name, err, all)
		}
		if answer.GetEvent().GetHeartbeat() != nil {
			continue
		}
		all = append(all, answer.GetEvent())
		if until(answer.GetEvent()) {
			return all
		}
	}
}

// say asks for the answers of a script.
func say(script string) *executorv1.Prompt {
	return &executorv1.Prompt{Text: "Please do as told. [[script:" + script + "]]"}
}

// follower follows a turn to its end, over losses of the connection.
type follower struct {
	h    *house
	name string // of the turn
	work sync.WaitGroup

	mu      sync.Mutex
	events  []*executorv1.TurnEvent
	changed chan struct{}
	err     error
	over    bool
}

// prompt sends a prompt and follows its turn.
func (h *house) prompt(session string, p *executorv1.Prompt) *follower {
	h.t.Helper()
	f := &follower{h: h, changed: make(chan struct{})}
	stream, err := h.c.Sessions().SendPrompt(h.t.Context(), &executorv1.SendPromptRequest{Parent: session, Prompt: p})
	if err != nil {
		h.t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil || first.GetEvent().GetStarted() == nil {
		h.t.Fatalf("the first event is %v, %v", first, err)
	}
	f.name = first.GetEvent().GetStarted().GetTurn()
	f.events = append(f.events, first.GetEvent())
	f.follow(func() (*executorv1.TurnEvent, error) {
		answer, err := stream.Recv()
		return answer.GetEvent(), err
	})
	return f
}

// watch follows a turn from a cursor.
func (h *house) watch(turn string, after *executorv1.Cursor) *follower {
	f := &follower{h: h, name: turn, changed: make(chan struct{})}
	f.follow(f.watching(after))
	return f
}

func (f *follower) watching(after *executorv1.Cursor) func() (*executorv1.TurnEvent, error) {
	var stream grpc.ServerStreamingClient[executorv1.WatchTurnResponse]
	return func() (*executorv1.TurnEvent, error) {
		if stream == nil {
			var err error
			if stream, err = f.h.c.Sessions().WatchTurn(f.h.t.Context(), &executorv1.WatchTurnRequest{Name: f.name, After: after}); err != nil {
				return nil, err
			}
		}
		answer, err := stream.Recv()
		return answer.GetEvent(), err
	}
}

func (f *follower) follow(next func() (*executorv1.TurnEvent, error)) {
	f.work.Go(func() {
		for {
			e, err := next()
			f.mu.Lock()
			switch {
			case client.Unavailable(err) && f.h.t.Context().Err() == nil:
				var last *executorv1.Cursor
				if n := len(f.events); n > 0 {
					last = f.events[n-1].GetCursor()
				}
				next = f.watching(last)
				f.mu.Unlock()
				time.Sleep(50 * time.Millisecond)
				continue
			case errors.Is(err, io.EOF):
				f.over = true
			case err != nil:
				f.err, f.over = err, true
			case e.GetHeartbeat() == nil:
				f.events = append(f.events, e)
			}
			over := f.over
			close(f.changed)
			f.changed = make(chan struct{})
			f.mu.Unlock()
			if over {
				return
			}
		}
	})
	f.h.t.Cleanup(f.work.Wait)
}

// until waits for an event.
func (f *follower) until(what string, is func(*executorv1.TurnEvent) bool) *executorv1.TurnEvent {
	f.h.t.Helper()
	limit := time.NewTimer(2 * time.Minute)
	defer limit.Stop()
	for {
		f.mu.Lock()
		i := slices.IndexFunc(f.events, is)
		changed, over, err := f.changed, f.over, f.err
		var found *executorv1.TurnEvent
		if i >= 0 {
			found = f.events[i]
		}
		f.mu.Unlock()
		if found != nil {
			return found
		}
		if over {
			f.h.t.Fatalf("the turn is over without %s: %v\n%s", what, err, f.story())
		}
		select {
		case <-changed:
		case <-limit.C:
			f.h.t.Fatalf("no %s within two minutes:\n%s", what, f.story())
		}
	}
}

// result waits for the end of the turn.
func (f *follower) result() *executorv1.TurnResult {
	f.h.t.Helper()
	r := f.until("a result", func(e *executorv1.TurnEvent) bool { return e.GetResult() != nil }).GetResult()
	f.work.Wait()
	if f.err != nil {
		f.h.t.Errorf("the turn's events end with %v", f.err)
	}
	f.check()
	return r
}

// completed waits for the end of the turn, which must be a good one.
func (f *follower) completed() *executorv1.TurnResult {
	f.h.t.Helper()
	r := f.result()
	if r.GetOutcome() != executorv1.TurnOutcome_TURN_OUTCOME_COMPLETED {
		f.h.t.Fatalf("the turn is %v: %s %v\n%s", r.GetOutcome(), r.GetDetail(), r.GetError(), f.story())
	}
	return r
}

// check: events have ascending cursors without a hole, and one result, at the end.
func (f *follower) check() {
	f.h.t.Helper()
	results := 0
	for i, e := range f.events {
		if i > 0 && e.GetCursor().GetSequence() != f.events[i-1].GetCursor().GetSequence()+1 {
			f.h.t.Errorf("%v comes after %v", e.GetCursor(), f.events[i-1].GetCursor())
		}
		if e.GetResult() != nil {
			results++
		}
		if e.GetGap() != nil {
			f.h.t.Errorf("there is a gap: %v", e)
		}
	}
	if results != 1 || f.events[len(f.events)-1].GetResult() == nil {
		f.h.t.Errorf("%d results:\n%s", results, f.story())
	}
}

// story tells the events in short lines; neighbouring pieces of a text are one.
func (f *follower) story() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(tellTurn(f.events), "\n")
}

func tellTurn(events []*executorv1.TurnEvent) []string {
	var lines []string
	part := ""
	for _, e := range events {
		line := ""
		switch {
		case e.GetStarted() != nil:
			line = "started"
		case e.GetRunning() != nil:
			line = "running"
		case e.GetText() != nil:
			if part == e.GetText().GetPart() {
				lines[len(lines)-1] += e.GetText().GetText()
				continue
			}
			part, line = e.GetText().GetPart(), "text "+e.GetText().GetText()
			if e.GetSubAgent() != "" {
				line = "sub-agent: " + line
			}
			lines = append(lines, line)
			continue
		case e.GetPartEnded() != nil:
			continue
		case e.GetToolStarted() != nil:
			line = "tool " + e.GetToolStarted().GetTool()
		case e.GetToolOutput() != nil:
			line = fmt.Sprintf("output %.60q", e.GetToolOutput().GetText())
		case e.GetToolEnded() != nil:
			line = fmt.Sprintf("tool ended %.300q %.300s", e.GetToolEnded().GetOutput(), e.GetToolEnded().GetError())
		case e.GetFileChanged() != nil:
			line = fmt.Sprintf("file %s +%d -%d", e.GetFileChanged().GetPath(), e.GetFileChanged().GetAdditions(), e.GetFileChanged().GetDeletions())
		case e.GetUsage() != nil:
			line = "usage"
		case e.GetResult() != nil:
			line = "result " + strings.TrimPrefix(e.GetResult().GetOutcome().String(), "TURN_OUTCOME_")
		default:
			line = fmt.Sprintf("%.300v", e)
		}
		part = ""
		if e.GetSubAgent() != "" {
			line = "sub-agent: " + line
		}
		lines = append(lines, line)
	}
	return lines
}

// shell is the use of that tool.
func shell(command string) testmodel.Part {
	return testmodel.Tool("bash", map[string]any{"command": command, "description": "run"})
}
