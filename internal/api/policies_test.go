package api

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
)

// TestPolicies reads what a request says, and knows each value of each enum.
func TestPolicies(t *testing.T) {
	zero := time.Duration(0)
	for name, test := range map[string]struct {
		output *executorv1.OutputPolicy
		detach *executorv1.DetachPolicy
		want   execution.Policies
	}{
		"nothing":     {nil, nil, execution.Policies{}},
		"empty":       {&executorv1.OutputPolicy{}, &executorv1.DetachPolicy{}, execution.Policies{}},
		"drop oldest": {&executorv1.OutputPolicy{OnLimit: executorv1.OutputPolicy_ON_LIMIT_DROP_OLDEST}, nil, execution.Policies{OnLimit: execution.DropOldest}},
		"block":       {&executorv1.OutputPolicy{OnLimit: executorv1.OutputPolicy_ON_LIMIT_BLOCK}, nil, execution.Policies{OnLimit: execution.Block}},
		"kill":        {&executorv1.OutputPolicy{OnLimit: executorv1.OutputPolicy_ON_LIMIT_KILL}, nil, execution.Policies{OnLimit: execution.Kill}},
		"retention":   {&executorv1.OutputPolicy{Retention: durationpb.New(time.Hour)}, nil, execution.Policies{Retention: time.Hour}},
		"keep":        {nil, &executorv1.DetachPolicy{Mode: executorv1.DetachPolicy_MODE_KEEP_RUNNING}, execution.Policies{Detach: execution.KeepRunning}},
		"cancel":      {nil, &executorv1.DetachPolicy{Mode: executorv1.DetachPolicy_MODE_CANCEL, Grace: durationpb.New(0)}, execution.Policies{Detach: execution.CancelDetached, DetachGrace: &zero}},
	} {
		got, err := policiesOf(test.output, test.detach)
		if diff := cmp.Diff(test.want, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got)\n%s", name, err, diff)
		}
	}
	bad := &durationpb.Duration{Seconds: 1, Nanos: -1}
	if _, err := policiesOf(&executorv1.OutputPolicy{Retention: bad}, nil); fault.KindOf(err) != fault.Invalid {
		t.Error(err)
	}
	if _, err := policiesOf(nil, &executorv1.DetachPolicy{Grace: bad}); fault.KindOf(err) != fault.Invalid {
		t.Error(err)
	}
}

func TestWarningProto(t *testing.T) {
	for _, d := range []execution.Deadline{execution.DeadlineTimeout, execution.DeadlineSessionExpiry, execution.DeadlineIdle} {
		got := eventProto(execution.Event{Cursor: execution.Cursor{Epoch: "e", Sequence: 7}, Time: at(1), Warning: &execution.Warning{Deadline: d, ExpireTime: at(2)}})
		want := &executorv1.Event{
			Cursor: &executorv1.Cursor{Epoch: "e", Sequence: 7}, EventTime: stamp(1),
			Kind: &executorv1.Event_DeadlineWarning{DeadlineWarning: &executorv1.DeadlineWarning{
				Deadline:   executorv1.DeadlineWarning_Deadline(executorv1.DeadlineWarning_Deadline_value["DEADLINE_"+string(d)]),
				ExpireTime: stamp(2),
			}},
		}
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" || got.GetDeadlineWarning().GetDeadline() == 0 {
			t.Errorf("%s: %s", d, diff)
		}
	}
}
