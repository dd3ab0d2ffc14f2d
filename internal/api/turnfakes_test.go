package api

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/turn"
)

// fakeTurns keeps turns in memory; tests write their journals.
type fakeTurns struct {
	running  string
	used     agent.Usage
	sessions *fakeSessions

	mu           sync.Mutex
	turns        []*fakeTurn
	interactions []turn.Interaction
	messages     []agent.Message
	// requests are those that Send got, answers those that Resolve got, by whom.
	requests []turn.Request
	answers  []agent.Answer
	keys     []idempotency.Key
	watchers int
	// onSend writes the journal of a new turn.
	onSend func(*fakeTurn)
	err    error
}

// fakeTurn is a turn with its journal.
type fakeTurn struct {
	mu      sync.Mutex
	record  turn.Turn
	events  []turn.Event
	changed chan struct{}
}

func (f *fakeTurns) visible(session string, by caller.Caller) error {
	if f.err != nil {
		return f.err
	}
	f.sessions.mu.Lock()
	defer f.sessions.mu.Unlock()
	if s, ok := f.sessions.sessions[session]; ok && by.Sees(s.Owner) {
		return nil
	}
	return fault.New(fault.NotFound, "SESSION_NOT_FOUND", "there is no session %q", session)
}

func (f *fakeTurns) add(t turn.Turn) *fakeTurn {
	f.mu.Lock()
	defer f.mu.Unlock()
	t.Number = len(f.turns) + 1
	one := &fakeTurn{record: t, changed: make(chan struct{})}
	f.turns = append(f.turns, one)
	return one
}

func (t *fakeTurn) append(all ...turn.Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range all {
		e.Cursor, e.Time = journal.Cursor{Epoch: "e1", Sequence: uint64(len(t.events) + 1)}, time.Unix(5, 0)
		t.events = append(t.events, e)
		if e.Result != nil {
			t.record.State, t.record.Result = turn.Ended, e.Result
		}
	}
	close(t.changed)
	t.changed = make(chan struct{})
}

func (t *fakeTurn) read(from int) (turn.Turn, []turn.Event, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.record, t.events[min(from, len(t.events)):], t.changed
}

func (f *fakeTurns) find(ref turn.Ref) (*fakeTurn, error) {
	if err := f.visible(ref.Session, ref.Caller); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, t := range f.turns {
		if t.record.ID == ref.ID && t.record.Session == ref.Session {
			return t, nil
		}
	}
	return nil, fault.New(fault.NotFound, "TURN_NOT_FOUND", "there is no turn %q", ref.ID)
}

func (f *fakeTurns) Send(_ context.Context, r turn.Request) (turn.Turn, error) {
	if err := f.visible(r.Session, r.Caller); err != nil {
		return turn.Turn{}, err
	}
	f.mu.Lock()
	f.keys, f.requests = append(f.keys, r.Key), append(f.requests, r)
	f.mu.Unlock()
	one := f.add(turn.Turn{ID: "new", Session: r.Session, Owner: r.Caller.Owner, State: turn.Queued, Prompt: r.Prompt, CreateTime: time.Unix(1, 0)})
	if f.onSend != nil {
		f.onSend(one)
	}
	record, _, _ := one.read(0)
	return record, nil
}

func (f *fakeTurns) Running(string) string { return f.running }

func (f *fakeTurns) Usage(context.Context, string) (agent.Usage, error) { return f.used, f.err }

func (f *fakeTurns) Get(_ context.Context, ref turn.Ref) (turn.Turn, error) {
	one, err := f.find(ref)
	if err != nil {
		return turn.Turn{}, err
	}
	record, _, _ := one.read(0)
	return record, nil
}

func (f *fakeTurns) Wait(ctx context.Context, ref turn.Ref) (turn.Turn, error) {
	one, err := f.find(ref)
	if err != nil {
		return turn.Turn{}, err
	}
	for {
		record, _, changed := one.read(0)
		if record.State == turn.Ended {
			return record, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return record, context.Cause(ctx)
		}
	}
}

func (f *fakeTurns) List(_ context.Context, q turn.Query) ([]turn.Turn, error) {
	if err := f.visible(q.Session, q.Caller); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var page []turn.Turn
	for _, t := range slices.Backward(f.turns) {
		if record, _, _ := t.read(0); record.Session == q.Session && (q.Before == 0 || record.Number < q.Before) && len(page) < q.Limit {
			page = append(page, record)
		}
	}
	return page, nil
}

func (f *fakeTurns) Cancel(ctx context.Context, ref turn.Ref, c turn.Cancellation) (turn.Turn, error) {
	one, err := f.find(ref)
	if err != nil {
		return turn.Turn{}, err
	}
	f.mu.Lock()
	f.keys = append(f.keys, c.Key)
	f.mu.Unlock()
	one.append(turn.Event{Result: &turn.Result{Outcome: agent.Aborted, CancelledBy: c.By}})
	return f.Get(ctx, ref)
}

func (f *fakeTurns) Messages(_ context.Context, session string, by caller.Caller, after string, limit int) ([]agent.Message, error) {
	if err := f.visible(session, by); err != nil {
		return nil, err
	}
	at := slices.IndexFunc(f.messages, func(m agent.Message) bool { return m.ID == after }) + 1
	return f.messages[at:min(at+limit, len(f.messages))], nil
}

func (f *fakeTurns) ListInteractions(_ context.Context, q turn.InteractionQuery) ([]turn.Interaction, error) {
	if err := f.visible(q.Session, q.Caller); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var page []turn.Interaction
	for _, i := range slices.Backward(f.interactions) {
		if i.Session == q.Session && (!q.Pending || i.State == turn.Pending) && (q.Before == "" || i.ID < q.Before) && len(page) < q.Limit {
			page = append(page, i)
		}
	}
	return page, nil
}

func (f *fakeTurns) Resolve(_ context.Context, ref turn.Ref, answer agent.Answer, by string, key idempotency.Key) (turn.Interaction, error) {
	if err := f.visible(ref.Session, ref.Caller); err != nil {
		return turn.Interaction{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for n, i := range f.interactions {
		if i.ID == ref.ID && i.Session == ref.Session {
			i.State, i.ResolvedBy, i.Answer = turn.Resolved, by, &answer
			f.interactions[n] = i
			f.answers, f.keys = append(f.answers, answer), append(f.keys, key)
			return i, nil
		}
	}
	return turn.Interaction{}, fault.New(fault.NotFound, "INTERACTION_NOT_FOUND", "there is no interaction %q", ref.ID)
}

func (f *fakeTurns) Watch(_ context.Context, ref turn.Ref, after *journal.Cursor) (TurnWatcher, error) {
	one, err := f.find(ref)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watchers++
	w := &fakeTurnWatcher{one: one, closed: func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.watchers--
	}}
	if after != nil {
		w.cursor = *after
	}
	return w, nil
}

func (f *fakeTurns) openWatchers() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.watchers
}

type fakeTurnWatcher struct {
	one    *fakeTurn
	cursor journal.Cursor
	closed func()
}

func (w *fakeTurnWatcher) Next(ctx context.Context) (turn.Event, error) {
	for {
		record, events, changed := w.one.read(int(w.cursor.Sequence))
		if len(events) > 0 {
			w.cursor = events[0].Cursor
			return events[0], nil
		}
		if record.State == turn.Ended {
			return turn.Event{}, io.EOF
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return turn.Event{}, context.Cause(ctx)
		}
	}
}

func (w *fakeTurnWatcher) Cursor() journal.Cursor   { return w.cursor }
func (w *fakeTurnWatcher) LastEventTime() time.Time { return time.Unix(5, 0) }
func (w *fakeTurnWatcher) Close()                   { w.closed() }

// keyNames are the names and methods of keys.
func keyNames(keys []idempotency.Key) string {
	var all []string
	for _, k := range keys {
		all = append(all, fmt.Sprint(k.ID, " ", k.Method))
	}
	return strings.Join(all, ", ")
}
