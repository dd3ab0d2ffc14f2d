package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/journal"
)

// Pool has sandboxes that are ready.
type Pool interface {
	// Claim takes one that is as spec says but for its name, and never waits; false if
	// there is none.
	Claim(spec engine.Spec) (engine.Sandbox, bool)
}

// Config says what a Service works with.
type Config struct {
	// Engines make the sandboxes.
	Engines engines.Set
	Store   Store
	// MaxPerOwner bounds the sessions of an owner that have not ended; 0 does not.
	MaxPerOwner int64
	// CheckRoom returns a fault while the disk has no room for new work; nil tries all
	// the same.
	CheckRoom func() error
	// Admission says how many sandboxes there may be; nil for no limit.
	Admission *admission.Controller
	// Pool is asked first for a sandbox on the default engine; nil for none.
	Pool Pool
	// Network decides what sandboxes reach and lets them; nil lets them reach nothing.
	Network *egress.Gateway
	// Parts are what repositories and agents need.
	Parts Parts
	// Dir is where the logs of sessions are kept. It is made.
	Dir    string
	Logger *slog.Logger
}

// Parts are what repositories and agents need: all of them, or none. Without them a session
// is a plain sandbox.
type Parts struct {
	Images      Images
	Credentials Credentials
	Workspace   Workspace
	Agents      Agents
	Turns       Turns
}

// Service keeps sessions.
type Service struct {
	cfg Config
	log *slog.Logger
	// requests keeps repeats of a request apart that come at the same time.
	requests idempotency.Requests
	journals *journal.Set

	mu         sync.Mutex
	executions Executions
	live       map[string]*live
	draining   bool
	work       sync.WaitGroup
}

// Request asks for a session.
type Request struct {
	// Caller asks, and will be the owner.
	Caller caller.Caller
	// Engine makes its sandbox; "" is the default. Placement says where that runs.
	Engine    string
	Placement engine.Placement
	Limits    engine.Limits
	// Network is what its sandbox may reach.
	Network egress.Policy
	// Lifetime is counted from the creation; 0 stands for DefaultLifetime.
	Lifetime time.Duration
	Labels   map[string]string
	// Repositories are cloned before it is ready; their Directory may be "".
	Repositories []Repository
	Identity     Identity
	// Agent is nil for none.
	Agent *AgentSpec
	// Values are credentials by name, Secrets names of configured ones, Auth the content of
	// the agent's file of log-ins.
	Values  map[string]string
	Secrets map[string]string
	Auth    string
	// IdleTimeout is after how long IdleAction is taken; 0 never.
	IdleTimeout time.Duration
	IdleAction  IdleAction
	// Image is a name; "" for the default.
	Image string
	// Key is the name of the request, with which it can be repeated.
	Key idempotency.Key
}

// Ref names a session. Caller is who names it; for a caller who does not see it, it does
// not exist.
type Ref struct {
	ID     string
	Caller caller.Caller
}

// MaxLifetime is the most that may be asked for.
const MaxLifetime = 30 * 24 * time.Hour

// errClosed ends the waiting for a session of a Service that was closed. The session
// lives on, and an executord that is started again can tell of it.
var errClosed error = &fault.Error{
	Kind: fault.Unavailable, Reason: "SERVER_STOPPING", Message: "executord is stopping", RetryAfter: time.Second,
}

// New makes a Service. SetExecutions must be called before it is used.
func New(cfg Config) (*Service, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Admission == nil {
		cfg.Admission = admission.New(admission.Config{})
	}
	journals, err := journal.NewSet(journal.Config{Dir: cfg.Dir, What: "session"})
	if err != nil {
		return nil, err
	}
	return &Service{
		cfg: cfg, log: cfg.Logger, live: make(map[string]*live), requests: idempotency.Requests{Store: cfg.Store}, journals: journals,
	}, nil
}

// SetExecutions completes the Service: executions need sessions and sessions need
// executions, so one of them is told of the other later.
func (s *Service) SetExecutions(e Executions) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.executions = e
}

// Create records a session and begins to make its sandbox, when there is a place for one.
// The repeat of an earlier request makes nothing and returns that one's session as it is
// now. Faults besides those of a request that is wrong: AlreadyExists
// (REQUEST_ID_REUSED) if its name was used for another, Exhausted (QUEUE_FULL,
// QUEUE_TIMEOUT), Unavailable (SERVER_DRAINING).
func (s *Service) Create(ctx context.Context, r Request) (Session, error) {
	earlier, done, err := s.requests.Begin(ctx, r.Key)
	if err != nil {
		return Session{}, err
	}
	defer done()
	if earlier != "" {
		return s.Get(ctx, Ref{ID: earlier, Caller: r.Caller})
	}
	d, err := s.details(r)
	if err != nil {
		return Session{}, err
	}
	return s.create(ctx, r, d)
}

// details checks what a session is to have beside its sandbox.
func (s *Service) details(r Request) (Details, error) {
	d := Details{
		Identity: r.Identity, Agent: r.Agent, Secrets: r.Secrets,
		IdleTimeout: r.IdleTimeout, IdleAction: r.IdleAction, Image: r.Image,
	}
	if len(r.Repositories) == 0 && d.Agent == nil && d.Image == "" {
		return d, nil
	}
	if s.cfg.Parts.Workspace == nil {
		return d, fault.New(fault.FailedPrecondition, "NO_AGENTS", "this executord makes plain sandboxes only: without repositories, agents and images")
	}
	planned, err := s.cfg.Parts.Workspace.Plan(r.Repositories)
	if err != nil {
		return d, err
	}
	d.Repositories = planned
	for name := range r.Values {
		d.Inline = append(d.Inline, name)
	}
	slices.Sort(d.Inline)
	way := Way{Values: r.Values, Secrets: r.Secrets, Inline: d.Inline, Repositories: d.Repositories, Auth: r.Auth}
	if d.Agent != nil {
		way.Model = &d.Agent.Model
	}
	return d, s.cfg.Parts.Credentials.Check(way)
}

// create is Create for a request that was checked and is no repeat.
func (s *Service) create(ctx context.Context, r Request, d Details) (Session, error) {
	if r.Lifetime < 0 || r.Lifetime > MaxLifetime {
		return Session{}, fault.InvalidField("LIFETIME", "lifetime", "must be up to %v, not %v", MaxLifetime, r.Lifetime)
	}
	if r.Lifetime == 0 {
		r.Lifetime = DefaultLifetime
	}
	on, err := s.cfg.Engines.Get(r.Engine)
	if err != nil {
		return Session{}, err
	}
	if check := s.cfg.CheckRoom; check != nil {
		if err := check(); err != nil {
			return Session{}, err
		}
	}
	if err := s.checkQuota(r.Caller.Owner); err != nil {
		return Session{}, err
	}
	network, err := s.cfg.Network.Decide(on.Name(), r.Network)
	if err != nil {
		return Session{}, err
	}
	if network.Mode == engine.NetworkHost && (len(d.Repositories) > 0 || d.Agent != nil) {
		// What adds credentials listens on the loopback of the sandbox, which then is the host's.
		return Session{}, fault.New(fault.FailedPrecondition, "NETWORK_NOT_ALLOWED",
			"a session with repositories or an agent cannot have the host's network: every program on the host could use its credentials; ask for none or egress")
	}
	if err := on.CheckSpec(engine.Spec{Limits: r.Limits, Network: network.Mode, Placement: r.Placement, Labels: r.Labels}); err != nil {
		return Session{}, err
	}
	d.Placement, d.Generation = r.Placement, 1
	now := time.Now()
	id := strings.ToLower(ulid.MustNew(ulid.Timestamp(now), ulid.DefaultEntropy()).String())
	record := Session{
		ID: id, Owner: r.Caller.Owner, State: Starting, Engine: on.Name(), Sandbox: sandboxID(id, 1),
		Limits: r.Limits.Or(on.DefaultLimits()), Network: network, Lifetime: r.Lifetime, Labels: r.Labels, CreateTime: now,
		Details: d,
	}
	slot, err := s.cfg.Admission.Acquire(ctx, admission.Need{Sandbox: true})
	if err != nil {
		return Session{}, err
	}
	runCtx, l := newLive(s, record, slot)
	l.values, l.auth, l.begun = r.Values, r.Auth, now
	if err := s.admit(l); err != nil {
		slot.Release()
		return Session{}, err
	}
	defer s.work.Done()
	if l.journal, err = s.journals.Create(id); err != nil {
		l.forget()
		return Session{}, err
	}
	l.tell(Event{Started: &Started{Session: id}})
	record = l.claim()
	if r.Key.ID == "" {
		err = s.cfg.Store.InsertSession(ctx, record)
	} else {
		err = s.cfg.Store.InsertSessionOnce(ctx, r.Key, record)
	}
	if err != nil {
		l.discard(ctx)
		l.forget()
		return Session{}, fmt.Errorf("record session %s: %w", id, err)
	}
	s.work.Go(func() { l.lead(runCtx) })
	return record, nil
}

// admit takes a session on, unless the Service is stopping. Close then waits until the
// caller has called work.Done.
func (s *Service) admit(l *live) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return admission.Draining()
	}
	if err := s.checkQuotaLocked(l.owner); err != nil {
		return err
	}
	s.live[l.id] = l
	s.work.Add(1)
	return nil
}

// quotaRetry is when a caller whose quota is used up may come back.
const quotaRetry = 5 * time.Second

// checkQuota returns a fault Exhausted (QUOTA_EXCEEDED) for what would be too much, before
// it waits for its turn.
func (s *Service) checkQuota(owner string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.checkQuotaLocked(owner)
}

// checkQuotaLocked returns a fault Exhausted (QUOTA_EXCEEDED) if one more session of an
// owner would be too many.
func (s *Service) checkQuotaLocked(owner string) error {
	limit := s.cfg.MaxPerOwner
	if limit == 0 {
		return nil
	}
	var count int64
	for _, l := range s.live {
		select {
		case <-l.ended: // and about to leave: whoever was told so may make another
		default:
			if l.owner == owner {
				count++
			}
		}
	}
	if count < limit {
		return nil
	}
	return fault.Exceeded(fault.Quota{Subject: owner, Name: "sessions", Limit: limit}, quotaRetry,
		"%s has %d sessions, and that is all it may have at a time", owner, count)
}

func (s *Service) dismiss(l *live) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.live, l.id)
}

func (s *Service) find(id string) (*live, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l, ok := s.live[id]
	return l, ok
}

// Recover takes up the sessions that an executord before this one left, and returns
// when the sandboxes of those that were running have been found, are known to be lost, or
// have been looked for in vain for a while: an engine that has troubles of its own does
// not keep executord from starting, and is asked again in the background.
// Call it once, before anything else, and after the executions have recovered: a session
// that is to end then finds what runs in it.
func (s *Service) Recover(ctx context.Context) error {
	unfinished, err := s.cfg.Store.UnfinishedSessions(ctx)
	if err != nil {
		return fmt.Errorf("read unfinished sessions: %w", err)
	}
	var found []*live
	for _, record := range unfinished {
		if _, err := s.cfg.Engines.Get(record.Engine); err != nil {
			// It may live to this hour, and its engine may be configured again. Who asks for
			// it is told.
			s.log.ErrorContext(ctx, "a session is left alone", "session", record.ID, "sandbox", record.Sandbox, "error", err)
			continue
		}
		need := admission.Need{Sandbox: record.State != Paused}
		runCtx, l := newLive(s, record, s.cfg.Admission.Occupy(need))
		l.begun = time.Now()
		if l.journal, err = s.journals.Open(record.ID); err != nil {
			s.log.WarnContext(ctx, "a session goes on without its log", "session", record.ID, "error", err)
		}
		switch record.State {
		case Running:
			found = append(found, l)
		case Terminating:
			l.end(record.Reason, record.Detail)
		case Pausing, Paused, Resuming:
			close(l.started)
		}
		s.mu.Lock()
		s.live[l.id] = l
		s.work.Go(func() { l.lead(runCtx) })
		s.mu.Unlock()
	}
	bounded, stop := context.WithTimeoutCause(ctx, openTime, errNotFoundYet)
	defer stop()
	for _, l := range found {
		err := l.wait(bounded, l.started)
		if errors.Is(err, errNotFoundYet) && ctx.Err() == nil {
			s.log.WarnContext(ctx, "start without the sandbox of a session, which cannot be opened yet", "session", l.id)
			continue
		}
		if err != nil {
			return fmt.Errorf("find the sandbox of session %s: %w", l.id, err)
		}
	}
	return nil
}

// visible returns a session that has not ended and that ref's caller sees.
func (s *Service) visible(ref Ref) (*live, bool) {
	l, ok := s.find(ref.ID)
	if !ok || !ref.Caller.Sees(l.owner) {
		return nil, false
	}
	return l, true
}

// Get reads a session. A fault NotFound if there is none that the caller sees.
func (s *Service) Get(ctx context.Context, ref Ref) (Session, error) {
	if l, ok := s.visible(ref); ok {
		return l.snapshot(), nil
	}
	// The store is asked about a foreign one too: so the answer takes as long as that
	// for one that does not exist.
	record, err := s.cfg.Store.GetSession(ctx, ref.ID)
	if err == nil && !ref.Caller.Sees(record.Owner) {
		return Session{}, fault.New(fault.NotFound, "SESSION_NOT_FOUND", "there is no session %q", ref.ID)
	}
	return record, err
}

// WaitStarted returns a session when it has left Starting, and Resuming. When ctx ends first it
// returns the session as it is, and ctx's cause.
func (s *Service) WaitStarted(ctx context.Context, ref Ref) (Session, error) {
	if l, ok := s.visible(ref); ok {
		if err := l.wait(ctx, l.started); err != nil {
			return l.snapshot(), err
		}
		// One that is resumed is waited for, too.
		record, err := l.until(ctx, func(r Session) bool { return r.State != Resuming })
		if ctx.Err() == nil && record.State != Resuming {
			err = nil
		}
		return record, err
	}
	record, err := s.Get(ctx, ref)
	if err == nil && record.State == Starting {
		err = s.forsaken(record)
	}
	return record, err
}

// Terminate ends a session and returns it when everything of it is gone. One that
// has ended is returned as it is. The end goes on when ctx ends first; then the session
// is returned as it is, with ctx's cause.
// The repeat of a request is carried out again, which waits for the same end.
func (s *Service) Terminate(ctx context.Context, ref Ref, requester string, key idempotency.Key) (Session, error) {
	if key.ID != "" {
		// What is not there is not worth remembering.
		if _, err := s.Get(ctx, ref); err != nil {
			return Session{}, err
		}
		if err := s.requests.Note(ctx, key, ref.ID); err != nil {
			return Session{}, err
		}
	}
	l, ok := s.visible(ref)
	if !ok {
		record, err := s.Get(ctx, ref)
		if err == nil && record.State != Terminated {
			err = s.forsaken(record)
		}
		return record, err
	}
	l.end(Requested, "terminated by "+requester)
	// While the sandbox ends the disk can be at work.
	if err := s.requests.Sync(ctx, key); err != nil {
		return Session{}, err
	}
	err := l.wait(ctx, l.ended)
	return l.snapshot(), err
}

// Expiry returns when the lifetime of a session ends, and how long it is, to those who
// run in it.
func (s *Service) Expiry(ctx context.Context, id string) (time.Time, time.Duration, error) {
	record, err := s.Get(ctx, Ref{ID: id, Caller: caller.Caller{All: true}})
	return record.ExpireTime(), record.Lifetime, err
}

// Sandbox returns the sandbox of a running session. Faults: NotFound
// (SESSION_NOT_FOUND, also for one that the caller does not see), FailedPrecondition
// (SESSION_NOT_RUNNING), Unavailable (SANDBOX_UNREACHABLE) while the engine cannot open
// it.
func (s *Service) Sandbox(ctx context.Context, id string, by caller.Caller) (engine.Sandbox, error) {
	ref := Ref{ID: id, Caller: by}
	if l, ok := s.visible(ref); ok {
		return l.running()
	}
	record, err := s.Get(ctx, ref)
	switch {
	case err != nil:
		return nil, err
	case record.State == Running:
		return nil, s.forsaken(record)
	}
	return nil, notRunning(record)
}

// forsaken says why nobody leads a session that has not ended.
func (s *Service) forsaken(record Session) error {
	if _, err := s.cfg.Engines.Get(record.Engine); err != nil {
		return fmt.Errorf("session %q: %w", record.ID, err)
	}
	return errClosed
}

// EngineOf names the engine of a session's sandbox, to those who run in it.
func (s *Service) EngineOf(ctx context.Context, id string) (string, error) {
	record, err := s.Get(ctx, Ref{ID: id, Caller: caller.Caller{All: true}})
	return record.Engine, err
}

func notRunning(record Session) error {
	why := map[State]string{
		Pausing: "is being paused", Paused: "is paused; resume it first", Resuming: "is being resumed; wait for it",
		Starting: "is being started; wait for it", Terminating: "is being ended", Terminated: "has ended (" + string(record.Reason) + ")",
	}[record.State]
	return fault.New(fault.FailedPrecondition, "SESSION_NOT_RUNNING", "session %q %s", record.ID, why)
}

// Running counts the sessions that have not ended.
func (s *Service) Running() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.live)
}

// Drain refuses new sessions from now on, also those that wait for their turn.
func (s *Service) Drain() {
	s.mu.Lock()
	s.draining = true
	s.mu.Unlock()
	s.cfg.Admission.Drain()
}

// StopAll ends every session with SERVER_STOPPED.
func (s *Service) StopAll(ctx context.Context) error {
	s.mu.Lock()
	var all []*live
	for _, l := range s.live {
		all = append(all, l)
	}
	s.mu.Unlock()
	for _, l := range all {
		l.end(ServerStopped, "executord was told to end what runs")
	}
	for _, l := range all {
		if err := l.wait(ctx, l.ended); err != nil {
			return fmt.Errorf("end session %s: %w", l.id, err)
		}
	}
	return nil
}

// Close stops following the sessions, whose sandboxes go on living, and waits for
// all work.
func (s *Service) Close() error {
	s.mu.Lock()
	s.draining = true
	for _, l := range s.live {
		l.cancel(errClosed)
	}
	s.mu.Unlock()
	s.cfg.Admission.Drain()
	s.work.Wait()
	return s.journals.Close()
}
