package cli

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func TestWrongCommandLines(t *testing.T) {
	s := clienttest.Start(t)
	t.Chdir(t.TempDir())
	if err := os.WriteFile("code.rb", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		line, want string
		env        []string
	}{
		{line: "bogus", want: `unknown command "bogus"`},
		{line: "rnu", want: "is it run?"},
		{line: "run", want: "one of CODE, --file FILE, - and -- ARGV"},
		{line: "run a b", want: "behind --"},
		{line: "run --file a.py -- ls", want: "not two"},
		{line: "run --file a.py code", want: "not two"},
		{line: "run code -- ls", want: "not two"},
		{line: "run --", want: "nothing after --"},
		{line: "run --lang bash -- ls", want: "--lang goes with code"},
		{line: "run --lang ruby x", want: "must be python, bash or node"},
		{line: "run --file code.rb", want: "give --lang"},
		{line: "run ''", want: "the code is empty"},
		{line: "run -", want: "the code is empty"},
		{line: "run --timeout 30 x", want: "must be a span of time"},
		{line: "run --timeout -3s x", want: "must be a span of time"},
		{line: "run --limit-memory lots x", want: "must be bytes or have a unit"},
		{line: "run --limit-memory 9999999T x", want: "more than can be counted"},
		{line: "run --limit-memory 0 x", want: "at least one byte"},
		{line: "run --limit-pids 0 x", want: "a number from 1 on"},
		{line: "run --limit-disk much x", want: "must be bytes or have a unit"},
		{line: "run --limit-open-files 0 x", want: "a number from 1 on"},
		{line: "run --session s1 --limit-disk 1g x", want: "do not go together"},
		{line: "run --limit-cpu some x", want: "number of cores"},
		{line: "run --retain -1 x", want: "must be bytes"},
		{line: "run -e =x x", want: "has no name"},
		{line: "run -e NOT_HERE x", want: "is not set in the environment"},
		{line: "run --label team x", want: "must be NAME=VALUE"},
		{line: "run --session S1 x", want: "must be ID or sessions/ID"},
		{line: "run --session s1 --limit-pids 9 x", want: "do not go together"},
		{line: "run --session s1 --engine modal x", want: "a session's sandbox is where it is"},
		{line: "run --session s1 --gpu T4 x", want: "a session's sandbox is where it is"},
		{line: "run --session s1 --region us-east x", want: "a session's sandbox is where it is"},
		{line: "run -o table x", want: "must be one of raw, json, jsonl"},
		{line: "run --bogus x", want: "unknown flag: --bogus"},
		{line: "run 'a\xff'", want: "not valid UTF-8"},
		{line: "run -- ls 'a\xff'", want: "argument 2 is not valid UTF-8"},
		{line: "run --workdir '/\xff' x", want: "--workdir is not valid UTF-8"},
		{line: "exec", want: "exec needs a session"},
		{line: "exec s1 ls", want: "exec needs a session, --"},
		{line: "exec s1 --", want: "exec needs a session, --"},
		{line: "exec -- ls", want: "exec needs a session, --"},
		{line: "exec S1 -- ls", want: "must be ID or sessions/ID"},
		{line: "exec s1 --limit-pids 9 -- ls", want: "unknown flag"},
		{line: "exec s1 --label x -- ls", want: "must be NAME=VALUE"},
		{line: "exec s1 -- '\xff'", want: "argument 1 is not valid UTF-8"},
		{line: "executions", want: "needs a command: attach, cancel, delete, get, list, output, signal, wait, watch"},
		{line: "executions gte", want: "is it get?"},
		{line: "executions get", want: "needs NAME"},
		{line: "executions get a b", want: "needs NAME and nothing else"},
		{line: "executions get A", want: "must be ID, executions/ID"},
		{line: "executions list x", want: "takes no arguments"},
		{line: "executions list --limit -1", want: "must not be negative"},
		{line: "executions list --session a/b", want: "must be ID or sessions/ID"},
		{line: "executions watch x --after 7", want: "must be EPOCH/SEQUENCE"},
		{line: "executions watch x -o json", want: "must be one of raw, jsonl"},
		{line: "executions output x --stream both", want: "must be stdout or stderr"},
		{line: "executions output x --offset -1", want: "must not be negative"},
		{line: "executions output x -o json", want: "has no output formats"},
		{line: "executions cancel x --grace soon", want: "must be a span of time"},
		{line: "executions delete", want: "at least one NAME"},
		{line: "executions delete x Y", want: "must be ID, executions/ID"},
		{line: "session create x", want: "takes no arguments"},
		{line: "session create --label x", want: "must be NAME=VALUE"},
		{line: "session create --lifetime long", want: "must be a span of time"},
		{line: "session get", want: "needs SESSION"},
		{line: "session get a/b", want: "must be ID or sessions/ID"},
		{line: "admin", want: "needs a command: info"},
		{line: "admin info -o name", want: "must be one of table, json, yaml"},
		{line: "doctor x", want: "takes no arguments"},
		{line: "version -o xml", want: "must be one of table, json, yaml"},
		{line: "admin info --address nowhere", want: "must be host:port or unix:PATH"},
		{line: "admin info", env: []string{"EXECUTOR_ADDRESS=nowhere"}, want: "must be host:port or unix:PATH"},
		{line: "admin info", env: []string{"EXECUTOR_MAX_OUTAGE=soon"}, want: `EXECUTOR_MAX_OUTAGE="soon"`},
		{line: "admin info --max-outage soon", want: "invalid argument"},
	}
	for _, test := range tests {
		got := invocation{args: command(test.line), env: test.env}.run(t, s)
		if got.code != 2 || got.stdout != "" || !strings.Contains(got.stderr, test.want) {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q; want 2 and %q", test.line, got.code, got.stdout, got.stderr, test.want)
		}
		first, rest, _ := strings.Cut(got.stderr, "\n")
		if !strings.HasPrefix(first, "executorctl: ") || strings.HasSuffix(first, ".") || !strings.HasPrefix(rest, "hint: executorctl ") {
			t.Errorf("%s: stderr %q", test.line, got.stderr)
		}
	}
	for _, method := range []string{"Execute", "StartExecution", "CreateSession", "DeleteExecution", "CancelExecution"} {
		if n := len(s.Calls(method)); n != 0 {
			t.Errorf("a wrong command line called %s", method)
		}
	}
}

// TestFailures are command lines that are right and come to nothing.
func TestFailures(t *testing.T) {
	s := clienttest.Start(t)
	t.Chdir(t.TempDir())
	if err := os.WriteFile("long.py", []byte(strings.Repeat("#", maxSource+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		line, want string
		code       int
		away       bool
	}{
		{line: "run --file missing.py", code: 125, want: "open the code: open missing.py: no such file"},
		{line: "run --file long.py", code: 125, want: "longer than 1048576 bytes"},
		{line: "run --file .", code: 2, want: "give --lang"},
		{line: "run --file . --lang bash", code: 125, want: "is a directory"},
		{line: "run x", away: true, code: 125, want: "connection refused\nhint: is executord running at 127.0.0.1:1? make up, or executord serve\n"},
		{line: "run --detach x", away: true, code: 125, want: "hint: is executord running"},
		{line: "exec s1 -- ls", away: true, code: 125, want: "hint: is executord running"},
		{line: "executions watch x", away: true, code: 125, want: "hint: is executord running"},
		{line: "executions wait x", away: true, code: 125, want: "hint: is executord running"},
		{line: "executions list", away: true, code: 1, want: "hint: is executord running"},
		{line: "session list", away: true, code: 1, want: "dial tcp 127.0.0.1:1: connect: connection refused\n"},
		{line: "admin info", away: true, code: 1, want: "hint: is executord running"},
		{line: "doctor", away: true, code: 1, want: "no executord answers at 127.0.0.1:1: "},
		{line: "doctor", away: true, code: 1, want: "hint: run executord doctor on its host, or start it: make up, or executord serve\n"},
		{line: "exec s9 -- ls", code: 125, want: "there is no sessions/s9\nhint: executorctl session list --all shows what there is\n"},
		{line: "executions get x9", code: 1, want: "there is no executions/x9\nhint: executorctl executions list shows what there is\n"},
		{line: "executions watch x9", code: 125, want: "there is no executions/x9"},
		{line: "executions wait x9", code: 125, want: "there is no executions/x9"},
		{line: "executions cancel x9", code: 1, want: "there is no executions/x9"},
		{line: "executions output x9", code: 1, want: "there is no executions/x9"},
		{line: "executions delete x8 x9", code: 1, want: "there is no executions/x8\nexecutorctl: delete executions/x9: there is no executions/x9\n"},
		{line: "session get s9", code: 1, want: "there is no sessions/s9"},
		{line: "session terminate s9", code: 1, want: "there is no sessions/s9"},
		{line: "session create --label fail=no-room", code: 1, want: "sessions/s1 did not start: no-room (START_FAILED)"},
		{line: "run 'refuse INVALID_ARGUMENT ARGS_TOO_LARGE command.args at most 65536 bytes'", code: 125,
			want: "executorctl: execute: command.args: at most 65536 bytes\n  command.args: at most 65536 bytes\nhint: pass large data as code: executorctl run --file\n"},
		{line: "run 'refuse FAILED_PRECONDITION LIMIT_NOT_ENFORCEABLE - no cgroup'", code: 125, want: "hint: executorctl doctor says"},
		{line: "run 'refuse UNAVAILABLE SERVER_DRAINING - stopping'", code: 125, want: "hint: the server is stopping; try again"},
		{line: "run 'refuse INVALID_ARGUMENT LIMITS_WITH_PARENT - no'", code: 125, want: "hint: the limits of a session are"},
		{line: "run 'refuse FAILED_PRECONDITION SESSION_NOT_RUNNING - no'", code: 125, want: "hint: executorctl session list --all"},
		{line: "run 'refuse RESOURCE_EXHAUSTED QUEUE_FULL - no place is free'", code: 125, want: "hint: the server is at its limit, try again later"},
		{line: "run 'refuse RESOURCE_EXHAUSTED DISK_FULL - no room'", code: 125, want: "hint: make room"},
		{line: "run 'refuse INTERNAL SOMETHING_NEW - broken \x1b[31m'", code: 125, want: `broken \x1b[31m`},
		{line: "run 'refuse UNIMPLEMENTED - - unknown'", code: 125, want: "unknown"},
	}
	for _, test := range tests {
		server := s
		if test.away {
			server = nil
		}
		got := invocation{args: command(test.line)}.run(t, server)
		if got.code != test.code || got.stdout != "" || !strings.Contains(got.stderr, test.want) {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q; want %d and %q", test.line, got.code, got.stdout, got.stderr, test.code, test.want)
		}
		for line := range strings.Lines(got.stderr) {
			if strings.HasSuffix(line, ".\n") || strings.ContainsRune(line, '\x1b') {
				t.Errorf("%s: stderr %q", test.line, got.stderr)
			}
		}
	}
}

func TestHelp(t *testing.T) {
	for _, line := range []string{"", "--help", "help", "run --help", "executions watch -h", "help session create"} {
		got := invocation{args: command(line)}.run(t, nil)
		if got.code != 0 || !strings.Contains(got.stdout, "Usage:") || got.stderr != "" {
			t.Errorf("%q: exit code %d, stdout %q, stderr %q", line, got.code, got.stdout, got.stderr)
		}
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		got := invocation{args: []string{"completion", shell}}.run(t, nil)
		if got.code != 0 || !strings.Contains(got.stdout, "executorctl") {
			t.Errorf("%s: exit code %d, stdout of %d bytes, stderr %q", shell, got.code, len(got.stdout), got.stderr)
		}
	}
	tests := map[string]string{
		"__complete run --lang ''":                   "python\nbash\nnode\n",
		"__complete run --lang b":                    "bash\n",
		"__complete executions output x --stream ''": "stdout\nstderr\n",
		"__complete executions w":                    "wait\tWait until an execution has ended, and exit as it did\nwatch\t",
	}
	for line, want := range tests {
		got := invocation{args: command(line)}.run(t, nil)
		if got.code != 0 || !strings.HasPrefix(got.stdout, want) {
			t.Errorf("%s: exit code %d, stdout %q", line, got.code, got.stdout)
		}
	}
}

// TestCommandsAreDescribed: each command and flag says what it does, in one style.
func TestCommandsAreDescribed(t *testing.T) {
	a := &app{}
	var visit func(*cobra.Command)
	visit = func(cmd *cobra.Command) {
		if s := cmd.Short; s == "" || strings.HasSuffix(s, ".") || strings.ToUpper(s[:1]) != s[:1] {
			t.Errorf("%s: short text %q", cmd.CommandPath(), s)
		}
		if !cmd.Runnable() {
			t.Errorf("%s does nothing", cmd.CommandPath())
		}
		for line := range strings.Lines(cmd.Example) {
			if !strings.HasPrefix(line, "  executorctl ") {
				t.Errorf("%s: example %q", cmd.CommandPath(), line)
			}
		}
		for _, c := range cmd.Commands() {
			visit(c)
		}
	}
	visit(a.root())
}

// TestImports: what knows gRPC is package client; what touches the server's rooms is
// the server.
func TestImports(t *testing.T) {
	files, err := fs.Glob(os.DirFS("."), "*.go")
	if err != nil {
		t.Fatal(err)
	}
	main, err := filepath.Glob("../../cmd/executorctl/*.go")
	if err != nil || len(main) == 0 {
		t.Fatal(err)
	}
	const module = "github.com/harvest-run/executord/"
	for _, file := range append(files, main...) {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range parsed.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			inside, ours := strings.CutPrefix(path, module)
			if strings.HasPrefix(path, "google.golang.org/grpc") || ours && inside != "client" && inside != "internal/cli" && !strings.HasPrefix(inside, "gen/") {
				t.Errorf("%s imports %s", file, path)
			}
		}
	}
}

// TestListSaysWhatItLeavesOut: a list that is cut without being asked to says so.
func TestListSaysWhatItLeavesOut(t *testing.T) {
	s := clienttest.Start(t)
	for i := range 103 {
		s.Put(&executorv1.Execution{Name: fmt.Sprintf("executions/x%d", i+1)})
	}
	const note = "executorctl: older ones are left out; --limit 0 lists all\n"
	for _, test := range []struct {
		line  string
		names int
		note  string
	}{
		{"executions list -o name", 100, note},
		{"executions list -o name --limit 101", 101, ""},
		{"executions list -o name --limit 0", 103, ""},
		{"executions list -o name --limit 200", 103, ""},
	} {
		got := invocation{args: command(test.line)}.run(t, s)
		names := strings.Fields(got.stdout)
		if got.code != 0 || len(names) != test.names || names[0] != "executions/x103" || got.stderr != test.note {
			t.Errorf("%s: exit code %d, %d names, stderr %q", test.line, got.code, len(names), got.stderr)
		}
		if slices.Sort(names); len(slices.Compact(names)) != test.names {
			t.Errorf("%s: names come twice", test.line)
		}
	}
}

func TestWho(t *testing.T) {
	tests := []struct{ env, want string }{
		{"", "unknown@unknown x"},
		{"USER=ann LOGNAME=bob HOSTNAME=box", "ann@box x"},
		{"LOGNAME=bob EXECUTORCTL_USER=root EXECUTORCTL_HOST=real HOSTNAME=box", "bob@real x"},
		{"EXECUTORCTL_USER=root", "root@unknown x"},
		{"USER=" + strings.Repeat("u", 300), strings.Repeat("u", 100) + "@unknown x"},
		{"USER=\xff", "?@unknown x"},
	}
	for _, test := range tests {
		a := &app{env: environment(strings.Fields(test.env))}
		if got := a.who("x"); got != test.want {
			t.Errorf("%s: %q, want %q", test.env, got, test.want)
		}
	}
}
