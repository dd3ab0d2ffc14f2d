package client_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/version"
)

func TestDialRefusesAddresses(t *testing.T) {
	for _, address := range []string{"nowhere", "unix:", "host:port"} {
		if c, err := client.Dial(client.Config{Address: address}); err == nil {
			t.Errorf("dial %q: no error", address)
			_ = c.Close()
		}
	}
}

func TestUnixSocket(t *testing.T) {
	t.Parallel()
	s := clienttest.New()
	address := "unix:" + filepath.Join(t.TempDir(), "s")
	if err := s.Listen(address); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	c := dial(t, client.Config{Address: address})
	r, err := c.Run(bounded(t), execute("exit 4"), nil, nil)
	if err != nil || r.GetExitCode() != 4 {
		t.Errorf("result %v, error %v", r, err)
	}
	if agent, want := s.UserAgent(), "executor-go/"+client.Version()+" "; !strings.HasPrefix(agent, want) {
		t.Errorf("user agent %q, want %q first", agent, want)
	}
}

// TestRepeats: what only reads is repeated by the connection, nothing else is.
func TestRepeats(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	s.Put(ended(), sample()...)
	c := dial(t, client.Config{Address: s.Address(), MaxOutage: -1})
	s.Hook(func(_ string, nth int) error {
		if nth < 3 {
			return status.Error(codes.Unavailable, "storm")
		}
		return nil
	})
	ctx := bounded(t)
	calls := map[string]func() error{
		"GetExecution": func() error {
			_, err := c.Executor().GetExecution(ctx, &executorv1.GetExecutionRequest{Name: name})
			return err
		},
		"ListExecutions": func() error {
			_, err := c.Executor().ListExecutions(ctx, &executorv1.ListExecutionsRequest{})
			return err
		},
		"ListSessions": func() error {
			_, err := c.Sessions().ListSessions(ctx, &executorv1.ListSessionsRequest{})
			return err
		},
		"GetServerInfo": func() error {
			_, err := c.Admin().GetServerInfo(ctx, &executorv1.GetServerInfoRequest{})
			return err
		},
		"StartExecution": func() error {
			_, err := c.Executor().StartExecution(ctx, &executorv1.StartExecutionRequest{})
			return err
		},
		"DeleteExecution": func() error {
			_, err := c.Executor().DeleteExecution(ctx, &executorv1.DeleteExecutionRequest{Name: name})
			return err
		},
		"CreateSession": func() error {
			_, err := c.Sessions().CreateSession(ctx, &executorv1.CreateSessionRequest{})
			return err
		},
		"Execute": func() error { _, err := c.Execute(ctx, execute("exit 0")); return err },
		"ReadOutput": func() error {
			stream, err := c.Executor().ReadOutput(ctx, &executorv1.ReadOutputRequest{Name: name, Stream: stdout})
			if err != nil {
				return err
			}
			_, err = stream.Recv()
			return err
		},
	}
	for method, call := range calls {
		err := call()
		reads := strings.HasPrefix(method, "Get") || strings.HasPrefix(method, "List")
		if n := len(s.Calls(method)); reads && (err != nil || n != 3) || !reads && (!client.Unavailable(err) || n != 1) {
			t.Errorf("%s: %d calls, error %v", method, n, err)
		}
	}
}

func TestWait(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	s.Put(ended(), sample()[:2]...) // runs for ever
	c := dial(t, client.Config{Address: s.Address()})
	s.Hook(func(_ string, nth int) error {
		if nth < 3 {
			return status.Error(codes.Unavailable, "storm")
		}
		return nil
	})
	stream, err := c.Executor().StartExecution(bounded(t), &executorv1.StartExecutionRequest{Command: execute("await").GetCommand()})
	if err == nil {
		t.Fatalf("started %v in the storm", stream)
	}
	if _, err := c.Wait(bounded(t), "executions/nobody"); client.Reason(err) != "EXECUTION_NOT_FOUND" {
		t.Errorf("error %v", err)
	}
	enough := errors.New("enough")
	ctx, cancel := context.WithCancelCause(bounded(t))
	time.AfterFunc(50*time.Millisecond, func() { cancel(enough) })
	if _, err := c.Wait(ctx, name); !errors.Is(err, enough) {
		t.Errorf("error %v", err)
	}
	s.Put(&executorv1.Execution{Name: "executions/x9", State: executorv1.Execution_STATE_RUNNING}, sample()...)
	e, err := c.Wait(bounded(t), "executions/x9")
	if err != nil || e.GetState() != executorv1.Execution_STATE_ENDED {
		t.Errorf("execution %v, error %v", e, err)
	}
}

func TestCancel(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	c := dial(t, client.Config{Address: s.Address()})
	stream, err := c.Execute(bounded(t), execute("out hello;await"))
	if err != nil {
		t.Fatal(err)
	}
	s.Hook(func(method string, nth int) error {
		if method == "CancelExecution" && nth < 3 {
			return status.Error(codes.Unavailable, "storm")
		}
		return nil
	})
	e, err := c.Cancel(bounded(t), &executorv1.CancelExecutionRequest{Name: stream.Name(), Requester: "test"})
	if err != nil || e.GetResult().GetCancelledBy() != "test" || len(s.Calls("CancelExecution")) != 3 {
		t.Errorf("execution %v, error %v", e, err)
	}
	if _, err := drain(stream); err != nil || stream.Result().GetReason() != executorv1.Reason_REASON_CANCELLED {
		t.Errorf("result %v, error %v", stream.Result(), err)
	}
	if _, err := c.Cancel(bounded(t), &executorv1.CancelExecutionRequest{Name: "executions/nobody"}); !client.NotFound(err) {
		t.Errorf("error %v", err)
	}
}

// broken is a writer that fails.
type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestRun(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	c := dial(t, client.Config{Address: s.Address()})
	run := func(program string) (*executorv1.Result, string, string, error) {
		var out, errout bytes.Buffer
		r, err := c.Run(bounded(t), execute(program), &out, &errout)
		return r, out.String(), errout.String(), err
	}
	t.Run("whole", func(t *testing.T) {
		r, out, errout, err := run("out hello;err oops;cut;out again;exit 3")
		if err != nil || r.GetExitCode() != 3 || out != "hello\nagain\n" || errout != "oops\n" {
			t.Errorf("result %v, stdout %q, stderr %q, error %v", r, out, errout, err)
		}
	})
	t.Run("large", func(t *testing.T) {
		_, out, _, err := run("fill 3000000")
		if err != nil || len(out) != 3000000 {
			t.Errorf("%d bytes, error %v", len(out), err)
		}
	})
	t.Run("time-out is a result", func(t *testing.T) {
		r, _, _, err := run("out hello;timeout")
		if err != nil || r.GetOutcome() != executorv1.Outcome_OUTCOME_TIMEOUT {
			t.Errorf("result %v, error %v", r, err)
		}
	})
	t.Run("dropped output", func(t *testing.T) {
		r, out, _, err := run("out hello;gap 2;out again")
		if !errors.Is(err, client.ErrIncomplete) || r.GetExitCode() != 0 || out != "hello\nagain\n" {
			t.Errorf("result %v, stdout %q, error %v", r, out, err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		if r, _, _, err := run("refuse INVALID_ARGUMENT BAD command.args no good"); r != nil || client.Reason(err) != "BAD" {
			t.Errorf("result %v, error %v", r, err)
		}
	})
	t.Run("unwanted output", func(t *testing.T) {
		if _, err := c.Run(bounded(t), execute("out hello;err oops"), nil, nil); err != nil {
			t.Error(err)
		}
	})
	t.Run("broken writer", func(t *testing.T) {
		if _, err := c.Run(bounded(t), execute("out hello;await"), broken{}, nil); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("wrong result", func(t *testing.T) {
		log := sample()
		log[6].GetResult().GetTotals()[0].Crc32C++
		s.Play(func(p *clienttest.Play) error { return p.Send(log...) })
		if r, _, _, err := run("exit 0"); !errors.Is(err, client.ErrIncomplete) || r == nil {
			t.Errorf("result %v, error %v", r, err)
		}
	})
}

func TestVersion(t *testing.T) {
	if client.Version() == "" {
		t.Error("no version")
	}
	const path = "github.com/harvest-run/executord"
	tests := []struct {
		want string
		info *debug.BuildInfo
	}{
		{"v1.2.3", &debug.BuildInfo{Deps: []*debug.Module{{Path: "x", Version: "v9.0.0"}, {Path: path, Version: "v1.2.3"}}}},
		{version.String(), &debug.BuildInfo{Main: debug.Module{Path: path, Version: "(devel)"}}},
		{"devel", &debug.BuildInfo{Main: debug.Module{Path: "other", Version: "v3.0.0"}}},
		{"devel", nil},
	}
	for _, test := range tests {
		if got := client.VersionIn(test.info); got != test.want {
			t.Errorf("version %q, want %q", got, test.want)
		}
	}
}
