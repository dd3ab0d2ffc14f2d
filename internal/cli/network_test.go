package cli

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func TestNetworkFlags(t *testing.T) {
	egress := func(rules ...*executorv1.EgressRule) *executorv1.NetworkPolicy {
		return &executorv1.NetworkPolicy{Mode: executorv1.NetworkPolicy_MODE_EGRESS, Rules: rules}
	}
	for name, c := range map[string]struct {
		mode  string
		allow []string
		want  *executorv1.NetworkPolicy
		fails bool
	}{
		"nothing":         {},
		"none":            {mode: "none", want: &executorv1.NetworkPolicy{Mode: executorv1.NetworkPolicy_MODE_NONE}},
		"host":            {mode: "host", want: &executorv1.NetworkPolicy{Mode: executorv1.NetworkPolicy_MODE_HOST}},
		"allow":           {allow: []string{"PyPI.org"}, want: egress(&executorv1.EgressRule{Host: "pypi.org"})},
		"allow, explicit": {mode: "egress", allow: []string{"*.a:1,2"}, want: egress(&executorv1.EgressRule{Host: "*.a", Ports: []uint32{1, 2}})},
		"addresses": {allow: []string{"::1", "[::1]:80", "10.0.0.0/8:5432", "fd00::/8"}, want: egress(
			&executorv1.EgressRule{Host: "::1"}, &executorv1.EgressRule{Host: "::1", Ports: []uint32{80}},
			&executorv1.EgressRule{Host: "10.0.0.0/8", Ports: []uint32{5432}}, &executorv1.EgressRule{Host: "fd00::/8"})},
		"unknown mode":   {mode: "all", fails: true},
		"egress alone":   {mode: "egress", fails: true},
		"allow, none":    {mode: "none", allow: []string{"a"}, fails: true},
		"allow, host":    {mode: "host", allow: []string{"a"}, fails: true},
		"a scheme":       {allow: []string{"https://a"}, fails: true},
		"no host":        {allow: []string{":443"}, fails: true},
		"no port":        {allow: []string{"a:"}, fails: true},
		"port 0":         {allow: []string{"a:0"}, fails: true},
		"a named port":   {allow: []string{"a:https"}, fails: true},
		"half a bracket": {allow: []string{"[::1]"}, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := (&networkFlags{mode: c.mode, allow: c.allow}).policy()
			if diff := cmp.Diff(c.want, got, protocmp.Transform()); (err != nil) != c.fails || diff != "" {
				t.Errorf("%v %s", err, diff)
			}
		})
	}
}
