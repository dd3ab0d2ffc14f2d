package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/harvest-run/executord/internal/journal"
)

// Event is one entry of a session's log or a Gap. One of its fields beside Cursor and
// Time is set; none for an entry that a later executord wrote.
type Event struct {
	Cursor journal.Cursor `json:"-"`
	Time   time.Time      `json:"-"`
	Gap    *journal.Gap   `json:"-"`

	Started   *Started   `json:"started,omitempty"`
	Step      *Step      `json:"step,omitempty"`
	Changed   *Session   `json:"changed,omitempty"`
	Warning   *Warning   `json:"warning,omitempty"`
	Turn      *TurnNote  `json:"turn,omitempty"`
	Execution *RunNote   `json:"execution,omitempty"`
	Asked     *AskedNote `json:"asked,omitempty"`
	Saved     *SavedWork `json:"saved,omitempty"`
	Replaced  *Replaced  `json:"replaced,omitempty"`
	Agent     *AgentNote `json:"agent,omitempty"`
	// Ended is the last event.
	Ended *Session `json:"ended,omitempty"`
}

// Started opens every log.
type Started struct {
	Session string `json:"session"`
}

// Step is a step on the way to another state.
type Step struct {
	Kind    StepKind  `json:"kind"`
	State   StepState `json:"state"`
	Subject string    `json:"subject,omitempty"`
	Text    string    `json:"text,omitempty"`
	// Percent is nil where it is not known.
	Percent *int `json:"percent,omitempty"`
}

// StepKind says which step. The names are those of the API.
type StepKind string

// The steps.
const (
	StepImage         StepKind = "IMAGE"
	StepSandbox       StepKind = "SANDBOX"
	StepCredentials   StepKind = "CREDENTIALS"
	StepClone         StepKind = "CLONE"
	StepIdentity      StepKind = "IDENTITY"
	StepMemory        StepKind = "MEMORY"
	StepConfiguration StepKind = "CONFIGURATION"
	StepAgent         StepKind = "AGENT"
	StepMCP           StepKind = "MCP"
	StepSave          StepKind = "SAVE"
	StepCommitMemory  StepKind = "COMMIT_MEMORY"
	StepSnapshot      StepKind = "SNAPSHOT"
	StepTerminate     StepKind = "TERMINATE"
)

// StepState is where a step is.
type StepState string

// The states of steps.
const (
	StepStarted  StepState = "STARTED"
	StepProgress StepState = "PROGRESS"
	StepDone     StepState = "DONE"
	StepFailed   StepState = "FAILED"
)

// Warning says that an end is near.
type Warning struct {
	// Cause is "EXPIRY", "IDLE" or "SANDBOX_EXPIRY".
	Cause  string    `json:"cause"`
	Expire time.Time `json:"expire"`
}

// TurnNote is a turn in a few words. The names of State and Outcome are those of the API.
type TurnNote struct {
	ID    string `json:"id"`
	State string `json:"state"`
	// Outcome is "" while it is not over.
	Outcome    string `json:"outcome,omitempty"`
	CostMicros int64  `json:"cost_micros,omitempty"`
}

// The states of turns.
const (
	TurnQueued  = "QUEUED"
	TurnRunning = "RUNNING"
	TurnEnded   = "ENDED"
)

// RunNote is an execution in a few words.
type RunNote struct {
	ID     string `json:"id"`
	Ended  bool   `json:"ended,omitempty"`
	Reason string `json:"reason,omitempty"`
}

// AskedNote is an interaction: that it waits, or that it does no longer.
type AskedNote struct {
	ID      string `json:"id"`
	Pending bool   `json:"pending,omitempty"`
}

// Replaced says that a session goes on in another sandbox.
type Replaced struct {
	Sandbox    string `json:"sandbox"`
	Generation int    `json:"generation"`
	Detail     string `json:"detail,omitempty"`
}

// AgentNote is the state of the agent, and what turns are answered by.
type AgentNote struct {
	Status AgentStatus `json:"status"`
	Model  Model       `json:"model,omitzero"`
}

// tell adds an event to the log of a session. What cannot be written is told to the
// operator: a session is not held up by a full disk.
func (l *live) tell(e Event) { l.tellAt(time.Now(), e) }

func (l *live) tellAt(at time.Time, e Event) {
	if l.journal == nil {
		return
	}
	data, err := json.Marshal(e)
	if err == nil {
		_, err = l.journal.Append(at, data)
	}
	if err != nil && !errors.Is(err, journal.ErrClosed) && !errors.Is(err, journal.ErrEnded) {
		l.service.log.Error("an event of a session is not in its log", "session", l.id, "error", err)
	}
}

// step tells of a step.
func (l *live) step(kind StepKind, state StepState, subject, text string) {
	l.tell(Event{Step: &Step{Kind: kind, State: state, Subject: subject, Text: clip(text)}})
}

// do tells of a step around what it does.
func (l *live) do(kind StepKind, subject string, f func() error) error {
	l.step(kind, StepStarted, subject, "")
	if err := f(); err != nil {
		l.step(kind, StepFailed, subject, err.Error())
		return err
	}
	l.step(kind, StepDone, subject, "")
	return nil
}

// Watcher follows the log of one session at its own pace. It is for one goroutine.
type Watcher struct {
	*journal.Watcher
	service *Service
	ref     Ref
	ended   bool
}

// Watch follows a session from behind a cursor on; nil is the log's start. Faults:
// NotFound, OutOfRange (CURSOR_IN_FUTURE).
func (s *Service) Watch(ctx context.Context, ref Ref, after *journal.Cursor) (*Watcher, error) {
	if _, err := s.Get(ctx, ref); err != nil {
		return nil, err
	}
	w, err := s.journals.Watch(ref.ID, after)
	if err != nil {
		return nil, err
	}
	return &Watcher{Watcher: w, service: s, ref: ref, ended: after != nil && w.AtEnd()}, nil
}

// Next returns the next event, waiting for it. io.EOF comes after the end;
// journal.ErrClosed when the Service is closed; ctx's cause when ctx ends, after which Next
// may be called again.
func (w *Watcher) Next(ctx context.Context) (Event, error) {
	entry, err := w.Watcher.Next(ctx)
	if errors.Is(err, io.EOF) && !w.ended {
		return w.storedEnd(ctx)
	}
	if err != nil {
		return Event{}, err
	}
	var e Event
	if entry.Gap == nil && json.Unmarshal(entry.Data, &e) != nil {
		e = Event{} // in a form of later days
	}
	e.Cursor, e.Time, e.Gap = entry.Cursor, entry.Time, entry.Gap
	w.ended = w.ended || e.Ended != nil
	return e, nil
}

// storedEnd is the last event of a log whose own cannot be read.
func (w *Watcher) storedEnd(ctx context.Context) (Event, error) {
	record, err := w.service.Get(ctx, w.ref)
	if err != nil {
		return Event{}, err
	}
	if record.State != Terminated {
		return Event{}, fmt.Errorf("the log of session %s has an end and the session has none", record.ID)
	}
	w.ended = true
	at := w.Cursor()
	at.Sequence++
	return Event{Cursor: at, Time: record.EndTime, Ended: &record}, nil
}
