package execution

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/eventlog"
	"github.com/harvest-run/executord/internal/ext4"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
)

// Sessions finds the sandboxes of sessions.
type Sessions interface {
	// Sandbox returns the running sandbox of a session. Faults: NotFound
	// (SESSION_NOT_FOUND, also for one that the caller does not see),
	// FailedPrecondition (SESSION_NOT_RUNNING).
	Sandbox(ctx context.Context, sessionID string, by caller.Caller) (engine.Sandbox, error)
	// Expiry returns when the lifetime of a session ends, and how long it is as a whole.
	Expiry(ctx context.Context, sessionID string) (time.Time, time.Duration, error)
	// EngineOf names the engine of a session's sandbox.
	EngineOf(ctx context.Context, sessionID string) (string, error)
	// Began says that an execution runs in a session, Ended that it does not any more. They
	// do not block.
	Began(sessionID, executionID string)
	Ended(sessionID, executionID, reason string)
}

// Pool has sandboxes that are ready.
type Pool interface {
	// Claim takes one that is as spec says but for its name, and never waits; false if
	// there is none.
	Claim(spec engine.Spec) (engine.Sandbox, bool)
}

// Config says what a Service works with.
type Config struct {
	// Engines make the sandboxes of one-shots.
	Engines  engines.Set
	Store    Store
	Sessions Sessions
	// Admission says how much may run; nil for no limit.
	Admission *admission.Controller
	// Pool is asked first for the sandbox of a one-shot on the default engine; nil for none.
	Pool Pool
	// Dir holds the event logs, a directory for each execution.
	Dir string
	// DefaultRetainedBytes bounds the log of an execution that says nothing else,
	// MaxRetainedBytes what it may ask for.
	DefaultRetainedBytes int64
	MaxRetainedBytes     int64
	Retention            Retention
	// CheckRoom returns a fault while the disk has no room for new work; nil tries all
	// the same.
	CheckRoom func() error
	// Quota bounds what each owner has.
	Quota Quota
	// Network decides what sandboxes reach and lets them; nil lets them reach nothing.
	Network *egress.Gateway
	// Observer is told of executions; nil if nobody wants to know.
	Observer Observer
	Logger   *slog.Logger
}

// Service runs executions.
type Service struct {
	cfg    Config
	log    *slog.Logger
	logs   *logs
	guests *guests
	// requests keeps repeats of a request apart that come at the same time.
	requests idempotency.Requests
	stored   stored

	mu       sync.Mutex
	runs     map[string]*run
	draining bool
	closed   bool
	idle     chan struct{} // closed while nothing runs
	work     sync.WaitGroup
}

// ErrClosed ends the Watchers and the waiting of a Service that was closed. It is a
// fault Unavailable (SERVER_STOPPING): the execution goes on, and an executord that is
// started again can tell of it.
var ErrClosed error = &fault.Error{
	Kind: fault.Unavailable, Reason: "SERVER_STOPPING", Message: "executord is stopping", RetryAfter: time.Second,
}

// Request asks for an execution.
type Request struct {
	// Caller asks, and will be the owner.
	Caller caller.Caller
	// Session is the id of the session to run in; "" for a sandbox of its own.
	Session string
	Command Command
	// Engine makes a sandbox of its own; "" is the default.
	Engine string
	// Placement says where a sandbox of its own runs. It is not recorded: a sandbox that
	// was not made before a restart is not made after it.
	Placement engine.Placement
	// Limits of a sandbox of its own.
	Limits engine.Limits
	// Network is what a sandbox of its own may reach.
	Network egress.Policy
	// RetainedBytes bounds the log; 0 for the default.
	RetainedBytes int64
	Policies      Policies
	// Attended says that the caller is about to watch, and counts as a watcher until then.
	Attended bool
	Labels   map[string]string
	// Key is the name of the request, with which it can be repeated.
	Key idempotency.Key
}

// Ref names an execution: the id of its session, "" for a one-shot, and its own.
// Caller is who names it; for a caller who does not see it, it does not exist.
type Ref struct {
	Session, ID string
	Caller      caller.Caller
}

// New makes a Service.
func New(cfg Config) (*Service, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of event logs: %w", err)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Admission == nil {
		cfg.Admission = admission.New(admission.Config{})
	}
	idle := make(chan struct{})
	close(idle)
	logs := newLogs(cfg.Dir)
	if err := logs.discardSpares(); err != nil {
		return nil, fmt.Errorf("remove the spare event logs of an earlier time: %w", err)
	}
	spares := cfg.Dir + spareSuffix
	if err := errors.Join(os.Mkdir(spares, 0o700), ext4.Spread(spares)); err != nil {
		return nil, fmt.Errorf("make the directory of spare event logs: %w", err)
	}
	for range spareLogs {
		logs.stock()
	}
	return &Service{
		cfg: cfg, log: cfg.Logger, logs: logs, guests: newGuests(),
		requests: idempotency.Requests{Store: cfg.Store},
		runs:     make(map[string]*run), idle: idle, stored: stored{over: make(chan struct{}, 1)},
	}, nil
}

// Start records an execution and begins to run it, when it is its turn. Once it returns
// nil the execution exists, whatever happens to executord. The repeat of an earlier request
// starts nothing and returns that one's execution as it is now. Faults besides those of
// a request that is wrong: NotFound if that one was deleted, AlreadyExists
// (REQUEST_ID_REUSED) if its name was used for another, Exhausted (QUEUE_FULL,
// QUEUE_TIMEOUT, DISK_FULL), Unavailable (SERVER_DRAINING).
func (s *Service) Start(ctx context.Context, r Request) (Execution, error) {
	earlier, done, err := s.requests.Begin(ctx, r.Key)
	if err != nil {
		return Execution{}, err
	}
	defer done()
	if earlier != "" {
		return s.get(ctx, earlier)
	}
	if err := errors.Join(r.Command.Validate(), r.Policies.Validate()); err != nil {
		return Execution{}, err
	}
	if check := s.cfg.CheckRoom; check != nil {
		if err := check(); err != nil {
			return Execution{}, err
		}
	}
	if err := s.checkQuota(ctx, r.Caller.Owner); err != nil {
		return Execution{}, err
	}
	e, sandbox, err := s.plan(ctx, r)
	if err != nil {
		return Execution{}, err
	}
	slot, err := s.cfg.Admission.Acquire(ctx, needOf(e))
	if err != nil {
		return Execution{}, err
	}
	leads := false
	defer func() {
		if !leads {
			slot.Release()
		}
	}()
	command := r.Command.withDefaults()
	e.Command = command.Stored()
	handle, err := s.logs.create(e)
	if err != nil {
		return Execution{}, fmt.Errorf("make the event log of %s: %w", e.ID, diskFault(err))
	}
	e.Epoch = handle.Epoch()
	if err := handle.Append(e.CreateTime, eventlog.Entry{Kind: kindStarted}); err != nil {
		handle.condemn()
		handle.release()
		return Execution{}, fmt.Errorf("begin the event log of %s: %w", e.ID, diskFault(err))
	}
	runCtx, run := newRun(s, e, handle, sandbox)
	run.placement = r.Placement
	if err := s.admit(run); err != nil {
		handle.condemn()
		handle.release()
		return Execution{}, err
	}
	defer s.work.Done()
	run.slot, leads = slot, true
	e.Sandbox = run.claim()
	if err := s.register(ctx, e, r.Caller, r.Key); err != nil {
		run.discard(ctx)
		run.forget()
		return Execution{}, err
	}
	if e.Session != "" {
		s.cfg.Sessions.Began(e.Session, e.ID)
	}
	if r.Attended {
		run.audience.expect()
	}
	run.attendIfAsked(runCtx)
	s.work.Go(func() { run.begin(runCtx, command) })
	// The start goes first: it is handed to the guest before this goroutine keeps the
	// processor waiting for the disk.
	runtime.Gosched()
	// While the sandbox is at work the disk is too. Nobody is told of the execution
	// before its record is safe from a power cut. A caller who leaves meanwhile leaves an
	// execution behind, as one does who leaves a moment later.
	if err := s.cfg.Store.Sync(context.WithoutCancel(ctx)); err != nil {
		run.stop(stopOrder{reason: ServerStopped, detail: "its record could not be made durable"})
		return Execution{}, fmt.Errorf("record %s: %w", e.ID, diskFault(err))
	}
	return run.snapshot(), nil
}

// register records an execution whose run has been admitted.
func (s *Service) register(ctx context.Context, e Execution, by caller.Caller, key idempotency.Key) error {
	if e.Session != "" {
		// Asked again: a session that began to end before the run was admitted has not
		// found it, and one that begins now will.
		if _, err := s.cfg.Sessions.Sandbox(ctx, e.Session, by); err != nil {
			return err
		}
	}
	var err error
	if key.ID == "" {
		err = s.cfg.Store.InsertExecution(ctx, e)
	} else {
		err = s.cfg.Store.InsertExecutionOnce(ctx, key, e)
	}
	if err != nil {
		return fmt.Errorf("record %s: %w", e.ID, err)
	}
	return nil
}

// plan decides what the execution will be.
func (s *Service) plan(ctx context.Context, r Request) (Execution, engine.Sandbox, error) {
	now := time.Now()
	e := Execution{
		ID: newID(now), Session: r.Session, Owner: r.Caller.Owner, Labels: r.Labels,
		State: Starting, CreateTime: now, RetainedBytes: r.RetainedBytes,
		Policies: r.Policies.withDefaults(s.cfg.Retention.MaxAge),
	}
	if e.RetainedBytes < 0 {
		return e, nil, fault.InvalidField("RETAINED_BYTES", "output_policy.retained_bytes", "%d is negative", e.RetainedBytes)
	}
	if e.RetainedBytes == 0 {
		e.RetainedBytes = s.cfg.DefaultRetainedBytes
	}
	if e.RetainedBytes > s.cfg.MaxRetainedBytes {
		return e, nil, fault.InvalidField("RETAINED_BYTES", "output_policy.retained_bytes", "%d is more than this server keeps (%d)", e.RetainedBytes, s.cfg.MaxRetainedBytes)
	}
	if r.Session == "" {
		on, err := s.cfg.Engines.Get(r.Engine)
		if err != nil {
			return e, nil, err
		}
		if e.Network, err = s.cfg.Network.Decide(on.Name(), r.Network); err != nil {
			return e, nil, err
		}
		if err := on.CheckSpec(engine.Spec{Limits: r.Limits, Network: e.Network.Mode, Placement: r.Placement, Labels: r.Labels}); err != nil {
			return e, nil, err
		}
		e.Engine, e.Sandbox, e.Limits = on.Name(), sandboxID(e.ID), r.Limits.Or(on.DefaultLimits())
		return e, nil, nil
	}
	if r.Engine != "" {
		return e, nil, fault.InvalidField("ENGINE_WITH_PARENT", "engine", "must not be set with a parent: the session's sandbox is where it is")
	}
	if !r.Placement.IsZero() {
		return e, nil, fault.InvalidField("PLACEMENT_WITH_PARENT", "placement", "must not be set with a parent: the session's sandbox is where it is")
	}
	if r.Limits != (engine.Limits{}) {
		return e, nil, fault.InvalidField("LIMITS_WITH_PARENT", "limits", "must not be set with a parent: the session's sandbox has its own limits")
	}
	if r.Network.Mode != "" || len(r.Network.Rules) > 0 {
		return e, nil, fault.InvalidField("NETWORK_WITH_PARENT", "network", "must not be set with a parent: the session's sandbox has its own policy")
	}
	sandbox, err := s.cfg.Sessions.Sandbox(ctx, r.Session, r.Caller)
	if err != nil {
		return e, nil, err
	}
	if e.Engine, err = s.cfg.Sessions.EngineOf(ctx, r.Session); err != nil {
		return e, nil, err
	}
	e.Network = s.cfg.Network.Of(sandbox.ID()).Policy()
	e.Sandbox, e.Limits = sandbox.ID(), sandbox.Limits()
	return e, sandbox, nil
}

// sandboxID names the sandbox of a one-shot after it, so that a sandbox found after
// a crash says whose it is.
func sandboxID(executionID string) string { return "e-" + executionID }

// admit takes a run on, unless the Service is stopping. Close then waits until the
// caller has called work.Done.
func (s *Service) admit(r *run) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining || s.closed {
		return admission.Draining()
	}
	if err := s.checkRunningLocked(r.owner); err != nil {
		return err
	}
	s.addLocked(r)
	s.work.Add(1)
	return nil
}

func (s *Service) addLocked(r *run) {
	if len(s.runs) == 0 {
		s.idle = make(chan struct{})
	}
	s.runs[r.id] = r
}

// dismiss lets go of a run that ended; a second time it does nothing.
func (s *Service) dismiss(r *run) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.runs[r.id]; !ok {
		return
	}
	delete(s.runs, r.id)
	if len(s.runs) == 0 {
		close(s.idle)
	}
}

// find returns the run of an execution that has not ended.
func (s *Service) find(id string) (*run, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.runs[id]
	return r, ok
}

func (s *Service) all(choose func(*run) bool) []*run {
	s.mu.Lock()
	defer s.mu.Unlock()
	var some []*run
	for _, r := range s.runs {
		if choose(r) {
			some = append(some, r)
		}
	}
	return some
}

// Running counts the executions that have not ended.
func (s *Service) Running() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.runs)
}

// Get reads an execution. A fault NotFound if there is none of this name that the
// caller sees.
func (s *Service) Get(ctx context.Context, ref Ref) (Execution, error) {
	if r, ok := s.visible(ref); ok {
		return r.snapshot(), nil
	}
	// The store is asked about a foreign one too: so the answer takes as long as that
	// for one that does not exist.
	e, err := s.cfg.Store.GetExecution(ctx, ref.ID)
	if err == nil && (e.Session != ref.Session || !ref.Caller.Sees(e.Owner)) {
		return Execution{}, fault.New(fault.NotFound, "EXECUTION_NOT_FOUND", "there is no execution %q", ref.ID)
	}
	return e, err
}

// visible returns the run of an execution that has not ended and that ref's caller sees.
func (s *Service) visible(ref Ref) (*run, bool) {
	r, ok := s.find(ref.ID)
	if !ok || r.session != ref.Session || !ref.Caller.Sees(r.owner) {
		return nil, false
	}
	return r, true
}

// get reads an execution, whatever session it is in.
func (s *Service) get(ctx context.Context, id string) (Execution, error) {
	if r, ok := s.find(id); ok {
		return r.snapshot(), nil
	}
	return s.cfg.Store.GetExecution(ctx, id)
}

// Wait returns an execution when it has ended. When ctx ends first it returns the
// execution as it is, and ctx's cause; when the Service is closed, ErrClosed.
func (s *Service) Wait(ctx context.Context, ref Ref) (Execution, error) {
	if r, ok := s.visible(ref); ok {
		err := r.wait(ctx)
		return r.snapshot(), err
	}
	e, err := s.Get(ctx, ref)
	if err == nil && e.State != Ended {
		err = s.forsaken(e)
	}
	return e, err
}

// forsaken says why nobody leads an execution that has not ended.
func (s *Service) forsaken(e Execution) error {
	if _, err := s.cfg.Engines.Get(e.Engine); err != nil {
		return fmt.Errorf("execution %q: %w", e.ID, err)
	}
	return ErrClosed
}

// Cancellation says how to end an execution.
type Cancellation struct {
	// Grace lies between TERM and KILL; nil for the command's own.
	Grace *time.Duration
	// By says who asked.
	By string
	// Key is the name of the request. A repeat is carried out again, which waits for the
	// same end.
	Key idempotency.Key
}

// Cancel ends an execution and returns it when its whole tree is gone. One that has
// ended is returned as it is. The end goes on when ctx ends first.
func (s *Service) Cancel(ctx context.Context, ref Ref, c Cancellation) (Execution, error) {
	if c.Grace != nil && (*c.Grace < 0 || *c.Grace > MaxGracePeriod) {
		return Execution{}, fault.InvalidField("GRACE_PERIOD", "grace_period", "must be 0 to %v, not %v", MaxGracePeriod, *c.Grace)
	}
	if c.Key.ID != "" {
		// What is not there is not worth remembering.
		if _, err := s.Get(ctx, ref); err != nil {
			return Execution{}, err
		}
		if err := s.requests.Note(ctx, c.Key, ref.ID); err != nil {
			return Execution{}, err
		}
	}
	if r, ok := s.visible(ref); ok {
		r.stop(stopOrder{reason: Cancelled, grace: c.Grace, by: c.By, detail: "cancelled by " + c.By})
	}
	// While the processes end the disk can be at work.
	if err := s.requests.Sync(ctx, c.Key); err != nil {
		return Execution{}, err
	}
	return s.Wait(ctx, ref)
}

// EndSession ends every execution of a session with SESSION_ENDED and returns when
// they have ended.
func (s *Service) EndSession(ctx context.Context, sessionID string) error {
	return s.stopAll(ctx, func(r *run) bool { return r.session == sessionID },
		stopOrder{reason: SessionEnded, detail: "the session was ended"})
}

// StopAll ends everything that runs with SERVER_STOPPED.
func (s *Service) StopAll(ctx context.Context) error {
	return s.stopAll(ctx, func(*run) bool { return true },
		stopOrder{reason: ServerStopped, detail: "executord was told to end what runs"})
}

func (s *Service) stopAll(ctx context.Context, choose func(*run) bool, order stopOrder) error {
	some := s.all(choose)
	for _, r := range some {
		r.stop(order)
	}
	for _, r := range some {
		if err := r.wait(ctx); err != nil {
			return fmt.Errorf("end execution %s: %w", r.id, err)
		}
	}
	return nil
}

// Delete removes an execution that has ended, with its log. Watchers that have it open
// read on to its end. The repeat of a request finds it deleted, which is well.
func (s *Service) Delete(ctx context.Context, ref Ref, key idempotency.Key) error {
	earlier, done, err := s.requests.Begin(ctx, key)
	if err != nil {
		return err
	}
	defer done()
	if earlier != "" {
		return nil
	}
	e, err := s.Get(ctx, ref)
	if err != nil {
		return err
	}
	if e.State != Ended {
		return fault.New(fault.FailedPrecondition, "EXECUTION_NOT_ENDED", "execution %q has not ended; cancel it first", ref.ID)
	}
	if r, ok := s.find(ref.ID); ok {
		// Its end stands in its log and is being recorded.
		if err := r.wait(ctx); err != nil {
			return err
		}
	}
	if key.ID == "" {
		err = s.cfg.Store.DeleteExecution(ctx, ref.ID)
	} else {
		err = s.cfg.Store.DeleteExecutionOnce(ctx, key, ref.ID)
	}
	if err != nil {
		return err
	}
	s.keep(-1, -e.LogBytes)
	// After the record: a log without one is removed at the next start.
	return s.logs.remove(ref.ID)
}

// ReadOutput reads bytes of one stream, "stdout" or "stderr", as far as they are
// there. io.EOF at their end; a fault OutOfRange (OUTPUT_DROPPED) if they are not
// kept any more.
func (s *Service) ReadOutput(ctx context.Context, ref Ref, stream string, offset int64, p []byte) (int, error) {
	which := eventlog.Stdout
	switch {
	case stream == "stderr":
		which = eventlog.Stderr
	case stream != "stdout":
		return 0, fault.InvalidField("STREAM", "stream", "%q is not one of stdout, stderr", stream)
	}
	if offset < 0 {
		return 0, fault.InvalidField("OFFSET", "offset", "%d is negative", offset)
	}
	handle, err := s.openLog(ctx, ref)
	if err != nil {
		return 0, err
	}
	defer handle.release()
	n, err := handle.ReadStream(which, offset, p)
	if dropped, ok := errors.AsType[*eventlog.DroppedError](err); ok {
		return n, fault.New(fault.OutOfRange, "OUTPUT_DROPPED", "bytes before %d of %s are no longer kept", dropped.First, stream).
			With("first_offset", fmt.Sprint(dropped.First))
	}
	if errors.Is(err, eventlog.ErrClosed) {
		return n, ErrClosed
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return n, fmt.Errorf("read the log of %s: %w", ref.ID, err)
	}
	return n, err
}

// openLog opens the log of an execution to read it.
func (s *Service) openLog(ctx context.Context, ref Ref) (*logHandle, error) {
	e, err := s.Get(ctx, ref)
	if err != nil {
		return nil, err
	}
	handle, err := s.logs.open(ref.ID)
	if err != nil {
		return nil, err
	}
	if e.Result != nil && !handle.Sealed() {
		// Its end was damaged and has been cut off. The store still has the result.
		s.log.ErrorContext(ctx, "the log of an ended execution had no end", "execution", e.ID, "cut_off_bytes", handle.Repaired())
		if err := s.sealAgain(e, handle); err != nil {
			handle.release()
			return nil, err
		}
	}
	return handle, nil
}

func (s *Service) sealAgain(e Execution, handle *logHandle) error {
	entry, err := resultEntry(e.Result)
	if err == nil {
		err = handle.Seal(e.EndTime, entry)
	}
	if err != nil && !errors.Is(err, eventlog.ErrSealed) { // by another reader
		return fmt.Errorf("mend the log of execution %s: %w", e.ID, diskFault(err))
	}
	return nil
}

// Drain refuses new work from now on, also what waits for its turn, and waits until
// nothing runs.
func (s *Service) Drain(ctx context.Context) error {
	s.mu.Lock()
	s.draining = true
	idle := s.idle
	s.mu.Unlock()
	s.cfg.Admission.Drain()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Close stops following what still runs, which goes on in its sandboxes, ends the
// Watchers and waits for all work. What was about to be started is, if that takes no more
// than seconds; an end that is known by then is recorded.
func (s *Service) Close() error {
	s.mu.Lock()
	s.draining, s.closed = true, true
	s.mu.Unlock()
	s.cfg.Admission.Drain()
	for _, r := range s.all(func(*run) bool { return true }) {
		r.cancel(ErrClosed)
	}
	s.stored.stop()
	s.work.Wait()
	s.guests.close()
	return s.logs.close()
}
