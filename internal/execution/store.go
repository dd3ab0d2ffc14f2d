package execution

import (
	"context"

	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/filter"
	"github.com/harvest-run/executord/internal/idempotency"
)

// Store keeps executions. What a call wrote survives kill -9 once it returned nil; it
// survives a power cut once Sync has returned nil after it, or at once where the call
// says so. The two are apart because a start can go on while the disk is at work, and
// because an end is in the log already, from which Recover repeats a lost record.
type Store interface {
	// Requests that can be repeated are kept beside the executions.
	idempotency.Store
	// InsertExecution records a new one; a fault AlreadyExists if the id is taken.
	InsertExecution(ctx context.Context, e Execution) error
	// InsertExecutionOnce records a new one together with the request for it, or neither;
	// a fault AlreadyExists (REQUEST_ID_REUSED) if the request's name is taken.
	InsertExecutionOnce(ctx context.Context, key idempotency.Key, e Execution) error
	// UpdateExecution replaces what can change in a life: State, Result, Engine,
	// Sandbox, Limits, Epoch, Sequence, LogBytes, Warned, StartTime, EndTime. A fault NotFound if there
	// is no such execution.
	UpdateExecution(ctx context.Context, e Execution) error
	// GetExecution reads one; a fault NotFound (EXECUTION_NOT_FOUND) if there is none.
	GetExecution(ctx context.Context, id string) (Execution, error)
	// ListExecutions reads a page, in the order of ids. Of a filter's terms on what can
	// still change it lets every execution through that is not Ended in the store.
	ListExecutions(ctx context.Context, q Query) ([]Execution, error)
	// ExecutionsWindow returns the id of the Limit-th execution of a page, "" if there are
	// fewer. Of a filter it may heed what an index serves, and need not.
	ExecutionsWindow(ctx context.Context, q Query) (string, error)
	// UnfinishedExecutions reads all that are not Ended, the oldest first.
	UnfinishedExecutions(ctx context.Context) ([]Execution, error)
	// StoredBytes is how much output is kept of the ended executions of an owner.
	StoredBytes(ctx context.Context, owner string) (int64, error)
	// DeleteExecution removes one, at once; a fault NotFound if there is none.
	DeleteExecution(ctx context.Context, id string) error
	// DeleteExecutionOnce is DeleteExecution, and records the request for it or does
	// neither; a fault AlreadyExists (REQUEST_ID_REUSED) if the request's name is taken.
	DeleteExecutionOnce(ctx context.Context, key idempotency.Key, id string) error
	// CountEnded sums up those that have ended.
	CountEnded(ctx context.Context) (Stored, error)
	// ListEnded reads a page of those that have ended, the oldest first.
	ListEnded(ctx context.Context, q KeptQuery) ([]Kept, error)
	// DeleteEnded removes all of these that there are, at once. One that has not ended
	// is left.
	DeleteEnded(ctx context.Context, ids []string) error
}

// Query chooses executions for a page.
type Query struct {
	// Caller restricts to those that it sees.
	Caller caller.Caller
	// Session restricts to one session's; "" does not.
	Session string
	// InAnySession restricts to those that run in a session.
	InAnySession bool
	// Filter restricts further. Its fields are state, reason, labels, create_time and
	// end_time, with the names of State and Reason.
	Filter filter.Filter
	// Ascending begins with the oldest.
	Ascending bool
	// Before is the id of the last one of the page before; "" for the first page.
	Before string
	// Limit is the most to return; at least 1.
	Limit int

	// MinID and MaxID bound the ids, "" does not; Unfinished restricts to those that the
	// store does not know to be Ended. The Service sets them where they follow from the
	// Filter, so that the store need not look at everything.
	MinID, MaxID string
	Unfinished   bool
}
