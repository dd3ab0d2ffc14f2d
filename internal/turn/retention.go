package turn

import (
	"context"
	"fmt"
	"time"
)

const (
	// collectEvery lies between two looks for what is not to be kept any longer.
	collectEvery = time.Minute
	// collectPage is how many sessions are looked at in one go.
	collectPage = 100
)

// DeleteSession removes all turns and interactions of a session that has ended, with
// their journals, prompts and attachments.
func (s *Service) DeleteSession(ctx context.Context, sessionID string) error {
	ids, err := s.cfg.Store.DeleteTurns(ctx, sessionID)
	if err != nil {
		return fmt.Errorf("delete the turns of session %s: %w", sessionID, err)
	}
	for _, id := range ids {
		// After the record. What is left is removed at the next start.
		if err := s.journals.Remove(id); err != nil {
			s.log.ErrorContext(ctx, "a journal is left until the next start", "turn", id, "error", err)
		}
	}
	return nil
}

// collect removes the turns of sessions that ended long ago, until ctx ends.
func (s *Service) collect(ctx context.Context) {
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	for {
		if err := s.collectOnce(ctx); err != nil && ctx.Err() == nil {
			s.log.ErrorContext(ctx, "remove turns, trying again", "error", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (s *Service) collectOnce(ctx context.Context) error {
	if s.cfg.MaxAge <= 0 {
		return nil
	}
	removed := 0
	defer func() {
		if removed > 0 {
			s.log.InfoContext(ctx, "removed the turns of ended sessions", "sessions", removed)
		}
	}()
	for ctx.Err() == nil {
		page, err := s.cfg.Store.SessionsWithTurns(ctx, time.Now().Add(-s.cfg.MaxAge), collectPage)
		if err != nil {
			return fmt.Errorf("find turns to remove: %w", err)
		}
		for _, id := range page {
			if err := s.DeleteSession(ctx, id); err != nil {
				return err
			}
			removed++
		}
		if len(page) < collectPage {
			return nil
		}
	}
	return nil
}
