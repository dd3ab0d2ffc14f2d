// Package lifecycle owns the goroutines of a program from its start to its exit
// code. A Group runs routines that live and die together; Main runs a program as
// one Group, turns SIGINT and SIGTERM into the beginning of a graceful stop, and
// turns what happened into an exit code. It knows nothing of what runs in it and
// imports only the standard library and x/sys.
//
// Things that others need until their own end (a database, a listener) go into a
// second Group, made with context.WithoutCancel of the first one's context, which
// is stopped and waited for when the first has ended.
package lifecycle

import (
	"context"
	"errors"
	"sync"
)

// errEnded is the cause of the context after Wait: a routine that kept it must see
// it end.
var errEnded = errors.New("everything in the group has ended")

// A Group is a set of routines that live and die together: the first error ends the
// context of all. Make one with NewGroup.
type Group struct {
	start  func(routine func(context.Context) error)
	cancel context.CancelCauseFunc
	wait   sync.WaitGroup

	mu  sync.Mutex
	err error
}

// NewGroup makes a Group whose routines get a context derived from ctx: it ends when
// ctx does, at the first error of a routine, and at Stop. Wait must be called.
func NewGroup(ctx context.Context) *Group {
	ctx, cancel := context.WithCancelCause(ctx)
	g := &Group{cancel: cancel}
	// A closure and not a field, so that the context is handed on and never stored.
	g.start = func(routine func(context.Context) error) {
		g.wait.Go(func() {
			if err := routine(ctx); err != nil {
				g.ended(ctx, err)
			}
		})
	}
	return g
}

// Go starts a routine. It must return soon after its context has ended; what it
// then returns counts only if it tells more than that the context ended. A routine
// may start others; nothing may be started once Wait has returned.
func (g *Group) Go(routine func(ctx context.Context) error) { g.start(routine) }

// Stop ends the context of all routines with a cause and does not wait. It is not
// an error; after the first Stop or error it does nothing.
func (g *Group) Stop(cause error) { g.cancel(cause) }

// Wait returns when every routine has, with the first error that one returned. The
// echo of a stop is no error: neither the cause of the context, nor
// context.Canceled once the context has ended.
func (g *Group) Wait() error {
	g.wait.Wait()
	g.cancel(errEnded)
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// ended notes what a routine returned and ends the others.
func (g *Group) ended(ctx context.Context, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if cause := context.Cause(ctx); cause != nil {
		if errors.Is(err, cause) || errors.Is(err, context.Canceled) {
			return
		}
	}
	if g.err == nil {
		g.err = err
	}
	g.cancel(err)
}
