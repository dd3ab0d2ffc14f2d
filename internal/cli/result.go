package cli

import (
	"encoding/base64"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// exitCode is what executorctl exits with for a result.
func exitCode(r *executorv1.Result) int {
	switch r.GetReason() {
	case executorv1.Reason_REASON_SIGNALED:
		if r.GetSignal() > 0 {
			return exitSignal + int(r.GetSignal())
		}
		return exitOwn
	case executorv1.Reason_REASON_TIMED_OUT, executorv1.Reason_REASON_IDLE_TIMED_OUT:
		return exitTimeout
	case executorv1.Reason_REASON_CANCELLED:
		return exitLeft
	case executorv1.Reason_REASON_OOM_KILLED:
		return exitOOM
	case executorv1.Reason_REASON_START_FAILED:
		switch r.GetEvidence()["kind"] {
		case "not_found", "no_interpreter":
			return exitAbsent
		case "not_executable", "no_working_directory":
			// As docker has it: what is there cannot be run. 127 is for a program that is
			// not found.
			return exitNoExec
		}
		return exitOwn
	case executorv1.Reason_REASON_EXITED:
		if r.ExitCode != nil {
			return int(r.GetExitCode())
		}
	}
	// The server, the session or the sandbox ended it: whatever the program was
	// about to exit with is not known.
	return exitOwn
}

// ending says in a line how an execution ended; "" if it exited by itself. timeout
// is what it was given, 0 if that is not known.
func ending(r *executorv1.Result, timeout time.Duration) string {
	var text string
	switch r.GetReason() {
	case executorv1.Reason_REASON_EXITED:
		return ""
	case executorv1.Reason_REASON_SIGNALED:
		text = fmt.Sprintf("killed by signal %d", r.GetSignal())
	case executorv1.Reason_REASON_TIMED_OUT:
		if timeout == 0 {
			timeout = ran(r).Round(time.Millisecond)
		}
		text = "timed out after " + timeout.String()
	case executorv1.Reason_REASON_CANCELLED:
		text = "cancelled"
		if by := r.GetCancelledBy(); by != "" {
			text += " by " + by
		}
	case executorv1.Reason_REASON_OOM_KILLED:
		text = "out of memory"
	case executorv1.Reason_REASON_SESSION_ENDED:
		text = "its session ended"
	case executorv1.Reason_REASON_SANDBOX_LOST:
		text = "the sandbox was lost"
	case executorv1.Reason_REASON_START_FAILED:
		text = "not started"
	case executorv1.Reason_REASON_DISK_FULL:
		text = "the server's disk is full"
	case executorv1.Reason_REASON_SERVER_STOPPED:
		text = "the server was stopped"
	case executorv1.Reason_REASON_IDLE_TIMED_OUT:
		text = "idle for too long"
	case executorv1.Reason_REASON_OUTPUT_LIMIT:
		text = "too much output"
	case executorv1.Reason_REASON_ABANDONED:
		text = "nobody watched it"
	default:
		text = "ended for a reason that this version does not know"
	}
	if detail := r.GetDetail(); detail != "" && detail != text {
		text += " (" + detail + ")"
	}
	return text
}

// ran is how long the program ran; 0 if it was not started.
func ran(r *executorv1.Result) time.Duration {
	t := r.GetTimes()
	if t.GetStarted() == nil || t.GetEnded() == nil {
		return 0
	}
	return t.GetEnded().AsTime().Sub(t.GetStarted().AsTime())
}

// summary is what run -o json prints.
type summary struct {
	Name        string            `json:"name"`
	Outcome     string            `json:"outcome"`
	Reason      string            `json:"reason"`
	ExitCode    *int32            `json:"exit_code"`
	Signal      int32             `json:"signal,omitempty"`
	Detail      string            `json:"detail,omitempty"`
	CancelledBy string            `json:"cancelled_by,omitempty"`
	Stdout      string            `json:"stdout"`
	StdoutB64   string            `json:"stdout_base64,omitempty"`
	Stderr      string            `json:"stderr"`
	StderrB64   string            `json:"stderr_base64,omitempty"`
	Complete    bool              `json:"complete"`
	Duration    float64           `json:"duration_seconds"`
	Engine      string            `json:"engine,omitempty"`
	Sandbox     string            `json:"sandbox,omitempty"`
	Totals      map[string]total  `json:"totals"`
	Usage       *usage            `json:"usage,omitempty"`
	Times       times             `json:"times"`
	Reaped      int32             `json:"reaped_processes"`
	TreeEmpty   bool              `json:"tree_empty"`
	Killed      bool              `json:"killed"`
	Evidence    map[string]string `json:"evidence,omitempty"`
}

type total struct {
	Size    int64  `json:"size"`
	CRC32C  string `json:"crc32c"`
	Dropped int64  `json:"dropped,omitempty"`
}

type usage struct {
	CPUUser         float64 `json:"cpu_user_seconds"`
	CPUSystem       float64 `json:"cpu_system_seconds"`
	PeakMemoryBytes int64   `json:"peak_memory_bytes,omitempty"`
}

type times struct {
	Queued       time.Time `json:"queued,omitzero"`
	SandboxReady time.Time `json:"sandbox_ready,omitzero"`
	Started      time.Time `json:"started,omitzero"`
	FirstOutput  time.Time `json:"first_output,omitzero"`
	Ended        time.Time `json:"ended,omitzero"`
}

// summarize sums a result up with the output that came.
func summarize(name string, r *executorv1.Result, stdout, stderr []byte, complete bool) *summary {
	s := &summary{
		Name:    name,
		Outcome: enumName(r.GetOutcome(), "OUTCOME"), Reason: enumName(r.GetReason(), "REASON"),
		ExitCode: r.ExitCode, Signal: r.GetSignal(), Detail: r.GetDetail(), CancelledBy: r.GetCancelledBy(),
		Complete: complete, Duration: ran(r).Seconds(), Totals: make(map[string]total),
		Reaped: r.GetReapedProcesses(), TreeEmpty: r.GetTreeEmpty(), Killed: r.GetKilled(), Evidence: r.GetEvidence(),
	}
	s.Stdout, s.StdoutB64 = text(stdout)
	s.Stderr, s.StderrB64 = text(stderr)
	for _, t := range r.GetTotals() {
		name := strings.ToLower(enumName(t.GetStream(), "STREAM"))
		s.Totals[name] = total{Size: t.GetSize(), CRC32C: fmt.Sprintf("%08x", t.GetCrc32C()), Dropped: t.GetDropped()}
	}
	if u := r.GetUsage(); u != nil {
		s.Usage = &usage{
			CPUUser: u.GetCpuUser().AsDuration().Seconds(), CPUSystem: u.GetCpuSystem().AsDuration().Seconds(),
			PeakMemoryBytes: u.GetPeakMemoryBytes(),
		}
	}
	t := r.GetTimes()
	s.Times = times{
		Queued: when(t.GetQueued()), SandboxReady: when(t.GetSandboxReady()), Started: when(t.GetStarted()),
		FirstOutput: when(t.GetFirstOutput()), Ended: when(t.GetEnded()),
	}
	return s
}

// when is a time; zero for one that is absent.
func when(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// text is output as a string; if it is not valid UTF-8, with U+FFFD for what is not,
// and whole in base64 beside it.
func text(b []byte) (string, string) {
	if utf8.Valid(b) {
		return string(b), ""
	}
	return strings.ToValidUTF8(string(b), "\uFFFD"), base64.StdEncoding.EncodeToString(b)
}
