package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// runningSession creates a session and waits until it runs.
func runningSession(t *testing.T, c *client.Client) string {
	t.Helper()
	created, err := c.CreateSession(t.Context(), &executorv1.CreateSessionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := c.Sessions().GetSession(t.Context(), &executorv1.GetSessionRequest{Name: created.GetName(), Wait: durationpb.New(time.Minute)})
	if err != nil || got.GetSession().GetState() != executorv1.Session_STATE_RUNNING {
		t.Fatalf("%v, %v", got, err)
	}
	return created.GetName()
}

// counted is a program that adds a line to a file of its session each time it runs.
func counted(name string) *executorv1.Command {
	return bash(fmt.Sprintf("echo ran >> /workspace/%s; echo %s; sleep 0.2; exit 7", name, name))
}

// runs is how often a counted program ran.
func runs(t *testing.T, c *client.Client, session, name string) int {
	t.Helper()
	k := execute(t, c, &executorv1.ExecuteRequest{Parent: session, Command: bash(fmt.Sprintf("cat /workspace/%s 2>/dev/null || true", name))})
	return strings.Count(k.stdout(), "ran\n")
}

// Of 50 equal requests at once, over several connections, one process runs, and each is
// answered as the others (fault case 6).
func TestDuplicatesRunOneProcess(t *testing.T) {
	d := start(t)
	var clients []*client.Client
	for range 5 {
		clients = append(clients, d.dial())
	}
	session := runningSession(t, clients[0])
	request := &executorv1.ExecuteRequest{Parent: session, Command: counted("execute"), RequestId: "execute-1"}
	streams := make([][]*executorv1.Event, 50)
	var all sync.WaitGroup
	for i := range streams {
		all.Go(func() {
			r := proto.CloneOf(request)
			r.HeartbeatInterval = durationpb.New(time.Duration(1+i) * time.Second) // may differ
			stream, err := clients[i%5].Executor().Execute(t.Context(), r)
			for err == nil {
				var m *executorv1.ExecuteResponse
				if m, err = stream.Recv(); err == nil && m.GetEvent().GetHeartbeat() == nil {
					streams[i] = append(streams[i], m.GetEvent())
				}
			}
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for i, events := range streams {
		k := newChecker()
		for _, e := range events {
			k.take(e)
		}
		if k.err != nil || k.stdout() != "execute\n" || k.result.GetExitCode() != 7 {
			t.Fatalf("stream %d: %v, %q, %v", i, k.err, k.stdout(), k.result)
		}
		for n, e := range events {
			if len(events) != len(streams[0]) || !proto.Equal(e, streams[0][n]) {
				t.Fatalf("stream %d tells %v, the first %v", i, events, streams[0])
			}
		}
	}
	if n := runs(t, clients[0], session, "execute"); n != 1 {
		t.Errorf("the program ran %d times", n)
	}

	// Whatever makes something.
	var mu sync.Mutex
	made := make(map[string]int)
	for i := range 50 {
		all.Go(func() {
			e, err := clients[i%5].Start(t.Context(), &executorv1.StartExecutionRequest{Parent: session, Command: counted("start"), RequestId: "start-1"})
			if err != nil {
				t.Error(err)
			}
			s, err := clients[i%5].CreateSession(t.Context(), &executorv1.CreateSessionRequest{RequestId: "create-1"})
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			made[e.GetName()]++
			made[s.GetName()]++
		})
	}
	all.Wait()
	if len(made) != 2 {
		t.Errorf("made: %v", made)
	}
	started := &executorv1.ListExecutionsRequest{Parent: session, PageSize: 500}
	list, err := clients[0].Executor().ListExecutions(t.Context(), started)
	if err != nil || len(list.GetExecutions()) != 3 { // with the one that counted
		t.Errorf("%d executions, %v", len(list.GetExecutions()), err)
	}
	for name := range made {
		if strings.Contains(name, "/executions/") {
			if _, err := clients[0].Wait(t.Context(), name); err != nil {
				t.Error(err)
			}
			for range 2 {
				if err := clients[0].Delete(t.Context(), &executorv1.DeleteExecutionRequest{Name: name, RequestId: "delete-1"}); err != nil {
					t.Error(err)
				}
			}
			continue
		}
		for range 2 {
			s, err := clients[0].TerminateSession(t.Context(), &executorv1.TerminateSessionRequest{Name: name, RequestId: "end-1"})
			if err != nil || s.GetState() != executorv1.Session_STATE_TERMINATED {
				t.Errorf("%v, %v", s, err)
			}
		}
	}
	if n := runs(t, clients[0], session, "start"); n != 1 {
		t.Errorf("the started program ran %d times", n)
	}
}

// The name of a request with other parameters, or for another method, is refused, also
// after a restart, and runs nothing.
func TestRequestIDReused(t *testing.T) {
	d := start(t)
	c := d.dial()
	const secret = "request-secret-90135"
	command := bash("echo once")
	command.Env = map[string]string{"TOKEN": secret}
	request := &executorv1.ExecuteRequest{Command: command, RequestId: "r-1"}
	first := execute(t, c, request)
	for _, restarted := range []bool{false, true} {
		if restarted {
			d.kill()
			d.up()
		}
		again := execute(t, c, request)
		if again.stdout() != first.stdout() || !proto.Equal(again.result, first.result) {
			t.Errorf("a repeat tells %q and %v", again.stdout(), again.result)
		}
		for name, change := range map[string]func(*executorv1.ExecuteRequest){
			"program": func(r *executorv1.ExecuteRequest) { r.Command.Code.Source = "echo twice" },
			"secret":  func(r *executorv1.ExecuteRequest) { r.Command.Env["TOKEN"] = "another" },
			"label":   func(r *executorv1.ExecuteRequest) { r.Labels = map[string]string{"a": "b"} },
		} {
			r := proto.CloneOf(request)
			change(r)
			_, err := c.Execute(t.Context(), r)
			if status.Code(errors.Unwrap(err)) != codes.AlreadyExists || client.Reason(err) != "REQUEST_ID_REUSED" || strings.Contains(err.Error(), secret) {
				t.Errorf("another %s: %v", name, err)
			}
		}
		_, err := c.Start(t.Context(), &executorv1.StartExecutionRequest{Command: command, RequestId: "r-1"})
		if client.Reason(err) != "REQUEST_ID_REUSED" {
			t.Errorf("another method: %v", err)
		}
	}
	list, err := c.Executor().ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{})
	if err != nil || len(list.GetExecutions()) != 1 {
		t.Errorf("%d executions, %v", len(list.GetExecutions()), err)
	}
	// What is kept of the request does not give its secret away.
	err = filepath.WalkDir(d.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return nil // gone meanwhile, or a socket
		}
		if text, err := os.ReadFile(path); err == nil && bytes.Contains(text, []byte(secret)) {
			t.Errorf("%s has the value of a variable", path)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if info, err := os.Stat(filepath.Join(d.dir, "state/request-id.key")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}

// kill -9 of executord at any moment of a start: the client's repeat joins, and whatever
// was made was made once.
func TestRepeatAfterKillJoins(t *testing.T) {
	d := start(t)
	c := d.dial()
	session := runningSession(t, c)
	outcomes := make(map[executorv1.Reason]int)
	for round := range repetitions(t, 6) {
		name := fmt.Sprintf("round%d", round)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		k := newChecker()
		var result *executorv1.Result
		var following sync.WaitGroup
		var err error
		following.Go(func() {
			var s *client.Stream
			s, err = c.Execute(ctx, &executorv1.ExecuteRequest{Parent: session, Command: counted(name), Labels: map[string]string{"round": name}, RequestId: name})
			if err == nil {
				err = k.follow(s)
				result = s.Result()
			}
		})
		time.Sleep(time.Duration(rand.IntN(12_000)) * time.Microsecond) // a start takes a few milliseconds
		d.kill()
		d.up()
		following.Wait()
		cancel()
		if err != nil || k.err != nil {
			t.Fatalf("round %d: %v, %v", round, err, k.err)
		}
		outcomes[result.GetReason()]++
		list, err := c.Executor().ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{Filter: "labels.round = " + name})
		if err != nil || len(list.GetExecutions()) != 1 {
			t.Errorf("round %d: %d executions were made, %v", round, len(list.GetExecutions()), err)
		}
		ran := runs(t, c, session, name)
		switch result.GetReason() {
		case executorv1.Reason_REASON_EXITED:
			if ran != 1 || result.GetExitCode() != 7 || k.stdout() != name+"\n" {
				t.Errorf("round %d: ran %d times, told %q, %v", round, ran, k.stdout(), result)
			}
		case executorv1.Reason_REASON_START_FAILED:
			if ran != 0 {
				t.Errorf("round %d: ran %d times and %v", round, ran, result)
			}
		default:
			t.Errorf("round %d: %v", round, result)
		}
	}
	t.Logf("outcomes: %v", outcomes)
}

// Lists by filter, as users ask for them; what is no filter, and what is no page token of
// this listing, is refused (fault cases 8 and 9).
func TestListsByFilter(t *testing.T) {
	d := start(t)
	c := d.dial()
	begin := time.Now().UTC().Add(-time.Second).Format(time.RFC3339Nano)
	for i := range 4 {
		execute(t, c, &executorv1.ExecuteRequest{Command: bash(fmt.Sprintf("exit %d", i)), Labels: map[string]string{"parity": fmt.Sprint(i % 2)}})
	}
	running, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: bash("echo runs; sleep 600"), Labels: map[string]string{"parity": "none"}})
	for err == nil { // until it has said something
		var e *executorv1.Event
		if e, err = running.Recv(); e.GetOutput() != nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	list := func(args ...string) []string {
		t.Helper()
		stdout, stderr, code := d.ctl(append([]string{"executions", "list", "-o", "name"}, args...)...)
		if code != 0 {
			t.Errorf("%v: exit code %d, %s", args, code, stderr)
		}
		return strings.Fields(stdout)
	}
	newest := list()
	for _, test := range []struct {
		args []string
		want int
	}{
		{[]string{"--state", "running"}, 1},
		{[]string{"--state", "ended"}, 4},
		{[]string{"--label", "parity=1"}, 2},
		{[]string{"--label", "parity=1", "--state", "running"}, 0},
		{[]string{"--filter", "reason = EXITED"}, 4},
		{[]string{"--filter", "reason != EXITED AND state = RUNNING"}, 1},
		{[]string{"--filter", fmt.Sprintf("create_time > %q", begin), "--limit", "3"}, 3},
		{[]string{"--filter", fmt.Sprintf("create_time < %q", begin)}, 0},
		{[]string{"--filter", fmt.Sprintf("end_time >= %q", begin)}, 4},
	} {
		if got := list(test.args...); len(got) != test.want {
			t.Errorf("%v: %v, want %d", test.args, got, test.want)
		}
	}
	if oldest := list("--order-by", "create_time"); len(oldest) != 5 || oldest[0] != newest[4] || oldest[4] != newest[0] {
		t.Errorf("the oldest first: %v, the newest first: %v", oldest, newest)
	}
	if _, stderr, code := d.ctl("executions", "list", "--filter", "state = RUN"); code == 0 || !strings.Contains(stderr, "at byte 9") || !strings.Contains(stderr, "RUNNING") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
	for _, bomb := range []string{strings.Repeat("(", 10_000), strings.Repeat("(", 2000), strings.Repeat("NOT ", 500)} {
		if _, err := c.Executor().ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{Filter: bomb}); client.Reason(err) != "INVALID_FILTER" {
			t.Errorf("a bomb: %v", err)
		}
	}
	page, err := c.Executor().ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{
		Filter: "labels.parity = 1", PageSize: 1, ReadMask: &fieldmaskpb.FieldMask{Paths: []string{"name", "result.exit_code"}},
	})
	if err != nil || len(page.GetExecutions()) != 1 || page.GetExecutions()[0].GetResult().GetExitCode() != 3 || page.GetExecutions()[0].GetCommand() != nil {
		t.Fatalf("%v, %v", page, err)
	}
	for _, token := range []string{page.GetNextPageToken(), "forged", "AAAA" + page.GetNextPageToken()[4:]} {
		_, err := c.Executor().ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{Filter: "labels.parity = 0", PageToken: token})
		if client.Reason(err) != "INVALID_PAGE_TOKEN" {
			t.Errorf("%q: %v", token, err)
		}
	}
	for _, size := range []int32{-1, 1e9} {
		_, err := c.Executor().ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{PageSize: size})
		if (status.Code(err) == codes.InvalidArgument) != (size < 0) {
			t.Errorf("page size %d: %v", size, err)
		}
	}
	if _, err := c.Cancel(t.Context(), &executorv1.CancelExecutionRequest{Name: running.Name(), GracePeriod: durationpb.New(0)}); err != nil {
		t.Error(err)
	}
	if got := list("--state", "running"); len(got) != 0 {
		t.Errorf("running: %v", got)
	}
}
