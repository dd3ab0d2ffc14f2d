package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestclient"
	"github.com/harvest-run/executord/internal/guestfiles"
)

const (
	// maxTail bounds the end of a failed step's output that is kept in its Failure.
	maxTail = 4 << 10
	// sandboxTime bounds the making and the ending of a sandbox, snapshotTime that of a
	// snapshot.
	sandboxTime  = 2 * time.Minute
	snapshotTime = 15 * time.Minute
	// askTime bounds what only serves to measure what was written.
	askTime = time.Minute
)

// Network lets a sandbox reach what a policy names. An egress.Gateway is meant.
type Network interface {
	Open(ctx context.Context, sb egress.Sandbox, policy egress.Policy) (*egress.Proxy, error)
}

// Builder makes an image by a Recipe. It leaves nothing behind but the image.
type Builder struct {
	Engine  engine.Engine
	Network Network
}

// stepError is the failure of a build.
type stepError struct {
	failure Failure
	err     error
}

func (e *stepError) Error() string { return e.failure.Detail }
func (e *stepError) Unwrap() error { return e.err }

// Build makes a sandbox with this id, does the steps of r in it, and keeps what they
// left: ref is the engine's name of that, size what was written, in bytes. What happens is
// told to sink, whose error ends the build.
func (b Builder) Build(ctx context.Context, r Recipe, sandbox string, sink func(Event) error) (ref engine.ImageRef, size int64, err error) {
	if err := r.check(); err != nil {
		return "", 0, err
	}
	making, stop := context.WithTimeoutCause(ctx, sandboxTime, fmt.Errorf("no sandbox within %v", sandboxTime))
	defer stop()
	sb, err := b.Engine.Create(making, engine.Spec{ID: sandbox, Limits: r.Limits, Network: r.Network.Mode, Image: r.From})
	if err != nil {
		return "", 0, fmt.Errorf("make a sandbox: %w", err)
	}
	defer func() {
		ending, stop := context.WithTimeoutCause(context.WithoutCancel(ctx), sandboxTime, fmt.Errorf("not ended within %v", sandboxTime))
		defer stop()
		if _, e := sb.Terminate(ending); e != nil {
			err = errors.Join(err, fmt.Errorf("end the sandbox: %w", e))
		}
	}()
	proxy, err := b.Network.Open(making, sb, r.Network)
	if err != nil {
		return "", 0, fmt.Errorf("give the sandbox its network: %w", err)
	}
	client := guestclient.New(sb)
	defer client.Close()
	w := &worker{client: client, sink: sink, proxy: proxy}
	start := w.clock(ctx)
	for i, step := range r.Steps {
		if err := w.do(ctx, i, step); err != nil {
			return "", 0, err
		}
	}
	size = w.measure(ctx, start)
	keeping, stop := context.WithTimeoutCause(ctx, snapshotTime, fmt.Errorf("no snapshot within %v", snapshotTime))
	defer stop()
	if ref, err = sb.Snapshot(keeping, engine.SnapshotRequest{}); err != nil {
		return "", 0, fmt.Errorf("keep what the steps made: %w", err)
	}
	return ref, size, nil
}

// worker does the steps of one build.
type worker struct {
	client *guestclient.Client
	sink   func(Event) error
	proxy  *egress.Proxy
}

// do does one step.
func (w *worker) do(ctx context.Context, i int, step Step) error {
	fail := func(f Failure, err error) error {
		f.Step = step.Name
		f.Detail = fmt.Sprintf("step %d (%s): %s", i+1, step.Name, f.Detail)
		return &stepError{f, err}
	}
	start := time.Now()
	if err := w.sink(Event{Step: &StepBegun{Index: i, Name: step.Name}}); err != nil {
		return err
	}
	id := "build-" + strconv.Itoa(i)
	if err := guestfiles.Write(ctx, w.client, id+"-files", step.Files); err != nil {
		return fail(Failure{Detail: err.Error()}, err)
	}
	if args := step.args(); len(args) > 0 {
		dir := step.Dir
		if dir == "" {
			dir = "/"
		}
		var end tail
		var sinkErr error
		exit, err := w.client.RunStream(ctx, guestclient.Command{
			ID: id, Args: args, Env: w.environment(step.Env), Dir: dir, Timeout: step.timeout(),
		}, func(stream guestv1.Stream, data []byte) error {
			end.add(data)
			sinkErr = w.sink(Event{Output: &Output{Stderr: stream == guestv1.Stream_STREAM_STDERR, Data: data}})
			return sinkErr
		})
		if sinkErr != nil {
			return sinkErr
		}
		if err != nil {
			return fail(Failure{Detail: err.Error(), Output: end.text()}, err)
		}
		if f, failed := judge(exit, step); failed {
			f.Output = end.text()
			return fail(f, nil)
		}
	}
	return w.sink(Event{StepEnded: &StepEnded{Index: i, Duration: time.Since(start)}})
}

// judge says whether a step failed, and how.
func judge(exit *guestv1.Exit, step Step) (Failure, bool) {
	var f Failure
	switch status := exit.GetStatus().(type) {
	case *guestv1.Exit_Code:
		code := status.Code
		f.ExitCode, f.Detail = &code, fmt.Sprintf("exited with %d", code)
	case *guestv1.Exit_Signal:
		f.Signal, f.Detail = status.Signal, fmt.Sprintf("was ended by signal %d", status.Signal)
	}
	if exit.GetStopCause() == guestv1.StopCause_STOP_CAUSE_TIMEOUT {
		f.TimedOut, f.Detail = true, fmt.Sprintf("was not done within %v", step.timeout())
	}
	return f, f.TimedOut || f.ExitCode == nil || *f.ExitCode != 0
}

// clock is the time in the sandbox, in seconds with a fraction; "" where it cannot be had.
func (w *worker) clock(ctx context.Context) string {
	return w.ask(ctx, "build-clock", "date +%s.%N")
}

// measure adds up what the steps wrote: files that have changed since start. It is a
// number for people; 0 where it cannot be had.
func (w *worker) measure(ctx context.Context, start string) int64 {
	size, err := strconv.ParseInt(w.ask(ctx, "build-size", `find / \( -path /proc -o -path /sys -o -path /dev \) -prune -o -type f -newerct "@$1" `+
		`-printf '%s\n' 2>/dev/null | awk '{n += $1} END {printf "%d", n}'`, start), 10, 64)
	if err != nil {
		return 0
	}
	return size
}

// ask runs a short script and returns what it says.
func (w *worker) ask(ctx context.Context, id, script string, args ...string) string {
	out, err := w.client.Run(ctx, guestclient.Command{
		ID: id, Args: append([]string{"/bin/sh", "-c", script, "sh"}, args...), Dir: "/", Timeout: askTime, Limit: 1 << 10,
	})
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out.Stdout))
}

// tail keeps the end of what is written.
type tail struct{ data []byte }

func (t *tail) add(data []byte) {
	t.data = append(t.data, data...)
	if len(t.data) > 2*maxTail {
		t.data = append(t.data[:0], t.data[len(t.data)-maxTail:]...)
	}
}

// text is the end, cut at the beginning of a line where there is one.
func (t *tail) text() string {
	end := t.data
	if len(end) > maxTail {
		end = end[len(end)-maxTail:]
		if i := slices.Index(end, '\n'); i >= 0 && i < len(end)-1 {
			end = end[i+1:]
		}
	}
	for len(end) > 0 && !utf8.RuneStart(end[0]) {
		end = end[1:]
	}
	return strings.ToValidUTF8(string(end), "?")
}

// environment makes a step's variables: its own, those by which programs find the proxy,
// and those that a program of the system expects.
func (w *worker) environment(own []string) map[string]string {
	env := map[string]string{"USER": "root", "LOGNAME": "root", "TERM": "dumb"}
	for _, variable := range w.proxy.Environment(slices.Clone(own)) {
		name, value, _ := strings.Cut(variable, "=")
		env[name] = value
	}
	return env
}
