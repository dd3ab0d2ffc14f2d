package cli

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// TestPolicyFlags puts what was given into the request, and nothing else.
func TestPolicyFlags(t *testing.T) {
	for args, want := range map[string]*executorv1.ExecuteRequest{
		"":                        {},
		"--idle-timeout 90s":      {Command: &executorv1.Command{IdleTimeout: durationpb.New(90e9)}},
		"--on-output-limit kill":  {OutputPolicy: &executorv1.OutputPolicy{OnLimit: executorv1.OutputPolicy_ON_LIMIT_KILL}},
		"--on-output-limit block": {OutputPolicy: &executorv1.OutputPolicy{OnLimit: executorv1.OutputPolicy_ON_LIMIT_BLOCK}},
		"--on-output-limit drop-oldest --retain 2MiB": {OutputPolicy: &executorv1.OutputPolicy{
			OnLimit: executorv1.OutputPolicy_ON_LIMIT_DROP_OLDEST, RetainedBytes: 2 << 20,
		}},
		"--retention 1h":                          {OutputPolicy: &executorv1.OutputPolicy{Retention: durationpb.New(3600e9)}},
		"--detach-policy keep-running":            {DetachPolicy: &executorv1.DetachPolicy{Mode: executorv1.DetachPolicy_MODE_KEEP_RUNNING}},
		"--detach-policy cancel --detach-grace 0": {DetachPolicy: &executorv1.DetachPolicy{Mode: executorv1.DetachPolicy_MODE_CANCEL, Grace: durationpb.New(0)}},
	} {
		var flags commandFlags
		cmd := &cobra.Command{}
		flags.bind(cmd)
		if err := cmd.ParseFlags(strings.Fields(args)); err != nil {
			t.Errorf("%s: %v", args, err)
			continue
		}
		got := &executorv1.ExecuteRequest{Command: &executorv1.Command{}}
		if err := flags.fill(got, nil); err != nil {
			t.Errorf("%s: %v", args, err)
		}
		if want.Command == nil {
			want.Command = &executorv1.Command{}
		}
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("%s (-want +got)\n%s", args, diff)
		}
	}
	for _, bad := range []string{"--on-output-limit drop", "--on-output-limit KILL", "--on-output-limit unspecified", "--detach-policy leave", "--idle-timeout soon"} {
		var flags commandFlags
		cmd := &cobra.Command{}
		flags.bind(cmd)
		err := cmd.ParseFlags(strings.Fields(bad))
		if err == nil || strings.Contains(bad, "policy") && !strings.Contains(err.Error(), "must be one of keep-running, cancel") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
