package api

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

// senders runs the sending side of streams. grpc-go has no deadline for one Send,
// and a Send that waits for its client ends only when the RPC does, which is when
// the handler returns. So the handler watches, and the sending is done in a second
// goroutine, which the end of the handler frees in the worst case.
type senders struct {
	patience time.Duration
	statuses *statuses
	group    sync.WaitGroup
}

// run does work, which marks its Sends, and returns its error, or a fault
// SLOW_CONSUMER when one Send has lasted longer than patience. In that case work
// goes on until its Send returns, shortly after the handler has: so work must own
// everything it uses.
func (s *senders) run(ctx context.Context, work func(*pace) error) error {
	p := newPace()
	done := make(chan error, 1)
	s.group.Go(func() {
		defer func() {
			// The recovery interceptor sees only the handler's goroutine.
			if v := recover(); v != nil {
				done <- s.statuses.recovered(ctx, v)
			}
		}()
		done <- work(p)
	})
	timer := time.NewTimer(s.patience)
	defer timer.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-timer.C:
			left := s.patience - p.stalled()
			if left <= 0 {
				return errSlowConsumer(s.patience)
			}
			timer.Reset(left)
		}
	}
}

// wait waits for all senders. Call it when the RPCs have ended.
func (s *senders) wait() { s.group.Wait() }

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
		"the client took nothing from the stream for %v; nothing is lost: go on watching from the last cursor", patience).
		With("patience", patience.String())
}
