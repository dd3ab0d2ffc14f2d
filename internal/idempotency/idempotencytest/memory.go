// Package idempotencytest has a Store in memory, for the tests of those who carry out
// requests that can be repeated.
package idempotencytest

import (
	"context"
	"sync"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
)

// Memory is a Store in memory. Its zero value is empty.
type Memory struct {
	mu      sync.Mutex
	records map[[2]string]idempotency.Record
	syncs   int
}

// FindRequest implements idempotency.Store.
func (m *Memory) FindRequest(_ context.Context, owner, id string) (idempotency.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r, ok := m.records[[2]string{owner, id}]; ok {
		return r, nil
	}
	return idempotency.Record{}, fault.New(fault.NotFound, "REQUEST_NOT_FOUND", "there is no such request")
}

// InsertRequest implements idempotency.Store.
func (m *Memory) InsertRequest(_ context.Context, r idempotency.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if earlier, ok := m.records[[2]string{r.Owner, r.ID}]; ok {
		return earlier.Check(r.Key)
	}
	m.keep(r)
	return nil
}

// Once records a request if its name is free and do succeeds, as a transaction would.
func (m *Memory) Once(key idempotency.Key, resource string, do func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.records[[2]string{key.Owner, key.ID}]; ok {
		return fault.New(fault.AlreadyExists, "REQUEST_ID_REUSED", "request_id %q was used for another request", key.ID)
	}
	if err := do(); err != nil {
		return err
	}
	m.keep(idempotency.NewRecord(key, resource))
	return nil
}

// Sync implements idempotency.Store.
func (m *Memory) Sync(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.syncs++
	return context.Cause(ctx)
}

// Syncs counts the calls of Sync.
func (m *Memory) Syncs() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.syncs
}

func (m *Memory) keep(r idempotency.Record) {
	if m.records == nil {
		m.records = make(map[[2]string]idempotency.Record)
	}
	m.records[[2]string{r.Owner, r.ID}] = r
}
