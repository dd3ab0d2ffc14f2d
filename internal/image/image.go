// Package image makes images and keeps account of them. An image is a snapshot of a
// prepared sandbox: a Recipe says what it starts from and which steps prepare it, an
// engine makes the sandbox and the snapshot, and everything in between is the guest's
// work, the same on every engine. A build tells what it does in a journal, which any
// number of watchers follow.
//
// A Service knows by name which images there are to be, builds one that is needed and not
// there, and lets all who need it wait for the same build. It owns the goroutines of the
// builds and waits for them in Close.
package image

import (
	"context"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/journal"
)

// Build is the record of one making of an image, as the store keeps it.
type Build struct {
	// ID is unique and sorts by time of creation.
	ID string
	// Image is the image's name, Engine where it is made and usable.
	Image  string
	Engine string
	// Recipe is the Hash of what it is made by.
	Recipe string
	// Sandbox is the engine's id of the sandbox that is prepared.
	Sandbox string
	State   State
	// Ref is the engine's name of the result; "" unless Ready.
	Ref engine.ImageRef
	// SizeBytes is what the build wrote into files; 0 unless Ready.
	SizeBytes  int64
	CreateTime time.Time
	// EndTime is zero while it is Building.
	EndTime time.Time
	// Failure says why it is Failed; nil otherwise.
	Failure *Failure
}

// State of a build; it never goes back.
type State uint8

// The states.
const (
	Building State = iota + 1
	Ready
	Failed
)

// Failure says why a build failed.
type Failure struct {
	// Step is the name of the one that failed; "" if it was none.
	Step string `json:"step,omitempty"`
	// ExitCode is what its program exited with; nil if it did not.
	ExitCode *int32 `json:"exit_code,omitempty"`
	// Signal ended the program, if one did.
	Signal int32 `json:"signal,omitempty"`
	// TimedOut is true if its time was over.
	TimedOut bool `json:"timed_out,omitempty"`
	// Output is the end of what it wrote, at most 4 KiB.
	Output string `json:"output,omitempty"`
	// Detail are the facts, for people.
	Detail string `json:"detail"`
}

// Image is what is known of an image on one engine.
type Image struct {
	Name   string
	Engine string
	// Ready is the newest build that can be used; nil if there is none.
	Ready *Build
	// Latest is the newest build, which may be the same, run, or have failed.
	Latest Build
	// Current says that Ready was made by the recipe that is in force.
	Current bool
}

// Event is one entry of a build's journal, or a gap in it. One of the fields behind Time
// is set.
type Event struct {
	Cursor journal.Cursor `json:"-"`
	Time   time.Time      `json:"-"`
	// Gap says that entries are missing here.
	Gap *journal.Gap `json:"-"`

	Started   *Started   `json:"started,omitempty"`
	Step      *StepBegun `json:"step,omitempty"`
	Output    *Output    `json:"output,omitempty"`
	StepEnded *StepEnded `json:"step_ended,omitempty"`
	// Result is the last event: the build as it ended.
	Result *Build `json:"result,omitempty"`
}

// Started is the first event.
type Started struct {
	Build  string   `json:"build"`
	Image  string   `json:"image"`
	Engine string   `json:"engine"`
	Steps  []string `json:"steps"`
}

// StepBegun says that a step begins.
type StepBegun struct {
	// Index counts from 0.
	Index int    `json:"index"`
	Name  string `json:"name"`
}

// Output is a piece of what a step wrote.
type Output struct {
	// Stderr says on which of its outputs.
	Stderr bool   `json:"stderr,omitempty"`
	Data   []byte `json:"data"`
}

// StepEnded says that a step did what it should.
type StepEnded struct {
	Index    int           `json:"index"`
	Duration time.Duration `json:"duration"`
}

// Store keeps the records of builds. Every call about them is durable when it returns nil.
type Store interface {
	// Requests that can be repeated are kept beside the builds.
	idempotency.Store
	// InsertBuild records a new one; a fault AlreadyExists if the id is taken. With a key
	// it is recorded together with the request for it, or neither; a fault AlreadyExists
	// (REQUEST_ID_REUSED) if the request's name is taken.
	InsertBuild(ctx context.Context, key idempotency.Key, b Build) error
	// UpdateBuild replaces what can change: State, Ref, SizeBytes, EndTime, Failure. A
	// fault NotFound if there is no such build.
	UpdateBuild(ctx context.Context, b Build) error
	// GetBuild reads one; a fault NotFound (BUILD_NOT_FOUND) if there is none.
	GetBuild(ctx context.Context, id string) (Build, error)
	// ListBuilds reads all of an image on an engine, the newest first; of all images if
	// name is "", on all engines if engine is "".
	ListBuilds(ctx context.Context, engine, name string) ([]Build, error)
	// DeleteBuild removes one; nil if there is none.
	DeleteBuild(ctx context.Context, id string) error
}

func noImage(name string) error {
	return fault.New(fault.NotFound, "IMAGE_NOT_FOUND", "there is no image %q", name)
}

func stateNames() []string { return []string{Building: "BUILDING", Ready: "READY", Failed: "FAILED"} }

// String returns the name of a state, which is that of the API; "" of none.
func (s State) String() string {
	if names := stateNames(); int(s) < len(names) {
		return names[s]
	}
	return ""
}
