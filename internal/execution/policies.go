package execution

import (
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

// Policies say what becomes of an execution that is silent, loud, alone or over. Its
// JSON form stands in the store.
type Policies struct {
	// OnLimit says what becomes of output that its log has no room for; "" stands for
	// DropOldest.
	OnLimit OnLimit `json:"on_limit,omitempty"`
	// Retention is how long it is kept once it has ended; 0 as long as the server says.
	Retention time.Duration `json:"retention,omitempty"`
	// Detach says what happens when nobody watches; "" stands for KeepRunning.
	Detach DetachMode `json:"detach,omitempty"`
	// DetachGrace is how long nobody may watch with CancelDetached; nil stands for
	// DefaultDetachGrace.
	DetachGrace *time.Duration `json:"detach_grace,omitempty"`
}

// OnLimit says what becomes of output that a log has no room for.
type OnLimit string

// What can become of it. The names are those of the API.
const (
	// DropOldest drops the oldest output; who has not read it gets a Gap.
	DropOldest OnLimit = "DROP_OLDEST"
	// Block lets the program wait until its watchers have read what would be dropped.
	Block OnLimit = "BLOCK"
	// Kill ends the program with OutputLimit.
	Kill OnLimit = "KILL"
)

// DetachMode says what happens when nobody watches.
type DetachMode string

// What can happen. The names are those of the API.
const (
	// KeepRunning lets it go on.
	KeepRunning DetachMode = "KEEP_RUNNING"
	// CancelDetached ends it after a grace, with Abandoned.
	CancelDetached DetachMode = "CANCEL"
)

// Bounds of policies, and what one gets that says nothing else.
const (
	DefaultDetachGrace = 10 * time.Second
	MaxDetachGrace     = time.Hour
	MinIdleTimeout     = time.Second
	MaxIdleTimeout     = 7 * 24 * time.Hour
	MaxRetention       = 3650 * 24 * time.Hour
)

// Validate returns a fault (Invalid) that names the field that is wrong.
func (p Policies) Validate() error {
	switch p.OnLimit {
	case "", DropOldest, Block, Kill:
	default:
		return fault.InvalidField("ON_LIMIT", "output_policy.on_limit", "%q is not one of DROP_OLDEST, BLOCK, KILL", p.OnLimit)
	}
	switch p.Detach {
	case "", KeepRunning, CancelDetached:
	default:
		return fault.InvalidField("DETACH_MODE", "detach_policy.mode", "%q is not one of KEEP_RUNNING, CANCEL", p.Detach)
	}
	if p.Retention < 0 || p.Retention > MaxRetention {
		return fault.InvalidField("RETENTION", "output_policy.retention", "must be up to %v, not %v", MaxRetention, p.Retention)
	}
	if g := p.DetachGrace; g != nil && (*g < 0 || *g > MaxDetachGrace) {
		return fault.InvalidField("DETACH_GRACE", "detach_policy.grace", "must be 0 to %v, not %v", MaxDetachGrace, *g)
	}
	return nil
}

// withDefaults fills in what was not said. maxAge is how long the server keeps what has
// ended; 0 is for ever.
func (p Policies) withDefaults(maxAge time.Duration) Policies {
	if p.OnLimit == "" {
		p.OnLimit = DropOldest
	}
	if p.Detach != CancelDetached {
		p.Detach, p.DetachGrace = KeepRunning, nil
	} else if p.DetachGrace == nil {
		grace := DefaultDetachGrace
		p.DetachGrace = &grace
	}
	if maxAge > 0 && p.Retention >= maxAge {
		p.Retention = 0
	}
	return p
}
