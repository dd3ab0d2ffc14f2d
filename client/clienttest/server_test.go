package clienttest_test

import (
	"context"
	"errors"
	"io"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func connect(t *testing.T) (*clienttest.Server, *client.Client) {
	t.Helper()
	s := clienttest.Start(t)
	c, err := client.Dial(client.Config{Address: s.Address()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return s, c
}

func code(source string) *executorv1.Command {
	return &executorv1.Command{
		Code: &executorv1.Code{Language: executorv1.Language_LANGUAGE_BASH, Source: source},
		Env:  map[string]string{"COLOUR": "red"},
	}
}

func TestPrograms(t *testing.T) {
	_, c := connect(t)
	tests := []struct {
		program, stdout string
		reason          executorv1.Reason
	}{
		{"", "", executorv1.Reason_REASON_EXITED},
		{"out a\nout b; exit 3; out c", "a\nb\n", executorv1.Reason_REASON_EXITED},
		{`env COLOUR; raw "x\x00"; fill 40000; signal 9`, "", executorv1.Reason_REASON_SIGNALED},
		{"timeout after all", "", executorv1.Reason_REASON_TIMED_OUT},
		{"oom", "", executorv1.Reason_REASON_OOM_KILLED},
		{"lost", "", executorv1.Reason_REASON_SANDBOX_LOST},
		{"stopped", "", executorv1.Reason_REASON_SERVER_STOPPED},
		{"full", "", executorv1.Reason_REASON_DISK_FULL},
		{"ended", "", executorv1.Reason_REASON_SESSION_ENDED},
		{"start not_found", "", executorv1.Reason_REASON_START_FAILED},
		{"fly", "", executorv1.Reason_REASON_START_FAILED},
		{"raw x", "", executorv1.Reason_REASON_START_FAILED},
		{"cut; out a; cut; out b", "a\nb\n", executorv1.Reason_REASON_EXITED},
	}
	for _, test := range tests {
		var out writer
		r, err := c.Run(t.Context(), &executorv1.ExecuteRequest{Command: code(test.program)}, &out, &out)
		if err != nil || r.GetReason() != test.reason || test.stdout != "" && string(out) != test.stdout {
			t.Errorf("%q: result %v, output %q, error %v", test.program, r, out, err)
		}
	}
}

type writer []byte

func (w *writer) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }

func TestSessionEndsItsExecutions(t *testing.T) {
	s, c := connect(t)
	ctx := t.Context()
	created, err := c.Sessions().CreateSession(ctx, &executorv1.CreateSessionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	parent := created.GetSession().GetName()
	if _, err := c.Execute(ctx, &executorv1.ExecuteRequest{Parent: parent, Command: code("await")}); client.Reason(err) != "SESSION_NOT_RUNNING" {
		t.Errorf("error %v", err)
	}
	got, err := c.Sessions().GetSession(ctx, &executorv1.GetSessionRequest{Name: parent, Wait: durationpb.New(1e9)})
	if err != nil || got.GetSession().GetState() != executorv1.Session_STATE_RUNNING {
		t.Fatalf("session %v, error %v", got, err)
	}
	stream, err := c.Execute(ctx, &executorv1.ExecuteRequest{Parent: parent, Command: code("await")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Sessions().TerminateSession(ctx, &executorv1.TerminateSessionRequest{Name: parent}); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if !errors.Is(err, io.EOF) || stream.Result().GetReason() != executorv1.Reason_REASON_SESSION_ENDED {
		t.Errorf("result %v, error %v", stream.Result(), err)
	}
	if n := len(s.Calls("Execute")); n != 2 {
		t.Errorf("%d calls", n)
	}
}

func TestLogsOutliveARestart(t *testing.T) {
	s, c := connect(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := c.Execute(ctx, &executorv1.ExecuteRequest{Command: code("out a; await")})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Restart(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Cancel(ctx, &executorv1.CancelExecutionRequest{Name: stream.Name(), Requester: "test"}); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if !errors.Is(err, io.EOF) || !stream.Whole() || stream.Result().GetCancelledBy() != "test" {
		t.Errorf("result %v, error %v", stream.Result(), err)
	}
}

func TestErrorWithoutDetails(t *testing.T) {
	if err := clienttest.Error(codes.Unavailable, "", nil, "no route"); !client.Unavailable(err) || client.Reason(err) != "" {
		t.Errorf("error %v", err)
	}
}
