package session

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
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
	started chan struct{}   // closed when it is no longer Starting, or found again
	ending  chan struct{}   // closed when it is to end
	ended   chan struct{}   // closed when its end is recorded
	left    chan struct{}   // closed when the leading goroutine is through
	slot    *admission.Slot // given back when it leaves
	claimed engine.Sandbox  // was ready when the session was created; nil if none was

	mu      sync.Mutex
	record  Session
	sandbox engine.Sandbox // written by the leading goroutine only
	asked   bool           // to end, with reason and detail
	reason  EndReason
	detail  string
	// interrupt ends the making of the sandbox.
	interrupt context.CancelCauseFunc
}

func newLive(s *Service, record Session, slot *admission.Slot) (context.Context, *live) {
	ctx, cancel := context.WithCancelCause(context.Background())
	return ctx, &live{
		service: s, id: record.ID, owner: record.Owner, record: record, cancel: cancel, slot: slot,
		started: make(chan struct{}), ending: make(chan struct{}), ended: make(chan struct{}), left: make(chan struct{}),
	}
}

// leave ends what newLive began.
func (l *live) leave() {
	l.cancel(errClosed)
	l.service.dismiss(l)
	l.slot.Release()
	close(l.left)
}

// forget ends a live whose session did not come to be.
func (l *live) forget() {
	close(l.ended)
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
	ready := true
	switch l.record.State { // nobody else writes it
	case Starting:
		ready = l.make(ctx)
	case Running:
		ready = l.reopen(ctx)
	}
	if ready && l.await(ctx) {
		l.finish(ctx)
	}
}

// make makes the sandbox.
func (l *live) make(ctx context.Context) bool {
	creating, stop := context.WithTimeoutCause(ctx, sandboxTime, fmt.Errorf("no sandbox within %v", sandboxTime))
	defer stop()
	creating, cancel := context.WithCancelCause(creating)
	defer cancel(nil)
	l.mu.Lock()
	asked := l.asked
	l.interrupt = cancel
	l.mu.Unlock()
	if asked {
		return true
	}
	sandbox, err := l.claimed, error(nil)
	if sandbox == nil {
		sandbox, err = l.service.cfg.Engine.Create(creating, engine.Spec{
			ID: l.record.Sandbox, Limits: l.record.Limits, Network: l.record.Network.Mode,
		})
	}
	if err == nil {
		_, err = l.service.cfg.Network.Open(creating, sandbox, l.record.Network)
	}
	if err != nil {
		if ctx.Err() != nil {
			return false
		}
		l.end(StartFailed, err.Error())
		return true
	}
	// Recorded before anybody can use it: what runs in it must be found again.
	running := l.record
	running.State, running.Limits = Running, sandbox.Limits()
	if !l.persist(ctx, running) {
		return false
	}
	l.publish(running, sandbox)
	close(l.started)
	return true
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
			l.publish(l.record, sandbox)
			close(l.started)
			return true
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
		return ctx.Err() == nil // await finds out why it is to end
	}
}

func (l *live) open(ctx context.Context) (engine.Sandbox, error) {
	ctx, stop := context.WithTimeoutCause(ctx, sandboxTime, errNotFound)
	defer stop()
	sandbox, err := l.service.cfg.Engine.Open(ctx, l.record.Sandbox)
	if err != nil {
		return nil, err // and not an interface that holds a nil of the engine's
	}
	return sandbox, nil
}

// publish shows a new state.
func (l *live) publish(record Session, sandbox engine.Sandbox) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.record, l.sandbox = record, sandbox
}

// await waits for a reason to end.
func (l *live) await(ctx context.Context) bool {
	expiry := time.NewTimer(time.Until(l.record.ExpireTime()))
	defer expiry.Stop()
	var gone <-chan struct{}
	if l.sandbox != nil {
		gone = l.sandbox.Done()
	}
	select {
	case <-l.ending:
	case <-gone:
		l.end(SandboxLost, "its sandbox ended by itself")
	case <-expiry.C:
		l.end(Expired, fmt.Sprintf("its lifetime of %v passed", l.record.Lifetime))
	case <-ctx.Done():
		return false
	}
	return true
}

// finish ends what runs in the session, then its sandbox, then records the end.
func (l *live) finish(ctx context.Context) {
	record := l.record
	if record.State != Terminating {
		l.mu.Lock()
		record.State, record.Reason, record.Detail = Terminating, l.reason, l.detail
		l.mu.Unlock()
		l.publish(record, l.sandbox) // before it is recorded: nothing new may begin in it
	}
	select {
	case <-l.started:
	default:
		close(l.started)
	}
	if !l.persist(ctx, record) || !l.endExecutions(ctx) || !l.terminate(ctx) {
		return
	}
	record.State, record.EndTime = Terminated, time.Now()
	if l.persist(ctx, record) {
		l.publish(record, nil)
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
	bounded, stop := context.WithTimeoutCause(ctx, endTime, fmt.Errorf("not ended within %v", endTime))
	defer stop()
	for wait := firstRetry; ; wait = min(2*wait, endRetry) {
		err := executions.EndSession(bounded, l.id)
		if ctx.Err() != nil {
			return false
		}
		if err == nil {
			return true
		}
		s.log.ErrorContext(ctx, "end the executions of a session", "session", l.id, "error", err)
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
