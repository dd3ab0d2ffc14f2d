package cli

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// policyFlags say what becomes of a program that is silent, loud, alone or over.
type policyFlags struct {
	idle      value[time.Duration]
	onLimit   value[executorv1.OutputPolicy_OnLimit]
	retention value[time.Duration]
	detach    value[executorv1.DetachPolicy_Mode]
	grace     value[time.Duration]
}

func (f *policyFlags) bind(cmd *cobra.Command) {
	for _, d := range []*value[time.Duration]{&f.idle, &f.retention, &f.grace} {
		*d = value[time.Duration]{kind: "duration", parse: parseDuration}
	}
	f.onLimit = value[executorv1.OutputPolicy_OnLimit]{kind: "policy", parse: parseOnLimit}
	f.detach = value[executorv1.DetachPolicy_Mode]{kind: "policy", parse: parseDetachMode}
	flags := cmd.Flags()
	flags.Var(&f.idle, "idle-timeout", "end the program when it neither works nor writes for this time")
	flags.Var(&f.onLimit, "on-output-limit", "what to do with output beyond --retain: drop-oldest, block or kill (default drop-oldest)")
	flags.Var(&f.retention, "retention", "how long the server keeps it once it has ended")
	flags.Var(&f.detach, "detach-policy", "what to do when nobody watches any more: keep-running or cancel (default keep-running)")
	flags.Var(&f.grace, "detach-grace", "time without a watcher before cancel (default 10s)")
	completeWith(cmd, "on-output-limit", "drop-oldest", "block", "kill")
	completeWith(cmd, "detach-policy", "keep-running", "cancel")
}

// fill puts what was given into a request.
func (f *policyFlags) fill(r *executorv1.ExecuteRequest) {
	if f.idle.given {
		r.Command.IdleTimeout = durationpb.New(f.idle.v)
	}
	if f.onLimit.given || f.retention.given {
		if r.OutputPolicy == nil {
			r.OutputPolicy = &executorv1.OutputPolicy{}
		}
		r.OutputPolicy.OnLimit = f.onLimit.v
		if f.retention.given {
			r.OutputPolicy.Retention = durationpb.New(f.retention.v)
		}
	}
	if f.detach.given || f.grace.given {
		r.DetachPolicy = &executorv1.DetachPolicy{Mode: f.detach.v}
		if f.grace.given {
			r.DetachPolicy.Grace = durationpb.New(f.grace.v)
		}
	}
}

func parseOnLimit(s string) (executorv1.OutputPolicy_OnLimit, error) {
	return parsePolicy[executorv1.OutputPolicy_OnLimit](s, "ON_LIMIT_", executorv1.OutputPolicy_OnLimit_value)
}

func parseDetachMode(s string) (executorv1.DetachPolicy_Mode, error) {
	return parsePolicy[executorv1.DetachPolicy_Mode](s, "MODE_", executorv1.DetachPolicy_Mode_value)
}

// parsePolicy reads the value of an enum without its prefix, in lower case and with
// hyphens.
func parsePolicy[E ~int32](s, prefix string, values map[string]int32) (E, error) {
	if n := values[prefix+strings.ReplaceAll(strings.ToUpper(s), "-", "_")]; n > 0 && s == strings.ToLower(s) {
		return E(n), nil
	}
	var known []string
	for n := int32(1); ; n++ {
		name, ok := nameOf(values, n)
		if !ok {
			return 0, fmt.Errorf("must be one of %s", strings.Join(known, ", "))
		}
		known = append(known, strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(name, prefix)), "_", "-"))
	}
}

func nameOf(values map[string]int32, n int32) (string, bool) {
	for name, v := range values {
		if v == n {
			return name, true
		}
	}
	return "", false
}

// tellDeadline says that the end is near.
func (f *follower) tellDeadline(w *executorv1.DeadlineWarning) {
	left := time.Until(w.GetExpireTime().AsTime()).Round(time.Second)
	at := w.GetExpireTime().AsTime().Local().Format(time.TimeOnly)
	if left <= 0 { // of one that is long over
		return
	}
	why := map[executorv1.DeadlineWarning_Deadline]string{
		executorv1.DeadlineWarning_DEADLINE_TIMEOUT:        "its timeout passes",
		executorv1.DeadlineWarning_DEADLINE_SESSION_EXPIRY: "the lifetime of its session ends",
		executorv1.DeadlineWarning_DEADLINE_IDLE:           "it has been idle for too long",
	}[w.GetDeadline()]
	if why == "" {
		why = "it meets a deadline that this version does not know"
	}
	f.say("it is ended in %v, at %s, when %s", left, at, why)
}

// formatStored says what is kept, and what room there is.
func formatStored(info *executorv1.GetServerInfoResponse) string {
	text := fmt.Sprintf("%d executions, %s of logs", info.GetStoredExecutions(), formatSize(info.GetStoredBytes()))
	if free := info.GetFreeBytes(); free > 0 {
		text += fmt.Sprintf("; %s free", formatSize(free))
	}
	if info.GetDiskFull() {
		text += "; the disk is full, new work is refused"
	}
	return text
}
