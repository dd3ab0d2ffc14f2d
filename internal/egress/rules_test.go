package egress

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
)

func policyOf(t testing.TB, texts ...string) Policy {
	t.Helper()
	p := Policy{Mode: engine.NetworkEgress}
	for _, text := range texts {
		rule, err := ParseRule(text)
		if err != nil {
			t.Fatal(err)
		}
		p.Rules = append(p.Rules, rule)
	}
	return p
}

// reasonOf is that of a refusal; "" for none.
func reasonOf(t testing.TB, err error) string {
	t.Helper()
	if err == nil {
		return ""
	}
	r, ok := errors.AsType[*refusal](err)
	if !ok {
		t.Fatalf("%v is no refusal", err)
	}
	return r.reason
}

func TestNames(t *testing.T) {
	rules := []string{"pypi.org", "*.pythonhosted.org", "git.example:22,443", "*.cloud.internal", "metadata.goog:80"}
	for target, want := range map[string]string{
		"pypi.org:443":                  "",
		"pypi.org:80":                   "",
		"PyPI.org:443":                  "",
		"pypi.org.:443":                 "",
		"pypi.org:8080":                 portNotListed,
		"www.pypi.org:443":              notListed,
		"notpypi.org:443":               notListed,
		"pypi.org.evil.example:443":     notListed,
		"org:443":                       notListed,
		"files.pythonhosted.org:443":    "",
		"a.b.pythonhosted.org:443":      "",
		"pythonhosted.org:443":          notListed,
		"evilpythonhosted.org:443":      notListed,
		".pythonhosted.org:443":         badTarget,
		"x.pythonhosted.org.evil.a:443": notListed,
		"git.example:22":                "",
		"git.example:443":               "",
		"git.example:80":                portNotListed,
		"a.cloud.internal:443":          "",
		"metadata.goog:80":              "", // named exactly; its address has to be, too
		"metadata.google.internal:80":   notListed,
		"localhost:80":                  notListed,
	} {
		parsed, err := parseTarget(target, 0)
		if err == nil {
			err = compile(policyOf(t, rules...), nil).check(parsed)
		}
		if got := reasonOf(t, err); got != want {
			t.Errorf("%s: %q (%v), want %q", target, got, err, want)
		}
	}
	wild := compile(policyOf(t, "*.google.internal", "*.internal"), nil)
	if err := wild.check(target{name: "metadata.google.internal", port: 80}); reasonOf(t, err) != notListed {
		t.Errorf("a wildcard opens the metadata service: %v", err)
	}
}

// Every way to write an address that leads to where no sandbox should get.
func TestSpecialAddresses(t *testing.T) {
	open := compile(policyOf(t, "any.example", "0.0.0.0/0", "::/0"), nil)
	for _, text := range []string{
		"127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.1.1",
		"100.64.0.1", "100.127.255.255", "100.100.100.200", "169.254.169.254", "169.254.0.1", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.19.255.255",
		"198.51.100.1", "203.0.113.1", "192.88.99.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
		"::", "::1", "::2", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:0:127.0.0.1",
		"64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1.1.1.1", "64:ff9b:1::10.0.0.1",
		"2002:7f00:1::", "2002:0a00:0001::1", "2002:a9fe:a9fe::", "2002:c0a8:101::1",
		"fc00::1", "fd00::1", "fd00:ec2::254", "fdff::1", "fe80::1", "febf::1", "fec0::1", "ff02::1", "ff0e::1", "100::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
		"2001:db8::1", "3fff::1", "4000::1", "5f00::1", "8000::1", "e000::1",
	} {
		addr := netip.MustParseAddr(text)
		for _, name := range []string{"", "any.example"} {
			to := target{name: name, port: 443}
			if name == "" {
				to.addr = addr.Unmap()
			}
			err := open.checkAddr(addr, to)
			if reasonOf(t, err) != specialAddress {
				t.Errorf("%s for %q: %v", text, name, err)
			} else if !strings.Contains(err.Error(), " is ") || strings.Contains(err.Error(), "like any other") {
				t.Errorf("%s: it does not say what it is: %v", text, err)
			}
		}
	}
	for _, text := range []string{
		"1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.1", "169.253.255.255", "169.255.0.0",
		"172.15.255.255", "172.32.0.0", "192.0.1.1", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255",
		"2606:4700:4700::1111", "2a00:1450:4001::1", "2002:101:101::1", "64:ff9b::1.1.1.1", "::ffff:1.1.1.1",
	} {
		addr := netip.MustParseAddr(text)
		for _, to := range []target{{name: "any.example", port: 443}, {addr: addr.Unmap(), port: 443}} {
			if err := open.checkAddr(addr, to); err != nil {
				t.Errorf("%s for %+v: %v", text, to, err)
			}
		}
	}
}

// What opens a special address is a rule that means it.
func TestSpecialAddressesThatAreNamed(t *testing.T) {
	for _, c := range []struct {
		rules []string
		addr  string
		name  string
		want  string
	}{
		{[]string{"10.1.2.3"}, "10.1.2.3", "", ""},
		{[]string{"10.1.2.3"}, "10.1.2.4", "", specialAddress},
		{[]string{"10.1.2.0/24"}, "10.1.2.4", "", ""},
		{[]string{"10.0.0.0/8"}, "10.1.2.4", "", ""},
		{[]string{"8.0.0.0/6"}, "10.1.2.4", "", specialAddress}, // wider than what is private
		{[]string{"8.0.0.0/6"}, "9.1.2.4", "", ""},
		{[]string{"0.0.0.0/0"}, "127.0.0.1", "", specialAddress},
		{[]string{"127.0.0.1:443"}, "127.0.0.1", "", ""},
		{[]string{"127.0.0.1:8080"}, "127.0.0.1", "", specialAddress},
		{[]string{"169.254.0.0/16"}, "169.254.1.1", "", ""},
		{[]string{"169.254.0.0/16"}, "169.254.169.254", "", specialAddress},
		{[]string{"169.254.169.254"}, "169.254.169.254", "", ""},
		{[]string{"fd00::/8"}, "fd00::1", "", ""},
		{[]string{"fd00::/8"}, "fd00:ec2::254", "", specialAddress},
		{[]string{"::1"}, "::1", "", ""},
		{[]string{"10.0.0.1"}, "64:ff9b::10.0.0.1", "", ""},
		{[]string{"64:ff9b::/96"}, "64:ff9b::10.0.0.1", "", specialAddress},
		{[]string{"10.0.0.1"}, "2002:a00:1::", "", ""},
		{[]string{"2002::/16"}, "2002:a00:1::", "", specialAddress},
		// A name that leads there needs both: a rule for the name, which check has asked
		// for, and one for the address.
		{[]string{"nexus.example"}, "10.0.0.1", "nexus.example", specialAddress},
		{[]string{"nexus.example", "10.0.0.1"}, "10.0.0.1", "nexus.example", ""},
		{[]string{"nexus.example:8081", "10.0.0.1:8081"}, "10.0.0.1", "nexus.example", specialAddress}, // port 443 is asked for
		// An address as such needs a rule for addresses.
		{[]string{"a.example"}, "1.1.1.1", "", notListed},
		{[]string{"1.1.1.1:53"}, "1.1.1.1", "", portNotListed},
		{[]string{"1.1.1.0/24"}, "1.1.1.1", "", ""},
		{[]string{"a.example"}, "1.1.1.1", "a.example", ""},
	} {
		addr := netip.MustParseAddr(c.addr)
		to := target{name: c.name, port: 443}
		if c.name == "" {
			to.addr = addr
		}
		if err := compile(policyOf(t, c.rules...), nil).checkAddr(addr, to); reasonOf(t, err) != c.want {
			t.Errorf("%v, %s %s: %v, want %q", c.rules, c.name, c.addr, err, c.want)
		}
	}
}

func TestDeniedByTheOperator(t *testing.T) {
	denied := []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("1.2.3.0/24"), netip.MustParsePrefix("2a00::/16")}
	r := compile(policyOf(t, "a.example", "10.1.2.3", "10.2.0.1", "1.2.3.4", "0.0.0.0/0", "::/0"), denied)
	for text, want := range map[string]string{
		"10.1.2.3": deniedAddress, "::ffff:10.1.2.3": deniedAddress, "64:ff9b::10.1.2.3": deniedAddress, "2002:a01:203::": deniedAddress,
		"1.2.3.4": deniedAddress, "2a00::1": deniedAddress, "10.2.0.1": "", "1.2.4.1": "", "2a01::1": "",
	} {
		addr := netip.MustParseAddr(text)
		for _, to := range []target{{name: "a.example", port: 443}, {addr: addr, port: 443}} {
			if err := r.checkAddr(addr, to); reasonOf(t, err) != want {
				t.Errorf("%s for %+v: %v, want %q", text, to, err, want)
			}
		}
	}
}

func TestParseTarget(t *testing.T) {
	for text, want := range map[string]target{
		"a.example:443":         {name: "a.example", port: 443},
		"A.Example.:8080":       {name: "a.example", port: 8080},
		"1.2.3.4:1":             {addr: netip.MustParseAddr("1.2.3.4"), port: 1},
		"[::1]:65535":           {addr: netip.MustParseAddr("::1"), port: 65535},
		"[::ffff:1.2.3.4]:443":  {addr: netip.MustParseAddr("1.2.3.4"), port: 443},
		"xn--bcher-kva.org:443": {name: "xn--bcher-kva.org", port: 443},
	} {
		if got, err := parseTarget(text, 0); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]target{
		"a.example":    {name: "a.example", port: 80},
		"a.example:81": {name: "a.example", port: 81},
		"1.2.3.4":      {addr: netip.MustParseAddr("1.2.3.4"), port: 80},
		"[::1]":        {addr: netip.MustParseAddr("::1"), port: 80},
	} {
		if got, err := parseTarget(text, 80); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", ":443", "a.example", "a.example:", "a.example:0", "a.example:65536", "a.example:-1", "a.example:http", "a.example:443:443", "::1:443", "[::1]", "[::1]x:443",
		"[fe80::1%25eth0]:443", "[fe80::1%eth0]:443", "127.1:443", "0x7f000001:443", "2130706433:443", "0177.0.0.1:443", "1.2.3:443", "1.2.3.4.:443",
		"a..example:443", "*.example:443", "bücher.example:443", "ｅxample.com:443", "a.example\x00.b:443", "user@a.example:443", "a.example/:443", "a b:443", "-a.example:443",
	} {
		if got, err := parseTarget(text, 0); reasonOf(t, err) != badTarget {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
}

// Whatever a client asks for is refused, or is a plain name or an address, and what is
// allowed is what a rule says.
func FuzzParseTarget(f *testing.F) {
	for _, seed := range []string{"a.example:443", "[::1]:1", "[::ffff:127.0.0.1]:80", "127.1:80", "A.EXAMPLE.:443", "x.a.example:443", "a.example:443@evil", "[64:ff9b::7f00:1]:443"} {
		f.Add(seed, uint16(0))
		f.Add(seed, uint16(80))
	}
	rules := compile(policyOf(f, "a.example", "*.a.example", "0.0.0.0/0", "::/0"), nil)
	f.Fuzz(func(t *testing.T, text string, port uint16) {
		to, err := parseTarget(text, port)
		if err != nil {
			reasonOf(t, err)
			return
		}
		if to.port == 0 || (to.name == "") == (to.addr == netip.Addr{}) {
			t.Fatalf("%q becomes %+v", text, to)
		}
		if err := rules.check(to); err != nil {
			if !strings.Contains(err.(*refusal).body(), "executord refused") {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		switch {
		case to.port != 443 && to.port != 80:
			t.Errorf("%q is allowed at port %d", text, to.port)
		case to.name != "" && to.name != "a.example" && !strings.HasSuffix(to.name, ".a.example"):
			t.Errorf("%q is allowed", text)
		case to.name == "" && (!to.addr.IsGlobalUnicast() || to.addr.IsPrivate() || to.addr.IsLoopback() || to.addr.IsLinkLocalUnicast() || to.addr.Is4In6()):
			t.Errorf("%q is allowed", text)
		}
	})
}

func FuzzCheckAddr(f *testing.F) {
	for _, seed := range []string{"127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "fd00:ec2::254", "1.1.1.1"} {
		b, _ := netip.MustParseAddr(seed).MarshalBinary()
		f.Add(b)
	}
	rules := compile(policyOf(f, "a.example", "0.0.0.0/0", "::/0"), nil)
	f.Fuzz(func(t *testing.T, b []byte) {
		addr, ok := netip.AddrFromSlice(b)
		if !ok {
			return
		}
		err := rules.checkAddr(addr, target{name: "a.example", port: 443})
		if err == nil && (!addr.IsGlobalUnicast() || addr.IsPrivate() || addr.Unmap().IsPrivate()) {
			t.Errorf("%s is reached", addr)
		}
	})
}
