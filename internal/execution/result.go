package execution

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/eventlog"
)

const (
	// maxDetail bounds the texts of a result. With it the result fits into one record
	// of the log whatever is in them: in JSON a byte takes up to six.
	maxDetail = 3 << 10
	// maxFact bounds who cancelled, and each fact of the evidence.
	maxFact = 256
	// maxReaped is more processes than a host can have.
	maxReaped = 1 << 30
	// maxMicros is 35 years: what a guest can tell must not overflow.
	maxMicros = 1 << 50
)

// exited turns what the guest told into the result.
func (r *run) exited(ctx context.Context, exit *guestv1.Exit) *Result {
	res := &Result{
		Reaped: int32(min(exit.GetReaped(), maxReaped)), TreeEmpty: exit.GetTreeEmpty(), Killed: exit.GetKilled(),
		Usage: Usage{
			CPUUser:         micros(exit.GetCpuUserMicros()),
			CPUSystem:       micros(exit.GetCpuSystemMicros()),
			PeakMemoryBytes: int64(min(exit.GetMaxRssBytes(), 1<<50)),
		},
		Evidence: make(map[string]string),
	}
	r.clock(res, exit)
	used := r.usage(ctx)
	if res.TreeEmpty {
		r.spent(r.counted)
	}
	if r.session == "" && used.PeakMemoryBytes > 0 {
		res.Usage.PeakMemoryBytes = used.PeakMemoryBytes
	}
	r.attest(res, used)
	r.attestOutput(res, exit)
	r.decide(res, exit, used.OOMKills)
	if res.Reason != Exited && res.Reason != Signaled && r.session == "" {
		// The guest says that the tree is empty; for an end that was forced the engine
		// has the last word before the result is told.
		remains, err := r.terminate(ctx)
		res.Reaped = int32(min(int(res.Reaped)+max(remains.Processes, 0), maxReaped))
		res.TreeEmpty = err == nil
	}
	return res
}

// clock finds the times. The guest's clock is not looked at, only what it measured,
// and that is kept between what executord knows.
func (r *run) clock(res *Result, exit *guestv1.Exit) {
	now := time.Now()
	ran := micros(exit.GetRunMicros())
	res.Times.Ended = now
	switch {
	case !r.resumed:
	case r.times.Started.IsZero():
		// Nobody noted when it was started.
		r.times.Started = latest(now.Add(-ran), r.times.Queued)
	default:
		// It can have ended long before this executord came to ask.
		if at := r.times.Started.Add(ran); at.Before(now) {
			res.Times.Ended = at
		}
	}
	if exit.FirstOutputMicros != nil {
		first := r.times.Started.Add(micros(exit.GetFirstOutputMicros()))
		if read := r.times.FirstOutput; !read.IsZero() && first.After(read) {
			first = read // it was there by then
		}
		if first.After(res.Times.Ended) {
			first = res.Times.Ended
		}
		r.times.FirstOutput = latest(first, r.times.Started)
	}
}

func latest(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// usage reads what the engine counted since the command was started. Without an
// answer the result lacks figures, not truth.
func (r *run) usage(ctx context.Context) engine.Usage {
	bounded, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), answerTime, fmt.Errorf("no answer within %v", answerTime))
	defer cancel()
	used, err := r.sandbox.Usage(bounded)
	if err != nil {
		return engine.Usage{}
	}
	raw := used
	r.counted = &raw
	used.OOMKills = max(used.OOMKills-r.before.OOMKills, 0)
	used.PIDsRefused = max(used.PIDsRefused-r.before.PIDsRefused, 0)
	return used
}

// spent tells the guest once that the run uses nothing any more; used is what was counted
// then, nil if nobody did.
func (r *run) spent(used *engine.Usage) {
	if r.counting {
		r.counting = false
		r.guest.spent(used)
	}
}

// attest adds to the evidence which limits were reached.
func (r *run) attest(res *Result, used engine.Usage) {
	r.attestNetwork(res)
	if used.OOMKills > 0 {
		res.Evidence["oom_kills"] = strconv.FormatInt(used.OOMKills, 10)
		res.Evidence["memory_limit_bytes"] = strconv.FormatInt(r.record.Limits.MemoryBytes, 10)
	}
	if used.PIDsRefused > 0 {
		res.Evidence["forks_refused"] = strconv.FormatInt(used.PIDsRefused, 10)
		res.Evidence["pids_limit"] = strconv.FormatInt(r.record.Limits.PIDs, 10)
	}
}

// decide finds the reason.
func (r *run) decide(res *Result, exit *guestv1.Exit, oomKills int64) {
	switch status := exit.GetStatus().(type) {
	case *guestv1.Exit_Code:
		res.ExitCode = &status.Code
	case *guestv1.Exit_Signal:
		res.Signal = status.Signal
	}
	order, cause := r.ordered(), exit.GetStopCause()
	switch {
	case cause == guestv1.StopCause_STOP_CAUSE_REQUESTED && order != nil:
		stopped(order, res)
	case cause == guestv1.StopCause_STOP_CAUSE_REQUESTED && r.resumed:
		res.Reason = Cancelled
		res.Detail = "ordered to stop before executord started again; who ordered it is not known any more"
	case cause == guestv1.StopCause_STOP_CAUSE_TIMEOUT:
		res.Reason = TimedOut
		res.Detail = fmt.Sprintf("ran longer than its timeout of %v", r.record.Command.Timeout)
	case cause == guestv1.StopCause_STOP_CAUSE_IDLE:
		res.Reason = IdleTimedOut
		res.Detail = fmt.Sprintf("was idle for its idle timeout of %v: no output, no input, no use of the processor", r.record.Command.IdleTimeout)
		res.Evidence["idle_timeout_ms"] = strconv.FormatInt(r.record.Command.IdleTimeout.Milliseconds(), 10)
	case order != nil && order.reason == OutputLimit:
		stopped(order, res) // it ended by itself meanwhile, but not all that it wrote is kept
	case oomKills > 0 && killedHere(res):
		res.Reason = OOMKilled
		res.Detail = fmt.Sprintf("the kernel killed it: its sandbox used up its memory limit of %d bytes", r.record.Limits.MemoryBytes)
	case res.Signal != 0:
		res.Reason = Signaled
		res.Detail = "ended by " + signalName(res.Signal)
		if exit.GetCoreDumped() {
			res.Evidence["core_dumped"] = "true"
		}
	default:
		res.Reason = Exited
		if oomKills > 0 {
			res.Detail = "the memory limit of its sandbox was reached and the kernel killed a process in it"
		}
	}
}

// killedHere says whether the leader itself was killed, or is a shell that tells
// with its exit code that its last command was.
func killedHere(res *Result) bool {
	return res.Signal == int32(unix.SIGKILL) || res.ExitCode != nil && *res.ExitCode == 128+int32(unix.SIGKILL)
}

// stopped gives a result the reason of an order.
func stopped(o *stopOrder, res *Result) *Result {
	res.Reason, res.CancelledBy, res.Detail = o.reason, o.by, o.detail
	if len(o.evidence) > 0 && res.Evidence == nil {
		res.Evidence = make(map[string]string, len(o.evidence))
	}
	maps.Copy(res.Evidence, o.evidence)
	return res
}

// whyEnded is what an engine knows of a sandbox's end, as it goes on in a sentence.
func whyEnded(sb engine.Sandbox) string {
	known, ok := sb.(engine.Explained)
	if !ok || known.Ended() == nil {
		return ""
	}
	return ": " + known.Ended().Error()
}

// lost is the result when the guest cannot be asked any more, or cannot be believed.
// What became of the command is not known, unless it was being stopped anyway. nil
// when the Service is closing.
func (r *run) lost(ctx context.Context, cause error) *Result {
	if ctx.Err() != nil {
		return nil
	}
	gone, order := ended(r.sandbox), r.ordered()
	res := &Result{Reason: SandboxLost, Evidence: make(map[string]string)}
	switch {
	case order != nil && (order.reason != SessionEnded || r.told || !gone):
		// A session is also ended because its sandbox is gone; that is no order then.
		stopped(order, res)
	case gone:
		res.Detail = "the sandbox ended" + whyEnded(r.sandbox) + "; " + r.unknown()
	case r.overdue():
		res.Reason = TimedOut
		res.Detail = fmt.Sprintf("ran longer than its timeout of %v; the guest did not end it", r.record.Command.Timeout)
	default:
		res.Detail = fmt.Sprintf("the command was given up (%v); %s", cause, r.unknown())
	}
	if !gone {
		res.Evidence["cause"] = cause.Error()
	}
	used := r.usage(ctx)
	r.attest(res, used)
	r.attestOutput(res, nil)
	if r.session == "" {
		res.Usage = Usage{CPUUser: used.CPU, PeakMemoryBytes: used.PeakMemoryBytes}
	}
	remains, err := r.clear(ctx)
	res.Reaped = int32(min(max(remains.Processes, 0), maxReaped))
	res.TreeEmpty, res.Killed = err == nil, remains.Processes > 0
	return res
}

// unknown says what is not known of a command that was lost.
func (r *run) unknown() string {
	if r.hasBegun() {
		return "whether the command finished is not known"
	}
	return "whether the command was started is not known"
}

// clear ends what is left of a command that cannot be followed. In a session the
// guest may still be able to end its tree alone; if not, the sandbox goes, with all
// that runs in it.
func (r *run) clear(ctx context.Context) (engine.Remains, error) {
	if r.session == "" {
		return r.terminate(ctx)
	}
	if !ended(r.sandbox) {
		r.mu.Lock()
		r.record.State = max(r.record.State, Stopping)
		r.mu.Unlock()
		r.note(ctx) // so that nobody after us takes it for one that was never started
		err := r.clearTree(ctx)
		if err == nil {
			return engine.Remains{}, nil
		}
		r.service.log.ErrorContext(ctx, "a session's sandbox is ended because its guest cannot end a command",
			"session", r.session, "execution", r.id, "error", err)
	}
	return r.terminate(ctx)
}

// clearTree has the guest kill the command's tree. A guest releases only what has ended.
func (r *run) clearTree(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), answerTime, errNoAnswer)
	defer cancel()
	for {
		err := r.guest.Stop(ctx, r.id, 0)
		if err == nil || answered(err) {
			if err = r.guest.Release(ctx, r.id); err == nil {
				return nil
			}
		}
		if !pause(ctx, guestRetry) {
			return err
		}
	}
}

// startFailed is the result when nothing ran.
func startFailed(kind string, err error) *Result {
	return &Result{Reason: StartFailed, Detail: err.Error(), TreeEmpty: true, Evidence: map[string]string{"kind": kind}}
}

// noInterpreter says which package would have what is missing.
func noInterpreter(c Command, missing error) *Result {
	how := interpreters()[c.Language]
	return &Result{
		Reason: StartFailed, TreeEmpty: true,
		Detail: fmt.Sprintf("%s is not in the sandbox's image; on the host of executord: apt-get install %s (%v)", how.programs[0], how.pkg, missing),
		Evidence: map[string]string{
			"kind": "no_interpreter", "program": how.programs[0], "package": how.pkg,
		},
	}
}

func kindName(k guestv1.Error_Kind) string {
	switch k {
	case guestv1.Error_KIND_NO_SUCH_PROGRAM:
		return "not_found"
	case guestv1.Error_KIND_NOT_EXECUTABLE:
		return "not_executable"
	case guestv1.Error_KIND_NO_WORKING_DIRECTORY:
		return "no_working_directory"
	case guestv1.Error_KIND_EXHAUSTED:
		return "exhausted"
	default:
		return "refused"
	}
}

// complete adds what every result has, and cuts what would not fit into the log.
func (r *run) complete(res *Result) {
	ended := res.Times.Ended
	if ended.IsZero() {
		ended = time.Now()
	}
	res.Times = r.times
	res.Times.Ended = ended
	stdout, stderr := r.log.Totals()
	res.Totals = []StreamTotal{totalOf("stdout", stdout), totalOf("stderr", stderr)}
	res.Detail, res.CancelledBy = clip(res.Detail, maxDetail), clip(res.CancelledBy, maxFact)
	if len(res.Evidence) == 0 {
		res.Evidence = nil
	}
	for name, fact := range res.Evidence {
		res.Evidence[name] = clip(fact, maxFact)
	}
}

func totalOf(stream string, t eventlog.Total) StreamTotal {
	return StreamTotal{Stream: stream, Size: t.Size, CRC32C: t.CRC32C, Dropped: t.Dropped}
}

// clip makes valid UTF-8 of at most n bytes of a text that anybody can have written.
func clip(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= n {
		return s
	}
	const more = "…"
	cut := n - len(more)
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + more
}

// micros bounds what a guest can tell.
func micros(n uint64) time.Duration { return time.Duration(min(n, maxMicros)) * time.Microsecond }

func signalName(n int32) string {
	if name := unix.SignalName(unix.Signal(n)); name != "" {
		return name
	}
	return "signal " + strconv.Itoa(int(n))
}
