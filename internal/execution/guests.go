package execution

import (
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
	fresh := &guest{Client: guestclient.New(sb), sandbox: sb}
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
