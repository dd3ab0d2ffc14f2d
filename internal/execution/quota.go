package execution

import (
	"context"
	"fmt"
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

// quotaRetry is when a caller whose quota is used up may come back.
const quotaRetry = 5 * time.Second

// Quota bounds what each owner has; 0 does not.
type Quota struct {
	// Running bounds the executions that have not ended.
	Running int64
	// StoredBytes bounds the output that is kept. New work is refused once it is
	// reached; what runs then still gets the room that it was promised.
	StoredBytes int64
}

// checkQuota returns a fault Exhausted (QUOTA_EXCEEDED) for what would be too much,
// before it waits for its turn.
func (s *Service) checkQuota(ctx context.Context, owner string) error {
	s.mu.Lock()
	err := s.checkRunningLocked(owner)
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return s.checkStored(ctx, owner)
}

// checkRunningLocked returns a fault Exhausted (QUOTA_EXCEEDED) if one more execution of
// an owner would be too many.
func (s *Service) checkRunningLocked(owner string) error {
	limit := s.cfg.Quota.Running
	if limit == 0 {
		return nil
	}
	var running int64
	for _, r := range s.runs {
		if r.owner == owner {
			running++
		}
	}
	if running < limit {
		return nil
	}
	return fault.Exceeded(fault.Quota{Subject: owner, Name: "running_executions", Limit: limit}, quotaRetry,
		"%d executions of %s are running, and that is all it may have at a time", running, owner)
}

// checkStored returns a fault Exhausted (QUOTA_EXCEEDED) if the output that is kept of
// an owner's executions has reached its bound.
func (s *Service) checkStored(ctx context.Context, owner string) error {
	limit := s.cfg.Quota.StoredBytes
	if limit == 0 {
		return nil
	}
	stored, err := s.cfg.Store.StoredBytes(ctx, owner)
	if err != nil {
		return fmt.Errorf("sum up what is kept of %s: %w", owner, err)
	}
	// One that ends between the two is counted twice or, for a moment, not at all.
	for _, r := range s.all(func(r *run) bool { return r.owner == owner }) {
		stdout, stderr := r.log.Totals()
		stored += stdout.Size - stdout.Dropped + stderr.Size - stderr.Dropped
	}
	if stored < limit {
		return nil
	}
	return fault.Exceeded(fault.Quota{Subject: owner, Name: "stored_bytes", Limit: limit}, quotaRetry,
		"%d bytes of output of executions of %s are kept, and it may have %d; delete some of them", stored, owner, limit)
}
