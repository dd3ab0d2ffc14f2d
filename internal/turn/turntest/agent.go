// Package turntest has an agent that does what a script says, for tests of turns. Like a
// real one it lives on when executord lets go of it: what it has begun goes on, and can be
// joined.
package turntest

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/agent"
)

// Step is one thing that an Agent does.
type Step struct {
	// After is how long it takes.
	After time.Duration
	// Event is what it then tells. Asked makes the Agent wait for the answer.
	Event agent.Event
}

// Script is what an Agent does about one prompt.
type Script struct {
	Steps []Step
	// Outcome is how it ends; its zero Kind stands for Completed.
	Outcome agent.Outcome
	// Err, if not nil, refuses the prompt.
	Err error
}

// Text is a step that tells a piece of text.
func Text(after time.Duration, text string) Step {
	return Step{After: after, Event: agent.Event{Text: &agent.Delta{Part: "p1", Text: text}}}
}

// Cost is a step that tells what was used.
func Cost(micros int64) Step {
	return Step{Event: agent.Event{Usage: &agent.Usage{InputTokens: 1, CostMicros: micros}}}
}

// Permit is a step that asks for a permission.
func Permit(id string) Step {
	return Step{Event: agent.Event{Asked: &agent.Asked{ID: id, Permission: &agent.Permission{Kind: "bash", Patterns: []string{"make"}}}}}
}

// Agent is a scripted agent.Conversation. Its zero value does nothing about any prompt.
type Agent struct {
	// Scripts are those of the prompts, in their order; the last one also of further ones.
	Scripts []Script
	// AbortErr is what Abort answers, and then it does not abort; AnswerErr what Answer does.
	AbortErr, AnswerErr error
	// JoinErr is what Join answers.
	JoinErr error
	// Silent lets it stop without telling that it did.
	Silent bool
	// Said is what Messages answers.
	Said []agent.Message

	mu      sync.Mutex
	work    sync.WaitGroup
	prompts map[string]*prompt
	changed chan struct{}
	lost    bool

	// Given are the prompts in the order in which they came, Answers what was answered, by
	// what was asked, Aborts how often it was to stop.
	Given   []agent.Prompt
	Answers map[string][]agent.Answer
	Aborts  int
}

// prompt is what the agent has done about one.
type prompt struct {
	told    []agent.Event // Asked and Answered among them
	open    map[string]bool
	aborted chan struct{}
	outcome *agent.Outcome
}

// ID implements agent.Conversation.
func (a *Agent) ID() string { return "ses_fake" }

func (a *Agent) change() {
	if a.changed != nil {
		close(a.changed)
	}
	a.changed = make(chan struct{})
}

// Prompt implements agent.Conversation.
func (a *Agent) Prompt(ctx context.Context, p agent.Prompt, tell func(agent.Event) error) (agent.Outcome, error) {
	a.mu.Lock()
	if a.prompts == nil {
		a.prompts, a.Answers = make(map[string]*prompt), make(map[string][]agent.Answer)
		a.change()
	}
	if a.prompts[p.ID] != nil {
		a.mu.Unlock()
		return agent.Outcome{}, fmt.Errorf("prompt %s was given twice", p.ID)
	}
	for _, other := range a.prompts {
		if other.outcome == nil {
			a.mu.Unlock()
			return agent.Outcome{}, agent.ErrBusy
		}
	}
	var script Script
	if n := len(a.Scripts); n > 0 {
		script = a.Scripts[min(len(a.Given), n-1)]
	}
	if script.Err != nil {
		a.mu.Unlock()
		return agent.Outcome{}, script.Err
	}
	one := &prompt{open: make(map[string]bool), aborted: make(chan struct{})}
	a.prompts[p.ID] = one
	a.Given = append(a.Given, p)
	a.work.Go(func() { a.play(one, script) })
	a.mu.Unlock()
	return a.follow(ctx, one, 0, tell)
}

// Join implements agent.Conversation.
func (a *Agent) Join(ctx context.Context, promptID string, told iter.Seq[agent.Event], tell func(agent.Event) error) (agent.Outcome, error) {
	n := 0
	for e := range told {
		if e.Asked != nil || e.Answered != nil {
			return agent.Outcome{}, errors.New("what was asked is no event of the agent's")
		}
		n++
	}
	a.mu.Lock()
	one, err := a.prompts[promptID], a.JoinErr
	a.mu.Unlock()
	if err != nil {
		return agent.Outcome{}, err
	}
	if one == nil {
		return agent.Outcome{}, agent.ErrNoPrompt
	}
	return a.follow(ctx, one, n, tell)
}

// follow tells what was done, but for the first skip events.
func (a *Agent) follow(ctx context.Context, one *prompt, skip int, tell func(agent.Event) error) (agent.Outcome, error) {
	for at := 0; ; at++ {
		a.mu.Lock()
		for at == len(one.told) && one.outcome == nil && !a.lost {
			changed := a.changed
			a.mu.Unlock()
			select {
			case <-changed:
			case <-ctx.Done():
				return agent.Outcome{}, context.Cause(ctx)
			}
			a.mu.Lock()
		}
		lost, outcome, silent := a.lost, one.outcome, a.Silent
		var e agent.Event
		more := at < len(one.told)
		if more {
			e = one.told[at]
		}
		wanted := e.Asked == nil || one.open[e.Asked.ID]
		a.mu.Unlock()
		switch {
		case lost:
			return agent.Outcome{}, agent.ErrLost
		case !more && silent && outcome.Kind == agent.Aborted:
			<-ctx.Done()
			return agent.Outcome{}, context.Cause(ctx)
		case !more:
			return *outcome, nil
		}
		if e.Asked == nil && e.Answered == nil {
			if skip > 0 {
				skip--
				continue
			}
		} else if !wanted {
			continue
		}
		if err := tell(e); err != nil {
			return agent.Outcome{}, err
		}
		if ctx.Err() != nil {
			return agent.Outcome{}, context.Cause(ctx)
		}
	}
}

// play does what the script says.
func (a *Agent) play(one *prompt, script Script) {
	outcome := script.Outcome
	if outcome.Kind == "" {
		outcome.Kind = agent.Completed
	}
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		one.outcome = &outcome
		a.change()
	}()
	for _, step := range script.Steps {
		timer := time.NewTimer(step.After)
		select {
		case <-timer.C:
		case <-one.aborted:
			timer.Stop()
			outcome = agent.Outcome{Kind: agent.Aborted, Detail: "MessageAbortedError"}
			return
		}
		a.mu.Lock()
		one.told = append(one.told, step.Event)
		asked := step.Event.Asked
		if asked != nil {
			one.open[asked.ID] = true
		}
		a.change()
		for asked != nil && one.open[asked.ID] {
			changed := a.changed
			a.mu.Unlock()
			select {
			case <-changed:
			case <-one.aborted:
				outcome = agent.Outcome{Kind: agent.Aborted}
				return
			}
			a.mu.Lock()
		}
		if asked != nil {
			if all := a.Answers[asked.ID]; len(all) > 0 && all[0].Decision == agent.Reject {
				outcome = agent.Outcome{Kind: agent.Rejected, Detail: "rejected"}
				a.mu.Unlock()
				return
			}
		}
		a.mu.Unlock()
	}
}

// Abort implements agent.Conversation.
func (a *Agent) Abort(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.Aborts++
	if a.lost {
		return agent.ErrLost
	}
	if a.AbortErr != nil {
		return a.AbortErr
	}
	for _, one := range a.prompts {
		if one.outcome == nil && !isClosed(one.aborted) {
			close(one.aborted)
		}
	}
	return ctx.Err()
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Answer implements agent.Conversation.
func (a *Agent) Answer(_ context.Context, id string, answer agent.Answer) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.AnswerErr != nil {
		return a.AnswerErr
	}
	for _, one := range a.prompts {
		if one.open[id] {
			one.open[id] = false
			one.told = append(one.told, agent.Event{Answered: &agent.Answered{ID: id}})
			a.Answers[id] = append(a.Answers[id], answer)
			a.change()
			return nil
		}
	}
	return agent.ErrNotAsked
}

// Withdraw has the agent no longer wait for an answer, as if it had one.
func (a *Agent) Withdraw(id string) {
	_ = a.Answer(context.Background(), id, agent.Answer{}) // of what was not asked there is nothing to withdraw
}

// Messages implements agent.Conversation.
func (a *Agent) Messages(context.Context) ([]agent.Message, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.Said), nil
}

// Lose has the agent be gone.
func (a *Agent) Lose() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.lost = true
	for _, one := range a.prompts {
		if !isClosed(one.aborted) {
			close(one.aborted)
		}
	}
	a.change()
}

// Set changes the Agent while it works.
func (a *Agent) Set(change func(*Agent)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change(a)
}

// Seen reads the Agent while it works.
func Seen[T any](a *Agent, read func(*Agent) T) T {
	a.mu.Lock()
	defer a.mu.Unlock()
	return read(a)
}

// Wait stops the agent and waits for what it does.
func (a *Agent) Wait() {
	a.Lose()
	a.work.Wait()
}
