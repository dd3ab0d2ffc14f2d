// Package session is a sandbox with a life of its own: it is recorded, made and fitted
// out, used by executions and by the turns of its agent, paused, resumed, forked and handed
// over to another sandbox, and ended by request, by its lifetime, idle or by loss; what
// would be lost with it is saved before. What it is fitted out with it knows by the
// interfaces of Parts only. The Service owns every goroutine that it starts and waits for
// them in Close.
package session

import (
	"context"
	"time"

	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/filter"
	"github.com/harvest-run/executord/internal/idempotency"
)

// Session is the record of one session, as the store keeps it.
type Session struct {
	// ID is unique and sorts by time of creation.
	ID string
	// Owner is the caller who created it; "" if that was not noted.
	Owner  string
	State  State
	Reason EndReason
	// Detail tells the facts behind Reason.
	Detail string
	// Engine and Sandbox say where it lives.
	Engine  string
	Sandbox string
	// Limits are those in force.
	Limits engine.Limits
	// Network is the policy in force.
	Network    egress.Policy
	Lifetime   time.Duration
	Labels     map[string]string
	CreateTime time.Time
	// EndTime is zero until it ended.
	EndTime time.Time
	// Details are what the store keeps as a whole.
	Details Details
}

// ExpireTime is when its lifetime ends.
func (s Session) ExpireTime() time.Time { return s.CreateTime.Add(s.Lifetime) }

// State of a session.
type State uint8

// The states.
const (
	// Starting: its sandbox is being made.
	Starting State = iota + 1
	// Running: its sandbox is ready.
	Running
	// Terminating: it is being ended.
	Terminating
	// Terminated: Reason says why.
	Terminated
	// Pausing: a snapshot of its sandbox is being made, and the sandbox is being ended.
	Pausing
	// Paused: it has no sandbox, and Details.Snapshot is what it goes on from.
	Paused
	// Resuming: its sandbox is being made from a snapshot.
	Resuming
)

// Stage is where in a life a state lies: Starting, Running, Terminating or Terminated. A
// life never goes back from one to another; within Running it pauses and resumes.
func (s State) Stage() State {
	switch s {
	case Pausing, Paused, Resuming:
		return Running
	default:
		return s
	}
}

// next are the states that can follow each.
func next() map[State][]State {
	return map[State][]State{
		Starting:    {Running, Terminating},
		Running:     {Pausing, Terminating},
		Pausing:     {Paused, Resuming, Running, Terminating}, // Resuming: handed over to another sandbox; Running: no snapshot could be made
		Paused:      {Resuming, Terminating},
		Resuming:    {Running, Paused, Terminating}, // Paused: no sandbox could be made
		Terminating: {Terminated},
	}
}

// EndReason says why a session ended.
type EndReason string

// The reasons. They are stored by these names, which are those of the API.
const (
	Requested     EndReason = "REQUESTED"
	Expired       EndReason = "EXPIRED"
	StartFailed   EndReason = "START_FAILED"
	SandboxLost   EndReason = "SANDBOX_LOST"
	ServerStopped EndReason = "SERVER_STOPPED"
	Idle          EndReason = "IDLE"
)

// DefaultLifetime is what a session gets that says nothing else.
const DefaultLifetime = 3600 * time.Second

// Store keeps sessions. Every call about them is durable when it returns nil.
type Store interface {
	// Requests that can be repeated are kept beside the sessions.
	idempotency.Store
	// InsertSession records a new one; a fault AlreadyExists if the id is taken.
	InsertSession(ctx context.Context, s Session) error
	// InsertSessionOnce records a new one together with the request for it, or neither;
	// a fault AlreadyExists (REQUEST_ID_REUSED) if the request's name is taken.
	InsertSessionOnce(ctx context.Context, key idempotency.Key, s Session) error
	// UpdateSession replaces what can change in a life: all but ID, Owner, Network and
	// CreateTime. A fault NotFound if there is no such session.
	UpdateSession(ctx context.Context, s Session) error
	// GetSession reads one; a fault NotFound (SESSION_NOT_FOUND) if there is none.
	GetSession(ctx context.Context, id string) (Session, error)
	// ListSessions reads a page, in the order of ids. Of a filter's terms on what can still
	// change it lets every session through that is not Terminated in the store.
	ListSessions(ctx context.Context, q Query) ([]Session, error)
	// SessionsWindow returns the id of the Limit-th session of a page, whatever the filter
	// says, "" if there are fewer.
	SessionsWindow(ctx context.Context, q Query) (string, error)
	// UnfinishedSessions reads all that are not Terminated, the oldest first.
	UnfinishedSessions(ctx context.Context) ([]Session, error)
}

// Query chooses sessions for a page.
type Query struct {
	// Caller restricts to those that it sees.
	Caller caller.Caller
	// Before is the id of the last one of the page before; "" for the first page.
	Before string
	// Limit is the most to return; at least 1.
	Limit int
	// Terminated includes those that have ended.
	Terminated bool
	// Filter restricts. Its fields are state, end_reason, labels, create_time and
	// end_time, with the names of State and EndReason.
	Filter filter.Filter
	// Ascending begins with the oldest.
	Ascending bool
	// Last is the id of the last one to look at; "" for the last there is.
	Last string
}
