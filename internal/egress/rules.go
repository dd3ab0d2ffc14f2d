package egress

import (
	"net"
	"net/netip"
	"slices"
	"strings"
)

// Reasons of refusals, as they are logged and told.
const (
	notListed      = "NOT_LISTED"
	portNotListed  = "PORT_NOT_LISTED"
	specialAddress = "SPECIAL_ADDRESS"
	deniedAddress  = "DENIED_BY_OPERATOR"
	badTarget      = "BAD_TARGET"
)

// target is what a client of the proxy wants to reach.
type target struct {
	// name is lower-case ASCII; "" if addr is set.
	name string
	addr netip.Addr
	port uint16
}

// parseTarget reads HOST:PORT as a client sends it. Without a port it has the
// default; 0 makes it required.
func parseTarget(authority string, port uint16) (target, error) {
	host, text, err := net.SplitHostPort(authority)
	switch {
	case err == nil:
		if port, err = parsePort(text); err != nil {
			return target{}, refuse(badTarget, "%v", err)
		}
	case port == 0:
		return target{}, refuse(badTarget, "%q is not HOST:PORT", clip(authority))
	default:
		host = authority
		if inner, ok := strings.CutPrefix(host, "["); ok {
			host, ok = strings.CutSuffix(inner, "]")
			if !ok {
				return target{}, refuse(badTarget, "%q is not a host", clip(authority))
			}
		}
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr.Zone() != "" {
			return target{}, refuse(badTarget, "%q has a zone, which only means something inside", clip(host))
		}
		return target{addr: addr.Unmap(), port: port}, nil
	}
	name := strings.TrimSuffix(strings.ToLower(host), ".")
	if err := checkName(name); err != nil {
		return target{}, refuse(badTarget, "%q %v", clip(host), err)
	}
	return target{name: name, port: port}, nil
}

// host is the target's without the port.
func (t target) host() string {
	if t.name != "" {
		return t.name
	}
	return t.addr.String()
}

// rules are a policy's, ready to be asked.
type rules struct {
	names  []nameRule
	ranges []rangeRule
	// denied are never reached.
	denied []netip.Prefix
}

type nameRule struct {
	// suffix is the name, or for a wildcard what follows the asterisk, dot included.
	suffix string
	ports  []uint16
}

type rangeRule struct {
	prefix netip.Prefix
	ports  []uint16
}

// compile makes rules of a valid policy.
func compile(p Policy, denied []netip.Prefix) rules {
	r := rules{denied: denied}
	for _, rule := range p.Rules {
		ports := rule.Ports
		if len(ports) == 0 {
			ports = []uint16{443, 80}
		}
		if addr, err := netip.ParseAddr(rule.Host); err == nil {
			r.ranges = append(r.ranges, rangeRule{netip.PrefixFrom(addr, addr.BitLen()), ports})
		} else if prefix, err := netip.ParsePrefix(rule.Host); err == nil {
			r.ranges = append(r.ranges, rangeRule{prefix, ports})
		} else {
			r.names = append(r.names, nameRule{strings.TrimPrefix(rule.Host, "*"), ports})
		}
	}
	return r
}

// check refuses a target by what can be seen before its name is resolved.
func (r rules) check(t target) error {
	if t.name == "" {
		return r.checkAddr(t.addr, t)
	}
	listed := false
	for _, rule := range r.names {
		wild := strings.HasPrefix(rule.suffix, ".")
		if rule.suffix != t.name && (!wild || !strings.HasSuffix(t.name, rule.suffix)) {
			continue
		}
		if wild && isMetadataName(t.name) {
			continue // a wildcard can hardly mean the host's credentials
		}
		if slices.Contains(rule.ports, t.port) {
			return nil
		}
		listed = true
	}
	if listed {
		return refuse(portNotListed, "a rule names %s, but not its port %d", t.name, t.port).
			allowedBy(allow(t.name, t.port))
	}
	return refuse(notListed, "no rule names %s", t.name).allowedBy(allow(t.name, t.port))
}

// checkAddr refuses an address: the target itself, or what its name, which a rule
// names, resolved to.
func (r rules) checkAddr(addr netip.Addr, t target) error {
	special := false
	named, explicit := false, false
	otherPort := false
	for _, form := range forms(addr) {
		for _, prefix := range r.denied {
			if prefix.Contains(form) {
				return refuse(deniedAddress, "%s lies in %s, which the operator of executord denies to all sandboxes", describe(addr, t), prefix)
			}
		}
		within, is := specialRange(form)
		special = special || is
		for _, rule := range r.ranges {
			switch {
			case !rule.prefix.Contains(form):
			case !slices.Contains(rule.ports, t.port):
				otherPort = true
			default:
				named = true
				// A range that is wider than the special one does not mean it.
				explicit = explicit || is && rule.prefix.Bits() >= within.Bits()
			}
		}
	}
	switch {
	case special && !explicit:
		return refuse(specialAddress, "%s is %s; it is reached only if a rule names that address and port", describe(addr, t), kindOf(addr)).
			allowedBy(allow(addr.String(), t.port))
	case named || special || t.name != "":
		return nil
	case otherPort:
		return refuse(portNotListed, "a rule names %s, but not its port %d", addr, t.port).
			allowedBy(allow(addr.String(), t.port))
	}
	return refuse(notListed, "no rule names the address %s", addr).allowedBy(allow(addr.String(), t.port))
}

// allow is the rule for a host and a port.
func allow(host string, port uint16) string {
	if port == 443 || port == 80 {
		return host
	}
	return Rule{Host: host, Ports: []uint16{port}}.String()
}

func describe(addr netip.Addr, t target) string {
	if t.name != "" {
		return t.name + " resolves to " + addr.String() + ", which"
	}
	return addr.String()
}
