package turn

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/journal"
)

const (
	// firstRetry and lastRetry are the pauses before what failed is tried again.
	firstRetry = 100 * time.Millisecond
	lastRetry  = 5 * time.Second
	// diskRetry is when a caller who found the disk full may come back.
	diskRetry = 10 * time.Second
)

// live is a turn that has not ended.
type live struct {
	lane    *lane
	service *Service
	id      string
	log     *journal.Journal
	done    chan struct{} // closed when its end is recorded
	ending  atomic.Bool   // somebody records its end
	wake    chan struct{} // has one when the minder should look

	// settling is held while an interaction is resolved: each is once.
	settling sync.Mutex
	// writing is held while something is added to the journal. unwritten could not be yet.
	writing   sync.Mutex
	unwritten [][]byte

	mu     sync.Mutex
	record Turn
	order  *order // to end it; the first one stands
	// profile is that of the session when it was last begun or joined.
	profile Profile
	// asked are its interactions, the oldest first; undelivered those whose answer the agent
	// has yet to be given.
	asked       []*Interaction
	undelivered []*Interaction
	// usage is what the agent, by "", and each of its sub-agents used.
	usage map[string]agent.Usage
}

// order is to end a turn.
type order struct {
	// by is who gave it; "" if it was nobody.
	by     string
	detail string
}

// result is that of a turn which ended by the order.
func (o order) result(more string) *Result {
	r := &Result{Outcome: agent.Aborted, Detail: o.detail, CancelledBy: o.by}
	if more != "" {
		r.Detail += "; " + more
	}
	return r
}

func newLive(l *lane, t Turn, log *journal.Journal) *live {
	t.Prompt = Prompt{Author: t.Prompt.Author, Model: t.Prompt.Model} // the rest is in the store
	return &live{
		lane: l, service: l.service, id: t.ID, log: log, record: t,
		done: make(chan struct{}), wake: make(chan struct{}, 1), usage: make(map[string]agent.Usage),
	}
}

// snapshot is the turn as it is now.
func (l *live) snapshot() Turn {
	before := l.lane.position(l)
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.record
	t.Before = 0
	if t.State == Queued {
		t.Before = before
	}
	return t
}

// used is what it has used so far.
func (l *live) used() agent.Usage {
	l.mu.Lock()
	defer l.mu.Unlock()
	var sum agent.Usage
	for _, u := range l.usage {
		sum = sum.Add(u)
	}
	return sum
}

// stop orders the end of a turn that runs, or is about to.
func (l *live) stop(o order) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.order == nil {
		l.order = &o
	}
	l.look()
}

func (l *live) ordered() *order {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.order
}

// look wakes the minder. It never waits.
func (l *live) look() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// append adds an event to the journal, behind what could not be written before. What
// fails is kept, and written with the next.
func (l *live) append(e Event) error {
	data, err := encode(e)
	if err != nil {
		return err
	}
	l.writing.Lock()
	defer l.writing.Unlock()
	l.unwritten = append(l.unwritten, data)
	return l.flushLocked()
}

// flush writes what could not be written before.
func (l *live) flush() error {
	l.writing.Lock()
	defer l.writing.Unlock()
	return l.flushLocked()
}

func (l *live) flushLocked() error {
	for len(l.unwritten) > 0 {
		if _, err := l.log.Append(time.Now(), l.unwritten[0]); err != nil {
			return err
		}
		l.unwritten = l.unwritten[1:]
	}
	l.unwritten = nil
	return nil
}

// enter moves the turn to another state: first in the store, then here.
func (l *live) enter(ctx context.Context, state State, change func(*Turn)) error {
	l.mu.Lock()
	t := l.record
	l.mu.Unlock()
	if !slices.Contains(next()[t.State], state) {
		panic(fmt.Sprintf("turn %s: %v cannot follow %v", l.id, state, t.State)) // a mistake of this package
	}
	t.State = state
	change(&t)
	err := l.persist(ctx, "record its state", func() error { return l.service.cfg.Store.UpdateTurn(context.WithoutCancel(ctx), t) })
	if err == nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.record = t
	}
	return err
}

// finish records the end: in the journal, where watchers see it, then in the store. When
// ctx ends first an executord after this one does.
func (l *live) finish(ctx context.Context, result *Result) {
	if !l.ending.CompareAndSwap(false, true) {
		return // somebody else does
	}
	if !l.void(ctx) {
		return
	}
	result = boundedResult(*result)
	data, err := encode(Event{Result: result})
	if err != nil {
		l.service.log.ErrorContext(ctx, "a turn stays without an end", "turn", l.id, "error", err)
		return
	}
	now := time.Now()
	if l.persist(ctx, "end the journal", func() error {
		if err := l.flush(); err != nil {
			return err
		}
		_, err := l.log.End(now, data)
		if errors.Is(err, journal.ErrEnded) {
			return nil
		}
		return err
	}) != nil {
		return
	}
	l.settle(ctx, result, now)
}

// settle writes the end, which is in the journal, into the store, and tells those who
// wait.
func (l *live) settle(ctx context.Context, result *Result, at time.Time) {
	l.mu.Lock()
	l.record.State, l.record.Result, l.record.EndTime = Ended, result, at
	t := l.record
	l.mu.Unlock()
	err := l.persist(ctx, "record the end", func() error { return l.service.cfg.Store.UpdateTurn(context.WithoutCancel(ctx), t) })
	if err != nil && !errors.Is(err, errFinal) {
		return
	}
	l.lane.ended(t)
	l.service.home().Note(l.lane.session, Note{Turn: &t})
	l.log.Close()
	close(l.done)
}

// errFinal ends the trying: what is to be written is no longer there to be changed.
var errFinal = errors.New("the record cannot be changed any more")

// persist repeats a write until it works, its error is final, or ctx ends.
func (l *live) persist(ctx context.Context, what string, write func() error) error {
	wait := firstRetry
	for n := 1; ; n++ {
		err := write()
		switch kind := fault.KindOf(err); {
		case err == nil:
			return nil
		case kind == fault.NotFound || kind == fault.FailedPrecondition:
			return fmt.Errorf("%w: %w", errFinal, err)
		case ctx.Err() != nil:
			return context.Cause(ctx)
		}
		if n&(n-1) == 0 { // ever more rarely: a full disk can stay so for days
			l.service.log.ErrorContext(ctx, "cannot write, trying again", "turn", l.id, "what", what, "tries", n, "error", err)
		}
		if !pause(ctx, wait) {
			return context.Cause(ctx)
		}
		wait = min(2*wait, lastRetry)
	}
}

// pause waits; false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// diskFault says that the disk is full in a way a caller can act on.
func diskFault(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return &fault.Error{
			Kind: fault.Exhausted, Reason: "DISK_FULL", Err: err, RetryAfter: diskRetry,
			Message: "the disk under executord's state directory is full",
		}
	}
	return err
}
