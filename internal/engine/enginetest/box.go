package enginetest

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
)

// box is a sandbox and a client of its guest.
type box struct {
	engine.Sandbox
	h     *house
	guest *guestclient.Client
}

// create makes a sandbox and fails the test if it cannot.
func (h *house) create(id string, limits engine.Limits) *box {
	h.t.Helper()
	sb, err := h.engine.Create(h.ctx(), engine.Spec{ID: id, Limits: limits})
	if err != nil {
		h.t.Fatalf("create %s: %v", id, err)
	}
	return h.box(sb)
}

// open finds a sandbox and fails the test if it cannot.
func (h *house) open(id string) *box {
	h.t.Helper()
	sb, err := h.engine.Open(h.ctx(), id)
	if err != nil {
		h.t.Fatalf("open %s: %v", id, err)
	}
	return h.box(sb)
}

func (h *house) box(sb engine.Sandbox) *box {
	client := guestclient.New(sb)
	h.clients = append(h.clients, client)
	return &box{Sandbox: sb, h: h, guest: client}
}

// environment is the least that programs need.
func environment(execution string) []string {
	return []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8",
		// As executord does: by it a guest without control groups knows the command's own.
		"EXECUTOR_EXECUTION=" + execution,
	}
}

// request starts args in /workspace.
func request(execution string, args ...string) *guestv1.StartRequest {
	return &guestv1.StartRequest{
		Execution: execution, Args: args, Env: environment(execution),
		WorkingDirectory: "/workspace", CreateWorkingDirectory: true,
	}
}

// outcome is all that a command wrote, and how it ended.
type outcome struct {
	stdout, stderr []byte
	exit           *guestv1.Exit
}

func (o outcome) String() string {
	cut := func(b []byte) string {
		if len(b) > 4096 {
			return fmt.Sprintf("%q… (%d bytes)", b[:4096], len(b))
		}
		return fmt.Sprintf("%q", b)
	}
	return fmt.Sprintf("%v, stdout %s, stderr %s", o.exit, cut(o.stdout), cut(o.stderr))
}

// begin starts a command.
func (b *box) begin(execution string, args ...string) {
	b.h.t.Helper()
	r := request(execution, args...)
	r.OpenFiles = uint64(b.Limits().OpenFiles) // as executord does
	if _, err := b.guest.Start(b.h.ctx(), r); err != nil {
		b.h.t.Fatalf("start %q in %s: %v", args, b.ID(), err)
	}
}

// finish reads a command to its end.
func (b *box) finish(execution string) outcome {
	b.h.t.Helper()
	out, err := follow(b.h.ctx(), b.guest, execution)
	if err != nil {
		b.h.t.Fatalf("follow %s in %s: %v", execution, b.ID(), err)
	}
	return out
}

// follow reads a command from its first byte to its end.
func follow(ctx context.Context, guest *guestclient.Client, execution string) (outcome, error) {
	var stdout, stderr bytes.Buffer
	for position := int64(0); ; {
		out, err := guest.Read(ctx, execution, position, 256<<10, 10*time.Second)
		if err != nil {
			return outcome{stdout: stdout.Bytes(), stderr: stderr.Bytes()}, err
		}
		for _, c := range out.Chunks {
			if c.Stream == guestv1.Stream_STREAM_STDOUT {
				stdout.Write(c.Data)
			} else {
				stderr.Write(c.Data)
			}
			position += int64(len(c.Data))
		}
		out.Release()
		if out.Exit != nil {
			return outcome{stdout: stdout.Bytes(), stderr: stderr.Bytes(), exit: out.Exit}, nil
		}
	}
}

// run runs a command to its end.
func (b *box) run(args ...string) outcome {
	b.h.t.Helper()
	b.h.count++
	execution := fmt.Sprintf("run-%d", b.h.count)
	b.begin(execution, args...)
	return b.finish(execution)
}

// sh runs a bash script that must succeed and returns what it printed.
func (b *box) sh(script string) string {
	b.h.t.Helper()
	out := b.run("bash", "-ec", script)
	if !exited(out, 0) {
		b.h.t.Fatalf("script %q in %s: %v", script, b.ID(), out)
	}
	return strings.TrimSuffix(string(out.stdout), "\n")
}

// wrote waits until a running command's standard output has this in it, without
// giving anything of it up.
func (b *box) wrote(execution, want string) {
	b.h.t.Helper()
	var seen []byte
	eventually(b.h.t, fmt.Sprintf("%s writes %q", execution, want), func() bool {
		out, err := b.guest.Read(b.h.ctx(), execution, 0, 64<<10, 100*time.Millisecond)
		if err != nil {
			b.h.t.Fatalf("read %s in %s: %v", execution, b.ID(), err)
		}
		defer out.Release()
		seen = seen[:0]
		for _, c := range out.Chunks {
			seen = append(seen, c.Data...)
		}
		if out.Exit != nil && !bytes.Contains(seen, []byte(want)) {
			b.h.t.Fatalf("%s in %s ended: %v, after writing %q", execution, b.ID(), out.Exit, seen)
		}
		return bytes.Contains(seen, []byte(want))
	})
}

// answers fails the test if the guest does not.
func (b *box) answers() {
	b.h.t.Helper()
	if _, err := b.guest.Info(b.h.ctx()); err != nil {
		b.h.t.Errorf("the guest of %s does not answer: %v", b.ID(), err)
	}
}

// terminate ends the sandbox and checks that it is gone.
func (b *box) terminate() engine.Remains {
	b.h.t.Helper()
	remains, err := b.Terminate(b.h.ctx())
	if err != nil {
		b.h.t.Fatalf("terminate %s: %v", b.ID(), err)
	}
	b.mustBeDone()
	return remains
}

// mustBeDone fails the test if Done is not closed now.
func (b *box) mustBeDone() {
	b.h.t.Helper()
	select {
	case <-b.Done():
	default:
		b.h.t.Errorf("Done of %s is not closed after its end", b.ID())
	}
}

// awaitDone waits for the sandbox's end.
func (b *box) awaitDone() {
	b.h.t.Helper()
	select {
	case <-b.Done():
	case <-b.h.ctx().Done():
		b.h.t.Fatalf("Done of %s is not closed", b.ID())
	}
}

func exited(o outcome, code int32) bool {
	status, ok := o.exit.GetStatus().(*guestv1.Exit_Code)
	return ok && status.Code == code
}

func signalled(o outcome, signal int32) bool {
	status, ok := o.exit.GetStatus().(*guestv1.Exit_Signal)
	return ok && status.Signal == signal
}

func isNotFound(err error) bool { return fault.KindOf(err) == fault.NotFound }

// mustBeGone fails the test if anything of a sandbox can still be found.
func (h *house) mustBeGone(id string) {
	h.t.Helper()
	if sb, err := h.engine.Open(h.ctx(), id); !isNotFound(err) {
		h.t.Errorf("open %s after its end: %v, %v, want a fault of kind NotFound", id, sb, err)
	}
}

func mustFault(t *testing.T, what string, err error, kind fault.Kind, reason string) {
	t.Helper()
	if err == nil || fault.KindOf(err) != kind || (reason != "" && fault.ReasonOf(err) != reason) {
		t.Errorf("%s: %v (kind %d, reason %q), want a fault of kind %d, reason %q", what, err, fault.KindOf(err), fault.ReasonOf(err), kind, reason)
	}
}
