package local

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

const (
	// blankPatience is how long a guest that was ready may take to build its sandbox,
	// which takes milliseconds, before another is made in its place.
	blankPatience = 5 * time.Second
	// refillAfter lies before the making of each: whoever took the last one shall not
	// share the processors with that.
	refillAfter = 2 * time.Millisecond
	// refillAgain is when it is tried again after it failed.
	refillAgain = time.Second
)

// blanks keeps guests ready. A nil one has none.
type blanks struct {
	engine   *Engine
	want     int
	patience time.Duration
	taken    chan struct{} // has room for one: there is something to do
	stop     context.CancelCauseFunc
	work     sync.WaitGroup

	mu    sync.Mutex
	ready []*blank // the oldest first
	dead  []*blank // ended by themselves; to be cleaned up
}

// newBlanks keeps so many ready until close is called.
func newBlanks(ctx context.Context, e *Engine, want int) *blanks {
	ctx, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	m := &blanks{engine: e, want: want, patience: blankPatience, taken: make(chan struct{}, 1), stop: stop}
	m.work.Go(func() { m.refill(ctx) })
	return m
}

// take takes the oldest; nil if there is none.
func (m *blanks) take() *blank {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(m.ready) > 0 {
		b := m.ready[0]
		m.ready = m.ready[1:]
		select {
		case m.taken <- struct{}{}:
		default:
		}
		if !b.process.hasEnded() {
			return b
		}
		m.dead = append(m.dead, b)
	}
	return nil
}

// refill makes guests when some were taken.
func (m *blanks) refill(ctx context.Context) {
	for failing := false; ; {
		var again <-chan time.Time
		err := m.fill(ctx)
		if err != nil && ctx.Err() == nil {
			again = time.After(refillAgain)
			// Whoever needs one makes it, and tells what is wrong. That there is no range of
			// user ids left for it is as it should be.
			if !failing && fault.KindOf(err) != fault.Exhausted {
				m.engine.cfg.Logger.Warn("cannot keep guests ready, trying again", "error", err)
			}
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			return
		case <-m.taken:
		case <-again:
		}
	}
}

// rest waits until no sandbox is being made; false when ctx ended first. Where they are
// made all the time, to make guests ahead only moves the work.
func (m *blanks) rest(ctx context.Context) bool {
	for pause := refillAfter; ; pause = min(2*pause, 25*refillAfter) {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(pause):
		}
		m.engine.mu.Lock()
		making := len(m.engine.creating)
		m.engine.mu.Unlock()
		if making == 0 {
			return true
		}
	}
}

// fill makes as many as are missing.
func (m *blanks) fill(ctx context.Context) error {
	for m.rest(ctx) {
		m.mu.Lock()
		dead, missing := m.dead, m.want-len(m.ready)
		m.dead = nil
		m.mu.Unlock()
		for _, b := range dead {
			if err := b.discard(ctx); err != nil {
				return err
			}
		}
		if missing <= 0 {
			return nil
		}
		b, err := m.engine.newBlank(ctx)
		if err != nil {
			return fmt.Errorf("make a guest ahead: %w", err)
		}
		m.mu.Lock()
		m.ready = append(m.ready, b)
		m.mu.Unlock()
	}
	return nil
}

// close ends those that are ready.
func (m *blanks) close() error {
	if m == nil {
		return nil
	}
	m.stop(errors.New("the engine is closed"))
	m.work.Wait()
	ctx, cancel := context.WithTimeoutCause(context.Background(), time.Minute, errors.New("clean-up took too long"))
	defer cancel()
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs []error
	for _, b := range append(m.ready, m.dead...) {
		errs = append(errs, b.discard(ctx))
	}
	m.ready, m.dead = nil, nil
	return errors.Join(errs...)
}
