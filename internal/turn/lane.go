package turn

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/fault"
)

// queueRetry is when a caller who finds the queue full may come back.
const queueRetry = 5 * time.Second

// lane is the queue of one session: what waits, what runs, and who it is run by.
type lane struct {
	service *Service
	session string

	// sending is held while something is put into the queue: so the order in it is that of
	// the numbers.
	sending sync.Mutex

	mu      sync.Mutex
	waiting []*live
	leaving []*live // taken out of the queue, their end is being recorded
	running *live   // also while the agent is away
	totals  Totals
	by      *attachment // nil while the agent is away
	held    bool        // nothing is begun
	over    bool        // the session ends: nothing is taken on
	nudge   chan struct{}
}

// attachment is an agent that runs what is in a lane.
type attachment struct {
	conversation agent.Conversation
	cancel       context.CancelCauseFunc
	left         chan struct{} // closed when it does nothing any more
	gone         bool          // it was let go of, and may be about to leave
}

func newLane(s *Service, session string, totals Totals) *lane {
	return &lane{service: s, session: session, totals: totals, nudge: make(chan struct{}, 1)}
}

// send records a turn and puts it into the queue.
func (l *lane) send(ctx context.Context, r Request) (Turn, error) {
	l.sending.Lock()
	defer l.sending.Unlock()
	// Asked again: a session that began to end before the lock was had has not found this
	// turn, and one that begins now will.
	profile, err := l.service.home().Profile(ctx, l.session, r.Caller)
	if err != nil {
		return Turn{}, err
	}
	t, err := l.plan(r, profile)
	if err != nil {
		return Turn{}, err
	}
	log, err := l.service.journals.Create(t.ID)
	if err != nil {
		return Turn{}, diskFault(err)
	}
	one := newLive(l, t, log)
	if err = one.append(Event{Started: &Started{Session: l.session, Turn: t.ID, Before: t.Before}}); err == nil {
		err = l.service.cfg.Store.InsertTurn(ctx, r.Key, t)
	}
	if err != nil {
		err = errors.Join(err, l.service.journals.Remove(t.ID))
		log.Close()
		return Turn{}, fmt.Errorf("record a turn of session %s: %w", l.session, diskFault(err))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.totals.Last = t.Number
	l.waiting = append(l.waiting, one)
	l.look()
	return t, nil
}

// plan decides what a turn will be.
func (l *lane) plan(r Request, p Profile) (Turn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.over:
		return Turn{}, fault.New(fault.FailedPrecondition, "SESSION_NOT_RUNNING", "session %q is being ended", l.session)
	case len(l.waiting) >= MaxWaiting:
		full := fault.New(fault.Exhausted, "QUEUE_FULL", "%d prompts of session %q wait already", MaxWaiting, l.session)
		full.RetryAfter = queueRetry
		return Turn{}, full
	}
	if err := p.Limit.check(l.totals, len(l.waiting)); err != nil {
		return Turn{}, err
	}
	now := time.Now()
	before := len(l.waiting)
	if l.running != nil {
		before++
	}
	return Turn{
		ID: newID(now), Session: l.session, Number: l.totals.Last + 1, Owner: r.Caller.Owner, State: Queued, Prompt: r.Prompt,
		CreateTime: now, Before: before,
	}, nil
}

// check returns a fault Exhausted (TURN_LIMIT, SPEND_LIMIT) if another turn would be
// beyond the limit.
func (limit Limit) check(t Totals, waiting int) error {
	if limit.Turns > 0 && t.Begun+waiting >= limit.Turns {
		return exhausted("TURN_LIMIT", "turns", int64(limit.Turns), "the session may have %d turns, and has had or queued them", limit.Turns)
	}
	if limit.CostMicros > 0 && t.Usage.CostMicros >= limit.CostMicros {
		return exhausted("SPEND_LIMIT", "cost_micros", limit.CostMicros, "the session's turns have used %s of the %s that they may", dollars(t.Usage.CostMicros), dollars(limit.CostMicros))
	}
	return nil
}

func exhausted(reason, name string, limit int64, format string, args ...any) error {
	e := fault.New(fault.Exhausted, reason, format, args...)
	e.Quotas = []fault.Quota{{Subject: "session", Description: e.Message, Name: name, Limit: limit}}
	return e.With("limit", fmt.Sprint(limit))
}

func dollars(micros int64) string { return fmt.Sprintf("$%d.%06d", micros/1e6, micros%1e6) }

// find returns a turn that has not ended.
func (l *lane) find(id string) *live {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.running != nil && l.running.id == id {
		return l.running
	}
	for _, some := range [][]*live{l.waiting, l.leaving} {
		if i := slices.IndexFunc(some, func(one *live) bool { return one.id == id }); i >= 0 {
			return some[i]
		}
	}
	return nil
}

// position is how many turns run before one that waits.
func (l *lane) position(one *live) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := max(slices.Index(l.waiting, one), 0)
	if l.running != nil && l.running != one {
		before++
	}
	return before
}

func (l *lane) conversation() agent.Conversation {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.by == nil || l.by.gone {
		return nil
	}
	return l.by.conversation
}

// look wakes the agent that runs the lane. The caller holds mu.
func (l *lane) look() {
	select {
	case l.nudge <- struct{}{}:
	default:
	}
}

// cancel orders the end of a turn, whether it waits or runs.
func (l *lane) cancel(one *live, o order) {
	if l.take(one) {
		// Nobody else has it now.
		l.service.spawn(func() { one.finish(l.service.within(), o.result("")) })
		return
	}
	one.stop(o)
}

// take takes a turn out of the queue; false if it does not wait.
func (l *lane) take(one *live) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.waiting, one)
	if i < 0 {
		return false
	}
	l.waiting = slices.Delete(l.waiting, i, i+1)
	l.leaving = append(l.leaving, one)
	return true
}

// attach has an agent run the lane.
func (l *lane) attach(c agent.Conversation) {
	ctx, cancel := context.WithCancelCause(l.service.within())
	a := &attachment{conversation: c, cancel: cancel, left: make(chan struct{})}
	l.mu.Lock()
	before := l.by
	if l.over {
		l.mu.Unlock()
		cancel(errDetached)
		return
	}
	l.by = a
	l.mu.Unlock()
	if before != nil {
		before.cancel(errDetached)
	}
	if !l.service.spawn(func() {
		defer close(a.left)
		defer cancel(errDetached)
		if before != nil {
			<-before.left // it is the same turn that both would lead
		}
		l.run(ctx, c)
	}) {
		close(a.left)
		cancel(ErrClosed)
	}
}

// run leads one turn after another until ctx ends.
func (l *lane) run(ctx context.Context, c agent.Conversation) {
	for ctx.Err() == nil {
		one := l.next()
		if one == nil {
			select {
			case <-l.nudge:
			case <-ctx.Done():
			}
			continue
		}
		one.lead(ctx, c)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.look() // what this one took the nudge for, the next one has to see
}

// next is the turn that runs, or whose time has come; nil if there is none.
func (l *lane) next() *live {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.running == nil && len(l.waiting) > 0 && !l.held && !l.over {
		l.running = l.waiting[0]
		l.waiting = l.waiting[1:]
	}
	return l.running
}

// present is the turn that runs; nil if none does.
func (l *lane) present() *live {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.running
}

// ended takes the sum of a turn that has ended and lets go of it.
func (l *lane) ended(t Turn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.running != nil && l.running.id == t.ID {
		l.running = nil
	}
	l.leaving = slices.DeleteFunc(l.leaving, func(one *live) bool { return one.id == t.ID })
	l.totals.Usage = l.totals.Usage.Add(t.Result.Usage)
	l.totals.LastEnd = t.EndTime
	l.look()
}

// begun counts a turn that begins.
func (l *lane) begun() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.totals.Begun++
}

// spent is what the turns before the present one have used.
func (l *lane) spent() Totals {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.totals
}

// detach has the agent stop, with what it runs, and lets go of it. When ctx ends first it
// lets go all the same: then the turn is still there to be joined.
func (l *lane) detach(ctx context.Context, why error) error {
	l.mu.Lock()
	a, one := l.by, l.running
	if a == nil || a.gone {
		l.mu.Unlock()
		return nil
	}
	l.held = true
	l.mu.Unlock()
	var err error
	if one != nil {
		one.stop(order{detail: why.Error()})
		select {
		case <-one.done:
		case <-a.left:
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	a.cancel(errDetached)
	select {
	case <-a.left:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	a.gone, l.held = true, false
	return err
}

// close ends all turns of the lane and returns when they have ended.
func (l *lane) close(ctx context.Context) error {
	l.sending.Lock() // what is being recorded is found
	l.mu.Lock()
	l.over = true
	all := slices.Concat(l.waiting, l.leaving)
	l.mu.Unlock()
	l.sending.Unlock()
	for _, one := range all {
		l.cancel(one, order{detail: "the session was ended"})
	}
	if err := l.detach(ctx, errors.New("the session was ended")); err != nil {
		return err
	}
	if one := l.present(); one != nil {
		// Nobody can ask the agent any more.
		all = append(all, one)
		l.service.spawn(func() {
			one.finish(l.service.within(), &Result{Outcome: agent.Lost, Detail: "the session was ended while its agent could not be asked", Usage: one.used()})
		})
	}
	for _, one := range all {
		select {
		case <-one.done:
		case <-l.service.within().Done():
			return ErrClosed
		case <-ctx.Done():
			return fmt.Errorf("end turn %s: %w", one.id, context.Cause(ctx))
		}
	}
	return nil
}

// profile reads what a turn needs to know of its session, for executord itself.
func (l *lane) profile(ctx context.Context) (Profile, error) {
	return l.service.home().Profile(ctx, l.session, caller.Caller{All: true})
}

// errDetached ends the work of an agent that goes.
var errDetached = errors.New("the agent is let go of")
