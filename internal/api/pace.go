package api

import (
	"sync/atomic"
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

// pace knows how long the present Send of one stream has been waiting. The sender
// marks, the watching handler looks.
type pace struct {
	start time.Time
	// since is when the present Send began, in nanoseconds after start; 0 outside one.
	since atomic.Int64
}

func newPace() *pace { return &pace{start: time.Now()} }

// begin marks that a Send begins.
func (p *pace) begin() { p.since.Store(max(1, int64(time.Since(p.start)))) }

// end marks that it has ended and returns the time.
func (p *pace) end() time.Time {
	p.since.Store(0)
	return time.Now()
}

// stalled is how long the present Send has lasted, 0 if there is none.
func (p *pace) stalled() time.Duration {
	since := p.since.Load()
	if since == 0 {
		return 0
	}
	return time.Since(p.start) - time.Duration(since)
}

// errSlowConsumer ends a stream whose client takes nothing.
func errSlowConsumer(patience time.Duration) error {
	return fault.New(fault.Exhausted, "SLOW_CONSUMER",
		"the client took nothing from the stream for %v; nothing is lost: continue with WatchExecution from the last cursor", patience).
		With("patience", patience.String())
}
