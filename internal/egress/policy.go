// Package egress lets programs in sandboxes reach what a policy names, and nothing
// else. A sandbox with such a policy has only a loopback interface; on it the guest
// listens and hands every connection to executord, which serves an HTTP proxy there:
// CONNECT for TLS and all else, absolute http:// requests as they are. The proxy checks
// name and port against the rules, resolves the name itself, refuses addresses that no
// stranger's code should reach, and dials the very address that it checked.
//
// A Gateway has a Proxy for each sandbox, for as long as the sandbox lives. It owns
// their goroutines and waits for them in Close. Every connection is counted and logged;
// paths, headers and contents are not.
package egress

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

const (
	// maxRules bounds the rules of a policy, maxPorts the ports of a rule.
	maxRules = 256
	maxPorts = 16
)

// Policy says what a sandbox may reach.
type Policy struct {
	// Mode is "" for the server's default in what is asked for, and set in what is in force.
	Mode engine.Network `json:"mode,omitempty"`
	// Rules are those of engine.NetworkEgress.
	Rules []Rule `json:"rules,omitempty"`
}

// Rule names what may be reached.
type Rule struct {
	// Host is a name, *.name, an IP address or a CIDR range.
	Host string `json:"host"`
	// Ports are 443 and 80 if there are none.
	Ports []uint16 `json:"ports,omitempty"`
}

// None is the policy of a sandbox without network.
func None() Policy { return Policy{Mode: engine.NetworkNone} }

// Validate returns a fault (Invalid) that names the field that is wrong.
func (p Policy) Validate() error {
	switch p.Mode {
	case "", engine.NetworkNone, engine.NetworkHost:
		if len(p.Rules) > 0 {
			return fault.InvalidField("NETWORK_RULES", "network.rules", "rules go with the mode egress only")
		}
		return nil
	case engine.NetworkEgress:
	default:
		return fault.InvalidField("NETWORK_MODE", "network.mode", "%q is not one of none, egress, host", string(p.Mode))
	}
	if len(p.Rules) == 0 {
		return fault.InvalidField("NETWORK_RULES", "network.rules", "egress without rules reaches nothing: name what may be reached, or ask for the mode none")
	}
	if len(p.Rules) > maxRules {
		return fault.InvalidField("NETWORK_RULES", "network.rules", "has %d rules, at most %d are allowed", len(p.Rules), maxRules)
	}
	for i, rule := range p.Rules {
		field := "network.rules[" + strconv.Itoa(i) + "]"
		if err := checkHost(rule.Host); err != nil {
			return fault.InvalidField("NETWORK_RULE", field+".host", "%q %v", clip(rule.Host), err)
		}
		if len(rule.Ports) > maxPorts {
			return fault.InvalidField("NETWORK_RULE", field+".ports", "has %d ports, at most %d are allowed", len(rule.Ports), maxPorts)
		}
		for j, port := range rule.Ports {
			if port == 0 || slices.Contains(rule.Ports[:j], port) {
				return fault.InvalidField("NETWORK_RULE", fmt.Sprintf("%s.ports[%d]", field, j), "%d is 0 or given twice", port)
			}
		}
	}
	return nil
}

// ParseRule reads HOST or HOST:PORT,PORT…, with an IPv6 address in brackets if ports
// follow.
func ParseRule(text string) (Rule, error) {
	rule := Rule{Host: text}
	host, ports, found := cutPorts(text)
	if found {
		rule.Host = host
		for part := range strings.SplitSeq(ports, ",") {
			port, err := parsePort(part)
			if err != nil {
				return Rule{}, err
			}
			rule.Ports = append(rule.Ports, port)
		}
	}
	return rule, Policy{Mode: engine.NetworkEgress, Rules: []Rule{rule}}.Validate()
}

// String is the inverse of ParseRule.
func (r Rule) String() string {
	if len(r.Ports) == 0 {
		return r.Host
	}
	var ports []string
	for _, port := range r.Ports {
		ports = append(ports, strconv.Itoa(int(port)))
	}
	host := r.Host
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	return host + ":" + strings.Join(ports, ",")
}

// cutPorts cuts the ports off a rule. What has more than one colon and no brackets is
// an IPv6 address or range without ports.
func cutPorts(text string) (host, ports string, found bool) {
	if inner, ok := strings.CutPrefix(text, "["); ok {
		if host, ports, ok := strings.Cut(inner, "]:"); ok {
			return host, ports, true
		}
		return text, "", false
	}
	if strings.Count(text, ":") != 1 || strings.Contains(text, "://") {
		return text, "", false
	}
	host, ports, _ = strings.Cut(text, ":")
	return host, ports, true
}

func parsePort(text string) (uint16, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 || text[0] == '0' || text[0] == '+' {
		return 0, fmt.Errorf("port %q is not a number from 1 to 65535", clip(text))
	}
	return uint16(port), nil
}

// checkHost says what is wrong with the host of a rule.
func checkHost(host string) error {
	switch {
	case host == "":
		return fmt.Errorf("is empty")
	case strings.Contains(host, "://"):
		return fmt.Errorf("has a scheme; only the host goes here")
	case strings.HasPrefix(host, "["):
		return fmt.Errorf("has brackets; an address goes without them")
	case strings.Contains(host, "/"):
		return checkRange(host)
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		switch {
		case addr.Zone() != "":
			return fmt.Errorf("has a zone")
		case addr.Is4In6():
			return fmt.Errorf("is an IPv4 address in IPv6 form: write %s", addr.Unmap())
		case addr.String() != host:
			return fmt.Errorf("is not in its shortest form: write %s", addr)
		}
		return nil
	}
	if strings.Contains(host, ":") {
		return fmt.Errorf("is neither a name nor an address; ports have a field of their own")
	}
	return checkName(strings.TrimPrefix(host, "*."))
}

func checkRange(text string) error {
	prefix, err := netip.ParsePrefix(text)
	switch {
	case err != nil:
		return fmt.Errorf("is not a range of addresses such as 198.51.100.0/24, and a name has no path")
	case prefix.Addr().Is4In6():
		return fmt.Errorf("is an IPv4 range in IPv6 form")
	case prefix != prefix.Masked() || prefix.String() != text:
		return fmt.Errorf("is not the first address of its range: write %s", prefix.Masked())
	}
	return nil
}

// checkName says what is wrong with a name.
func checkName(name string) error {
	if strings.HasSuffix(name, ".") {
		return fmt.Errorf("ends with a dot: names here are always whole")
	}
	if len(name) > 253 {
		return fmt.Errorf("is longer than 253 characters")
	}
	var last string
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return fmt.Errorf("has a part that is empty or longer than 63 characters")
		}
		if label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("has a part that begins or ends with a hyphen")
		}
		for _, r := range label {
			switch {
			case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '-', r == '_':
			case r >= 'A' && r <= 'Z':
				return fmt.Errorf("has capitals: write it in lower case")
			case r > 127:
				return fmt.Errorf("is not ASCII: write an internationalised name in its xn-- form")
			case r == '*':
				return fmt.Errorf("has a wildcard that is not the whole first part, as in *.example.com")
			default:
				return fmt.Errorf("has the character %q, which no name has", r)
			}
		}
		last = label
	}
	// 127.1, 0x7f.0.0.1 and the like are addresses to some programs and names to others.
	if last[0] >= '0' && last[0] <= '9' {
		return fmt.Errorf("ends like an address and is none")
	}
	return nil
}

// clip bounds what is repeated of a text that anybody can have written.
func clip(text string) string {
	const most = 80
	if len(text) > most {
		return strings.ToValidUTF8(text[:most], "") + "…"
	}
	return text
}
