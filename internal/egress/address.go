package egress

import (
	"net/netip"
	"slices"
)

// special is a range of addresses that are not simply somewhere in the Internet.
type special struct {
	prefix netip.Prefix
	kind   string
}

// specials are the ranges of the IANA's registries of special-purpose addresses, and
// those that clouds use for themselves, the narrower ones first.
func specials() []special {
	all := []struct{ prefix, kind string }{
		{"169.254.169.254/32", "the metadata service of the host's cloud"},
		{"168.63.129.16/32", "the platform service of the host's cloud"},
		{"100.100.100.200/32", "the metadata service of the host's cloud"},
		{"fd00:ec2::254/128", "the metadata service of the host's cloud"},
		{"0.0.0.0/8", "an unspecified address"},
		{"10.0.0.0/8", "a private address"},
		{"100.64.0.0/10", "an address of a carrier's own network"},
		{"127.0.0.0/8", "a loopback address of the host"},
		{"169.254.0.0/16", "a link-local address"},
		{"172.16.0.0/12", "a private address"},
		{"192.0.0.0/24", "an address reserved for protocols"},
		{"192.0.2.0/24", "an address for documentation"},
		{"192.88.99.0/24", "a 6to4 relay"},
		{"192.168.0.0/16", "a private address"},
		{"198.18.0.0/15", "an address for benchmarks"},
		{"198.51.100.0/24", "an address for documentation"},
		{"203.0.113.0/24", "an address for documentation"},
		{"224.0.0.0/4", "a multicast address"},
		{"255.255.255.255/32", "the broadcast address"},
		{"240.0.0.0/4", "a reserved address"},
		{"::/128", "the unspecified address"},
		{"::1/128", "the loopback address of the host"},
		{"::/96", "an IPv4 address in an abandoned form"},
		{"64:ff9b:1::/48", "an address of a local translator"},
		{"100::/64", "an address for discarding"},
		{"2001:db8::/32", "an address for documentation"},
		{"2001::/23", "an address reserved for protocols"},
		{"3fff::/20", "an address for documentation"},
		{"fc00::/7", "a private address"},
		{"fe80::/10", "a link-local address"},
		{"fec0::/10", "a private address"},
		{"ff00::/8", "a multicast address"},
	}
	ranges := make([]special, len(all))
	for i, s := range all {
		ranges[i] = special{netip.MustParsePrefix(s.prefix), s.kind}
	}
	return ranges
}

// isMetadataName says whether clouds tell the host its credentials under this name.
func isMetadataName(name string) bool {
	return slices.Contains([]string{
		"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal",
		"metadata.azure.internal", "metadata.tencentyun.com",
	}, name)
}

// forms are an address and the IPv4 address that it stands for, if it does.
func forms(addr netip.Addr) []netip.Addr {
	addr = addr.Unmap().WithZone("")
	all := []netip.Addr{addr}
	if !addr.Is6() {
		return all
	}
	b := addr.As16()
	switch {
	case netip.MustParsePrefix("64:ff9b::/96").Contains(addr): // NAT64
		all = append(all, netip.AddrFrom4([4]byte(b[12:16])))
	case netip.MustParsePrefix("2002::/16").Contains(addr): // 6to4
		all = append(all, netip.AddrFrom4([4]byte(b[2:6])))
	}
	return all
}

// specialRange returns the special range that a form of an address lies in.
func specialRange(form netip.Addr) (netip.Prefix, bool) {
	s, ok := find(form)
	return s.prefix, ok
}

// kindOf says what an address with a special form is.
func kindOf(addr netip.Addr) string {
	for _, form := range forms(addr) {
		if s, ok := find(form); ok {
			return s.kind
		}
	}
	return "an address like any other"
}

func find(form netip.Addr) (special, bool) {
	for _, s := range specials() {
		if s.prefix.Contains(form) {
			return s, true
		}
	}
	if form.Is6() && !netip.MustParsePrefix("2000::/3").Contains(form) && !netip.MustParsePrefix("64:ff9b::/96").Contains(form) {
		return special{netip.PrefixFrom(form, 3).Masked(), "an address that nobody has been given"}, true
	}
	return special{}, false
}

// IsSpecial says whether an address is reached only where a rule names it: whether it is not
// simply somewhere in the Internet.
func IsSpecial(addr netip.Addr) bool {
	for _, form := range forms(addr) {
		if _, is := find(form); is {
			return true
		}
	}
	return false
}
