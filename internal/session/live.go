package session

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// live is a session that has not ended. One goroutine leads it to its end.
type live struct {
	service *Service
	id      string
	cancel  context.CancelCauseFunc
	started chan struct{} // closed when it left Starting
	ending  chan struct{} // closed when it is to end
	ended   chan struct{} // closed when its end is recorded
	left    chan struct{} // closed when the leading goroutine is through

	mu      sync.Mutex
	record  Session
	sandbox engine.Sandbox
	asked   bool // to end, with reason and detail
	reason  EndReason
	detail  string
	// interrupt ends the making of the sandbox.
	interrupt context.CancelCauseFunc
}

func newLive(s *Service, record Session) (context.Context, *live) {
	ctx, cancel := context.WithCancelCause(context.Background())
	return ctx, &live{
		service: s, id: record.ID, record: record, cancel: cancel,
		started: make(chan struct{}), ending: make(chan struct{}), ended: make(chan struct{}), left: make(chan struct{}),
	}
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
	if l.record.State != Running {
		return nil, notRunning(l.record)
	}
	return l.sandbox, nil
}

// end asks for the end; the first reason stands.
func (l *live) end(reason EndReason, detail string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.asked {
		l.asked, l.reason, l.detail = true, reason, detail
		close(l.ending)
		if l.interrupt != nil {
			l.interrupt(errors.New("the session was ended"))
		}
	}
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

// reopen finds the sandbox of a session that another executord made, so that its
// executions can be taken up. What cannot be is left for lead to decide.
func (l *live) reopen(ctx context.Context) {
	if l.record.State == Starting {
		return // nobody knows whether it was ready: create-or-adopt decides
	}
	sandbox, err := l.service.cfg.Engine.Open(ctx, l.record.Sandbox)
	switch {
	case err == nil:
		l.sandbox = sandbox
	case fault.KindOf(err) == fault.NotFound:
		l.end(SandboxLost, "its sandbox was gone when executord started again")
	default:
		l.end(SandboxLost, fmt.Sprintf("its sandbox could not be opened when executord started again: %v", err))
	}
}

// lead takes a session from its record to its end.
func (l *live) lead(ctx context.Context) {
	defer func() {
		l.cancel(errClosed)
		l.service.dismiss(l)
		close(l.left)
	}()
	if l.snapshot().State == Starting && !l.make(ctx) {
		return
	}
	l.openStarted()
	if l.snapshot().State == Terminating {
		l.end(Requested, "its end had begun before executord was restarted")
	}
	if l.await(ctx) {
		l.finish(ctx)
	}
}

func (l *live) openStarted() {
	select {
	case <-l.started:
	default:
		close(l.started)
	}
}

// make makes the sandbox. false means that the Service is closing.
func (l *live) make(ctx context.Context) bool {
	creating, stop := context.WithTimeoutCause(ctx, sandboxTime, fmt.Errorf("no sandbox within %v", sandboxTime))
	defer stop()
	creating, cancel := context.WithCancelCause(creating)
	defer cancel(nil)
	l.mu.Lock()
	asked := l.asked
	l.interrupt = cancel
	record := l.record
	l.mu.Unlock()
	if asked {
		return true
	}
	sandbox, err := l.service.cfg.Engine.Create(creating, engine.Spec{ID: record.Sandbox, Limits: record.Limits})
	if ctx.Err() != nil {
		return false
	}
	if err != nil {
		l.end(StartFailed, err.Error())
		return true
	}
	l.mu.Lock()
	l.sandbox = sandbox
	l.record.State, l.record.Limits = Running, sandbox.Limits()
	record = l.record
	l.mu.Unlock()
	return l.persist(ctx, record)
}

// await waits for a reason to end. false means that the Service is closing.
func (l *live) await(ctx context.Context) bool {
	expiry := time.NewTimer(time.Until(l.snapshot().ExpireTime()))
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
		l.end(Expired, fmt.Sprintf("its lifetime of %v passed", l.snapshot().Lifetime))
	case <-ctx.Done():
		return false
	}
	return true
}

// finish ends what runs in the session, then its sandbox, then records the end.
func (l *live) finish(ctx context.Context) {
	s := l.service
	l.mu.Lock()
	l.record.State = Terminating
	record := l.record
	l.mu.Unlock()
	if !l.persist(ctx, record) {
		return
	}
	ending, stop := context.WithTimeoutCause(ctx, endTime, fmt.Errorf("not ended within %v", endTime))
	defer stop()
	s.mu.Lock()
	executions := s.executions
	s.mu.Unlock()
	if err := executions.EndSession(ending, l.id); err != nil {
		s.log.ErrorContext(ctx, "end the executions of a session", "session", l.id, "error", err)
	}
	if l.sandbox != nil && !l.terminate(ctx) {
		return
	}
	l.mu.Lock()
	l.record.State, l.record.Reason, l.record.Detail, l.record.EndTime = Terminated, l.reason, l.detail, time.Now()
	record = l.record
	l.mu.Unlock()
	if l.persist(ctx, record) {
		close(l.ended)
	}
}

// terminate ends the sandbox, trying until it is gone: a session is not said to
// have ended while anything of it may be left. false means that the Service is closing.
func (l *live) terminate(ctx context.Context) bool {
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, 30*time.Second) {
		ending, stop := context.WithTimeoutCause(ctx, sandboxTime, fmt.Errorf("not ended within %v", sandboxTime))
		_, err := l.sandbox.Terminate(ending)
		stop()
		if err == nil {
			return true
		}
		l.service.log.ErrorContext(ctx, "end the sandbox of a session, trying again", "session", l.id, "error", err)
		if !pause(ctx, wait) {
			return false
		}
	}
}

// persist writes the record, trying until it works. false means that the Service is
// closing.
func (l *live) persist(ctx context.Context, record Session) bool {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := l.service.cfg.Store.UpdateSession(ctx, record)
		if err == nil {
			return true
		}
		l.service.log.ErrorContext(ctx, "record a session, trying again", "session", l.id, "error", err)
		if !pause(ctx, wait) {
			return false
		}
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
