// Package broker lets programs in a sandbox use credentials that they do not have. On
// the sandbox's loopback they find an HTTP server, which is executord's: it passes
// requests on to the upstreams of its routes and adds each one's credential on the way
// out. The credential is in a header of the request to the upstream and nowhere else: not
// in the sandbox, its environment or its disk, and not in a log, an error or the store.
//
// What a route allows, programs can do: the broker keeps credentials from being taken
// away, not from being used. So routes should be narrow (Route.Allow).
//
// A Broker has a Gate for each sandbox that has routes, for as long as the sandbox lives.
// It owns their goroutines and waits for them in Close.
package broker

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/egress/outlet"
	"github.com/harvest-run/executord/internal/secret"
)

const (
	// Port is where programs find the broker, on the loopback of their sandbox.
	Port = 3129
	// webPort is where they find routes with a host, as any web server.
	webPort = 80
	// listenerName and webName are what the guest knows the listeners by.
	listenerName = "broker"
	webName      = "broker-web"
)

// Sandbox is what a Broker needs of one. An engine.Sandbox is meant.
type Sandbox = outlet.Sandbox

// Secrets finds the credential of a route each time it is used. A *secret.Bag is meant.
type Secrets interface {
	Lookup(name string) (secret.Value, error)
}

// Config says what a Broker reaches.
type Config struct {
	// Private are addresses, and only those of their ports, that upstreams may have
	// although they are private or special. Their Host is an address or a CIDR range. Only these may be
	// spoken to without TLS.
	Private []egress.Rule
	// Denied are addresses that no upstream may have.
	Denied []netip.Prefix
	// Resolver resolves names; nil as the host does.
	Resolver egress.Resolver
	// Dial connects to an address; nil as the host does.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Roots are the authorities of upstreams; nil as the host has them.
	Roots *x509.CertPool
	// Logger gets a line for every request, without paths, headers and contents; nil
	// drops them.
	Logger *slog.Logger
}

// Broker keeps a Gate for each sandbox that has routes.
type Broker struct {
	cfg         Config
	connections chan struct{}
	closing     chan struct{}
	work        sync.WaitGroup

	mu     sync.Mutex
	closed bool
	gates  map[string]*Gate
}

var errClosed = errors.New("executord is stopping")

// New makes a Broker.
func New(cfg Config) (*Broker, error) {
	for _, rule := range cfg.Private {
		if _, err := netip.ParsePrefix(rule.Host); err != nil {
			if _, err := netip.ParseAddr(rule.Host); err != nil {
				return nil, fmt.Errorf("private upstream %q is neither an address nor a range", rule.Host)
			}
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Broker{
		cfg: cfg, connections: make(chan struct{}, outlet.MaxAll), closing: make(chan struct{}), gates: make(map[string]*Gate),
	}, nil
}

// Open gives a sandbox routes, until the sandbox ends or the Broker is closed. When it
// returns nil connections are taken. The routes of a sandbox that has some already are
// replaced, for requests that begin from then on. Faults: Invalid for a route that cannot be.
func (b *Broker) Open(ctx context.Context, sb Sandbox, routes []Route, secrets Secrets) (*Gate, error) {
	t, err := b.table(routes, secrets)
	if err != nil {
		return nil, err
	}
	if err := outlet.Listen(ctx, sb, listenerName, Port); err != nil {
		return nil, err
	}
	if t.web {
		if err := outlet.Listen(ctx, sb, webName, webPort); err != nil {
			return nil, err
		}
	}
	return b.resume(sb, t)
}

// Resume is Open for a sandbox that an executord before this one opened. It asks the
// guest nothing: that comes with the first connection.
func (b *Broker) Resume(sb Sandbox, routes []Route, secrets Secrets) (*Gate, error) {
	t, err := b.table(routes, secrets)
	if err != nil {
		return nil, err
	}
	return b.resume(sb, t)
}

func (b *Broker) resume(sb Sandbox, t *table) (*Gate, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, errClosed
	}
	g, ok := b.gates[sb.ID()]
	if !ok {
		g = newGate(b, sb.ID())
		b.gates[sb.ID()] = g
		b.work.Go(func() {
			select {
			case <-sb.Done():
			case <-b.closing:
			}
			b.mu.Lock()
			delete(b.gates, sb.ID())
			b.mu.Unlock()
			g.close()
		})
	}
	g.table.Store(t)
	g.serveOn(Port, outlet.Guest(sb, listenerName, Port))
	if t.web {
		g.serveOn(webPort, outlet.Guest(sb, webName, webPort))
	}
	return g, nil
}

// Of returns the Gate of a sandbox; nil if it has no routes.
func (b *Broker) Of(sandbox string) *Gate {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.gates[sandbox]
}

// Close ends all requests and waits for everything. Sandboxes go on living; what they
// ask for is reset by their guests.
func (b *Broker) Close() error {
	b.mu.Lock()
	if !b.closed {
		b.closed = true
		close(b.closing)
	}
	b.mu.Unlock()
	b.work.Wait()
	return nil
}
