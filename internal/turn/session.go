package turn

import (
	"context"
	"time"

	"github.com/harvest-run/executord/internal/agent"
)

// Attach says that the agent of a session is ready: the turn that runs is joined, and
// what waits is run. Another conversation takes the place of the one before. It returns at
// once.
func (s *Service) Attach(sessionID string, c agent.Conversation) {
	if !s.spawn(func() { s.attach(sessionID, c) }) {
		return // an executord after this one attaches it
	}
}

// attach waits for a store that has trouble: without what is stored nothing can be run.
func (s *Service) attach(sessionID string, c agent.Conversation) {
	ctx := s.within()
	for {
		l, err := s.lane(ctx, sessionID)
		if err == nil {
			l.attach(c)
			return
		}
		s.log.ErrorContext(ctx, "the turns of a session cannot be run yet", "session", sessionID, "error", err)
		if !pause(ctx, askAgain) {
			return
		}
	}
}

// Detach says that the agent of a session goes, for now, and why: the turn that runs is
// ended, what waits stays. It returns when nothing of it uses the agent any more. When ctx
// ends first the agent is let go of all the same, and the turn is joined by the next
// Attach; the error is ctx's cause.
func (s *Service) Detach(ctx context.Context, sessionID string, cause error) error {
	if l := s.findLane(sessionID); l != nil {
		return l.detach(ctx, cause)
	}
	return nil
}

// EndSession ends all turns of a session: the one that runs is aborted, those that wait
// are taken out of the queue, interactions become void. It returns when they have ended.
// The session must take no prompts any more. It may be called again.
func (s *Service) EndSession(ctx context.Context, sessionID string) error {
	l := s.findLane(sessionID)
	if l == nil {
		return nil
	}
	if err := l.close(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.lanes, sessionID)
	return nil
}

// Activity says whether a turn of a session runs, one that waits for an answer included,
// and otherwise when the last one ended; zero if none did.
func (s *Service) Activity(sessionID string) (busy bool, last time.Time) {
	l := s.findLane(sessionID)
	if l == nil {
		return false, time.Time{}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.running != nil || len(l.waiting) > 0 && l.by != nil && !l.by.gone, l.totals.LastEnd
}

// Running is the ID of the turn of a session that runs; "" if none does.
func (s *Service) Running(sessionID string) string {
	if l := s.findLane(sessionID); l != nil {
		if one := l.present(); one != nil {
			return one.id
		}
	}
	return ""
}

// Usage is what the turns of a session have used so far.
func (s *Service) Usage(ctx context.Context, sessionID string) (agent.Usage, error) {
	l := s.findLane(sessionID)
	if l == nil {
		totals, err := s.cfg.Store.Totals(ctx, sessionID)
		return totals.Usage, err
	}
	sum := l.spent().Usage
	if one := l.present(); one != nil {
		sum = sum.Add(one.used())
	}
	return sum, nil
}
