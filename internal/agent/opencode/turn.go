package opencode

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/harvest-run/executord/internal/agent"
)

const (
	// drainTime is how long a turn that is over is waited for to say so in its events.
	drainTime = 300 * time.Millisecond
	// refusedTime is how long the reason why a prompt was refused is waited for: it comes as
	// an event, and not with the answer.
	refusedTime = 5 * time.Second
	// holdTime is how long a request waits for the tool call that it is about.
	holdTime = 200 * time.Millisecond
	// pollTime is between two looks at a turn whose own answer cannot be had.
	pollTime = 250 * time.Millisecond
	// repeats is how often a prompt that was stored and not run is asked to run.
	repeats = 5
)

// turn is a prompt that is followed.
type turn struct {
	c           *Conversation
	message     string
	translation *translation
	events      *subscription
	aborted     atomic.Bool
	over        chan struct{} // closed when it is not followed any more

	mu       sync.Mutex
	children []string // guarded by mu
}

// end is how OpenCode came to be through with a turn.
type end struct {
	// final is the last message; "" if that is not known.
	final string
	// restarted says that it died in the turn.
	restarted bool
	how       string
	// refused is what it says about a prompt that it did not take.
	refused error
	// err is why it is not known.
	err error
}

// conversations are the agent's and those of its sub-agents.
func (t *turn) conversations() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]string{t.c.id}, t.children...)
}

// follow tells what happens until the turn is over. body is the prompt, nil if OpenCode has
// it already.
func (t *turn) follow(ctx context.Context, body map[string]any) (agent.Outcome, error) {
	c, hub := t.c, t.c.server.hub
	if err := hub.wait(ctx); err != nil {
		return agent.Outcome{}, err
	}
	begun := c.server.now()
	if begun.lost != nil {
		return agent.Outcome{}, begun.lost
	}
	t.events = hub.subscribe(c.id)
	defer t.events.close()
	if body == nil {
		t.catchUp(ctx)
	}

	ended := make(chan end, 1)
	following, stop := context.WithCancelCause(ctx)
	var waiter sync.WaitGroup
	waiter.Go(func() { ended <- t.await(following, begun.generation, body) })
	defer waiter.Wait()
	defer stop(errors.New("not followed any more"))

	for {
		var hold <-chan time.Time
		if len(t.translation.held) > 0 {
			hold = time.After(holdTime)
		}
		select {
		case <-t.events.ready:
			t.drain(ctx)
		case <-hold:
			t.translation.flush("")
		case e := <-ended:
			return t.conclude(ctx, e)
		case <-ctx.Done():
			return agent.Outcome{}, context.Cause(ctx)
		}
		if t.translation.err != nil {
			return agent.Outcome{}, t.translation.err
		}
	}
}

// drain takes the events that have come.
func (t *turn) drain(ctx context.Context) {
	events, lost := t.events.take()
	if lost {
		t.translation.lose()
		t.catchUp(ctx)
	}
	for i := 0; i < len(events); i++ {
		e := events[i]
		// Pieces that came together are told together.
		for e.Type == "message.part.delta" && i+1 < len(events) && events[i+1].Type == e.Type && events[i+1].PartID == e.PartID && events[i+1].Field == e.Field {
			i++
			e.Delta += events[i].Delta
		}
		t.translation.event(e)
	}
	t.note()
}

// note keeps which conversations there are, for those who abort.
func (t *turn) note() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id := range t.translation.threads {
		if id != t.c.id && !slices.Contains(t.children, id) {
			t.children = append(t.children, id)
		}
	}
}

// await returns when OpenCode is through with the turn. The end of its answer to the prompt
// is the sign: its events of being idle come too early, and too often.
func (t *turn) await(ctx context.Context, generation int, body map[string]any) end {
	for try := 0; ; try++ {
		final := ""
		if body != nil {
			answer, err := t.c.api.prompt(ctx, t.c.id, body)
			switch {
			case err == nil:
				final = answer.Info.ID
				if answer.Info.ParentID == t.message {
					return end{final: final}
				}
			case errors.As(err, new(*statusError)):
				return end{refused: err}
			case ctx.Err() != nil:
				return end{err: context.Cause(ctx)}
			}
			// It may have the prompt and not show it yet.
			pause(ctx, pollTime)
		}
		e := t.poll(ctx, generation)
		if e.err != nil || e.restarted {
			return e
		}
		stored, err := t.stored(ctx)
		if err != nil {
			pause(ctx, pollTime)
			continue
		}
		if answered(stored, t.message) {
			return end{final: final}
		}
		if len(stored) == 0 && body == nil {
			return end{err: agent.ErrNoPrompt}
		}
		if t.aborted.Load() {
			return end{}
		}
		if try == repeats {
			return end{refused: errors.New("opencode stored the prompt and did not run it")}
		}
		if len(stored) > 0 {
			// It was stored and not run: OpenCode was still busy with the end of the turn
			// before. By this name and without parts it runs what it has.
			body = map[string]any{"messageID": t.message, "parts": []any{}}
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// answered says whether there is an answer to the prompt.
func answered(list []stored, prompt string) bool {
	return slices.ContainsFunc(list, func(m stored) bool { return m.Info.ParentID == prompt })
}

// poll returns when the conversation is idle.
func (t *turn) poll(ctx context.Context, generation int) end {
	for first := true; ; first = false {
		now := t.c.server.now()
		if now.lost != nil {
			return end{err: now.lost}
		}
		if now.generation != generation {
			return end{restarted: true, how: now.died}
		}
		if busy, err := t.c.api.busy(ctx); err == nil {
			if _, is := busy[t.c.id]; !is {
				return end{}
			}
		}
		wait := pollTime
		if first {
			wait /= 10
		}
		select {
		case <-time.After(wait):
		case <-now.changed:
		case <-ctx.Done():
			return end{err: context.Cause(ctx)}
		}
	}
}

// stored is what OpenCode has of the turn: the prompt and what came after it. It is empty
// if it has not got the prompt.
func (t *turn) stored(ctx context.Context) ([]stored, error) {
	for limit := 32; ; limit *= 4 {
		list, err := t.c.api.messages(ctx, t.c.id, limit)
		if err != nil {
			return nil, err
		}
		if at := slices.IndexFunc(list, func(m stored) bool { return m.Info.ID == t.message }); at >= 0 {
			return list[at:], nil
		}
		if len(list) < limit {
			return nil, nil
		}
	}
}

// catchUp takes what is stored and what waits, after events were lost.
func (t *turn) catchUp(ctx context.Context) {
	c := t.c
	if _, err := t.reconcile(ctx); err != nil {
		c.server.cfg.Logger.DebugContext(ctx, "a turn was not read", "error", err)
		return
	}
	permissions, err := c.api.permissions(ctx)
	if err != nil {
		return
	}
	questions, err := c.api.questions(ctx)
	if err != nil {
		return
	}
	t.translation.waiting(append(permissions, questions...))
	for _, th := range t.translation.following() {
		if todos, err := c.api.todos(ctx, th.id); err == nil && len(todos) > 0 {
			t.translation.list(th, todos)
		}
	}
	t.note()
}

// reconcile takes what is stored of the turn and returns the agent's own messages of it.
func (t *turn) reconcile(ctx context.Context) ([]stored, error) {
	own, err := t.stored(ctx)
	if err != nil {
		return nil, err
	}
	x := t.translation
	// A sub-agent may have sub-agents. What one said is told before its end is.
	x.stash = make(map[string][]stored)
	todo := subAgents(own)
	for id := range x.threads {
		todo = append(todo, id)
	}
	for i := 0; i < len(todo); i++ {
		id := todo[i]
		if _, done := x.stash[id]; done || id == x.root {
			continue
		}
		t.events.follow(id)
		list, err := t.c.api.messages(ctx, id, 0)
		if err != nil {
			return nil, err
		}
		x.stash[id] = list
		todo = append(todo, subAgents(list)...)
	}
	x.take(own, x.thread(x.root))
	for _, th := range x.following() {
		x.unstash(th)
	}
	return own, nil
}

// subAgents are those that tool calls in these messages work with.
func subAgents(list []stored) []string {
	var ids []string
	for _, m := range list {
		for _, p := range m.Parts {
			if p.Type != "tool" {
				continue
			}
			if id := p.State.facts().SessionID; id != "" {
				ids = append(ids, id)
			}
		}
	}
	return ids
}

// conclude tells the rest of a turn that is over, and how it ended.
func (t *turn) conclude(ctx context.Context, e end) (agent.Outcome, error) {
	if e.err != nil {
		return agent.Outcome{}, e.err
	}
	x := t.translation
	root := x.thread(x.root)
	limit := drainTime
	if e.refused != nil {
		limit = refusedTime
	}
	deadline := time.After(limit)
	told := func() bool {
		if e.refused != nil {
			return len(x.errors) > 0
		}
		return e.restarted || e.final != "" && root.done[e.final] && root.idle > 0
	}
	for waiting := true; waiting && !told(); {
		select {
		case <-t.events.ready:
			t.drain(ctx)
		case <-deadline:
			waiting = false
		case <-ctx.Done():
			return agent.Outcome{}, context.Cause(ctx)
		}
	}
	t.drain(ctx)
	if e.restarted {
		x.emit(root, agent.Event{Restarted: &agent.Restarted{Detail: e.how}})
	}
	x.final = true
	own, err := t.reconcile(ctx)
	if err != nil {
		// It may have died at the very end.
		if err := t.c.reachable(ctx, err); err != nil {
			return agent.Outcome{}, err
		}
		if own, err = t.reconcile(ctx); err != nil {
			return agent.Outcome{}, fmt.Errorf("read the turn: %w", err)
		}
	}
	diffs, err := t.c.api.diff(ctx, t.c.id, t.message)
	if err != nil {
		t.c.server.cfg.Logger.DebugContext(ctx, "the changes of a turn were not read", "error", err)
	}
	x.diffs(diffs)
	x.close(interruption(e, t.aborted.Load()))
	if x.err != nil {
		return agent.Outcome{}, x.err
	}
	if ctx.Err() != nil {
		return agent.Outcome{}, context.Cause(ctx)
	}
	outcome := t.outcome(own, e)
	for _, d := range diffs {
		outcome.Diffs = append(outcome.Diffs, x.file(d))
	}
	outcome.Diffs = append(outcome.Diffs, x.elsewhere(outcome.Diffs)...)
	outcome.Usage = x.usage
	return outcome, nil
}

// interruption is why a tool call that did not end did not.
func interruption(e end, aborted bool) string {
	switch {
	case e.restarted:
		return fmt.Sprintf("interrupted: the agent died (%s)", e.how)
	case aborted:
		return "interrupted: the turn was aborted"
	}
	return "interrupted: the turn was over"
}
