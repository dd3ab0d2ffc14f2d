package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

const (
	// sandboxTime bounds what is done with one sandbox.
	sandboxTime = 30 * time.Second
	// endTime is how long the pool's end tries again what does not work, every endRetry.
	endTime  = 10 * time.Second
	endRetry = 200 * time.Millisecond
	// busyPause is after what time it is asked again whether nothing should be made.
	busyPause = 250 * time.Millisecond
	// After a failure firstPause passes before the next attempt; it doubles up to lastPause.
	firstPause = 500 * time.Millisecond
	lastPause  = time.Minute
	// soonest is how long a sandbox must have been ready, to die without that being
	// taken for a failure.
	soonest = 10 * time.Second
	// far is when the owner looks without a reason.
	far = time.Hour
)

// Run owns the sandboxes of the pool: it makes them, replaces those that have died or
// grown old, and ends all when ctx ends or Drain is called. It then returns nil. Call it
// once.
func (p *Pool) Run(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(errDrained)
	if !p.begin(stop) {
		return nil
	}
	for ctx.Err() == nil {
		k, wait := p.due(time.Now())
		switch {
		case p.endRetired(ctx):
		case wait == 0 && len(p.unsure) > 0:
			if err := p.clear(ctx); err != nil {
				p.failed(ctx, "cannot end what may be left of a sandbox", err)
			}
		case wait == 0:
			p.add(ctx, k)
		default:
			p.sleep(ctx, wait)
		}
	}
	p.end(context.WithoutCancel(ctx))
	p.watchers.Wait()
	return nil
}

// begin opens the pool for claims, unless it is off or was drained.
func (p *Pool) begin(stop context.CancelCauseFunc) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop = stop
	p.open = p.cfg.Size > 0 && !p.drained
	return p.open
}

// due says after what time there is something to do; if that is now, which kind lacks a
// sandbox, if one does. What is dead, too old or not wanted any more it retires.
func (p *Pool) due(now time.Time) (*kind, time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	wait := far
	until := func(t time.Time) { wait = min(wait, max(t.Sub(now), time.Millisecond)) }
	var lacking []*kind
	p.kinds = slices.DeleteFunc(p.kinds, func(k *kind) bool {
		if forget := k.asked.Add(p.cfg.MaxAge); !k.first {
			if !now.Before(forget) {
				p.retireLocked(k)
				return true
			}
			until(forget)
		}
		if p.tidyLocked(k, now) < p.cfg.Size {
			lacking = append(lacking, k)
		} else {
			k.due = time.Time{}
		}
		for _, s := range k.ready {
			if old := s.made.Add(p.cfg.MaxAge); now.Before(old) {
				until(old)
			}
		}
		return false
	})
	if len(p.unsure) > 0 {
		if !now.Before(p.notUntil) {
			return nil, 0
		}
		until(p.notUntil)
	}
	for _, k := range lacking {
		at := k.due
		if at.Before(p.notUntil) {
			at = p.notUntil
		}
		switch {
		case at.After(now):
			until(at)
		case p.cfg.Busy():
			until(now.Add(busyPause))
		default:
			return k, 0
		}
	}
	return nil, wait
}

// tidyLocked retires what is dead, and what is old once there is enough without it.
// It returns how many of a kind are ready and not old.
func (p *Pool) tidyLocked(k *kind, now time.Time) (fresh int) {
	for i := 0; i < len(k.ready); {
		s := k.ready[i]
		if !s.ended() {
			i++
			if now.Sub(s.made) < p.cfg.MaxAge {
				fresh++
			}
			continue
		}
		p.log.Warn("a sandbox that was kept ready has ended", "sandbox", s.ID())
		p.retired = append(p.retired, k.take(i).Sandbox)
		if now.Sub(s.made) < soonest {
			p.failedLocked(now) // one that never lives long must not be made all the time
		}
	}
	for fresh >= p.cfg.Size && len(k.ready) > fresh {
		p.retired = append(p.retired, k.take(0).Sandbox)
	}
	return fresh
}

// failedLocked puts off the next attempt, the longer the more failures follow closely.
func (p *Pool) failedLocked(now time.Time) time.Duration {
	if now.Sub(p.notUntil) > lastPause {
		p.failures = 0
	}
	pause := min(firstPause<<min(p.failures, 16), lastPause)
	p.failures++
	p.notUntil = now.Add(pause)
	return pause
}

// add makes one sandbox of a kind.
func (p *Pool) add(ctx context.Context, k *kind) {
	spec := k.spec
	spec.ID = "w-" + strings.ToLower(ulid.Make().String())
	making, cancel := context.WithTimeoutCause(ctx, sandboxTime, fmt.Errorf("no sandbox within %v", sandboxTime))
	defer cancel()
	sandbox, err := p.cfg.Engine.Create(making, spec)
	if err != nil {
		p.unsure = append(p.unsure, spec.ID) // something of it may be there
		refused := slices.Contains([]fault.Kind{fault.FailedPrecondition, fault.NotFound, fault.Invalid}, fault.KindOf(err))
		err = errors.Join(err, p.clear(ctx))
		if refused && p.forget(k) {
			// Its image is gone, say. That is no reason to wait with the others.
			p.log.InfoContext(ctx, "no more sandboxes of this kind are kept ready", "image", k.spec.Image, "network", k.spec.Network, "error", err)
			return
		}
		if ctx.Err() == nil {
			p.failed(ctx, "cannot make a sandbox to keep ready", err)
		}
		return
	}
	p.keep(k, sandbox)
}

// forget gives up a kind, unless it is the first.
func (p *Pool) forget(k *kind) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if k.first {
		return false
	}
	p.retireLocked(k)
	p.kinds = slices.DeleteFunc(p.kinds, func(other *kind) bool { return other == k })
	return true
}

// keep makes a sandbox ready to be claimed, if its kind is still wanted.
func (p *Pool) keep(k *kind, sandbox engine.Sandbox) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.open || !slices.Contains(p.kinds, k) {
		p.retired = append(p.retired, sandbox)
		return
	}
	s := &spare{Sandbox: sandbox, made: time.Now(), taken: make(chan struct{})}
	k.ready = append(k.ready, s)
	p.watchers.Go(func() {
		select {
		case <-s.Done():
			p.wake()
		case <-s.taken:
		}
	})
}

// endRetired ends the first of what is to be ended; false if there was nothing.
func (p *Pool) endRetired(ctx context.Context) bool {
	p.mu.Lock()
	if len(p.retired) == 0 {
		p.mu.Unlock()
		return false
	}
	sandbox := p.retired[0]
	p.retired = p.retired[1:]
	p.mu.Unlock()
	if err := p.terminate(ctx, sandbox); err != nil {
		p.unsure = append(p.unsure, sandbox.ID())
		p.failed(ctx, "cannot end a sandbox that was kept ready", err)
	}
	return true
}

// failed tells of a failure and puts off the next attempt.
func (p *Pool) failed(ctx context.Context, what string, err error) {
	p.mu.Lock()
	pause := p.failedLocked(time.Now())
	p.mu.Unlock()
	p.log.WarnContext(ctx, what, "error", err, "next_attempt_in", pause)
}

// clear ends what may be left of what could not be made or ended. The error is the last
// one's of those that still cannot be.
func (p *Pool) clear(ctx context.Context) (last error) {
	p.unsure = slices.DeleteFunc(p.unsure, func(id string) bool {
		err := p.remove(ctx, id)
		if err != nil {
			last = fmt.Errorf("sandbox %s: %w", id, err)
		}
		return err == nil
	})
	return last
}

// remove ends a sandbox, if there is one of this name.
func (p *Pool) remove(ctx context.Context, id string) error {
	bounded, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), sandboxTime, fmt.Errorf("not found within %v", sandboxTime))
	defer cancel()
	sandbox, err := p.cfg.Engine.Open(bounded, id)
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	if err != nil {
		return err
	}
	return p.terminate(ctx, sandbox)
}

// terminate ends a sandbox. A drain does not cut it off: it would have to be done again.
func (p *Pool) terminate(ctx context.Context, sandbox engine.Sandbox) error {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), sandboxTime, fmt.Errorf("not ended within %v", sandboxTime))
	defer cancel()
	_, err := sandbox.Terminate(ctx)
	return err
}

// end ends everything. What does not work is tried again for a while.
func (p *Pool) end(ctx context.Context) {
	p.mu.Lock()
	p.open = false
	for _, k := range p.kinds {
		p.retireLocked(k)
	}
	p.mu.Unlock()
	for p.endRetired(ctx) {
	}
	ctx, cancel := context.WithTimeoutCause(ctx, endTime, fmt.Errorf("not ended within %v", endTime))
	defer cancel()
	for {
		err := p.clear(ctx)
		if err == nil {
			return
		}
		if !pause(ctx, endRetry) {
			p.log.ErrorContext(ctx, "sandboxes that were kept ready are left until the next start", "sandboxes", p.unsure, "error", err)
			return
		}
	}
}

// sleep waits for a change, or as long as it may.
func (p *Pool) sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-p.changed:
	case <-ctx.Done():
	}
}

// pause waits; false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
