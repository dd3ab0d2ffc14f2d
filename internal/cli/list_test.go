package cli

import (
	"strings"
	"testing"

	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// TestListFlags: what the flags of a list say is what the server is asked for.
func TestListFlags(t *testing.T) {
	for line, want := range map[string]struct {
		filter, order string
		all           bool
	}{
		"":                           {},
		"--state running":            {filter: `state = "RUNNING"`},
		"--label a=b":                {filter: `labels.a = "b"`},
		"--label a=b --label c/d.e=": {filter: `labels.a = "b" AND labels.c/d.e = ""`},
		`--label 'a=x"y\z=1'`:        {filter: `labels.a = "x\"y\\z=1"`},
		"--filter 'state != ENDED'":  {filter: "state != ENDED"},
		"--filter ' ' --order-by 'create_time desc'": {order: "create_time desc"},
		"--filter 'labels.x = y' --state terminated --label a=b --order-by create_time": {
			filter: `labels.x = y AND state = "TERMINATED" AND labels.a = "b"`, order: "create_time", all: true,
		},
	} {
		for _, resource := range []string{"executions", "session"} {
			s := clienttest.Start(t)
			if got := (invocation{args: command(resource + " list " + line)}).run(t, s); got.code != 0 {
				t.Errorf("%s list %s: exit code %d, stderr %q", resource, line, got.code, got.stderr)
				continue
			}
			var filter, order string
			all := want.all
			if resource == "executions" {
				r := s.Calls("ListExecutions")[0].(*executorv1.ListExecutionsRequest)
				filter, order = r.GetFilter(), r.GetOrderBy()
			} else {
				r := s.Calls("ListSessions")[0].(*executorv1.ListSessionsRequest)
				filter, order, all = r.GetFilter(), r.GetOrderBy(), r.GetShowTerminated()
			}
			if filter != want.filter || order != want.order || all != want.all {
				t.Errorf("%s list %s: filter %s, order %q, all %t", resource, line, filter, order, all)
			}
		}
	}
}

func TestListFlagsRefused(t *testing.T) {
	for _, label := range []string{"", "a", "=b", "'a b=c'", "'a)=c'", "ü=c"} {
		s := clienttest.Start(t)
		got := (invocation{args: command("executions list --label " + label)}).run(t, s)
		if label == "" {
			got = (invocation{args: []string{"executions", "list", "--label", ""}}).run(t, s)
		}
		if got.code == 0 || len(s.Calls("ListExecutions")) != 0 || !strings.Contains(got.stderr, "--label") {
			t.Errorf("--label %s: exit code %d, stderr %q", label, got.code, got.stderr)
		}
	}
}
