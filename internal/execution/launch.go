package execution

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guest/wire"
	"github.com/harvest-run/executord/internal/guestclient"
)

// launch gets a sandbox and starts the command in it. A result means that it did
// not come to run; nil also that the Service is closing.
func (r *run) launch(ctx context.Context, command Command) *Result {
	if r.sandbox == nil {
		if result := r.makeSandbox(ctx); result != nil || ctx.Err() != nil {
			return result
		}
	}
	if result := r.openNetwork(ctx); result != nil || ctx.Err() != nil {
		return result
	}
	if r.times.SandboxReady.IsZero() {
		r.times.SandboxReady = time.Now()
	}
	r.meet(ctx)
	if o := r.ordered(); o != nil {
		return stopped(o, &Result{TreeEmpty: true})
	}
	return r.start(ctx, command)
}

// makeSandbox makes the sandbox of a one-shot; an order to stop ends the making.
func (r *run) makeSandbox(ctx context.Context) *Result {
	making, cancel := r.interruptible(ctx)
	defer cancel(nil)
	on, err := r.engine()
	if err == nil && r.ordered() == nil {
		bounded, stop := context.WithTimeoutCause(making, sandboxTime, fmt.Errorf("no sandbox within %v", sandboxTime))
		defer stop()
		var sandbox engine.Sandbox
		if sandbox, err = on.Create(bounded, engine.Spec{
			ID: r.record.Sandbox, Limits: r.record.Limits, Network: r.record.Network.Mode, Placement: r.placement,
			Lifetime: r.lifetime(), Labels: r.record.Labels,
		}); err == nil {
			r.sandbox = sandbox
			return nil
		}
	}
	switch o := r.ordered(); {
	case o != nil:
		return stopped(o, &Result{TreeEmpty: true})
	case ctx.Err() != nil:
		return nil
	default:
		return startFailed("no_sandbox", err)
	}
}

// lifetime is how long a sandbox of its own may be wanted.
func (r *run) lifetime() time.Duration {
	command := r.record.Command.withDefaults()
	return command.Timeout + *command.GracePeriod + guestSlack + sandboxTime
}

// meet gets to know the guest of the run's sandbox. In one that others use too, it
// remembers what they have used so far.
func (r *run) meet(ctx context.Context) {
	r.guest = r.service.guestOf(ctx, r)
	if r.session == "" {
		return
	}
	bounded, cancel := context.WithTimeoutCause(ctx, answerTime, errNoAnswer)
	defer cancel()
	before, err := r.guest.baseline(bounded)
	r.counting = true
	if err != nil {
		// Rather no evidence than that of somebody else's deeds.
		before = engine.Usage{OOMKills: math.MaxInt64, PIDsRefused: math.MaxInt64}
	}
	r.before = before
}

// guestOf returns the guest of a run's sandbox.
func (s *Service) guestOf(ctx context.Context, r *run) *guest {
	guest, first := s.guests.of(r.sandbox)
	if first && r.session != "" {
		s.forgetEnded(ctx, guest)
	}
	return guest
}

// forgetEnded has a guest release what ended before this executord was started: it
// was recorded then, but the guest may not have been told.
func (s *Service) forgetEnded(ctx context.Context, g *guest) {
	ctx, cancel := context.WithTimeoutCause(ctx, answerTime, errNoAnswer)
	defer cancel()
	info, err := g.Info(ctx)
	if err != nil {
		return // whoever wants something of it will see for himself
	}
	for _, id := range info.GetExecutions() {
		if _, known := s.find(id); !known && !guestclient.IsRun(id) {
			_ = g.Release(ctx, id) // what still runs is refused
		}
	}
}

// start starts the command. With no result it runs, or the Service is closing.
func (r *run) start(ctx context.Context, command Command) *Result {
	var missing error
	for i := 0; ; i++ {
		request, ok := command.startRequest(r.id, i)
		if !ok {
			return noInterpreter(command, missing)
		}
		request.Env = r.network.Environment(request.Env)
		request.OpenFiles = uint64(r.sandbox.Limits().OpenFiles)
		asked := time.Now()
		var answer *guestv1.StartResponse
		err := r.ask(ctx, func(ctx context.Context) (err error) {
			answer, r.early, err = r.guest.StartRead(ctx, request, readBytes, noteAfter)
			return err
		})
		switch kind := guestclient.KindOf(err); {
		case err == nil:
			now := time.Now()
			r.running(ctx, now, startedBetween(asked, now, answer.GetStartMicros()), command)
			return nil
		case errors.Is(err, wire.ErrUnsendable):
			return startFailed("refused", err)
		case kind == guestv1.Error_KIND_UNSPECIFIED:
			return r.lost(ctx, err)
		case kind == guestv1.Error_KIND_NO_SUCH_PROGRAM && len(command.Args) == 0:
			missing = err // its interpreter may have another name
		default:
			return startFailed(kindName(kind), err)
		}
	}
}

// startedBetween is when a program was started that the guest was asked for and that runs
// now. The guest measured what it took; how long the request was under way is not known,
// so this is the earliest that can be. An answer that comes late, on a machine that has
// too much to do, does not make the start late.
func startedBetween(asked, now time.Time, took uint64) time.Time {
	if at := asked.Add(micros(took)); at.Before(now) {
		return at
	}
	return now
}

func (r *run) running(ctx context.Context, now, started time.Time, command Command) {
	r.begun, r.times.Started = true, started
	r.foresee(ctx, started)
	r.noteAt = now.Add(noteAfter)
	r.deadline = now.Add(command.Timeout + *command.GracePeriod + guestSlack)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.record.StartTime = started
	r.record.State = max(r.record.State, Running)
	close(r.launched)
}

// ask repeats a question until the guest answers it, be it with an error. It gives up
// when the guest has been silent for too long, its sandbox has ended, an end was
// ordered or the Service is closing.
func (r *run) ask(ctx context.Context, question func(context.Context) error) error {
	for since := time.Now(); ; {
		bounded, cancel := context.WithTimeoutCause(ctx, answerTime, errNoAnswer)
		err := question(bounded)
		cancel()
		if err == nil || answered(err) || errors.Is(err, wire.ErrUnsendable) || ended(r.sandbox) || r.ordered() != nil || time.Since(since) >= unreachable || !pause(ctx, guestRetry) {
			return err
		}
	}
}

// answered says whether an error is the guest's answer, and not the lack of one.
func answered(err error) bool { return guestclient.KindOf(err) != guestv1.Error_KIND_UNSPECIFIED }
