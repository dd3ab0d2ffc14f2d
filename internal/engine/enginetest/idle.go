package enginetest

import (
	"testing"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
)

// idleness is ended, and work is not taken for it: the guest must be able to see in this
// sandbox what its commands use.
func idleness(t *testing.T, h *house) {
	b := h.create("idle", engine.Limits{})
	for id, c := range map[string]struct {
		script string
		cause  guestv1.StopCause
	}{
		"silent": {"while :; do sleep 0.2; done", guestv1.StopCause_STOP_CAUSE_IDLE},
		"busy":   {"timeout 3 bash -c 'while :; do :; done'; exit 5", guestv1.StopCause_STOP_CAUSE_UNSPECIFIED},
	} {
		r := request(id, "bash", "-c", c.script)
		r.IdleMs, r.TimeoutMs, r.GraceMs = 1200, 60_000, 1000
		if _, err := b.guest.Start(h.ctx(), r); err != nil {
			t.Fatal(err)
		}
		out := b.finish(id)
		if out.exit.GetStopCause() != c.cause || c.cause == guestv1.StopCause_STOP_CAUSE_UNSPECIFIED && !exited(out, 5) {
			t.Errorf("%s: %v, stopped for %v", id, out, out.exit.GetStopCause())
		}
	}
}
