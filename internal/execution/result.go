package execution

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

// exited turns what the guest told into the result.
func (r *run) exited(ctx context.Context, exit *guestv1.Exit) *Result {
	res := &Result{
		Reaped: int32(min(exit.GetReaped(), 1<<30)), TreeEmpty: exit.GetTreeEmpty(), Killed: exit.GetKilled(),
		Usage: Usage{
			CPUUser:         micros(exit.GetCpuUserMicros()),
			CPUSystem:       micros(exit.GetCpuSystemMicros()),
			PeakMemoryBytes: int64(min(exit.GetMaxRssBytes(), 1<<50)),
		},
		Evidence: make(map[string]string),
	}
	res.Times.Ended = time.Now()
	if r.times.Started.IsZero() {
		// Followed since a restart: the guest knows how long it ran.
		r.times.Started = res.Times.Ended.Add(-micros(exit.GetRunMicros()))
	}
	if exit.FirstOutputMicros != nil {
		r.times.FirstOutput = r.times.Started.Add(micros(exit.GetFirstOutputMicros()))
	}
	usage, oomKills := r.guest.usage(ctx)
	if r.session == "" && usage.PeakMemoryBytes > 0 {
		res.Usage.PeakMemoryBytes = usage.PeakMemoryBytes
	}
	if usage.PIDsRefused > 0 {
		res.Evidence["forks_refused"] = strconv.FormatInt(usage.PIDsRefused, 10)
		res.Evidence["pids_limit"] = strconv.FormatInt(r.record.Limits.PIDs, 10)
	}
	r.decide(res, exit, oomKills)
	if res.Reason != Exited && res.Reason != Signaled && r.session == "" {
		// The guest says that the tree is empty; for an end that was forced the engine
		// has the last word before the result is told.
		remains, err := r.sandbox.Terminate(ctx)
		res.Reaped += int32(remains.Processes)
		res.TreeEmpty = err == nil
	}
	return res
}

// decide finds the reason.
func (r *run) decide(res *Result, exit *guestv1.Exit, oomKills int64) {
	signal := int32(0)
	switch status := exit.GetStatus().(type) {
	case *guestv1.Exit_Code:
		code := status.Code & 0xff
		res.ExitCode = &code
	case *guestv1.Exit_Signal:
		signal = status.Signal
		res.Signal = signal
	}
	if oomKills > 0 {
		res.Evidence["oom_kills"] = strconv.FormatInt(oomKills, 10)
		res.Evidence["memory_limit_bytes"] = strconv.FormatInt(r.record.Limits.MemoryBytes, 10)
	}
	order := r.ordered()
	switch {
	case exit.GetStopCause() == guestv1.StopCause_STOP_CAUSE_REQUESTED && order != nil:
		stopped(order, res)
	case exit.GetStopCause() == guestv1.StopCause_STOP_CAUSE_TIMEOUT:
		res.Reason = TimedOut
		res.Detail = fmt.Sprintf("ran longer than its timeout of %v", r.record.Command.Timeout)
	case oomKills > 0 && killedHere(signal, res.ExitCode):
		res.Reason = OOMKilled
		res.Detail = fmt.Sprintf("the kernel killed it: its sandbox used up its memory limit of %d bytes", r.record.Limits.MemoryBytes)
	case signal != 0:
		res.Reason = Signaled
		res.Detail = "ended by " + signalName(signal)
		if exit.GetCoreDumped() {
			res.Evidence["core_dumped"] = "true"
		}
	default:
		res.Reason = Exited
		if oomKills > 0 {
			res.Detail = "the memory limit of its sandbox was reached and the kernel killed a process of it"
		}
	}
}

// killedHere says whether the leader itself was killed, or is a shell that tells
// with its exit code that its last command was.
func killedHere(signal int32, code *int32) bool {
	return signal == int32(unix.SIGKILL) || code != nil && *code == 128+int32(unix.SIGKILL)
}

// stopped gives a result the reason of an order.
func stopped(o *stopOrder, res *Result) *Result {
	res.Reason, res.CancelledBy, res.Detail = o.reason, o.by, o.detail
	return res
}

// lost is the result when the guest cannot be asked any more. What became of the
// command is not known, unless it was being stopped anyway.
func (r *run) lost(ctx context.Context, cause error) *Result {
	if ctx.Err() != nil {
		return nil
	}
	res := &Result{Reason: SandboxLost, Detail: "the sandbox ended while the command ran; whether it finished is not known"}
	if !r.gone() {
		res.Detail = fmt.Sprintf("the sandbox was ended because its guest did not answer (%v); whether the command finished is not known", cause)
	}
	if o := r.ordered(); o != nil {
		stopped(o, res)
	} else if !r.times.Started.IsZero() && r.record.Command.Timeout > 0 && time.Since(r.times.Started) > r.record.Command.Timeout {
		res.Reason = TimedOut
		res.Detail = fmt.Sprintf("ran longer than its timeout of %v; the guest did not end it, so its sandbox was ended", r.record.Command.Timeout)
	}
	usage, err := r.sandbox.Usage(ctx)
	if err == nil {
		res.Usage = Usage{CPUUser: usage.CPU, PeakMemoryBytes: usage.PeakMemoryBytes}
		if usage.OOMKills > 0 {
			res.Evidence = map[string]string{"oom_kills": strconv.FormatInt(usage.OOMKills, 10)}
		}
	}
	remains, err := r.sandbox.Terminate(ctx)
	res.Reaped, res.TreeEmpty, res.Killed = int32(remains.Processes), err == nil, remains.Processes > 0
	return res
}

// startFailed is the result when nothing ran.
func startFailed(kind string, err error) *Result {
	return &Result{Reason: StartFailed, Detail: err.Error(), TreeEmpty: true, Evidence: map[string]string{"kind": kind}}
}

// noInterpreter says which package would have what is missing.
func noInterpreter(c Command) *Result {
	how := interpreters()[c.Language]
	return &Result{
		Reason: StartFailed, TreeEmpty: true,
		Detail: fmt.Sprintf("%s is not in the sandbox's image; on the host of executord: apt-get install %s", how.programs[0], how.pkg),
		Evidence: map[string]string{
			"kind": "no_interpreter", "program": how.programs[0], "package": how.pkg,
		},
	}
}

// isWorkingDirectory tells a missing directory from a missing program.
func isWorkingDirectory(err error) bool { return strings.HasPrefix(err.Error(), "working directory") }

func kindName(k guestv1.Error_Kind) string {
	switch k {
	case guestv1.Error_KIND_NOT_EXECUTABLE:
		return "not_executable"
	case guestv1.Error_KIND_EXHAUSTED:
		return "exhausted"
	default:
		return "refused"
	}
}

// complete adds what every result has.
func (r *run) complete(res *Result) {
	ended := res.Times.Ended
	if ended.IsZero() {
		ended = time.Now()
	}
	res.Times = r.times
	res.Times.Ended = ended
	stdout, stderr := r.log.Totals()
	res.Totals = []StreamTotal{
		{Stream: "stdout", Size: stdout.Size, CRC32C: stdout.CRC32C, Dropped: stdout.Dropped},
		{Stream: "stderr", Size: stderr.Size, CRC32C: stderr.CRC32C, Dropped: stderr.Dropped},
	}
	if len(res.Evidence) == 0 {
		res.Evidence = nil
	}
}

// micros bounds what a guest can tell: an absurd number must not overflow.
func micros(n uint64) time.Duration { return time.Duration(min(n, 1<<50)) * time.Microsecond }

func signalName(n int32) string {
	if name := unix.SignalName(unix.Signal(n)); name != "" {
		return name
	}
	return "signal " + strconv.Itoa(int(n))
}
