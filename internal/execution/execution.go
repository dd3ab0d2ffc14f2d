// Package execution is one command's life: it is recorded, gets a sandbox, is
// started by the guest in it, its output is pumped into an event log, and it ends
// exactly once with a reason. It knows engines only by their waist and never sees
// gRPC. The Service owns every goroutine that it starts and waits for them in Close.
package execution

import (
	"time"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
)

// Execution is the record of one command's life, as the store keeps it.
type Execution struct {
	// ID is unique and sorts by CreateTime, to the millisecond.
	ID string
	// Session is the id of the session it runs in; "" for a one-shot.
	Session string
	// Owner is the caller who started it; "" if that was not noted.
	Owner string
	// Command is what was asked for. The values of Env and the end of a long Source
	// are not stored: of what comes from a store they are empty.
	Command Command
	// Limits are those in force in its sandbox.
	Limits engine.Limits
	// Network is the policy in force in its sandbox.
	Network egress.Policy
	// RetainedBytes bounds its log.
	RetainedBytes int64
	// Policies are those in force.
	Policies Policies
	Labels   map[string]string
	// Engine and Sandbox say where it runs.
	Engine  string
	Sandbox string
	State   State
	// Result is set in Ended.
	Result *Result
	// Epoch names its log, Sequence is the log's last event; for a running one
	// the stored Sequence lags behind, the Service fills in the present one.
	Epoch    string
	Sequence uint64
	// LogBytes is what its log takes; set in Ended.
	LogBytes int64
	// Warned are the deadlines that it was warned of.
	Warned Deadlines

	CreateTime time.Time
	// StartTime is zero until the program was started, EndTime until it ended.
	StartTime time.Time
	EndTime   time.Time
}

// State of an execution. The order is that of a life: it never goes back.
type State uint8

// The states.
const (
	// Starting: recorded; its sandbox or program is being started.
	Starting State = iota + 1
	// Running: the program runs.
	Running
	// Stopping: it is being stopped.
	Stopping
	// Ended: Result says how.
	Ended
)

// Command says what to run.
type Command struct {
	// Language and Source are set for a piece of code, Args otherwise.
	Language Language `json:"language,omitempty"`
	Source   string   `json:"source,omitempty"`
	Args     []string `json:"args,omitempty"`
	// Env are variables added to the sandbox's own.
	Env map[string]string `json:"env,omitempty"`
	// WorkingDirectory is absolute; "" stands for DefaultWorkingDirectory.
	WorkingDirectory string `json:"working_directory,omitempty"`
	// Timeout is counted by the guest; 0 stands for DefaultTimeout.
	Timeout time.Duration `json:"timeout,omitempty"`
	// GracePeriod lies between TERM and KILL; nil stands for DefaultGracePeriod.
	GracePeriod *time.Duration `json:"grace_period,omitempty"`
	// IdleTimeout is counted by the guest too; 0 is none.
	IdleTimeout time.Duration `json:"idle_timeout,omitempty"`
	// Stdin keeps the input open.
	Stdin bool `json:"stdin,omitempty"`
	// Terminal, if not nil, runs it on a terminal of this size, whose input is open.
	Terminal *TerminalSize `json:"terminal,omitempty"`
	// Trace is the caller's trace context, a W3C traceparent, handed on to the program as
	// TRACEPARENT; "" if there is none. It is not stored.
	Trace string `json:"-"`
}

// Observer is told of executions. It must not wait for anything.
type Observer interface {
	// Ended is called once for each execution when its end is recorded.
	Ended(e Execution)
}

// Language of a piece of code.
type Language string

// The languages.
const (
	Python Language = "python"
	Bash   Language = "bash"
	Node   Language = "node"
)

// What a command gets that says nothing else.
const (
	DefaultTimeout          = 1800 * time.Second
	DefaultGracePeriod      = 5 * time.Second
	DefaultWorkingDirectory = "/workspace"
)

// Reason says why an execution ended.
type Reason string

// The reasons. They are stored by these names, which are those of the API.
const (
	Exited        Reason = "EXITED"
	Signaled      Reason = "SIGNALED"
	TimedOut      Reason = "TIMED_OUT"
	Cancelled     Reason = "CANCELLED"
	OOMKilled     Reason = "OOM_KILLED"
	SessionEnded  Reason = "SESSION_ENDED"
	SandboxLost   Reason = "SANDBOX_LOST"
	StartFailed   Reason = "START_FAILED"
	ServerStopped Reason = "SERVER_STOPPED"
	IdleTimedOut  Reason = "IDLE_TIMED_OUT"
	OutputLimit   Reason = "OUTPUT_LIMIT"
	Abandoned     Reason = "ABANDONED"
)

// Outcome sums a result up for people.
type Outcome string

// The outcomes.
const (
	Success        Outcome = "SUCCESS"
	Failure        Outcome = "ERROR"
	Timeout        Outcome = "TIMEOUT"
	Crashed        Outcome = "CRASHED"
	CancelledByAny Outcome = "CANCELLED"
)

// Result is how an execution ended. Its JSON form is the payload of the log's last
// event and stands in the store.
type Result struct {
	Reason Reason `json:"reason"`
	// ExitCode is nil if the program did not exit.
	ExitCode *int32 `json:"exit_code,omitempty"`
	// Signal is 0 unless one ended the program.
	Signal int32 `json:"signal,omitempty"`
	// Detail tells the facts behind the reason.
	Detail string `json:"detail,omitempty"`
	// CancelledBy is set with Cancelled.
	CancelledBy string            `json:"cancelled_by,omitempty"`
	Totals      []StreamTotal     `json:"totals"`
	Times       Times             `json:"times"`
	Usage       Usage             `json:"usage"`
	Reaped      int32             `json:"reaped,omitempty"`
	TreeEmpty   bool              `json:"tree_empty"`
	Killed      bool              `json:"killed,omitempty"`
	Evidence    map[string]string `json:"evidence,omitempty"`
}

// Outcome derives the summary from the reason.
func (r *Result) Outcome() Outcome {
	switch r.Reason {
	case Exited:
		if r.ExitCode != nil && *r.ExitCode == 0 {
			return Success
		}
		return Failure
	case StartFailed:
		return Failure
	case TimedOut, IdleTimedOut:
		return Timeout
	case Cancelled, SessionEnded, ServerStopped, Abandoned:
		return CancelledByAny
	default:
		return Crashed
	}
}

// StreamTotal is all that was written to one stream.
type StreamTotal struct {
	// Stream is "stdout" or "stderr".
	Stream string `json:"stream"`
	Size   int64  `json:"size"`
	CRC32C uint32 `json:"crc32c"`
	// Dropped are the bytes from the start that are no longer kept.
	Dropped int64 `json:"dropped,omitempty"`
}

// Times says when each stage was reached; a zero time was not.
type Times struct {
	Queued       time.Time `json:"queued"`
	SandboxReady time.Time `json:"sandbox_ready,omitzero"`
	Started      time.Time `json:"started,omitzero"`
	FirstOutput  time.Time `json:"first_output,omitzero"`
	Ended        time.Time `json:"ended"`
}

// Usage is what an execution used.
type Usage struct {
	CPUUser         time.Duration `json:"cpu_user"`
	CPUSystem       time.Duration `json:"cpu_system"`
	PeakMemoryBytes int64         `json:"peak_memory_bytes,omitempty"`
}
