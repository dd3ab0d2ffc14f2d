// Package agent says what a coding agent is to the rest of executord: conversations that
// are given prompts, and the events that tell what the agent does about them. The event
// type is a superset of what the agents behind it can tell. It knows neither how a
// prompt comes to be nor what becomes of an event; agents are made of packages below it.
package agent

import (
	"context"
	"errors"
	"iter"
	"time"
)

var (
	// ErrLost means that the agent, or its sandbox, is gone: how the prompt ended is not
	// known.
	ErrLost = errors.New("the agent is lost")
	// ErrNoPrompt means that the agent was never given the prompt.
	ErrNoPrompt = errors.New("the agent was not given the prompt")
	// ErrBusy means that the agent is at work on another prompt.
	ErrBusy = errors.New("the agent is at work on another prompt")
	// ErrNotAsked means that the agent does not wait for this answer, or no longer.
	ErrNotAsked = errors.New("the agent does not wait for this answer")
)

// Conversation is what is said between people and one agent. Its prompts are given one
// after another; the other methods may be called meanwhile, from any goroutine.
type Conversation interface {
	// ID is the agent's name of it.
	ID() string
	// Prompt gives the agent a prompt and tells what it does about it, until it is through.
	// tell is called for one event after the other, and not any more when Prompt has
	// returned; its error ends Prompt. When ctx ends Prompt returns the cause. In neither
	// case does the agent stop: Join goes on. ErrLost if the agent is gone for good.
	Prompt(ctx context.Context, p Prompt, tell func(Event) error) (Outcome, error)
	// Join goes on with a prompt that was given before, also by an executord before this
	// one. told are the events that were told of it: only what is new is told. What the
	// agent still waits for is asked again. ErrNoPrompt if it never got it; else as Prompt.
	Join(ctx context.Context, promptID string, told iter.Seq[Event], tell func(Event) error) (Outcome, error)
	// Abort ends what the agent does and returns when it does nothing any more.
	Abort(ctx context.Context) error
	// Answer answers what the agent asked for by Asked. ErrNotAsked.
	Answer(ctx context.Context, id string, a Answer) error
	// Messages are what was said so far, the oldest first.
	Messages(ctx context.Context) ([]Message, error)
}

// Prompt is what an agent is asked.
type Prompt struct {
	// ID names it: the agent keeps it, and a prompt is not given twice by one name. It is of
	// letters, digits, "_" and "-".
	ID string
	// Text may be empty where there are attachments.
	Text        string
	Attachments []Attachment
	// Author is who wrote it, for people; "" if that is not known.
	Author string
	Model  Model
}

// Attachment is a file with a prompt.
type Attachment struct {
	Filename  string
	MediaType string
	Data      []byte
}

// Model names what answers a prompt.
type Model struct {
	Provider string `json:"provider,omitempty"`
	Model    string `json:"model,omitempty"`
	// BaseURL is "" for the provider's own address.
	BaseURL string `json:"base_url,omitempty"`
}

// Answer is that to a permission request or a question.
type Answer struct {
	// Decision is about a permission; or Reject for a question.
	Decision Decision `json:"decision,omitempty"`
	// Labels are, for each item of a question, what was chosen or a text of one's own.
	Labels [][]string `json:"labels,omitempty"`
	// Message is what the agent is told with a Reject.
	Message string `json:"message,omitempty"`
}

// Decision about a permission. The names are those of the API.
type Decision string

// The decisions.
const (
	AllowOnce   Decision = "ALLOW_ONCE"
	AllowAlways Decision = "ALLOW_ALWAYS"
	Reject      Decision = "REJECT"
)

// Outcome is how the agent came to be through with a prompt.
type Outcome struct {
	Kind OutcomeKind
	// Detail tells the facts behind it, for people.
	Detail string
	// Error is set with Failed.
	Error *Error
	// Usage is what it used, sub-agents included.
	Usage Usage
	// Text is the agent's last text.
	Text string
	// Diffs are what it changed.
	Diffs []FileDiff
}

// OutcomeKind says how a turn ended. The names are those of the API.
type OutcomeKind string

// The kinds of outcomes.
const (
	Completed OutcomeKind = "COMPLETED"
	Aborted   OutcomeKind = "ABORTED"
	Failed    OutcomeKind = "FAILED"
	Truncated OutcomeKind = "TRUNCATED"
	Rejected  OutcomeKind = "REJECTED"
	Lost      OutcomeKind = "LOST"
)

// Message is one of a conversation.
type Message struct {
	// ID is the agent's; that of a prompt is the prompt's.
	ID string
	// FromUser says that it is a prompt.
	FromUser bool
	// Prompt is the ID of the prompt that it answers, or is.
	Prompt string
	Text   string
	Tools  []ToolEnded
	Time   time.Time
	Usage  Usage
}
