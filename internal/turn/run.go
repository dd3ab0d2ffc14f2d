package turn

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/agent"
)

const (
	// abortTime is how long an agent is asked to stop before it is given up, abortWait how
	// long each asking may take.
	abortTime = 90 * time.Second
	abortWait = 30 * time.Second
	// lastWords is how long an agent that has stopped may take to tell how.
	lastWords = 15 * time.Second
	// askAgain lies between two attempts to reach an agent or a session.
	askAgain = time.Second
	// joinTime is how long an agent is tried to be joined again before it is given up,
	// busyTime how long one may be at work on something else.
	joinTime = 60 * time.Second
	busyTime = 60 * time.Second
)

// Causes with which the context of a conversation ends.
var (
	errOver       = errors.New("the agent is through")
	errAborted    = errors.New("the agent stopped and did not tell how")
	errNotAborted = errors.New("the agent could not be stopped")
)

// lead has the agent work on a turn until it has ended, or ctx ends: then another
// attachment, or an executord after this one, goes on.
func (l *live) lead(ctx context.Context, c agent.Conversation) {
	profile, ok := l.learn(ctx)
	if !ok {
		return
	}
	l.mu.Lock()
	state, o := l.record.State, l.order
	l.profile = profile
	l.mu.Unlock()
	fresh := state == Queued
	if fresh {
		if o != nil {
			l.finish(l.service.within(), o.result(""))
			return
		}
		if err := profile.Limit.check(l.lane.spent(), 0); err != nil {
			l.finish(l.service.within(), &Result{Outcome: agent.Aborted, Detail: "not begun: " + err.Error()})
			return
		}
		if err := l.begin(ctx, profile); err != nil {
			if errors.Is(err, errFinal) {
				l.finish(l.service.within(), &Result{Outcome: agent.Aborted, Detail: "not begun: " + err.Error()})
			}
			return
		}
	}
	talking, cancel := context.WithCancelCause(ctx)
	var minding sync.WaitGroup
	minding.Go(func() { l.mind(talking, c, cancel) })
	outcome, err := l.talk(talking, c, fresh)
	cause := context.Cause(talking)
	cancel(errOver)
	minding.Wait()
	if err != nil && ctx.Err() == nil && cause == nil && !errors.Is(err, agent.ErrLost) {
		l.quiet(ctx, c) // it may work all the same
	}
	if result := l.conclude(ctx, outcome, err, cause); result != nil {
		l.finish(l.service.within(), result)
	}
}

// quiet stops an agent whose conversation broke off, so that the next prompt finds it
// idle.
func (l *live) quiet(ctx context.Context, c agent.Conversation) {
	asking, stop := context.WithTimeoutCause(ctx, abortWait, fmt.Errorf("not stopped within %v", abortWait))
	defer stop()
	if err := c.Abort(asking); err != nil {
		l.service.log.WarnContext(ctx, "an agent may still work on a turn that has ended", "turn", l.id, "error", err)
	}
}

// learn asks the session what the turn needs to know, again while it has no answer. The
// end of the session comes by itself.
func (l *live) learn(ctx context.Context) (Profile, bool) {
	for {
		p, err := l.lane.profile(ctx)
		if err == nil || l.ordered() != nil {
			return p, ctx.Err() == nil
		}
		if !pause(ctx, askAgain) {
			return p, false
		}
	}
}

// begin records that the agent is about to be given the prompt. Before it is: what runs
// must be found again.
func (l *live) begin(ctx context.Context, p Profile) error {
	err := l.enter(ctx, Running, func(t *Turn) {
		t.StartTime, t.Model = time.Now(), t.Prompt.Model
		if t.Model == (agent.Model{}) {
			t.Model = p.Model
		}
	})
	if err != nil {
		return err
	}
	l.lane.begun()
	t := l.snapshot()
	l.service.home().Note(l.lane.session, Note{Turn: &t})
	return l.keep(ctx, Event{Running: &Began{Model: t.Model}})
}

// keep adds an event to the journal, for as long as it takes.
func (l *live) keep(ctx context.Context, e Event) error {
	err := l.append(e)
	if err == nil {
		return nil
	}
	return l.persist(ctx, "add an event", l.flush)
}

// talk gives the agent the prompt, or joins it where that was done before.
func (l *live) talk(ctx context.Context, c agent.Conversation, fresh bool) (agent.Outcome, error) {
	tell := func(e agent.Event) error { return l.tell(ctx, e) }
	if !fresh {
		outcome, err := l.join(ctx, c, tell)
		if !errors.Is(err, agent.ErrNoPrompt) {
			return outcome, err
		}
		if l.ordered() != nil {
			return agent.Outcome{Kind: agent.Aborted}, nil
		}
	}
	var p Prompt
	err := l.persist(ctx, "read the prompt", func() (err error) {
		p, err = l.service.cfg.Store.GetPrompt(ctx, l.id)
		return err
	})
	if err != nil {
		return agent.Outcome{}, fmt.Errorf("read the prompt: %w", err)
	}
	given := agent.Prompt{ID: l.id, Text: p.Text, Author: p.Author, Model: l.snapshot().Model}
	for _, a := range p.Attachments {
		given.Attachments = append(given.Attachments, agent.Attachment(a))
	}
	giveUp := time.Now().Add(busyTime)
	for {
		outcome, err := c.Prompt(ctx, given, tell)
		if !errors.Is(err, agent.ErrBusy) || time.Now().After(giveUp) {
			return outcome, err
		}
		// Turns run one at a time: whatever it is at is over for us.
		l.quiet(ctx, c)
		if !pause(ctx, askAgain) {
			return outcome, context.Cause(ctx)
		}
	}
}

// join goes on with a prompt that was given before. An agent that is on its way is tried
// again: that it cannot be joined does not say how the prompt ends.
func (l *live) join(ctx context.Context, c agent.Conversation, tell func(agent.Event) error) (agent.Outcome, error) {
	giveUp := time.Now().Add(joinTime)
	for {
		outcome, err := c.Join(ctx, l.id, l.told(ctx), tell)
		if err == nil || errors.Is(err, agent.ErrNoPrompt) || errors.Is(err, agent.ErrLost) || ctx.Err() != nil {
			return outcome, err
		}
		if time.Now().After(giveUp) {
			return outcome, fmt.Errorf("%w: %w", agent.ErrLost, err)
		}
		l.service.log.WarnContext(ctx, "a turn cannot be joined, trying again", "turn", l.id, "error", err)
		if !pause(ctx, askAgain) {
			return outcome, context.Cause(ctx)
		}
	}
}

// told are the agent's events that the journal has.
func (l *live) told(ctx context.Context) iter.Seq[agent.Event] {
	return func(yield func(agent.Event) bool) {
		err := l.read(ctx, func(e Event) bool { return e.Agent == nil || yield(*e.Agent) })
		if err != nil && ctx.Err() == nil {
			l.service.log.ErrorContext(ctx, "the events of a turn cannot be read, some may be told twice", "turn", l.id, "error", err)
		}
	}
}

// read goes through the journal as it is now, for as long as f returns true.
func (l *live) read(ctx context.Context, f func(Event) bool) error {
	end := l.log.Cursor()
	if end.Sequence == 0 {
		return nil
	}
	w, err := l.service.journals.Watch(l.id, nil)
	if err != nil {
		return err
	}
	defer w.Close()
	for w.Cursor().Sequence < end.Sequence {
		entry, err := w.Next(ctx)
		if err != nil {
			return err
		}
		if !f(decode(entry)) {
			return nil
		}
	}
	return nil
}

// tell keeps an event of the agent.
func (l *live) tell(ctx context.Context, e agent.Event) error {
	switch {
	case e.Asked != nil:
		return l.ask(ctx, e.SubAgent, *e.Asked)
	case e.Answered != nil:
		l.answered(ctx, e.Answered.ID)
		return nil
	}
	for _, one := range bounded(e) {
		l.count(one)
		if err := l.keep(ctx, Event{Agent: &one}); err != nil {
			return err
		}
	}
	l.checkSpent()
	return nil
}

// count adds up what is used.
func (l *live) count(e agent.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case e.Usage != nil:
		l.usage[e.SubAgent] = l.usage[e.SubAgent].Add(*e.Usage)
	case e.SubAgentEnded != nil && e.SubAgentEnded.Usage.CostMicros >= l.usage[e.SubAgentEnded.ID].CostMicros:
		l.usage[e.SubAgentEnded.ID] = e.SubAgentEnded.Usage // the whole of it
	}
}

// checkSpent orders the end of a turn with which its session is beyond its limit.
func (l *live) checkSpent() {
	l.mu.Lock()
	limit := l.profile.Limit.CostMicros
	l.mu.Unlock()
	if limit == 0 {
		return
	}
	spent := l.lane.spent().Usage.CostMicros + l.used().CostMicros
	if spent > limit {
		l.stop(order{detail: fmt.Sprintf("the session's turns have used %s, and may use %s", dollars(spent), dollars(limit))})
	}
}

// conclude decides how the turn ended; nil if it goes on without us.
func (l *live) conclude(ctx context.Context, outcome agent.Outcome, err, cause error) *Result {
	o := l.ordered()
	var r *Result
	switch {
	case err == nil:
		r = &Result{
			Outcome: outcome.Kind, Detail: outcome.Detail, Error: outcome.Error,
			Usage: outcome.Usage, Text: outcome.Text, Diffs: outcome.Diffs,
		}
		if o != nil && outcome.Kind != agent.Completed && outcome.Kind != agent.Truncated && outcome.Kind != agent.Lost {
			// However the agent tells it, this is why.
			r.Outcome, r.Detail, r.CancelledBy, r.Error = agent.Aborted, o.detail, o.by, nil
		}
	case errors.Is(err, agent.ErrLost):
		r = &Result{Outcome: agent.Lost, Detail: err.Error()}
		if o != nil {
			r.Detail, r.CancelledBy = o.detail+"; "+r.Detail, o.by
		}
	case errors.Is(cause, errAborted):
		r = o.result(errAborted.Error())
	case errors.Is(cause, errNotAborted):
		r = &Result{Outcome: agent.Lost, Detail: o.detail + "; " + cause.Error(), CancelledBy: o.by}
	case ctx.Err() != nil:
		return nil
	default:
		r = &Result{Outcome: agent.Failed, Detail: "the agent did not take the prompt", Error: &agent.Error{Name: "PromptFailed", Message: err.Error()}}
	}
	if r.Usage == (agent.Usage{}) {
		r.Usage = l.used()
	}
	return r
}

// mind does what is due while the agent works: deadlines, answers, the end that was
// ordered.
func (l *live) mind(ctx context.Context, c agent.Conversation, cancel context.CancelCauseFunc) {
	for ctx.Err() == nil {
		if l.ordered() != nil {
			l.abort(ctx, c, cancel)
			return
		}
		l.expire(ctx)
		again := l.deliver(ctx, c)
		if err := l.flush(); err != nil {
			again = true
		}
		due := l.due()
		if again {
			due = min(due, askAgain)
		}
		timer := time.NewTimer(max(due, 0))
		select {
		case <-l.wake:
		case <-timer.C:
			l.timeOut()
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// due is how long nothing is to be done.
func (l *live) due() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	at := l.record.StartTime.Add(l.timeoutLocked())
	for _, i := range l.asked {
		if i.State == Pending && !i.ExpireTime.IsZero() && i.ExpireTime.Before(at) {
			at = i.ExpireTime
		}
	}
	return time.Until(at)
}

func (l *live) timeoutLocked() time.Duration {
	if t := l.profile.Limit.TurnTimeout; t > 0 {
		return t
	}
	return DefaultTimeout
}

// timeOut orders the end of a turn that has taken too long.
func (l *live) timeOut() {
	l.mu.Lock()
	timeout := l.timeoutLocked()
	late := time.Since(l.record.StartTime) >= timeout
	l.mu.Unlock()
	if late {
		l.stop(order{detail: fmt.Sprintf("it ran longer than the turn timeout of %v", timeout)})
	}
}

// abort has the agent stop, and sees to it that the conversation ends.
func (l *live) abort(ctx context.Context, c agent.Conversation, cancel context.CancelCauseFunc) {
	giveUp := time.Now().Add(abortTime)
	for {
		asking, stop := context.WithTimeoutCause(ctx, abortWait, fmt.Errorf("not stopped within %v", abortWait))
		err := c.Abort(asking)
		stop()
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return
		}
		l.service.log.WarnContext(ctx, "an agent does not stop, trying again", "turn", l.id, "error", err)
		if time.Now().After(giveUp) {
			cancel(fmt.Errorf("%w: %w", errNotAborted, err))
			return
		}
		pause(ctx, askAgain)
	}
	if pause(ctx, lastWords) {
		cancel(errAborted)
	}
}
