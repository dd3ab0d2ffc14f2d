package api

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/execution"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"
)

func TestGetExecution(t *testing.T) {
	b := newBench(t)
	b.executions.add(execution.Execution{ID: "e1"})
	b.executions.add(execution.Execution{ID: "e1", Session: "s1"})
	for _, name := range []string{"executions/e1", "sessions/s1/executions/e1"} {
		resp, err := b.executor.GetExecution(t.Context(), &executorv1.GetExecutionRequest{Name: name})
		if err != nil || resp.GetExecution().GetName() != name {
			t.Errorf("%v, %v", resp, err)
		}
	}
	const missing = "sessions/s2/executions/e1"
	_, err := b.executor.GetExecution(t.Context(), &executorv1.GetExecutionRequest{Name: missing})
	if d := wantError(t, err, codes.NotFound, "EXECUTION_NOT_FOUND"); d.resource.GetResourceName() != missing {
		t.Errorf("%v", d.resource)
	}
}

func TestListExecutions(t *testing.T) {
	b := newBench(t)
	for i := range 7 {
		b.executions.add(execution.Execution{ID: fmt.Sprintf("e%d", i)})
	}
	for i := range 3 {
		b.executions.add(execution.Execution{ID: fmt.Sprintf("e%d", i+7), Session: fmt.Sprintf("s%d", i%2)})
	}
	list := func(parent string, size int32) (names []string, pages int) {
		t.Helper()
		token := ""
		for {
			resp, err := b.executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{
				Parent: parent, PageSize: size, PageToken: token,
			})
			if err != nil {
				t.Fatal(err)
			}
			pages++
			for _, e := range resp.GetExecutions() {
				names = append(names, e.GetName())
			}
			if token = resp.GetNextPageToken(); token == "" {
				return names, pages
			}
		}
	}
	for _, test := range []struct {
		parent string
		size   int32
		names  string
		pages  int
	}{
		{"", 0, "sessions/s0/executions/e9 sessions/s1/executions/e8 sessions/s0/executions/e7 executions/e6 executions/e5 executions/e4 executions/e3 executions/e2 executions/e1 executions/e0", 1},
		{"", 3, "sessions/s0/executions/e9 sessions/s1/executions/e8 sessions/s0/executions/e7 executions/e6 executions/e5 executions/e4 executions/e3 executions/e2 executions/e1 executions/e0", 4},
		{"", 5, "sessions/s0/executions/e9 sessions/s1/executions/e8 sessions/s0/executions/e7 executions/e6 executions/e5 executions/e4 executions/e3 executions/e2 executions/e1 executions/e0", 2},
		{"sessions/-", 2, "sessions/s0/executions/e9 sessions/s1/executions/e8 sessions/s0/executions/e7", 2},
		{"sessions/s0", 1, "sessions/s0/executions/e9 sessions/s0/executions/e7", 2},
		{"sessions/none", 1, "", 1},
	} {
		names, pages := list(test.parent, test.size)
		if got := strings.Join(names, " "); got != test.names || pages != test.pages {
			t.Errorf("%q by %d: %q in %d pages, want %q in %d", test.parent, test.size, got, pages, test.names, test.pages)
		}
	}
	first, err := b.executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{
		Parent: "sessions/-", PageToken: first.GetNextPageToken(),
	})
	wantError(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN")
	if _, err := b.executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{PageSize: 1_000_000_000}); err != nil {
		t.Fatal(err)
	}
	if got := b.executions.queries[len(b.executions.queries)-1].Limit; got != 501 {
		t.Errorf("asked for %d", got)
	}
}

func TestWaitExecution(t *testing.T) {
	const name = "executions/e1"
	setup := func(t *testing.T) (*bench, *fakeLog) {
		b := newBench(t)
		return b, b.executions.add(execution.Execution{ID: "e1", State: execution.Running})
	}
	wait := func(ctx context.Context, b *bench, timeout *durationpb.Duration) (*executorv1.Execution, error) {
		resp, err := b.executor.WaitExecution(ctx, &executorv1.WaitExecutionRequest{Name: name, Timeout: timeout})
		return resp.GetExecution(), err
	}
	t.Run("has ended", func(t *testing.T) {
		b, l := setup(t)
		l.exit(3)
		if e, err := wait(t.Context(), b, nil); err != nil || e.GetResult().GetExitCode() != 3 {
			t.Errorf("%v, %v", e, err)
		}
	})
	t.Run("ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b, l := setup(t)
			var ending sync.WaitGroup
			ending.Go(func() {
				time.Sleep(59 * time.Second)
				l.exit(0)
			})
			start := time.Now()
			e, err := wait(t.Context(), b, nil)
			if err != nil || e.GetState() != executorv1.Execution_STATE_ENDED || time.Since(start) != 59*time.Second {
				t.Errorf("%v, %v after %v", e, err, time.Since(start))
			}
			ending.Wait()
		})
	})
	t.Run("does not end", func(t *testing.T) {
		for timeout, want := range map[*durationpb.Duration]time.Duration{
			nil:                              60 * time.Second,
			durationpb.New(0):                0,
			durationpb.New(time.Millisecond): time.Millisecond,
			durationpb.New(time.Hour):        time.Hour,
		} {
			synctest.Test(t, func(t *testing.T) {
				b, _ := setup(t)
				start := time.Now()
				e, err := wait(t.Context(), b, timeout)
				if err != nil || e.GetState() != executorv1.Execution_STATE_RUNNING || time.Since(start) != want {
					t.Errorf("%v: %v, %v after %v", timeout, e, err, time.Since(start))
				}
			})
		}
	})
	t.Run("not found", func(t *testing.T) {
		b := newBench(t)
		_, err := wait(t.Context(), b, nil)
		wantError(t, err, codes.NotFound, "EXECUTION_NOT_FOUND")
	})
	t.Run("shorter deadline", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b, _ := setup(t)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := wait(ctx, b, nil); err == nil || time.Now().IsZero() {
				t.Error("no error")
			}
		})
	})
	t.Run("draining", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b, _ := setup(t)
			var stopping sync.WaitGroup
			stopping.Go(func() {
				time.Sleep(time.Second)
				b.shutdown(nil)
			})
			_, err := wait(t.Context(), b, nil)
			if d := wantError(t, err, codes.Unavailable, "SERVER_DRAINING"); d.retry == nil {
				t.Error("no RetryInfo")
			}
			stopping.Wait()
		})
	})
}

func TestCancelExecution(t *testing.T) {
	b := newBench(t)
	for name, test := range map[string]struct {
		req   *executorv1.CancelExecutionRequest
		by    string
		grace string
	}{
		"named":    {&executorv1.CancelExecutionRequest{Requester: "ann: too slow"}, "ann: too slow (bufconn)", "none"},
		"unnamed":  {&executorv1.CancelExecutionRequest{}, "unnamed caller (bufconn)", "none"},
		"graceful": {&executorv1.CancelExecutionRequest{GracePeriod: durationpb.New(7 * time.Second)}, "unnamed caller (bufconn)", "7s"},
		"at once":  {&executorv1.CancelExecutionRequest{GracePeriod: durationpb.New(0)}, "unnamed caller (bufconn)", "0s"},
	} {
		t.Run(name, func(t *testing.T) {
			b.executions.add(execution.Execution{ID: "e1"})
			test.req.Name = "executions/e1"
			resp, err := b.executor.CancelExecution(t.Context(), test.req)
			if err != nil {
				t.Fatal(err)
			}
			result := resp.GetExecution().GetResult()
			if result.GetReason() != executorv1.Reason_REASON_CANCELLED || result.GetCancelledBy() != test.by {
				t.Errorf("%v", result)
			}
			last := b.executions.cancellations[len(b.executions.cancellations)-1]
			grace := "none"
			if last.Grace != nil {
				grace = last.Grace.String()
			}
			if grace != test.grace {
				t.Errorf("grace %s, want %s", grace, test.grace)
			}
		})
	}
}

// TestCancelOutlivesItsCaller: the caller leaves; the RPC ends, with the context that the
// domain waits on.
func TestCancelOutlivesItsCaller(t *testing.T) {
	b := newBench(t)
	b.executions.add(execution.Execution{ID: "e1"})
	entered, left := make(chan struct{}), make(chan error, 1)
	b.executions.hook = func(ctx context.Context, method string) error {
		close(entered)
		<-ctx.Done()
		left <- context.Cause(ctx)
		return context.Cause(ctx)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var calling sync.WaitGroup
	calling.Go(func() {
		_, err := b.executor.CancelExecution(ctx, &executorv1.CancelExecutionRequest{Name: "executions/e1"})
		if err == nil {
			t.Error("no error")
		}
	})
	<-entered
	cancel()
	calling.Wait()
	if err := <-left; err == nil {
		t.Error("the domain's context did not end")
	}
}

func TestRequesterAddress(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			b := newBench(t)
			address := "127.0.0.1:0"
			if network == "unix" {
				address = filepath.Join(t.TempDir(), "s")
			}
			listener, err := net.Listen(network, address)
			if err != nil {
				t.Fatal(err)
			}
			var serving sync.WaitGroup
			serving.Go(func() { _ = b.server.Serve(listener) })
			defer serving.Wait()
			defer b.server.Stop()
			target := listener.Addr().String()
			if network == "unix" {
				target = "unix:" + address
			}
			conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			b.executions.add(execution.Execution{ID: "e1"})
			resp, err := executorv1.NewExecutorServiceClient(conn).CancelExecution(t.Context(),
				&executorv1.CancelExecutionRequest{Name: "executions/e1", Requester: "ann"})
			if err != nil {
				t.Fatal(err)
			}
			want := map[string]string{"tcp": "ann (127.0.0.1:", "unix": "ann (unix socket)"}[network]
			if by := resp.GetExecution().GetResult().GetCancelledBy(); !strings.HasPrefix(by, want) {
				t.Errorf("cancelled by %q, want %q", by, want)
			}
		})
	}
	for want, principal := range map[string]auth.Principal{
		"ann (unknown address)":                auth.Local(),
		"key:ci at unknown address (ann)":      {Name: "key:ci", Role: auth.User},
		"cert:CN=ops at unknown address (ann)": {Name: "cert:CN=ops", Role: auth.Operator},
	} {
		ctx := context.WithValue(context.Background(), principalKey{}, principal)
		if got := requester(ctx, "ann"); got != want {
			t.Errorf("without a peer: %q, want %q", got, want)
		}
	}
}

func TestDeleteExecution(t *testing.T) {
	b := newBench(t)
	l := b.executions.add(execution.Execution{ID: "e1"})
	req := &executorv1.DeleteExecutionRequest{Name: "executions/e1"}
	_, err := b.executor.DeleteExecution(t.Context(), req)
	if d := wantError(t, err, codes.FailedPrecondition, "EXECUTION_NOT_ENDED"); d.precondition.GetViolations()[0].GetSubject() != "executions/e1" {
		t.Errorf("%v", d.precondition)
	}
	l.exit(0)
	if _, err := b.executor.DeleteExecution(t.Context(), req); err != nil {
		t.Fatal(err)
	}
	_, err = b.executor.DeleteExecution(t.Context(), req)
	wantError(t, err, codes.NotFound, "EXECUTION_NOT_FOUND")
}
