package daemon

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/lifecycle"
)

const (
	// endTime bounds the ending of everything that runs: the longest grace period of a
	// command is 10 minutes.
	endTime = 11 * time.Minute
	// deliverTime is how long streams whose execution has ended may take to deliver the
	// rest of it.
	deliverTime = 2 * time.Second
	// stopTime is how long RPCs may take to end once they have been cut off.
	stopTime = 10 * time.Second
)

// errStopping is the cause with which streams are cut off.
var errStopping = errors.New("executord is stopping")

// Run serves until ctx ends, stops gracefully and closes everything. It returns nil
// after a stop that was asked for. Call it once.
func (d *Daemon) Run(ctx context.Context) error {
	parts := lifecycle.NewGroup(context.WithoutCancel(ctx))
	parts.Go(func(context.Context) error {
		if err := d.server.Serve(d.listener); err != nil {
			return fmt.Errorf("serve on %s: %w", d.listener.Addr(), err)
		}
		return nil
	})
	parts.Go(func(broken context.Context) error {
		// Both ends begin the same stop; then what still sweeps is told to end too.
		select {
		case <-ctx.Done():
			d.stop(context.WithoutCancel(ctx), context.Cause(ctx))
		case <-broken.Done():
			d.stop(context.WithoutCancel(ctx), context.Cause(broken))
		}
		parts.Stop(errStopping)
		return nil
	})
	parts.Go(func(ctx context.Context) error {
		d.sweep(ctx)
		return nil
	})
	parts.Go(func(ctx context.Context) error {
		d.keys.Run(ctx)
		return nil
	})
	parts.Go(func(ctx context.Context) error {
		idempotency.Sweep(ctx, d.requests, d.log)
		return nil
	})
	parts.Go(d.pool.Run)
	d.log.InfoContext(ctx, "ready", "address", d.listener.Addr().String(), "engines", d.engines.Names(),
		"executions", d.executions.Running(), "sessions", d.sessions.Running(), "strays", len(d.strays))
	err := parts.Wait()
	err = errors.Join(err, d.opened.close())
	d.log.InfoContext(ctx, "stopped")
	return err
}

// stop ends the service in the order that loses nothing: no new work, nor sandboxes for
// it, then what runs,
// then those who watch it.
func (d *Daemon) stop(ctx context.Context, why error) {
	d.log.InfoContext(ctx, "stopping", "cause", why,
		"executions", d.executions.Running(), "sessions", d.sessions.Running(), "drain_timeout", d.drainTimeout())
	d.info.setDraining()
	d.server.SetServing(false)
	d.pool.Drain()
	d.sessions.Drain()
	d.drain(ctx)
	if d.terminates() {
		d.terminate(ctx)
	}
	left := d.executions.Running()
	if left > 0 {
		d.log.InfoContext(ctx, "leaving executions to run on in their sandboxes", "executions", left)
	}
	d.hangUp(left == 0)
}

// drain refuses new executions and waits for those that run.
func (d *Daemon) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeoutCause(ctx, d.drainTimeout(), errors.New("the drain timeout passed"))
	defer cancel()
	if err := d.executions.Drain(ctx); err != nil {
		d.log.InfoContext(ctx, "did not wait for all executions", "reason", err)
	}
}

// terminate ends what runs and the sessions.
func (d *Daemon) terminate(ctx context.Context) {
	ctx, cancel := context.WithTimeoutCause(ctx, endTime, fmt.Errorf("not ended within %v", endTime))
	defer cancel()
	// Executions first, so that those in sessions too end as stopped with the server.
	if err := errors.Join(d.executions.StopAll(ctx), d.sessions.StopAll(ctx)); err != nil {
		d.log.ErrorContext(ctx, "end what runs", "error", err)
	}
}

// hangUp ends the RPCs. Streams of what has ended get time to deliver the end;
// those of what runs on are told to come back.
func (d *Daemon) hangUp(idle bool) {
	var stopping sync.WaitGroup
	ended := make(chan struct{})
	stopping.Go(func() {
		defer close(ended)
		d.server.GracefulStop()
	})
	if idle {
		waitFor(ended, deliverTime)
	}
	d.cutOff(errStopping)
	waitFor(ended, stopTime)
	// Ends what is left, a GracefulStop that still waits included.
	d.server.Stop()
	stopping.Wait()
}

// waitFor waits until c is closed or d has passed.
func waitFor(c <-chan struct{}, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-c:
	case <-timer.C:
	}
}
