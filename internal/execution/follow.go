package execution

import (
	"context"
	"errors"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/eventlog"
	"github.com/harvest-run/executord/internal/guestclient"
)

const (
	// readBytes is the most that is taken from the guest at a time.
	readBytes = 256 << 10
	// readWait is how long the guest waits for something to tell.
	readWait = 20 * time.Second
	// coalesce is the time in which small pieces of output are gathered into one
	// event. The first piece after a silence is never kept waiting.
	coalesce = 5 * time.Millisecond
	// smallRead is what counts as a small piece.
	smallRead = 4 << 10
)

// follow moves output from the guest to the log until the command has ended. nil
// means that the Service is closing.
func (r *run) follow(ctx context.Context) *Result {
	var lastAppend time.Time
	var silentSince time.Time // since when the guest does not answer
	for {
		out, err := r.read(ctx)
		now := time.Now()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				out.Release()
			}
			return nil // an executord after this one goes on; the guest still has it all
		case errors.Is(err, errOrdered) || errors.Is(err, errNews):
			continue
		case err != nil:
			if silentSince.IsZero() {
				silentSince = now
			}
			if ended(r.sandbox) || answered(err) || r.overdue() || now.Sub(silentSince) >= unreachable {
				return r.lost(ctx, err)
			}
			pause(ctx, guestRetry)
			continue
		}
		silentSince = time.Time{}
		exit, size := out.Exit, sizeOf(out)
		r.over = r.over || out.Over || exit != nil
		r.observe(now, out.Idle)
		if out.Discarding && !r.discarding && r.record.Policies.OnLimit == Kill {
			r.overflow() // it was an executord before this one that found its log full
		}
		if size > 0 {
			if r.times.FirstOutput.IsZero() {
				r.times.FirstOutput = now
			}
			if wait := coalesce - now.Sub(lastAppend); wait > 0 && size < smallRead && exit == nil {
				// The guest gathers meanwhile and is asked again from the same byte on.
				out.Release()
				pause(ctx, wait)
				continue
			}
			err := r.append(ctx, out)
			out.Release()
			switch {
			case errors.Is(err, errFinal):
				return r.lost(ctx, err)
			case err != nil:
				return nil
			}
			lastAppend = now
		} else {
			out.Release()
		}
		switch {
		case exit != nil:
			return r.exited(ctx, exit)
		case r.overdue():
			return r.lost(ctx, errors.New("the guest did not end the command when it should have"))
		}
		if did := r.remind(ctx, now); !did && size == 0 {
			pause(ctx, coalesce) // a guest that does not wait when it is asked to must not keep us busy
		}
	}
}

// patience is how long the guest may be asked to wait: until something else is due.
func (r *run) patience() time.Duration {
	wait := min(readWait, time.Until(r.deadline))
	if !r.noteAt.IsZero() {
		wait = min(wait, time.Until(r.noteAt))
	}
	if next := r.deadlines.nextWarning(); !next.IsZero() {
		wait = min(wait, time.Until(next))
	}
	return max(wait, 10*time.Millisecond)
}

func sizeOf(out *guestclient.Output) int {
	size := 0
	for _, c := range out.Chunks {
		size += len(c.Data)
	}
	return size
}

// read hands a new order to the guest and reads from where the log ends.
func (r *run) read(ctx context.Context) (*guestclient.Output, error) {
	ctx, cancel := r.interruptible(ctx)
	defer cancel(nil)
	if err := r.relay(ctx); err != nil {
		return nil, err
	}
	wait := r.patience()
	ctx, stop := context.WithTimeoutCause(ctx, wait+answerTime, errNoAnswer)
	defer stop()
	if early := r.early; early != nil {
		r.early = nil
		// Whatever went wrong with it, the same is asked again.
		if out, err := early.Output(ctx); err == nil {
			return out, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	if r.discarding {
		return r.guest.Discard(ctx, r.id, r.log.position(), wait)
	}
	return r.guest.Read(ctx, r.id, r.log.position(), readBytes, wait)
}

// append writes output into the log. While the disk is full it waits, and so does
// the command, whose pipe fills up: nothing is lost and nothing is killed. Only an
// order to stop is carried out all the same, at the price of the output that has no
// room; errFinal tells so. Another error means that the Service is closing; the
// guest then still has the output.
func (r *run) append(ctx context.Context, out *guestclient.Output) error {
	entries := make([]eventlog.Entry, 0, 16)
	for _, c := range out.Chunks {
		stream := eventlog.Stdout
		if c.Stream == guestv1.Stream_STREAM_STDERR {
			stream = eventlog.Stderr
		}
		for data := c.Data; len(data) > 0; {
			n := min(len(data), eventlog.MaxData)
			entries = append(entries, eventlog.Entry{Kind: eventlog.KindOutput, Stream: stream, Data: data[:n]})
			data = data[n:]
		}
	}
	return r.write(ctx, entries)
}

// put is append with entries that may go into the log.
func (r *run) put(ctx context.Context, entries []eventlog.Entry) error {
	return r.persist(ctx, "append output", func() error {
		err := r.log.Append(time.Now(), entries...)
		if err == nil {
			return nil
		}
		_ = r.relay(ctx) // one that does not get there is relayed with the next attempt
		if r.ordered() != nil && r.overdue() {
			return errNoRoom
		}
		return err
	})
}
