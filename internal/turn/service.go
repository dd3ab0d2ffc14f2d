package turn

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/journal"
)

// Sessions is what turns need of the sessions that they are in.
type Sessions interface {
	// Visible returns a fault NotFound (SESSION_NOT_FOUND) unless there is such a session
	// and the caller sees it.
	Visible(ctx context.Context, sessionID string, by caller.Caller) error
	// Profile returns what a turn needs to know of a session that takes prompts, or will
	// when its agent is ready. Faults: NotFound as Visible, FailedPrecondition (NO_AGENT;
	// SESSION_NOT_RUNNING).
	Profile(ctx context.Context, sessionID string, by caller.Caller) (Profile, error)
	// Note tells a session what became of a turn or an interaction in it, for its own log. It
	// must not wait for anything.
	Note(sessionID string, n Note)
}

// Note is news of a session. One of its fields is set.
type Note struct {
	// Turn has just begun or ended.
	Turn *Turn
	// Interaction has just been asked, or is no longer pending.
	Interaction *Interaction
}

// Config says what a Service works with.
type Config struct {
	Store Store
	// Sessions may also be set by SetSessions.
	Sessions Sessions
	// Dir holds the journals of turns.
	Dir string
	// MaxAge is how long the turns of a session are kept when that has ended; 0 is for ever.
	MaxAge time.Duration
	// CheckRoom returns a fault while the disk has no room for new work; nil tries all
	// the same.
	CheckRoom func() error
	Logger    *slog.Logger
}

// Service keeps turns.
type Service struct {
	cfg      Config
	log      *slog.Logger
	journals *journal.Set
	// requests keeps repeats of a request apart that come at the same time.
	requests idempotency.Requests
	// within is the context of all work, until Close.
	within func() context.Context
	end    context.CancelCauseFunc

	mu       sync.Mutex
	sessions Sessions
	lanes    map[string]*lane
	draining bool
	closed   bool
	work     sync.WaitGroup
}

// ErrClosed ends the Watchers and the waiting of a Service that was closed. It is a
// fault Unavailable (SERVER_STOPPING): the turn goes on, and an executord that is started
// again can tell of it.
var ErrClosed error = &fault.Error{
	Kind: fault.Unavailable, Reason: "SERVER_STOPPING", Message: "executord is stopping", RetryAfter: time.Second,
}

// New makes a Service. Recover must be called before it is used.
func New(cfg Config) (*Service, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	journals, err := journal.NewSet(journal.Config{Dir: cfg.Dir, What: "turn"})
	if err != nil {
		return nil, err
	}
	ctx, end := context.WithCancelCause(context.Background())
	return &Service{
		cfg: cfg, log: cfg.Logger, journals: journals, sessions: cfg.Sessions, requests: idempotency.Requests{Store: cfg.Store},
		within: func() context.Context { return ctx }, end: end, lanes: make(map[string]*lane),
	}, nil
}

// SetSessions completes the Service: sessions need turns and turns need sessions, so one
// of them is told of the other later.
func (s *Service) SetSessions(sessions Sessions) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sessions = sessions
}

func (s *Service) home() Sessions {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sessions
}

// Send queues a prompt. Once it returns nil the turn exists, whatever happens to
// executord. The repeat of an earlier request queues nothing and returns that one's turn
// as it is now. Faults besides those of a request that is wrong: NotFound,
// FailedPrecondition (SESSION_NOT_RUNNING, NO_AGENT), AlreadyExists (REQUEST_ID_REUSED),
// Exhausted (SPEND_LIMIT, TURN_LIMIT, QUEUE_FULL), Unavailable (SERVER_DRAINING).
func (s *Service) Send(ctx context.Context, r Request) (Turn, error) {
	earlier, done, err := s.requests.Begin(ctx, r.Key)
	if err != nil {
		return Turn{}, err
	}
	defer done()
	if earlier != "" {
		return s.Get(ctx, Ref{Session: r.Session, ID: earlier, Caller: r.Caller})
	}
	if err := r.Prompt.Validate(); err != nil {
		return Turn{}, err
	}
	if check := s.cfg.CheckRoom; check != nil {
		if err := check(); err != nil {
			return Turn{}, err
		}
	}
	if err := s.admit(); err != nil {
		return Turn{}, err
	}
	defer s.work.Done()
	// Before anything is made for a session that there may not be.
	if _, err := s.home().Profile(ctx, r.Session, r.Caller); err != nil {
		return Turn{}, err
	}
	l, err := s.lane(ctx, r.Session)
	if err != nil {
		return Turn{}, err
	}
	return l.send(ctx, r)
}

// admit lets new work in, unless the Service is stopping. Close then waits until the
// caller has called work.Done.
func (s *Service) admit() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining || s.closed {
		return admission.Draining()
	}
	s.work.Add(1)
	return nil
}

// spawn runs work that Close waits for; false if the Service was closed.
func (s *Service) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.work.Go(f)
	return true
}

// lane returns the queue of a session, with what is stored of it.
func (s *Service) lane(ctx context.Context, session string) (*lane, error) {
	if l := s.findLane(session); l != nil {
		return l, nil
	}
	totals, err := s.cfg.Store.Totals(ctx, session)
	if err != nil {
		return nil, fmt.Errorf("sum up the turns of session %s: %w", session, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.lanes[session]; l != nil {
		return l, nil // and what it has counted meanwhile
	}
	l := newLane(s, session, totals)
	s.lanes[session] = l
	return l, nil
}

func (s *Service) findLane(session string) *lane {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lanes[session]
}

// find returns a turn that has not ended.
func (s *Service) find(session, id string) *live {
	if l := s.findLane(session); l != nil {
		return l.find(id)
	}
	return nil
}

func newID(now time.Time) string {
	return strings.ToLower(ulid.MustNew(ulid.Timestamp(now), ulid.DefaultEntropy()).String())
}

// Get reads a turn. A fault NotFound if there is none of this name that the caller sees.
func (s *Service) Get(ctx context.Context, ref Ref) (Turn, error) {
	if err := s.home().Visible(ctx, ref.Session, ref.Caller); err != nil {
		return Turn{}, err
	}
	return s.get(ctx, ref)
}

// check returns a fault NotFound if there is no turn of this name that the caller sees.
func (s *Service) check(ctx context.Context, ref Ref) error {
	if err := s.home().Visible(ctx, ref.Session, ref.Caller); err != nil {
		return err
	}
	session, err := s.cfg.Store.TurnSession(ctx, ref.ID)
	if err == nil && session != ref.Session {
		err = errNoTurn(ref.ID)
	}
	return err
}

func errNoTurn(id string) error {
	return fault.New(fault.NotFound, "TURN_NOT_FOUND", "there is no turn %q", id)
}

// get is Get for who is known to see the session.
func (s *Service) get(ctx context.Context, ref Ref) (Turn, error) {
	stored, err := s.cfg.Store.GetTurn(ctx, ref.ID)
	if err != nil {
		return Turn{}, err
	}
	if stored.Session != ref.Session {
		return Turn{}, errNoTurn(ref.ID)
	}
	return s.present(stored), nil
}

// present is a stored turn as it is now.
func (s *Service) present(stored Turn) Turn {
	if stored.State == Ended {
		return stored
	}
	if l := s.find(stored.Session, stored.ID); l != nil {
		now := l.snapshot()
		now.Prompt = stored.Prompt // of which the store has more
		return now
	}
	return stored
}

// Wait returns a turn when it has ended. When ctx ends first it returns the turn as it
// is, and ctx's cause; when the Service is closed, ErrClosed.
func (s *Service) Wait(ctx context.Context, ref Ref) (Turn, error) {
	t, err := s.Get(ctx, ref)
	if err != nil || t.State == Ended {
		return t, err
	}
	waited := s.await(ctx, ref)
	t, err = s.get(context.WithoutCancel(ctx), ref)
	return t, errors.Join(waited, err)
}

// await returns when a turn has ended.
func (s *Service) await(ctx context.Context, ref Ref) error {
	l := s.find(ref.Session, ref.ID)
	if l == nil {
		// It has ended since it was looked for, or nobody leads it any more.
		return s.within().Err()
	}
	select {
	case <-l.done:
		return nil
	case <-s.within().Done():
		return ErrClosed
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// List reads a page of turns, each as it is now.
func (s *Service) List(ctx context.Context, q Query) ([]Turn, error) {
	if err := s.home().Visible(ctx, q.Session, q.Caller); err != nil {
		return nil, err
	}
	page, err := s.cfg.Store.ListTurns(ctx, q)
	for i := range page {
		page[i] = s.present(page[i])
	}
	return page, err
}

// Cancellation says who ends a turn.
type Cancellation struct {
	// By says who asked.
	By string
	// Key is the name of the request. A repeat is carried out again, which waits for the
	// same end.
	Key idempotency.Key
}

// Cancel ends a turn and returns it when it is over: one that waits is taken out of the
// queue, one that runs is aborted. One that has ended is returned as it is. The end goes
// on when ctx ends first.
func (s *Service) Cancel(ctx context.Context, ref Ref, c Cancellation) (Turn, error) {
	if err := s.check(ctx, ref); err != nil {
		return Turn{}, err // what is not there is not worth remembering
	}
	if err := s.requests.Note(ctx, c.Key, ref.ID); err != nil {
		return Turn{}, err
	}
	if l := s.find(ref.Session, ref.ID); l != nil {
		l.lane.cancel(l, order{by: c.By, detail: "cancelled by " + c.By})
	}
	if err := s.requests.Sync(ctx, c.Key); err != nil {
		return Turn{}, err
	}
	return s.Wait(ctx, ref)
}

// Messages reads what was said with the agent of a session: at most limit messages behind
// the one with the id after, "" for the first. Faults: NotFound, FailedPrecondition
// (NO_AGENT; SESSION_NOT_RUNNING while the agent cannot be asked). Their Prompt is the ID
// of a turn, "" for one that is not of this session.
func (s *Service) Messages(ctx context.Context, session string, by caller.Caller, after string, limit int) ([]agent.Message, error) {
	if err := s.home().Visible(ctx, session, by); err != nil {
		return nil, err
	}
	var c agent.Conversation
	if l := s.findLane(session); l != nil {
		c = l.conversation()
	}
	if c == nil {
		if _, err := s.home().Profile(ctx, session, by); err != nil {
			return nil, err
		}
		return nil, fault.New(fault.FailedPrecondition, "SESSION_NOT_RUNNING", "the agent of session %q is not ready", session)
	}
	all, err := c.Messages(ctx)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, "AGENT_UNREACHABLE", "the agent of session %q cannot be asked", session)
	}
	from := 0
	for i, m := range all {
		if after != "" && m.ID == after {
			from = i + 1
		}
	}
	if after != "" && from == 0 {
		return nil, nil // the agent has forgotten it, and what came before
	}
	page := all[from:min(from+limit, len(all))]
	for i := range page {
		page[i] = boundedMessage(page[i])
	}
	return page, s.assign(ctx, session, page)
}

// assign puts turns in place of prompts: "" for one that is not this session's, such as
// of the session that it was forked from.
func (s *Service) assign(ctx context.Context, session string, page []agent.Message) error {
	known := make(map[string]string)
	for i := range page {
		prompt := page[i].Prompt
		id, ok := known[prompt]
		if !ok {
			home, err := s.cfg.Store.TurnSession(ctx, prompt)
			if err != nil && fault.KindOf(err) != fault.NotFound {
				return err
			}
			if err == nil && home == session {
				id = prompt
			}
			known[prompt] = id
		}
		page[i].Prompt = id
	}
	return nil
}

// Drain refuses new prompts from now on.
func (s *Service) Drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.draining = true
}

// Close lets go of the turns, which go on in their sandboxes, and waits for all work.
func (s *Service) Close() error {
	s.mu.Lock()
	s.draining, s.closed = true, true
	s.mu.Unlock()
	s.end(ErrClosed)
	s.work.Wait()
	return s.journals.Close()
}
