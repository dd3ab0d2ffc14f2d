package egress

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/harvest-run/executord/internal/egress/outlet"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

const (
	// Port is where programs find the proxy, on the loopback of their sandbox.
	Port = 3128
	// listenerName is what the guest knows the listener by.
	listenerName = "egress"
)

// Sandbox is what a Gateway needs of one. An engine.Sandbox is meant.
type Sandbox = outlet.Sandbox

// Config says what a Gateway lets through.
type Config struct {
	// Default is the policy of who asks for none.
	Default Policy
	// Max is the most that may be asked for.
	Max engine.Network
	// Capable are the modes that each engine has, by its name.
	Capable map[string][]engine.Network
	// Engine is the one that must have Default.
	Engine string
	// Denied are addresses that no policy can name.
	Denied []netip.Prefix
	// Resolver resolves names; nil as the host does.
	Resolver Resolver
	// Dial connects to an address; nil as the host does.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Logger gets a line for every connection; nil drops them.
	Logger *slog.Logger
}

// Gateway keeps a Proxy for each sandbox that has a network.
type Gateway struct {
	cfg         Config
	connections chan struct{}
	closing     chan struct{}
	work        sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	proxies map[string]*Proxy
}

var errClosed = errors.New("executord is stopping")

// New makes a Gateway.
func New(cfg Config) (*Gateway, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Max == "" {
		cfg.Max = engine.NetworkNone
	}
	if cfg.Default.Mode == "" {
		cfg.Default.Mode = engine.NetworkNone
	}
	g := &Gateway{
		cfg: cfg, connections: make(chan struct{}, outlet.MaxAll), closing: make(chan struct{}), proxies: make(map[string]*Proxy),
	}
	if _, err := g.Decide(cfg.Engine, cfg.Default); err != nil {
		return nil, fmt.Errorf("the default network policy: %w", err)
	}
	return g, nil
}

// Decide returns the policy that a sandbox on an engine gets whose maker asks for one; "" as its
// mode asks for the default. Faults: Invalid, and FailedPrecondition with reason
// NETWORK_NOT_ALLOWED by the operator or NETWORK_NOT_AVAILABLE here. A nil Gateway
// gives no network.
func (g *Gateway) Decide(on string, asked Policy) (Policy, error) {
	if err := asked.Validate(); err != nil {
		return Policy{}, err
	}
	cfg := Config{Default: None(), Max: engine.NetworkNone}
	if g != nil {
		cfg = g.cfg
	}
	if asked.Mode == "" {
		asked = cfg.Default
	}
	order := []engine.Network{engine.NetworkNone, engine.NetworkEgress, engine.NetworkHost}
	switch {
	case slices.Index(order, asked.Mode) > slices.Index(order, cfg.Max):
		return Policy{}, fault.New(fault.FailedPrecondition, "NETWORK_NOT_ALLOWED",
			"network %s is more than this executord gives out (%s); its operator can change that: --network-max-mode %s", asked.Mode, cfg.Max, asked.Mode).
			With("max_mode", string(cfg.Max))
	case asked.Mode != engine.NetworkNone && !slices.Contains(cfg.Capable[on], asked.Mode):
		return Policy{}, fault.New(fault.FailedPrecondition, "NETWORK_NOT_AVAILABLE",
			"the engine %s has no network %s here; executorctl doctor says why", on, asked.Mode).With("engine", on)
	}
	return asked, nil
}

// Open gives a sandbox what a policy lets it reach, until the sandbox ends or the
// Gateway is closed. It must be called before the first command runs; when it returns
// nil connections are taken.
func (g *Gateway) Open(ctx context.Context, sb Sandbox, policy Policy) (*Proxy, error) {
	if policy.Mode == engine.NetworkEgress {
		if err := outlet.Listen(ctx, sb, listenerName, Port); err != nil {
			return nil, err
		}
	}
	return g.Resume(sb, policy)
}

// Resume is Open for a sandbox that an executord before this one opened. It asks the
// guest nothing: that comes with the first connection.
func (g *Gateway) Resume(sb Sandbox, policy Policy) (*Proxy, error) {
	if policy.Mode == engine.NetworkNone || policy.Mode == "" {
		return nil, nil
	}
	if g == nil {
		return nil, errClosed
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, errClosed
	}
	if known, ok := g.proxies[sb.ID()]; ok {
		return known, nil
	}
	p := newProxy(g, sb.ID(), policy, outlet.Guest(sb, listenerName, Port))
	g.proxies[sb.ID()] = p
	g.work.Go(func() {
		select {
		case <-sb.Done():
		case <-g.closing:
		}
		g.mu.Lock()
		delete(g.proxies, sb.ID())
		g.mu.Unlock()
		p.close()
	})
	return p, nil
}

// Of returns the Proxy of a sandbox; nil if it has no network.
func (g *Gateway) Of(sandbox string) *Proxy {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.proxies[sandbox]
}

// Close ends all connections and waits for everything. Sandboxes go on living; what
// they try to reach is reset by their guests.
func (g *Gateway) Close() error {
	g.mu.Lock()
	if !g.closed {
		g.closed = true
		close(g.closing)
	}
	g.mu.Unlock()
	g.work.Wait()
	return nil
}
