package session

import (
	"time"

	"github.com/harvest-run/executord/internal/engine"
)

// Details are what a session was made with beside its sandbox, and what became of it.
// They hold no credentials, only the names of those that the configuration has.
type Details struct {
	// Repositories are cloned when it starts; Checkouts are what came of it.
	Repositories []Repository `json:"repositories,omitempty"`
	Checkouts    []Checkout   `json:"checkouts,omitempty"`
	Identity     Identity     `json:"identity,omitzero"`
	// Agent is nil for a plain sandbox.
	Agent *AgentSpec `json:"agent,omitempty"`
	// Conversation is the agent's id of its conversation; "" before there is one.
	Conversation string `json:"conversation,omitempty"`
	// Secrets are names of configured secrets by the names that the session knows them by.
	Secrets map[string]string `json:"secrets,omitempty"`
	// Inline are the names of the credentials that were given with the session, which are
	// in memory only.
	Inline []string `json:"inline,omitempty"`
	// IdleTimeout is after how long without anything that runs IdleAction is taken; 0 never.
	IdleTimeout time.Duration `json:"idle_timeout,omitempty"`
	IdleAction  IdleAction    `json:"idle_action,omitempty"`
	// Placement is what was asked for.
	Placement engine.Placement `json:"placement,omitzero"`
	// Image is what was asked for, by name; "" for the default.
	Image string `json:"image,omitempty"`
	// Base is the image that its first sandbox was made from.
	Base engine.ImageRef `json:"base,omitempty"`
	// Snapshot is what its next sandbox is made from; "" while it has one.
	Snapshot engine.ImageRef `json:"snapshot,omitempty"`
	// Borrowed says that the snapshot is another session's, which removes it.
	Borrowed bool `json:"borrowed,omitempty"`
	// HandOver says that what is paused goes on at once.
	HandOver bool `json:"hand_over,omitempty"`
	// Generation counts its sandboxes, from 1.
	Generation int         `json:"generation,omitempty"`
	Saved      []SavedWork `json:"saved,omitempty"`
	// ForkedFrom is the id of the session that it goes on from; "" if none.
	ForkedFrom string `json:"forked_from,omitempty"`
	// Prepared says that its repositories are there: what is made from a snapshot has them.
	Prepared bool `json:"prepared,omitempty"`
	// Status is that of its agent as it was last known.
	Status AgentStatus `json:"status,omitzero"`
	// SandboxDeadline is when its sandbox ends by the engine's own limit; zero if it has none.
	SandboxDeadline time.Time `json:"sandbox_deadline,omitzero"`
}

// IdleAction is what is done with a session in which nothing runs.
type IdleAction string

// The actions. "" is IdleTerminate.
const (
	IdleTerminate IdleAction = "TERMINATE"
	IdlePause     IdleAction = "PAUSE"
)

// Repository is cloned when a session starts.
type Repository struct {
	URL    string `json:"url"`
	Branch string `json:"branch,omitempty"`
	Depth  int    `json:"depth,omitempty"`
	// Directory is its name below /workspace.
	Directory string `json:"directory"`
}

// Checkout is a repository as it was prepared.
type Checkout struct {
	URL    string `json:"url"`
	Path   string `json:"path"`
	Branch string `json:"branch,omitempty"`
	Commit string `json:"commit"`
}

// Identity is who commits.
type Identity struct {
	Name  string `json:"name,omitempty"`
	Email string `json:"email,omitempty"`
}

// AgentSpec is the agent that was asked for.
type AgentSpec struct {
	// Kind is "opencode".
	Kind         string            `json:"kind"`
	Model        Model             `json:"model,omitzero"`
	Interactions InteractionPolicy `json:"interactions,omitzero"`
	Limit        SpendLimit        `json:"limit,omitzero"`
	Instructions string            `json:"instructions,omitempty"`
}

// Model names what turns are answered by.
type Model struct {
	Provider string `json:"provider,omitempty"`
	Model    string `json:"model,omitempty"`
	BaseURL  string `json:"base_url,omitempty"`
}

// InteractionPolicy says what is done about an agent's permission requests and questions.
type InteractionPolicy struct {
	// Mode is "ALLOW", "ASK" or "DENY"; "" is ALLOW.
	Mode string `json:"mode,omitempty"`
	// Timeout is how long an answer is waited for.
	Timeout time.Duration `json:"timeout,omitempty"`
	// Allow says that a permission is granted at its deadline.
	Allow bool `json:"allow,omitempty"`
}

// SpendLimit bounds what turns use; zero fields bound nothing.
type SpendLimit struct {
	CostMicros  int64         `json:"cost_micros,omitempty"`
	Turns       int           `json:"turns,omitempty"`
	TurnTimeout time.Duration `json:"turn_timeout,omitempty"`
}

// AgentStatus is an agent as it is.
type AgentStatus struct {
	State   AgentState  `json:"state,omitempty"`
	Version string      `json:"version,omitempty"`
	Detail  string      `json:"detail,omitempty"`
	MCP     []MCPServer `json:"mcp,omitempty"`
}

// AgentState is where an agent is. The names are those of the API.
type AgentState string

// The states of agents; "" where there is none.
const (
	AgentStarting   AgentState = "STARTING"
	AgentReady      AgentState = "READY"
	AgentRestarting AgentState = "RESTARTING"
	AgentFailed     AgentState = "FAILED"
)

// MCPServer is a server of tools for the agent. State is one of the API's.
type MCPServer struct {
	Name   string `json:"name"`
	State  string `json:"state"`
	Detail string `json:"detail,omitempty"`
}

// SavedWork says where work was put before a sandbox went.
type SavedWork struct {
	Path     string          `json:"path,omitempty"`
	Ref      string          `json:"ref,omitempty"`
	Commit   string          `json:"commit,omitempty"`
	Snapshot engine.ImageRef `json:"snapshot,omitempty"`
	Detail   string          `json:"detail,omitempty"`
	Time     time.Time       `json:"time"`
}
