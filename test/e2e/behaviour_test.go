package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func execute(t *testing.T, c *client.Client, r *executorv1.ExecuteRequest) *checker {
	t.Helper()
	s, err := c.Execute(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	k := newChecker()
	if err := k.follow(s); err != nil {
		t.Fatal(err)
	}
	if k.err != nil {
		t.Error(k.err)
	}
	return k
}

func (c *checker) stdout() string { return string(c.data[executorv1.Stream_STREAM_STDOUT]) }
func (c *checker) stderr() string { return string(c.data[executorv1.Stream_STREAM_STDERR]) }

func (c *checker) wants(t *testing.T, reason executorv1.Reason) {
	t.Helper()
	if c.result.GetReason() != reason {
		t.Errorf("reason %v, want %v: %v\nstderr: %s", c.result.GetReason(), reason, c.result, tail([]byte(c.stderr()), 2000))
	}
	if !c.result.GetTreeEmpty() {
		t.Error("the tree was not seen empty")
	}
}

func TestHello(t *testing.T) {
	d := start(t)
	k := execute(t, d.dial(), &executorv1.ExecuteRequest{Command: python(`print("Hello from sandbox")`)})
	k.wants(t, executorv1.Reason_REASON_EXITED)
	if k.stdout() != "Hello from sandbox\n" || k.result.ExitCode == nil || k.result.GetExitCode() != 0 || k.result.GetOutcome() != executorv1.Outcome_OUTCOME_SUCCESS {
		t.Errorf("stdout %q, result %v", k.stdout(), k.result)
	}
	times := k.result.GetTimes()
	last := times.GetQueued().AsTime()
	for i, at := range []time.Time{times.GetSandboxReady().AsTime(), times.GetStarted().AsTime(), times.GetFirstOutput().AsTime(), times.GetEnded().AsTime()} {
		if at.Before(last) {
			t.Errorf("stage %d is before the one before it: %v", i, times)
		}
		last = at
	}
	if u := k.result.GetUsage(); u.GetPeakMemoryBytes() == 0 || u.GetCpuUser().AsDuration()+u.GetCpuSystem().AsDuration() == 0 {
		t.Errorf("usage %v", u)
	}
}

func TestBytesComeApartAndExact(t *testing.T) {
	d := start(t)
	c := d.dial()
	for _, blocks := range []int{1, 100, 5000} {
		k := execute(t, c, &executorv1.ExecuteRequest{Command: emit("exact", blocks, 0, 7)})
		k.check(t, "exact", blocks, 7)
	}
}

func TestFirstByteComesBeforeTheEnd(t *testing.T) {
	d := start(t)
	s, err := d.dial().Execute(t.Context(), &executorv1.ExecuteRequest{Command: bash("echo ready; while [ ! -e /workspace/go ]; do sleep 0.05; done; echo done")})
	if err != nil {
		t.Fatal(err)
	}
	for {
		e, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if out := e.GetOutput(); out != nil {
			if string(out.GetData()) != "ready\n" {
				t.Fatalf("first output %q", out.GetData())
			}
			break
		}
	}
	// It is still running: nobody made the file.
	got, err := d.dial().Executor().GetExecution(t.Context(), &executorv1.GetExecutionRequest{Name: s.Name()})
	if err != nil || got.GetExecution().GetState() != executorv1.Execution_STATE_RUNNING {
		t.Fatalf("%v, %v", got, err)
	}
	if _, err := d.dial().Cancel(t.Context(), &executorv1.CancelExecutionRequest{Name: s.Name(), GracePeriod: durationpb.New(0)}); err != nil {
		t.Fatal(err)
	}
}

// A client that is cut off again and again goes on from its cursor.
func TestResumeFromEveryCursor(t *testing.T) {
	d := start(t)
	c := d.dial()
	const blocks = 400
	started, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: emit("resume", blocks, 0.001, 0)})
	if err != nil {
		t.Fatal(err)
	}
	name := started.GetExecution().GetName()
	k := newChecker()
	for cut := 1; k.result == nil; cut++ {
		ctx, cancel := context.WithCancel(t.Context())
		// The raw stream, so that it is this test that resumes and not the client.
		s, err := c.Executor().WatchExecution(ctx, &executorv1.WatchExecutionRequest{Name: name, After: k.cursor})
		if err != nil {
			t.Fatal(err)
		}
		for range cut % 23 {
			resp, err := s.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			k.take(resp.GetEvent())
		}
		cancel()
	}
	k.check(t, "resume", blocks, 0)
}

func TestWatchersDoNotTouchEachOther(t *testing.T) {
	d := start(t)
	c := d.dial()
	const blocks = 3000
	started, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: emit("watchers", blocks, 0, 3)})
	if err != nil {
		t.Fatal(err)
	}
	name := started.GetExecution().GetName()
	// One that never reads.
	stalled, err := c.Executor().WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for i := range 10 {
		all.Go(func() {
			own := d.client()
			defer own.Close()
			time.Sleep(time.Duration(i) * 30 * time.Millisecond) // some come when it has ended
			s, err := own.Watch(t.Context(), name, nil)
			if err != nil {
				t.Error(err)
				return
			}
			k := newChecker()
			for {
				e, err := s.Recv()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Error(err)
					return
				}
				k.take(e)
				if i%3 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
			k.check(t, "watchers", blocks, 3)
		})
	}
	ended, err := c.Wait(t.Context(), name)
	if err != nil || ended.GetState() != executorv1.Execution_STATE_ENDED {
		t.Fatalf("%v, %v", ended, err)
	}
	all.Wait()
	k := newChecker()
	for {
		resp, err := stalled.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		k.take(resp.GetEvent())
	}
	k.check(t, "watchers", blocks, 3)
}

// trees are programs that try to outlive their end.
func trees() map[string]string {
	return map[string]string{
		"ignores TERM":                 `trap '' TERM; echo ready; while :; do sleep 1000; done`,
		"double fork":                  `(sleep 1000 & ) & wait; echo ready; sleep 1000`,
		"setsid":                       `setsid sleep 1000 & setsid --fork bash -c 'trap "" TERM; sleep 1000'; echo ready; sleep 1000`,
		"stopped":                      `sleep 1000 & kill -STOP $!; echo ready; kill -STOP $$`,
		"a hundred, in a tree":         `for i in {1..10}; do (for j in {1..10}; do sleep 1000 & done; wait) & done; echo ready; wait`,
		"nohup and closed descriptors": `nohup setsid sleep 1000 >/dev/null 2>&1 </dev/null & echo ready; sleep 1000`,
	}
}

func TestTimeoutEndsTheTree(t *testing.T) {
	d := start(t)
	c := d.dial()
	for name, source := range trees() {
		t.Run(name, func(t *testing.T) {
			command := bash(source)
			command.Timeout, command.GracePeriod = durationpb.New(700*time.Millisecond), durationpb.New(200*time.Millisecond)
			k := execute(t, c, &executorv1.ExecuteRequest{Command: command})
			k.wants(t, executorv1.Reason_REASON_TIMED_OUT)
			if k.stdout() != "ready\n" {
				t.Errorf("stdout %q: what came before the end must be there", k.stdout())
			}
			if k.result.ExitCode != nil && k.result.GetOutcome() == executorv1.Outcome_OUTCOME_SUCCESS {
				t.Errorf("a timeout is no success: %v", k.result)
			}
		})
	}
}

func TestCancelEndsTheTree(t *testing.T) {
	d := start(t)
	c := d.dial()
	created, err := c.Sessions().CreateSession(t.Context(), &executorv1.CreateSessionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	session := created.GetSession().GetName()
	if _, err := c.Sessions().GetSession(t.Context(), &executorv1.GetSessionRequest{Name: session, Wait: durationpb.New(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	// In a session the sandbox stays, so only this command's tree must go.
	bystander, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Parent: session, Command: bash("echo here; sleep 1000")})
	if err != nil {
		t.Fatal(err)
	}
	for name, source := range trees() {
		t.Run(name, func(t *testing.T) {
			s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Parent: session, Command: bash(source)})
			if err != nil {
				t.Fatal(err)
			}
			k := newChecker()
			for k.stdout() != "ready\n" {
				e, err := s.Recv()
				if err != nil {
					t.Fatal(err)
				}
				k.take(e)
			}
			ended, err := c.Cancel(t.Context(), &executorv1.CancelExecutionRequest{
				Name: s.Name(), GracePeriod: durationpb.New(100 * time.Millisecond), Requester: "the test",
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := k.follow(s); err != nil {
				t.Fatal(err)
			}
			k.wants(t, executorv1.Reason_REASON_CANCELLED)
			if ended.GetState() != executorv1.Execution_STATE_ENDED || !strings.HasPrefix(ended.GetResult().GetCancelledBy(), "the test") {
				t.Errorf("cancel answered %v", ended)
			}
			left := execute(t, c, &executorv1.ExecuteRequest{Parent: session, Command: argv("ps", "-eo", "args")})
			if n := strings.Count(left.stdout(), "sleep 1000"); n != 2 { // the bystander's bash -c and sleep
				if strings.Contains(left.stdout(), "main.sh") && n == 1 {
					return // its bash runs a file, so only its sleep shows
				}
				t.Errorf("%d sleeps are left:\n%s", n, left.stdout())
			}
		})
	}
	if _, err := c.Sessions().TerminateSession(t.Context(), &executorv1.TerminateSessionRequest{Name: session}); err != nil {
		t.Fatal(err)
	}
	k := newChecker()
	if err := k.follow(bystander); err != nil {
		t.Fatal(err)
	}
	k.wants(t, executorv1.Reason_REASON_SESSION_ENDED)
}

// What a program leaves behind neither lives on nor delays its result.
func TestStraysDoNotDelayTheResult(t *testing.T) {
	d := start(t)
	for name, source := range map[string]string{
		"holds the pipe":     `setsid sleep 300 & echo bye`,
		"daemon":             `(setsid bash -c 'trap "" TERM HUP; sleep 300' &) ; echo bye`,
		"closed descriptors": `setsid sleep 300 >&- 2>&- & echo bye`,
	} {
		t.Run(name, func(t *testing.T) {
			k := execute(t, d.dial(), &executorv1.ExecuteRequest{Command: bash(source)})
			k.wants(t, executorv1.Reason_REASON_EXITED)
			if k.stdout() != "bye\n" || k.result.GetReapedProcesses() == 0 {
				t.Errorf("stdout %q, %v", k.stdout(), k.result)
			}
			if took := k.result.GetTimes().GetEnded().AsTime().Sub(k.result.GetTimes().GetStarted().AsTime()); took > 100*time.Second {
				t.Errorf("the result waited for the strays: %v", took)
			}
		})
	}
}

func TestMemoryLimit(t *testing.T) {
	needRoot(t)
	d := start(t)
	k := execute(t, d.dial(), &executorv1.ExecuteRequest{
		Command: python("print('before', flush=True)\nx = bytearray(1 << 30)\nprint('after')"), Limits: &executorv1.Limits{MemoryBytes: 64 << 20},
	})
	k.wants(t, executorv1.Reason_REASON_OOM_KILLED)
	evidence := k.result.GetEvidence()
	if k.stdout() != "before\n" || evidence["memory_limit_bytes"] != fmt.Sprint(64<<20) || evidence["oom_kills"] == "" || k.result.GetDetail() == "" {
		t.Errorf("stdout %q, %v", k.stdout(), k.result)
	}
	if peak := k.result.GetUsage().GetPeakMemoryBytes(); peak < 32<<20 || peak > 64<<20 {
		t.Errorf("peak memory %d of a limit of %d", peak, 64<<20)
	}
}

func TestForkBombIsContained(t *testing.T) {
	needRoot(t)
	d := start(t)
	c := d.dial()
	bomb := bash("f() { f | f & }; f; sleep 1000")
	bomb.Timeout, bomb.GracePeriod = durationpb.New(2*time.Second), durationpb.New(100*time.Millisecond)
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: bomb, Limits: &executorv1.Limits{Pids: 100}})
	if err != nil {
		t.Fatal(err)
	}
	// Meanwhile others start as ever.
	k := execute(t, c, &executorv1.ExecuteRequest{Command: argv("echo", "fine")})
	if k.stdout() != "fine\n" {
		t.Errorf("stdout beside a fork bomb: %q", k.stdout())
	}
	k = newChecker()
	if err := k.follow(s); err != nil {
		t.Fatal(err)
	}
	k.wants(t, executorv1.Reason_REASON_TIMED_OUT)
	if k.result.GetEvidence()["forks_refused"] == "" || k.result.GetReapedProcesses() == 0 {
		t.Errorf("%v", k.result)
	}
}

// Five gigabytes pass through while nobody keeps more than the policy says.
func TestFloodKeepsMemoryFlat(t *testing.T) {
	d := start(t)
	c := d.dial()
	const total, retained = 5_000_000_000, 16 << 20
	s, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{
		Command: argv("head", "-c", fmt.Sprint(total), "/dev/zero"), OutputPolicy: &executorv1.OutputPolicy{RetainedBytes: retained},
	})
	if err != nil {
		t.Fatal(err)
	}
	name := s.GetExecution().GetName()
	before := rss(t, d.process.Process.Pid)
	most, ended := before, make(chan struct{})
	var wait sync.WaitGroup
	wait.Go(func() {
		defer close(ended)
		if _, err := c.Wait(t.Context(), name); err != nil {
			t.Error(err)
		}
	})
	for running := true; running; {
		select {
		case <-ended:
			running = false
		case <-time.After(20 * time.Millisecond):
			most = max(most, rss(t, d.process.Process.Pid))
		}
	}
	wait.Wait()
	if grown := most - before; grown > 64<<20 {
		t.Errorf("executord grew by %d MiB", grown>>20)
	}
	k := newChecker()
	w, err := c.Watch(t.Context(), name, nil)
	if err != nil {
		t.Fatal(err)
	}
	kept, gaps := int64(0), 0
	for {
		e, err := w.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		kept += int64(len(e.GetOutput().GetData()))
		if e.GetGap().GetReason() == executorv1.Gap_REASON_RETENTION {
			gaps++
		}
		if e.GetResult() != nil {
			k.result = e.GetResult()
		}
	}
	k.wants(t, executorv1.Reason_REASON_EXITED)
	out := k.result.GetTotals()[0]
	if gaps != 1 || kept > retained || kept < retained/2 || out.GetSize() != total || out.GetDropped() != total-kept {
		t.Errorf("%d gaps, %d bytes kept, totals %v", gaps, kept, out)
	}
	// What is kept can be read, what is not is refused with where to go on.
	read, err := c.Executor().ReadOutput(t.Context(), &executorv1.ReadOutputRequest{Name: name, Stream: executorv1.Stream_STREAM_STDOUT})
	if err == nil {
		_, err = read.Recv()
	}
	if status.Code(err) != codes.OutOfRange || client.Reason(err) != "OUTPUT_DROPPED" || client.Metadata(err)["first_offset"] != fmt.Sprint(out.GetDropped()) {
		t.Errorf("reading what was dropped: %v %v", err, client.Metadata(err))
	}
}

func TestReadOutput(t *testing.T) {
	d := start(t)
	c := d.dial()
	k := execute(t, c, &executorv1.ExecuteRequest{Command: emit("read", 500, 0, 0)})
	list, err := c.Executor().ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{})
	if err != nil || len(list.GetExecutions()) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	name := list.GetExecutions()[0].GetName()
	want := k.data[executorv1.Stream_STREAM_STDERR]
	for _, r := range []struct{ offset, limit int64 }{{0, 0}, {1, 1}, {31743, 3}, {100_000, 200_000}, {int64(len(want)), 0}, {int64(len(want)) - 1, 100}} {
		s, err := c.Executor().ReadOutput(t.Context(), &executorv1.ReadOutputRequest{Name: name, Stream: executorv1.Stream_STREAM_STDERR, Offset: r.offset, Limit: r.limit})
		if err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		for {
			resp, err := s.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if resp.GetOffset() != r.offset+int64(got.Len()) {
				t.Errorf("offset %d after %d bytes from %d", resp.GetOffset(), got.Len(), r.offset)
			}
			got.Write(resp.GetData())
		}
		part := want[r.offset:]
		if r.limit > 0 {
			part = part[:min(r.limit, int64(len(part)))]
		}
		if sha256.Sum256(got.Bytes()) != sha256.Sum256(part) {
			t.Errorf("from %d, limit %d: %d bytes, want %d", r.offset, r.limit, got.Len(), len(part))
		}
	}
}
