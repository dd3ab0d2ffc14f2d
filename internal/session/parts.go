package session

import (
	"context"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/engine"
)

// Executions is what a session needs of what runs in it.
type Executions interface {
	// EndSession ends all executions of a session and returns when they have ended.
	EndSession(ctx context.Context, sessionID string) error
}

// Turns is what a session needs of the prompts to its agent.
type Turns interface {
	// Attach says that the agent is ready: what waits is run.
	Attach(sessionID string, c agent.Conversation)
	// Detach says that the agent goes, for now: the running turn is ended, what waits stays.
	// It returns when nothing of it uses the agent any more.
	Detach(ctx context.Context, sessionID string, cause error) error
	// EndSession ends all turns of a session and returns when they have ended.
	EndSession(ctx context.Context, sessionID string) error
}

// Images finds what sandboxes start from.
type Images interface {
	// Resolve returns the image of this name on an engine, "" for the one that agents need; that is made
	// if it is missing, which takes minutes and is told of. A fault NotFound
	// (IMAGE_NOT_FOUND).
	Resolve(ctx context.Context, on, name string, tell func(text string)) (engine.ImageRef, error)
}

// Credentials lets sandboxes reach remotes and models without having their credentials.
type Credentials interface {
	// Check returns a fault if something that is named is not there, or something that is
	// needed is missing (CREDENTIALS_REQUIRED).
	Check(w Way) error
	// Open makes the way out of a sandbox, until that ends. For one that an executord before
	// this one opened, or that has one already, it takes the place of that.
	Open(ctx context.Context, sb engine.Sandbox, w Way) error
}

// Way says what a sandbox reaches with credentials.
type Way struct {
	// Values are credentials by name, Secrets names of configured ones.
	Values  map[string]string
	Secrets map[string]string
	// Inline are the names of all values that were given, also before a restart.
	Inline       []string
	Repositories []Repository
	// Model is nil without an agent.
	Model *Model
	// Auth is the content of the agent's file of log-ins; "" for none.
	Auth string
}

// Workspace prepares what lies in /workspace, and saves it.
type Workspace interface {
	// Plan completes repositories as they were asked for: each has a URL and a Directory of
	// its own. A fault Invalid about one of them.
	Plan(all []Repository) ([]Repository, error)
	// Configure sets git up in a new sandbox: identity, rules, the ways to remotes.
	Configure(ctx context.Context, sb engine.Sandbox, id Identity, repositories []Repository) error
	// Clone clones a repository; one that is there already is left as it is.
	Clone(ctx context.Context, sb engine.Sandbox, r Repository, tell func(Progress)) (Checkout, error)
	// MemoryVolume names the volume that has the memory of a repository.
	MemoryVolume(r Repository) string
	// OpenMemory makes the memory of a new sandbox ready; it is mounted.
	OpenMemory(ctx context.Context, sb engine.Sandbox) error
	// CommitMemory makes what the agent remembers part of what all sessions remember; last
	// says that the agent is not going to remember more.
	CommitMemory(ctx context.Context, sb engine.Sandbox, last bool) error
	// Save keeps what was neither committed nor pushed, under a ref of this name where there
	// is a remote that can be written to. whole is false if the sandbox has more than was
	// saved. A SavedWork without a Commit: there was nothing to save.
	Save(ctx context.Context, sb engine.Sandbox, c Checkout, ref string, id Identity) (saved SavedWork, whole bool, err error)
	// Diff tells what differs from what was checked out.
	Diff(ctx context.Context, sb engine.Sandbox, c Checkout) (RepositoryDiff, error)
}

// Progress is how far a clone is.
type Progress struct {
	// Text is git's own.
	Text string
	// Percent of the phase that Text names; -1 where that is not known.
	Percent int
}

// RepositoryDiff is what was changed in a repository.
type RepositoryDiff struct {
	Path      string
	Branch    string
	Files     []agent.FileDiff
	Unpushed  int
	Truncated bool
}

// Agents starts agents in sandboxes.
type Agents interface {
	// Start starts the agent, or goes on with the one that runs in this sandbox, and returns
	// when it takes prompts.
	Start(ctx context.Context, sb engine.Sandbox, start AgentStart) (AgentServer, error)
}

// AgentStart says how an agent is started.
type AgentStart struct {
	Spec AgentSpec
	Way  Way
	// Conversation goes on; "" begins one.
	Conversation string
	// Tell is told how far it is, and later of changes of its state. It must not block.
	Tell func(AgentStatus)
}

// AgentServer is an agent that runs.
type AgentServer interface {
	// Conversation is the one of the session.
	Conversation() agent.Conversation
	// Stop ends the agent in the sandbox in an orderly way.
	Stop(ctx context.Context) error
	// Close lets go of the agent, which runs on.
	Close()
}

// memoryPath is where the memory lies in the sandboxes of agents.
const memoryPath = "/root/.mcp-memory"
