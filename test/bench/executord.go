package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// daemon is the executord that is measured, over a TCP port as its users reach it.
type daemon struct {
	address string
	dir     string
	process *exec.Cmd
	client  *client.Client
}

// startDaemon starts one with a pool of so many sandboxes; 0 has every one-shot wait for
// its sandbox.
func startDaemon(ctx context.Context, binaries string, pool int, flags ...string) (*daemon, error) {
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "executord-bench-")
	if err != nil {
		return nil, err
	}
	args := []string{"serve", "--listen", address, "--state-dir", filepath.Join(dir, "state"), "--on-stop", "terminate", "--drain-timeout", "1s", "--log-level", "warn", "--pool-size", strconv.Itoa(pool)}
	cmd := exec.Command(filepath.Join(binaries, "executord"), append(args, flags...)...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	d := &daemon{address: address, dir: dir, process: cmd}
	if d.client, err = client.Dial(client.Config{Address: address}); err != nil {
		return nil, err
	}
	for range 200 {
		if _, err = d.client.Admin().GetServerInfo(ctx, nil); err == nil {
			return d, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	d.stop()
	return nil, err
}

// freeAddress is one that nobody listens on: another executord that answers must not be
// measured.
func freeAddress() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer listener.Close()
	return listener.Addr().String(), nil
}

func (d *daemon) stop() {
	d.client.Close()
	_ = d.process.Process.Signal(syscall.SIGTERM)
	_ = d.process.Wait()
	_ = os.RemoveAll(d.dir)
}

// session makes a sandbox that stays.
func (d *daemon) session(ctx context.Context) (string, error) {
	s, err := d.client.Sessions().CreateSession(ctx, &executorv1.CreateSessionRequest{})
	if err != nil {
		return "", err
	}
	name := s.GetSession().GetName()
	got, err := d.client.Sessions().GetSession(ctx, &executorv1.GetSessionRequest{Name: name, Wait: durationpb.New(time.Minute)})
	if err != nil {
		return "", err
	}
	if got.GetSession().GetState() != executorv1.Session_STATE_RUNNING {
		return "", fmt.Errorf("session %v", got.GetSession())
	}
	return name, nil
}

func (d *daemon) terminate(ctx context.Context, session string) error {
	_, err := d.client.Sessions().TerminateSession(ctx, &executorv1.TerminateSessionRequest{Name: session})
	return err
}

// firstByte executes a command and returns the time to its first output; it reads to
// the end, so that turns do not overlap.
func (d *daemon) firstByte(ctx context.Context, parent string, args ...string) (first, all time.Duration, err error) {
	begun := time.Now()
	s, err := d.client.Execute(ctx, &executorv1.ExecuteRequest{Parent: parent, Command: &executorv1.Command{Args: args}})
	if err != nil {
		return 0, 0, err
	}
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, 0, err
		}
		if e.GetOutput() != nil && first == 0 {
			first = time.Since(begun)
		}
	}
	if s.Result().GetReason() != executorv1.Reason_REASON_EXITED || first == 0 {
		return 0, 0, fmt.Errorf("result %v", s.Result())
	}
	return first, time.Since(begun), nil
}

func measureExec(ctx context.Context, d *daemon, o options) error {
	session, err := d.session(ctx)
	if err != nil {
		return err
	}
	crun, err := startCrun(ctx)
	if err != nil {
		return err
	}
	defer crun.stop()
	if err := crun.ask("start", nil); err != nil {
		return err
	}
	samples, err := turns(ctx, o.n,
		func() (time.Duration, error) {
			t, _, err := d.firstByte(ctx, session, "/bin/echo", "hi")
			return t, err
		},
		func() (took time.Duration, err error) { return took, crun.ask("exec", &took) },
		osExec)
	if err != nil {
		return err
	}
	o.results.compare("exec in a live sandbox to the first byte", samples[0], "crun exec", samples[1], "≤ 0.35")
	o.results.compare("the same", samples[0], "os/exec without any isolation", samples[2], "")
	return errors.Join(crun.ask("end", nil), d.terminate(ctx, session))
}

func measureOneShot(ctx context.Context, d *daemon, o options) error {
	crun, err := startCrun(ctx)
	if err != nil {
		return err
	}
	defer crun.stop()
	bare, err := startDaemon(ctx, o.bin, 0, "--local-blank-guests=0")
	if err != nil {
		return err
	}
	defer bare.stop()
	var whole sample
	samples, err := turns(ctx, o.n,
		func() (time.Duration, error) {
			t, all, err := d.firstByte(ctx, "", "/bin/echo", "hi")
			whole = append(whole, all)
			return t, err
		},
		func() (time.Duration, error) {
			t, _, err := bare.firstByte(ctx, "", "/bin/echo", "hi")
			return t, err
		},
		func() (took time.Duration, err error) { return took, crun.ask("run", &took) })
	if err != nil {
		return err
	}
	o.results.compare("one-shot in a sandbox that is made for it (no pool) to the first byte", samples[0], "crun run (overlay, control groups)", samples[2], "≤ 1.00")
	o.results.compare("the same without guests that wait blank", samples[1], "crun run", samples[2], "")
	o.results.compare("one-shot to the durable result", whole, "crun run to its first byte", samples[2], "")
	return nil
}

func measureStream(ctx context.Context, d *daemon, o options) error {
	bare, err := startBareServer(ctx)
	if err != nil {
		return err
	}
	defer bare.stop()
	samples, err := turns(ctx, 5, func() (time.Duration, error) { return d.stream(ctx, o.bytes) }, func() (time.Duration, error) { return bare.stream(ctx, o.bytes) })
	if err != nil {
		return err
	}
	rate := func(s sample) float64 { return float64(o.bytes) / s.quantile(.5).Seconds() / 1e6 }
	o.results.rates(fmt.Sprintf("stream of %d MB through the log", o.bytes/1e6), "MB/s", rate(samples[0]), "bare grpc-go from a pipe, same chunks", rate(samples[1]), "≥ 0.75")
	return nil
}

func (d *daemon) stream(ctx context.Context, n int64) (time.Duration, error) {
	begun := time.Now()
	s, err := d.client.Execute(ctx, &executorv1.ExecuteRequest{
		Command:      &executorv1.Command{Args: []string{"head", "-c", strconv.FormatInt(n, 10), "/dev/zero"}},
		OutputPolicy: &executorv1.OutputPolicy{RetainedBytes: 2 * n},
	})
	if err != nil {
		return 0, err
	}
	var got int64
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, err
		}
		got += int64(len(e.GetOutput().GetData()))
	}
	took := time.Since(begun)
	if got != n || !s.Whole() {
		return 0, fmt.Errorf("got %d of %d bytes: %v", got, n, s.Result())
	}
	_, err = d.client.Executor().DeleteExecution(ctx, &executorv1.DeleteExecutionRequest{Name: s.Name()})
	return took, err
}

// measureIdle weighs idle sandboxes by what the host has less of while they are there.
func measureIdle(ctx context.Context, d *daemon, o options) error {
	warm, err := d.session(ctx) // what exists once, not per sandbox
	if err != nil {
		return err
	}
	before, err := available()
	if err != nil {
		return err
	}
	sessions := []string{warm}
	for range o.idle {
		s, err := d.session(ctx)
		if err != nil {
			return err
		}
		sessions = append(sessions, s)
	}
	time.Sleep(2 * time.Second)
	after, err := available()
	if err != nil {
		return err
	}
	o.results.number(fmt.Sprintf("idle sandbox, all in (%d of them, host's MemAvailable)", o.idle), "MiB", float64(before-after)/float64(o.idle)/(1<<20), 0, "≤ 3 MiB")
	for _, s := range sessions {
		if err := d.terminate(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// available is the host's MemAvailable in bytes.
func available() (int64, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("no MemAvailable in /proc/meminfo")
}

// osExec is the floor: a process without any isolation.
func osExec() (time.Duration, error) {
	begun := time.Now()
	cmd := exec.Command("/bin/echo", "hi")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		return 0, err
	}
	took := time.Since(begun)
	return took, cmd.Wait()
}
