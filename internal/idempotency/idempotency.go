// Package idempotency lets a request that changes something be repeated. The caller
// names the request; what it made is recorded with that name in one transaction, before
// anything is done about it. A repeat finds the record and is answered with what the
// first made; the name with other parameters is refused. Equal requests at the same time
// wait for the first of them. It knows neither gRPC nor what the requests make.
package idempotency

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

const (
	// Lifetime is how long a request is remembered at least.
	Lifetime = 24 * time.Hour
	// sweepEvery is how often those are forgotten whose Lifetime has passed.
	sweepEvery = 10 * time.Minute
	// sweepBatch bounds one transaction of a sweep, so that starts need not wait for it.
	sweepBatch = 500
)

// Key is the name of a request and what must be the same in a repeat. The zero Key is
// that of a request without a name: it cannot be repeated.
type Key struct {
	// Owner is who asks; names of different owners have nothing to do with each other.
	Owner string
	// ID is the name, "" for none.
	ID string
	// Method is what is asked for, such as "CreateSession".
	Method string
	// Fingerprint stands for the parameters. They cannot be found out from it.
	Fingerprint string
}

// Record is a request that is remembered.
type Record struct {
	Key
	// Resource is the id of what it made or was about.
	Resource   string
	CreateTime time.Time
}

// Check returns a fault AlreadyExists (REQUEST_ID_REUSED) unless key repeats the
// request of the record.
func (r Record) Check(key Key) error {
	if r.Key == key {
		return nil
	}
	what := "with other parameters"
	if r.Method != key.Method {
		what = "for " + r.Method
	}
	return fault.New(fault.AlreadyExists, "REQUEST_ID_REUSED", "request_id %q was used at %s %s",
		key.ID, r.CreateTime.UTC().Format(time.RFC3339), what).With("method", r.Method)
}

// NewRecord makes the record of a request that was made now.
func NewRecord(key Key, resource string) Record {
	return Record{Key: key, Resource: resource, CreateTime: time.Now()}
}

// Store remembers requests. What a call wrote survives kill -9 once it returned nil; it
// survives a power cut once Sync has returned nil after it.
type Store interface {
	// FindRequest reads one; a fault NotFound if there is none.
	FindRequest(ctx context.Context, owner, id string) (Record, error)
	// InsertRequest records one that makes no record of its own. A fault AlreadyExists
	// (REQUEST_ID_REUSED) if its name was used for another; one that repeats it is well.
	InsertRequest(ctx context.Context, r Record) error
	// Sync makes all that was written before it survive a power cut.
	Sync(ctx context.Context) error
}

// Requests keeps equal requests apart that come at the same time. Its zero value with a
// Store is usable.
type Requests struct {
	Store Store

	mu sync.Mutex
	// running has a channel for each request that is being carried out, which is closed
	// when that is through.
	running map[name]chan struct{}
}

type name struct{ owner, id string }

// Begin is called before a request is carried out that makes something. It returns the
// id of what an earlier one with this key made, "" if there was none: then the caller
// carries the request out, and calls done when it is through, whatever came of it. While
// it does, others with the same name wait in Begin. A fault AlreadyExists
// (REQUEST_ID_REUSED) if the name was used for something else. done is never nil.
func (r *Requests) Begin(ctx context.Context, key Key) (resource string, done func(), err error) {
	if key.ID == "" {
		return "", func() {}, nil
	}
	done, err = r.enter(ctx, name{key.Owner, key.ID})
	if err != nil {
		return "", func() {}, err
	}
	earlier, err := r.Store.FindRequest(ctx, key.Owner, key.ID)
	switch {
	case fault.KindOf(err) == fault.NotFound:
		return "", done, nil
	case err == nil:
		err = earlier.Check(key)
	default:
		err = fmt.Errorf("look for request %q: %w", key.ID, err)
	}
	done()
	if err != nil {
		return "", func() {}, err
	}
	return earlier.Resource, func() {}, nil
}

// enter waits until it is the only one with its name.
func (r *Requests) enter(ctx context.Context, n name) (leave func(), err error) {
	for {
		r.mu.Lock()
		other, busy := r.running[n]
		if !busy {
			mine := make(chan struct{})
			if r.running == nil {
				r.running = make(map[name]chan struct{})
			}
			r.running[n] = mine
			r.mu.Unlock()
			return func() {
				r.mu.Lock()
				defer r.mu.Unlock()
				delete(r.running, n)
				close(mine)
			}, nil
		}
		r.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Note records a request that makes nothing and may be carried out again, such as a
// cancel. It is called before the request is carried out; Sync belongs behind that. A
// fault AlreadyExists (REQUEST_ID_REUSED) if the name was used for something else.
func (r *Requests) Note(ctx context.Context, key Key, resource string) error {
	if key.ID == "" {
		return nil
	}
	if err := r.Store.InsertRequest(ctx, NewRecord(key, resource)); err != nil {
		return fmt.Errorf("record request %q: %w", key.ID, err)
	}
	return nil
}

// Sync makes what Note recorded survive a power cut.
func (r *Requests) Sync(ctx context.Context, key Key) error {
	if key.ID == "" {
		return nil
	}
	if err := r.Store.Sync(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("record request %q: %w", key.ID, err)
	}
	return nil
}

// Expirer forgets requests.
type Expirer interface {
	// DeleteRequests removes at most limit that were made before a time, and returns how
	// many it removed.
	DeleteRequests(ctx context.Context, before time.Time, limit int) (int, error)
}

// Sweep forgets requests whose Lifetime has passed, now and then, until ctx ends. What
// fails is logged and tried again.
func Sweep(ctx context.Context, store Expirer, log *slog.Logger) {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		forgotten, err := sweep(ctx, store)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			log.ErrorContext(ctx, "forget old requests", "error", err)
		case forgotten > 0:
			log.InfoContext(ctx, "forgot old requests", "requests", forgotten)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

func sweep(ctx context.Context, store Expirer) (forgotten int, err error) {
	before := time.Now().Add(-Lifetime)
	for {
		n, err := store.DeleteRequests(ctx, before, sweepBatch)
		forgotten += n
		if err != nil || n < sweepBatch {
			return forgotten, err
		}
	}
}
