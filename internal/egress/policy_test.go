package egress

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

func egressTo(hosts ...string) Policy {
	p := Policy{Mode: engine.NetworkEgress}
	for _, host := range hosts {
		p.Rules = append(p.Rules, Rule{Host: host})
	}
	return p
}

func TestHostsOfRules(t *testing.T) {
	for host, want := range map[string]string{
		"example.com":                   "",
		"a.b-c.d_e.example":             "",
		"localhost":                     "",
		"xn--bcher-kva.example":         "",
		"*.example.com":                 "",
		"4chan.org":                     "",
		"192.0.2.1":                     "",
		"10.0.0.0/8":                    "",
		"0.0.0.0/0":                     "",
		"2001:db8::1":                   "",
		"2001:db8::/32":                 "",
		"::1":                           "",
		strings.Repeat("a.", 126) + "a": "",

		"":                              "empty",
		"https://example.com":           "scheme",
		"example.com/path":              "no path",
		"example.com/":                  "no path",
		"example.com:443":               "field of their own",
		"[::1]":                         "brackets",
		"Example.com":                   "lower case",
		"bücher.example":                "xn--",
		"example.com.":                  "whole",
		".example.com":                  "empty",
		"example..com":                  "empty",
		"-a.example":                    "hyphen",
		"a-.example":                    "hyphen",
		"*":                             "wildcard",
		"*.":                            "empty",
		"*.*.example.com":               "wildcard",
		"a.*.example.com":               "wildcard",
		"a*.example.com":                "wildcard",
		"exa mple.com":                  "character",
		"example.com\n":                 "character",
		"user@example.com":              "character",
		"127.1":                         "ends like an address",
		"2130706433":                    "ends like an address",
		"0177.0.0.1":                    "ends like an address",
		"0x7f.0.0.0x1":                  "ends like an address",
		"::ffff:10.0.0.1":               "10.0.0.1",
		"fe80::1%eth0":                  "zone",
		"2001:DB8::1":                   "shortest",
		"2001:db8:0:0:0:0:0:1":          "shortest",
		"10.1.2.3/8":                    "10.0.0.0/8",
		"10.0.0.0/33":                   "range",
		"::ffff:10.0.0.0/104":           "IPv6 form",
		"2001:db8::/129":                "range",
		strings.Repeat("a", 64):         "longer than 63",
		strings.Repeat("a.", 127):       "dot",
		strings.Repeat("a.", 127) + "a": "longer than 253",
	} {
		err := egressTo(host).Validate()
		if want == "" {
			if err != nil {
				t.Errorf("%q: %v", host, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) || fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != "NETWORK_RULE" {
			t.Errorf("%q: %v, want …%s…", host, err, want)
		}
		if err != nil && !strings.HasPrefix(err.Error(), "network.rules[0].host: ") {
			t.Errorf("%q: it does not name its field: %v", host, err)
		}
	}
}

func TestValidate(t *testing.T) {
	many := egressTo(strings.Split(strings.Repeat("a.example,", 257), ",")[:257]...)
	for name, c := range map[string]struct {
		policy Policy
		want   string
	}{
		"nothing":            {Policy{}, ""},
		"none":               {None(), ""},
		"host":               {Policy{Mode: engine.NetworkHost}, ""},
		"egress":             {egressTo("a.example"), ""},
		"most rules":         {Policy{Mode: engine.NetworkEgress, Rules: many.Rules[:256]}, ""},
		"ports":              {Policy{Mode: engine.NetworkEgress, Rules: []Rule{{"a.example", []uint16{1, 65535}}}}, ""},
		"unknown mode":       {Policy{Mode: "some"}, "network.mode"},
		"rules without mode": {Policy{Rules: []Rule{{Host: "a.example"}}}, "network.rules: "},
		"rules with none":    {Policy{Mode: engine.NetworkNone, Rules: []Rule{{Host: "a.example"}}}, "network.rules: "},
		"rules with host":    {Policy{Mode: engine.NetworkHost, Rules: []Rule{{Host: "a.example"}}}, "network.rules: "},
		"no rules":           {egressTo(), "network.rules: "},
		"too many rules":     {many, "network.rules: has 257"},
		"the second rule":    {egressTo("a.example", "B"), "network.rules[1].host: "},
		"port 0":             {Policy{Mode: engine.NetworkEgress, Rules: []Rule{{"a.example", []uint16{443, 0}}}}, "network.rules[0].ports[1]: "},
		"a port twice":       {Policy{Mode: engine.NetworkEgress, Rules: []Rule{{"a.example", []uint16{443, 80, 443}}}}, "network.rules[0].ports[2]: "},
		"too many ports":     {Policy{Mode: engine.NetworkEgress, Rules: []Rule{{"a.example", make([]uint16, 17)}}}, "network.rules[0].ports: has 17"},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.policy.Validate()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.HasPrefix(err.Error(), c.want)) {
				t.Errorf("%v, want %s…", err, c.want)
			}
			if err != nil && (fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) == "") {
				t.Errorf("kind %d, reason %q", fault.KindOf(err), fault.ReasonOf(err))
			}
		})
	}
}

func TestParseRule(t *testing.T) {
	for text, want := range map[string]Rule{
		"pypi.org":               {Host: "pypi.org"},
		"pypi.org:443":           {Host: "pypi.org", Ports: []uint16{443}},
		"*.pypi.org:443,8443":    {Host: "*.pypi.org", Ports: []uint16{443, 8443}},
		"10.0.0.0/8":             {Host: "10.0.0.0/8"},
		"10.0.0.0/8:5432":        {Host: "10.0.0.0/8", Ports: []uint16{5432}},
		"127.0.0.1:8080":         {Host: "127.0.0.1", Ports: []uint16{8080}},
		"::1":                    {Host: "::1"},
		"2001:db8::/32":          {Host: "2001:db8::/32"},
		"[::1]:443":              {Host: "::1", Ports: []uint16{443}},
		"[2001:db8::/32]:22,443": {Host: "2001:db8::/32", Ports: []uint16{22, 443}},
		"localhost:1,2,3,65535":  {Host: "localhost", Ports: []uint16{1, 2, 3, 65535}},
	} {
		got, err := ParseRule(text)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%q: %v %s", text, err, diff)
		}
		if got.String() != text {
			t.Errorf("%q becomes %q", text, got)
		}
	}
	for _, text := range []string{
		"", ":", ":443", "a.example:", "a.example:0", "a.example:65536", "a.example:-1", "a.example:+1", "a.example:0443", "a.example:443,", "a.example:443,443",
		"a.example:https", "https://a.example", "https://a.example:443", "a.example/x", "[::1]", "[::1", "[a.example]:", "A.example", "a.example: 443", "a.example:443 ",
		"a.example:" + strings.Repeat("1,", 16) + "17",
	} {
		if got, err := ParseRule(text); err == nil {
			t.Errorf("%q is taken for %v", text, got)
		}
	}
}

// What is a rule stays one, and has one form.
func FuzzParseRule(f *testing.F) {
	for _, seed := range []string{"a.example", "*.a:1,2", "10.0.0.0/8:1", "[::1]:443", "::/0", "[2001:db8::/32]:1,2", "http://x", "a:b:c", "[[::1]]:1", "xn--a"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		rule, err := ParseRule(text)
		if err != nil {
			if strings.TrimSpace(err.Error()) == "" {
				t.Error("an error without words")
			}
			return
		}
		again, err := ParseRule(rule.String())
		if diff := cmp.Diff(rule, again); err != nil || diff != "" {
			t.Errorf("%q becomes %q: %v %s", text, rule, err, diff)
		}
		if strings.ToLower(rule.Host) != rule.Host || strings.ContainsAny(rule.Host, " @\\?#") {
			t.Errorf("%q is a host", rule.Host)
		}
		compile(egressTo(rule.Host), nil)
	})
}
