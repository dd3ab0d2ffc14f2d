package daemon

import (
	"context"
	"fmt"
	"net"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/config"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/engines"
)

// openNetwork makes the gateway of sandboxes to the network, as far as the engines and
// the settings have one.
func (c Config) openNetwork(all engines.Set) (*egress.Gateway, error) {
	settings := c.Settings.GetNetwork()
	cfg := egress.Config{
		Default: egress.Policy{Mode: networkOf(settings.GetDefaultMode())}, Max: networkOf(settings.GetMaxMode()),
		Capable: make(map[string][]engine.Network), Engine: all.Default().Name(), Logger: c.Logger,
	}
	for _, e := range all {
		cfg.Capable[e.Name()] = capable(e)
	}
	for _, text := range settings.GetDefaultAllow() {
		rule, err := egress.ParseRule(text)
		if err != nil {
			return nil, fmt.Errorf("network.default_allow: %q: %w", text, err)
		}
		cfg.Default.Rules = append(cfg.Default.Rules, rule)
	}
	var err error
	if cfg.Denied, err = config.Prefixes(settings.GetDeniedCidrs()); err != nil {
		return nil, fmt.Errorf("network.denied_cidrs: %w", err)
	}
	if cfg.Resolver, err = resolver(settings.GetNameserver()); err != nil {
		return nil, err
	}
	return egress.New(cfg)
}

// resolver asks the configured DNS server; nil is the host's way.
func resolver(text string) (egress.Resolver, error) {
	nameserver, err := config.Nameserver(text)
	if err != nil {
		return nil, fmt.Errorf("network.nameserver: %w", err)
	}
	if nameserver == "" {
		return nil, nil
	}
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, nameserver)
	}}, nil
}

func networkOf(m configv1.Network_Mode) engine.Network {
	switch m {
	case configv1.Network_MODE_EGRESS:
		return engine.NetworkEgress
	case configv1.Network_MODE_HOST:
		return engine.NetworkHost
	default:
		return engine.NetworkNone
	}
}

// capable are the networks that an engine has.
func capable(e engine.Engine) []engine.Network {
	modes := []engine.Network{engine.NetworkNone}
	for _, c := range e.Capabilities() {
		for _, mode := range []engine.Network{engine.NetworkEgress, engine.NetworkHost} {
			if c.Available && c.Name == "network."+string(mode) {
				modes = append(modes, mode)
			}
		}
	}
	return modes
}
