package execution

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
)

const (
	// guestSlack is how much later than it should the guest may end a command before
	// its sandbox is ended instead.
	guestSlack = 15 * time.Second
	// answerTime is how long the guest may take to answer beyond what it was asked to
	// wait.
	answerTime = 10 * time.Second
	// unreachable is how long a guest that lives may fail to answer.
	unreachable = 30 * time.Second
	// guestRetry lies between two attempts to reach a guest.
	guestRetry = 100 * time.Millisecond
	// lookRetry is the longest time between two attempts to open a sandbox.
	lookRetry = 5 * time.Second
	// sandboxTime bounds the making and the ending of a sandbox.
	sandboxTime = 2 * time.Minute
	// closeTime is how long a start goes on when the Service is closed.
	closeTime = 10 * time.Second
	// firstRetry lies between the first two attempts to write something or to end a
	// sandbox; it doubles up to lastRetry.
	firstRetry = 50 * time.Millisecond
	lastRetry  = time.Second
	// diskRetry is when a caller may come back after a full disk.
	diskRetry = 10 * time.Second
	// noteAfter is how long a command runs before the store is told since when. Most
	// have ended by then and are not worth the write.
	noteAfter = 2 * time.Second
)

// run is an execution that has not ended. One goroutine leads it from begin or
// resume to its end; the others look at it and order it to stop.
type run struct {
	service *Service
	id      string
	session string
	owner   string
	log     *logHandle
	cancel  context.CancelCauseFunc // ends the leading goroutine
	done    chan struct{}           // closed when the end is recorded
	left    chan struct{}           // closed when the leading goroutine is through
	slot    *admission.Slot         // given back when it leaves
	// launched is closed when the program runs; guest and sandbox stay as they are then.
	launched chan struct{}
	inlet    *inlet
	// placement is that of a sandbox of its own that is to be made.
	placement engine.Placement

	audience *audience
	blocked  atomic.Bool // it waits for watchers to read on

	// Owned by the leading goroutine.
	sandbox  engine.Sandbox
	guest    *guest
	network  *egress.Proxy // nil without network
	before   engine.Usage  // what others had used in the sandbox before
	times    Times
	deadline time.Time          // when the guest should have ended it by itself
	counted  *engine.Usage      // what its sandbox had used when it was last looked at
	counting bool               // the guest has to be told when nothing is used any more
	resumed  bool               // another executord began it
	begun    bool               // the command is known to have been started
	told     bool               // the guest has confirmed an order to stop
	noteAt   time.Time          // when to tell the store that it runs; zero: not any more
	early    *guestclient.Early // the first read, if it was sent with the start
	// over: nobody is left to write output. discarding: its output is not kept any more.
	over, discarding bool
	unkept           uint64 // bytes that were read and had no room
	deadlines        deadlines

	mu        sync.Mutex
	record    Execution  // without what result tells
	result    *Result    // in force once the log is sealed with it
	order     *stopOrder // the first one; its reason counts
	grace     time.Duration
	fresh     bool                    // an order has not reached the guest
	interrupt context.CancelCauseFunc // ends what the leading goroutine waits for
}

// stopOrder says why and how to end an execution.
type stopOrder struct {
	reason Reason
	grace  *time.Duration // nil for the command's own
	by     string
	detail string
	// evidence is added to that of the result.
	evidence map[string]string
}

var (
	// errOrdered interrupts a wait because there is a new order.
	errOrdered = errors.New("the execution was ordered to stop")
	// errNoAnswer ends a request that takes too long.
	errNoAnswer = fmt.Errorf("the guest did not answer within %v", answerTime)
	// errFinal is wrapped by an error after which persist does not try again.
	errFinal = errors.New("given up")
	// errNoRoom ends the writing of output on a full disk.
	errNoRoom = fmt.Errorf("%w: the rest of its output could not be written", errFinal)
)

// newRun makes a run and the context of its leading goroutine, which outlives the
// request that it came from.
func newRun(s *Service, e Execution, log *logHandle, sandbox engine.Sandbox) (context.Context, *run) {
	ctx, cancel := context.WithCancelCause(context.Background())
	r := &run{
		service: s, id: e.ID, session: e.Session, owner: e.Owner, log: log, sandbox: sandbox, record: e,
		cancel: cancel, done: make(chan struct{}), left: make(chan struct{}),
		launched: make(chan struct{}), inlet: newInlet(),
		times: Times{Queued: e.CreateTime},
	}
	r.audience = newAudience(r.readOn)
	return ctx, r
}

// attendIfAsked begins to watch the watchers, where the detach policy makes something of
// that. The caller keeps the Service from being closed meanwhile.
func (r *run) attendIfAsked(ctx context.Context) {
	if r.record.Policies.Detach == CancelDetached && r.record.Policies.DetachGrace != nil {
		r.service.work.Go(func() { r.attend(ctx) })
	}
}

// leave ends what newRun began.
func (r *run) leave() {
	r.cancel(ErrClosed)
	r.spent(nil)
	r.service.dismiss(r)
	r.log.release()
	r.slot.Release()
	r.service.logs.stock() // after the end, when nobody waits for this run
	close(r.left)
}

// forget ends a run whose execution did not come to be.
func (r *run) forget() {
	r.log.condemn()
	close(r.done)
	r.leave()
}

// snapshot is the execution as it is now. It has ended when that stands in its log
// for good, and not a moment sooner: what was told once must be true after a crash.
func (r *run) snapshot() Execution {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.record
	if r.result != nil && r.log.Sealed() {
		e.State, e.Result, e.LogBytes = Ended, r.result, r.log.Size()
		e.StartTime, e.EndTime = r.result.Times.Started, r.result.Times.Ended
	}
	e.Sequence = r.log.Sequence()
	return e
}

// wait returns when the end is recorded; ctx's cause if that comes first, ErrClosed
// if the Service was closed.
func (r *run) wait(ctx context.Context) error {
	select {
	case <-r.done:
		return nil
	case <-r.left:
		select {
		case <-r.done:
			return nil
		default:
			return ErrClosed
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stop orders the end. The first order's reason stands; a later one can shorten
// the grace.
func (r *run) stop(o stopOrder) {
	r.mu.Lock()
	defer r.mu.Unlock()
	grace := DefaultGracePeriod
	if own := r.record.Command.GracePeriod; own != nil {
		grace = *own
	}
	if o.grace != nil {
		grace = *o.grace
	}
	if r.order == nil {
		r.order, r.grace = &o, grace
	} else if grace >= r.grace {
		return
	}
	r.grace = grace
	r.fresh = true
	r.record.State = max(r.record.State, Stopping)
	if r.interrupt != nil {
		r.interrupt(errOrdered)
	}
}

// interruptible returns a context that a new order ends; one that is there already
// does not end it.
func (r *run) interruptible(ctx context.Context) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.interrupt = cancel
	return ctx, cancel
}

func (r *run) ordered() *stopOrder {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.order
}

// relay hands an order to the guest that it has not got.
func (r *run) relay(ctx context.Context) error {
	r.mu.Lock()
	fresh, grace := r.fresh, r.grace
	r.fresh = false
	r.mu.Unlock()
	if !fresh {
		return nil
	}
	if due := time.Now().Add(grace + guestSlack); r.deadline.IsZero() || due.Before(r.deadline) {
		r.deadline = due
	}
	ctx, cancel := context.WithTimeoutCause(ctx, answerTime, errNoAnswer)
	defer cancel()
	if err := r.guest.Stop(ctx, r.id, grace); err != nil {
		r.mu.Lock()
		r.fresh = true // to be tried again
		r.mu.Unlock()
		return err
	}
	r.told = true
	return nil
}

// hasBegun says whether the command is known to have been started.
func (r *run) hasBegun() bool { return r.begun || r.log.Sequence() > 1 }

// overdue says whether the guest should have told the end by now.
func (r *run) overdue() bool { return !r.deadline.IsZero() && time.Now().After(r.deadline) }

// begin leads a new execution to its end.
func (r *run) begin(ctx context.Context, command Command) {
	defer r.leave()
	launching, stop := linger(ctx)
	result := r.launch(launching, command)
	stop()
	if result == nil && ctx.Err() == nil {
		result = r.follow(ctx)
	}
	r.end(ctx, result)
}

// end records the result: in the log, where watchers see it, then in the store, and
// lets go of the sandbox. A nil result means that the Service is closing and the
// execution goes on without us. One that is there is recorded even so, at least once
// tried: what it tells may not be found out again.
func (r *run) end(ctx context.Context, result *Result) {
	if result == nil {
		if !r.noteAt.IsZero() {
			r.note(ctx)
		}
		return
	}
	r.complete(result)
	entry, err := resultEntry(result)
	if err != nil {
		r.service.log.ErrorContext(ctx, "an execution stays without an end", "execution", r.id, "error", err)
		return
	}
	r.mu.Lock()
	r.result = result
	r.mu.Unlock()
	if r.persist(ctx, "seal the log", func() error { return r.log.Seal(result.Times.Ended, entry) }) != nil {
		return
	}
	r.settle(ctx)
	r.letGo(ctx)
}

// settle writes the end into the store and tells those who wait. From then on it is
// the store that is asked.
func (r *run) settle(ctx context.Context) {
	final := r.snapshot()
	err := r.persist(ctx, "record the end", func() error { return r.update(ctx, final) })
	if err == nil || errors.Is(err, errFinal) {
		r.service.dismiss(r)
		if err == nil {
			r.service.keep(1, final.LogBytes)
		}
		close(r.done)
		if r.session != "" {
			r.service.cfg.Sessions.Ended(r.session, r.id, string(final.Result.Reason))
		}
		if observer := r.service.cfg.Observer; observer != nil {
			observer.Ended(final)
		}
	}
}

// note tells the store that the command runs and since when, for an executord that
// has to go on with it.
func (r *run) note(ctx context.Context) {
	r.noteAt = time.Time{}
	if err := r.update(ctx, r.snapshot()); err != nil {
		r.service.log.WarnContext(ctx, "cannot note the start of an execution", "execution", r.id, "error", err)
	}
}

// update writes a state into the store. The write is finished also when the Service
// is being closed.
func (r *run) update(ctx context.Context, e Execution) error {
	err := r.service.cfg.Store.UpdateExecution(context.WithoutCancel(ctx), e)
	if fault.KindOf(err) == fault.NotFound {
		return fmt.Errorf("%w: %w", errFinal, err) // somebody took the record away: there is nothing to keep
	}
	return err
}

// letGo ends a one-shot's sandbox, or makes the session's guest forget the command.
func (r *run) letGo(ctx context.Context) {
	if r.sandbox == nil && !r.reopen(ctx) {
		return
	}
	if r.session == "" {
		r.service.guests.drop(r.sandbox)
		if _, err := r.terminate(ctx); err != nil {
			r.service.log.ErrorContext(ctx, "a sandbox is left until the next start", "sandbox", r.sandbox.ID(), "error", err)
		}
		return
	}
	if ended(r.sandbox) {
		return
	}
	bounded, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), answerTime, errNoAnswer)
	defer cancel()
	if err := r.service.guestOf(bounded, r).Release(bounded, r.id); err != nil && !ended(r.sandbox) {
		r.service.log.WarnContext(ctx, "the guest keeps an ended command", "execution", r.id, "error", err)
	}
}

// reopen finds a sandbox that the run does not have: its making was cut off, or the
// run has nothing to do but to let go of it. false if there is none. An engine that is
// short of something, such as descriptors, is asked again for a while.
func (r *run) reopen(ctx context.Context) bool {
	bounded, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), sandboxTime, fmt.Errorf("not found within %v", sandboxTime))
	defer cancel()
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		sandbox, err := r.open(bounded)
		switch {
		case err == nil:
			r.sandbox = sandbox
			return true
		case fault.KindOf(err) == fault.NotFound:
			return false
		case bounded.Err() != nil || !pause(ctx, wait):
			r.service.log.ErrorContext(ctx, "a sandbox may be left until the next start", "sandbox", r.record.Sandbox, "error", err)
			return false
		}
	}
}

// engine is the one that its sandbox is on.
func (r *run) engine() (engine.Engine, error) { return r.service.cfg.Engines.Get(r.record.Engine) }

// open asks the engine for the sandbox.
func (r *run) open(ctx context.Context) (engine.Sandbox, error) {
	on, err := r.engine()
	if err != nil {
		return nil, err
	}
	return on.Open(ctx, r.record.Sandbox)
}

// terminate ends the sandbox, trying for a while: nothing may be left of it.
func (r *run) terminate(ctx context.Context) (engine.Remains, error) {
	bounded, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), sandboxTime, fmt.Errorf("not ended within %v", sandboxTime))
	defer cancel()
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		remains, err := r.sandbox.Terminate(bounded)
		if err == nil || bounded.Err() != nil || !pause(ctx, wait) {
			return remains, err
		}
		r.service.log.WarnContext(ctx, "cannot end a sandbox, trying again", "sandbox", r.sandbox.ID(), "error", err)
	}
}

// persist repeats a write until it works, its error is errFinal, or the Service is
// closed.
func (r *run) persist(ctx context.Context, what string, write func() error) error {
	wait := firstRetry
	for n := 1; ; n++ {
		err := write()
		if err == nil || errors.Is(err, errFinal) {
			if n > 1 {
				r.service.log.InfoContext(ctx, "no longer trying to write", "execution", r.id, "what", what, "tries", n, "error", err)
			}
			return err
		}
		if n&(n-1) == 0 { // ever more rarely: a full disk can stay so for days
			r.service.log.ErrorContext(ctx, "cannot write, trying again", "execution", r.id, "what", what, "tries", n, "error", err)
		}
		if !pause(ctx, wait) {
			return err
		}
		wait = min(2*wait, lastRetry)
	}
}

// linger returns a context that ends some time after ctx does. A command that is about
// to be started when the Service is closed shall run: the one that asked for it was told
// that it will, and nobody after us could start it.
func linger(ctx context.Context) (_ context.Context, stop func()) {
	lingering, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	forget := context.AfterFunc(ctx, func() {
		pause(lingering, closeTime)
		cancel(context.Cause(ctx))
	})
	return lingering, func() {
		forget()
		cancel(nil)
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
