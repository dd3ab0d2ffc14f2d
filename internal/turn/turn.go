// Package turn is the prompts to the agents of sessions and what the agents do about
// them. Each session has a durable queue of prompts; one turn runs at a time, in order.
// What the agent tells goes into a journal of the turn, which any number of watchers
// follow. A turn outlives executord: it goes on inside the sandbox, and is joined again
// when the session has reached its agent. What an agent asks people is kept beside it and
// resolved exactly once. The Service owns every goroutine that it starts and waits for
// them in Close.
package turn

import (
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
)

const (
	// MaxWaiting is how many prompts of a session may wait.
	MaxWaiting = 100
	// MaxText bounds the text of a prompt.
	MaxText = 1 << 20
	// MaxAttachments bounds all its attachments together with its text.
	MaxAttachments = 3 << 20
	// DefaultTimeout is how long a turn may take whose session says nothing else.
	DefaultTimeout = 3600 * time.Second
	// DefaultAnswerTime is how long an answer is waited for where the session says nothing
	// else.
	DefaultAnswerTime = 300 * time.Second
)

// Turn is the record of one turn, as the store keeps it.
type Turn struct {
	// ID is unique and sorts by time of creation.
	ID      string
	Session string
	// Number counts the turns of a session, from 1: it is their order.
	Number int
	// Owner is who sent the prompt.
	Owner string
	State State
	// Prompt is what was asked. Its attachments have their data only where it is asked for;
	// in lists the text is cut off.
	Prompt Prompt
	// Model is what answers; set when the turn has begun.
	Model      agent.Model
	CreateTime time.Time
	// StartTime is when the agent was given the prompt, EndTime when the turn was over; zero
	// before.
	StartTime time.Time
	EndTime   time.Time
	// Result is nil until it has ended.
	Result *Result
	// Before is how many turns run before a queued one. It is not stored.
	Before int
}

// Prompt is what an agent is asked.
type Prompt struct {
	Text        string
	Attachments []Attachment
	// Author is who wrote it, for people.
	Author string
	// Model is the one that was asked for; zero for the session's.
	Model agent.Model
}

// Attachment is a file with a prompt.
type Attachment struct {
	Filename  string
	MediaType string
	Data      []byte
}

// Result is how a turn ended. Its JSON form is in the last event of the journal, and
// stands in the store.
type Result struct {
	Outcome agent.OutcomeKind `json:"outcome"`
	// Detail tells the facts behind it.
	Detail string `json:"detail,omitempty"`
	// Error is set with Failed.
	Error *agent.Error `json:"error,omitempty"`
	// Usage is what it used, sub-agents included.
	Usage agent.Usage `json:"usage,omitzero"`
	// Text is the agent's last.
	Text  string           `json:"text,omitempty"`
	Diffs []agent.FileDiff `json:"diffs,omitempty"`
	// CancelledBy is who cancelled it; "" if nobody did.
	CancelledBy string `json:"cancelled_by,omitempty"`
}

// State of a turn. next says how one follows on another.
type State uint8

// The states. They are stored by these numbers.
const (
	// Queued: turns before it run.
	Queued State = iota + 1
	// Running: the agent works on it.
	Running
	// Ended: Result says how.
	Ended
)

// next is the whole life of a turn: which states may follow on each.
func next() map[State][]State {
	return map[State][]State{
		0:       {Queued},         // Send
		Queued:  {Running, Ended}, // its time comes; it is cancelled, a limit is reached, or its session ends
		Running: {Ended},          // the agent is through or lost
		Ended:   {},
	}
}

// String returns the name of a state, which is that of the API.
func (s State) String() string {
	switch s {
	case Queued:
		return "QUEUED"
	case Running:
		return "RUNNING"
	case Ended:
		return "ENDED"
	default:
		return ""
	}
}

// Request asks for a turn.
type Request struct {
	// Caller asks, and will be the owner.
	Caller  caller.Caller
	Session string
	Prompt  Prompt
	// Key is the name of the request, with which it can be repeated.
	Key idempotency.Key
}

// Ref names a turn or an interaction of a session. Caller is who names it; for a caller
// who does not see the session, it does not exist.
type Ref struct {
	Session, ID string
	Caller      caller.Caller
}

// Validate returns a fault Invalid about a prompt that cannot be given.
func (p Prompt) Validate() error {
	if p.Text == "" && len(p.Attachments) == 0 {
		return fault.InvalidField("EMPTY_PROMPT", "prompt.text", "must be set where there is no attachment")
	}
	if len(p.Text) > MaxText {
		return fault.InvalidField("PROMPT_SIZE", "prompt.text", "has %d bytes; %d are the most", len(p.Text), MaxText)
	}
	size := len(p.Text)
	for _, a := range p.Attachments {
		size += len(a.Data)
	}
	if size > MaxAttachments {
		return fault.InvalidField("PROMPT_SIZE", "prompt.attachments", "have %d bytes with the text; %d are the most", size, MaxAttachments)
	}
	return nil
}

// Profile is what a turn needs to know of its session.
type Profile struct {
	// Model answers turns that name none.
	Model  agent.Model
	Limit  Limit
	Policy Policy
}

// Limit bounds what the turns of a session use.
type Limit struct {
	// CostMicros is in millionths of a US dollar; 0 for no bound.
	CostMicros int64
	// Turns is how many there may be; 0 for any number.
	Turns int
	// TurnTimeout is how long each may take; 0 stands for DefaultTimeout.
	TurnTimeout time.Duration
}

// Policy says what is done about what an agent asks.
type Policy struct {
	Mode Mode
	// Timeout is how long an answer is waited for; 0 stands for DefaultAnswerTime.
	Timeout time.Duration
	// Allow says that a permission is granted at its deadline.
	Allow bool
}

// Mode of a Policy. The names are those of the API.
type Mode string

// The modes; "" is Allow.
const (
	Allow Mode = "ALLOW"
	Ask   Mode = "ASK"
	Deny  Mode = "DENY"
)
