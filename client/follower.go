package client

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// entry is an event of a log that has no output streams: of a turn, of a session.
type entry interface {
	comparable
	GetCursor() *executorv1.Cursor
	GetGap() *executorv1.Gap
	GetHeartbeat() *executorv1.Heartbeat
}

// logKind is what a follower needs to know of a kind of log.
type logKind[E entry] struct {
	// watch opens the log behind a cursor, or from its start if that is nil.
	watch func(ctx context.Context, name string, after *executorv1.Cursor, every *durationpb.Duration) (func() (E, error), error)
	// last says whether an event ends the log.
	last func(E) bool
	// known says whether this version knows what an event tells.
	known func(E) bool
}

// follower follows such a log and resumes by itself. recv is for one goroutine at a time;
// the other methods may be called from any.
type follower[E entry] struct {
	client *Client
	kind   logKind[E]
	// within is the context of the call that made the follower, until close.
	within func() context.Context
	end    context.CancelCauseFunc
	// silence is how long an open stream may say nothing; beatEvery is the heartbeat
	// interval to ask for, nil for the server's default.
	silence   time.Duration
	beatEvery *durationpb.Duration

	books   places
	lost    outage
	current *attempt[E]
	// first is the event that was waited for and that recv has yet to return.
	first    E
	waiting  bool
	over     bool
	failed   error
	mu       sync.Mutex
	resource string
	cursor   *executorv1.Cursor
}

func newFollower[E entry](ctx context.Context, c *Client, kind logKind[E], name string, after *executorv1.Cursor, every *durationpb.Duration) *follower[E] {
	ctx, end := context.WithCancelCause(ctx)
	if every == nil && c.cfg.HeartbeatInterval != 0 {
		every = durationpb.New(c.cfg.HeartbeatInterval)
	}
	interval := 15 * time.Second
	if every != nil {
		interval = every.AsDuration()
	}
	f := &follower[E]{
		client: c, kind: kind, within: func() context.Context { return ctx }, end: end,
		silence: max(3*interval, 5*time.Second), beatEvery: every,
		books: places{epoch: after.GetEpoch(), sequence: after.GetSequence()}, lost: c.newOutage(name), resource: name,
	}
	if after != nil {
		f.cursor = proto.CloneOf(after)
	}
	return f
}

// recv returns the next event. It blocks until there is one, through as many connections
// as it takes.
func (f *follower[E]) recv() (E, error) {
	var none E
	if f.failed != nil {
		return none, f.failed
	}
	if f.waiting {
		e := f.first
		f.first, f.waiting = none, false
		f.note(e)
		return e, nil
	}
	if f.over {
		return none, f.finish()
	}
	for {
		e, err := f.next()
		if err != nil {
			return none, f.fail(err)
		}
		what, err := f.books.admit(e.GetCursor(), e.GetGap(), e.GetHeartbeat())
		if err != nil {
			return none, f.fail(err)
		}
		if what == repeated {
			continue
		}
		f.lost.over()
		f.note(e)
		if !f.kind.known(e) || what == beat && !f.client.cfg.Heartbeats {
			continue
		}
		return e, nil
	}
}

// note makes what an event changed visible.
func (f *follower[E]) note(e E) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cursor = &executorv1.Cursor{Epoch: f.books.epoch, Sequence: f.books.sequence}
	f.over = f.over || f.kind.last(e)
}

func (f *follower[E]) name() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.resource
}

func (f *follower[E]) at() *executorv1.Cursor {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cursor == nil {
		return nil
	}
	return proto.CloneOf(f.cursor)
}

func (f *follower[E]) drop() {
	if f.current != nil {
		f.current.close()
		f.current = nil
	}
}

// start sends a request that makes something and follows it, until its first event tells
// the name; with as many connections as it takes.
func (f *follower[E]) start(call func(context.Context) (func() (E, error), error), name func(E) string) error {
	ctx, doubt := f.within(), false
	for {
		sent, err := f.tryStart(doubt, call, name)
		if err == nil {
			f.lost.over()
			return nil
		}
		f.drop()
		doubt = doubt || sent && unanswered(ctx, err)
		if err := doubtful(ctx, &f.lost, doubt, err); err != nil {
			f.end(ErrClosed)
			return err
		}
	}
}

// tryStart is one attempt of start; sent says whether there was a connection to send the
// request on.
func (f *follower[E]) tryStart(again bool, call func(context.Context) (func() (E, error), error), name func(E) string) (sent bool, err error) {
	var limit time.Duration
	if again {
		limit = f.limit()
	}
	f.books = places{}
	if f.current, err = open(f.within(), limit, call); err != nil {
		return false, err
	}
	for {
		// How long the server may take to admit it is between it and ctx.
		e, err := f.current.next(0)
		if err != nil {
			return true, err
		}
		what, err := f.books.admit(e.GetCursor(), e.GetGap(), e.GetHeartbeat())
		switch {
		case err != nil:
			return true, err
		case what == beat:
		case name(e) == "":
			return true, fmt.Errorf("%w: the first event names nothing", ErrProtocol)
		default:
			f.mu.Lock()
			defer f.mu.Unlock()
			f.first, f.waiting, f.resource, f.lost.name = e, true, name(e), name(e)
			return true, nil
		}
	}
}

// next returns the next event of the server, connecting as often as it takes.
func (f *follower[E]) next() (E, error) {
	var none E
	for {
		e, err := f.tryNext()
		if err == nil {
			return e, nil
		}
		f.drop()
		ctx := f.within()
		if ctx.Err() != nil {
			return none, context.Cause(ctx)
		}
		if !resumable(err) {
			return none, err
		}
		if err := f.lost.wait(ctx, err); err != nil {
			return none, err
		}
	}
}

// tryNext returns the next event of the open stream, opening one if there is none.
func (f *follower[E]) tryNext() (E, error) {
	if f.current == nil {
		var after *executorv1.Cursor
		if f.books.sequence != 0 || f.books.epoch != "" {
			after = &executorv1.Cursor{Epoch: f.books.epoch, Sequence: f.books.sequence}
		}
		a, err := open(f.within(), f.limit(), func(ctx context.Context) (func() (E, error), error) {
			return f.kind.watch(ctx, f.name(), after, f.beatEvery)
		})
		if err != nil {
			var none E
			return none, err
		}
		f.current = a
	}
	return f.current.next(f.silence)
}

// limit is how long an attempt may take to connect.
func (f *follower[E]) limit() time.Duration { return max(f.lost.left(), time.Second) }

// finish reads the status behind the last event, so that the server sees its stream end
// well, and not for long.
func (f *follower[E]) finish() error {
	if f.current != nil {
		_, _ = f.current.next(time.Second)
		f.drop()
	}
	f.failed = io.EOF
	f.end(ErrClosed)
	return f.failed
}

// fail ends it for good.
func (f *follower[E]) fail(err error) error {
	f.drop()
	f.failed = fmt.Errorf("follow %s: %w", f.name(), err)
	f.end(ErrClosed)
	return f.failed
}

// places are the books of a log without output: which event comes next.
type places struct {
	// epoch is "" until the first event names it.
	epoch string
	// sequence is that of the last event told or announced as missing.
	sequence uint64
}

// admit checks an event against the books and enters it. The error is an ErrHole or
// ErrProtocol.
func (p *places) admit(at *executorv1.Cursor, gap *executorv1.Gap, heartbeat *executorv1.Heartbeat) (verdict, error) {
	same := at.GetEpoch() == p.epoch || p.epoch == ""
	switch {
	case heartbeat != nil:
		// Its cursor is the last event told.
		if same && at.GetSequence() > p.sequence {
			return 0, fmt.Errorf("%w: event %d does not come and the log is at %d", ErrHole, p.sequence+1, at.GetSequence())
		}
		return beat, nil
	case gap.GetReason() == executorv1.Gap_REASON_EPOCH_CHANGED:
		p.epoch, p.sequence = at.GetEpoch(), at.GetSequence()
		return fresh, nil
	case !same:
		return 0, fmt.Errorf("%w: the epoch changed from %q to %q", ErrHole, p.epoch, at.GetEpoch())
	case at.GetSequence() == 0:
		return 0, fmt.Errorf("%w: an event without a sequence number", ErrProtocol)
	case at.GetSequence() <= p.sequence:
		return repeated, nil
	case gap == nil && at.GetSequence() != p.sequence+1:
		return 0, fmt.Errorf("%w: event %d follows on %d", ErrHole, at.GetSequence(), p.sequence)
	}
	p.epoch, p.sequence = at.GetEpoch(), at.GetSequence()
	return fresh, nil
}
