package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
	"golang.org/x/sync/errgroup"
)

const (
	// sweepers is how many sandboxes are ended at a time.
	sweepers = 4
	// sweepInterval is how often it is looked again for what is left. A sandbox that
	// could not be ended costs money at some engines.
	sweepInterval = 5 * time.Minute
	// listTime bounds the asking of an engine for its sandboxes.
	listTime = 30 * time.Second
)

// unfinished knows what should have a sandbox.
type unfinished interface {
	UnfinishedSessions(ctx context.Context) ([]session.Session, error)
	UnfinishedExecutions(ctx context.Context) ([]execution.Execution, error)
}

// stray is a sandbox that nobody needs.
type stray struct {
	engine  engine.Engine
	sandbox string
}

// findStrays returns the sandboxes that the engines have and that nothing unfinished
// needs. The engines are asked first: so a sandbox that is made meanwhile is not taken
// for a stray, and one that is ended meanwhile is at worst ended twice. An engine that
// cannot say what it has is asked again by sweep.
func findStrays(ctx context.Context, all engines.Set, known unfinished, log *slog.Logger) ([]stray, error) {
	var found []stray
	for _, e := range all {
		bounded, cancel := context.WithTimeoutCause(ctx, listTime, fmt.Errorf("no answer within %v", listTime))
		ids, err := e.List(bounded)
		cancel()
		if err != nil {
			log.ErrorContext(ctx, "cannot look for sandboxes that nobody needs, trying again later", "engine", e.Name(), "error", err)
			continue
		}
		for _, id := range ids {
			found = append(found, stray{e, id})
		}
	}
	needed, err := findNeeded(ctx, known)
	if err != nil {
		return nil, err
	}
	var strays []stray
	for _, one := range found {
		if !needed[one.sandbox] {
			strays = append(strays, one)
		}
	}
	return strays, nil
}

// findNeeded names the sandboxes of what has not ended.
func findNeeded(ctx context.Context, known unfinished) (map[string]bool, error) {
	sessions, err := known.UnfinishedSessions(ctx)
	if err != nil {
		return nil, fmt.Errorf("read unfinished sessions: %w", err)
	}
	executions, err := known.UnfinishedExecutions(ctx)
	if err != nil {
		return nil, fmt.Errorf("read unfinished executions: %w", err)
	}
	needed := make(map[string]bool, len(sessions)+len(executions))
	for _, s := range sessions {
		needed[s.Sandbox] = true
	}
	for _, x := range executions {
		// One in a session does not keep that session's sandbox alive.
		if x.Session == "" {
			needed[x.Sandbox] = true
		}
	}
	return needed, nil
}

// sweep ends the strays, and looks for more from time to time until ctx ends. A stop that
// leaves sandboxes alive leaves these to the next start; one that ends everything ends
// them too.
func (d *Daemon) sweep(ctx context.Context) {
	first := ctx
	if d.terminates() {
		bounded, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), endTime, fmt.Errorf("not ended within %v", endTime))
		defer cancel()
		first = bounded
	}
	endStrays(first, d.strays, d.log)
	d.sweepAgain(ctx)
}

// sweepAgain looks for sandboxes that are left of what has ended. One is ended when it is
// found twice, so that whoever is at it has the time between.
func (d *Daemon) sweepAgain(ctx context.Context) {
	ticker := time.NewTicker(sweepInterval)
	defer ticker.Stop()
	suspects := make(map[stray]bool)
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		strays, err := d.findLeft(ctx)
		if err != nil {
			d.log.ErrorContext(ctx, "look for sandboxes that nobody needs", "error", err)
			continue
		}
		var sure []stray
		again := make(map[stray]bool, len(strays))
		for _, one := range strays {
			again[one] = true
			if suspects[one] {
				sure = append(sure, one)
			}
		}
		suspects = again
		endStrays(ctx, sure, d.log)
	}
}

// findLeft is findStrays for what is left of executions and sessions of this time: other
// sandboxes, such as those that the pool keeps, are in no record. One that a session is
// moving to has the session in its name, and not yet in its record.
func (d *Daemon) findLeft(ctx context.Context) ([]stray, error) {
	strays, err := findStrays(ctx, d.engines, d.known, d.log)
	if err != nil {
		return nil, err
	}
	sessions, err := d.known.UnfinishedSessions(ctx)
	if err != nil {
		return nil, fmt.Errorf("read unfinished sessions: %w", err)
	}
	alive := make(map[string]bool, len(sessions))
	for _, s := range sessions {
		alive[s.ID] = true
	}
	var left []stray
	for _, one := range strays {
		kind, rest, _ := strings.Cut(one.sandbox, "-")
		of, _, _ := strings.Cut(rest, "-")
		if kind == "e" || kind == "s" && !alive[of] {
			left = append(left, one)
		}
	}
	return left, nil
}

// endStrays ends sandboxes. What cannot be ended is logged and found again.
func endStrays(ctx context.Context, strays []stray, log *slog.Logger) {
	var group errgroup.Group
	group.SetLimit(sweepers)
	for _, one := range strays {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			remains, err := endStray(ctx, one)
			told := []any{"sandbox", one.sandbox, "engine", one.engine.Name()}
			if err != nil {
				log.ErrorContext(ctx, "end a sandbox that nobody needs", append(told, "error", err)...)
			} else {
				log.InfoContext(ctx, "ended a sandbox that nobody needs", append(told, "processes", remains.Processes)...)
			}
			return nil
		})
	}
	_ = group.Wait() // None of them returns an error.
}

func endStray(ctx context.Context, one stray) (engine.Remains, error) {
	sandbox, err := one.engine.Open(ctx, one.sandbox)
	if fault.KindOf(err) == fault.NotFound {
		// Nothing is left of it, which is all that is wanted.
		return engine.Remains{}, nil
	}
	if err != nil {
		return engine.Remains{}, fmt.Errorf("open it: %w", err)
	}
	return sandbox.Terminate(ctx)
}
