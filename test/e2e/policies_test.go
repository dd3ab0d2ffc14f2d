package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func cancelDetached(grace time.Duration) *executorv1.DetachPolicy {
	return &executorv1.DetachPolicy{Mode: executorv1.DetachPolicy_MODE_CANCEL, Grace: durationpb.New(grace)}
}

// What is idle is ended, what works or speaks is not, also while executord is away.
func TestIdleTimeout(t *testing.T) {
	d := start(t)
	c := d.dial()
	_, errs, code := d.ctl("run", "--idle-timeout", "1500ms", "--lang", "bash", "while :; do sleep 0.3; done")
	if code != 124 || !strings.Contains(errs, "idle for too long") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	out, errs, code := d.ctl("run", "--idle-timeout", "1s", "--lang", "bash", "timeout 3 bash -c 'while :; do :; done'; echo worked")
	if code != 0 || out != "worked\n" {
		t.Errorf("exit code %d: %q %s", code, out, errs)
	}
	silent := argv("sleep", "600")
	silent.IdleTimeout = durationpb.New(5 * time.Second)
	started, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: silent})
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	time.Sleep(3 * time.Second) // by then it is noted since when it runs
	d.kill()
	time.Sleep(5 * time.Second)
	back := time.Now()
	d.up()
	ended, err := c.Wait(t.Context(), started.GetExecution().GetName())
	if err != nil {
		t.Fatal(err)
	}
	res := ended.GetResult()
	if res.GetReason() != executorv1.Reason_REASON_IDLE_TIMED_OUT || res.GetEvidence()["idle_timeout_ms"] != "5000" || !res.GetTreeEmpty() {
		t.Errorf("%v", res)
	}
	if at := res.GetTimes().GetEnded().AsTime(); !at.Before(back) || at.Sub(begin) < 5*time.Second {
		t.Errorf("it was ended %v after its start; executord came back %v after it", at.Sub(begin), back.Sub(begin))
	}
}

// A warning comes before the deadline, once, also over kill -9.
func TestDeadlineWarning(t *testing.T) {
	d := start(t)
	c := d.dial()
	command := argv("sleep", "600")
	command.Timeout = durationpb.New(10 * time.Second)
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: command})
	if err != nil {
		t.Fatal(err)
	}
	var warnings []*executorv1.Event
	for {
		e, err := s.Recv()
		if err != nil {
			break
		}
		if e.GetDeadlineWarning() != nil {
			warnings = append(warnings, e)
			d.kill()
			d.up()
		}
	}
	if s.Result().GetReason() != executorv1.Reason_REASON_TIMED_OUT || len(warnings) != 1 {
		t.Fatalf("%v, warnings %v", s.Result(), warnings)
	}
	w := warnings[0].GetDeadlineWarning()
	if w.GetDeadline() != executorv1.DeadlineWarning_DEADLINE_TIMEOUT || !warnings[0].GetEventTime().AsTime().Before(w.GetExpireTime().AsTime()) {
		t.Errorf("%v", warnings)
	}
}

// Fault case 16: a flood ends at the limit, everything up to it is kept, what is lost is
// counted; or it waits for who reads it.
func TestOutputPolicies(t *testing.T) {
	d := start(t)
	c := d.dial()
	const limit = 4 << 20
	flood := bash("trap 'exit 7' TERM; while :; do head -c 100000 /dev/zero; done")
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{
		Command: flood, OutputPolicy: &executorv1.OutputPolicy{RetainedBytes: limit, OnLimit: executorv1.OutputPolicy_ON_LIMIT_KILL},
	})
	if err != nil {
		t.Fatal(err)
	}
	k := newChecker()
	if err := k.follow(s); err != nil {
		t.Fatal(err)
	}
	n := int64(len(k.data[executorv1.Stream_STREAM_STDOUT]))
	if k.err != nil || len(k.gaps) > 0 || k.result.GetReason() != executorv1.Reason_REASON_OUTPUT_LIMIT || !k.result.GetTreeEmpty() {
		t.Errorf("%v, gaps %v, %v", k.err, k.gaps, k.result)
	}
	if n > limit || n < limit-limit/20 || k.result.GetTotals()[0].GetSize() != n {
		t.Errorf("%d bytes kept, totals %v", n, k.result.GetTotals())
	}
	if e := k.result.GetEvidence(); e["output_limit_bytes"] != strconv.Itoa(limit) || e["discarded_bytes"] == "" || e["discarded_bytes"] == "0" {
		t.Errorf("%v", e)
	}

	// It waits for nobody, until somebody comes and reads; then nothing is missing.
	const blocks = 4000 // 4 MB on either stream, four times what the log may have
	started, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{
		Command: emit("block", blocks, 0, 3), OutputPolicy: &executorv1.OutputPolicy{RetainedBytes: 1 << 20, OnLimit: executorv1.OutputPolicy_ON_LIMIT_BLOCK},
	})
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	name := started.GetExecution().GetName()
	got, err := c.Executor().GetExecution(t.Context(), &executorv1.GetExecutionRequest{Name: name})
	if err != nil || got.GetExecution().GetState() != executorv1.Execution_STATE_RUNNING {
		t.Fatalf("%v, %v: it did not wait", got, err)
	}
	d.kill() // it waits on
	d.up()
	w, err := c.Watch(t.Context(), name, nil)
	if err != nil {
		t.Fatal(err)
	}
	k = newChecker()
	if err := k.follow(w); err != nil {
		t.Fatal(err)
	}
	k.check(t, "block", blocks, 3)

	// One that nobody reads still ends by its timeout.
	waits := emit("timeout", blocks, 0, 0)
	waits.Timeout, waits.GracePeriod = durationpb.New(2*time.Second), durationpb.New(0)
	started, err = c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{
		Command: waits, OutputPolicy: &executorv1.OutputPolicy{RetainedBytes: 1 << 20, OnLimit: executorv1.OutputPolicy_ON_LIMIT_BLOCK},
	})
	if err != nil {
		t.Fatal(err)
	}
	ended, err := c.Wait(t.Context(), started.GetExecution().GetName())
	if err != nil || ended.GetResult().GetReason() != executorv1.Reason_REASON_TIMED_OUT || !ended.GetResult().GetTreeEmpty() {
		t.Errorf("%v, %v", ended, err)
	}
}

// What nobody watches any more ends, if that was asked for.
func TestDetachPolicy(t *testing.T) {
	d := start(t)
	c := d.dial()
	ctx, leave := context.WithCancel(t.Context())
	s, err := c.Execute(ctx, &executorv1.ExecuteRequest{Command: bash("echo here; sleep 600"), DetachPolicy: cancelDetached(time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	for {
		e, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if e.GetOutput() != nil {
			break
		}
	}
	name := s.Name()
	time.Sleep(2 * time.Second) // longer than the grace: it is being watched
	got, err := c.Executor().GetExecution(t.Context(), &executorv1.GetExecutionRequest{Name: name})
	if err != nil || got.GetExecution().GetState() != executorv1.Execution_STATE_RUNNING {
		t.Fatalf("%v, %v", got, err)
	}
	leave()
	s.Close()
	ended, err := c.Wait(t.Context(), name)
	if err != nil || ended.GetResult().GetReason() != executorv1.Reason_REASON_ABANDONED || ended.GetResult().GetOutcome() != executorv1.Outcome_OUTCOME_CANCELLED {
		t.Errorf("%v, %v", ended, err)
	}
	// Nobody ever comes; and one that is kept.
	out, errs, code := d.ctl("run", "--detach", "--detach-policy", "cancel", "--detach-grace", "0", "--", "sleep", "600")
	if code != 0 {
		t.Fatal(errs)
	}
	if ended, err = c.Wait(t.Context(), strings.TrimSpace(out)); err != nil || ended.GetResult().GetReason() != executorv1.Reason_REASON_ABANDONED {
		t.Errorf("%v, %v", ended, err)
	}
	out, errs, code = d.ctl("run", "--detach", "--", "sleep", "2")
	if code != 0 {
		t.Fatal(errs)
	}
	if ended, err = c.Wait(t.Context(), strings.TrimSpace(out)); err != nil || ended.GetResult().GetReason() != executorv1.Reason_REASON_EXITED {
		t.Errorf("%v, %v", ended, err)
	}
}

// The oldest go when there is more than may be kept, and that is logged and counted.
func TestRetention(t *testing.T) {
	const limit = 8 << 20
	d := start(t, "--retention-max-total-bytes", strconv.Itoa(limit))
	c := d.dial()
	var names []string
	for range 6 {
		s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: bash("head -c 2000000 /dev/zero")})
		if err != nil {
			t.Fatal(err)
		}
		k := newChecker()
		if err := k.follow(s); err != nil {
			t.Fatal(err)
		}
		names = append(names, s.Name())
	}
	var info *executorv1.GetServerInfoResponse
	for range 100 {
		var err error
		if info, err = c.Admin().GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{}); err != nil {
			t.Fatal(err)
		}
		if info.GetStoredBytes() <= limit {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if info.GetStoredBytes() > limit || info.GetStoredExecutions() < 3 || info.GetStoredExecutions() > 4 || info.GetFreeBytes() <= 0 {
		t.Errorf("%v", info)
	}
	if _, err := c.Executor().GetExecution(t.Context(), &executorv1.GetExecutionRequest{Name: names[0]}); status.Code(err) != codes.NotFound {
		t.Errorf("the oldest: %v", err)
	}
	if _, err := c.Executor().GetExecution(t.Context(), &executorv1.GetExecutionRequest{Name: names[5]}); err != nil {
		t.Errorf("the newest: %v", err)
	}
	text, err := os.ReadFile(filepath.Join(d.dir, "log"))
	if err != nil || !strings.Contains(string(text), "removed ended executions with their logs") {
		t.Errorf("%v; nothing is logged about what was removed", err)
	}
	// Counted the same after kill -9.
	d.kill()
	d.up()
	again, err := c.Admin().GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{})
	if err != nil || again.GetStoredBytes() != info.GetStoredBytes() || again.GetStoredExecutions() != info.GetStoredExecutions() {
		t.Errorf("%v, then %v", info, again)
	}
}

// onTmpfs puts the state directory of a daemon on a file system of a size.
func onTmpfs(t *testing.T, d *daemon, size string) (state string) {
	t.Helper()
	needRoot(t)
	d.stop(syscall.SIGTERM)
	state = filepath.Join(d.dir, "state")
	if err := errors.Join(os.RemoveAll(state), os.Mkdir(state, 0o700), unix.Mount("tmpfs", state, "tmpfs", 0, "mode=700,size="+size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.stop(syscall.SIGTERM)
		if err := unix.Unmount(state, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	d.up()
	return state
}

// ballast takes room until so much is left.
func ballast(t *testing.T, state string, leave int64) (free func()) {
	t.Helper()
	file := filepath.Join(state, "ballast")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	piece := make([]byte, 1<<20)
	for {
		var stat unix.Statfs_t
		if err := unix.Statfs(state, &stat); err != nil {
			t.Fatal(err)
		}
		left := int64(stat.Bavail)*stat.Bsize - leave
		if left <= 0 {
			break
		}
		if _, err := f.Write(piece[:min(left, int64(len(piece)))]); err != nil && !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	return func() {
		if err := os.Remove(file); err != nil {
			t.Error(err)
		}
	}
}

// Fault case 43: a full disk refuses new work and harms nothing that runs, and all is
// well by itself when there is room again.
func TestDiskFull(t *testing.T) {
	needRoot(t)
	d := start(t)
	state := onTmpfs(t, d, "200m")
	c := d.dial()
	conn, err := grpc.NewClient(d.address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const blocks = 1500
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: emit("disk", blocks, 0.004, 6)})
	if err != nil {
		t.Fatal(err)
	}
	followed := make(chan error, 1)
	k := newChecker()
	go func() { followed <- k.follow(s) }()
	time.Sleep(time.Second)

	free := ballast(t, state, 32<<20) // below the floor: new work is refused, the rest has room
	refused := func(what string, err error) {
		t.Helper()
		var retry *errdetails.RetryInfo
		for _, detail := range status.Convert(err).Details() {
			if r, ok := detail.(*errdetails.RetryInfo); ok {
				retry = r
			}
		}
		if status.Code(err) != codes.ResourceExhausted || client.Reason(err) != "DISK_FULL" || retry.GetRetryDelay().AsDuration() <= 0 {
			t.Errorf("%s: %v, retry %v", what, err, retry)
		}
	}
	time.Sleep(1100 * time.Millisecond) // an answer of the kernel is good for a second
	for range 3 {
		_, err := c.Executor().StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: argv("true")})
		refused("start", err)
		_, err = c.Sessions().CreateSession(t.Context(), &executorv1.CreateSessionRequest{})
		refused("session", err)
	}
	info, err := c.Admin().GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{})
	if err != nil || !info.GetDiskFull() || info.GetFreeBytes() > 40<<20 {
		t.Errorf("%v, %v", info, err)
	}
	health, err := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil || health.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Errorf("%v, %v", health, err)
	}
	free()
	free = ballast(t, state, 0) // and to the last byte: what runs has to wait
	time.Sleep(2 * time.Second)
	free()
	if err := <-followed; err != nil {
		t.Fatal(err)
	}
	k.check(t, "disk", blocks, 6)
	time.Sleep(1100 * time.Millisecond)
	if out, errs, code := d.ctl("run", `print("well again")`); code != 0 || out != "well again\n" {
		t.Errorf("%q %s (%d)", out, errs, code)
	}
}

// Fault case 25: whenever the time is up, at the start, in the middle or while what was
// told to end takes its time, the end is a time-out and nothing is left.
func TestTimeoutAtAnyMoment(t *testing.T) {
	d := start(t)
	c := d.dial()
	for _, program := range []string{
		"sleep 600",
		"trap '' TERM; setsid sleep 600 & sleep 600",
		"trap 'sleep 0.3; exit 0' TERM; while :; do sleep 0.05; done",
	} {
		for _, timeout := range []time.Duration{time.Millisecond, 5 * time.Millisecond, 50 * time.Millisecond, 400 * time.Millisecond} {
			command := bash(program)
			command.Timeout, command.GracePeriod = durationpb.New(timeout), durationpb.New(100*time.Millisecond)
			s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: command})
			if err != nil {
				t.Fatal(err)
			}
			k := newChecker()
			if err := k.follow(s); err != nil {
				t.Fatal(err)
			}
			if r := k.result; r.GetReason() != executorv1.Reason_REASON_TIMED_OUT || !r.GetTreeEmpty() || k.err != nil {
				t.Errorf("%q after %v: %v, %v", program, timeout, r, k.err)
			}
		}
	}
}

// A directory that is not there is no program that is not there.
func TestMissingWorkingDirectory(t *testing.T) {
	d := start(t)
	for _, dir := range []string{"/no/such", "/etc/passwd"} {
		_, errs, code := d.ctl("run", "--workdir", dir, "print(1)")
		if code != 126 || !strings.Contains(errs, fmt.Sprintf("working directory %q", dir)) {
			t.Errorf("exit code %d: %s", code, errs)
		}
	}
	if _, _, code := d.ctl("run", "--", "/no/such/program"); code != 127 {
		t.Errorf("exit code %d", code)
	}
}
