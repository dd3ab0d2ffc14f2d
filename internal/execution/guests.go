package execution

import (
	"context"
	"sync"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestclient"
)

// guests keeps one connection to the guest of each sandbox that has been used, so
// that a command in a live sandbox costs no dialling.
type guests struct {
	mu   sync.Mutex
	open map[string]*guest
}

// guest is a sandbox that commands are run in.
type guest struct {
	*guestclient.Client
	sandbox engine.Sandbox

	mu     sync.Mutex
	active int          // runs between baseline and spent
	last   engine.Usage // the most that was counted at the end of one of them
	stale  bool         // one ended since and nobody counted, or none has ended yet
}

// baseline is what the commands before have used, for a run that begins. While none of
// ours runs nothing is used, so that what was found at the last end need not be read again.
func (g *guest) baseline(ctx context.Context) (engine.Usage, error) {
	g.mu.Lock()
	g.active++
	last, known := g.last, g.active == 1 && !g.stale
	g.mu.Unlock()
	if known {
		return last, nil
	}
	return g.sandbox.Usage(ctx)
}

// spent ends what baseline began, with what was counted in the end; nil: nobody did.
func (g *guest) spent(used *engine.Usage) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.active--
	if g.stale = used == nil; g.stale {
		return
	}
	// Two that end together may come in either order; what is counted only grows.
	g.last.OOMKills = max(g.last.OOMKills, used.OOMKills)
	g.last.PIDsRefused = max(g.last.PIDsRefused, used.PIDsRefused)
}

func newGuests() *guests { return &guests{open: make(map[string]*guest)} }

// of returns the guest of a sandbox, and whether this is the first call for it.
// Guests of sandboxes that have ended since the last call are given up.
func (g *guests) of(sb engine.Sandbox) (_ *guest, first bool) {
	g.mu.Lock()
	if known, ok := g.open[sb.ID()]; ok && known.sandbox == sb {
		g.mu.Unlock()
		return known, false
	}
	var stale []*guest
	for id, old := range g.open {
		if id == sb.ID() || ended(old.sandbox) {
			delete(g.open, id)
			stale = append(stale, old)
		}
	}
	fresh := &guest{Client: guestclient.New(sb), sandbox: sb, stale: true}
	g.open[sb.ID()] = fresh
	g.mu.Unlock()
	for _, old := range stale {
		old.Close() // not under the lock: it waits for what is under way
	}
	return fresh, true
}

// drop gives up a sandbox that is being ended.
func (g *guests) drop(sb engine.Sandbox) {
	g.mu.Lock()
	known, ok := g.open[sb.ID()]
	if ok = ok && known.sandbox == sb; ok {
		delete(g.open, sb.ID())
	}
	g.mu.Unlock()
	if ok {
		known.Close()
	}
}

// close gives up all.
func (g *guests) close() {
	g.mu.Lock()
	all := g.open
	g.open = make(map[string]*guest)
	g.mu.Unlock()
	for _, open := range all {
		open.Close()
	}
}

// ended says whether a sandbox has.
func ended(sb engine.Sandbox) bool {
	select {
	case <-sb.Done():
		return true
	default:
		return false
	}
}
