package daemon

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
	"golang.org/x/sync/errgroup"
)

// sweepers is how many sandboxes are ended at a time.
const sweepers = 4

// unfinished knows what should have a sandbox.
type unfinished interface {
	UnfinishedSessions(ctx context.Context) ([]session.Session, error)
	UnfinishedExecutions(ctx context.Context) ([]execution.Execution, error)
}

// findStrays returns the sandboxes that the engine has and that nothing unfinished
// needs. The engine is asked first: so a sandbox that is made meanwhile is not taken
// for a stray, and one that is ended meanwhile is at worst ended twice.
func findStrays(ctx context.Context, e engine.Engine, known unfinished) ([]string, error) {
	found, err := e.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
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
	var strays []string
	for _, id := range found {
		if !needed[id] {
			strays = append(strays, id)
		}
	}
	return strays, nil
}

// sweep ends the strays. A stop that leaves sandboxes alive leaves these to the next
// start; one that ends everything ends them too.
func (d *Daemon) sweep(ctx context.Context) {
	if d.terminates() {
		bounded, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), endTime, fmt.Errorf("not ended within %v", endTime))
		defer cancel()
		ctx = bounded
	}
	endStrays(ctx, d.engine, d.strays, d.log)
}

// endStrays ends sandboxes. What cannot be ended is logged and left for the next start.
func endStrays(ctx context.Context, e engine.Engine, strays []string, log *slog.Logger) {
	var group errgroup.Group
	group.SetLimit(sweepers)
	for _, id := range strays {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			remains, err := endStray(ctx, e, id)
			if err != nil {
				log.ErrorContext(ctx, "end a sandbox that nobody needs", "sandbox", id, "error", err)
			} else {
				log.InfoContext(ctx, "ended a sandbox that nobody needs", "sandbox", id, "processes", remains.Processes)
			}
			return nil
		})
	}
	_ = group.Wait() // None of them returns an error.
}

func endStray(ctx context.Context, e engine.Engine, id string) (engine.Remains, error) {
	sandbox, err := e.Open(ctx, id)
	if fault.KindOf(err) == fault.NotFound {
		// Nothing is left of it, which is all that is wanted.
		return engine.Remains{}, nil
	}
	if err != nil {
		return engine.Remains{}, fmt.Errorf("open it: %w", err)
	}
	return sandbox.Terminate(ctx)
}
