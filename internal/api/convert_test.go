package api

import (
	"math"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/session"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// TestEnums walks every value of the enums that the domain knows by name or by order,
// both ways: each value of the API is reached from exactly one of the domain's, and
// none of these ends in UNSPECIFIED.
func TestEnums(t *testing.T) {
	reasons := []execution.Reason{
		execution.Exited, execution.Signaled, execution.TimedOut, execution.Cancelled, execution.OOMKilled,
		execution.SessionEnded, execution.SandboxLost, execution.StartFailed, execution.Reason("DISK_FULL"), execution.ServerStopped,
		execution.IdleTimedOut, execution.OutputLimit, execution.Abandoned,
	}
	outcomes := []execution.Outcome{
		execution.Success, execution.Failure, execution.Timeout, execution.Crashed, execution.CancelledByAny,
	}
	states := []execution.State{execution.Starting, execution.Running, execution.Stopping, execution.Ended}
	sessionStates := []session.State{session.Starting, session.Running, session.Terminating, session.Terminated, session.Pausing, session.Paused, session.Resuming}
	endReasons := []session.EndReason{
		session.Requested, session.Expired, session.StartFailed, session.SandboxLost, session.ServerStopped, session.Idle,
	}
	gaps := []execution.GapReason{execution.GapRetention, execution.GapEpochChanged, execution.GapDamaged}
	streams := []string{"stdout", "stderr"}

	t.Run("Reason", func(t *testing.T) {
		walk(t, reasons, reasonProto, func(r execution.Reason) string { return "REASON_" + string(r) })
	})
	t.Run("Outcome", func(t *testing.T) {
		walk(t, outcomes, outcomeProto, func(o execution.Outcome) string { return "OUTCOME_" + string(o) })
	})
	t.Run("State", func(t *testing.T) {
		names := map[execution.State]string{1: "STATE_STARTING", 2: "STATE_RUNNING", 3: "STATE_STOPPING", 4: "STATE_ENDED"}
		walk(t, states, stateProto, func(s execution.State) string { return names[s] })
	})
	t.Run("Session_State", func(t *testing.T) {
		names := map[session.State]string{1: "STATE_STARTING", 2: "STATE_RUNNING", 3: "STATE_TERMINATING", 4: "STATE_TERMINATED", 5: "STATE_PAUSING", 6: "STATE_PAUSED", 7: "STATE_RESUMING"}
		walk(t, sessionStates, sessionStateProto, func(s session.State) string { return names[s] })
	})
	t.Run("Session_EndReason", func(t *testing.T) {
		walk(t, endReasons, endReasonProto, func(r session.EndReason) string { return "END_REASON_" + string(r) })
	})
	t.Run("Gap_Reason", func(t *testing.T) {
		walk(t, gaps, gapReasonProto, func(r execution.GapReason) string { return "REASON_" + string(r) })
	})
	t.Run("Stream", func(t *testing.T) {
		walk(t, streams, streamProto, func(s string) string { return "STREAM_" + strings.ToUpper(s) })
		for _, name := range streams {
			if back, err := streamName(streamProto(name)); err != nil || back != name {
				t.Errorf("%s comes back as %q, %v", name, back, err)
			}
		}
	})
}

type protoEnum interface {
	comparable
	Descriptor() protoreflect.EnumDescriptor
	Number() protoreflect.EnumNumber
	String() string
}

func walk[D any, P protoEnum](t *testing.T, domain []D, convert func(D) P, name func(D) string) {
	t.Helper()
	reached := make(map[protoreflect.EnumNumber]bool)
	for _, d := range domain {
		p := convert(d)
		if p.String() != name(d) {
			t.Errorf("%v becomes %v, want %s", d, p, name(d))
		}
		if reached[p.Number()] {
			t.Errorf("two values become %v", p)
		}
		reached[p.Number()] = true
	}
	var zero P
	values := zero.Descriptor().Values()
	for i := range values.Len() {
		if number := values.Get(i).Number(); reached[number] == (number == 0) {
			t.Errorf("%s: reached is %v", values.Get(i).Name(), reached[number])
		}
	}
	var unknown D
	if p := convert(unknown); p.Number() != 0 {
		t.Errorf("the zero value becomes %v", p)
	}
}

func at(seconds int64) time.Time { return time.Unix(seconds, 5) }

func stamp(seconds int64) *timestamppb.Timestamp {
	return &timestamppb.Timestamp{Seconds: seconds, Nanos: 5}
}

func TestExecutionProto(t *testing.T) {
	code, grace := int32(3), time.Duration(0)
	full := execution.Execution{
		ID: "e1", Session: "s1",
		Command: execution.Command{
			Language: execution.Python, Source: "print()", Env: map[string]string{"TOKEN": "secret"},
			WorkingDirectory: "/w", Timeout: time.Minute, GracePeriod: &grace, IdleTimeout: time.Hour,
		},
		Limits:        engine.Limits{MemoryBytes: 1, CPUMillis: 2, PIDs: 3, DiskBytes: 4, OpenFiles: 5},
		Policies:      execution.Policies{OnLimit: execution.Block, Retention: time.Hour, Detach: execution.CancelDetached, DetachGrace: &grace},
		Network:       egress.Policy{Mode: engine.NetworkEgress, Rules: []egress.Rule{{Host: "a.example", Ports: []uint16{443}}}},
		RetainedBytes: 4, Labels: map[string]string{"a": "b"}, Owner: "key:ci", Engine: "local", Sandbox: "box",
		State: execution.Ended, Epoch: "e", Sequence: 9,
		CreateTime: at(1), StartTime: at(2), EndTime: at(3),
		Result: &execution.Result{
			Reason: execution.Exited, ExitCode: &code, Signal: 0, Detail: "d", CancelledBy: "c",
			Totals: []execution.StreamTotal{
				{Stream: "stdout", Size: 10, CRC32C: 11, Dropped: 1}, {Stream: "stderr", Size: 20, CRC32C: 21},
			},
			Times:  execution.Times{Queued: at(1), SandboxReady: at(2), Started: at(3), FirstOutput: at(4), Ended: at(5)},
			Usage:  execution.Usage{CPUUser: time.Second, CPUSystem: time.Millisecond, PeakMemoryBytes: 7},
			Reaped: 2, TreeEmpty: true, Killed: true, Evidence: map[string]string{"k": "v"},
		},
	}
	want := &executorv1.Execution{
		Name: "sessions/s1/executions/e1",
		Command: &executorv1.Command{
			Code: &executorv1.Code{Language: executorv1.Language_LANGUAGE_PYTHON, Source: "print()"},
			Env:  map[string]string{"TOKEN": ""}, WorkingDirectory: "/w",
			Timeout: durationpb.New(time.Minute), GracePeriod: durationpb.New(0), IdleTimeout: durationpb.New(time.Hour),
		},
		State: executorv1.Execution_STATE_ENDED, Engine: "local", Sandbox: "box",
		Limits: &executorv1.Limits{MemoryBytes: 1, CpuMillis: 2, Pids: 3, DiskBytes: 4, OpenFiles: 5},
		Network: &executorv1.NetworkPolicy{
			Mode: executorv1.NetworkPolicy_MODE_EGRESS, Rules: []*executorv1.EgressRule{{Host: "a.example", Ports: []uint32{443}}},
		},
		OutputPolicy: &executorv1.OutputPolicy{RetainedBytes: 4, OnLimit: executorv1.OutputPolicy_ON_LIMIT_BLOCK, Retention: durationpb.New(time.Hour)},
		DetachPolicy: &executorv1.DetachPolicy{Mode: executorv1.DetachPolicy_MODE_CANCEL, Grace: durationpb.New(0)},
		Labels:       map[string]string{"a": "b"},
		Owner:        "key:ci",
		Cursor:       &executorv1.Cursor{Epoch: "e", Sequence: 9},
		CreateTime:   stamp(1), StartTime: stamp(2), EndTime: stamp(3),
		Result: &executorv1.Result{
			Reason: executorv1.Reason_REASON_EXITED, Outcome: executorv1.Outcome_OUTCOME_ERROR, ExitCode: &code,
			Detail: "d", CancelledBy: "c",
			Totals: []*executorv1.StreamTotal{
				{Stream: executorv1.Stream_STREAM_STDOUT, Size: 10, Crc32C: 11, Dropped: 1},
				{Stream: executorv1.Stream_STREAM_STDERR, Size: 20, Crc32C: 21},
			},
			Times: &executorv1.StageTimes{
				Queued: stamp(1), SandboxReady: stamp(2), Started: stamp(3), FirstOutput: stamp(4), Ended: stamp(5),
			},
			Usage: &executorv1.Usage{
				CpuUser: durationpb.New(time.Second), CpuSystem: durationpb.New(time.Millisecond), PeakMemoryBytes: 7,
			},
			ReapedProcesses: 2, TreeEmpty: true, Killed: true, Evidence: map[string]string{"k": "v"},
		},
	}
	if diff := cmp.Diff(want, executionProto(full), protocmp.Transform()); diff != "" {
		t.Errorf("a full one (-want +got):\n%s", diff)
	}
	least := execution.Execution{ID: "e1", State: execution.Starting, CreateTime: at(1), Command: execution.Command{Args: []string{"true"}}}
	want = &executorv1.Execution{
		Name: "executions/e1", State: executorv1.Execution_STATE_STARTING, CreateTime: stamp(1),
		Command: &executorv1.Command{Args: []string{"true"}}, Limits: &executorv1.Limits{}, OutputPolicy: &executorv1.OutputPolicy{},
		Network: &executorv1.NetworkPolicy{Mode: executorv1.NetworkPolicy_MODE_NONE},
	}
	if diff := cmp.Diff(want, executionProto(least), protocmp.Transform()); diff != "" {
		t.Errorf("the least one (-want +got):\n%s", diff)
	}
}

// TestNoFieldForgotten fills every field of the domain's types that can be converted
// and looks for fields of the API that stay empty.
func TestNoFieldForgotten(t *testing.T) {
	code := int32(0)
	result := &execution.Result{
		Reason: execution.Cancelled, ExitCode: &code, Signal: 9, Detail: "d", CancelledBy: "c",
		Totals: []execution.StreamTotal{{Stream: "stdout", Size: 1, CRC32C: 1, Dropped: 1}},
		Times:  execution.Times{Queued: at(1), SandboxReady: at(1), Started: at(1), FirstOutput: at(1), Ended: at(1)},
		Usage:  execution.Usage{CPUUser: 1, CPUSystem: 1, PeakMemoryBytes: 1},
		Reaped: 1, TreeEmpty: true, Killed: true, Evidence: map[string]string{"k": "v"},
	}
	everything := session.Session{
		ID: "s", State: session.Terminated, Reason: session.Expired, Detail: "d", Engine: "local", Sandbox: "b",
		Limits:   engine.Limits{MemoryBytes: 1, CPUMillis: 1, PIDs: 1, DiskBytes: 1, OpenFiles: 1},
		Network:  egress.Policy{Mode: engine.NetworkEgress, Rules: []egress.Rule{{Host: "a", Ports: []uint16{1}}}},
		Lifetime: 1, Labels: map[string]string{"a": "b"}, Owner: "key:ci", CreateTime: at(1), EndTime: at(1),
		Details: session.Details{
			Agent: &session.AgentSpec{Kind: "opencode", Model: session.Model{Provider: "p", Model: "m", BaseURL: "u"}}, Generation: 2, Image: "i", ForkedFrom: "f",
			Checkouts: []session.Checkout{{Path: "p"}}, Saved: []session.SavedWork{{Path: "p"}}, IdleTimeout: 1, Identity: session.Identity{Name: "n", Email: "e"},
			SandboxDeadline: at(1), Status: session.AgentStatus{State: session.AgentReady, Version: "v", Detail: "d", MCP: []session.MCPServer{{Name: "m", State: "FAILED", Detail: "d"}}},
		},
	}
	full := sessionProto(everything)
	turns := &fakeTurns{running: "t", used: agent.Usage{InputTokens: 1, OutputTokens: 1, ReasoningTokens: 1, CacheReadTokens: 1, CacheWriteTokens: 1, CostMicros: 1}}
	if err := (&sessionService{turns: turns}).withTurns(t.Context(), everything, full); err != nil {
		t.Fatal(err)
	}
	messages := []proto.Message{resultProto(result), full}
	var check func(message protoreflect.Message)
	check = func(message protoreflect.Message) {
		fields := message.Descriptor().Fields()
		for i := range fields.Len() {
			fd := fields.Get(i)
			if !message.Has(fd) {
				t.Errorf("%s is empty", fd.FullName())
			} else if fd.Message() != nil && !fd.IsMap() && !fd.IsList() && fd.Message().ParentFile().Package() == apiPackage {
				check(message.Get(fd).Message())
			}
		}
	}
	for _, message := range messages {
		check(message.ProtoReflect())
	}
}

// TestHostileTexts: what a program in the sandbox may have put into a result must not
// make the answer impossible to send.
func TestHostileTexts(t *testing.T) {
	bad := "a\xff\xfeb"
	result := resultProto(&execution.Result{
		Reason: execution.StartFailed, Detail: bad, CancelledBy: bad, Evidence: map[string]string{bad: bad},
	})
	ended := sessionProto(session.Session{ID: "s", Detail: bad})
	for _, message := range []proto.Message{result, ended} {
		if _, err := proto.Marshal(message); err != nil {
			t.Error(err)
		}
	}
	if result.GetDetail() != "a\uFFFDb" || ended.GetDetail() != "a\uFFFDb" {
		t.Errorf("%q, %q", result.GetDetail(), ended.GetDetail())
	}
}

func TestSourceIsCut(t *testing.T) {
	for name, test := range map[string]struct {
		source string
		want   int
	}{
		"short":             {strings.Repeat("x", 4096), 4096},
		"long":              {strings.Repeat("x", 5000), 4096},
		"in a character":    {strings.Repeat("x", 4095) + "éé", 4095},
		"three bytes apart": {strings.Repeat("€", 2000), 4095},
	} {
		t.Run(name, func(t *testing.T) {
			got := commandProto(execution.Command{Language: execution.Bash, Source: test.source}).GetCode().GetSource()
			if len(got) != test.want || !utf8.ValidString(got) || !strings.HasPrefix(test.source, got) {
				t.Errorf("%d bytes, want %d", len(got), test.want)
			}
		})
	}
}

func TestEventProto(t *testing.T) {
	cursor := execution.Cursor{Epoch: "e", Sequence: 2}
	base := func(kind func(*executorv1.Event)) *executorv1.Event {
		e := &executorv1.Event{Cursor: &executorv1.Cursor{Epoch: "e", Sequence: 2}, EventTime: stamp(1)}
		kind(e)
		return e
	}
	tests := map[string]struct {
		event execution.Event
		want  *executorv1.Event
	}{
		"written by a later executord": {execution.Event{}, base(func(*executorv1.Event) {})},
		"started": {
			execution.Event{Started: &execution.Started{Execution: execution.Ref{Session: "s", ID: "e"}}},
			base(func(e *executorv1.Event) {
				e.Kind = &executorv1.Event_Started{Started: &executorv1.Started{Execution: "sessions/s/executions/e"}}
			}),
		},
		"output": {
			execution.Event{Output: &execution.Output{Stream: "stderr", Offset: 7, Data: []byte{0, 0xff}}},
			base(func(e *executorv1.Event) {
				e.Kind = &executorv1.Event_Output{Output: &executorv1.OutputChunk{
					Stream: executorv1.Stream_STREAM_STDERR, Offset: 7, Data: []byte{0, 0xff},
				}}
			}),
		},
		"gap": {
			execution.Event{Gap: &execution.Gap{
				Reason: "RETENTION", MissingEvents: 4,
				Resume: []execution.StreamPosition{{Stream: "stdout", Offset: 5}, {Stream: "stderr", Offset: 6}},
			}},
			base(func(e *executorv1.Event) {
				e.Kind = &executorv1.Event_Gap{Gap: &executorv1.Gap{
					Reason: executorv1.Gap_REASON_RETENTION, MissingEvents: 4,
					Resume: []*executorv1.StreamPosition{
						{Stream: executorv1.Stream_STREAM_STDOUT, Offset: 5}, {Stream: executorv1.Stream_STREAM_STDERR, Offset: 6},
					},
				}}
			}),
		},
		"result": {
			execution.Event{Result: &execution.Result{Reason: execution.TimedOut}},
			base(func(e *executorv1.Event) {
				e.Kind = &executorv1.Event_Result{Result: &executorv1.Result{
					Reason: executorv1.Reason_REASON_TIMED_OUT, Outcome: executorv1.Outcome_OUTCOME_TIMEOUT,
					Times: &executorv1.StageTimes{},
					Usage: &executorv1.Usage{CpuUser: durationpb.New(0), CpuSystem: durationpb.New(0)},
				}}
			}),
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			test.event.Cursor, test.event.Time = cursor, at(1)
			if diff := cmp.Diff(test.want, eventProto(test.event), protocmp.Transform()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestHeartbeatProto(t *testing.T) {
	got := heartbeatProto(execution.Cursor{Epoch: "e", Sequence: 2}, at(3))
	if got.GetCursor().GetSequence() != 2 || got.GetHeartbeat().GetLastEventTime().AsTime() != at(3).UTC() || got.GetEventTime() == nil {
		t.Errorf("%v", got)
	}
	if empty := heartbeatProto(execution.Cursor{}, time.Time{}); empty.GetHeartbeat().GetLastEventTime() != nil {
		t.Errorf("the zero time is shown: %v", empty)
	}
}

// TestLargestMessages keeps every message of a stream of output within 32 KiB: one
// byte more costs a buffer of 1 MiB for each client that does not read.
func TestLargestMessages(t *testing.T) {
	data := make([]byte, maxChunk)
	event := eventProto(execution.Event{
		Cursor: execution.Cursor{Epoch: strings.Repeat("e", 64), Sequence: math.MaxUint64},
		Time:   time.Unix(253402300799, 999999999),
		Output: &execution.Output{Stream: "stderr", Offset: math.MaxInt64, Data: data},
	})
	for _, message := range []proto.Message{
		&executorv1.ExecuteResponse{Event: event},
		&executorv1.WatchExecutionResponse{Event: event},
		&executorv1.ReadOutputResponse{Offset: math.MaxInt64, Data: data},
	} {
		// grpc-go puts 5 more bytes before it, in a buffer of their own.
		if size := proto.Size(message); size > 32768 || size < maxChunk {
			t.Errorf("%T takes %d bytes", message, size)
		}
	}
}

func TestOutputEventAllocations(t *testing.T) {
	event := execution.Event{
		Cursor: execution.Cursor{Epoch: "e", Sequence: 1}, Time: time.Now(),
		Output: &execution.Output{Stream: "stdout", Data: []byte("x")},
	}
	var kept *executorv1.Event
	if n := testing.AllocsPerRun(100, func() { kept = eventProto(event) }); n > 1 {
		t.Errorf("%v allocations", n)
	}
	if kept.GetOutput() == nil {
		t.Error("no output")
	}
}
