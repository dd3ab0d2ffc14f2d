package execution

import (
	"context"
	"strconv"

	"github.com/harvest-run/executord/internal/engine"
)

// openNetwork gives the sandbox of a one-shot what its policy lets it reach; that of a
// session has it. A result means that it cannot be had; nil also that the Service is
// closing.
func (r *run) openNetwork(ctx context.Context) *Result {
	if r.session != "" {
		r.network = r.service.cfg.Network.Of(r.sandbox.ID())
		return nil
	}
	bounded, cancel := context.WithTimeoutCause(ctx, answerTime, errNoAnswer)
	defer cancel()
	network, err := r.service.cfg.Network.Open(bounded, r.sandbox, r.record.Network)
	switch {
	case err == nil:
		r.network = network
		return nil
	case ctx.Err() != nil:
		return nil
	}
	return startFailed("no_network", err)
}

// resumeNetwork is openNetwork for a one-shot that another executord began.
func (r *run) resumeNetwork(ctx context.Context) {
	var err error
	if r.network, err = r.service.cfg.Network.Resume(r.sandbox, r.record.Network); err != nil {
		r.service.log.WarnContext(ctx, "an execution goes on without its network", "execution", r.id, "error", err)
	}
}

// attestNetwork adds what a sandbox of the execution's own did over the network, as far
// as this executord has seen it.
func (r *run) attestNetwork(res *Result) {
	if r.session != "" || r.network.Policy().Mode != engine.NetworkEgress {
		return
	}
	counts := r.network.Counts()
	res.Evidence["egress_connections"] = strconv.FormatInt(counts.Connections, 10)
	res.Evidence["egress_refused"] = strconv.FormatInt(counts.Refused, 10)
	if counts.FirstRefused != "" {
		res.Evidence["egress_first_refused"] = counts.FirstRefused
	}
}
