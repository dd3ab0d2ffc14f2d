package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// repetitions of the fault runs: few here, many with `make robustness`.
func repetitions(t *testing.T, usual int) int {
	t.Helper()
	if n, err := strconv.Atoi(os.Getenv("EXECUTORD_ROBUSTNESS")); err == nil {
		return n
	}
	return usual
}

// kill -9 of executord, again and again, while a program writes: the client that
// watches gets every byte once, and so does one that comes afterwards.
func TestKillWhileRunning(t *testing.T) {
	d := start(t, "--on-stop", "terminate")
	c := d.dial()
	const blocks = 1500
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: emit("kill", blocks, 0.003, 5)})
	if err != nil {
		t.Fatal(err)
	}
	k := newChecker()
	var followed sync.WaitGroup
	var followErr error
	followed.Go(func() { followErr = k.follow(s) })
	d.running(s.Name()) // what has not begun when executord is killed does not begin
	for range repetitions(t, 6) {
		time.Sleep(time.Duration(rand.IntN(500)) * time.Millisecond)
		d.kill()
		time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
		d.up()
	}
	followed.Wait()
	if followErr != nil {
		t.Fatal(followErr)
	}
	k.check(t, "kill", blocks, 5)
	late, err := c.Watch(t.Context(), s.Name(), nil)
	if err != nil {
		t.Fatal(err)
	}
	k = newChecker()
	if err := k.follow(late); err != nil {
		t.Fatal(err)
	}
	k.check(t, "kill", blocks, 5)
}

// kill -9 at random moments while executions are started, cancelled and end. Nothing
// stays unfinished, nothing is left, and each tells the truth about its end.
func TestKillAtAnyMoment(t *testing.T) {
	d := start(t)
	for round := range repetitions(t, 4) {
		ctx, cancel := context.WithCancel(t.Context())
		var clients sync.WaitGroup
		var mu sync.Mutex
		names := make(map[string]int)
		for i := range 4 {
			clients.Go(func() {
				c := d.client()
				defer c.Close()
				for n := 0; ctx.Err() == nil; n++ {
					resp, err := c.Executor().StartExecution(ctx, &executorv1.StartExecutionRequest{Command: emit(fmt.Sprint(round, i, n), n%7*3, 0, n%5)})
					if err != nil {
						continue // executord is away
					}
					mu.Lock()
					names[resp.GetExecution().GetName()] = n
					mu.Unlock()
					if n%6 == 5 {
						_, _ = c.Executor().CancelExecution(ctx, &executorv1.CancelExecutionRequest{Name: resp.GetExecution().GetName(), GracePeriod: durationpb.New(0)})
					}
				}
			})
		}
		time.Sleep(200*time.Millisecond + time.Duration(rand.IntN(600))*time.Millisecond)
		d.kill()
		cancel()
		clients.Wait()
		d.up()
		c := d.client()
		for name, n := range names {
			ended, err := c.Wait(t.Context(), name)
			if err != nil {
				t.Fatalf("%s, which was acknowledged: %v", name, err)
			}
			w, err := c.Watch(t.Context(), name, nil)
			if err != nil {
				t.Fatal(err)
			}
			k := newChecker()
			if err := k.follow(w); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if k.err != nil || k.result.GetReason() != ended.GetResult().GetReason() {
				t.Errorf("%s: %v; the log says %v, the record %v", name, k.err, k.result.GetReason(), ended.GetResult().GetReason())
			}
			switch r := k.result; r.GetReason() {
			case executorv1.Reason_REASON_EXITED:
				if int(r.GetExitCode()) != n%5 || len(k.stdout()) != n%7*3*1024 {
					t.Errorf("%s: exit code %d and %d bytes, want %d and %d", name, r.GetExitCode(), len(k.stdout()), n%5, n%7*3*1024)
				}
			case executorv1.Reason_REASON_CANCELLED:
				if n%6 != 5 {
					t.Errorf("%s was not cancelled: %v", name, r)
				}
			case executorv1.Reason_REASON_START_FAILED, executorv1.Reason_REASON_SANDBOX_LOST:
				if r.ExitCode != nil {
					t.Errorf("%s: an exit code was invented: %v", name, r)
				}
			default:
				t.Errorf("%s: %v", name, r)
			}
		}
		unfinished := 0
		for token := ""; ; {
			page, err := c.Executor().ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{PageToken: token, PageSize: 100})
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range page.GetExecutions() {
				if e.GetState() != executorv1.Execution_STATE_ENDED {
					if _, err := c.Wait(t.Context(), e.GetName()); err != nil {
						unfinished++
					}
				}
			}
			if token = page.GetNextPageToken(); token == "" {
				break
			}
		}
		if unfinished > 0 {
			t.Errorf("%d executions did not end", unfinished)
		}
		waitNoSandboxes(t, d)
		c.Close()
		if len(names) == 0 {
			t.Error("nothing was started: the test tests nothing")
		}
	}
}

// waitNoSandboxes waits until no sandbox has a directory but those that the pool has ready.
func waitNoSandboxes(t *testing.T, d *daemon) {
	t.Helper()
	c := d.client()
	defer c.Close()
	for range 200 {
		if len(d.sandboxes()) == int(d.info(c).GetWarmPool().GetReady()) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("sandboxes are left: %v, and ready are %v", d.sandboxes(), d.info(c).GetWarmPool())
}

// A session lives on over a restart, with its files and what runs in it.
func TestKillKeepsSessions(t *testing.T) {
	d := start(t)
	c := d.dial()
	created, err := c.Sessions().CreateSession(t.Context(), &executorv1.CreateSessionRequest{Labels: map[string]string{"team": "a"}})
	if err != nil {
		t.Fatal(err)
	}
	session := created.GetSession().GetName()
	if _, err := c.Sessions().GetSession(t.Context(), &executorv1.GetSessionRequest{Name: session, Wait: durationpb.New(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	execute(t, c, &executorv1.ExecuteRequest{Parent: session, Command: bash("echo kept > /workspace/file")})
	running, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Parent: session, Command: bash("echo runs; while [ ! -e /workspace/go ]; do sleep 0.05; done; echo went on")})
	if err != nil {
		t.Fatal(err)
	}
	before := newChecker()
	for before.stdout() == "" { // one that has not been started is not taken up
		e, err := running.Recv()
		if err != nil {
			t.Fatal(err)
		}
		before.take(e)
	}
	d.kill()
	d.up()
	k := execute(t, c, &executorv1.ExecuteRequest{Parent: session, Command: bash("cat /workspace/file; touch /workspace/go")})
	if k.stdout() != "kept\n" {
		t.Errorf("stdout %q", k.stdout())
	}
	k = before
	if err := k.follow(running); err != nil {
		t.Fatal(err)
	}
	k.wants(t, executorv1.Reason_REASON_EXITED)
	if k.stdout() != "runs\nwent on\n" {
		t.Errorf("stdout %q", k.stdout())
	}
	ended, err := c.Sessions().TerminateSession(t.Context(), &executorv1.TerminateSessionRequest{Name: session})
	if err != nil || ended.GetSession().GetState() != executorv1.Session_STATE_TERMINATED || ended.GetSession().GetLabels()["team"] != "a" {
		t.Errorf("%v, %v", ended, err)
	}
	waitNoSandboxes(t, d)
}

// A sandbox that dies while executord is away is told as lost, without an exit code.
func TestKillOfEverything(t *testing.T) {
	needRoot(t)
	d := start(t)
	c := d.dial()
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: bash("echo before; sleep 1000")})
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
	d.kill()
	for _, p := range traces() {
		var pid int
		if _, err := fmt.Sscanf(p, "/proc/%d executor-guest", &pid); err == nil && inState(pid, d.dir) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	d.up()
	if err := k.follow(s); err != nil {
		t.Fatal(err)
	}
	if k.err != nil || k.result.GetReason() != executorv1.Reason_REASON_SANDBOX_LOST || k.result.ExitCode != nil || k.stdout() != "before\n" {
		t.Errorf("%v; %q; %v", k.err, k.stdout(), k.result)
	}
}

// inState says whether a guest belongs to a daemon: its layers show the directory.
func inState(pid int, dir string) bool {
	records, _ := os.ReadDir(dir + "/state/local/sandboxes")
	for _, r := range records {
		text, _ := os.ReadFile(dir + "/state/local/sandboxes/" + r.Name() + "/sandbox.json")
		if strings.Contains(string(text), fmt.Sprintf(`"pid":%d,`, pid)) {
			return true
		}
	}
	return false
}

// SIGTERM: new work is refused, watchers are told why, the exit code is 0, and what
// runs goes on in its sandbox for the next executord.
func TestStopTellsWatchers(t *testing.T) {
	d := start(t, "--on-stop", "keep", "--drain-timeout", "300ms")
	c := d.dial()
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: bash("echo one; while [ ! -e /workspace/go ]; do sleep 0.05; done")})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := c.Executor().WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{Name: s.Name()})
	if err != nil {
		t.Fatal(err)
	}
	var told error
	var watching sync.WaitGroup
	seen := make(chan struct{})
	watching.Go(func() {
		for {
			resp, err := raw.Recv()
			if err != nil {
				told = err
				return
			}
			if resp.GetEvent().GetOutput() != nil {
				close(seen)
			}
		}
	})
	<-seen
	if code := d.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d", code)
	}
	watching.Wait()
	if errors.Is(told, io.EOF) || status.Code(told) != codes.Unavailable || client.Reason(told) != "SERVER_DRAINING" {
		t.Errorf("the watcher was told %v (%s)", told, client.Reason(told))
	}
	d.up()
	if _, err := c.Cancel(t.Context(), &executorv1.CancelExecutionRequest{Name: s.Name(), GracePeriod: durationpb.New(0)}); err != nil {
		t.Fatal(err)
	}
	k := newChecker()
	if err := k.follow(s); err != nil { // the client rode it out
		t.Fatal(err)
	}
	k.wants(t, executorv1.Reason_REASON_CANCELLED)
	if k.stdout() != "one\n" {
		t.Errorf("stdout %q", k.stdout())
	}
}

// With --on-stop terminate nothing outlives executord, and results say so.
func TestStopCanTerminate(t *testing.T) {
	d := start(t, "--drain-timeout", "200ms")
	c := d.dial()
	command := bash("trap '' TERM; echo one; while :; do sleep 0.1; done")
	command.GracePeriod = durationpb.New(100 * time.Millisecond)
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: command})
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
	if code := d.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d", code)
	}
	d.up()
	if err := k.follow(s); err != nil {
		t.Fatal(err)
	}
	k.wants(t, executorv1.Reason_REASON_SERVER_STOPPED)
}

func TestOneDaemonPerState(t *testing.T) {
	d := start(t)
	second := &daemon{t: t, dir: d.dir, log: d.log}
	out, code := second.once("serve", "--listen", "unix:"+d.dir+"/other", "--state-dir", d.dir+"/state")
	if code == 0 || !strings.Contains(out, "in use by another executord") {
		t.Errorf("exit code %d: %s", code, out)
	}
}
