package execution

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/eventlog"
	"github.com/harvest-run/executord/internal/fault"
)

// Recover takes up what an executord before this one left: what still runs is
// followed on from the last byte in its log, what ended meanwhile is read out, and
// what cannot be followed ends as SANDBOX_LOST. Nothing stays unfinished without a
// run that leads it, but for what is on an engine that is not configured any more, which
// is left as it is. Call it once, before anything else, and before the sessions
// recover: one whose lifetime is over then ends its executions in order.
func (s *Service) Recover(ctx context.Context) error {
	unfinished, err := s.cfg.Store.UnfinishedExecutions(ctx)
	if err != nil {
		return fmt.Errorf("read unfinished executions: %w", err)
	}
	if err := s.countStored(ctx); err != nil {
		return err
	}
	// All are known before the first goes on: what a guest holds that is not known is
	// taken for a leftover.
	var resume []func()
	for _, e := range unfinished {
		if _, err := s.cfg.Engines.Get(e.Engine); err != nil {
			// It may run to this hour, and its engine may be configured again. Who asks for
			// it is told.
			s.log.ErrorContext(ctx, "an unfinished execution is left alone", "execution", e.ID, "sandbox", e.Sandbox, "error", err)
			continue
		}
		runCtx, r, err := s.recover(ctx, e)
		if err != nil {
			for _, r := range s.all(func(*run) bool { return true }) {
				r.leave()
			}
			return fmt.Errorf("take up execution %s: %w", e.ID, err)
		}
		resume = append(resume, func() { r.resume(runCtx) })
	}
	for _, f := range resume {
		s.work.Go(f)
	}
	defer s.beginCollecting(ctx)
	return s.logs.strays(func(id string) (bool, error) {
		_, err := s.cfg.Store.GetExecution(ctx, id)
		if fault.KindOf(err) == fault.NotFound {
			return false, nil
		}
		return err == nil, err
	})
}

// recover makes the run of an unfinished execution and registers it.
func (s *Service) recover(ctx context.Context, e Execution) (context.Context, *run, error) {
	handle, err := s.logs.openToWrite(e)
	if errors.Is(err, eventlog.ErrNoLog) {
		// The log is gone or beyond repair: what happens from here on goes into a new
		// one, whose epoch tells watchers. Any other error may pass, and what lies there
		// must not be thrown away for it.
		s.log.ErrorContext(ctx, "an unfinished execution has no log; a new one begins", "execution", e.ID, "error", err)
		handle, err = s.renewLog(e)
	}
	if err != nil {
		return nil, nil, err
	}
	if n := handle.Repaired(); n > 0 {
		s.log.WarnContext(ctx, "cut a torn end off an event log", "execution", e.ID, "bytes", n)
	}
	if handle.Sequence() == 0 {
		if err := handle.Append(e.CreateTime, eventlog.Entry{Kind: kindStarted}); err != nil {
			handle.release()
			return nil, nil, err
		}
	}
	e.Epoch = handle.Epoch()
	runCtx, r := newRun(s, e, handle, nil)
	r.slot = s.cfg.Admission.Occupy(needOf(e))
	r.attendIfAsked(runCtx)
	r.resumed, r.begun, r.times.Started = true, e.State > Starting, e.StartTime
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addLocked(r)
	if e.Session != "" {
		s.cfg.Sessions.Began(e.Session, e.ID)
	}
	return runCtx, r, nil
}

func (s *Service) renewLog(e Execution) (*logHandle, error) {
	if err := s.logs.remove(e.ID); err != nil {
		return nil, err
	}
	return s.logs.create(e)
}

// resume leads an execution to its end that another executord began.
func (r *run) resume(ctx context.Context) {
	defer r.leave()
	if r.log.Sealed() {
		r.resettle(ctx)
		return
	}
	result := r.find(ctx)
	if result == nil && ctx.Err() == nil {
		result = r.follow(ctx)
	}
	r.end(ctx, result)
}

// resettle records an end that reached the log and not the store.
func (r *run) resettle(ctx context.Context) {
	// What sealed the log may have been cut off before that was on the disk.
	if r.persist(ctx, "sync the log", r.log.Sync) != nil {
		return
	}
	result, err := r.log.result()
	if err != nil {
		r.service.log.ErrorContext(ctx, "a sealed log has no result", "execution", r.id, "error", err)
		result = &Result{Reason: SandboxLost, Detail: "its end was recorded and cannot be read"}
		r.complete(result)
	}
	r.mu.Lock()
	r.result = result
	r.mu.Unlock()
	r.settle(ctx)
	r.letGo(ctx)
}

// find opens the sandbox and asks its guest for the command. A result means that it
// cannot be followed; nil also that the Service is closing.
func (r *run) find(ctx context.Context) *Result {
	sandbox, err := r.look(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		r.service.log.WarnContext(ctx, "an unfinished execution has no sandbox", "execution", r.id, "error", err)
		res := &Result{
			Reason: SandboxLost, TreeEmpty: fault.KindOf(err) == fault.NotFound,
			Detail: "its sandbox was gone when executord started again; " + r.unknown(),
		}
		if o := r.ordered(); o != nil && o.reason != SessionEnded {
			stopped(o, res)
		}
		return res
	}
	r.sandbox = sandbox
	if r.session == "" {
		r.resumeNetwork(ctx)
	}
	r.meet(ctx)
	var info *guestv1.InfoResponse
	err = r.ask(ctx, func(ctx context.Context) (err error) {
		info, err = r.guest.Info(ctx)
		return err
	})
	if err != nil {
		return r.lost(ctx, err)
	}
	if !slices.Contains(info.GetExecutions(), r.id) {
		if r.hasBegun() {
			return r.lost(ctx, errors.New("the guest does not know the command any more"))
		}
		return startFailed("not_started", errors.New("executord was stopped before the command was started; nothing ran"))
	}
	command := r.record.Command.withDefaults()
	r.mu.Lock()
	r.record.State = max(r.record.State, Running)
	r.mu.Unlock()
	// How long it has run is the guest's to know; it is given the whole time once more
	// before the guest is doubted.
	r.deadline = time.Now().Add(command.Timeout + *command.GracePeriod + guestSlack)
	r.foresee(ctx, latest(r.record.StartTime, r.record.CreateTime))
	close(r.launched)
	return nil
}

// look opens the sandbox. Only an engine that says that there is none is believed; one
// that has troubles of its own is asked again, for as long as they last. The command is
// in the care of its guest meanwhile, which also keeps its timeout.
func (r *run) look(ctx context.Context) (engine.Sandbox, error) {
	wait := guestRetry
	for n := 1; ; n++ {
		bounded, cancel := context.WithTimeoutCause(ctx, unreachable, fmt.Errorf("no answer within %v", unreachable))
		sandbox, err := r.open(bounded)
		cancel()
		if err == nil {
			return sandbox, nil
		}
		if fault.KindOf(err) == fault.NotFound {
			return nil, err
		}
		if n&(n-1) == 0 && ctx.Err() == nil { // ever more rarely
			r.service.log.ErrorContext(ctx, "cannot open a sandbox, trying again", "execution", r.id, "sandbox", r.record.Sandbox, "tries", n, "error", err)
		}
		if !pause(ctx, wait) {
			return nil, err
		}
		wait = min(2*wait, lookRetry)
	}
}
