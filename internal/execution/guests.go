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

	mu sync.Mutex
	// oomKills is the engine's count at the end of the last command, so that a kill
	// is told to the command in whose time it fell.
	oomKills int64
}

func newGuests() *guests { return &guests{open: make(map[string]*guest)} }

// of returns the guest of a sandbox. In one that is used by many commands, what was
// killed before is not told to the next. Entries of sandboxes that have ended since
// the last call are given up.
func (g *guests) of(ctx context.Context, sb engine.Sandbox, shared bool) *guest {
	g.mu.Lock()
	defer g.mu.Unlock()
	if known, ok := g.open[sb.ID()]; ok && known.sandbox == sb {
		return known
	}
	for id, old := range g.open {
		select {
		case <-old.sandbox.Done():
			delete(g.open, id)
			old.Close()
		default:
		}
	}
	fresh := &guest{Client: guestclient.New(sb), sandbox: sb}
	g.open[sb.ID()] = fresh
	if shared {
		fresh.usage(ctx)
	}
	return fresh
}

// drop gives up a sandbox that is being ended.
func (g *guests) drop(sb engine.Sandbox) {
	g.mu.Lock()
	known, ok := g.open[sb.ID()]
	if ok {
		delete(g.open, sb.ID())
	}
	g.mu.Unlock()
	if ok {
		known.Close()
	}
}

func (g *guests) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for id, open := range g.open {
		delete(g.open, id)
		open.Close()
	}
}

// usage reads the engine's accounting and how many processes were killed for memory
// since the last call.
func (g *guest) usage(ctx context.Context) (u engine.Usage, newKills int64) {
	u, err := g.sandbox.Usage(ctx)
	if err != nil {
		return engine.Usage{}, 0 // the result then lacks figures, not truth
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	newKills = u.OOMKills - g.oomKills
	g.oomKills = u.OOMKills
	return u, newKills
}
