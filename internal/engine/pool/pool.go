// Package pool keeps sandboxes ready, so that who needs one need not wait until it is
// made. It works over any engine by its waist. What it hands out is like any other
// sandbox, is used once and never comes back.
//
// One goroutine, Run's, makes and ends sandboxes, one at a time; a further one for each
// sandbox that is ready waits for its end. Run waits for them.
package pool

import (
	"context"
	"errors"
	"log/slog"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/engine"
)

// Config says what a Pool works with.
type Config struct {
	Engine engine.Engine
	// Size is how many are kept ready of each kind; 0 turns the pool off.
	Size int
	// MaxAge is how long one stays ready before a fresh one takes its place, and how
	// long a kind is kept that nobody asks for; 0 stands for DefaultMaxAge.
	MaxAge time.Duration
	// MaxKinds bounds the kinds; 0 stands for DefaultMaxKinds.
	MaxKinds int
	// Delay lies between a claim and the making of the next one, which would otherwise
	// compete with the command that just got its sandbox; 0 stands for DefaultDelay.
	Delay time.Duration
	// Busy says that nothing should be made now; nil never does.
	Busy   func() bool
	Logger *slog.Logger
}

// What a Config gets that says nothing else.
const (
	DefaultMaxAge   = 10 * time.Minute
	DefaultMaxKinds = 8
	DefaultDelay    = 100 * time.Millisecond
)

// Stats tells how a Pool does.
type Stats struct {
	// Size is the Config's.
	Size int
	// Ready are the sandboxes that are.
	Ready int
	// Hits and Misses count the claims that were and were not met.
	Hits, Misses int64
}

// Pool keeps sandboxes ready while Run runs. Make one with New.
type Pool struct {
	cfg      Config
	log      *slog.Logger
	defaults engine.Limits
	changed  chan struct{} // wakes the owner
	watchers sync.WaitGroup
	unsure   []string // names of sandboxes that may be there; the owner's

	mu       sync.Mutex
	open     bool // between the beginning of Run and Drain
	drained  bool
	stop     context.CancelCauseFunc // ends what the owner does
	kinds    []*kind                 // the one that was asked for last comes first
	retired  []engine.Sandbox        // to be ended
	hits     int64
	misses   int64
	failures int       // in a row
	notUntil time.Time // when the next may be made after a failure
}

// kind is what sandboxes are of that are the same but for their names.
type kind struct {
	spec  engine.Spec // without ID
	first bool        // the one that is there from the start and stays
	asked time.Time
	ready []*spare // the oldest first
	// due is when the next one may be made; zero for at once.
	due time.Time
}

// spare is a sandbox that is ready.
type spare struct {
	engine.Sandbox
	made  time.Time
	taken chan struct{} // closed when it is not one any more
}

var errDrained = errors.New("the pool was drained")

// New makes a Pool. It has nothing before Run is called.
func New(cfg Config) *Pool {
	if cfg.MaxAge <= 0 {
		cfg.MaxAge = DefaultMaxAge
	}
	if cfg.MaxKinds <= 0 {
		cfg.MaxKinds = DefaultMaxKinds
	}
	if cfg.Delay <= 0 {
		cfg.Delay = DefaultDelay
	}
	if cfg.Busy == nil {
		cfg.Busy = func() bool { return false }
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	defaults := cfg.Engine.DefaultLimits()
	return &Pool{
		cfg: cfg, log: cfg.Logger, defaults: defaults, changed: make(chan struct{}, 1),
		kinds: []*kind{{spec: engine.Spec{Limits: defaults}, first: true}},
	}
}

// Claim takes a sandbox that is as spec says but for its name and labels; false if none is
// ready. It never waits. Those that are kept ready differ in network and image only: one
// with other limits than the engine's own, or with volumes, secrets or a placement, is
// never ready, nor one that has to live longer than those that are. Whoever asks for an
// image says that it is going to be asked for again.
func (p *Pool) Claim(spec engine.Spec) (engine.Sandbox, bool) {
	lifetime := spec.Lifetime
	spec.ID, spec.Limits, spec.Labels, spec.Lifetime = "", spec.Limits.Or(p.defaults), nil, 0
	// Compared as a whole, so that what a Spec may have one day counts as well.
	if !reflect.DeepEqual(spec, engine.Spec{Limits: p.defaults, Network: spec.Network, Image: spec.Image}) {
		return nil, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.open {
		return nil, false
	}
	defer p.wake()
	now := time.Now()
	k := p.kindLocked(spec, now)
	if k.due.IsZero() {
		k.due = now.Add(p.cfg.Delay)
	}
	for i := 0; i < len(k.ready); {
		s := k.ready[i]
		switch {
		case s.ended():
			p.retired = append(p.retired, k.take(i).Sandbox)
		case !s.lives(now.Add(lifetime)):
			i++ // a fresher one may
		default:
			p.hits++
			return k.take(i).Sandbox, true
		}
	}
	p.misses++
	return nil, false
}

// Stats tells how it does.
func (p *Pool) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	stats := Stats{Size: p.cfg.Size, Hits: p.hits, Misses: p.misses}
	for _, k := range p.kinds {
		stats.Ready += len(k.ready)
	}
	return stats
}

// Drain makes nothing any more and has Run end what is ready. It does not wait.
func (p *Pool) Drain() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open, p.drained = false, true
	if p.stop != nil {
		p.stop(errDrained)
	}
}

// kindLocked finds the kind that a spec is of, and remembers that it was asked for.
// The one that was not asked for the longest gives way to a new one.
func (p *Pool) kindLocked(spec engine.Spec, now time.Time) *kind {
	// Compared with all that is in it: who asks for one thing must never get another.
	at := slices.IndexFunc(p.kinds, func(k *kind) bool { return reflect.DeepEqual(k.spec, spec) })
	var k *kind
	if at >= 0 {
		k = p.kinds[at]
		p.kinds = slices.Delete(p.kinds, at, at+1)
	} else {
		k = &kind{spec: spec}
		for i := len(p.kinds) - 1; len(p.kinds) >= p.cfg.MaxKinds && i >= 0; i-- {
			if !p.kinds[i].first {
				p.retireLocked(p.kinds[i])
				p.kinds = slices.Delete(p.kinds, i, i+1)
			}
		}
	}
	k.asked = now
	p.kinds = slices.Insert(p.kinds, 0, k)
	return k
}

// retireLocked takes out all that is ready of a kind.
func (p *Pool) retireLocked(k *kind) {
	for len(k.ready) > 0 {
		p.retired = append(p.retired, k.take(0).Sandbox)
	}
}

// wake has the owner look again.
func (p *Pool) wake() {
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// take takes one out.
func (k *kind) take(i int) *spare {
	s := k.ready[i]
	k.ready = slices.Delete(k.ready, i, i+1)
	close(s.taken)
	return s
}

// lives says whether the engine lets it live until then.
func (s *spare) lives(until time.Time) bool {
	deadline := s.Deadline()
	return deadline.IsZero() || !deadline.Before(until)
}

func (s *spare) ended() bool {
	select {
	case <-s.Done():
		return true
	default:
		return false
	}
}
