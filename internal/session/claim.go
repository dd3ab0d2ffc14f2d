package session

import (
	"context"
	"fmt"

	"github.com/harvest-run/executord/internal/engine"
)

// claim takes a sandbox that is ready, if there is one, and returns the record with its
// name. That must be written before the session is told of; a sandbox that no record
// names is ended as a stray.
func (l *live) claim() Session {
	// Those that are ready have a network of their own, which does for egress, too.
	// Those that start from an image of their own, or with a volume, are not among them.
	d := l.record.Details
	if l.service.cfg.Pool == nil || l.record.Network.Mode == engine.NetworkHost || !d.Placement.IsZero() ||
		!l.service.cfg.Engines.IsDefault(l.record.Engine) || d.Agent != nil || d.Image != "" || d.Snapshot != "" {
		return l.snapshot()
	}
	sandbox, ok := l.service.cfg.Pool.Claim(engine.Spec{Limits: l.record.Limits})
	if ok {
		l.mu.Lock()
		l.claimed, l.record.Sandbox = sandbox, sandbox.ID()
		l.mu.Unlock()
	}
	return l.snapshot()
}

// discard ends a sandbox that was claimed for a session which did not come to be.
func (l *live) discard(ctx context.Context) {
	if l.claimed == nil {
		return
	}
	l.service.work.Go(func() {
		bounded, stop := context.WithTimeoutCause(context.WithoutCancel(ctx), sandboxTime, fmt.Errorf("not ended within %v", sandboxTime))
		defer stop()
		if _, err := l.claimed.Terminate(bounded); err != nil {
			l.service.log.ErrorContext(ctx, "a sandbox is left until the next start", "sandbox", l.claimed.ID(), "error", err)
		}
	})
}
