package turn

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/journal"
)

// Recover takes up the turns that an executord before this one left: what waits waits on,
// what ran is joined when its session attaches its agent, and what had ended is recorded.
// Call it once, before anything else.
func (s *Service) Recover(ctx context.Context) error {
	err := s.journals.Strays(func(id string) (bool, error) {
		_, err := s.cfg.Store.TurnSession(ctx, id)
		if fault.KindOf(err) == fault.NotFound {
			return false, nil
		}
		return true, err
	})
	if err != nil {
		return err
	}
	unfinished, err := s.cfg.Store.UnfinishedTurns(ctx)
	if err != nil {
		return fmt.Errorf("read unfinished turns: %w", err)
	}
	for _, t := range unfinished {
		if err := s.recover(ctx, t); err != nil {
			return fmt.Errorf("take up turn %s: %w", t.ID, err)
		}
	}
	s.spawn(func() { s.collect(s.within()) })
	return nil
}

func (s *Service) recover(ctx context.Context, t Turn) error {
	l, err := s.lane(ctx, t.Session)
	if err != nil {
		return err
	}
	log, err := s.journals.Open(t.ID)
	if fault.KindOf(err) == fault.NotFound {
		// Somebody took it away. Who watches is told of another epoch.
		log, err = s.journals.Create(t.ID)
	}
	if err != nil {
		return err
	}
	one := newLive(l, t, log)
	result, err := one.catchUp(ctx)
	if err != nil {
		log.Close()
		return err
	}
	l.mu.Lock()
	if t.State == Running || result != nil {
		l.running = one
	} else {
		l.waiting = append(l.waiting, one)
	}
	l.mu.Unlock()
	if result != nil {
		one.ending.Store(true)
		one.settle(ctx, result, log.LastTime())
	}
	return nil
}

// catchUp reads what the journal and the store have of a turn, and adds to the journal
// what only the store has. It returns the result of one that had ended.
func (l *live) catchUp(ctx context.Context) (*Result, error) {
	interactions, err := l.service.cfg.Store.InteractionsOf(ctx, l.id)
	if err != nil {
		return nil, err
	}
	var result *Result
	var started, running bool
	requested, resolved := make(map[string]bool), make(map[string]bool)
	err = l.read(ctx, func(e Event) bool {
		switch {
		case e.Started != nil:
			started = true
		case e.Running != nil:
			running = true
		case e.Agent != nil:
			l.count(*e.Agent)
		case e.Requested != nil:
			requested[e.Requested.ID] = true
		case e.Resolved != nil:
			resolved[e.Resolved.ID] = true
		case e.Gap != nil:
			started, running = true, true // they were, before it
		case e.Result != nil:
			result = e.Result
		}
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("read its journal: %w", err)
	}
	if result == nil && l.log.Ended() {
		// What it says of the end is damaged.
		result = &Result{Outcome: agent.Lost, Detail: "how it ended was recorded, and cannot be read any more", Usage: l.used()}
	}
	var missing []Event
	if !started {
		missing = append(missing, Event{Started: &Started{Session: l.lane.session, Turn: l.id}})
	}
	if !running && l.record.State == Running {
		missing = append(missing, Event{Running: &Began{Model: l.record.Model}})
	}
	for _, i := range interactions {
		if !requested[i.ID] {
			asked := i
			asked.State, asked.ResolveTime, asked.ResolvedBy, asked.Answer = Pending, time.Time{}, "", nil
			missing = append(missing, Event{Requested: &asked})
		}
		if i.State != Pending && !resolved[i.ID] {
			missing = append(missing, Event{Resolved: &i})
		}
		l.asked = append(l.asked, &i)
	}
	if result != nil {
		return result, nil
	}
	for _, e := range missing {
		if err := l.append(e); err != nil && !errors.Is(err, journal.ErrEnded) {
			return nil, err
		}
	}
	return nil, nil
}
