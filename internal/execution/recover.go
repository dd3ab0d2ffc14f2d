package execution

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/harvest-run/executord/internal/eventlog"
	"github.com/harvest-run/executord/internal/fault"
)

// Recover takes up what an executord before this one left: what still runs is
// followed on from the last byte in its log, what ended meanwhile is read out, and
// what cannot be followed ends as SANDBOX_LOST. Nothing stays unfinished without a
// run that leads it. Call it once, before anything else and after the sessions have
// recovered.
func (s *Service) Recover(ctx context.Context) error {
	unfinished, err := s.cfg.Store.UnfinishedExecutions(ctx)
	if err != nil {
		return fmt.Errorf("read unfinished executions: %w", err)
	}
	for _, e := range unfinished {
		if err := s.recover(ctx, e); err != nil {
			return fmt.Errorf("take up execution %s: %w", e.ID, err)
		}
	}
	return s.logs.strays(func(id string) (bool, error) {
		_, err := s.cfg.Store.GetExecution(ctx, id)
		if fault.KindOf(err) == fault.NotFound {
			return false, nil
		}
		return err == nil, err
	})
}

func (s *Service) recover(ctx context.Context, e Execution) error {
	handle, err := s.logs.openToWrite(e.ID, e.RetainedBytes)
	if err != nil {
		// The log is gone or beyond repair: what happens from here on goes into a new
		// one, whose epoch tells watchers.
		s.log.ErrorContext(ctx, "the log of an unfinished execution cannot be read; a new one begins", "execution", e.ID, "error", err)
		if handle, err = s.renewLog(e); err != nil {
			return err
		}
		e.Epoch = handle.Epoch()
	}
	if n := handle.Repaired(); n > 0 {
		s.log.WarnContext(ctx, "cut a torn end off an event log", "execution", e.ID, "bytes", n)
	}
	runCtx, r := newRun(s, e, handle, nil)
	r.times.Started = e.StartTime
	s.mu.Lock()
	s.addLocked(r)
	s.mu.Unlock()
	s.work.Go(func() { r.resume(runCtx) })
	return nil
}

func (s *Service) renewLog(e Execution) (*logHandle, error) {
	if err := s.logs.remove(e.ID); err != nil {
		return nil, err
	}
	handle, err := s.logs.create(e.ID, e.RetainedBytes)
	if err != nil {
		return nil, err
	}
	return handle, handle.Append(time.Now(), eventlog.Entry{Kind: kindStarted})
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
	result, err := r.log.result()
	if err != nil {
		r.service.log.ErrorContext(ctx, "a sealed log has no result", "execution", r.id, "error", err)
		result = &Result{Reason: SandboxLost, Detail: "its end was recorded and cannot be read"}
		r.complete(result)
	}
	r.mu.Lock()
	r.record.State, r.record.Result, r.record.EndTime = Ended, result, result.Times.Ended
	r.record.StartTime = result.Times.Started
	r.mu.Unlock()
	r.settle(ctx)
}

// find opens the sandbox and asks its guest for the command. A result means that it
// cannot be followed.
func (r *run) find(ctx context.Context) *Result {
	s := r.service
	var err error
	if r.session != "" {
		r.sandbox, err = s.cfg.Sessions.Sandbox(ctx, r.session)
	} else {
		r.sandbox, err = s.cfg.Engine.Open(ctx, r.record.Sandbox)
	}
	if err != nil {
		r.sandbox = nil
		if k := fault.KindOf(err); k != fault.NotFound && k != fault.FailedPrecondition {
			s.log.ErrorContext(ctx, "open the sandbox of an unfinished execution", "execution", r.id, "error", err)
		}
		return &Result{
			Reason: SandboxLost, TreeEmpty: fault.KindOf(err) == fault.NotFound,
			Detail: "its sandbox was gone when executord started again; whether the command finished is not known",
		}
	}
	r.guest = s.guests.of(ctx, r.sandbox, r.session != "")
	info, err := r.guest.Info(ctx)
	if err != nil {
		return r.lost(ctx, err)
	}
	if !slices.Contains(info.GetExecutions(), r.id) {
		return startFailed("not_started", errors.New("executord was stopped before the command was started; nothing ran"))
	}
	command := r.record.Command.withDefaults()
	r.mu.Lock()
	r.record.State = Running
	r.mu.Unlock()
	// How long it has run is the guest's to know; it is given the whole time once more
	// before the guest is doubted.
	r.deadline = time.Now().Add(command.Timeout + *command.GracePeriod + guestSlack)
	return nil
}
