package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// through is a client behind a proxy, quick to notice that nothing comes.
func through(t *testing.T, p *proxy) *client.Client {
	t.Helper()
	c, err := client.Dial(client.Config{
		Address: p.address(), MaxOutage: 2 * time.Minute, HeartbeatInterval: time.Second,
		// As often as the server allows.
		DialOptions: []grpc.DialOption{grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 2 * time.Second})},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// A connection that breaks again and again, at any byte, costs time and nothing else.
func TestReconnectManyTimes(t *testing.T) {
	d := start(t)
	p := startProxy(t, d)
	c := through(t, p)
	const blocks = 2000
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: emit("cut", blocks, 0.002, 6)})
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var cutting sync.WaitGroup
	cuts := 0
	cutting.Go(func() {
		most := repetitions(t, 40)
		for cuts < most {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(rand.IntN(100)) * time.Millisecond):
				p.cut()
				cuts++
			}
		}
	})
	k := newChecker()
	err = k.follow(s)
	close(stop)
	cutting.Wait()
	if err != nil {
		t.Fatalf("after %d cuts: %v", cuts, err)
	}
	k.check(t, "cut", blocks, 6)
	if cuts < 5 {
		t.Errorf("the connection was cut %d times only: the test tests little", cuts)
	}
}

// A network that is slow, uneven and cuts everything into small pieces.
func TestSlowAndFragmentedNetwork(t *testing.T) {
	d := start(t)
	p := startProxy(t, d)
	p.set(func(p *proxy) { p.delay, p.piece = 2*time.Millisecond, 3000 })
	c := through(t, p)
	const blocks = 300
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: emit("slow", blocks, 0, 0)})
	if err != nil {
		t.Fatal(err)
	}
	k := newChecker()
	if err := k.follow(s); err != nil {
		t.Fatal(err)
	}
	k.check(t, "slow", blocks, 0)
}

// A cable that is cut tells nobody. The client notices by the heartbeats that do not
// come, and goes on when the cable is mended; the program does not care.
func TestBlackHole(t *testing.T) {
	d := start(t)
	p := startProxy(t, d)
	c := through(t, p)
	const blocks = 200
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: emit("hole", blocks, 0.02, 0)})
	if err != nil {
		t.Fatal(err)
	}
	k := newChecker()
	for k.stdout() == "" {
		e, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		k.take(e)
	}
	p.set(func(p *proxy) { p.hole = true })
	// What happens meanwhile is seen past the proxy.
	ended, err := d.dial().Wait(t.Context(), s.Name())
	if err != nil || ended.GetResult().GetReason() != executorv1.Reason_REASON_EXITED {
		t.Fatalf("%v, %v", ended.GetResult(), err)
	}
	p.set(func(p *proxy) { p.hole = false })
	if err := k.follow(s); err != nil {
		t.Fatal(err)
	}
	k.check(t, "hole", blocks, 0)
}

// A network that forgets idle connections, as NATs do: a long silence ends nothing.
func TestSilenceBehindANAT(t *testing.T) {
	d := start(t)
	p := startProxy(t, d)
	c := through(t, p)
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: bash("echo before; sleep 4; echo after")})
	if err != nil {
		t.Fatal(err)
	}
	k := newChecker()
	for k.stdout() == "" {
		e, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		k.take(e)
	}
	p.cut() // forgotten in the silence
	if err := k.follow(s); err != nil {
		t.Fatal(err)
	}
	k.wants(t, executorv1.Reason_REASON_EXITED)
	if k.stdout() != "before\nafter\n" {
		t.Errorf("%q", k.stdout())
	}
}

// A hundred watchers that come before, during and after a run, at any cursor, all get
// the same from there on.
func TestManyWatchersJoinAtAnyTime(t *testing.T) {
	d := start(t)
	c := d.dial()
	const blocks = 400
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: emit("join", blocks, 0.004, 2)})
	if err != nil {
		t.Fatal(err)
	}
	var cursors []*executorv1.Cursor
	var mu sync.Mutex
	var all sync.WaitGroup
	watch := func(i int) {
		time.Sleep(time.Duration(rand.IntN(3000)) * time.Millisecond)
		mu.Lock()
		var after *executorv1.Cursor
		if len(cursors) > 0 && i%3 != 0 {
			after = cursors[rand.IntN(len(cursors))]
		}
		mu.Unlock()
		w, err := c.Watch(t.Context(), s.Name(), after)
		if err != nil {
			t.Error(err)
			return
		}
		next := after.GetSequence() + 1
		for {
			e, err := w.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Errorf("watcher %d from %v: %v", i, after, err)
				return
			}
			if e.GetCursor().GetSequence() != next {
				t.Errorf("watcher %d: event %d, want %d", i, e.GetCursor().GetSequence(), next)
			}
			next++
		}
		if r := w.Result(); r.GetReason() != executorv1.Reason_REASON_EXITED || r.GetExitCode() != 2 || after == nil && !w.Whole() {
			t.Errorf("watcher %d: %v, whole %v", i, r, w.Whole())
		}
	}
	for i := range 100 {
		all.Go(func() { watch(i) })
	}
	k := newChecker()
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		k.take(e)
		mu.Lock()
		cursors = append(cursors, e.GetCursor())
		mu.Unlock()
	}
	k.check(t, "join", blocks, 2)
	all.Wait()
	// And one that is ahead of everything.
	future, err := c.Executor().WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{
		Name: s.Name(), After: &executorv1.Cursor{Epoch: k.cursor.GetEpoch(), Sequence: k.cursor.GetSequence() + 1},
	})
	if err == nil {
		_, err = future.Recv()
	}
	if status.Code(err) != codes.OutOfRange || client.Reason(err) != "CURSOR_IN_FUTURE" {
		t.Errorf("%v (%s)", err, client.Reason(err))
	}
}

// Messages that are too large, or are none, are refused and leave the connection as it
// was.
func TestBadMessages(t *testing.T) {
	d := start(t)
	conn, err := grpc.NewClient(d.address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	executor := executorv1.NewExecutorServiceClient(conn)
	_, err = executor.StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: bash(strings.Repeat("#", 5<<20))})
	if status.Code(err) != codes.ResourceExhausted && status.Code(err) != codes.InvalidArgument {
		t.Errorf("5 MiB: %v", err)
	}
	// Invalid UTF-8 in a string cannot be sent by Go's protobuf; its bytes can.
	raw := append([]byte{0x0a, 2}, 0xff, 0xfe) // field 1, a name
	err = conn.Invoke(t.Context(), executorv1.ExecutorService_GetExecution_FullMethodName, &raw, new([]byte), grpc.ForceCodec(rawCodec{}))
	if status.Code(err) != codes.InvalidArgument || client.Reason(err) == "" {
		t.Errorf("invalid UTF-8: %v (%s)", err, client.Reason(err))
	}
	if _, err := executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{}); err != nil {
		t.Errorf("the connection is of no more use: %v", err)
	}
	// Output that is no text at all comes as it is.
	k := execute(t, d.dial(), &executorv1.ExecuteRequest{Command: bash(`printf 'a\0b\xff\xfe\r\n'`)})
	if k.stdout() != "a\x00b\xff\xfe\r\n" {
		t.Errorf("%q", k.stdout())
	}
}

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (rawCodec) Name() string                       { return "proto" }

// One client that opens more streams than a connection may have, and resets them as fast
// as it can, keeps nobody else from being served, and costs bounded memory.
func TestStreamsWithoutEnd(t *testing.T) {
	d := start(t)
	c := d.dial()
	started, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: bash("sleep 60")})
	if err != nil {
		t.Fatal(err)
	}
	name := started.GetExecution().GetName()
	before := rss(t, d.process.Process.Pid)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			conn, err := grpc.NewClient(d.address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			abuser := executorv1.NewExecutorServiceClient(conn)
			for range 2500 {
				ctx, cancel := context.WithCancel(t.Context())
				_, _ = abuser.WatchExecution(ctx, &executorv1.WatchExecutionRequest{Name: name})
				cancel()
			}
		})
	}
	for i := range 20 { // others are served meanwhile
		k := execute(t, c, &executorv1.ExecuteRequest{Command: argv("/bin/echo", fmt.Sprint(i))})
		if k.stdout() != fmt.Sprintln(i) {
			t.Errorf("%q", k.stdout())
		}
	}
	all.Wait()
	if grown := rss(t, d.process.Process.Pid) - before; grown > 100<<20 {
		t.Errorf("10,000 streams that were reset cost %d MiB", grown>>20)
	}
	if _, err := c.Cancel(t.Context(), &executorv1.CancelExecutionRequest{Name: name, GracePeriod: durationpb.New(0)}); err != nil {
		t.Error(err)
	}
}
