package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// Stream follows the log of one execution and resumes by itself. Recv is for one
// goroutine at a time; the other methods may be called from any.
//
// It lives in the context of the call that made it, as every gRPC stream does, and
// holds resources until Recv has returned an error (io.EOF is one), Close was
// called or that context ended. The execution does not care: it goes on.
type Stream struct {
	client *Client
	// within is the context of the call that made the stream, until Close.
	within func() context.Context
	// end ends that context.
	end context.CancelCauseFunc
	// silence is how long an open stream may say nothing.
	silence time.Duration
	// beatEvery is the heartbeat interval to ask for; nil for the server's default.
	beatEvery *durationpb.Duration

	books   ledger
	lost    outage
	current *attempt[*executorv1.Event]
	// first is the started event that Execute waited for and Recv has yet to return.
	first *executorv1.Event
	// inlet is the input of an attached Stream; nil of one that only reads.
	inlet *inlet
	// failed is what Recv returns from now on.
	failed error

	mu     sync.Mutex
	name   string
	cursor *executorv1.Cursor
	result *executorv1.Result
	whole  bool
}

// attempt is one open gRPC stream of events.
type attempt[E comparable] struct {
	recv   func() (E, error)
	ctx    func() context.Context
	cancel context.CancelCauseFunc
	alarm  *time.Timer
}

// Execute starts a command and follows it. It returns when the execution exists: its
// Name is known then, and the first event that Recv returns is started. When the
// connection breaks before that, the request is repeated with its request_id, a random
// one if the caller gave none: it starts nothing twice. An error is the server's refusal,
// or tells that there is no server, or is ErrUnconfirmed where the outage lasted for
// MaxOutage or ctx ended after the request went out. When ctx ends later, the Stream ends
// and the execution goes on.
func (c *Client) Execute(ctx context.Context, request *executorv1.ExecuteRequest) (*Stream, error) {
	if request.GetHeartbeatInterval() == nil && c.cfg.HeartbeatInterval != 0 {
		request = proto.CloneOf(request)
		request.HeartbeatInterval = durationpb.New(c.cfg.HeartbeatInterval)
	}
	request = identified(request)
	s := c.newStream(ctx, "", nil, request.GetHeartbeatInterval())
	event, err := s.start(request)
	if err != nil {
		s.end(ErrClosed)
		return nil, fmt.Errorf("execute: %w", err)
	}
	s.first = event
	s.name = event.GetStarted().GetExecution()
	s.lost.name = s.name
	return s, nil
}

// Watch follows an execution from behind the cursor after, or from its first event
// if after is nil. It asks nothing yet: NOT_FOUND and the like come from the first
// Recv, and a server that is out of reach is waited for like one that goes away
// later. The Stream ends when ctx does.
func (c *Client) Watch(ctx context.Context, name string, after *executorv1.Cursor) (*Stream, error) {
	if name == "" {
		return nil, errors.New("watch: the execution has no name")
	}
	var every *durationpb.Duration
	if c.cfg.HeartbeatInterval != 0 {
		every = durationpb.New(c.cfg.HeartbeatInterval)
	}
	return c.newStream(ctx, name, after, every), nil
}

func (c *Client) newStream(ctx context.Context, name string, after *executorv1.Cursor, beatEvery *durationpb.Duration) *Stream {
	ctx, end := context.WithCancelCause(ctx)
	every := 15 * time.Second
	if beatEvery != nil {
		every = beatEvery.AsDuration()
	}
	s := &Stream{
		client:    c,
		within:    func() context.Context { return ctx },
		end:       end,
		silence:   max(3*every, 5*time.Second),
		beatEvery: beatEvery,
		books:     newLedger(after),
		lost:      c.newOutage(name),
		name:      name,
	}
	if after != nil {
		s.cursor = proto.CloneOf(after)
	}
	s.whole = s.books.whole()
	return s
}

// Recv returns the next event. It blocks until there is one, through as many
// connections as it takes. After the result it returns io.EOF. Any other error is
// final as well:
//
//   - ErrHole, ErrProtocol: the server left something out or made no sense.
//   - ErrIncomplete: the result came, Result has it, and the output does not match it.
//   - ErrOutage, with the last failure: the server stayed away for MaxOutage.
//   - the cause of the context, or ErrClosed.
//   - the server's refusal to go on, such as NOT_FOUND for a deleted execution.
func (s *Stream) Recv() (*executorv1.Event, error) {
	if s.failed != nil {
		return nil, s.failed
	}
	if e := s.first; e != nil {
		s.first = nil
		s.note(e)
		return e, nil
	}
	if s.Result() != nil {
		return nil, s.finish()
	}
	for {
		e, err := s.next()
		if err != nil {
			return nil, s.fail(err)
		}
		what, err := s.books.admit(e)
		if err != nil {
			s.conclude(e)
			return nil, s.fail(err)
		}
		if what == repeated {
			continue
		}
		s.lost.over()
		s.note(e)
		// Of the kinds that this version does not know, only the place is noted.
		if e.GetKind() == nil || (what == beat && !s.client.cfg.Heartbeats) {
			continue
		}
		return e, nil
	}
}

// Close ends the Stream; a Recv that waits returns ErrClosed. The execution goes on.
// It may be called more than once.
func (s *Stream) Close() { s.end(ErrClosed) }

// Name is the execution's resource name.
func (s *Stream) Name() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.name
}

// Cursor is behind the last event that Recv returned. Watch goes on there, also in
// another process. It is nil before the first event of a log read from its start.
func (s *Stream) Cursor() *executorv1.Cursor {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cursor == nil {
		return nil
	}
	return proto.CloneOf(s.cursor)
}

// Result is the execution's result once it has come, nil before. It is there even
// when Recv found the output incomplete.
func (s *Stream) Result() *executorv1.Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.result
}

// Whole says whether Recv returned every byte of both outputs so far: the log was
// read from its start and no Gap took output away. Once the result has come without
// an error, that is proved by the length and CRC-32C of both.
func (s *Stream) Whole() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.whole
}

// note makes what an event changed visible.
func (s *Stream) note(e *executorv1.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.books.sequence != 0 || s.books.epoch != "" {
		s.cursor = s.books.cursor()
	}
	s.whole = s.books.whole()
	if r := e.GetResult(); r != nil {
		s.result = r
	}
}

// conclude keeps the result of a log whose books do not balance.
func (s *Stream) conclude(e *executorv1.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.result = e.GetResult()
	s.whole = false
}

// start sends the request to execute and waits for the started event, with as many
// connections as it takes.
func (s *Stream) start(request *executorv1.ExecuteRequest) (*executorv1.Event, error) {
	ctx, doubt := s.within(), false
	for {
		e, sent, err := s.tryStart(request, doubt)
		if err == nil {
			s.lost.over()
			return e, nil
		}
		if s.current != nil {
			s.current.close()
			s.current = nil
		}
		doubt = doubt || sent && unanswered(ctx, err)
		if err := doubtful(ctx, &s.lost, doubt, err); err != nil {
			return nil, err
		}
	}
}

// tryStart is one attempt of start; sent says whether there was a connection to send the
// request on.
func (s *Stream) tryStart(request *executorv1.ExecuteRequest, again bool) (e *executorv1.Event, sent bool, err error) {
	var limit time.Duration
	if again {
		limit = max(s.lost.left(), time.Second)
	}
	s.books = newLedger(nil)
	s.current, err = open(s.within(), limit, func(ctx context.Context) (func() (*executorv1.Event, error), error) {
		stream, err := s.client.executor.Execute(ctx, request)
		if err != nil {
			return nil, err
		}
		return func() (*executorv1.Event, error) {
			m, err := stream.Recv()
			return m.GetEvent(), err
		}, nil
	})
	if err != nil {
		return nil, false, err
	}
	for {
		// How long the server may take to admit a command is between it and ctx.
		e, err := s.current.next(0)
		if err != nil {
			return nil, true, err
		}
		what, err := s.books.admit(e)
		switch {
		case err != nil:
			return nil, true, err
		case what == beat:
		case e.GetStarted().GetExecution() == "":
			return nil, true, fmt.Errorf("%w: the first event does not name the execution", ErrProtocol)
		default:
			return e, true, nil
		}
	}
}

// next returns the next event of the server, connecting as often as it takes.
func (s *Stream) next() (*executorv1.Event, error) {
	for {
		e, err := s.tryNext()
		if err == nil {
			return e, nil
		}
		if s.current != nil {
			s.current.close()
			s.current = nil
		}
		ctx := s.within()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !resumable(err) {
			return nil, err
		}
		if err := s.lost.wait(ctx, err); err != nil {
			return nil, err
		}
	}
}

// tryNext returns the next event of the open stream, opening one if there is none.
func (s *Stream) tryNext() (*executorv1.Event, error) {
	if s.current == nil && s.inlet != nil {
		a, err := s.openAttached()
		if err != nil {
			return nil, err
		}
		s.current = a
	}
	if s.current == nil {
		request := &executorv1.WatchExecutionRequest{Name: s.name, HeartbeatInterval: s.beatEvery}
		if s.books.sequence != 0 || s.books.epoch != "" {
			request.After = s.books.cursor()
		}
		a, err := open(s.within(), s.limit(), func(ctx context.Context) (func() (*executorv1.Event, error), error) {
			stream, err := s.client.executor.WatchExecution(ctx, request)
			if err != nil {
				return nil, err
			}
			return func() (*executorv1.Event, error) {
				m, err := stream.Recv()
				return m.GetEvent(), err
			}, nil
		})
		if err != nil {
			return nil, err
		}
		s.current = a
	}
	return s.current.next(s.silence)
}

// limit is how long an attempt may take to connect. The last of an outage still gets a
// moment.
func (s *Stream) limit() time.Duration { return max(s.lost.left(), time.Second) }

// open makes an attempt. The call must return within the limit; 0 sets none.
func open[E comparable](within context.Context, limit time.Duration, call func(context.Context) (func() (E, error), error)) (*attempt[E], error) {
	ctx, cancel := context.WithCancelCause(within)
	if limit > 0 {
		alarm := time.AfterFunc(limit, func() { cancel(errUnreached) })
		defer alarm.Stop()
	}
	recv, err := call(ctx)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		cancel(ErrClosed)
		return nil, err
	}
	return &attempt[E]{recv: recv, ctx: func() context.Context { return ctx }, cancel: cancel}, nil
}

// next reads one event; after limit without one the attempt is over. 0 sets none.
// The clock only runs while somebody waits: a slow reader is not a silent server.
func (a *attempt[E]) next(limit time.Duration) (E, error) {
	var none E
	if limit > 0 {
		if a.alarm == nil {
			a.alarm = time.AfterFunc(limit, func() { a.cancel(errSilent) })
		} else {
			a.alarm.Reset(limit)
		}
		defer a.alarm.Stop()
	}
	e, err := a.recv()
	switch {
	case err == nil && e == none:
		return none, fmt.Errorf("%w: an empty message", ErrProtocol)
	case err == nil:
		return e, nil
	case errors.Is(err, io.EOF):
		return none, errCutOff
	case context.Cause(a.ctx()) != nil:
		return none, context.Cause(a.ctx())
	default:
		return none, err
	}
}

// close releases the attempt.
func (a *attempt[E]) close() { a.cancel(ErrClosed) }

// finish reads the status behind the result, so that the server sees its stream end
// well, and not for long: the result is what counts.
func (s *Stream) finish() error {
	if s.current != nil {
		_, _ = s.current.next(time.Second)
		s.current.close()
		s.current = nil
	}
	s.failed = io.EOF
	s.end(ErrClosed)
	return s.failed
}

// fail ends the Stream for good.
func (s *Stream) fail(err error) error {
	if s.current != nil {
		s.current.close()
		s.current = nil
	}
	s.failed = fmt.Errorf("follow %s: %w", s.name, err)
	s.end(ErrClosed)
	return s.failed
}
