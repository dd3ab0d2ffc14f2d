package execution

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/eventlog"
)

// maxLeftover is more than the guest and the pipes can hold of a command that is over.
const maxLeftover = 4 << 20

// errNews interrupts the waiting for room because there may be some.
var errNews = errors.New("watchers have read on")

// cost is the most that entries take in a log.
func cost(entries []eventlog.Entry) (size int64) {
	for i := range entries {
		size += eventlog.Overhead + int64(len(entries[i].Data))
	}
	return size
}

// split divides entries into those for which there is room for sure and the rest. The one
// at the border is cut in two, unless not one byte of it has room.
func split(entries []eventlog.Entry, room int64) (some, rest []eventlog.Entry) {
	for i := range entries {
		room -= eventlog.Overhead
		n := int64(len(entries[i].Data))
		if n <= room {
			room -= n
			continue
		}
		rest = slices.Clone(entries[i:])
		if room > 0 {
			rest[0].Data = entries[i].Data[room:]
			entries[i].Data = entries[i].Data[:room]
			i++
		}
		return entries[:i], rest
	}
	return entries, nil
}

// write appends entries as the output policy says.
func (r *run) write(ctx context.Context, entries []eventlog.Entry) error {
	switch r.record.Policies.OnLimit {
	case Kill:
		for len(entries) > 0 {
			// What took less room than was reckoned with leaves some for the next round.
			some, rest := split(entries, r.record.RetainedBytes-r.log.Size())
			if len(some) == 0 {
				for _, e := range rest {
					r.unkept += uint64(len(e.Data))
				}
				r.overflow()
				return nil
			}
			if err := r.put(ctx, some); err != nil {
				return err
			}
			entries = rest
		}
		return nil
	case Block:
		final := r.awaitRoom(ctx, cost(entries))
		if final != nil && !errors.Is(final, errFinal) {
			return final
		}
		// What has been read is kept also when the command is given up.
		return errors.Join(final, r.put(ctx, entries))
	default:
		return r.put(ctx, entries)
	}
}

// overflow ends a command that wrote more than its log has room for.
func (r *run) overflow() {
	r.discarding = true
	r.stop(stopOrder{
		reason: OutputLimit,
		detail: fmt.Sprintf("wrote more output than the %d bytes that its log may take", r.record.RetainedBytes),
	})
}

// awaitRoom waits until the log has room for size bytes without dropping what a watcher
// has not read, or anything if nobody watches; or until the command is over: then what
// is left of its output is little, and is kept. Orders to stop are carried out meanwhile.
func (r *run) awaitRoom(ctx context.Context, size int64) error {
	limit := r.record.RetainedBytes
	var silentSince time.Time
	for {
		switch needed := r.log.Size() + size; {
		case needed <= limit || r.over && needed <= limit+maxLeftover:
			return nil
		case r.over:
			return fmt.Errorf("%w: the guest tells more output than a command that is over can have left", errFinal)
		}
		waiting, cancel := r.interruptible(ctx)
		r.blocked.Store(true)
		wanted := r.log.Trim(limit-size, 0)
		if place, ok := r.audience.slowest(wanted); ok {
			if next := r.log.Trim(limit-size, place); next > place {
				_, _ = r.audience.slowest(next)
			}
		}
		if r.log.Size()+size <= limit {
			r.blocked.Store(false)
			cancel(nil)
			return nil
		}
		err := r.awaitOver(waiting)
		r.blocked.Store(false)
		cancel(nil)
		now := time.Now()
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil:
			silentSince = time.Time{}
		case errors.Is(err, errOrdered) || errors.Is(err, errNews):
		default:
			if silentSince.IsZero() {
				silentSince = now
			}
			if ended(r.sandbox) || answered(err) || now.Sub(silentSince) >= unreachable {
				return fmt.Errorf("%w: %w", errFinal, err)
			}
			pause(ctx, guestRetry)
		}
		if r.overdue() {
			return fmt.Errorf("%w: the guest did not end the command when it should have", errFinal)
		}
	}
}

// awaitOver hands a new order to the guest and asks it whether the command is over. It
// does on the way what is due.
func (r *run) awaitOver(ctx context.Context) error {
	if err := r.relay(ctx); err != nil {
		return err
	}
	r.remind(ctx, time.Now())
	wait := r.patience()
	if at, held := r.audience.release(); held {
		wait = max(min(wait, time.Until(at)), time.Millisecond)
	}
	bounded, stop := context.WithTimeoutCause(ctx, wait+answerTime, errNoAnswer)
	defer stop()
	out, err := r.guest.AwaitOver(bounded, r.id, wait)
	if err != nil {
		return err
	}
	defer out.Release()
	r.over = out.Over
	r.observe(time.Now(), out.Idle)
	if !out.Over {
		pause(ctx, coalesce) // a guest that does not wait when it is asked to must not keep us busy
	}
	return nil
}

// readOn tells the run that its watchers have read on.
func (r *run) readOn() {
	if !r.blocked.Load() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.interrupt != nil {
		r.interrupt(errNews)
	}
}

// attestOutput adds to the evidence what was not kept.
// How much that is only a guest that told the end knows.
func (r *run) attestOutput(res *Result, exit *guestv1.Exit) {
	if !r.discarding {
		return
	}
	res.Evidence["output_limit_bytes"] = strconv.FormatInt(r.record.RetainedBytes, 10)
	if exit == nil {
		return
	}
	discarded := exit.GetDiscardedBytes()
	if discarded == 0 {
		// The end came with the output that had no room: the guest gave nothing up.
		discarded = r.unkept
	}
	res.Evidence["discarded_bytes"] = strconv.FormatUint(discarded, 10)
}
