package modal

import (
	"context"
	"errors"
	"fmt"
	"time"

	sdk "github.com/modal-labs/modal-client/go"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

const (
	// placeTimeout bounds a create: Modal waits for room, for 21 min where there are GPUs.
	placeTimeout = 25 * time.Minute
	// leaveTimeout is how long a caller who gives up waits until nothing is left.
	leaveTimeout = time.Minute
	// lateTimeout is how long a sandbox may still come up whose create failed.
	lateTimeout = 10 * time.Minute
)

// Create makes a sandbox, or returns the one that has the id and lives.
func (e *Engine) Create(ctx context.Context, spec engine.Spec) (_ engine.Sandbox, err error) {
	if !validID(spec.ID) {
		return nil, invalidID(spec.ID)
	}
	if err := e.CheckSpec(spec); err != nil {
		return nil, err
	}
	done, err := e.claim(ctx, spec.ID)
	if err != nil {
		return nil, err
	}
	keepClaim := false
	defer func() {
		if !keepClaim {
			done()
		}
	}()
	if sb := e.known(spec.ID); sb != nil {
		if !sb.over() {
			return sb, nil
		}
		// What is left of one that died makes room.
		if _, err := sb.Terminate(ctx); err != nil {
			return nil, err
		}
	}
	image, err := e.image(ctx, spec.Image)
	if err != nil {
		return nil, err
	}
	params, known, err := e.params(ctx, spec)
	if err != nil {
		return nil, err
	}
	app, err := e.theApp(ctx)
	if err != nil {
		return nil, err
	}
	if err := e.ceiling.admit(spec.ID); err != nil {
		return nil, err
	}

	// Beside the caller: one who gives up must not leave a sandbox that nobody knows of,
	// and only the answer says whether there is one.
	type result struct {
		sb  *sandbox
		err error
	}
	made := make(chan result, 1)
	asked := e.spawn(func() {
		call, cancel := e.detached(ctx, placeTimeout)
		defer cancel()
		sb, err := e.make(call, ctx, order{app, image, params, known, spec})
		made <- result{sb, err}
	})
	if !asked {
		e.ceiling.gone(spec.ID)
		return nil, errClosing
	}
	select {
	case r := <-made:
		if r.err != nil {
			return nil, r.err
		}
		return r.sb, nil
	case <-ctx.Done():
	}
	gone := make(chan struct{})
	leave := func() {
		defer close(gone)
		defer done()
		if r := <-made; r.err == nil {
			e.end(ctx, r.sb)
		}
	}
	keepClaim = true
	if e.spawn(leave) {
		select {
		case <-gone:
		case <-time.After(leaveTimeout):
		}
	} else {
		leave() // what was asked for ends with the engine
	}
	return nil, fmt.Errorf("make sandbox %s: %w", spec.ID, context.Cause(ctx))
}

// order is all that a sandbox is made of.
type order struct {
	app    *sdk.App
	image  *sdk.Image
	params *sdk.SandboxCreateParams
	known  record
	spec   engine.Spec
}

// make asks for a sandbox and starts the guest. ctx is for the calls; the end of caller
// ends the wait for the guest. On an error nothing of it is left, or somebody sees to that.
func (e *Engine) make(ctx, caller context.Context, o order) (*sandbox, error) {
	id := o.spec.ID
	sb, err := e.place(ctx, o)
	if err != nil {
		e.ceiling.gone(id)
		return nil, err
	}
	starting, cancel := context.WithTimeoutCause(ctx, e.cfg.StartTimeout, fault.New(fault.Unavailable, reasonUnavailable,
		"the guest of sandbox %s did not answer within %v", id, e.cfg.StartTimeout))
	defer cancel()
	starting, end := context.WithCancelCause(starting)
	defer end(nil)
	defer context.AfterFunc(caller, func() { end(context.Cause(caller)) })()
	_, err = sb.connect(starting)
	if err == nil {
		err = e.keep(sb)
	}
	if err != nil {
		e.ceiling.outcome(false, caller.Err() == nil)
		e.end(ctx, sb)
		return nil, fmt.Errorf("start the guest of sandbox %s: %w", id, err)
	}
	e.ceiling.outcome(true, false)
	return sb, nil
}

// place asks Modal for a sandbox. Where the answer is not clear it looks for the one that
// there may be.
func (e *Engine) place(ctx context.Context, o order) (*sandbox, error) {
	pause := 200 * time.Millisecond
	for attempt := 1; ; attempt++ {
		handle, err := e.client.Sandboxes.Create(ctx, o.app, o.image, o.params)
		if err == nil {
			return e.newSandbox(handle, o.known), nil
		}
		kind, _, _ := classify(err)
		doubt := inDoubt(err) || ctx.Err() != nil
		if kind == fault.AlreadyExists || doubt {
			sb, found := e.lookAgain(ctx, o.spec.ID, doubt)
			if found == nil {
				return sb, nil
			}
			if kind == fault.AlreadyExists && fault.KindOf(found) == fault.NotFound && attempt < 5 {
				// The one that had the name was ending.
				select {
				case <-time.After(pause):
					pause *= 2
					continue
				case <-ctx.Done():
				}
			}
			if fault.KindOf(found) == fault.AlreadyExists {
				err = found
			}
		}
		e.ceiling.outcome(false, doubt || kind == fault.Exhausted)
		if doubt {
			e.watchForLate(ctx, o.spec.ID)
		}
		return nil, e.createFault(ctx, err, o.spec)
	}
}

// createFault tells why a sandbox was not made.
func (e *Engine) createFault(ctx context.Context, err error, spec engine.Spec) error {
	told := translate(ctx, err, "make sandbox "+spec.ID)
	if kind := fault.KindOf(told); kind == fault.NotFound {
		// Something that it is made of was deleted.
		e.forgetObjects()
		if spec.Image != "" {
			return imageNotFound(spec.Image, err)
		}
		return fault.Wrap(err, fault.Unavailable, reasonNotFound, "make sandbox %s", spec.ID)
	}
	return told
}

func imageNotFound(ref engine.ImageRef, err error) error {
	return fault.Wrap(err, fault.NotFound, "IMAGE_NOT_FOUND", "Modal has no image %q", ref)
}

// lookAgain looks for a sandbox after a create that failed; more than once where the
// create may still be carried out.
func (e *Engine) lookAgain(ctx context.Context, id string, doubt bool) (*sandbox, error) {
	ctx, cancel := e.detached(ctx, leaveTimeout)
	defer cancel()
	pauses := []time.Duration{0}
	if doubt {
		pauses = []time.Duration{0, 300 * time.Millisecond, time.Second, 2 * time.Second}
	}
	var err error
	for _, pause := range pauses {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		var sb *sandbox
		if sb, err = e.find(ctx, id); err == nil {
			return sb, nil
		}
	}
	return nil, err
}

// watchForLate ends a sandbox that comes up after its create was given up. Meanwhile
// whoever asks for the id again finds it by its name, and keeps it.
func (e *Engine) watchForLate(ctx context.Context, id string) {
	ctx = context.WithoutCancel(ctx)
	e.spawn(func() {
		ctx, cancel := e.detached(ctx, lateTimeout)
		defer cancel()
		for pause := 5 * time.Second; ; pause = min(2*pause, time.Minute) {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return
			}
			if e.endLate(ctx, id) {
				return
			}
		}
	})
}

// endLate says whether there is nothing more to watch for.
func (e *Engine) endLate(ctx context.Context, id string) bool {
	done, err := e.claim(ctx, id)
	if err != nil {
		return true
	}
	defer done()
	if e.known(id) != nil {
		return true // somebody asked again
	}
	sb, err := e.find(ctx, id)
	if err != nil {
		return false
	}
	e.cfg.Logger.WarnContext(ctx, "a sandbox came up after its creation was given up, it is ended", "sandbox", id)
	e.end(ctx, sb)
	return true
}

// end ends a sandbox that nobody wants, for as long as it takes; if it takes long,
// beside the caller.
func (e *Engine) end(ctx context.Context, sb *sandbox) {
	call, cancel := e.detached(ctx, leaveTimeout)
	defer cancel()
	if _, err := sb.Terminate(call); err != nil {
		e.cfg.Logger.WarnContext(ctx, "a sandbox could not be ended yet", "sandbox", sb.id, "error", err)
	}
}

// Errors of a line to a guest.
var (
	errNoGuest = errors.New("the sandbox has no executor-guest")
	errOver    = errors.New("the sandbox has ended")
)
