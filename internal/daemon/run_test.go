package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/api"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/execution"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/durationpb"
)

// goRun runs f in a goroutine that the test waits for.
func goRun(t *testing.T, f func()) {
	t.Helper()
	var group sync.WaitGroup
	group.Go(f)
	t.Cleanup(group.Wait)
}

// steps records what was done, and when.
type steps struct {
	mu    sync.Mutex
	start time.Time
	told  []string
}

func (s *steps) add(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = append(s.told, fmt.Sprintf("%v %s", time.Since(s.start), what))
}

// stepService is executions, sessions and server in one, which only record.
type stepService struct {
	*steps
	running atomic.Int64
	// lasts is how long what runs goes on.
	lasts time.Duration
	// stopped is closed by Stop, cut when streams are cut off.
	stopped, cut chan struct{}
	drained      chan struct{} // closed when the pool is
	serveErr     error
	// streams says that there are some that end only when they are cut off; graceful is
	// how long GracefulStop takes after that.
	streams  bool
	graceful time.Duration
}

type stepExecutions struct{ *stepService }

func (s stepExecutions) Drain(ctx context.Context) error {
	s.add("drain executions")
	select {
	case <-time.After(s.lasts):
		s.running.Store(0)
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s stepExecutions) StopAll(ctx context.Context) error {
	s.add("stop executions")
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.running.Store(0)
	return nil
}

func (s stepExecutions) Running() int { return int(s.running.Load()) }

type stepSessions struct{ *stepService }

func (s stepSessions) Drain()                        { s.add("drain sessions") }
func (s stepSessions) StopAll(context.Context) error { s.add("stop sessions"); return nil }
func (s stepSessions) Running() int                  { return 0 }

type stepPool struct{ *stepService }

func (s stepPool) Run(context.Context) error { <-s.drained; return nil }
func (s stepPool) Drain()                    { s.add("drain pool"); close(s.drained) }

type stepServer struct{ *stepService }

func (s stepServer) Serve(net.Listener) error {
	if s.serveErr != nil {
		time.Sleep(time.Second)
		return s.serveErr
	}
	<-s.stopped
	return nil
}

func (s stepServer) SetServing(serving bool) { s.add(fmt.Sprint("serving ", serving)) }

func (s stepServer) GracefulStop() {
	s.add("graceful stop")
	if !s.streams {
		return
	}
	select {
	case <-s.cut:
		select {
		case <-time.After(s.graceful):
		case <-s.stopped:
		}
	case <-s.stopped:
	}
}

func (s stepServer) Stop() {
	s.add("stop server")
	close(s.stopped)
}

// TestOrderOfStop looks at what a stop does, one after the other.
func TestOrderOfStop(t *testing.T) {
	const settled = "0s serving false|0s drain pool|0s drain sessions|0s drain executions"
	for name, test := range map[string]struct {
		onStop   configv1.OnStop
		drain    time.Duration
		running  int
		lasts    time.Duration
		graceful time.Duration
		quiet    bool // no streams
		serveErr error
		want     string
		err      bool
	}{
		"nothing runs, nobody watches": {
			drain: 30 * time.Second, quiet: true,
			want: settled + "|0s graceful stop|0s cut off|0s stop server|0s close",
		},
		"nothing runs": {
			drain: 30 * time.Second,
			want:  settled + "|0s graceful stop|2s cut off|2s stop server|2s close",
		},
		"what runs ends": {
			drain: 30 * time.Second, running: 2, lasts: 20 * time.Second,
			want: settled + "|20s graceful stop|22s cut off|22s stop server|22s close",
		},
		"what runs is kept": {
			drain: 30 * time.Second, running: 2, lasts: time.Hour,
			want: settled + "|30s graceful stop|30s cut off|30s stop server|30s close",
		},
		"what runs is kept at once": {
			running: 2, lasts: time.Hour,
			want: settled + "|0s graceful stop|0s cut off|0s stop server|0s close",
		},
		"what runs is ended": {
			onStop: configv1.OnStop_ON_STOP_TERMINATE,
			drain:  30 * time.Second, running: 2, lasts: time.Hour,
			want: settled + "|30s stop executions|30s stop sessions|30s graceful stop|32s cut off|32s stop server|32s close",
		},
		"sessions are ended though nothing runs": {
			onStop: configv1.OnStop_ON_STOP_TERMINATE, drain: 30 * time.Second,
			want: settled + "|0s stop executions|0s stop sessions|0s graceful stop|2s cut off|2s stop server|2s close",
		},
		"clients hang": {
			running: 1, lasts: time.Hour, graceful: time.Hour,
			want: settled + "|0s graceful stop|0s cut off|10s stop server|10s close",
		},
		"the listener breaks": {
			drain: 30 * time.Second, serveErr: errors.New("accept: too many open files"), err: true,
			want: "1s serving false|1s drain pool|1s drain sessions|1s drain executions|1s graceful stop|3s cut off|3s stop server|3s close",
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				told := &steps{start: time.Now()}
				service := &stepService{
					steps: told, lasts: test.lasts, streams: !test.quiet, graceful: test.graceful, serveErr: test.serveErr,
					stopped: make(chan struct{}), cut: make(chan struct{}), drained: make(chan struct{}),
				}
				service.running.Store(int64(test.running))
				d := &Daemon{
					keys:     idleKeys{},
					log:      discard(),
					settings: &configv1.Config{DrainTimeout: durationpb.New(test.drain), OnStop: test.onStop},
					engines:  engines.Set{newFakeEngine()}, executions: stepExecutions{service}, sessions: stepSessions{service},
					requests: noRequests{}, pool: stepPool{service}, server: stepServer{service}, listener: bufconn.Listen(1), info: &serverInfo{},
					cutOff: func(error) {
						synctest.Wait() // GracefulStop began before it
						told.add("cut off")
						close(service.cut)
					},
				}
				d.opened.add("all", func() error { told.add("close"); return nil })
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if test.serveErr == nil {
					cancel()
				}
				err := d.Run(ctx)
				if test.err != errors.Is(err, test.serveErr) && test.err || (err != nil) != test.err {
					t.Errorf("%v", err)
				}
				if got := join(told.told); got != test.want {
					t.Errorf("got  %s\nwant %s", got, test.want)
				}
				if !d.info.draining.Load() {
					t.Error("the server does not say that it drains")
				}
			})
		})
	}
}

func join(told []string) string {
	text := ""
	for i, each := range told {
		if i > 0 {
			text += "|"
		}
		text += each
	}
	return text
}

// liveExecutions is an execution service with one execution, as the api and the daemon
// use it.
type liveExecutions struct {
	api.Executions
	mu      sync.Mutex
	events  []execution.Event
	changed chan struct{}
	running int
}

func newLiveExecutions() *liveExecutions {
	l := &liveExecutions{changed: make(chan struct{}), running: 1}
	l.append(execution.Event{Started: &execution.Started{Execution: execution.Ref{ID: "e1"}}})
	return l
}

func (l *liveExecutions) append(e execution.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.Cursor = execution.Cursor{Epoch: "e", Sequence: uint64(len(l.events) + 1)}
	l.events = append(l.events, e)
	if e.Result != nil {
		l.running = 0
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *liveExecutions) read() ([]execution.Event, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.events), l.changed
}

func (l *liveExecutions) Running() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.running
}

func (l *liveExecutions) Drain(ctx context.Context) error {
	if l.Running() == 0 {
		return nil
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

func (l *liveExecutions) StopAll(context.Context) error {
	l.append(execution.Event{Result: &execution.Result{Reason: execution.ServerStopped}})
	return nil
}

func (l *liveExecutions) Watch(context.Context, execution.Ref, *execution.Cursor) (api.Watcher, error) {
	return &liveWatcher{log: l}, nil
}

func (l *liveExecutions) Wait(ctx context.Context, _ execution.Ref) (execution.Execution, error) {
	<-ctx.Done()
	return execution.Execution{ID: "e1"}, context.Cause(ctx)
}

type liveWatcher struct {
	log  *liveExecutions
	next int
}

func (w *liveWatcher) Next(ctx context.Context) (execution.Event, error) {
	for {
		events, changed := w.log.read()
		if w.next > 0 && events[w.next-1].Result != nil {
			return execution.Event{}, io.EOF
		}
		if w.next < len(events) {
			w.next++
			return events[w.next-1], nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return execution.Event{}, context.Cause(ctx)
		}
	}
}
func (w *liveWatcher) Cursor() execution.Cursor { return execution.Cursor{} }
func (w *liveWatcher) LastEventTime() time.Time { return time.Time{} }
func (w *liveWatcher) Close()                   {}

type noSessions struct{ api.Sessions }

type noPool struct{}

func (noPool) Run(context.Context) error { return nil }
func (noPool) Drain()                    {}

func (noSessions) Drain()                        {}
func (noSessions) StopAll(context.Context) error { return nil }
func (noSessions) Running() int                  { return 0 }

// TestStreamsAtStop stops a daemon with the real server while clients watch, wait and
// follow its health.
func TestStreamsAtStop(t *testing.T) {
	for name, onStop := range map[string]configv1.OnStop{
		"keep": configv1.OnStop_ON_STOP_KEEP, "terminate": configv1.OnStop_ON_STOP_TERMINATE,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { streamsAtStop(t, onStop) })
		})
	}
}

func streamsAtStop(t *testing.T, onStop configv1.OnStop) {
	executions := newLiveExecutions()
	shutdown, cutOff := context.WithCancelCause(context.Background())
	server, err := api.NewServer(shutdown, api.Config{Executions: executions, Sessions: noSessions{}, Logger: discard()})
	if err != nil {
		t.Fatal(err)
	}
	listener := bufconn.Listen(64 << 10)
	d := &Daemon{
		keys: idleKeys{},
		log:  discard(), settings: &configv1.Config{DrainTimeout: durationpb.New(time.Minute), OnStop: onStop},
		engines: engines.Set{newFakeEngine()}, executions: executions, sessions: noSessions{},
		requests: noRequests{}, pool: noPool{}, server: server, listener: listener, info: &serverInfo{}, cutOff: cutOff,
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	stopped := make(chan error, 1)
	var group sync.WaitGroup
	defer group.Wait()
	group.Go(func() { stopped <- d.Run(ctx) })

	conn, err := grpc.NewClient("passthrough:///bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	executor := executorv1.NewExecutorServiceClient(conn)
	watching, err := executor.WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{Name: "executions/e1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watching.Recv(); err != nil {
		t.Fatal(err)
	}
	health, err := healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	wantHealth(t, health, healthpb.HealthCheckResponse_SERVING)
	waited := make(chan error, 1)
	group.Go(func() {
		_, err := executor.WaitExecution(t.Context(), &executorv1.WaitExecutionRequest{Name: "executions/e1", Timeout: durationpb.New(time.Hour)})
		waited <- err
	})
	synctest.Wait()

	stop()
	wantHealth(t, health, healthpb.HealthCheckResponse_NOT_SERVING)
	// While it drains, what runs is told on.
	executions.append(execution.Event{Output: &execution.Output{Stream: "stdout", Data: []byte("more")}})
	begin := time.Now()
	if resp, err := watching.Recv(); err != nil || string(resp.GetEvent().GetOutput().GetData()) != "more" || time.Since(begin) != 0 {
		t.Fatalf("%v, %v after %v", resp, err, time.Since(begin))
	}
	for {
		resp, err := watching.Recv()
		if err == nil && resp.GetEvent().GetHeartbeat() != nil {
			continue
		}
		if onStop == configv1.OnStop_ON_STOP_KEEP {
			wantDraining(t, err)
			break
		}
		if err != nil || resp.GetEvent().GetResult().GetReason() != executorv1.Reason_REASON_SERVER_STOPPED {
			t.Fatalf("%v, %v", resp, err)
		}
		if _, err := watching.Recv(); !errors.Is(err, io.EOF) {
			t.Fatalf("after the result: %v", err)
		}
		break
	}
	wantDraining(t, <-waited)
	if _, err := health.Recv(); err == nil {
		t.Error("the watch of the health goes on")
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > time.Minute+deliverTime {
		t.Errorf("the stop took %v", took)
	}
}

func wantHealth(t *testing.T, stream healthpb.Health_WatchClient, want healthpb.HealthCheckResponse_ServingStatus) {
	t.Helper()
	if resp, err := stream.Recv(); err != nil || resp.GetStatus() != want {
		t.Fatalf("%v, %v; want %v", resp, err, want)
	}
}

func wantDraining(t *testing.T, err error) {
	t.Helper()
	st := status.Convert(err)
	if st.Code() != codes.Unavailable {
		t.Fatalf("%v", err)
	}
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetReason() == "SERVER_DRAINING" {
			return
		}
	}
	t.Fatalf("%v has no reason SERVER_DRAINING", err)
}

// idleKeys keeps none.
type idleKeys struct{}

func (idleKeys) Run(ctx context.Context) { <-ctx.Done() }

// noRequests remembers nothing.
type noRequests struct{}

func (noRequests) DeleteRequests(context.Context, time.Time, int) (int, error) { return 0, nil }
