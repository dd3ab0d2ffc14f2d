package session_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/session"
)

// furniture is everything that a session with an agent needs, as names of what was asked
// for. A hook's error is that of the call.
type furniture struct {
	mu    sync.Mutex
	calls []string
	hook  func(ctx context.Context, call string) error
	// unsaved says that the sandbox has more than Save saves.
	unsaved bool
	ways    []session.Way
	starts  []session.AgentStart
}

func (f *furniture) do(ctx context.Context, format string, args ...any) error {
	call := fmt.Sprintf(format, args...)
	f.mu.Lock()
	f.calls = append(f.calls, call)
	hook := f.hook
	f.mu.Unlock()
	if hook != nil {
		return hook(ctx, call)
	}
	return nil
}

// take returns what was asked for since the last time.
func (f *furniture) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

func (f *furniture) parts() session.Parts {
	return session.Parts{Images: images{f}, Credentials: credentials{f}, Workspace: workspace{f}, Agents: agents{f}, Turns: turns{f}}
}

type images struct{ *furniture }

func (f images) Resolve(ctx context.Context, _, name string, tell func(string)) (engine.ImageRef, error) {
	tell("looking for it")
	return "base", f.do(ctx, "image %q", name)
}

type credentials struct{ *furniture }

func (f credentials) Check(w session.Way) error {
	if w.Model != nil && w.Values["KEY"] == "" && w.Secrets["KEY"] == "" {
		return fault.New(fault.FailedPrecondition, "CREDENTIALS_REQUIRED", "KEY is needed")
	}
	return nil
}

func (f credentials) Open(ctx context.Context, sb engine.Sandbox, w session.Way) error {
	f.mu.Lock()
	f.ways = append(f.ways, w)
	f.mu.Unlock()
	return f.do(ctx, "way %s", generation(sb))
}

// generation is what follows the session's id in a sandbox's.
func generation(sb engine.Sandbox) string {
	parts := strings.Split(sb.ID(), "-")
	if len(parts) < 3 {
		return "1"
	}
	return parts[2]
}

type workspace struct{ *furniture }

func (f workspace) Plan(all []session.Repository) ([]session.Repository, error) {
	var planned []session.Repository
	for _, r := range all {
		if r.URL == "bad" {
			return nil, fault.InvalidField("REPOSITORY_URL", "repositories", "bad")
		}
		if r.Directory == "" {
			r.Directory = r.URL[strings.LastIndex(r.URL, "/")+1:]
		}
		planned = append(planned, r)
	}
	return planned, nil
}

func (f workspace) Configure(ctx context.Context, _ engine.Sandbox, id session.Identity, _ []session.Repository) error {
	return f.do(ctx, "configure %s", id.Name)
}

func (f workspace) Clone(ctx context.Context, _ engine.Sandbox, r session.Repository, tell func(session.Progress)) (session.Checkout, error) {
	tell(session.Progress{Text: "Receiving objects", Percent: 50})
	return session.Checkout{URL: r.URL, Path: "/workspace/" + r.Directory, Branch: "main", Commit: "c0ffee"}, f.do(ctx, "clone %s", r.Directory)
}

func (f workspace) MemoryVolume(r session.Repository) string { return "memory-" + r.Directory }

func (f workspace) OpenMemory(ctx context.Context, _ engine.Sandbox) error {
	return f.do(ctx, "open memory")
}

func (f workspace) CommitMemory(ctx context.Context, _ engine.Sandbox, _ bool) error {
	return f.do(ctx, "commit memory")
}

func (f workspace) Save(ctx context.Context, _ engine.Sandbox, c session.Checkout, ref string, _ session.Identity) (session.SavedWork, bool, error) {
	return session.SavedWork{Ref: ref, Commit: "badcab"}, !f.unsaved, f.do(ctx, "save %s", c.Path)
}

func (f workspace) Diff(ctx context.Context, _ engine.Sandbox, c session.Checkout) (session.RepositoryDiff, error) {
	return session.RepositoryDiff{Path: c.Path, Files: []agent.FileDiff{{Path: "a"}}}, f.do(ctx, "diff %s", c.Path)
}

type agents struct{ *furniture }

func (f agents) Start(ctx context.Context, sb engine.Sandbox, start session.AgentStart) (session.AgentServer, error) {
	f.mu.Lock()
	f.starts = append(f.starts, start)
	f.mu.Unlock()
	start.Tell(session.AgentStatus{State: session.AgentStarting})
	if err := f.do(ctx, "agent %s %q", generation(sb), start.Conversation); err != nil {
		return nil, err
	}
	start.Tell(session.AgentStatus{State: session.AgentReady, Version: "fake 1", MCP: []session.MCPServer{{Name: "memory", State: "CONNECTED"}}})
	return server(f), nil
}

type server struct{ *furniture }

func (s server) Conversation() agent.Conversation { return conversation{} }
func (s server) Stop(ctx context.Context) error   { return s.do(ctx, "stop agent") }
func (s server) Close()                           { _ = s.do(context.Background(), "close agent") }

type conversation struct{ agent.Conversation }

func (conversation) ID() string { return "ses_1" }

type turns struct{ *furniture }

func (f turns) Attach(string, agent.Conversation) { _ = f.do(context.Background(), "attach") }
func (f turns) Detach(ctx context.Context, _ string, cause error) error {
	return f.do(ctx, "detach: %v", cause)
}
func (f turns) EndSession(ctx context.Context, _ string) error { return f.do(ctx, "end turns") }

// agentRig is a rig whose sessions can have agents.
func agentRig(t *testing.T, hooks enginefake.Hooks, lifetime time.Duration) (*rig, *furniture) {
	t.Helper()
	f := &furniture{}
	r := &rig{
		t: t, dir: t.TempDir(), store: newMemory(), executions: &executions{}, log: &lockedBuffer{}, parts: f.parts(),
		fake: enginefake.New(enginefake.Config{Hooks: hooks, Limits: engine.Limits{MemoryBytes: 1 << 30}, Lifetime: lifetime}),
	}
	r.fake.AddImage("base")
	t.Cleanup(r.fake.Shutdown)
	r.open()
	return r, f
}

// hostRig is an agentRig that gives out the host's network.
func hostRig(t *testing.T) *rig {
	t.Helper()
	r, _ := agentRig(t, enginefake.Hooks{}, 0)
	network, err := egress.New(egress.Config{Max: engine.NetworkHost, Engine: "fake", Capable: map[string][]engine.Network{"fake": {engine.NetworkNone, engine.NetworkHost}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { network.Close() })
	r.network = network
	r.restart()
	return r
}

// withAgent asks for a session with two repositories and an agent.
func withAgent() session.Request {
	return session.Request{
		Lifetime: time.Hour, Repositories: []session.Repository{{URL: "https://x/o/one"}, {URL: "https://x/o/two", Branch: "b"}},
		Identity: session.Identity{Name: "Ann", Email: "ann@x"}, Agent: &session.AgentSpec{Kind: "opencode"},
		Values: map[string]string{"KEY": "not stored"},
	}
}

// story reads the log of a session that has ended, as a line for each event.
func (r *rig) story(id string) []string {
	r.t.Helper()
	w, err := r.Watch(r.t.Context(), session.Ref{ID: id}, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	defer w.Close()
	var lines []string
	for next := uint64(1); ; next++ {
		e, err := w.Next(r.t.Context())
		if err != nil {
			if n := len(lines); n == 0 || !strings.HasPrefix(lines[n-1], "ended") || slices.ContainsFunc(lines[:n-1], func(s string) bool { return strings.HasPrefix(s, "ended") }) {
				r.t.Errorf("the log ends with %v after %q", err, lines)
			}
			return lines
		}
		if e.Cursor.Sequence != next || e.Gap != nil {
			r.t.Errorf("event %d is at %v: %+v", next, e.Cursor, e.Gap)
		}
		lines = append(lines, lineOf(e))
	}
}

func lineOf(e session.Event) string {
	switch {
	case e.Started != nil:
		return "started"
	case e.Step != nil:
		return strings.TrimSpace(fmt.Sprintf("%s %s %s", e.Step.Kind, e.Step.State, e.Step.Subject))
	case e.Changed != nil:
		return "changed " + e.Changed.State.String()
	case e.Warning != nil:
		return "warning " + e.Warning.Cause
	case e.Turn != nil:
		return "turn " + e.Turn.State
	case e.Execution != nil:
		return fmt.Sprintf("execution %s %v", e.Execution.ID, e.Execution.Ended)
	case e.Asked != nil:
		return fmt.Sprintf("asked %v", e.Asked.Pending)
	case e.Saved != nil:
		return "saved " + e.Saved.Ref
	case e.Replaced != nil:
		return fmt.Sprintf("replaced %d", e.Replaced.Generation)
	case e.Agent != nil:
		return "agent " + string(e.Agent.Status.State)
	case e.Ended != nil:
		return "ended " + string(e.Ended.Reason)
	}
	return "?"
}

// is waits until a session is in a state.
func (r *rig) is(id string, want session.State) session.Session {
	r.t.Helper()
	deadline := time.Now().Add(100 * time.Hour)
	for {
		s := r.get(id)
		if s.State == want {
			return s
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("session %s is %v, not %v: %s", id, s.State, want, r.log)
		}
		time.Sleep(time.Second)
	}
}

var errFull = errors.New("no room")

func journalCursor(e string, n uint64) *journal.Cursor { return &journal.Cursor{Epoch: e, Sequence: n} }
