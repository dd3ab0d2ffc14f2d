package execution

import "context"

// Store keeps executions. What a call wrote survives kill -9 once it returned nil; it
// survives a power cut once Sync has returned nil after it, or at once where the call
// says so. The two are apart because a start can go on while the disk is at work, and
// because an end is in the log already, from which Recover repeats a lost record.
type Store interface {
	// Sync makes all that was written before it survive a power cut.
	Sync(ctx context.Context) error
	// InsertExecution records a new one; a fault AlreadyExists if the id is taken.
	InsertExecution(ctx context.Context, e Execution) error
	// UpdateExecution replaces what can change in a life: State, Result, Engine,
	// Sandbox, Limits, Epoch, Sequence, StartTime, EndTime. A fault NotFound if there
	// is no such execution.
	UpdateExecution(ctx context.Context, e Execution) error
	// GetExecution reads one; a fault NotFound (EXECUTION_NOT_FOUND) if there is none.
	GetExecution(ctx context.Context, id string) (Execution, error)
	// ListExecutions reads a page, the newest first.
	ListExecutions(ctx context.Context, q Query) ([]Execution, error)
	// UnfinishedExecutions reads all that are not Ended, the oldest first.
	UnfinishedExecutions(ctx context.Context) ([]Execution, error)
	// DeleteExecution removes one, at once; a fault NotFound if there is none.
	DeleteExecution(ctx context.Context, id string) error
}

// Query chooses executions for a page.
type Query struct {
	// Session restricts to one session's; "" does not.
	Session string
	// InAnySession restricts to those that run in a session.
	InAnySession bool
	// Before is the id of the last one of the page before; "" for the first page.
	Before string
	// Limit is the most to return; at least 1.
	Limit int
}
