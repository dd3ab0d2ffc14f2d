package e2e

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// refusal checks all that a refusal for lack of a place must say, and returns its reason.
func refusal(err error) (string, error) {
	st := status.Convert(err)
	if st.Code() != codes.ResourceExhausted {
		return "", fmt.Errorf("it is %v", err)
	}
	var reason string
	var retry, quota bool
	for _, detail := range st.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			reason = d.GetReason()
			if d.GetMetadata()["max_running"] == "" {
				return "", fmt.Errorf("metadata %v", d.GetMetadata())
			}
		case *errdetails.RetryInfo:
			retry = d.GetRetryDelay().AsDuration() > 0
		case *errdetails.QuotaFailure:
			for _, v := range d.GetViolations() {
				quota = v.GetSubject() != "" && v.GetDescription() != ""
			}
		}
	}
	if !retry || !quota || reason != "QUEUE_FULL" && reason != "QUEUE_TIMEOUT" {
		return "", fmt.Errorf("details of %v: %v", err, st.Details())
	}
	return reason, nil
}

func (d *daemon) info(c *client.Client) *executorv1.GetServerInfoResponse {
	d.t.Helper()
	info, err := c.Admin().GetServerInfo(d.t.Context(), nil)
	if err != nil {
		d.t.Fatal(err)
	}
	return info
}

// 10,000 creates from 50 goroutines: never more run than may, the queue is bounded, the
// rest is refused with all details, the server says SERVING throughout, and what was
// accepted is run.
func TestBurstOfCreates(t *testing.T) {
	const limit, queue, clients, burst = 4, 16, 50, 10_000
	d := start(t, "--admission-max-running", fmt.Sprint(limit), "--admission-max-queued", fmt.Sprint(queue), "--admission-max-queue-wait", "2s")
	c := d.dial()
	conn, err := grpc.NewClient(d.address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var (
		next              atomic.Int64
		work, watch       sync.WaitGroup
		mu                sync.Mutex
		accepted          []string
		refused           = make(map[string]int)
		mostRun, mostWait int64
	)
	ctx, stop := context.WithCancel(t.Context())
	watch.Go(func() {
		health := healthpb.NewHealthClient(conn)
		for ctx.Err() == nil {
			begun := time.Now()
			if h, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil || h.GetStatus() != healthpb.HealthCheckResponse_SERVING {
				t.Errorf("health is %v, %v", h.GetStatus(), err)
			}
			if took := time.Since(begun); took > 10*time.Second {
				t.Errorf("its health took %v", took)
			}
			info, err := c.Admin().GetServerInfo(t.Context(), nil)
			if err != nil {
				t.Error(err)
			}
			mostRun, mostWait = max(mostRun, info.GetAdmission().GetRunning()), max(mostWait, info.GetAdmission().GetQueued())
			time.Sleep(20 * time.Millisecond)
		}
	})
	for range clients {
		work.Go(func() {
			for next.Add(1) <= burst {
				resp, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: argv("sleep", "0.2")})
				mu.Lock()
				if err == nil {
					accepted = append(accepted, resp.GetExecution().GetName())
				} else if reason, err := refusal(err); err != nil {
					t.Error(err)
				} else {
					refused[reason]++
				}
				mu.Unlock()
			}
		})
	}
	work.Wait()
	stop()
	watch.Wait()
	if mostRun > limit || mostWait > queue || mostRun == 0 || mostWait == 0 {
		t.Errorf("%d ran and %d waited at a time; %d and %d may", mostRun, mostWait, limit, queue)
	}
	if len(accepted) < limit+queue || len(accepted)+refused["QUEUE_FULL"]+refused["QUEUE_TIMEOUT"] != burst || refused["QUEUE_FULL"] == 0 {
		t.Errorf("%d accepted, refused %v", len(accepted), refused)
	}
	t.Logf("%d accepted, refused %v", len(accepted), refused)
	if len(slices.Compact(slices.Sorted(slices.Values(accepted)))) != len(accepted) {
		t.Error("a name was given twice")
	}
	for _, name := range accepted {
		e, err := c.Wait(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if r := e.GetResult(); r.GetReason() != executorv1.Reason_REASON_EXITED || r.GetExitCode() != 0 {
			t.Errorf("%s: %v", name, r)
		}
	}
	// All places come back.
	for range 500 {
		if a := d.info(c).GetAdmission(); a.GetRunning() == 0 && a.GetQueued() == 0 && a.GetSandboxes() == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("%v", d.info(c).GetAdmission())
}

// The time in the queue shows in the result, and a stop wakes who waits.
func TestQueueAndStop(t *testing.T) {
	d := start(t, "--admission-max-running", "1", "--pool-size", "0")
	c := d.dial()
	first, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: argv("sleep", "1")})
	if err != nil {
		t.Fatal(err)
	}
	k := execute(t, c, &executorv1.ExecuteRequest{Command: argv("sleep", "0.1")})
	k.wants(t, executorv1.Reason_REASON_EXITED)
	waited := k.result.GetTimes().GetSandboxReady().AsTime().Sub(k.result.GetTimes().GetQueued().AsTime())
	before, err := c.Wait(t.Context(), first.GetExecution().GetName())
	if err != nil {
		t.Fatal(err)
	}
	if ran := before.GetEndTime().AsTime().Sub(k.result.GetTimes().GetQueued().AsTime()); waited < ran {
		t.Errorf("it waited for %v, and the one before ended after %v", waited, ran)
	}

	if _, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: argv("sleep", "60")}); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	defer group.Wait()
	ended := make(chan error, 1)
	group.Go(func() {
		_, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{
			Command: &executorv1.Command{Args: []string{"true"}, Timeout: durationpb.New(time.Minute)},
		})
		ended <- err
	})
	for d.info(c).GetAdmission().GetQueued() == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	d.stop(15)
	if err := <-ended; status.Code(err) != codes.Unavailable || client.Reason(err) != "SERVER_DRAINING" {
		t.Errorf("%v", err)
	}
}
