package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// furnished is a server with something of everything.
func furnished(t *testing.T) *clienttest.Server {
	t.Helper()
	s := clienttest.Start(t)
	c, err := client.Dial(client.Config{Address: s.Address()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx := context.Background()
	code := func(language executorv1.Language, source string) *executorv1.Command {
		return &executorv1.Command{Code: &executorv1.Code{Language: language, Source: source}, Timeout: durationpb.New(90e9)}
	}
	session := func(r *executorv1.CreateSessionRequest, wait bool) string {
		answer, err := c.Sessions().CreateSession(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		name := answer.GetSession().GetName()
		if wait {
			if _, err := c.Sessions().GetSession(ctx, &executorv1.GetSessionRequest{Name: name, Wait: durationpb.New(1e9)}); err != nil {
				t.Fatal(err)
			}
		}
		return name
	}
	s1 := session(&executorv1.CreateSessionRequest{
		Limits: &executorv1.Limits{MemoryBytes: 512 << 20, CpuMillis: 1500, Pids: 100}, Labels: map[string]string{"team": "core"},
	}, true)
	session(&executorv1.CreateSessionRequest{Labels: map[string]string{"fail": "no room left"}}, true)
	session(&executorv1.CreateSessionRequest{Lifetime: durationpb.New(60e9)}, false)

	for _, r := range []*executorv1.StartExecutionRequest{
		{Command: code(executorv1.Language_LANGUAGE_PYTHON, "out one\nerr two\nraw \"\\xff\\n\"\nexit 3"), Labels: map[string]string{"run": "7"}},
		{Command: &executorv1.Command{Args: []string{"out 'a b'", "", "timeout"}}},
		{Command: code(executorv1.Language_LANGUAGE_NODE, "out \x1b[31mred;gap 2;oom"), Limits: &executorv1.Limits{MemoryBytes: 64 << 20}},
		{Parent: s1, Command: &executorv1.Command{Args: []string{"start not_found"}, Env: map[string]string{"TOKEN": "secret"}}},
	} {
		answer, err := c.Executor().StartExecution(ctx, r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Wait(ctx, answer.GetExecution().GetName()); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// TestGolden compares what commands print with files in testdata/golden. With
// UPDATE_GOLDEN=1 it writes them.
func TestGolden(t *testing.T) {
	tests := []struct {
		name, line string
		env        []string
		stdin      string
		prepare    func(*clienttest.Server)
	}{
		{name: "run", line: "run 'out hello; err oops; exit 3'"},
		{name: "run_json", line: "run -o json --timeout 2s --label a=b 'out hello <&>; err oops; exit 3'"},
		{name: "run_json_bytes", line: `run -o json 'raw "a\xffb"; err fine'`},
		{name: "run_json_timeout", line: "run -o json --timeout 2s -- 'out before' 'timeout the deadline passed'"},
		{name: "run_json_not_started", line: "run -o json 'start not_executable'"},
		{name: "run_json_gap", line: "run -o json 'out a; gap 3; out b; oom'"},
		{name: "run_jsonl", line: "run -o jsonl 'out hello; err oops; gap 2; exit 3'"},
		{name: "run_detach", line: "run --detach 'out hello'"},
		{name: "run_detach_json", line: "run --detach -o json --retain 4m --limit-memory 64m --limit-cpu 0.5 --limit-pids 32 -e TOKEN=secret -- await"},
		{name: "run_gap", line: "run 'out a; gap 3; out b'"},
		{name: "run_timeout", line: "run --timeout 1500ms 'out a; timeout the deadline passed'"},
		{name: "run_oom", line: "run oom"},
		{name: "run_lost", line: "run 'lost its guest did not answer'"},
		{name: "run_signal", line: "run 'signal 11'"},
		{name: "run_not_found", line: "run -- nonsense"},
		{name: "exec", line: "exec sessions/s1 -e COLOUR=red -- 'env COLOUR' 'exit 7'"},
		{name: "exec_json", line: "exec s1 -o json -- 'out in the session'"},
		{name: "executions_list", line: "executions list"},
		{name: "executions_list_limit", line: "executions list --limit 3"},
		{name: "executions_list_session", line: "executions list --session s1 -o name"},
		{name: "executions_list_sessions", line: "executions list --session - -o jsonl"},
		{name: "executions_list_none", line: "executions list --session s9 -o json"},
		{name: "executions_list_none_table", line: "executions list --session s9"},
		{name: "executions_list_json", line: "executions list --limit 1 -o json"},
		{name: "executions_list_yaml", line: "executions list --limit 1 -o yaml"},
		{name: "executions_list_env", line: "executions list", env: []string{"EXECUTOR_OUTPUT=name"}},
		{name: "executions_get", line: "executions get x1"},
		{name: "executions_get_json", line: "executions get executions/x1 -o json"},
		{name: "executions_get_yaml", line: "executions get sessions/s1/executions/x4 -o yaml"},
		{name: "executions_watch", line: "executions watch x1"},
		{name: "executions_watch_after", line: "executions watch x1 --after e1/3"},
		{name: "executions_watch_jsonl", line: "executions watch x1 -o jsonl --after e1/4"},
		{name: "executions_watch_timeout", line: "executions watch x2"},
		{name: "executions_watch_future", line: "executions watch x1 --after e1/99"},
		{name: "executions_output", line: "executions output x1"},
		{name: "executions_output_part", line: "executions output x1 --offset 1 --limit 2"},
		{name: "executions_output_stderr", line: "executions output x1 --stream stderr"},
		{name: "executions_output_dropped", line: "executions output x1", prepare: func(s *clienttest.Server) {
			s.Hook(func(method string, _ int) error {
				if method == "ReadOutput" {
					return clienttest.Error(11, "OUTPUT_DROPPED", map[string]string{"first_offset": "4096"}, "byte 0 is no longer kept")
				}
				return nil
			})
		}},
		{name: "executions_cancel", line: "executions cancel x1 --grace 0s"},
		{name: "executions_wait", line: "executions wait x2"},
		{name: "executions_wait_json", line: "executions wait x1 -o json"},
		{name: "executions_delete", line: "executions delete x1 executions/x9 x2"},
		{name: "session_create", line: "session create --lifetime 2h --limit-memory 1GiB --label team=core"},
		{name: "session_create_json", line: "session create --no-wait -o json"},
		{name: "session_list", line: "session list"},
		{name: "session_list_all", line: "session list --all"},
		{name: "session_list_limit", line: "session list --limit 1"},
		{name: "session_get", line: "session get s1"},
		{name: "session_get_yaml", line: "session get sessions/s1 -o yaml"},
		{name: "session_terminate", line: "session terminate s1"},
		{name: "admin_info", line: "admin info"},
		{name: "admin_info_json", line: "admin info -o json"},
		{name: "admin_info_yaml", line: "admin info -o yaml"},
		{name: "doctor", line: "doctor"},
		{name: "doctor_missing", line: "doctor", prepare: func(s *clienttest.Server) {
			s.SetInfo(func(info *executorv1.GetServerInfoResponse) {
				info.Draining = true
				info.Engines[0].Capabilities[0] = &executorv1.Capability{Name: "limit.memory", Detail: "no cgroup", Remedy: "run executord as root"}
			})
		}},
		{name: "doctor_engine", line: "doctor --engine modal", prepare: func(s *clienttest.Server) {
			s.SetInfo(func(info *executorv1.GetServerInfoResponse) {
				info.Engines = append(info.Engines, &executorv1.Engine{
					Name: "modal", Isolation: "gvisor",
					Checks: []*executorv1.Capability{
						{Name: "credentials", Available: true, Detail: "from MODAL_TOKEN_ID and MODAL_TOKEN_SECRET"},
						{Name: "image", Detail: "debian:13-slim is not built yet", Remedy: "nothing to do"},
						{Name: "harvest-github", Detail: "Modal has none such", Remedy: "modal create"},
					},
					Capabilities: []*executorv1.Capability{{Name: "limit.memory", Available: true, Detail: "by Modal"}, {Name: "limit.pids", Detail: "Modal has no such limit"}},
				})
			})
		}},
		{name: "doctor_no_engine", line: "doctor", prepare: func(s *clienttest.Server) {
			s.SetInfo(func(info *executorv1.GetServerInfoResponse) { info.Engines = nil })
		}},
	}
	update := os.Getenv("UPDATE_GOLDEN") != ""
	known := make(map[string]bool)
	for _, test := range tests {
		known[test.name+".txt"] = true
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := furnished(t)
			if test.prepare != nil {
				test.prepare(s)
			}
			o := invocation{args: command(test.line), env: test.env, stdin: test.stdin}.run(t, s)
			got := fmt.Sprintf("$ executorctl %s\n-- exit code --\n%d\n-- stdout --\n%s\n-- stderr --\n%s", test.line, o.code, o.stdout, o.stderr)
			for actual, fixed := range map[string]string{s.Address(): "ADDRESS", client.Version(): "VERSION", runtime.Version() + " ": "GO "} {
				got = strings.ReplaceAll(got, actual, fixed)
			}
			path := filepath.Join("testdata", "golden", test.name+".txt")
			if update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", path, diff)
			}
			if strings.Contains(got, "secret\"") || strings.Contains(o.stdout, "secret") {
				t.Error("a secret shows")
			}
		})
	}
	files, err := os.ReadDir(filepath.Join("testdata", "golden"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !known[f.Name()] {
			t.Errorf("testdata/golden/%s belongs to no test", f.Name())
		}
	}
}
