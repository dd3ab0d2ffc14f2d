package api

import (
	"strings"
	"time"
	"unicode/utf8"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/session"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// maxSourceShown is how much of a source a read shows.
const maxSourceShown = 4096

func executionProto(e execution.Execution) *executorv1.Execution {
	converted := &executorv1.Execution{
		Name:         executionName(execution.Ref{Session: e.Session, ID: e.ID}),
		Command:      commandProto(e.Command),
		State:        stateProto(e.State),
		Engine:       e.Engine,
		Sandbox:      e.Sandbox,
		Limits:       limitsProto(e.Limits),
		Network:      networkProto(e.Network),
		OutputPolicy: outputPolicyProto(e),
		DetachPolicy: detachPolicyProto(e.Policies),
		CreateTime:   timestamp(e.CreateTime),
		StartTime:    timestamp(e.StartTime),
		EndTime:      timestamp(e.EndTime),
		Labels:       e.Labels,
		Owner:        e.Owner,
	}
	if e.Epoch != "" {
		converted.Cursor = cursorProto(execution.Cursor{Epoch: e.Epoch, Sequence: e.Sequence})
	}
	if e.Result != nil {
		converted.Result = resultProto(e.Result)
	}
	return converted
}

func stateProto(s execution.State) executorv1.Execution_State {
	switch s {
	case execution.Starting:
		return executorv1.Execution_STATE_STARTING
	case execution.Running:
		return executorv1.Execution_STATE_RUNNING
	case execution.Stopping:
		return executorv1.Execution_STATE_STOPPING
	case execution.Ended:
		return executorv1.Execution_STATE_ENDED
	default:
		return executorv1.Execution_STATE_UNSPECIFIED
	}
}

// commandProto shows a command as it was asked for, but for what may be secret or
// large, also when the domain still has that.
func commandProto(c execution.Command) *executorv1.Command {
	converted := &executorv1.Command{
		Args:             c.Args,
		WorkingDirectory: c.WorkingDirectory,
		Stdin:            c.Stdin,
	}
	if c.Terminal != nil {
		converted.Terminal = &executorv1.TerminalSize{Rows: int32(c.Terminal.Rows), Columns: int32(c.Terminal.Columns)}
	}
	if c.Language != "" {
		converted.Code = &executorv1.Code{Language: languageProto(c.Language), Source: head(c.Source, maxSourceShown)}
	}
	if len(c.Env) > 0 {
		converted.Env = make(map[string]string, len(c.Env))
		for name := range c.Env {
			converted.Env[name] = ""
		}
	}
	if c.Timeout > 0 {
		converted.Timeout = durationpb.New(c.Timeout)
	}
	if c.GracePeriod != nil {
		converted.GracePeriod = durationpb.New(*c.GracePeriod)
	}
	if c.IdleTimeout > 0 {
		converted.IdleTimeout = durationpb.New(c.IdleTimeout)
	}
	return converted
}

func languageProto(l execution.Language) executorv1.Language {
	return executorv1.Language(executorv1.Language_value["LANGUAGE_"+strings.ToUpper(string(l))])
}

func limitsProto(l engine.Limits) *executorv1.Limits {
	return &executorv1.Limits{MemoryBytes: l.MemoryBytes, CpuMillis: l.CPUMillis, Pids: l.PIDs, DiskBytes: l.DiskBytes, OpenFiles: l.OpenFiles}
}

func cursorProto(c execution.Cursor) *executorv1.Cursor {
	return &executorv1.Cursor{Epoch: c.Epoch, Sequence: c.Sequence}
}

// resultProto converts the end of an execution. Its texts were partly written by
// programs in the sandbox and may hold anything.
func resultProto(r *execution.Result) *executorv1.Result {
	converted := &executorv1.Result{
		Reason:          reasonProto(r.Reason),
		Outcome:         outcomeProto(r.Outcome()),
		ExitCode:        r.ExitCode,
		Signal:          r.Signal,
		Detail:          text(r.Detail),
		CancelledBy:     text(r.CancelledBy),
		Times:           timesProto(r.Times),
		Usage:           usageProto(r.Usage),
		ReapedProcesses: r.Reaped,
		TreeEmpty:       r.TreeEmpty,
		Killed:          r.Killed,
	}
	for _, total := range r.Totals {
		converted.Totals = append(converted.Totals, &executorv1.StreamTotal{
			Stream: streamProto(total.Stream), Size: total.Size, Crc32C: total.CRC32C, Dropped: total.Dropped,
		})
	}
	if len(r.Evidence) > 0 {
		converted.Evidence = make(map[string]string, len(r.Evidence))
		for key, value := range r.Evidence {
			converted.Evidence[text(key)] = text(value)
		}
	}
	return converted
}

// The domain's reasons, outcomes and the like are called as those of the API.

func reasonProto(r execution.Reason) executorv1.Reason {
	return executorv1.Reason(executorv1.Reason_value["REASON_"+string(r)])
}

func outcomeProto(o execution.Outcome) executorv1.Outcome {
	return executorv1.Outcome(executorv1.Outcome_value["OUTCOME_"+string(o)])
}

func gapReasonProto(r execution.GapReason) executorv1.Gap_Reason {
	return executorv1.Gap_Reason(executorv1.Gap_Reason_value["REASON_"+string(r)])
}

func endReasonProto(r session.EndReason) executorv1.Session_EndReason {
	return executorv1.Session_EndReason(executorv1.Session_EndReason_value["END_REASON_"+string(r)])
}

// streamProto is called for every chunk: so no map.
func streamProto(name string) executorv1.Stream {
	switch name {
	case stdout:
		return executorv1.Stream_STREAM_STDOUT
	case stderr:
		return executorv1.Stream_STREAM_STDERR
	default:
		return executorv1.Stream_STREAM_UNSPECIFIED
	}
}

func timesProto(t execution.Times) *executorv1.StageTimes {
	return &executorv1.StageTimes{
		Queued:       timestamp(t.Queued),
		SandboxReady: timestamp(t.SandboxReady),
		Started:      timestamp(t.Started),
		FirstOutput:  timestamp(t.FirstOutput),
		Ended:        timestamp(t.Ended),
	}
}

func usageProto(u execution.Usage) *executorv1.Usage {
	return &executorv1.Usage{
		CpuUser:         durationpb.New(u.CPUUser),
		CpuSystem:       durationpb.New(u.CPUSystem),
		PeakMemoryBytes: u.PeakMemoryBytes,
	}
}

// outputEvent holds the parts of an output event, so that it takes one allocation.
type outputEvent struct {
	event  executorv1.Event
	cursor executorv1.Cursor
	time   timestamppb.Timestamp
	kind   executorv1.Event_Output
	chunk  executorv1.OutputChunk
}

// eventProto makes a new message: grpc-go may read a message after Send has returned.
func eventProto(e execution.Event) *executorv1.Event {
	if e.Output != nil {
		return outputProto(e)
	}
	converted := &executorv1.Event{Cursor: cursorProto(e.Cursor), EventTime: timestamp(e.Time)}
	switch {
	case e.Started != nil:
		converted.Kind = &executorv1.Event_Started{
			Started: &executorv1.Started{Execution: executionName(e.Started.Execution)},
		}
	case e.Gap != nil:
		gap := &executorv1.Gap{Reason: gapReasonProto(e.Gap.Reason), MissingEvents: e.Gap.MissingEvents}
		for _, position := range e.Gap.Resume {
			gap.Resume = append(gap.Resume, &executorv1.StreamPosition{
				Stream: streamProto(position.Stream), Offset: position.Offset,
			})
		}
		converted.Kind = &executorv1.Event_Gap{Gap: gap}
	case e.Warning != nil:
		converted.Kind = &executorv1.Event_DeadlineWarning{DeadlineWarning: warningProto(e.Warning)}
	case e.Result != nil:
		converted.Kind = &executorv1.Event_Result{Result: resultProto(e.Result)}
	}
	return converted
}

func outputProto(e execution.Event) *executorv1.Event {
	o := &outputEvent{}
	o.cursor.Epoch, o.cursor.Sequence = e.Cursor.Epoch, e.Cursor.Sequence
	o.time.Seconds, o.time.Nanos = e.Time.Unix(), int32(e.Time.Nanosecond())
	o.chunk.Stream, o.chunk.Offset, o.chunk.Data = streamProto(e.Output.Stream), e.Output.Offset, e.Output.Data
	o.kind.Output = &o.chunk
	o.event.Cursor, o.event.EventTime, o.event.Kind = &o.cursor, &o.time, &o.kind
	return &o.event
}

func heartbeatProto(cursor execution.Cursor, last time.Time) *executorv1.Event {
	return &executorv1.Event{
		Cursor:    cursorProto(cursor),
		EventTime: timestamppb.Now(),
		Kind:      &executorv1.Event_Heartbeat{Heartbeat: &executorv1.Heartbeat{LastEventTime: timestamp(last)}},
	}
}

// timestamp converts a time; the zero time is an absent one.
func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// text makes s fit for a string field: a message with invalid UTF-8 in one cannot be
// sent at all.
func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// head returns at most the first size bytes of s, without cutting a character apart.
func head(s string, size int) string {
	if len(s) <= size {
		return s
	}
	for size > 0 && !utf8.RuneStart(s[size]) {
		size--
	}
	return s[:size]
}
