package api

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/execution"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

func argv(args ...string) *executorv1.Command { return &executorv1.Command{Args: args} }

func pairs(n int, name func(int) string, value string) map[string]string {
	m := make(map[string]string, n)
	for i := range n {
		m[name(i)] = value
	}
	return m
}

// TestBadStart is the table of everything that is wrong with a start. Execute and
// StartExecution must refuse it in the same way, before anything is started.
func TestBadStart(t *testing.T) {
	tests := map[string]struct {
		request *executorv1.StartExecutionRequest
		reason  string // "" is INVALID_FIELD
		fields  []string
		meta    map[string]string
	}{
		"no command": {
			request: &executorv1.StartExecutionRequest{},
			fields:  []string{"command"},
		},
		"empty command": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{}},
			reason:  "COMMAND_EMPTY",
			fields:  []string{"command.args"},
		},
		"code and args": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"},
				Code: &executorv1.Code{Language: executorv1.Language_LANGUAGE_BASH, Source: "true"},
			}},
			reason: "COMMAND_AMBIGUOUS",
			fields: []string{"command.args"},
		},
		"empty program": {
			request: &executorv1.StartExecutionRequest{Command: argv("", "x")},
			reason:  "COMMAND_EMPTY",
			fields:  []string{"command.args[0]"},
		},
		"NUL in args": {
			request: &executorv1.StartExecutionRequest{Command: argv("a", "b", "c", "d\x00")},
			fields:  []string{"command.args[3]"},
		},
		"args too large": {
			request: &executorv1.StartExecutionRequest{Command: argv("echo", strings.Repeat("x", 65533))},
			reason:  "ARGS_TOO_LARGE",
			fields:  []string{"command.args"},
			meta:    map[string]string{"limit": "65536"},
		},
		"too many args": {
			request: &executorv1.StartExecutionRequest{Command: argv(slices.Repeat([]string{"x"}, 4097)...)},
			fields:  []string{"command.args"},
		},
		"empty env name": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, Env: map[string]string{"": "x"},
			}},
			fields: []string{`command.env[""]`},
		},
		"env name with =": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, Env: map[string]string{"A=B": "x", "GOOD": "x"},
			}},
			fields: []string{`command.env["A=B"]`},
		},
		"NUL in env name": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, Env: map[string]string{"A\x00": "x"},
			}},
			fields: []string{`command.env["A\x00"]`},
		},
		"NUL in env value": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, Env: map[string]string{"A": "x\x00"},
			}},
			fields: []string{`command.env["A"]`},
		},
		"env too large": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, Env: map[string]string{"A": strings.Repeat("x", 131072)},
			}},
			reason: "ENV_TOO_LARGE",
			fields: []string{"command.env"},
			meta:   map[string]string{"limit": "131072"},
		},
		"too many env": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, Env: pairs(1025, func(i int) string { return fmt.Sprint("A", i) }, ""),
			}},
			fields: []string{"command.env"},
		},
		"relative working directory": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, WorkingDirectory: "work",
			}},
			fields: []string{"command.working_directory"},
		},
		"NUL in working directory": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, WorkingDirectory: "/a\x00",
			}},
			fields: []string{"command.working_directory"},
		},
		"long working directory": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, WorkingDirectory: "/" + strings.Repeat("a", 4096),
			}},
			fields: []string{"command.working_directory"},
		},
		"negative timeout": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, Timeout: durationpb.New(-time.Second),
			}},
			fields: []string{"command.timeout"},
		},
		"zero timeout": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, Timeout: durationpb.New(0),
			}},
			fields: []string{"command.timeout"},
		},
		"timeout of more than 7 days": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, Timeout: durationpb.New(604800*time.Second + 1),
			}},
			fields: []string{"command.timeout"},
		},
		"timeout in microseconds": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, Timeout: durationpb.New(1500 * time.Microsecond),
			}},
			reason: "TIMEOUT",
			fields: []string{"command.timeout"},
		},
		"timeout with mixed signs": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, Timeout: &durationpb.Duration{Seconds: 2, Nanos: -5},
			}},
			fields: []string{"command.timeout"},
		},
		"negative grace period": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args: []string{"true"}, GracePeriod: durationpb.New(-1),
			}},
			fields: []string{"command.grace_period"},
		},
		"no language": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Code: &executorv1.Code{Source: "x"},
			}},
			fields: []string{"command.code.language"},
		},
		"unknown language": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Code: &executorv1.Code{Language: 99, Source: "x"},
			}},
			fields: []string{"command.code.language"},
		},
		"empty source": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Code: &executorv1.Code{Language: executorv1.Language_LANGUAGE_PYTHON},
			}},
			fields: []string{"command.code.source"},
		},
		"source too large": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Code: &executorv1.Code{Language: executorv1.Language_LANGUAGE_PYTHON, Source: strings.Repeat("#", 1<<20+1)},
			}},
			fields: []string{"command.code.source"},
		},
		"bad parent": {
			request: &executorv1.StartExecutionRequest{Parent: "sessions/UPPER", Command: argv("true")},
			fields:  []string{"parent"},
		},
		"limits with a parent": {
			request: &executorv1.StartExecutionRequest{
				Parent: "sessions/s1", Command: argv("true"), Limits: &executorv1.Limits{Pids: 100},
			},
			reason: "LIMITS_WITH_PARENT",
			fields: []string{"limits"},
		},
		"limits out of range": {
			request: &executorv1.StartExecutionRequest{
				Command: argv("true"), Limits: &executorv1.Limits{MemoryBytes: 1, CpuMillis: 9, Pids: 7, DiskBytes: 1, OpenFiles: 1 << 21},
			},
			fields: []string{"limits.memory_bytes", "limits.cpu_millis", "limits.pids", "limits.disk_bytes", "limits.open_files"},
		},
		"too little retained": {
			request: &executorv1.StartExecutionRequest{
				Command: argv("true"), OutputPolicy: &executorv1.OutputPolicy{RetainedBytes: 1},
			},
			fields: []string{"output_policy.retained_bytes"},
		},
		"bad label name": {
			request: &executorv1.StartExecutionRequest{Command: argv("true"), Labels: map[string]string{"a b": "x"}},
			fields:  []string{`labels["a b"]`},
		},
		"bad label value": {
			request: &executorv1.StartExecutionRequest{Command: argv("true"), Labels: map[string]string{"a": "x\ny"}},
			fields:  []string{`labels["a"]`},
		},
		"too many labels": {
			request: &executorv1.StartExecutionRequest{
				Command: argv("true"), Labels: pairs(65, func(i int) string { return fmt.Sprint("l", i) }, "v"),
			},
			fields: []string{"labels"},
		},
	}
	b := newBench(t)
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if test.reason == "" {
				test.reason = "INVALID_FIELD"
			}
			check := func(err error) {
				t.Helper()
				d := wantError(t, err, codes.InvalidArgument, test.reason)
				if diff := cmp.Diff(test.fields, d.fields()); diff != "" {
					t.Errorf("fields (-want +got):\n%s", diff)
				}
				if test.meta != nil && !maps.Equal(test.meta, d.info.GetMetadata()) {
					t.Errorf("metadata is %v, want %v", d.info.GetMetadata(), test.meta)
				}
				for _, v := range d.bad.GetFieldViolations() {
					if v.GetDescription() == "" {
						t.Errorf("%s has no description", v.GetField())
					}
				}
			}
			_, err := b.executor.StartExecution(t.Context(), test.request)
			check(err)
			r := test.request
			stream, err := b.executor.Execute(t.Context(), &executorv1.ExecuteRequest{
				Parent: r.Parent, Command: r.Command, Limits: r.Limits, OutputPolicy: r.OutputPolicy, Labels: r.Labels,
			})
			if err != nil {
				t.Fatal(err)
			}
			_, err = stream.Recv()
			check(err)
		})
	}
	if n := len(b.executions.requests); n != 0 {
		t.Errorf("%d were started", n)
	}
}

// TestManyViolations keeps the answer within what headers may carry.
func TestManyViolations(t *testing.T) {
	b := newBench(t)
	_, err := b.executor.StartExecution(t.Context(), &executorv1.StartExecutionRequest{
		Command: argv(slices.Repeat([]string{"\x00"}, 4096)...),
	})
	d := wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
	if n := len(d.fields()); n != maxViolations {
		t.Errorf("%d violations, want %d", n, maxViolations)
	}
}

// TestLongFieldPath has names that would make path, description and message long; the
// answer must reach a client that takes only 8 KiB of headers.
func TestLongFieldPath(t *testing.T) {
	b := newBench(t)
	env := pairs(20, func(i int) string { return fmt.Sprint("=", i, strings.Repeat("\x01é", 2000)) }, "")
	client := executorv1.NewExecutorServiceClient(b.dial(grpc.WithMaxHeaderListSize(8192)))
	_, err := client.StartExecution(t.Context(), &executorv1.StartExecutionRequest{
		Command: &executorv1.Command{Args: []string{"true"}, Env: env},
	})
	d := wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
	if len(d.fields()) != maxViolations {
		t.Errorf("fields are %q", d.fields())
	}
}

func TestOtherBadRequests(t *testing.T) {
	const name = "executions/e1"
	tests := map[string]struct {
		method string
		req    proto.Message
		field  string
	}{
		"execute: heartbeat too short": {"Execute", &executorv1.ExecuteRequest{Command: argv("true"), HeartbeatInterval: durationpb.New(time.Second - 1)}, "heartbeat_interval"},
		"execute: heartbeat too long":  {"Execute", &executorv1.ExecuteRequest{Command: argv("true"), HeartbeatInterval: durationpb.New(301 * time.Second)}, "heartbeat_interval"},
		"watch: heartbeat too short":   {"WatchExecution", &executorv1.WatchExecutionRequest{Name: name, HeartbeatInterval: durationpb.New(0)}, "heartbeat_interval"},
		"watch: heartbeat mixed signs": {"WatchExecution", &executorv1.WatchExecutionRequest{Name: name, HeartbeatInterval: &durationpb.Duration{Seconds: 5, Nanos: -1}}, "heartbeat_interval"},
		"watch: no name":               {"WatchExecution", &executorv1.WatchExecutionRequest{}, "name"},
		"watch: bad name":              {"WatchExecution", &executorv1.WatchExecutionRequest{Name: "executions/e1/x"}, "name"},
		"watch: name with newline":     {"WatchExecution", &executorv1.WatchExecutionRequest{Name: "executions/e1\n"}, "name"},
		"read: no stream":              {"ReadOutput", &executorv1.ReadOutputRequest{Name: name}, "stream"},
		"read: unknown stream":         {"ReadOutput", &executorv1.ReadOutputRequest{Name: name, Stream: 7}, "stream"},
		"read: negative offset":        {"ReadOutput", &executorv1.ReadOutputRequest{Name: name, Stream: 1, Offset: -1}, "offset"},
		"read: negative limit":         {"ReadOutput", &executorv1.ReadOutputRequest{Name: name, Stream: 1, Limit: -1}, "limit"},
		"wait: negative":               {"WaitExecution", &executorv1.WaitExecutionRequest{Name: name, Timeout: durationpb.New(-1)}, "timeout"},
		"wait: too long":               {"WaitExecution", &executorv1.WaitExecutionRequest{Name: name, Timeout: durationpb.New(3601 * time.Second)}, "timeout"},
		"get: upper case":              {"GetExecution", &executorv1.GetExecutionRequest{Name: "executions/E1"}, "name"},
		"get: dots":                    {"GetExecution", &executorv1.GetExecutionRequest{Name: "executions/../x"}, "name"},
		"get: long id":                 {"GetExecution", &executorv1.GetExecutionRequest{Name: "executions/" + strings.Repeat("a", 64)}, "name"},
		"list: page size":              {"ListExecutions", &executorv1.ListExecutionsRequest{PageSize: -1}, "page_size"},
		"list: parent":                 {"ListExecutions", &executorv1.ListExecutionsRequest{Parent: "sessions/"}, "parent"},
		"list: long token":             {"ListExecutions", &executorv1.ListExecutionsRequest{PageToken: strings.Repeat("A", 513)}, "page_token"},
		"list: made-up token":          {"ListExecutions", &executorv1.ListExecutionsRequest{PageToken: "abc"}, "page_token"},
		"cancel: grace":                {"CancelExecution", &executorv1.CancelExecutionRequest{Name: name, GracePeriod: durationpb.New(601 * time.Second)}, "grace_period"},
		"cancel: requester":            {"CancelExecution", &executorv1.CancelExecutionRequest{Name: name, Requester: strings.Repeat("é", 129)}, "requester"},
		"delete: session":              {"DeleteExecution", &executorv1.DeleteExecutionRequest{Name: "sessions/s1"}, "name"},
		"session: lifetime":            {"CreateSession", &executorv1.CreateSessionRequest{Lifetime: durationpb.New(0)}, "lifetime"},
		"session: limits":              {"CreateSession", &executorv1.CreateSessionRequest{Limits: &executorv1.Limits{Pids: -1}}, "limits.pids"},
		"session: labels":              {"CreateSession", &executorv1.CreateSessionRequest{Labels: map[string]string{"": ""}}, `labels[""]`},
		"session get: execution":       {"GetSession", &executorv1.GetSessionRequest{Name: "sessions/s1/executions/e1"}, "name"},
		"session get: wait":            {"GetSession", &executorv1.GetSessionRequest{Name: "sessions/s1", Wait: durationpb.New(601 * time.Second)}, "wait"},
		"session list: page size":      {"ListSessions", &executorv1.ListSessionsRequest{PageSize: -1}, "page_size"},
		"session list: made-up token":  {"ListSessions", &executorv1.ListSessionsRequest{PageToken: "abc"}, "page_token"},
		"session terminate: no name":   {"TerminateSession", &executorv1.TerminateSessionRequest{}, "name"},
		"session terminate: requester": {"TerminateSession", &executorv1.TerminateSessionRequest{Name: "sessions/s1", Requester: strings.Repeat("x", 257)}, "requester"},
	}
	b := newBench(t)
	conn := b.dial()
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			for _, method := range methods() {
				if string(method.Name()) != test.method {
					continue
				}
				err := call(t.Context(), conn, method, test.req)
				d := detailsOf(t, err)
				if diff := cmp.Diff([]string{test.field}, d.fields()); diff != "" {
					t.Errorf("%v: fields (-want +got):\n%s", err, diff)
				}
				wantError(t, err, codes.InvalidArgument, d.info.GetReason())
				return
			}
			t.Fatal("no such method")
		})
	}
}

// TestStart checks what of a request reaches the domain.
func TestStart(t *testing.T) {
	grace, kill := 7*time.Second, time.Duration(0)
	tests := map[string]struct {
		request *executorv1.StartExecutionRequest
		want    execution.Request
	}{
		"least": {
			request: &executorv1.StartExecutionRequest{Command: argv("true")},
			want:    execution.Request{Command: execution.Command{Args: []string{"true"}}},
		},
		"all of a one-shot": {
			request: &executorv1.StartExecutionRequest{
				Command: &executorv1.Command{
					Args:             []string{"env", "", "-u", "é\x01"},
					Env:              map[string]string{"A": "1", "é": "\n"},
					WorkingDirectory: "/tmp",
					Timeout:          durationpb.New(1500 * time.Millisecond),
					GracePeriod:      durationpb.New(grace),
				},
				Limits:       &executorv1.Limits{MemoryBytes: 64 << 20, CpuMillis: 500, Pids: 100, DiskBytes: 16 << 20, OpenFiles: 16},
				OutputPolicy: &executorv1.OutputPolicy{RetainedBytes: 1 << 20},
				Labels:       map[string]string{"team/a": "x"},
			},
			want: execution.Request{
				Command: execution.Command{
					Args: []string{"env", "", "-u", "é\x01"}, Env: map[string]string{"A": "1", "é": "\n"},
					WorkingDirectory: "/tmp", Timeout: 1500 * time.Millisecond, GracePeriod: &grace,
				},
				Limits:        engine.Limits{MemoryBytes: 64 << 20, CPUMillis: 500, PIDs: 100, DiskBytes: 16 << 20, OpenFiles: 16},
				RetainedBytes: 1 << 20,
				Labels:        map[string]string{"team/a": "x"},
			},
		},
		"code in a session": {
			request: &executorv1.StartExecutionRequest{
				Parent: "sessions/s-1",
				Command: &executorv1.Command{
					Code:        &executorv1.Code{Language: executorv1.Language_LANGUAGE_NODE, Source: "1\x00"},
					GracePeriod: durationpb.New(0),
				},
			},
			want: execution.Request{
				Session: "s-1",
				Command: execution.Command{Language: execution.Node, Source: "1\x00", GracePeriod: &kill},
			},
		},
		"at the limits": {
			request: &executorv1.StartExecutionRequest{Command: &executorv1.Command{
				Args:    []string{"echo", strings.Repeat("x", 65530)},
				Env:     map[string]string{"A": strings.Repeat("x", 131069)},
				Timeout: durationpb.New(604800 * time.Second),
			}},
			want: execution.Request{Command: execution.Command{
				Args:    []string{"echo", strings.Repeat("x", 65530)},
				Env:     map[string]string{"A": strings.Repeat("x", 131069)},
				Timeout: 604800 * time.Second,
			}},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			resp, err := b.executor.StartExecution(t.Context(), test.request)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, b.executions.lastRequest(t)); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
			got := resp.GetExecution()
			want := "executions/new"
			if test.want.Session != "" {
				want = "sessions/" + test.want.Session + "/executions/new"
			}
			if got.GetName() != want || got.GetState() != executorv1.Execution_STATE_STARTING {
				t.Errorf("answered %v", got)
			}
			for variable, value := range got.GetCommand().GetEnv() {
				if value != "" {
					t.Errorf("the answer shows %s=%q", variable, value)
				}
			}
		})
	}
}

func TestLanguages(t *testing.T) {
	seen := make(map[execution.Language]bool)
	for number, name := range executorv1.Language_name {
		language, err := languageOf(executorv1.Language(number))
		if number == 0 {
			if err == nil {
				t.Errorf("%s is accepted", name)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if back := languageProto(language); back != executorv1.Language(number) {
			t.Errorf("%s comes back as %v", name, back)
		}
		seen[language] = true
	}
	for _, language := range []execution.Language{execution.Python, execution.Bash, execution.Node} {
		if !seen[language] {
			t.Errorf("no language of the API stands for %q", language)
		}
	}
}
