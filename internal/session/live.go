package session

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/journal"
)

const (
	// sandboxTime bounds the making, the finding and the ending of a sandbox.
	sandboxTime = 2 * time.Minute
	// openTime is how long a start waits for an engine with troubles of its own to open a
	// sandbox that was there before executord was restarted.
	openTime = 30 * time.Second
	// endTime bounds the ending of what runs in a session: the longest grace period,
	// and some.
	endTime = 15 * time.Minute
	// Between the first two attempts lies firstRetry; it doubles up to recordRetry
	// where the record has to be written, up to endRetry where the sandbox has to end.
	firstRetry  = 50 * time.Millisecond
	recordRetry = time.Second
	endRetry    = 30 * time.Second
	// maxDetail bounds the text of an end.
	maxDetail = 4 << 10
)

var (
	errAsked    = errors.New("the session was ended")
	errNotFound = fmt.Errorf("no answer within %v", sandboxTime)
	// errNotFoundYet is the cause when a start has waited long enough.
	errNotFoundYet = fmt.Errorf("not found within %v", openTime)
)

// live is a session that has not ended. One goroutine leads it to its end.
type live struct {
	service *Service
	id      string
	owner   string
	cancel  context.CancelCauseFunc
	journal *journal.Journal
	started chan struct{}   // closed when it is no longer Starting, or found again
	ending  chan struct{}   // closed when it is to end
	ended   chan struct{}   // closed when its end is recorded
	left    chan struct{}   // closed when the leading goroutine is through
	nudge   chan struct{}   // has one when the leading goroutine should look again
	slot    *admission.Slot // given back when it leaves; the leading goroutine's
	claimed engine.Sandbox  // was ready when the session was created; nil if none was
	agent   AgentServer     // nil if there is none; the leading goroutine's

	mu      sync.Mutex
	record  Session
	sandbox engine.Sandbox // written by the leading goroutine only
	asked   bool           // to end, with reason and detail
	reason  EndReason
	detail  string
	// pausing says that it is to pause, resumes what it was given to go on with.
	pausing bool
	resumes *resumption
	// begun is since when it has run, at least; notes are what runs in it.
	begun time.Time
	notes notes
	// failed is why the last pause or resume did not work.
	failed error
	// changed is closed, and another takes its place, when record or failed changes.
	changed chan struct{}
	// values are the credentials that were given with it, auth its agent's log-ins.
	values map[string]string
	auth   string
	// writing is held by who changes the record, from reading it to showing it.
	writing sync.Mutex
	// interrupt ends what the leading goroutine does, if the session is to end.
	interrupt context.CancelCauseFunc
}

func newLive(s *Service, record Session, slot *admission.Slot) (context.Context, *live) {
	ctx, cancel := context.WithCancelCause(context.Background())
	return ctx, &live{
		service: s, id: record.ID, owner: record.Owner, record: record, cancel: cancel, slot: slot,
		started: make(chan struct{}), ending: make(chan struct{}), ended: make(chan struct{}), left: make(chan struct{}),
		nudge: make(chan struct{}, 1), changed: make(chan struct{}),
	}
}

// leave ends what newLive began.
func (l *live) leave() {
	l.cancel(errClosed)
	if l.agent != nil {
		l.agent.Close()
	}
	l.service.dismiss(l)
	l.slot.Release()
	l.mu.Lock()
	if l.resumes != nil {
		l.resumes.slot.Release()
	}
	l.mu.Unlock()
	if l.journal != nil {
		l.journal.Close()
	}
	close(l.left)
}

// forget ends a live whose session did not come to be.
func (l *live) forget() {
	close(l.ended)
	if l.journal != nil {
		_ = l.service.journals.Remove(l.id) // what is left is removed at the next start
	}
	l.leave()
}

func (l *live) snapshot() Session {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.record
}

// running returns the sandbox if the session has one that can be used.
func (l *live) running() (engine.Sandbox, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.record.State != Running:
		return nil, notRunning(l.record)
	case l.sandbox == nil:
		return nil, &fault.Error{
			Kind: fault.Unavailable, Reason: "SANDBOX_UNREACHABLE", RetryAfter: time.Second,
			Message: fmt.Sprintf("the sandbox of session %q cannot be opened at the moment; executord goes on trying", l.id),
		}
	}
	return l.sandbox, nil
}

// end asks for the end; the first reason stands.
func (l *live) end(reason EndReason, detail string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.asked {
		return
	}
	l.asked, l.reason, l.detail = true, reason, clip(detail)
	close(l.ending)
	if l.interrupt != nil {
		l.interrupt(errAsked)
	}
}

// clip makes valid UTF-8 of bounded length of a text that an engine can have written.
func clip(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) > maxDetail {
		s = strings.ToValidUTF8(s[:maxDetail], "") + "…"
	}
	return s
}

// wait returns when c is closed, or why it will not be.
func (l *live) wait(ctx context.Context, c <-chan struct{}) error {
	select {
	case <-c:
		return nil
	case <-l.left:
		select {
		case <-c:
			return nil
		default:
			return errClosed
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// lead takes a session from its record to its end. Where one of its steps returns
// false the Service is closing, and an executord after this one goes on.
func (l *live) lead(ctx context.Context) {
	defer l.leave()
	for {
		l.mu.Lock()
		state, asked := l.record.State, l.asked
		l.mu.Unlock()
		going := true
		switch {
		case asked || state == Terminating:
			l.finish(ctx)
			return
		case state == Starting || state == Resuming:
			going = l.make(ctx)
		case state == Running:
			going = l.live(ctx)
		case state == Pausing:
			going = l.halt(ctx)
		case state == Paused:
			going = l.rest(ctx)
		}
		if !going {
			return
		}
	}
}

// live finds the sandbox of a running session if it has to, and waits for what comes.
func (l *live) live(ctx context.Context) bool {
	if l.sandbox == nil {
		if !l.reopen(ctx) || l.sandbox == nil {
			return ctx.Err() == nil
		}
	}
	return l.await(ctx)
}

// interruptible returns a context for what the session's end interrupts; false if it is to
// end already.
func (l *live) interruptible(ctx context.Context) (context.Context, func(), bool) {
	ctx, cancel := context.WithCancelCause(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.interrupt = cancel
	return ctx, func() {
		l.mu.Lock()
		l.interrupt = nil
		l.mu.Unlock()
		cancel(nil)
	}, !l.asked
}

// reopen finds the sandbox of a session that another executord made. Only an engine
// that says that there is none is believed; one that has troubles of its own is asked
// again, until the session is to end anyway.
func (l *live) reopen(ctx context.Context) bool {
	expiry := time.NewTimer(time.Until(l.record.ExpireTime()))
	defer expiry.Stop()
	wait := firstRetry
	for n := 1; ; n++ {
		sandbox, err := l.open(ctx)
		switch {
		case err == nil:
			if _, err := l.service.cfg.Network.Resume(sandbox, l.record.Network); err != nil {
				l.service.log.WarnContext(ctx, "a session goes on without its network", "session", l.id, "error", err)
			}
			l.publish(sandbox)
			close(l.started)
			return l.rejoin(ctx)
		case ctx.Err() != nil:
			return false
		case fault.KindOf(err) == fault.NotFound:
			l.end(SandboxLost, "its sandbox was gone when executord started again")
			return true
		}
		if n&(n-1) == 0 { // ever more rarely
			l.service.log.ErrorContext(ctx, "open the sandbox of a session, trying again", "session", l.id, "tries", n, "error", err)
		}
		again := time.NewTimer(wait)
		select {
		case <-again.C:
			wait = min(2*wait, endRetry)
			continue
		case <-l.ending:
		case <-expiry.C:
		case <-ctx.Done():
		}
		again.Stop()
		if now := time.Now(); !now.Before(l.snapshot().ExpireTime()) {
			l.expire()
		}
		return ctx.Err() == nil
	}
}

// expire ends a session whose lifetime has passed.
func (l *live) expire() {
	l.end(Expired, fmt.Sprintf("its lifetime of %v passed", l.snapshot().Lifetime))
}

func (l *live) open(ctx context.Context) (engine.Sandbox, error) {
	ctx, stop := context.WithTimeoutCause(ctx, sandboxTime, errNotFound)
	defer stop()
	on, err := l.engine()
	if err != nil {
		return nil, err
	}
	sandbox, err := on.Open(ctx, l.record.Sandbox)
	if err != nil {
		return nil, err // and not an interface that holds a nil of the engine's
	}
	return sandbox, nil
}

// engine is the one that its sandbox is on.
func (l *live) engine() (engine.Engine, error) { return l.service.cfg.Engines.Get(l.record.Engine) }

// notify wakes those who wait for a change. The caller holds mu.
func (l *live) notify() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// look has the leading goroutine look again at what it is to do. The caller holds mu.
func (l *live) look() {
	select {
	case l.nudge <- struct{}{}:
	default:
	}
}

// publish shows the sandbox of a session whose record stays as it is.
func (l *live) publish(sandbox engine.Sandbox) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sandbox = sandbox
	l.notify()
}

// write changes the record, durably, and then shows it together with the sandbox. Only
// the leading goroutine calls it; what others change, update does.
func (l *live) write(ctx context.Context, sandbox engine.Sandbox, change func(*Session)) (Session, bool) {
	l.writing.Lock()
	defer l.writing.Unlock()
	record := l.snapshot()
	change(&record)
	if !l.persist(ctx, record) {
		return record, false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.record, l.sandbox = record, sandbox
	l.notify()
	return record, true
}

// enter records a new state and tells of it.
func (l *live) enter(ctx context.Context, state State, sandbox engine.Sandbox, change func(*Session)) bool {
	record, ok := l.write(ctx, sandbox, func(r *Session) {
		if !slices.Contains(next()[r.State], state) {
			panic(fmt.Sprintf("session %s: %v cannot follow %v", l.id, state, r.State)) // a mistake of this package
		}
		r.State = state
		change(r)
	})
	if ok {
		l.tell(Event{Changed: &record})
	}
	return ok
}

// finish ends what runs in the session, saves what it has, ends its sandbox, and records
// the end.
func (l *live) finish(ctx context.Context) {
	l.mu.Lock()
	if l.record.State != Terminating {
		// Shown before it is recorded: nothing new may begin in it.
		l.record.State, l.record.Reason, l.record.Detail = Terminating, l.reason, l.detail
		l.notify()
	}
	l.mu.Unlock()
	select {
	case <-l.started:
	default:
		close(l.started)
	}
	record, ok := l.write(ctx, l.sandbox, func(*Session) {})
	if !ok {
		return
	}
	l.tell(Event{Changed: &record})
	if !l.endTurns(ctx) || !l.endExecutions(ctx) || !l.saveAll(ctx) || !l.terminate(ctx) || !l.dropSnapshot(ctx) {
		return
	}
	l.flushNotes()
	l.writing.Lock()
	defer l.writing.Unlock()
	record = l.snapshot()
	record.State, record.EndTime = Terminated, time.Now()
	if l.persist(ctx, record) && l.tellEnd(ctx, record) {
		l.mu.Lock()
		l.record, l.sandbox = record, nil
		l.notify()
		l.mu.Unlock()
		close(l.ended)
	}
}

// endExecutions ends what runs in the session. After endTime its sandbox is ended
// with what still runs.
func (l *live) endExecutions(ctx context.Context) bool {
	s := l.service
	s.mu.Lock()
	executions := s.executions
	s.mu.Unlock()
	return l.endAll(ctx, "executions", executions.EndSession)
}

// endAll has end end everything of a kind, trying again for endTime.
func (l *live) endAll(ctx context.Context, what string, end func(ctx context.Context, sessionID string) error) bool {
	bounded, stop := context.WithTimeoutCause(ctx, endTime, fmt.Errorf("not ended within %v", endTime))
	defer stop()
	for wait := firstRetry; ; wait = min(2*wait, endRetry) {
		err := end(bounded, l.id)
		if ctx.Err() != nil {
			return false
		}
		if err == nil {
			return true
		}
		l.service.log.ErrorContext(ctx, "end the "+what+" of a session", "session", l.id, "error", err)
		if bounded.Err() != nil {
			return true
		}
		pause(bounded, wait)
	}
}

// terminate ends the sandbox, trying until it is gone: a session is not said to have
// ended while anything of it may be left. One that is not known, because its making or
// its finding failed, may be there all the same.
func (l *live) terminate(ctx context.Context) bool {
	for wait := firstRetry; ; wait = min(2*wait, endRetry) {
		err := l.tryTerminate(ctx)
		if err == nil {
			return true
		}
		if ctx.Err() == nil {
			l.service.log.ErrorContext(ctx, "end the sandbox of a session, trying again", "session", l.id, "error", err)
		}
		if !pause(ctx, wait) {
			return false
		}
	}
}

func (l *live) tryTerminate(ctx context.Context) error {
	sandbox := l.sandbox
	if sandbox == nil {
		var err error
		if sandbox, err = l.open(ctx); err != nil {
			if fault.KindOf(err) == fault.NotFound {
				return nil
			}
			return err
		}
	}
	ctx, stop := context.WithTimeoutCause(ctx, sandboxTime, fmt.Errorf("not ended within %v", sandboxTime))
	defer stop()
	_, err := sandbox.Terminate(ctx)
	return err
}

// persist writes the record, trying until it works. A write that has begun is
// finished also when the Service is closing.
func (l *live) persist(ctx context.Context, record Session) bool {
	wait := firstRetry
	for n := 1; ; n++ {
		err := l.service.cfg.Store.UpdateSession(context.WithoutCancel(ctx), record)
		if err == nil {
			return true
		}
		if n&(n-1) == 0 { // ever more rarely: a full disk can stay so for days
			l.service.log.ErrorContext(ctx, "record a session, trying again", "session", l.id, "tries", n, "error", err)
		}
		if fault.KindOf(err) == fault.NotFound {
			return true // somebody took the record away: there is nothing to keep
		}
		if !pause(ctx, wait) {
			return false
		}
		wait = min(2*wait, recordRetry)
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
