// Package provision fits the sandboxes of sessions out: with repositories, the ways to
// remotes and models, a memory and an agent. It translates between what a session is
// (internal/session) and those that do the work in the sandbox: workspace, broker, image,
// agent/opencode. It keeps nothing but a client for each guest that it speaks to.
package provision

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	"github.com/harvest-run/executord/internal/broker"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestclient"
	"github.com/harvest-run/executord/internal/image"
	"github.com/harvest-run/executord/internal/secret"
	"github.com/harvest-run/executord/internal/session"
)

// AgentImage is the name of the image that has the agent.
const AgentImage = "base"

// Images makes images. An image.Service is meant.
type Images interface {
	// Ensure returns a build that can be used, and makes one if there is none.
	Ensure(ctx context.Context, engineName, name string, progress func(image.Event)) (image.Build, error)
}

// Config says what a Provisioner works with.
type Config struct {
	Images Images
	Broker *broker.Broker
	// Network is that of the sandboxes; nil if they have none.
	Network *egress.Gateway
	// Secrets are those that the operator named.
	Secrets *secret.Source
	// Identity and Model are those of sessions that name none.
	Identity session.Identity
	Model    session.Model
	// Plain allows repositories over http, which only addresses that the broker may reach
	// have.
	Plain bool
	// Program is the path of OpenCode in the sandbox; "" where the image has it.
	Program string
	Logger  *slog.Logger
}

// Provisioner fits sandboxes out. It is what a session.Service wants as Images,
// Credentials, Workspace and Agents.
type Provisioner struct {
	cfg Config
	log *slog.Logger

	mu     sync.Mutex
	guests map[string]*guest
	closed bool
	work   sync.WaitGroup
}

// guest is the client of a sandbox, until that ends.
type guest struct {
	client *guestclient.Client
	// done is closed when nobody uses it any more.
	done chan struct{}
}

// New makes a Provisioner.
func New(cfg Config) *Provisioner {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Provisioner{cfg: cfg, log: cfg.Logger, guests: make(map[string]*guest)}
}

// Close ends the clients. Sandboxes go on living.
func (p *Provisioner) Close() error {
	p.mu.Lock()
	p.closed = true
	for id, g := range p.guests {
		delete(p.guests, id)
		close(g.done)
	}
	p.mu.Unlock()
	p.work.Wait()
	return nil
}

// guest is the client of a sandbox's guest.
func (p *Provisioner) guest(sb engine.Sandbox) *guestclient.Client {
	p.mu.Lock()
	defer p.mu.Unlock()
	if g, ok := p.guests[sb.ID()]; ok {
		return g.client
	}
	g := &guest{client: guestclient.New(sb), done: make(chan struct{})}
	if p.closed {
		g.client.Close() // whoever uses it is told so
		return g.client
	}
	p.guests[sb.ID()] = g
	p.work.Go(func() {
		defer g.client.Close()
		select {
		case <-sb.Done():
			p.mu.Lock()
			defer p.mu.Unlock()
			if p.guests[sb.ID()] == g {
				delete(p.guests, sb.ID())
			}
		case <-g.done:
		}
	})
	return g.client
}

// Resolve implements session.Images.
func (p *Provisioner) Resolve(ctx context.Context, on, name string, tell func(text string)) (engine.ImageRef, error) {
	if name == "" {
		name = AgentImage
	}
	b, err := p.cfg.Images.Ensure(ctx, on, name, func(e image.Event) {
		if e.Step != nil {
			tell(fmt.Sprintf("building image %s: %s", name, e.Step.Name))
		}
	})
	return b.Ref, err
}
