package modaltest_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	modal "github.com/modal-labs/modal-client/go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestFaultThrottlingHasNoEnd(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	f.ResetCounts()
	f.Inject(modaltest.Fault{RPC: "CP.SandboxTagsGetV2", Count: 6, Code: codes.ResourceExhausted, RetryAfter: time.Millisecond})
	if _, err := sb.GetTags(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if n := f.Counts()["CP.SandboxTagsGetV2"]; n != 7 {
		t.Errorf("%d calls", n)
	}
	f.Inject(modaltest.Fault{RPC: "CP.SandboxTagsGetV2", Count: -1, Code: codes.ResourceExhausted, RetryAfter: time.Millisecond})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := sb.GetTags(ctx, nil); err == nil {
		t.Error("it ended by a deadline only, and well")
	}
}

func TestFaultUnavailableStorm(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	f.Inject(modaltest.Fault{RPC: "*", Count: 3, Code: codes.Unavailable})
	if _, err := sb.GetTags(t.Context(), nil); err != nil {
		t.Errorf("three: %v", err)
	}
	f.Inject(modaltest.Fault{RPC: "CP.*", Count: 4, Code: codes.Unknown})
	if _, err := sb.GetTags(t.Context(), nil); status.Code(err) != codes.Unknown {
		t.Errorf("four: %v", err)
	}
	f.Inject(modaltest.Fault{RPC: "CP.*", Count: -1, Code: codes.Unavailable})
	f.Inject(modaltest.Fault{RPC: "TCR.*", Count: 5, Code: codes.Internal})
	if got := out(t, sb, "echo here"); got != "here" { // no call to the control plane is needed
		t.Errorf("got %q", got)
	}
	f.Repair()
}

func TestFaultLostReplyOfACreation(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	f.Inject(modaltest.Fault{RPC: "CP.SandboxCreateV2", Count: 2, Code: codes.Unavailable, Lost: true})
	sb := w.create(t, nil)
	if n := len(f.Sandboxes()); n != 1 || f.Sandboxes()[0].ID != sb.SandboxID {
		t.Errorf("%d sandboxes", n)
	}
}

func TestFaultLostReplyOfACreationThatIsForgotten(t *testing.T) {
	f := start(t, modaltest.Config{ForgetRequests: true})
	w := prepare(t, f)
	f.Inject(modaltest.Fault{RPC: "CP.SandboxCreateV2", Code: codes.Unavailable, Lost: true})
	_, err := w.Sandboxes.Create(t.Context(), w.app, w.image, &modal.SandboxCreateParams{Name: "mine"})
	if !errors.As(err, new(modal.AlreadyExistsError)) {
		t.Fatalf("got %v", err)
	}
	sb, err := w.Sandboxes.FromName(t.Context(), "app", "mine", nil)
	if err != nil || f.Running() != 1 {
		t.Fatalf("%v, %d run", err, f.Running())
	}
	defer sb.Detach()
	out(t, sb, "true")
}

func TestFaultLostRepliesOfExecAndInput(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	f.Inject(modaltest.Fault{RPC: "TCR.TaskExecStart", Count: 2, Code: codes.Unavailable, Lost: true})
	f.Inject(modaltest.Fault{RPC: "TCR.TaskExecStdinWrite", Count: 3, Code: codes.Unavailable, Lost: true})
	p, err := sb.Exec(t.Context(), []string{"sh", "-c", "echo x >> /once; cat"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"one ", "two ", "three"} {
		if _, err := io.WriteString(p.Stdin, word); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if stdout, _, _ := finish(t, p); stdout != "one two three" {
		t.Errorf("it read %q", stdout)
	}
	if got := out(t, sb, "wc -l < /once"); got != "1" {
		t.Errorf("it ran %s times", got)
	}
}

func TestFaultLostReplyOfAFile(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	data := bytes.Repeat([]byte("0123456789"), 200_000)
	f.Inject(modaltest.Fault{RPC: "TCR.TaskExecStdinWriteStream", Code: codes.Unavailable})             // not begun
	f.Inject(modaltest.Fault{RPC: "TCR.TaskExecStdinWriteStream", Code: codes.Unavailable, Lost: true}) // done
	if err := sb.Filesystem.WriteBytes(t.Context(), data, "/file", nil); err != nil {
		t.Fatal(err)
	}
	if got, err := sb.Filesystem.ReadBytes(t.Context(), "/file", nil); err != nil || !bytes.Equal(got, data) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
}

func TestFaultStreamsAreReset(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	f.Inject(modaltest.Fault{RPC: "TCR.TaskExecStdioRead", Count: 20, Code: codes.Unavailable, Messages: 1})
	got := out(t, sb, "seq 1 200000")
	if lines := strings.Count(got, "\n") + 1; lines != 200000 || !strings.HasSuffix(got, "\n200000") {
		t.Errorf("%d lines, ending in %q", lines, got[len(got)-20:])
	}
	if n := f.Counts()["TCR.TaskExecStdioRead"]; n < 20 {
		t.Errorf("%d streams", n)
	}
}

func TestFaultTokenExpiry(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	out(t, sb, "true")
	f.ExpireTokens()
	// The SDK asks for a new token only when the old one is within 30 s of its end.
	if _, err := sb.Exec(t.Context(), []string{"true"}, nil); status.Code(err) != codes.Unauthenticated {
		t.Errorf("got %v", err)
	}
	again, err := w.Sandboxes.FromID(t.Context(), sb.SandboxID, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Detach()
	out(t, again, "true")
}

func TestFaultTokensThatEndSoonAreRenewed(t *testing.T) {
	f := start(t, modaltest.Config{RouterTokenLife: 20 * time.Second})
	w := prepare(t, f)
	sb := w.create(t, nil)
	p, err := sb.Exec(t.Context(), []string{"sh", "-c", "read x; echo $x"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	f.ExpireTokens()
	f.ResetCounts()
	if _, err := io.WriteString(p.Stdin, "word\n"); err != nil {
		t.Fatal(err)
	}
	if stdout, _, _ := finish(t, p); stdout != "word\n" {
		t.Errorf("got %q", stdout)
	}
	if n := f.Counts()["CP.SandboxGetCommandRouterAccess"]; n == 0 {
		t.Error("no new token was asked for")
	}
}

func TestFaultPreemption(t *testing.T) {
	for how, want := range map[modaltest.Gone]struct {
		code int
		is   string
		runs string // told from others by it
	}{
		modaltest.GoneFailed:     {0, "INTERNAL_FAILURE", "98764"},
		modaltest.GoneTerminated: {137, "TERMINATED", "98765"},
		modaltest.GoneEvicted:    {0, "MEMORY_MANAGER_EVICTION", "98766"}, // looks like exit 0
	} {
		t.Run(string(how), func(t *testing.T) {
			f := start(t, modaltest.Config{})
			w := prepare(t, f)
			sb := w.create(t, nil)
			if _, err := sb.Exec(t.Context(), []string{"sleep", want.runs}, nil); err != nil {
				t.Fatal(err)
			}
			if err := f.Preempt(sb.SandboxID, how); err != nil {
				t.Fatal(err)
			}
			if code, err := sb.Wait(t.Context(), nil); err != nil || code != want.code {
				t.Errorf("wait: %d, %v", code, err)
			}
			if got := f.Sandboxes()[0].Result; got != want.is {
				t.Errorf("the service says %s", got)
			}
			if n := processes(t, "^sleep "+want.runs); n != 0 {
				t.Errorf("%d processes are left", n)
			}
		})
	}
}

func TestFaultPreemptionWithoutAResult(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	forgotten, silent := w.create(t, nil), w.create(t, nil)
	if err := f.Preempt(forgotten.SandboxID, modaltest.GoneForgotten); err != nil {
		t.Fatal(err)
	}
	if err := f.Preempt(silent.SandboxID, modaltest.GoneSilent); err != nil {
		t.Fatal(err)
	}
	if _, err := forgotten.Poll(t.Context(), nil); status.Code(err) != codes.NotFound {
		t.Errorf("forgotten: %v", err)
	}
	if code, err := silent.Poll(t.Context(), nil); err != nil || code != nil {
		t.Errorf("silent: %v, %v", code, err)
	}
	if _, err := silent.Exec(t.Context(), []string{"true"}, nil); status.Code(err) != codes.NotFound {
		t.Errorf("exec: %v", err)
	}
}

// It takes the SDK ten seconds to give up a router.
func TestFaultWorkerDeath(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	p, err := sb.Exec(t.Context(), []string{"sh", "-c", "echo up; sleep 98763"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(p.Stdout, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	if err := f.KillWorker(sb.SandboxID, time.Hour); err != nil {
		t.Fatal(err)
	}
	if n := processes(t, "^sh -c echo up; sleep 98763"); n != 0 {
		t.Errorf("%d processes are left", n)
	}
	f.ResetCounts()
	if _, err := io.ReadAll(p.Stdout); status.Code(err) != codes.Unavailable {
		t.Errorf("read: %v", err)
	}
	if n := f.Counts()["TCR.TaskExecStdioRead"]; n > 11 || n < 5 {
		t.Errorf("the SDK tried %d times", n)
	}
	if code, err := sb.Poll(t.Context(), nil); err != nil || code != nil {
		t.Errorf("the control plane says %v, %v", code, err)
	}
}

func TestFaultWorkerDeathIsKnownLater(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	if err := f.KillWorker(sb.SandboxID, 300*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if code, err := sb.Poll(t.Context(), nil); err != nil || code != nil {
		t.Errorf("at once: %v, %v", code, err)
	}
	if _, err := sb.Wait(t.Context(), nil); err != nil || f.Sandboxes()[0].Result != "INTERNAL_FAILURE" {
		t.Errorf("then: %v, %+v", err, f.Sandboxes()[0])
	}
}

func TestFaultSlowScheduling(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	f.SetScheduling(300 * time.Millisecond)
	f.SetStartup(400 * time.Millisecond)
	begun := time.Now()
	sb := w.create(t, nil)
	if took := time.Since(begun); took < 300*time.Millisecond {
		t.Errorf("created after %v", took)
	}
	f.ResetCounts()
	out(t, sb, "true") // the SDK tries again for 10 s
	if n := f.Counts()["TCR.TaskExecStart"]; n < 2 {
		t.Errorf("%d starts", n)
	}
	f.SetScheduling(time.Minute)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := w.Sandboxes.Create(ctx, w.app, w.image, nil)
	if status.Code(err) != codes.DeadlineExceeded || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("past the deadline: %v", err)
	}
}

func TestFaultNoCapacity(t *testing.T) {
	w := prepare(t, start(t, modaltest.Config{Capacity: 1}))
	sb := w.create(t, nil)
	_, err := w.Sandboxes.Create(t.Context(), w.app, w.image, nil)
	if status.Code(err) != codes.ResourceExhausted || errors.As(err, new(modal.ResourceExhaustedError)) {
		t.Errorf("got %v", err)
	}
	if _, err := sb.Terminate(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	w.create(t, nil)
}

func TestFaultHang(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	f.Inject(modaltest.Fault{RPC: "TCR.TaskExecStart", After: 1, Hang: true})
	out(t, sb, "true")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := sb.Exec(ctx, []string{"true"}, nil); err == nil {
		t.Error("it was answered")
	}
}

func TestFaultResultLag(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	f.SetResultLag(400 * time.Millisecond)
	begun := time.Now()
	if _, err := sb.Terminate(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if code, err := sb.Poll(t.Context(), nil); time.Since(begun) < 300*time.Millisecond && (err != nil || code != nil) {
		t.Errorf("at once: %v, %v", code, err)
	}
	if code, err := sb.Wait(t.Context(), nil); err != nil || code != 137 || time.Since(begun) < 400*time.Millisecond {
		t.Errorf("then: %d, %v", code, err)
	}
}

func TestFaultRoundTrip(t *testing.T) {
	f := start(t, modaltest.Config{})
	w := prepare(t, f)
	sb := w.create(t, nil)
	out(t, sb, "true") // connected
	f.SetRoundTrip(100 * time.Millisecond)
	p, err := sb.Exec(t.Context(), []string{"cat"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	for range 5 { // each write is a call that is waited for
		if _, err := io.WriteString(p.Stdin, "x"); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(begun); took < 500*time.Millisecond {
		t.Errorf("five calls took %v", took)
	}
	if err := p.Stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if stdout, _, _ := finish(t, p); stdout != "xxxxx" {
		t.Errorf("got %q", stdout)
	}
	// The way is long, and not narrow.
	begun = time.Now()
	if got := out(t, sb, "head -c 20m /dev/zero | tr '\\0' x"); len(got) != 20<<20 {
		t.Errorf("got %d bytes", len(got))
	}
	if took := time.Since(begun); took > 320*100*time.Millisecond { // one wait for each piece
		t.Errorf("20 MiB took %v", took)
	}
}
