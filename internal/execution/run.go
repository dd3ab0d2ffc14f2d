package execution

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
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
	// guestSlack is how much later than it should the guest may end a command before
	// its sandbox is ended instead.
	guestSlack = 15 * time.Second
	// unreachable is how long a guest that lives may not answer.
	unreachable = 30 * time.Second
	// sandboxTime bounds the making and the ending of a sandbox.
	sandboxTime = 2 * time.Minute
)

// run is an execution that has not ended. One goroutine leads it from begin or
// resume to its end; the others look at it and order it to stop.
type run struct {
	service *Service
	id      string
	session string
	log     *logHandle
	cancel  context.CancelCauseFunc // ends the leading goroutine
	done    chan struct{}           // closed when the end is recorded
	left    chan struct{}           // closed when the leading goroutine is through

	// Owned by the leading goroutine.
	sandbox  engine.Sandbox
	guest    *guest
	times    Times
	deadline time.Time // when the guest should have ended it by itself

	mu        sync.Mutex
	record    Execution
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
}

// errOrdered interrupts a wait because there is a new order.
var errOrdered = errors.New("the execution was ordered to stop")

// newRun makes a run and the context of its leading goroutine, which outlives the
// request that it came from.
func newRun(s *Service, e Execution, log *logHandle, sandbox engine.Sandbox) (context.Context, *run) {
	ctx, cancel := context.WithCancelCause(context.Background())
	return ctx, &run{
		service: s, id: e.ID, session: e.Session, log: log, sandbox: sandbox, record: e,
		cancel: cancel, done: make(chan struct{}), left: make(chan struct{}),
		times: Times{Queued: e.CreateTime},
	}
}

// leave ends what newRun began.
func (r *run) leave() {
	r.cancel(ErrClosed)
	r.service.dismiss(r)
	r.log.release()
	close(r.left)
}

// snapshot is the execution as it is now.
func (r *run) snapshot() Execution {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.record
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
	r.grace = min(r.grace, grace)
	r.fresh = true
	if r.record.State < Stopping {
		r.record.State = Stopping
	}
	if r.interrupt != nil {
		r.interrupt(errOrdered)
	}
}

// interruptible returns a context that a new order ends, and the order if one has
// not been carried out yet.
func (r *run) interruptible(ctx context.Context) (context.Context, context.CancelCauseFunc, *stopOrder, time.Duration) {
	ctx, cancel := context.WithCancelCause(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.interrupt = cancel
	if !r.fresh {
		return ctx, cancel, nil, 0
	}
	r.fresh = false
	return ctx, cancel, r.order, r.grace
}

func (r *run) ordered() *stopOrder {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.order
}

// begin leads a new execution to its end.
func (r *run) begin(ctx context.Context, command Command) {
	defer r.leave()
	result := r.launch(ctx, command)
	if result == nil && ctx.Err() == nil {
		result = r.follow(ctx)
	}
	r.end(ctx, result)
}

// launch gets a sandbox and starts the command in it. A result means that it did
// not come to run.
func (r *run) launch(ctx context.Context, command Command) *Result {
	if r.sandbox == nil {
		if result := r.makeSandbox(ctx); result != nil || ctx.Err() != nil {
			return result
		}
	}
	r.times.SandboxReady = time.Now()
	r.guest = r.service.guests.of(ctx, r.sandbox, r.session != "")
	// A guest that does not answer is not waited for longer than later on.
	ctx, cancel := context.WithTimeoutCause(ctx, unreachable, fmt.Errorf("no answer within %v", unreachable))
	defer cancel()
	for i := 0; ; i++ {
		request, ok := command.startRequest(r.id, i)
		if !ok {
			return noInterpreter(command)
		}
		started, err := r.guest.Start(ctx, request)
		switch guestclient.KindOf(err) {
		case guestv1.Error_KIND_NO_SUCH_PROGRAM:
			if len(command.Args) == 0 && !isWorkingDirectory(err) {
				continue
			}
			return startFailed("not_found", err)
		case guestv1.Error_KIND_UNSPECIFIED:
			if err != nil {
				return r.lost(ctx, err)
			}
		default:
			return startFailed(kindName(guestclient.KindOf(err)), err)
		}
		r.running(time.Now(), command, started)
		return nil
	}
}

func (r *run) running(now time.Time, command Command, _ *guestv1.StartResponse) {
	r.times.Started = now
	r.deadline = now.Add(command.Timeout + *command.GracePeriod + guestSlack)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.record.StartTime = now
	if r.record.State < Running {
		r.record.State = Running
	}
}

// makeSandbox makes the sandbox of a one-shot; an order to stop ends the making.
func (r *run) makeSandbox(ctx context.Context) *Result {
	ctx, cancel, order, _ := r.interruptible(ctx)
	defer cancel(nil)
	if order == nil {
		ctx, stop := context.WithTimeoutCause(ctx, sandboxTime, fmt.Errorf("no sandbox within %v", sandboxTime))
		defer stop()
		var err error
		r.sandbox, err = r.service.cfg.Engine.Create(ctx, engine.Spec{ID: r.record.Sandbox, Limits: r.record.Limits})
		if err == nil {
			return nil
		}
		if r.ordered() == nil {
			return startFailed("no_sandbox", err)
		}
	}
	return stopped(r.ordered(), &Result{TreeEmpty: true})
}

// follow moves output from the guest to the log until the command has ended.
func (r *run) follow(ctx context.Context) *Result {
	var lastAppend time.Time
	var silentSince time.Time // since when the guest does not answer
	for {
		out, err := r.read(ctx)
		switch {
		case ctx.Err() != nil:
			return nil // the Service is closing: an executord after this one goes on
		case errors.Is(err, errOrdered):
			continue
		case err != nil:
			if silentSince.IsZero() {
				silentSince = time.Now()
			}
			if r.gone() || guestclient.KindOf(err) != guestv1.Error_KIND_UNSPECIFIED || time.Since(silentSince) > unreachable {
				return r.lost(ctx, err)
			}
			pause(ctx, coalesce)
			continue
		}
		silentSince = time.Time{}
		size := 0
		for _, c := range out.Chunks {
			size += len(c.Data)
		}
		now := time.Now()
		if size > 0 {
			if r.times.FirstOutput.IsZero() {
				r.times.FirstOutput = now
			}
			if !r.append(ctx, out) {
				out.Release()
				return nil
			}
		}
		exit := out.Exit
		out.Release()
		if exit != nil {
			return r.exited(ctx, exit)
		}
		if r.overdue(now) {
			return r.lost(ctx, errors.New("the guest did not end the command when it should have"))
		}
		if size > 0 && size < smallRead && now.Sub(lastAppend) < coalesce {
			pause(ctx, coalesce-now.Sub(lastAppend))
		}
		if size > 0 {
			lastAppend = now
		}
	}
}

// read hands a new order to the guest and reads from where the log ends.
func (r *run) read(ctx context.Context) (*guestclient.Output, error) {
	ctx, cancel, order, grace := r.interruptible(ctx)
	defer cancel(nil)
	if order != nil {
		r.deadline = time.Now().Add(grace + guestSlack)
		if err := r.guest.Stop(ctx, r.id, grace); err != nil {
			r.mu.Lock()
			r.fresh = true // to be tried again
			r.mu.Unlock()
			return nil, err
		}
	}
	wait := min(readWait, max(time.Until(r.deadline), 10*time.Millisecond))
	return r.guest.Read(ctx, r.id, r.log.position(), readBytes, wait)
}

// overdue says whether the guest should have told the end by now.
func (r *run) overdue(now time.Time) bool { return !r.deadline.IsZero() && now.After(r.deadline) }

// gone says whether the sandbox has ended.
func (r *run) gone() bool {
	select {
	case <-r.sandbox.Done():
		return true
	default:
		return false
	}
}

// append writes output into the log. While the disk is full it waits, and so does
// the command, whose pipe fills up: nothing is lost and nothing is killed. false when
// the Service is closing; the guest then still has the output.
func (r *run) append(ctx context.Context, out *guestclient.Output) bool {
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
	return r.persist(ctx, "append output", func() error { return r.log.Append(time.Now(), entries...) })
}

// persist repeats a write until it works or the Service is closed.
func (r *run) persist(ctx context.Context, what string, write func() error) bool {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		err := write()
		if err == nil {
			return true
		}
		r.service.log.ErrorContext(ctx, "cannot write, trying again", "execution", r.id, "what", what, "error", err)
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

// end records the result: in the log, where watchers see it, then in the store, and
// lets go of the sandbox. A nil result means that the execution goes on without us.
func (r *run) end(ctx context.Context, result *Result) {
	if result == nil || ctx.Err() != nil {
		return
	}
	r.complete(result)
	data, err := json.Marshal(result)
	if err != nil {
		r.service.log.ErrorContext(ctx, "encode result", "execution", r.id, "error", err)
		return
	}
	r.mu.Lock()
	r.record.State, r.record.Result, r.record.EndTime = Ended, result, result.Times.Ended
	r.mu.Unlock()
	if !r.persist(ctx, "seal the log", func() error {
		return r.log.Seal(result.Times.Ended, eventlog.Entry{Kind: kindResult, Data: data})
	}) {
		return
	}
	r.settle(ctx)
	r.letGo()
}

// settle writes the end into the store and tells those who wait.
func (r *run) settle(ctx context.Context) {
	final := r.snapshot()
	if r.persist(ctx, "record the end", func() error { return r.service.cfg.Store.UpdateExecution(ctx, final) }) {
		close(r.done)
	}
}

// letGo ends a one-shot's sandbox, or makes the session's guest forget the command.
func (r *run) letGo() {
	s := r.service
	if r.sandbox == nil {
		return
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), sandboxTime, fmt.Errorf("not ended within %v", sandboxTime))
	defer cancel()
	if r.session != "" {
		if r.guest != nil && !r.gone() {
			if err := r.guest.Release(ctx, r.id); err != nil {
				s.log.WarnContext(ctx, "the guest keeps an ended command", "execution", r.id, "error", err)
			}
		}
		return
	}
	s.guests.drop(r.sandbox)
	if _, err := r.sandbox.Terminate(ctx); err != nil {
		s.log.ErrorContext(ctx, "a sandbox is left until the next start", "sandbox", r.sandbox.ID(), "error", err)
	}
}
