package cli

import (
	"encoding/json"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// following is a command that runs beside the test.
type following struct {
	stdout, stderr output
	interrupts     chan os.Signal
	running        sync.WaitGroup
	code           int
}

func follow(t *testing.T, s *clienttest.Server, line string) *following {
	t.Helper()
	f := &following{interrupts: make(chan os.Signal, 2)}
	i := invocation{args: command(line), interrupts: f.interrupts}
	f.running.Go(func() { f.code = i.start(t, s, &f.stdout, &f.stderr) })
	return f
}

func (f *following) interrupt() { f.interrupts <- os.Interrupt }

// end waits for the command and compares.
func (f *following) end(t *testing.T, code int, stdout, stderr string) {
	t.Helper()
	f.running.Wait()
	if f.code != code || f.stdout.String() != stdout || f.stderr.String() != stderr {
		t.Errorf("exit code %d, want %d\nstdout %q\nwant   %q\nstderr %q\nwant   %q", f.code, code, f.stdout.String(), stdout, f.stderr.String(), stderr)
	}
}

func (f *following) until(t *testing.T, text string) {
	t.Helper()
	eventually(t, "stdout has "+text, func() bool { return strings.Contains(f.stdout.String(), text) })
}

func TestFirstCtrlCCancels(t *testing.T) {
	s := clienttest.Start(t)
	f := follow(t, s, "run --grace 1s 'out hello; await'")
	f.until(t, "hello")
	f.interrupt()
	f.end(t, 130, "hello\n", "executorctl: cancelling; ctrl-c again leaves it\nexecutorctl: cancelled by ann@box ctrl-c\n")
	r := s.Calls("CancelExecution")[0].(*executorv1.CancelExecutionRequest)
	if r.GetName() != "executions/x1" || r.GracePeriod != nil {
		t.Errorf("request %v", r)
	}
}

func TestSecondCtrlCLeaves(t *testing.T) {
	s := clienttest.Start(t)
	heard, release := make(chan struct{}), make(chan struct{})
	s.Hook(func(method string, _ int) error {
		if method == "CancelExecution" {
			close(heard)
			<-release
		}
		return nil
	})
	f := follow(t, s, "exec -o jsonl s1 -- await")
	f.end(t, 125, "", "executorctl: execute: there is no sessions/s1\nhint: executorctl session list --all shows what there is\n")
	f = follow(t, s, "run 'out hello; await'")
	f.until(t, "hello")
	f.interrupt()
	<-heard
	f.interrupt()
	f.end(t, 130, "hello\n", "executorctl: cancelling; ctrl-c again leaves it\nexecutorctl: left executions/x1, which goes on\n"+
		"hint: executorctl executions watch executions/x1 --after e1/2\n")
	close(release)
}

func TestCtrlCBeforeItExists(t *testing.T) {
	s := clienttest.Start(t)
	asked, release := make(chan struct{}), make(chan struct{})
	s.Hook(func(method string, _ int) error {
		if method == "Execute" {
			asked <- struct{}{}
			<-release
		}
		return nil
	})
	t.Run("once", func(t *testing.T) {
		f := follow(t, s, "run 'out hello; await'")
		<-asked
		f.interrupt()
		eventually(t, "it says that it cancels", func() bool { return f.stderr.String() != "" })
		release <- struct{}{}
		f.running.Wait()
		if f.code != 130 || !strings.HasSuffix(f.stderr.String(), "executorctl: cancelled by ann@box ctrl-c\n") {
			t.Errorf("exit code %d, stderr %q", f.code, f.stderr.String())
		}
	})
	t.Run("twice", func(t *testing.T) {
		f := follow(t, s, "run 'out hello; await'")
		<-asked
		f.interrupt()
		f.interrupt()
		f.end(t, 130, "", "executorctl: cancelling; ctrl-c again leaves it\n"+
			"executorctl: execute: it is not known whether the request was carried out: left by ctrl-c\n")
		release <- struct{}{}
	})
}

func TestCtrlCLeavesAWatch(t *testing.T) {
	s := clienttest.Start(t)
	f := follow(t, s, "run --detach -- 'out hello' await")
	f.end(t, 0, "executions/x1\n", "")
	f = follow(t, s, "executions watch x1")
	f.until(t, "hello")
	f.interrupt()
	f.end(t, 130, "hello\n", "executorctl: left executions/x1, which goes on\nhint: executorctl executions watch executions/x1 --after e1/2\n")
	if n := len(s.Calls("CancelExecution")); n != 0 {
		t.Error("a watch cancelled what it watched")
	}
}

func TestCancelThatFailsIsTold(t *testing.T) {
	s := clienttest.Start(t)
	s.Hook(func(method string, _ int) error {
		if method == "CancelExecution" {
			return clienttest.Error(codes.PermissionDenied, "NOT_YOURS", nil, "it is not yours")
		}
		return nil
	})
	f := follow(t, s, "run 'out hello; await'")
	f.until(t, "hello")
	f.interrupt()
	eventually(t, "it tells that it failed", func() bool {
		return strings.HasSuffix(f.stderr.String(), "executorctl: cancel executions/x1: it is not yours\n")
	})
	f.interrupt()
	f.running.Wait()
	if f.code != 130 {
		t.Errorf("exit code %d", f.code)
	}
}

func TestFollowThroughRestarts(t *testing.T) {
	s := clienttest.Start(t)
	f := follow(t, s, "run 'out one; await'")
	f.until(t, "one")
	s.Stop()
	eventually(t, "it tells that there is no connection", func() bool { return f.stderr.String() != "" })
	if err := s.Listen(s.Address()); err != nil {
		t.Fatal(err)
	}
	f.interrupt()
	f.running.Wait()
	if f.code != 130 || f.stdout.String() != "one\n" || !strings.HasPrefix(f.stderr.String(), "executorctl: no connection (") ||
		!strings.HasSuffix(f.stderr.String(), "executorctl: cancelled by ann@box ctrl-c\n") {
		t.Errorf("exit code %d, stdout %q, stderr %q", f.code, f.stdout.String(), f.stderr.String())
	}
}

func TestOutageEnds(t *testing.T) {
	s := clienttest.Start(t)
	s.Hook(func(method string, _ int) error {
		if method == "WatchExecution" {
			return status.Error(codes.Unavailable, "storm")
		}
		return nil
	})
	f := follow(t, s, "run --max-outage 300ms 'out one; cut; await'")
	f.running.Wait()
	if f.code != 125 || f.stdout.String() != "one\n" ||
		!strings.HasSuffix(f.stderr.String(), "executorctl: follow executions/x1: the server stayed out of reach for 300ms: storm\n"+
			"hint: executorctl executions watch executions/x1 --after e1/2\n") {
		t.Errorf("exit code %d, stdout %q, stderr %q", f.code, f.stdout.String(), f.stderr.String())
	}
}

func TestDishonestServer(t *testing.T) {
	s := clienttest.Start(t)
	for line, want := range map[string]string{
		"run x":         "the output is incomplete: stdout has 5 bytes and ended for us at 0\n",
		"run -o json x": "the output is incomplete: stdout has 5 bytes and ended for us at 0\n",
	} {
		s.Play(func(p *clienttest.Play) error {
			return p.Send(p.Log[0], &executorv1.Event{Cursor: &executorv1.Cursor{Epoch: clienttest.Epoch, Sequence: 2}, Kind: &executorv1.Event_Result{
				Result: &executorv1.Result{Reason: executorv1.Reason_REASON_EXITED, ExitCode: new(int32), Totals: []*executorv1.StreamTotal{
					{Stream: executorv1.Stream_STREAM_STDOUT, Size: 5},
				}},
			}})
		})
		got := invocation{args: command(line)}.run(t, s)
		if got.code != 125 || got.stdout != "" || !strings.HasSuffix(got.stderr, want) {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q: what is not whole must not pass for a success", line, got.code, got.stdout, got.stderr)
		}
	}
}

func TestBytesPassAsTheyAre(t *testing.T) {
	s := clienttest.Start(t)
	got := invocation{args: []string{"run", `raw "\x00\xff\x1b[31m\r\n no newline"`}}.run(t, s)
	if got.code != 0 || got.stdout != "\x00\xff\x1b[31m\r\n no newline" {
		t.Errorf("exit code %d, stdout %q", got.code, got.stdout)
	}
	got = invocation{args: command("run 'fill 5000000'")}.run(t, s)
	if got.code != 0 || len(got.stdout) != 5000000 {
		t.Errorf("exit code %d, %d bytes", got.code, len(got.stdout))
	}
}

func TestJSONWithoutItsSandbox(t *testing.T) {
	s := clienttest.Start(t)
	s.Hook(func(method string, _ int) error {
		if method == "GetExecution" {
			return clienttest.Error(codes.NotFound, "EXECUTION_NOT_FOUND", nil, "deleted already")
		}
		return nil
	})
	got := invocation{args: command("run -o json 'out hello'")}.run(t, s)
	var sum struct {
		Stdout  string
		Sandbox string
	}
	if err := json.Unmarshal([]byte(got.stdout), &sum); err != nil || got.code != 0 || sum.Stdout != "hello\n" || sum.Sandbox != "" {
		t.Errorf("exit code %d, stdout %q, error %v", got.code, got.stdout, err)
	}
	if want := "executorctl: where it ran is not known: deleted already\n"; got.stderr != want {
		t.Errorf("stderr %q, want %q", got.stderr, want)
	}
}

// full is a stdout that takes nothing.
type full struct{}

var errFull = errors.New("no space left on device")

func (full) Write([]byte) (int, error) { return 0, errFull }

func TestStdoutThatFails(t *testing.T) {
	s := clienttest.Start(t)
	for _, test := range []struct {
		line string
		code int
	}{
		{"run 'out hello'", 125},
		{"run -o json 'out hello'", 125},
		{"run -o jsonl 'out hello'", 125},
		{"run --detach 'out hello'", 125},
		{"executions wait x1", 125},
		{"executions list", 1},
		{"executions list -o name", 1},
		{"executions list -o jsonl", 1},
		{"executions list -o json", 1},
		{"executions output x1", 1},
		{"executions delete x1", 1},
		{"admin info", 1},
		{"doctor", 1},
		{"session create", 1},
		{"version", 1},
	} {
		var stderr output
		got := Main(t.Context(), command(test.line), []string{"EXECUTOR_ADDRESS=" + s.Address()}, strings.NewReader(""), full{}, &stderr, nil)
		if got != test.code || !strings.Contains(stderr.String(), "write stdout: no space left on device\n") {
			t.Errorf("%s: exit code %d, want %d; stderr %q", test.line, got, test.code, stderr.String())
		}
	}
}

func TestStdinIsCode(t *testing.T) {
	s := clienttest.Start(t)
	for _, line := range []string{"run --lang bash -", "run --lang bash --file -"} {
		got := invocation{args: command(line), stdin: "out from stdin\nexit 4\n"}.run(t, s)
		if got.code != 4 || got.stdout != "from stdin\n" {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q", line, got.code, got.stdout, got.stderr)
		}
	}
	for _, call := range s.Calls("Execute") {
		if l := call.(*executorv1.ExecuteRequest).GetCommand().GetCode().GetLanguage(); l != executorv1.Language_LANGUAGE_BASH {
			t.Errorf("language %v", l)
		}
	}
}

// TestFlagsReachTheRequest: what a flag says is what the server is asked for.
func TestFlagsReachTheRequest(t *testing.T) {
	s := clienttest.Start(t)
	line := "run --timeout 90s --grace 0s -e A=1 -e FROM_HERE --workdir /tmp --limit-memory 64m --limit-pids 32 --limit-cpu 1.5 --limit-disk 1g --limit-open-files 256 " +
		"--retain 4MiB --label team=core --label run=7 --lang node 'exit 0'"
	if got := (invocation{args: command(line), env: []string{"FROM_HERE=yes"}}).run(t, s); got.code != 0 {
		t.Fatalf("exit code %d, stderr %q", got.code, got.stderr)
	}
	request, ok := proto.Clone(s.Calls("Execute")[0]).(*executorv1.ExecuteRequest)
	if !ok || request.GetRequestId() == "" {
		t.Errorf("request %v cannot be repeated", request)
	}
	request.RequestId = ""
	got, err := protoJSON(request)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"command":{"code":{"language":"LANGUAGE_NODE","source":"exit 0"},"env":{"A":"1","FROM_HERE":"yes"},` +
		`"working_directory":"/tmp","timeout":"90s","grace_period":"0s"},"limits":{"memory_bytes":"67108864","cpu_millis":"1500","pids":"32","disk_bytes":"1073741824","open_files":"256"},` +
		`"output_policy":{"retained_bytes":"4194304"},"labels":{"run":"7","team":"core"}}`
	if string(got) != want {
		t.Errorf("request\n%s\nwant\n%s", got, want)
	}
}
