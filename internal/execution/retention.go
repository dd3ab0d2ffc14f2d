package execution

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Retention says how long ended executions are kept, and how many bytes of logs.
type Retention struct {
	// MaxAge is counted from the end; 0 is for ever.
	MaxAge time.Duration
	// MaxTotalBytes bounds all logs together; 0 does not.
	MaxTotalBytes int64
}

// Stored is what is kept: executions that have ended, and bytes of logs.
type Stored struct {
	Executions int64
	Bytes      int64
}

// Kept is an ended execution as the collector sees it.
type Kept struct {
	ID       string
	LogBytes int64
	// Time is when it ended or, where ExpiredQuery asked, when its own retention did.
	Time time.Time
}

// KeptQuery chooses ended executions, the oldest first.
type KeptQuery struct {
	// Expired goes by the end of an execution's own retention, and chooses only those
	// that have one; else it is the time of the end that counts.
	Expired bool
	// Before bounds that time; it is not included.
	Before time.Time
	// After is the last one of the page before; its zero value is before all.
	After Kept
	// Limit is the most to return; at least 1.
	Limit int
}

const (
	// collectEvery lies between two looks for what is not to be kept any longer.
	collectEvery = time.Minute
	// collectPage is how many are removed in one transaction.
	collectPage = 100
)

// stored counts what is kept, so that nothing has to be measured.
type stored struct {
	mu     sync.Mutex
	kept   Stored        // what has ended
	over   chan struct{} // has one element when there is more than allowed
	cancel context.CancelCauseFunc
}

// stop ends the collecting.
func (s *stored) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cancel != nil {
		s.cancel(ErrClosed)
	}
}

// keep counts executions that have ended, or with negative numbers, that were removed.
func (s *Service) keep(executions, bytes int64) {
	s.stored.mu.Lock()
	defer s.stored.mu.Unlock()
	s.stored.kept.Executions += executions
	s.stored.kept.Bytes += bytes
	if limit := s.cfg.Retention.MaxTotalBytes; limit > 0 && s.stored.kept.Bytes > limit {
		select {
		case s.stored.over <- struct{}{}:
		default:
		}
	}
}

// Stored says how many ended executions are kept, and what all logs take, those of what
// runs included.
func (s *Service) Stored() Stored {
	s.stored.mu.Lock()
	sum := s.stored.kept
	s.stored.mu.Unlock()
	for _, r := range s.all(func(*run) bool { return true }) {
		sum.Bytes += r.log.Size()
	}
	return sum
}

// countStored counts what there is, before anything ends or is removed.
func (s *Service) countStored(ctx context.Context) error {
	kept, err := s.cfg.Store.CountEnded(ctx)
	if err != nil {
		return fmt.Errorf("count ended executions: %w", err)
	}
	s.keep(kept.Executions, kept.Bytes)
	return nil
}

// beginCollecting begins to remove what is not to be kept, until Close.
func (s *Service) beginCollecting(ctx context.Context) {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	s.stored.mu.Lock()
	s.stored.cancel = cancel
	s.stored.mu.Unlock()
	s.work.Go(func() { s.collect(ctx) })
}

// collect removes what is not to be kept any longer, until the Service is closed.
func (s *Service) collect(ctx context.Context) {
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	for {
		if err := s.collectOnce(ctx); err != nil && ctx.Err() == nil {
			s.log.ErrorContext(ctx, "remove ended executions, trying again", "error", err)
			// What has been deleted is not tried again at once, only because there is more.
			if !pause(ctx, lastRetry) {
				return
			}
		}
		select {
		case <-tick.C:
		case <-s.stored.over:
		case <-ctx.Done():
			return
		}
	}
}

// collectOnce removes what is over its age, over its own retention, and what there is
// more of than may be.
func (s *Service) collectOnce(ctx context.Context) error {
	now := time.Now()
	everything := func(Stored) bool { return true }
	if age := s.cfg.Retention.MaxAge; age > 0 {
		if err := s.remove(ctx, "older than retention.max_age", KeptQuery{Before: now.Add(-age)}, everything); err != nil {
			return err
		}
	}
	if err := s.remove(ctx, "its own retention is over", KeptQuery{Expired: true, Before: now}, everything); err != nil {
		return err
	}
	limit := s.cfg.Retention.MaxTotalBytes
	if limit <= 0 {
		return nil
	}
	excess := s.Stored().Bytes - limit
	if excess <= 0 {
		return nil
	}
	return s.remove(ctx, "all logs together take more than retention.max_total_bytes", KeptQuery{Before: now},
		func(removed Stored) bool { return removed.Bytes < excess })
}

// remove removes the executions that a query finds as long as more says so. What is being
// read is left for another time.
func (s *Service) remove(ctx context.Context, why string, q KeptQuery, more func(removed Stored) bool) error {
	var removed Stored
	defer func() {
		if removed.Executions > 0 {
			s.log.InfoContext(ctx, "removed ended executions with their logs", "reason", why, "executions", removed.Executions, "bytes", removed.Bytes)
		}
	}()
	for q.Limit = collectPage; ctx.Err() == nil; {
		page, err := s.cfg.Store.ListEnded(ctx, q)
		if err != nil {
			return fmt.Errorf("find ended executions to remove: %w", err)
		}
		var ids []string
		var batch Stored
		for _, k := range page {
			sum := Stored{removed.Executions + batch.Executions, removed.Bytes + batch.Bytes}
			if !more(sum) {
				break
			}
			if _, runs := s.find(k.ID); runs || s.logs.inUse(k.ID) {
				continue
			}
			ids = append(ids, k.ID)
			batch.Executions++
			batch.Bytes += k.LogBytes
		}
		if len(ids) > 0 {
			if err := s.cfg.Store.DeleteEnded(ctx, ids); err != nil {
				return fmt.Errorf("remove ended executions: %w", err)
			}
			s.keep(-batch.Executions, -batch.Bytes)
			removed.Executions += batch.Executions
			removed.Bytes += batch.Bytes
		}
		for _, id := range ids {
			// After the record, and once who has begun to read meanwhile is through.
			if err := s.logs.remove(id); err != nil {
				s.log.ErrorContext(ctx, "a log is left until the next start", "execution", id, "error", err)
			}
		}
		if len(page) < q.Limit || !more(removed) {
			return nil
		}
		q.After = page[len(page)-1]
	}
	return nil
}
