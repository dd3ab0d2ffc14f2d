package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// kill -9 with fifty sandboxes at work: all are followed on, each to its own end.
func TestKillWithFiftySandboxes(t *testing.T) {
	needRoot(t)
	d := start(t)
	c := d.dial()
	const n = 50
	checkers, streams := make([]*checker, n), make([]*client.Stream, n)
	for i := range n {
		s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{
			Command: bash(fmt.Sprintf("echo %d begins; while [ ! -e /workspace/go ]; do i=$((i+1)); [ $i -gt 40 ] && break; sleep 0.25; done; echo %d ends; exit %d", i, i, i)),
		})
		if err != nil {
			t.Fatal(err)
		}
		checkers[i], streams[i] = newChecker(), s
		for checkers[i].stdout() == "" {
			e, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			checkers[i].take(e)
		}
	}
	d.kill()
	d.up()
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			k := checkers[i]
			if err := k.follow(streams[i]); err != nil {
				t.Errorf("%d: %v", i, err)
				return
			}
			if want := fmt.Sprintf("%d begins\n%d ends\n", i, i); k.err != nil || k.stdout() != want || k.result.GetReason() != executorv1.Reason_REASON_EXITED || int(k.result.GetExitCode()) != i {
				t.Errorf("%d: %v, %q, %v", i, k.err, k.stdout(), k.result)
			}
		})
	}
	all.Wait()
	waitNoSandboxes(t, d)
}

// SIGTERM while many start things: new work is refused with a reason, what runs is given
// time, health says so, and the exit code is 0.
func TestStopUnderLoad(t *testing.T) {
	d := start(t, "--on-stop", "terminate", "--drain-timeout", "60s")
	c := d.dial()
	conn, err := grpc.NewClient(d.address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	health := healthpb.NewHealthClient(conn)
	if resp, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil || resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", resp, err)
	}
	// Something that the stop has to wait for.
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: bash("echo runs; sleep 1000")})
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
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var load sync.WaitGroup
	var mu sync.Mutex
	reasons := make(map[string]int)
	for range 4 {
		load.Go(func() {
			own := d.client()
			defer own.Close()
			for ctx.Err() == nil {
				_, err := own.Executor().StartExecution(ctx, &executorv1.StartExecutionRequest{Command: argv("/bin/true")})
				mu.Lock()
				switch {
				case err == nil:
					reasons["started"]++
				case client.Reason(err) != "":
					reasons[client.Reason(err)]++
				case status.Code(err) == codes.Unavailable:
					reasons["gone"]++
				case ctx.Err() == nil:
					t.Errorf("without a reason: %v", err)
				}
				mu.Unlock()
			}
		})
	}
	count := func(reason string) int {
		mu.Lock()
		defer mu.Unlock()
		return reasons[reason]
	}
	for range 200 {
		if count("started") > 3 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err := d.process.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for range 200 {
		if count("SERVER_DRAINING") > 0 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if resp, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil || resp.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health: %v, %v", resp, err)
	}
	// What runs can still be followed, and ended.
	if _, err := c.Cancel(t.Context(), &executorv1.CancelExecutionRequest{Name: s.Name(), GracePeriod: durationpb.New(0)}); err != nil {
		t.Error(err)
	}
	if err := k.follow(s); err != nil {
		t.Error(err)
	}
	k.wants(t, executorv1.Reason_REASON_CANCELLED)
	<-d.done
	if code := d.process.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	cancel()
	load.Wait()
	if count("started") == 0 || count("SERVER_DRAINING") == 0 {
		t.Errorf("the test tests nothing: %v", reasons)
	}
}

// A second SIGTERM does not wait. What runs is taken up by the next executord.
func TestStopTwice(t *testing.T) {
	d := start(t, "--drain-timeout", "300s")
	c := d.dial()
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: bash("echo runs; sleep 1; echo ends")})
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
	if err := d.process.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	if code := d.stop(syscall.SIGTERM); code != 128+int(syscall.SIGTERM) {
		t.Errorf("exit code %d", code)
	}
	d.up()
	if err := k.follow(s); err != nil {
		t.Fatal(err)
	}
	k.wants(t, executorv1.Reason_REASON_EXITED)
	if k.stdout() != "runs\nends\n" {
		t.Errorf("%q", k.stdout())
	}
}

// A state that cannot be trusted is refused, with a message that says what to do, and is
// left as it is.
func TestBadStateIsRefused(t *testing.T) {
	prepare := func(t *testing.T) *daemon {
		d := start(t)
		execute(t, d.dial(), &executorv1.ExecuteRequest{Command: argv("/bin/true")})
		if code := d.stop(syscall.SIGTERM); code != 0 {
			t.Fatalf("exit code %d", code)
		}
		return d
	}
	damage := func(t *testing.T, d *daemon, at int64, with []byte) string {
		t.Helper()
		file := filepath.Join(d.dir, "state/executord.db")
		f, err := os.OpenFile(file, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(with, at); err != nil {
			t.Fatal(err)
		}
		return file
	}
	for name, test := range map[string]struct {
		at   int64
		with []byte
		want string
	}{
		"not a database":     {0, bytes.Repeat([]byte{0x5a}, 100), "is damaged"},
		"pages overwritten":  {4096, bytes.Repeat([]byte{0x5a}, 8192), "is damaged"},
		"of another program": {68, []byte{1, 2, 3, 4}, "database of another program"},
	} {
		t.Run(name, func(t *testing.T) {
			d := prepare(t)
			file := damage(t, d, test.at, test.with)
			before, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			out, code := d.once("serve", "--listen", "unix:"+d.dir+"/other", "--state-dir", d.dir+"/state")
			if code == 0 || !strings.Contains(out, test.want) || strings.Contains(out, "goroutine") {
				t.Errorf("exit code %d: %s", code, out)
			}
			after, err := os.ReadFile(file)
			if err != nil || !bytes.Equal(before, after) {
				t.Error("the file was changed")
			}
		})
	}
}

// With hardly any descriptors left executord refuses what it cannot do, keeps what it
// has, and goes on when there are some again.
func TestFewDescriptors(t *testing.T) {
	d := start(t)
	c := d.dial()
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: bash("echo runs; while [ ! -e /workspace/go ]; do i=$((i+1)); [ $i -gt 200 ] && break; sleep 0.1; done; echo ends")})
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
	pid := d.process.Process.Pid
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	var usual unix.Rlimit
	few := unix.Rlimit{Cur: uint64(len(entries) + 3), Max: uint64(len(entries) + 3)}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &usual); err != nil {
		t.Fatal(err)
	}
	few.Max = usual.Max
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &few, nil); err != nil {
		t.Fatal(err)
	}
	failed := 0
	for range 10 {
		r, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: argv("/bin/echo", "x")})
		if err != nil {
			failed++
			if client.Reason(err) == "" {
				t.Errorf("without a reason: %v", err)
			}
			continue
		}
		other := newChecker()
		if err := other.follow(r); err != nil {
			t.Fatal(err)
		}
		if other.result.GetReason() != executorv1.Reason_REASON_EXITED {
			failed++
			if other.result.GetReason() != executorv1.Reason_REASON_START_FAILED {
				t.Errorf("%v", other.result)
			}
		}
	}
	if failed == 0 {
		t.Error("everything worked: the test tests nothing")
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &usual, nil); err != nil {
		t.Fatal(err)
	}
	after := execute(t, c, &executorv1.ExecuteRequest{Command: argv("/bin/echo", "again")})
	if after.stdout() != "again\n" {
		t.Errorf("%q, %v", after.stdout(), after.result)
	}
	if err := k.follow(s); err != nil {
		t.Fatal(err)
	}
	k.wants(t, executorv1.Reason_REASON_EXITED)
	if k.stdout() != "runs\nends\n" {
		t.Errorf("%q", k.stdout())
	}
	waitNoSandboxes(t, d)
}

// What a program has in its pipe when it ends at once is told, all of it.
func TestEndsAtOnceWithAFullPipe(t *testing.T) {
	d := start(t)
	c := d.dial()
	for i := range repetitions(t, 20) {
		k := execute(t, c, &executorv1.ExecuteRequest{Command: argv("/usr/bin/head", "-c", "65536", "/dev/zero")})
		if len(k.stdout()) != 65536 {
			t.Fatalf("run %d: %d bytes", i, len(k.stdout()))
		}
		k.wants(t, executorv1.Reason_REASON_EXITED)
	}
}

// Every exit code and every signal is told as it was.
func TestEveryEnd(t *testing.T) {
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
	for _, code := range []int{0, 1, 2, 125, 126, 127, 128, 137, 255} {
		k := execute(t, c, &executorv1.ExecuteRequest{Parent: session, Command: bash(fmt.Sprintf("exit %d", code))})
		if k.result.GetReason() != executorv1.Reason_REASON_EXITED || int(k.result.GetExitCode()) != code {
			t.Errorf("exit %d: %v", code, k.result)
		}
	}
	for sig := syscall.Signal(1); sig <= 64; sig++ {
		switch sig {
		case syscall.SIGCHLD, syscall.SIGCONT, syscall.SIGURG, syscall.SIGWINCH, // ignored by default
			syscall.SIGSTOP, syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU, // stop
			32, 33: // the C library's own
			continue
		}
		k := execute(t, c, &executorv1.ExecuteRequest{Parent: session, Command: python(fmt.Sprintf(
			"import os, signal\ntry: signal.signal(%d, signal.SIG_DFL)\nexcept (OSError, ValueError): pass\nos.kill(os.getpid(), %d)", sig, sig))})
		if k.result.GetReason() != executorv1.Reason_REASON_SIGNALED || k.result.GetSignal() != int32(sig) || k.result.ExitCode != nil {
			t.Errorf("signal %d: %v", sig, k.result)
		}
	}
	// A program that stops itself runs until its time is up.
	command := bash("kill -STOP $$; echo never")
	command.Timeout, command.GracePeriod = durationpb.New(500*time.Millisecond), durationpb.New(200*time.Millisecond)
	k := execute(t, c, &executorv1.ExecuteRequest{Parent: session, Command: command})
	k.wants(t, executorv1.Reason_REASON_TIMED_OUT)
}

// A gigabyte without the end of a line passes through in pieces.
func TestOneLongLine(t *testing.T) {
	d := start(t)
	c := d.dial()
	s, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{
		Command:      argv("/usr/bin/head", "-c", "1073741824", "/dev/zero"),
		OutputPolicy: &executorv1.OutputPolicy{RetainedBytes: 2 << 30},
	})
	if err != nil {
		t.Fatal(err)
	}
	before := rss(t, d.process.Process.Pid)
	most, n := before, 0
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if n++; n%1000 == 0 {
			most = max(most, rss(t, d.process.Process.Pid))
		}
		if len(e.GetOutput().GetData()) > 31744 {
			t.Fatalf("a piece of %d bytes", len(e.GetOutput().GetData()))
		}
	}
	if !s.Whole() || s.Result().GetTotals()[0].GetSize() != 1<<30 {
		t.Errorf("whole %v: %v", s.Whole(), s.Result())
	}
	if grown := most - before; grown > 128<<20 {
		t.Errorf("executord grew by %d MiB", grown>>20)
	}
}
