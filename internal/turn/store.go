package turn

import (
	"context"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/idempotency"
)

// Store keeps turns and interactions. Every call about them is durable when it returns
// nil.
type Store interface {
	// Requests that can be repeated are kept beside the turns.
	idempotency.Store
	// InsertTurn records a new one with its prompt, attachments included, together with the
	// request for it if that has a name, or neither. A fault AlreadyExists
	// (REQUEST_ID_REUSED) if the name is taken.
	InsertTurn(ctx context.Context, key idempotency.Key, t Turn) error
	// UpdateTurn replaces what can change in a life: State, Model, StartTime, EndTime,
	// Result. Faults: NotFound if there is no such turn, FailedPrecondition (TURN_ENDED) if
	// State would go back.
	UpdateTurn(ctx context.Context, t Turn) error
	// GetTurn reads one, without the data of its attachments. A fault NotFound
	// (TURN_NOT_FOUND).
	GetTurn(ctx context.Context, id string) (Turn, error)
	// TurnSession returns the session of a turn. A fault NotFound (TURN_NOT_FOUND).
	TurnSession(ctx context.Context, id string) (string, error)
	// GetPrompt reads the whole prompt of a turn. A fault NotFound (TURN_NOT_FOUND).
	GetPrompt(ctx context.Context, id string) (Prompt, error)
	// ListTurns reads a page, the newest first; of the texts and patches only the beginning.
	ListTurns(ctx context.Context, q Query) ([]Turn, error)
	// UnfinishedTurns reads all that are not Ended, by session and number; of the texts only
	// the beginning.
	UnfinishedTurns(ctx context.Context) ([]Turn, error)
	// Totals sums up the turns of a session.
	Totals(ctx context.Context, session string) (Totals, error)

	// InsertInteraction records a new one.
	InsertInteraction(ctx context.Context, i Interaction) error
	// ResolveInteraction replaces State, ResolveTime, ResolvedBy and Answer of one that is
	// Pending, together with the request for it if that has a name, or neither. Faults:
	// FailedPrecondition (INTERACTION_NOT_PENDING), AlreadyExists (REQUEST_ID_REUSED).
	ResolveInteraction(ctx context.Context, key idempotency.Key, i Interaction) error
	// GetInteraction reads one; a fault NotFound (INTERACTION_NOT_FOUND).
	GetInteraction(ctx context.Context, id string) (Interaction, error)
	// ListInteractions reads a page, the newest first.
	ListInteractions(ctx context.Context, q InteractionQuery) ([]Interaction, error)
	// InteractionsOf reads all of a turn, the oldest first.
	InteractionsOf(ctx context.Context, turn string) ([]Interaction, error)

	// SessionsWithTurns reads ids of sessions that ended before a time and have turns.
	SessionsWithTurns(ctx context.Context, endedBefore time.Time, limit int) ([]string, error)
	// DeleteTurns removes all turns and interactions of a session, at once, and returns the
	// ids of the turns.
	DeleteTurns(ctx context.Context, session string) ([]string, error)
}

// Query chooses turns for a page.
type Query struct {
	// Caller restricts to what it sees.
	Caller  caller.Caller
	Session string
	// Before is the Number of the last one of the page before; 0 for the first page.
	Before int
	// Limit is the most to return; at least 1.
	Limit int
}

// InteractionQuery chooses interactions for a page.
type InteractionQuery struct {
	// Caller restricts to what it sees.
	Caller  caller.Caller
	Session string
	// Pending restricts to those that wait.
	Pending bool
	// Before is the ID of the last one of the page before; "" for the first page.
	Before string
	// Limit is the most to return; at least 1.
	Limit int
}

// Totals sum up the turns of a session.
type Totals struct {
	// Last is the greatest Number; 0 if there are none.
	Last int
	// Begun is how many have begun, also of those that have ended.
	Begun int
	// Usage is that of those that have ended.
	Usage agent.Usage
	// LastEnd is when the last one ended; zero if none has.
	LastEnd time.Time
}
