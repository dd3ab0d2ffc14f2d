package execution

import (
	"context"
	"time"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/engine"
)

// needOf is what an execution takes while it has not ended.
func needOf(e Execution) admission.Need {
	return admission.Need{Run: true, Sandbox: e.Session == ""}
}

// claim takes a sandbox that is ready for a one-shot, if there is one, and returns the
// name of the run's sandbox. That must be recorded before anything is started in it; a
// sandbox that no record names is ended as a stray.
func (r *run) claim() string {
	// Those that are ready have a network of their own, which does for egress, too.
	if r.session != "" || r.service.cfg.Pool == nil || r.record.Network.Mode == engine.NetworkHost || !r.placement.IsZero() ||
		!r.service.cfg.Engines.IsDefault(r.record.Engine) {
		return r.record.Sandbox
	}
	if sandbox, ok := r.service.cfg.Pool.Claim(engine.Spec{Limits: r.record.Limits}); ok {
		r.sandbox, r.times.SandboxReady = sandbox, time.Now()
		r.mu.Lock()
		defer r.mu.Unlock()
		r.record.Sandbox = sandbox.ID()
	}
	return r.record.Sandbox
}

// discard ends a sandbox that was claimed for an execution which did not come to be.
func (r *run) discard(ctx context.Context) {
	if r.session != "" || r.sandbox == nil {
		return
	}
	r.service.work.Go(func() {
		if _, err := r.terminate(context.WithoutCancel(ctx)); err != nil {
			r.service.log.ErrorContext(ctx, "a sandbox is left until the next start", "sandbox", r.sandbox.ID(), "error", err)
		}
	})
}
