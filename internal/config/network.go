package config

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
)

// checkNetwork checks what the rules in the message cannot say. What a rule of the
// default policy looks like is checked by those who follow it.
func (l *loader) checkNetwork(n *configv1.Network) {
	l.check("network.default_mode", func() error {
		if n.GetDefaultMode() > n.GetMaxMode() {
			return fmt.Errorf("%s is more than network.max_mode, %s", modeName(n.GetDefaultMode()), modeName(n.GetMaxMode()))
		}
		return nil
	}())
	l.check("network.default_allow", func() error {
		egress := n.GetDefaultMode() == configv1.Network_MODE_EGRESS
		if egress != (len(n.GetDefaultAllow()) > 0) {
			return errors.New("it goes with network.default_mode egress, and that with it")
		}
		return nil
	}())
	l.check("network.denied_cidrs", func() error {
		_, err := Prefixes(n.GetDeniedCidrs())
		return err
	}())
	l.check("network.nameserver", func() error {
		_, err := Nameserver(n.GetNameserver())
		return err
	}())
}

func modeName(m configv1.Network_Mode) string {
	return strings.ToLower(strings.TrimPrefix(m.String(), "MODE_"))
}

// Prefixes reads ranges of addresses.
func Prefixes(texts []string) ([]netip.Prefix, error) {
	var prefixes []netip.Prefix
	for _, text := range texts {
		prefix, err := netip.ParsePrefix(text)
		if err != nil || prefix != prefix.Masked() || prefix.Addr().Is4In6() {
			return nil, fmt.Errorf("%q is not a range of addresses such as 10.0.0.0/8", text)
		}
		prefixes = append(prefixes, prefix)
	}
	return prefixes, nil
}

// Nameserver reads the address of a DNS server, port 53 if it names none; "" is none.
func Nameserver(text string) (string, error) {
	if text == "" {
		return "", nil
	}
	if addr, err := netip.ParseAddr(text); err == nil {
		return netip.AddrPortFrom(addr, 53).String(), nil
	}
	addr, err := netip.ParseAddrPort(text)
	if err != nil || addr.Port() == 0 {
		return "", fmt.Errorf("%q is neither IP nor IP:PORT", text)
	}
	return addr.String(), nil
}
