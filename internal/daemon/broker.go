package daemon

import (
	"fmt"
	"os"

	"github.com/harvest-run/executord/internal/broker"
	"github.com/harvest-run/executord/internal/config"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/secret"
)

// openBroker makes what adds credentials to requests of sandboxes, and finds those that
// the operator named.
func (c Config) openBroker() (*broker.Broker, *secret.Source, error) {
	settings := c.Settings.GetBroker()
	named, err := secret.NewSource(settings.GetSecrets(), os.Getenv)
	if err != nil {
		return nil, nil, fmt.Errorf("broker.secrets: %w", err)
	}
	cfg := broker.Config{Logger: c.Logger}
	for _, text := range settings.GetPrivateUpstreams() {
		rule, err := egress.ParseRule(text)
		if err != nil {
			return nil, nil, fmt.Errorf("broker.private_upstreams: %q: %w", text, err)
		}
		cfg.Private = append(cfg.Private, rule)
	}
	if cfg.Denied, err = config.Prefixes(c.Settings.GetNetwork().GetDeniedCidrs()); err != nil {
		return nil, nil, fmt.Errorf("network.denied_cidrs: %w", err)
	}
	if cfg.Resolver, err = resolver(c.Settings.GetNetwork().GetNameserver()); err != nil {
		return nil, nil, err
	}
	made, err := broker.New(cfg)
	if err != nil {
		return nil, nil, fmt.Errorf("broker.private_upstreams: %w", err)
	}
	return made, named, nil
}
