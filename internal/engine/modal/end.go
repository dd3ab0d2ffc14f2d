package modal

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

const (
	// firstLook and lastLook are how long apart looks at a sandbox are that cannot be
	// reached. While it can, its pipe tells of its end and nothing is asked.
	firstLook = time.Second
	lastLook  = 15 * time.Second
	// measureEvery is how often is looked at how much went over a pipe.
	measureEvery = 5 * time.Second
	// resultLag is how long Modal may take to tell an end; half a minute was seen.
	resultLag = time.Minute
	// reapTimeout bounds how long is tried to end a sandbox that somebody gave up ending.
	reapTimeout = 15 * time.Minute
)

// Codes by which Modal tells ends; anything else is of the sandbox's first process, or
// means nothing.
const (
	codeTimeout    = 124
	codeTerminated = 137
)

var errOrdered = errors.New("it was ended by executord")

// follow keeps a line to the guest open, replaces it in time, and finds out about the
// sandbox's end.
func (sb *sandbox) follow() {
	pause := firstLook
	for !sb.over() {
		l := sb.openedLine()
		if l == nil {
			if !sb.sleep(pause) {
				break
			}
			if sb.openedLine() == nil && !sb.isOrdered() { // who ordered its end looks too
				sb.look()
			}
			pause = min(2*pause, lastLook)
			continue
		}
		pause = firstLook
		if !sb.watch(l) {
			break
		}
	}
	sb.mu.Lock()
	l := sb.line
	sb.line = nil
	sb.mu.Unlock()
	if l != nil {
		l.session.Close()
	}
}

// sleep waits, or for a reason to look; false at the end.
func (sb *sandbox) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-sb.doubt:
	case <-sb.done:
		return false
	case <-sb.engine.closing:
		return false
	}
	return true
}

// watch waits for the end of a line, and renews it when it is old or has carried much;
// false at the end.
func (sb *sandbox) watch(l *line) bool {
	measure := time.NewTicker(measureEvery)
	defer measure.Stop()
	for {
		select {
		case <-l.session.Done():
			why := l.session.Err()
			l.session.Close()
			if !sb.isOrdered() {
				sb.engine.cfg.Logger.Info("the pipe to a sandbox ended", "sandbox", sb.String(), "error", why)
				sb.renewHandle()
				sb.look()
			}
			return true
		case <-sb.doubt:
			if sb.openedLine() != l {
				return true
			}
		case <-measure.C:
			if l.session.Bytes() < sb.engine.cfg.RenewBytes && time.Since(l.opened) < sb.engine.cfg.RenewAfter {
				continue
			}
			ctx, cancel := sb.engine.detached(context.Background(), callTimeout)
			err := sb.renew(ctx)
			cancel()
			if err != nil {
				sb.engine.cfg.Logger.Warn("the pipe to a sandbox could not be renewed", "sandbox", sb.String(), "error", err)
			}
			return true
		case <-sb.done:
			return false
		case <-sb.engine.closing:
			return false
		}
	}
}

// look asks Modal whether the sandbox has ended, and if it has not, for a line: that keeps
// it from counting as idle, and tells of its end.
func (sb *sandbox) look() {
	ctx, cancel := sb.engine.detached(context.Background(), callTimeout)
	defer cancel()
	code, err := sb.current().Poll(ctx, nil)
	if isGone(err) || code != nil {
		sb.finish(sb.reason(ctx, code))
		return
	}
	if err == nil {
		_, err = sb.connect(ctx)
		if isGone(err) && sb.missing() >= sb.engine.lag {
			// Its worker has nothing of it, and Modal has had time to tell its end.
			sb.finish(fmt.Errorf("it is gone from its worker, though Modal has not told its end; Modal says: %s", words(err)))
			return
		}
	}
	if err == nil {
		sb.missed = time.Time{}
	}
	if err != nil && ctx.Err() == nil {
		sb.engine.cfg.Logger.Info("a sandbox cannot be reached", "sandbox", sb.String(), "error", err)
	}
}

// missing is for how long a sandbox's worker has said that it has nothing of it. It is for
// the goroutine that follows the sandbox.
func (sb *sandbox) missing() time.Duration {
	if sb.missed.IsZero() {
		sb.missed = time.Now()
	}
	return time.Since(sb.missed)
}

// reason says why a sandbox ended. Our own records come first; the code alone is not
// believed, because Modal tells several ends as 0.
func (sb *sandbox) reason(ctx context.Context, code *int) error {
	if sb.isOrdered() {
		return errOrdered
	}
	said := sb.said(ctx)
	switch {
	case !time.Now().Before(sb.until.Add(-2 * time.Second)):
		return fmt.Errorf("its lifetime was over, at %s%s", sb.until.UTC().Format(time.RFC3339), said)
	case code == nil:
		return fmt.Errorf("it is not known to Modal any more%s", said)
	case *code == codeTimeout:
		return fmt.Errorf("its time was over, as Modal tells%s", said)
	case *code == codeTerminated:
		return fmt.Errorf("it was terminated, and not by executord%s", said)
	case *code == 0:
		return fmt.Errorf("its end is told by Modal as 0, as it is when nobody talked to a sandbox for too long or when it was evicted%s", said)
	}
	return fmt.Errorf("its guest ended with %d%s", *code, said)
}

func (sb *sandbox) isOrdered() bool {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.ordered
}

// said asks a fresh handle, which is the only one that is told what the provider has to
// say about an end.
func (sb *sandbox) said(ctx context.Context) string {
	fresh, err := sb.engine.client.Sandboxes.FromID(ctx, sb.modalID, nil)
	if err != nil {
		return ""
	}
	_, err = fresh.Exec(ctx, []string{"true"}, nil)
	_ = fresh.Detach() // always nil
	if err == nil || inDoubt(err) {
		return ""
	}
	return fmt.Sprintf("; Modal says: %s", words(err))
}

// finish notes the end.
func (sb *sandbox) finish(why error) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.why != nil {
		return
	}
	sb.why = why
	close(sb.done)
	sb.engine.ceiling.gone(sb.id)
	if !sb.ordered {
		sb.engine.cfg.Logger.Warn("a sandbox ended", "sandbox", sb.String(), "error", why)
	}
}

// Terminate ends the sandbox and verifies that Modal says so too.
func (sb *sandbox) Terminate(ctx context.Context) (engine.Remains, error) {
	select {
	case sb.ending <- struct{}{}:
		defer func() { <-sb.ending }()
	case <-ctx.Done():
		return engine.Remains{}, fmt.Errorf("terminate sandbox %s: %w", sb.id, context.Cause(ctx))
	}
	sb.mu.Lock()
	gone, remains := sb.gone, sb.remains
	sb.ordered = true
	sb.mu.Unlock()
	if gone {
		return remains, nil
	}
	if !sb.over() && sb.openedLine() != nil {
		if told, err := sb.ask(ctx); err == nil {
			sb.note(told)
			// After a try that did not end it the first count stands.
			sb.mu.Lock()
			sb.remains.Processes = max(sb.remains.Processes, int(min(told.GetProcesses(), 1<<22)))
			remains = sb.remains
			sb.mu.Unlock()
		}
	}
	if err := sb.kill(ctx); err != nil {
		sb.engine.reap(sb)
		return remains, fmt.Errorf("terminate sandbox %s: %w", sb.id, err)
	}
	sb.finish(errOrdered)
	sb.mu.Lock()
	sb.gone = true
	sb.mu.Unlock()
	sb.engine.forget(sb)
	return remains, sb.detach()
}

// kill asks Modal to end the sandbox until it says that it has ended.
func (sb *sandbox) kill(ctx context.Context) error {
	asked := false
	var last error
	for pause := 20 * time.Millisecond; !sb.over(); pause = min(2*pause, 2*time.Second) {
		call, cancel := within(ctx, callTimeout)
		var err error
		if !asked {
			_, err = sb.current().Terminate(call, nil)
			asked = err == nil
		}
		var code *int
		if err == nil {
			code, err = sb.current().Poll(call, nil)
		}
		cancel()
		if isGone(err) || code != nil {
			return nil
		}
		if err != nil {
			last = translate(ctx, err, "ask Modal")
			if kind := fault.KindOf(last); kind != fault.Unavailable && kind != fault.Exhausted {
				return last
			}
		}
		select {
		case <-time.After(pause):
		case <-sb.done:
		case <-sb.engine.closing:
			return errors.Join(errClosing, last)
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), last)
		}
	}
	return nil
}

// reap goes on ending a sandbox whose end somebody did not wait for.
func (e *Engine) reap(sb *sandbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed || sb.reaping {
		return
	}
	sb.reaping = true
	e.work.Go(func() {
		ctx, cancel := e.detached(context.Background(), reapTimeout)
		defer cancel()
		for !sb.over() {
			if err := sb.kill(ctx); err == nil {
				sb.finish(errOrdered)
				break
			}
			if ctx.Err() != nil || !sb.sleep(lastLook) {
				break
			}
		}
		e.mu.Lock()
		sb.reaping = false
		e.mu.Unlock()
	})
}
