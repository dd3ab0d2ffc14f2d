package cli

import (
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// networkFlags say what a sandbox may reach.
type networkFlags struct {
	mode  string
	allow []string
}

func (f *networkFlags) bind(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.mode, "network", "", "network of the sandbox: none, egress (what --allow names) or host (default the server's)")
	flags.StringArrayVar(&f.allow, "allow", nil, "let it reach HOST[:PORT,...]: a name, *.name, IP or CIDR, ports 443 and 80 by default; may be repeated")
	completeWith(cmd, "network", "none", "egress", "host")
}

// policy is what the flags say; nil if they say nothing.
func (f *networkFlags) policy() (*executorv1.NetworkPolicy, error) {
	p := &executorv1.NetworkPolicy{}
	switch f.mode {
	case "none":
		p.Mode = executorv1.NetworkPolicy_MODE_NONE
	case "host":
		p.Mode = executorv1.NetworkPolicy_MODE_HOST
	case "egress":
		p.Mode = executorv1.NetworkPolicy_MODE_EGRESS
		if len(f.allow) == 0 {
			return nil, usagef("--network egress reaches nothing without --allow HOST")
		}
	case "":
		if len(f.allow) == 0 {
			return nil, nil
		}
		p.Mode = executorv1.NetworkPolicy_MODE_EGRESS
	default:
		return nil, usagef("--network %q: must be none, egress or host", f.mode)
	}
	if len(f.allow) > 0 && p.GetMode() != executorv1.NetworkPolicy_MODE_EGRESS {
		return nil, usagef("--allow goes with --network egress, not with %s", f.mode)
	}
	for _, text := range f.allow {
		rule, err := parseAllow(text)
		if err != nil {
			return nil, err
		}
		p.Rules = append(p.Rules, rule)
	}
	return p, nil
}

// parseAllow reads HOST[:PORT,...], with an IPv6 address in brackets if ports follow.
// Whether HOST is one the server says.
func parseAllow(text string) (*executorv1.EgressRule, error) {
	host, ports, found := text, "", false
	if inner, ok := strings.CutPrefix(text, "["); ok {
		host, ports, found = strings.Cut(inner, "]:")
		if !found {
			return nil, usagef("--allow %q: must be HOST or HOST:PORT,...", text)
		}
	} else if strings.Count(text, ":") == 1 {
		host, ports, found = strings.Cut(text, ":")
	}
	rule := &executorv1.EgressRule{Host: strings.ToLower(host)}
	if host == "" || strings.Contains(text, "://") {
		return nil, usagef("--allow %q: must be HOST or HOST:PORT,..., without a scheme", text)
	}
	if !found {
		return rule, nil
	}
	for part := range strings.SplitSeq(ports, ",") {
		port, err := strconv.ParseUint(part, 10, 16)
		if err != nil || port == 0 {
			return nil, usagef("--allow %q: port %q is not a number from 1 to 65535", text, part)
		}
		rule.Ports = append(rule.Ports, uint32(port))
	}
	return rule, nil
}
