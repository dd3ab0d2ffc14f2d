package api

import (
	"strings"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/execution"
	"google.golang.org/protobuf/types/known/durationpb"
)

// policiesOf reads the policies of a request. The domain's names are those of the API.
func policiesOf(output *executorv1.OutputPolicy, detach *executorv1.DetachPolicy) (execution.Policies, error) {
	var p execution.Policies
	var err error
	if output.GetOnLimit() != executorv1.OutputPolicy_ON_LIMIT_UNSPECIFIED {
		p.OnLimit = execution.OnLimit(strings.TrimPrefix(output.GetOnLimit().String(), "ON_LIMIT_"))
	}
	if p.Retention, err = duration("output_policy.retention", output.GetRetention()); err != nil {
		return p, err
	}
	if detach.GetMode() != executorv1.DetachPolicy_MODE_UNSPECIFIED {
		p.Detach = execution.DetachMode(strings.TrimPrefix(detach.GetMode().String(), "MODE_"))
	}
	if detach.GetGrace() != nil {
		grace, err := duration("detach_policy.grace", detach.GetGrace())
		if err != nil {
			return p, err
		}
		p.DetachGrace = &grace
	}
	return p, nil
}

func outputPolicyProto(e execution.Execution) *executorv1.OutputPolicy {
	policy := &executorv1.OutputPolicy{
		RetainedBytes: e.RetainedBytes,
		OnLimit:       executorv1.OutputPolicy_OnLimit(executorv1.OutputPolicy_OnLimit_value["ON_LIMIT_"+string(e.Policies.OnLimit)]),
	}
	if e.Policies.Retention > 0 {
		policy.Retention = durationpb.New(e.Policies.Retention)
	}
	return policy
}

// detachPolicyProto is nil for a record that was written before there was a policy.
func detachPolicyProto(p execution.Policies) *executorv1.DetachPolicy {
	if p.Detach == "" {
		return nil
	}
	policy := &executorv1.DetachPolicy{
		Mode: executorv1.DetachPolicy_Mode(executorv1.DetachPolicy_Mode_value["MODE_"+string(p.Detach)]),
	}
	if p.DetachGrace != nil {
		policy.Grace = durationpb.New(*p.DetachGrace)
	}
	return policy
}

func warningProto(w *execution.Warning) *executorv1.DeadlineWarning {
	return &executorv1.DeadlineWarning{
		Deadline:   executorv1.DeadlineWarning_Deadline(executorv1.DeadlineWarning_Deadline_value["DEADLINE_"+string(w.Deadline)]),
		ExpireTime: timestamp(w.ExpireTime),
	}
}
