package agent

import (
	"encoding/json"
	"time"
)

// Event is one thing that an agent tells of a prompt. One of its fields beside SubAgent
// is set; none for one that a later executord wrote. Its JSON form is what lies in the
// logs of turns.
type Event struct {
	// SubAgent is the conversation of a sub-agent that it belongs to; "" for the agent's own.
	SubAgent string `json:"sub_agent,omitempty"`

	Text            *Delta           `json:"text,omitempty"`
	Reasoning       *Delta           `json:"reasoning,omitempty"`
	PartEnded       *PartEnded       `json:"part_ended,omitempty"`
	PartsDropped    *PartsDropped    `json:"parts_dropped,omitempty"`
	ToolStarted     *ToolStarted     `json:"tool_started,omitempty"`
	ToolOutput      *ToolOutput      `json:"tool_output,omitempty"`
	ToolEnded       *ToolEnded       `json:"tool_ended,omitempty"`
	FileChanged     *FileDiff        `json:"file_changed,omitempty"`
	Todos           *TodoList        `json:"todos,omitempty"`
	Asked           *Asked           `json:"asked,omitempty"`
	Answered        *Answered        `json:"answered,omitempty"`
	SubAgentStarted *SubAgentStarted `json:"sub_agent_started,omitempty"`
	SubAgentEnded   *SubAgentEnded   `json:"sub_agent_ended,omitempty"`
	Usage           *Usage           `json:"usage,omitempty"`
	Retry           *Retry           `json:"retry,omitempty"`
	Compaction      *Compaction      `json:"compaction,omitempty"`
	Error           *Error           `json:"error,omitempty"`
	Restarted       *Restarted       `json:"restarted,omitempty"`
}

// Delta is a piece of text or reasoning.
type Delta struct {
	// Part is what it belongs to.
	Part string `json:"part"`
	Text string `json:"text"`
}

// PartEnded finishes a part of text or reasoning.
type PartEnded struct {
	Part string `json:"part"`
	// Text is the whole of it where it differs from the deltas; nil otherwise.
	Text *string `json:"text,omitempty"`
}

// PartsDropped makes parts void: the answer broke off, and is asked for again.
type PartsDropped struct {
	Parts []string `json:"parts"`
}

// ToolStarted says that a tool is used.
type ToolStarted struct {
	Call  string `json:"call"`
	Tool  string `json:"tool"`
	Title string `json:"title,omitempty"`
	// Input is a JSON object; nil if there is none.
	Input json.RawMessage `json:"input,omitempty"`
}

// ToolOutput is what a tool tells while it works.
type ToolOutput struct {
	Call string `json:"call"`
	// Text goes behind what was told before.
	Text string `json:"text"`
}

// ToolEnded says that a tool is through.
type ToolEnded struct {
	Call string `json:"call"`
	// Tool is its name.
	Tool   string `json:"tool,omitempty"`
	Output string `json:"output,omitempty"`
	// Error is "" if nothing went wrong.
	Error string `json:"error,omitempty"`
	Title string `json:"title,omitempty"`
	// ExitCode is that of a command; nil otherwise.
	ExitCode *int32 `json:"exit_code,omitempty"`
	// Metadata is a JSON object with the agent's own facts; nil if there are none.
	Metadata json.RawMessage `json:"metadata,omitempty"`
}

// FileDiff is a change of a file.
type FileDiff struct {
	Path   string     `json:"path"`
	Change FileChange `json:"change,omitempty"`
	// Patch is a unified diff; "" where there is none.
	Patch     string `json:"patch,omitempty"`
	Additions int32  `json:"additions,omitempty"`
	Deletions int32  `json:"deletions,omitempty"`
}

// FileChange is what was done with a file. The names are those of the API.
type FileChange string

// The changes; "" where it is not known.
const (
	FileAdded    FileChange = "ADDED"
	FileModified FileChange = "MODIFIED"
	FileDeleted  FileChange = "DELETED"
)

// TodoList is what is to be done, whole.
type TodoList struct {
	Items []TodoItem `json:"items"`
}

// TodoItem is one thing to be done.
type TodoItem struct {
	Text string `json:"text"`
	// Status is pending, in_progress, completed or cancelled.
	Status string `json:"status,omitempty"`
	// Priority is high, medium or low.
	Priority string `json:"priority,omitempty"`
}

// Asked says that the agent waits for an answer. The same may be asked again, when the
// agent was reached again.
type Asked struct {
	// ID is the agent's name of it.
	ID string `json:"id"`
	// Call is the tool call that waits.
	Call string `json:"call,omitempty"`
	// One of these is set.
	Permission *Permission `json:"permission,omitempty"`
	Question   *Question   `json:"question,omitempty"`
}

// Permission asks whether something may be done.
type Permission struct {
	// Kind is such as bash, edit or external_directory.
	Kind     string   `json:"kind"`
	Patterns []string `json:"patterns,omitempty"`
	// Metadata is a JSON object with the agent's own facts; nil if there are none.
	Metadata json.RawMessage `json:"metadata,omitempty"`
}

// Question asks for answers.
type Question struct {
	Items []QuestionItem `json:"items"`
}

// QuestionItem is one question.
type QuestionItem struct {
	Header   string   `json:"header,omitempty"`
	Text     string   `json:"text"`
	Options  []Option `json:"options,omitempty"`
	Multiple bool     `json:"multiple,omitempty"`
	Custom   bool     `json:"custom,omitempty"`
}

// Option is one choice of a question.
type Option struct {
	Label       string `json:"label"`
	Description string `json:"description,omitempty"`
}

// Answered says that the agent does not wait for an answer any more.
type Answered struct {
	ID string `json:"id"`
}

// SubAgentStarted says that a sub-agent begins.
type SubAgentStarted struct {
	ID    string `json:"id"`
	Call  string `json:"call,omitempty"`
	Title string `json:"title,omitempty"`
}

// SubAgentEnded says that a sub-agent is through.
type SubAgentEnded struct {
	ID    string `json:"id"`
	Usage Usage  `json:"usage,omitzero"`
}

// Usage is what a step, a sub-agent or a turn used.
type Usage struct {
	InputTokens      int64 `json:"input_tokens,omitempty"`
	OutputTokens     int64 `json:"output_tokens,omitempty"`
	ReasoningTokens  int64 `json:"reasoning_tokens,omitempty"`
	CacheReadTokens  int64 `json:"cache_read_tokens,omitempty"`
	CacheWriteTokens int64 `json:"cache_write_tokens,omitempty"`
	// CostMicros is in millionths of a US dollar.
	CostMicros int64 `json:"cost_micros,omitempty"`
}

// Add is the sum of two.
func (u Usage) Add(v Usage) Usage {
	return Usage{
		InputTokens: u.InputTokens + v.InputTokens, OutputTokens: u.OutputTokens + v.OutputTokens,
		ReasoningTokens: u.ReasoningTokens + v.ReasoningTokens, CacheReadTokens: u.CacheReadTokens + v.CacheReadTokens,
		CacheWriteTokens: u.CacheWriteTokens + v.CacheWriteTokens, CostMicros: u.CostMicros + v.CostMicros,
	}
}

// Retry says that the provider failed and is asked again.
type Retry struct {
	// Attempt is how often it has failed.
	Attempt int32     `json:"attempt"`
	Message string    `json:"message,omitempty"`
	Next    time.Time `json:"next,omitzero"`
}

// Compaction says that the agent makes its history shorter.
type Compaction struct {
	Automatic bool `json:"automatic,omitempty"`
}

// Error is what went wrong.
type Error struct {
	// Name is the agent's, such as APIError.
	Name    string `json:"name"`
	Message string `json:"message,omitempty"`
	// StatusCode is the provider's HTTP status; 0 where there was none.
	StatusCode int32 `json:"status_code,omitempty"`
	Retryable  bool  `json:"retryable,omitempty"`
}

// Restarted says that the agent died and was started again.
type Restarted struct {
	Detail string `json:"detail,omitempty"`
}
