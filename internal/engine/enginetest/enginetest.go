// Package enginetest is the definition of the waist: what every engine must do,
// whatever it makes its sandboxes of. An engine's own test opens it over a fresh
// state for each case and calls Run; what it cannot do it declares as an exception,
// with the reason, and the exception is reported.
//
// Sandboxes are driven through engine.Engine, engine.Sandbox and the guest's client
// only, as executord does. The cases need python3, bash and coreutils in the sandbox.
package enginetest

import (
	"context"
	"errors"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestclient"
)

// Place is a state that engines are opened over, one after another: each finds what
// the one before left. An engine that tells its sandboxes apart by tags takes a fresh
// tag for each Place.
type Place struct {
	// Open opens an engine; the suite closes it. It fails the test if it cannot. The
	// engine must have a default for each limit that it can enforce.
	Open func(t *testing.T) engine.Engine
	// KillGuest ends a sandbox's guest from outside, as a crash or an administrator
	// would, and not through the engine. It returns when the guest is gone.
	KillGuest func(t *testing.T, id string)
}

// Exceptions are the cases that an engine does not pass, by name, each with the
// reason. They are reported as skipped.
type Exceptions map[string]string

// Run runs every case as a subtest, each over a Place of its own. After each it
// ends what the case left running and fails it if anything is then left.
func Run(t *testing.T, fresh func(t *testing.T) Place, except Exceptions) {
	cases := all()
	for _, name := range slices.Sorted(maps.Keys(except)) {
		if !slices.ContainsFunc(cases, func(c testCase) bool { return c.name == name }) {
			t.Errorf("exception %q: there is no such case", name)
		}
		if except[name] == "" {
			t.Errorf("exception %q: has no reason", name)
		}
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if why, ok := except[c.name]; ok {
				t.Skipf("exception: %s", why)
			}
			h := &house{t: t, place: fresh(t)}
			h.engine = h.place.Open(t)
			defer h.leave()
			c.run(t, h)
		})
	}
}

// testCase is one thing that an engine must do.
type testCase struct {
	name string
	run  func(*testing.T, *house)
}

func all() []testCase {
	return slices.Concat(lifeCases(), endCases(), commandCases(), interactiveCases(), limitCases(), fileLimitCases(),
		imageCases(), volumeCases(), connectCases())
}

// patience bounds waits for things that take milliseconds: long enough for a loaded
// machine, so that it is reached only by what never comes.
const patience = 60 * time.Second

// house is one engine in one Place, and what a case opens in it.
type house struct {
	t       *testing.T
	place   Place
	engine  engine.Engine
	clients []*guestclient.Client
	count   int // of commands, for their ids
	images  []engine.ImageRef
	volumes []string
}

// ctx bounds one step of a case.
func (h *house) ctx() context.Context {
	ctx, cancel := context.WithTimeoutCause(h.t.Context(), patience, errors.New("the step took more than a minute"))
	h.t.Cleanup(cancel)
	return ctx
}

// reopen closes the engine and opens another over what it left.
func (h *house) reopen() {
	h.t.Helper()
	h.hangUp()
	if err := h.engine.Close(); err != nil {
		h.t.Fatalf("close the engine: %v", err)
	}
	h.engine = h.place.Open(h.t)
}

func (h *house) hangUp() {
	for _, c := range h.clients {
		c.Close()
	}
	h.clients = nil
}

// leave ends everything and looks whether anything is left.
func (h *house) leave() {
	h.hangUp()
	ctx, cancel := context.WithTimeoutCause(context.Background(), patience, errors.New("the end of the case took more than a minute"))
	defer cancel()
	ids, err := h.engine.List(ctx)
	if err != nil {
		h.t.Errorf("list sandboxes at the end of the case: %v", err)
	}
	for _, id := range ids {
		sb, err := h.engine.Open(ctx, id)
		if err == nil {
			_, err = sb.Terminate(ctx)
		} else if isNotFound(err) {
			err = nil
		}
		if err != nil {
			h.t.Errorf("end sandbox %s at the end of the case: %v", id, err)
		}
	}
	h.mustList(ctx)
	for _, ref := range h.images {
		if err := h.engine.Images().Delete(ctx, ref); err != nil {
			h.t.Errorf("delete image %s at the end of the case: %v", ref, err)
		}
	}
	for _, name := range h.volumes {
		if err := h.engine.Volumes().Delete(ctx, name); err != nil {
			h.t.Errorf("delete volume %s at the end of the case: %v", name, err)
		}
	}
	if err := h.engine.Close(); err != nil {
		h.t.Errorf("close the engine: %v", err)
	}
}

// mustList fails the test if the engine does not list exactly these.
func (h *house) mustList(ctx context.Context, want ...string) {
	h.t.Helper()
	got, err := h.engine.List(ctx)
	if err != nil {
		h.t.Errorf("list sandboxes: %v", err)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		h.t.Errorf("the engine lists %q, want %q", got, want)
	}
}

// eventually polls until a condition holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}
