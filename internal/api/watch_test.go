package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/execution"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// kinds names the kinds of the events in a stream until it ends.
func kinds(t *testing.T, recv func() (*executorv1.Event, error)) ([]string, error) {
	t.Helper()
	var told []string
	for {
		event, err := recv()
		if errors.Is(err, io.EOF) {
			return told, nil
		}
		if err != nil {
			return told, err
		}
		told = append(told, kind(event))
	}
}

func kind(event *executorv1.Event) string {
	switch k := event.GetKind().(type) {
	case *executorv1.Event_Started:
		return "started " + k.Started.GetExecution()
	case *executorv1.Event_Output:
		return fmt.Sprintf("%v@%d %s", k.Output.GetStream(), k.Output.GetOffset(), k.Output.GetData())
	case *executorv1.Event_Gap:
		return "gap"
	case *executorv1.Event_Heartbeat:
		return fmt.Sprintf("heartbeat %d", event.GetCursor().GetSequence())
	case *executorv1.Event_Result:
		return fmt.Sprintf("result %v", k.Result.GetReason())
	default:
		return fmt.Sprintf("%T", k)
	}
}

// watch opens a stream of events.
func (b *bench) watch(t *testing.T, req *executorv1.WatchExecutionRequest) func() (*executorv1.Event, error) {
	t.Helper()
	stream, err := b.executor.WatchExecution(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return func() (*executorv1.Event, error) {
		resp, err := stream.Recv()
		return resp.GetEvent(), err
	}
}

func equal(t *testing.T, got []string, want ...string) {
	t.Helper()
	if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// sample fills a log with a bit of everything.
func sample(l *fakeLog) {
	l.start()
	l.output("stdout", "a")
	l.output("stderr", "b")
	l.output("stdout", "c")
	l.append(execution.Event{Gap: &execution.Gap{Reason: "DAMAGED"}})
	l.exit(0)
}

func TestExecute(t *testing.T) {
	b := newBench(t)
	b.executions.onStart = sample
	for parent, name := range map[string]string{"": "executions/new", "sessions/s1": "sessions/s1/executions/new"} {
		stream, err := b.executor.Execute(t.Context(), &executorv1.ExecuteRequest{Parent: parent, Command: argv("true")})
		if err != nil {
			t.Fatal(err)
		}
		got, err := kinds(t, func() (*executorv1.Event, error) {
			resp, err := stream.Recv()
			return resp.GetEvent(), err
		})
		if err != nil {
			t.Fatal(err)
		}
		equal(t, got, "started "+name, "STREAM_STDOUT@0 a", "STREAM_STDERR@0 b", "STREAM_STDOUT@1 c", "gap", "result REASON_EXITED")
	}
	eventually(t, func() bool { return b.executions.openWatchers() == 0 })
}

// eventually waits for something that happens soon.
func eventually(t *testing.T, done func() bool) {
	t.Helper()
	for range 1000 {
		if done() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("it did not happen")
}

func TestExecuteGoesOnWithoutItsCaller(t *testing.T) {
	b := newBench(t)
	b.executions.onStart = func(l *fakeLog) { l.start() }
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := b.executor.Execute(ctx, &executorv1.ExecuteRequest{Command: argv("true")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	eventually(t, func() bool { return b.executions.openWatchers() == 0 })
	if len(b.executions.cancellations) != 0 {
		t.Error("the execution was cancelled")
	}
}

func TestWatchResumes(t *testing.T) {
	b := newBench(t)
	sample(b.executions.add(execution.Execution{ID: "e1"}))
	all := []string{"started executions/e1", "STREAM_STDOUT@0 a", "STREAM_STDERR@0 b", "STREAM_STDOUT@1 c", "gap", "result REASON_EXITED"}
	for after := range len(all) + 1 {
		got, err := kinds(t, b.watch(t, &executorv1.WatchExecutionRequest{
			Name: "executions/e1", After: &executorv1.Cursor{Epoch: "e1", Sequence: uint64(after)},
		}))
		if err != nil {
			t.Fatal(err)
		}
		equal(t, got, all[after:]...)
	}
	got, err := kinds(t, b.watch(t, &executorv1.WatchExecutionRequest{Name: "executions/e1", After: &executorv1.Cursor{}}))
	if err != nil {
		t.Fatal(err)
	}
	equal(t, got, all...)
	_, err = kinds(t, b.watch(t, &executorv1.WatchExecutionRequest{
		Name: "executions/e1", After: &executorv1.Cursor{Epoch: "e1", Sequence: 7},
	}))
	wantError(t, err, codes.OutOfRange, "CURSOR_IN_FUTURE")
	_, err = kinds(t, b.watch(t, &executorv1.WatchExecutionRequest{Name: "executions/e2"}))
	wantError(t, err, codes.NotFound, "EXECUTION_NOT_FOUND")
}

func TestHeartbeats(t *testing.T) {
	for _, test := range []struct {
		asked    *durationpb.Duration
		interval time.Duration
	}{
		{nil, 15 * time.Second},
		{durationpb.New(time.Second), time.Second},
		{durationpb.New(300 * time.Second), 300 * time.Second},
	} {
		t.Run(test.interval.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				l := b.executions.add(execution.Execution{ID: "e1"})
				l.start()
				begin := time.Now()
				// Not silent for longer than the interval at first, then for two and a half.
				var writing sync.WaitGroup
				writing.Go(func() {
					for range 3 {
						time.Sleep(test.interval - time.Millisecond)
						l.output("stdout", "x")
					}
					time.Sleep(test.interval*5/2 + time.Millisecond)
					l.exit(0)
				})
				recv := b.watch(t, &executorv1.WatchExecutionRequest{Name: "executions/e1", HeartbeatInterval: test.asked})
				var got []string
				var last time.Time
				for {
					event, err := recv()
					if errors.Is(err, io.EOF) {
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					got = append(got, fmt.Sprintf("%v %s", time.Since(begin).Round(time.Millisecond), kind(event)))
					if beat := event.GetHeartbeat(); beat != nil {
						if !beat.GetLastEventTime().AsTime().Equal(last) {
							t.Errorf("the last event was at %v, not %v", last, beat.GetLastEventTime().AsTime())
						}
						if event.GetCursor().GetEpoch() != "e1" || !event.GetEventTime().AsTime().Equal(time.Now()) {
							t.Errorf("%v", event)
						}
					} else {
						last = event.GetEventTime().AsTime()
					}
				}
				writing.Wait()
				at := func(halves, ms int) string {
					return (test.interval/2*time.Duration(halves) + time.Duration(ms)*time.Millisecond).String()
				}
				equal(t, got,
					"0s started executions/e1",
					at(2, -1)+" STREAM_STDOUT@0 x", at(4, -2)+" STREAM_STDOUT@1 x", at(6, -3)+" STREAM_STDOUT@2 x",
					at(8, -3)+" heartbeat 4", at(10, -3)+" heartbeat 4",
					at(11, -2)+" result REASON_EXITED")
			})
		})
	}
}

func TestDrainingEndsStreams(t *testing.T) {
	b := newBench(t)
	l := b.executions.add(execution.Execution{ID: "e1"})
	l.start()
	recv := b.watch(t, &executorv1.WatchExecutionRequest{Name: "executions/e1"})
	if _, err := recv(); err != nil {
		t.Fatal(err)
	}
	b.shutdown(errors.New("the daemon's own words"))
	got, err := kinds(t, recv)
	if d := wantError(t, err, codes.Unavailable, "SERVER_DRAINING"); d.retry.GetRetryDelay().AsDuration() != time.Second {
		t.Errorf("%v", d.retry)
	}
	equal(t, got)
	// Also streams that begin afterwards, as far as they would wait.
	got, err = kinds(t, b.watch(t, &executorv1.WatchExecutionRequest{Name: "executions/e1"}))
	wantError(t, err, codes.Unavailable, "SERVER_DRAINING")
	if len(got) > 1 {
		t.Errorf("got %q", got)
	}
	b.server.GracefulStop()
}

// flood is a watcher that always has the largest chunk.
type flood struct {
	data     []byte
	sequence uint64
	closed   func()
}

func (f *flood) Next(ctx context.Context) (execution.Event, error) {
	if ctx.Err() != nil {
		return execution.Event{}, context.Cause(ctx)
	}
	f.sequence++
	return execution.Event{
		Cursor: execution.Cursor{Epoch: "e1", Sequence: f.sequence}, Time: time.Unix(1, 0),
		Output: &execution.Output{Stream: stdout, Data: f.data},
	}, nil
}
func (f *flood) Cursor() execution.Cursor { return execution.Cursor{} }
func (f *flood) LastEventTime() time.Time { return time.Time{} }
func (f *flood) Close()                   { f.closed() }

// floods answers every Watch with a flood.
type floods struct {
	*fakeExecutions
	size int
}

func (f *floods) Watch(context.Context, execution.Ref, *execution.Cursor) (Watcher, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watchers++
	return &flood{data: make([]byte, f.size), closed: func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.watchers--
	}}, nil
}

func floodBench(t *testing.T, size int, patience time.Duration) *bench {
	fake := &floods{fakeExecutions: &fakeExecutions{}, size: size}
	b := newBench(t, func(c *Config) { c.Executions, c.SlowConsumerAfter = fake, patience })
	b.executions = fake.fakeExecutions
	return b
}

// TestSlowConsumer: a client that takes nothing is cut off, with everything on the
// server's side released; what was sent is still there for it, and the reason.
func TestSlowConsumer(t *testing.T) {
	b := floodBench(t, maxChunk, 100*time.Millisecond)
	stream, err := b.executor.WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{Name: "executions/e1"})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return b.executions.openWatchers() == 0 })
	// Others are served.
	if _, err := b.admin.GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{}); err != nil {
		t.Error(err)
	}
	last := first.GetEvent().GetCursor().GetSequence()
	for {
		resp, err := stream.Recv()
		if err != nil {
			d := wantError(t, err, codes.ResourceExhausted, "SLOW_CONSUMER")
			if d.info.GetMetadata()["patience"] != "100ms" {
				t.Errorf("%v", d.info)
			}
			break
		}
		if sequence := resp.GetEvent().GetCursor().GetSequence(); sequence != last+1 {
			t.Fatalf("%d after %d", sequence, last)
		}
		last++
	}
	if last < 2 {
		t.Errorf("only %d events came", last)
	}
}

// TestSlowIsNotStalled: one that takes a little now and then is served on.
func TestSlowIsNotStalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := floodBench(t, maxChunk, time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		stream, err := b.executor.WatchExecution(ctx, &executorv1.WatchExecutionRequest{Name: "executions/e1"})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			time.Sleep(10 * time.Second)
			if _, err := stream.Recv(); err != nil {
				t.Fatalf("after %d: %v", i, err)
			}
		}
	})
}

// TestSlowConsumerOfOutput is the same for ReadOutput.
func TestSlowConsumerOfOutput(t *testing.T) {
	b := newBench(t, func(c *Config) { c.SlowConsumerAfter = 100 * time.Millisecond })
	l := b.executions.add(execution.Execution{ID: "e1"})
	l.output(stdout, string(make([]byte, 4<<20)))
	stream, err := b.executor.ReadOutput(t.Context(), &executorv1.ReadOutputRequest{
		Name: "executions/e1", Stream: executorv1.Stream_STREAM_STDOUT,
	})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return strings.Contains(b.logs.String(), "SLOW_CONSUMER") })
	for {
		if _, err := stream.Recv(); err != nil {
			wantError(t, err, codes.ResourceExhausted, "SLOW_CONSUMER")
			return
		}
	}
}

// TestStopFreesBlockedSenders: Stop waits for the goroutine of a stream whose client
// takes nothing.
func TestStopFreesBlockedSenders(t *testing.T) {
	b := floodBench(t, maxChunk, time.Hour)
	stream, err := b.executor.WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{Name: "executions/e1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	b.server.Stop()
	if n := b.executions.openWatchers(); n != 0 {
		t.Errorf("%d watchers are open after Stop", n)
	}
}

// TestMemoryOfSlowConsumers measures what clients cost that never read. With messages
// of more than 32 KiB each would hold several buffers of 1 MiB.
func TestMemoryOfSlowConsumers(t *testing.T) {
	const clients = 50
	b := floodBench(t, maxChunk, time.Hour)
	inUse := func() uint64 {
		runtime.GC()
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return stats.HeapInuse + stats.StackInuse
	}
	before := inUse()
	for range clients {
		client := executorv1.NewExecutorServiceClient(b.dial())
		stream, err := client.WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{Name: "executions/e1"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	// What is held stops growing: then all are blocked.
	var held uint64
	eventually(t, func() bool {
		last := held
		time.Sleep(50 * time.Millisecond)
		held = inUse()
		return held <= last
	})
	// Of this about 200 KiB are the pipe's and the client's own.
	if each := (int64(held) - int64(before)) / clients; each > 600<<10 {
		t.Errorf("each client costs %d KiB", each>>10)
	}
}

func TestReadOutput(t *testing.T) {
	b := newBench(t)
	l := b.executions.add(execution.Execution{ID: "e1"})
	whole := make([]byte, 3*maxChunk+17)
	for i := range whole {
		whole[i] = byte(i * 7)
	}
	l.output("stderr", "other")
	l.output("stdout", string(whole))
	for name, test := range map[string]struct {
		stream        executorv1.Stream
		offset, limit int64
		want          []byte
	}{
		"all":              {executorv1.Stream_STREAM_STDOUT, 0, 0, whole},
		"the other":        {executorv1.Stream_STREAM_STDERR, 0, 0, []byte("other")},
		"from the middle":  {executorv1.Stream_STREAM_STDOUT, maxChunk + 1, 0, whole[maxChunk+1:]},
		"a bit":            {executorv1.Stream_STREAM_STDOUT, 5, 3, whole[5:8]},
		"more than a part": {executorv1.Stream_STREAM_STDOUT, 5, maxChunk + 3, whole[5 : maxChunk+8]},
		"just a part":      {executorv1.Stream_STREAM_STDOUT, 0, maxChunk, whole[:maxChunk]},
		"more than there":  {executorv1.Stream_STREAM_STDOUT, 1, 1 << 40, whole[1:]},
		"at the end":       {executorv1.Stream_STREAM_STDOUT, int64(len(whole)), 0, nil},
		"behind the end":   {executorv1.Stream_STREAM_STDOUT, 1 << 40, 0, nil},
	} {
		t.Run(name, func(t *testing.T) {
			stream, err := b.executor.ReadOutput(t.Context(), &executorv1.ReadOutputRequest{
				Name: "executions/e1", Stream: test.stream, Offset: test.offset, Limit: test.limit,
			})
			if err != nil {
				t.Fatal(err)
			}
			var got []byte
			for {
				resp, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if resp.GetOffset() != test.offset+int64(len(got)) || len(resp.GetData()) == 0 || len(resp.GetData()) > maxChunk {
					t.Fatalf("%d bytes at %d after %d", len(resp.GetData()), resp.GetOffset(), len(got))
				}
				got = append(got, resp.GetData()...)
			}
			if !bytes.Equal(got, test.want) {
				t.Errorf("%d bytes, want %d", len(got), len(test.want))
			}
		})
	}
	stream, err := b.executor.ReadOutput(t.Context(), &executorv1.ReadOutputRequest{Name: "executions/e2", Stream: 1})
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantError(t, err, codes.NotFound, "EXECUTION_NOT_FOUND")
}

// TestBrokenLog: what goes wrong in the middle of a stream is not taken for its end.
func TestBrokenLog(t *testing.T) {
	broken := &brokenWatcher{}
	sender := func(s source[execution.Event], send func(*executorv1.Event) error) *eventSender[execution.Event, *executorv1.Event] {
		return &eventSender[execution.Event, *executorv1.Event]{
			following: following[execution.Event, *executorv1.Event]{source: s, interval: time.Hour, convert: eventProto, send: send}, pace: newPace(),
		}
	}
	err := sender(broken, func(*executorv1.Event) error { return nil }).run(t.Context())
	if !errors.Is(err, errBroken) {
		t.Errorf("%v", err)
	}
	gone := errors.New("gone")
	flooding := &flood{}
	err = sender(flooding, func(*executorv1.Event) error { return gone }).run(t.Context())
	if !errors.Is(err, gone) || flooding.sequence != 1 {
		t.Errorf("%v after %d", err, flooding.sequence)
	}
}

var errBroken = errors.New("the disk is gone")

type brokenWatcher struct{ flood }

func (*brokenWatcher) Next(context.Context) (execution.Event, error) {
	return execution.Event{}, errBroken
}

// TestManyWatchers reads one log with many clients on one connection.
func TestManyWatchers(t *testing.T) {
	b := newBench(t)
	l := b.executions.add(execution.Execution{ID: "e1"})
	l.start()
	var watching sync.WaitGroup
	for range 100 {
		watching.Go(func() {
			stream, err := b.executor.WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{Name: "executions/e1"})
			if err != nil {
				t.Error(err)
				return
			}
			for sequence := uint64(1); ; sequence++ {
				resp, err := stream.Recv()
				if errors.Is(err, io.EOF) && sequence == 103 {
					return
				}
				if err != nil || resp.GetEvent().GetCursor().GetSequence() != sequence {
					t.Errorf("at %d: %v, %v", sequence, resp, err)
					return
				}
			}
		})
	}
	for i := range 100 {
		l.output("stdout", fmt.Sprint(i))
	}
	l.exit(0)
	watching.Wait()
	eventually(t, func() bool { return b.executions.openWatchers() == 0 })
}

func TestDeadlineOfTheCall(t *testing.T) {
	b := newBench(t)
	b.executions.add(execution.Execution{ID: "e1"}).start()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	stream, err := b.executor.WatchExecution(ctx, &executorv1.WatchExecutionRequest{Name: "executions/e1"})
	for err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.DeadlineExceeded {
		t.Error(err)
	}
	eventually(t, func() bool { return b.executions.openWatchers() == 0 })
}

// BenchmarkWatch streams the largest chunks to one client.
func BenchmarkWatch(b *testing.B) {
	fake := &floods{fakeExecutions: &fakeExecutions{}, size: maxChunk}
	server, conn := benchServer(b, fake)
	defer server.Stop()
	client := executorv1.NewExecutorServiceClient(conn)
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	stream, err := client.WatchExecution(ctx, &executorv1.WatchExecutionRequest{Name: "executions/e1"})
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(maxChunk)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := stream.Recv(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkGet is a unary call with all interceptors.
func BenchmarkGet(b *testing.B) {
	fake := &fakeExecutions{}
	fake.add(execution.Execution{ID: "e1"})
	server, conn := benchServer(b, fake)
	defer server.Stop()
	client := executorv1.NewExecutorServiceClient(conn)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := client.GetExecution(b.Context(), &executorv1.GetExecutionRequest{Name: "executions/e1"}); err != nil {
			b.Fatal(err)
		}
	}
}
