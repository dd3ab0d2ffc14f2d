package execution_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/guestbinary/guestbuild"
	"github.com/harvest-run/executord/internal/store"
)

// guestBytes is the guest of this source tree, compiled once.
var guestBytes = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "guest")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	return guestbuild.Build(dir)
})

// newLocalRig makes a rig with the real engine and the real store.
func newLocalRig(t *testing.T) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: sandboxes with limits")
	}
	guest, err := guestBytes()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	log := &lockedBuffer{}
	e, err := local.New(t.Context(), local.Config{
		StateDir: dir, Guest: guest, UIDBase: 1879048192, UIDCount: 4000, Logger: slog.New(slog.NewTextHandler(log, nil)),
		Defaults: engine.Limits{MemoryBytes: 512 << 20, PIDs: 200},
	})
	if err != nil {
		t.Skipf("this host cannot make local sandboxes: %v", err)
	}
	st, err := store.Open(t.Context(), store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{
		t: t, engine: e, store: st, log: log,
		sessions: &sessions{running: make(map[string]engine.Sandbox)}, dir: filepath.Join(dir, "executions"),
	}
	// In the reverse order: the Service, then what is left, then the rest.
	t.Cleanup(func() {
		if err := errors.Join(st.Close(), e.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		ctx := context.Background()
		ids, err := e.List(ctx)
		if err != nil {
			t.Error(err)
		}
		for _, id := range ids {
			sb, err := e.Open(ctx, id)
			if err == nil {
				_, err = sb.Terminate(ctx)
			}
			if err != nil {
				t.Error(err)
			}
		}
	})
	r.open()
	return r
}

func bash(source string) execution.Request {
	return execution.Request{Command: execution.Command{Language: execution.Bash, Source: source}}
}

// can says whether the engine has a capability on this host.
func (r *rig) can(name string) bool {
	for _, c := range r.engine.Capabilities() {
		if c.Name == name {
			return c.Available
		}
	}
	return false
}

// TestLocal runs real programs to every kind of end.
func TestLocal(t *testing.T) {
	r := newLocalRig(t)
	second := ptr(time.Second)
	tests := map[string]struct {
		request execution.Request
		needs   string
		reason  execution.Reason
		check   func(t *testing.T, got told)
	}{
		"hello": {bash("echo out; echo err >&2; exit 3"), "", execution.Exited, func(t *testing.T, got told) {
			if string(got.output["stdout"]) != "out\n" || string(got.output["stderr"]) != "err\n" || *got.result.ExitCode != 3 {
				t.Errorf("%q, %+v", got.output, got.result)
			}
			if got.result.Usage.PeakMemoryBytes == 0 {
				t.Error("no memory counted")
			}
		}},
		"python": {execution.Request{Command: execution.Command{
			Language: execution.Python, Source: "import os, sys\nprint(os.environ['X'], os.getcwd(), sys.path[1])", Env: map[string]string{"X": "y"},
		}}, "language.python", execution.Exited, func(t *testing.T, got told) {
			if string(got.output["stdout"]) != "y /workspace /workspace\n" {
				t.Errorf("%q", got.output)
			}
		}},
		"node": {execution.Request{Command: execution.Command{
			Language: execution.Node, Source: "process.stdout.write('x'.repeat(1<<22))",
		}}, "language.node", execution.Exited, func(t *testing.T, got told) {
			if len(got.output["stdout"]) != 1<<22 {
				t.Errorf("%d bytes", len(got.output["stdout"]))
			}
		}},
		"timeout": {execution.Request{Command: execution.Command{
			Args: []string{"sleep", "1000"}, Timeout: 200 * time.Millisecond, GracePeriod: second,
		}}, "", execution.TimedOut, func(t *testing.T, got told) {
			if got.result.Killed {
				t.Error("TERM was enough")
			}
		}},
		"a tree that ignores TERM": {execution.Request{Command: execution.Command{
			Language: execution.Bash, Source: "trap '' TERM; (trap '' TERM; setsid sleep 1000) & while :; do sleep 1000; done",
			Timeout: 300 * time.Millisecond, GracePeriod: ptr(200 * time.Millisecond),
		}}, "", execution.TimedOut, func(t *testing.T, got told) {
			if !got.result.Killed || got.result.Reaped == 0 {
				t.Errorf("%+v", got.result)
			}
		}},
		"signal": {bash("kill -SEGV $$"), "", execution.Signaled, func(t *testing.T, got told) {
			if got.result.Signal != 11 {
				t.Errorf("%+v", got.result)
			}
		}},
		"memory": {execution.Request{
			Command: execution.Command{Language: execution.Bash, Source: "x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo no"},
			Limits:  engine.Limits{MemoryBytes: 48 << 20},
		}, "limit.memory", execution.OOMKilled, func(t *testing.T, got told) {
			if got.result.Evidence["memory_limit_bytes"] != fmt.Sprint(48<<20) || got.result.Evidence["oom_kills"] == "" {
				t.Errorf("%+v", got.result)
			}
		}},
		"processes": {execution.Request{
			Command: execution.Command{Args: []string{"sh", "-c", "i=0; while [ $i -lt 100 ]; do sleep 3 & i=$((i+1)); done"}},
			Limits:  engine.Limits{PIDs: 20},
		}, "limit.pids", "", func(t *testing.T, got told) {
			if got.result.Evidence["forks_refused"] == "" || got.result.Evidence["pids_limit"] != "20" {
				t.Errorf("%+v", got.result)
			}
		}},
		"open files": {execution.Request{
			Command: execution.Command{Language: execution.Bash, Source: "test $(ulimit -Sn) = 77 && test $(ulimit -Hn) = 77"},
			Limits:  engine.Limits{OpenFiles: 77},
		}, "limit.open_files", execution.Exited, func(t *testing.T, got told) {
			if got.result.ExitCode == nil || *got.result.ExitCode != 0 {
				t.Errorf("%+v", got.result)
			}
		}},
		"disk": {execution.Request{
			Command: execution.Command{Args: []string{"bash", "-c", "head -c 100M /dev/zero > fill; test $? = 1 && test $(stat -c %s fill) -lt $((32 << 20))"}},
			Limits:  engine.Limits{DiskBytes: 32 << 20},
		}, "limit.disk", execution.Exited, func(t *testing.T, got told) {
			if got.result.ExitCode == nil || *got.result.ExitCode != 0 {
				t.Errorf("%+v", got.result)
			}
		}},
		"not found": {execution.Request{Command: execution.Command{Args: []string{"no-such-program"}}}, "", execution.StartFailed, func(t *testing.T, got told) {
			if got.result.Evidence["kind"] != "not_found" {
				t.Errorf("%+v", got.result)
			}
		}},
		"a very long name": {execution.Request{Command: execution.Command{Args: []string{strings.Repeat("x", 60<<10)}}}, "", execution.StartFailed, func(t *testing.T, got told) {
			if len(got.result.Detail) > 4<<10 || got.result.Detail == "" {
				t.Errorf("a detail of %d bytes", len(got.result.Detail))
			}
		}},
		"not executable": {execution.Request{Command: execution.Command{Args: []string{"/etc/passwd"}}}, "", execution.StartFailed, func(t *testing.T, got told) {
			if got.result.Evidence["kind"] != "not_executable" {
				t.Errorf("%+v", got.result)
			}
		}},
		"no directory": {execution.Request{Command: execution.Command{Language: execution.Python, Source: "1", WorkingDirectory: "/no/such"}}, "", execution.StartFailed, func(t *testing.T, got told) {
			if got.result.Evidence["kind"] != "no_working_directory" || !strings.Contains(got.result.Detail, "/no/such") {
				t.Errorf("%+v", got.result)
			}
		}},
		"no interpreter": {execution.Request{Command: execution.Command{
			Language: execution.Node, Source: "1", Env: map[string]string{"PATH": "/nowhere"},
		}}, "", execution.StartFailed, func(t *testing.T, got told) {
			if got.result.Evidence["package"] != "nodejs" {
				t.Errorf("%+v", got.result)
			}
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if test.needs != "" && !r.can(test.needs) {
				t.Skipf("this host has no %s", test.needs)
			}
			ref := r.start(test.request)
			got := r.watch(ref, nil)
			if test.reason != "" && got.result.Reason != test.reason || !got.result.TreeEmpty {
				t.Fatalf("%+v", got.result)
			}
			test.check(t, got)
			inOrder(t, got.result.Times)
		})
	}
	if err := r.Drain(t.Context()); err != nil {
		t.Error(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if left := r.list(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// TestLocalFlood moves much output and proves that it is what was written.
func TestLocalFlood(t *testing.T) {
	r := newLocalRig(t)
	const size = 64 << 20
	ref := r.start(execution.Request{
		Command: execution.Command{
			Language: execution.Bash,
			Source:   fmt.Sprintf("head -c %d /dev/urandom > f; cat f; sha256sum f >&2", size),
		},
		RetainedBytes: 256 << 20,
	})
	got := r.watch(ref, nil)
	sum := sha256.Sum256(got.output["stdout"])
	if len(got.output["stdout"]) != size || !strings.HasPrefix(string(got.output["stderr"]), hex.EncodeToString(sum[:])) {
		t.Errorf("%d bytes with another sum than %s", len(got.output["stdout"]), got.output["stderr"])
	}
	offset := int64(size - 1000)
	p := make([]byte, 2000)
	if n, err := r.ReadOutput(t.Context(), ref, "stdout", offset, p); err != nil || !bytes.Equal(p[:n], got.output["stdout"][offset:]) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// TestLocalCancel ends real trees, many at a time.
func TestLocalCancel(t *testing.T) {
	r := newLocalRig(t)
	r.session("a")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			request := bash("(setsid sleep 1000 &); sleep 1000 | cat")
			if i%2 == 0 {
				request.Session = "a"
			}
			e, err := r.Start(t.Context(), request)
			if err != nil {
				t.Error(err)
				return
			}
			ref := execution.Ref{Session: e.Session, ID: e.ID}
			time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
			if e, err = r.Cancel(t.Context(), ref, execution.Cancellation{By: "me"}); err != nil || e.Result.Reason != execution.Cancelled || !e.Result.TreeEmpty {
				t.Errorf("%v, %+v", err, e.Result)
			}
		})
	}
	wg.Wait()
	ref := r.start(execution.Request{Session: "a", Command: execution.Command{Args: []string{"sh", "-c", "set -- /proc/[0-9]*; echo $#"}}})
	if got := r.watch(ref, nil); string(got.output["stdout"]) != "2\n" { // the guest and sh
		t.Errorf("processes in the session: %q", got.output["stdout"])
	}
}

// TestLocalRestarts closes the Service at random moments while real programs write. The
// next one goes on from the exact byte, and nothing is left in the end.
func TestLocalRestarts(t *testing.T) {
	r := newLocalRig(t)
	r.session("a")
	// Numbered lines, some in bursts and some with pauses in between; a restart every
	// few milliseconds meets both.
	const n = 60000
	source := fmt.Sprintf("for i in $(seq 60); do seq $((i*1000-999)) $((i*1000)); echo mark $i >&2; sleep 0.02; done; exit $((%d %% 256))", n)
	one := r.start(bash(source))
	request := bash(source)
	request.Session = "a"
	inside := r.start(request)
	restarts := 20
	if testing.Short() {
		restarts = 3
	}
	for range restarts {
		time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
		r.restart()
	}
	for _, ref := range []execution.Ref{one, inside} {
		e := r.wait(ref)
		if e.Result.Reason != execution.Exited || *e.Result.ExitCode != n%256 {
			t.Fatalf("%+v", e.Result)
		}
		got := r.watch(ref, nil)
		for i, line := range strings.Split(strings.TrimSuffix(string(got.output["stdout"]), "\n"), "\n") {
			if line != fmt.Sprint(i+1) {
				t.Fatalf("line %d is %q", i+1, line)
			}
		}
		if count := bytes.Count(got.output["stdout"], []byte("\n")); count != n {
			t.Errorf("%d lines", count)
		}
		if count := bytes.Count(got.output["stderr"], []byte("\n")); count != 60 {
			t.Errorf("%d marks", count)
		}
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if left := r.list(); len(left) != 1 {
		t.Errorf("left: %v", left)
	}
}

// TestLocalSandboxKilled sees the end of a guest that somebody killed.
func TestLocalSandboxKilled(t *testing.T) {
	r := newLocalRig(t)
	ref := r.start(bash("echo started; sleep 1000"))
	w, err := r.Watch(t.Context(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for {
		e, err := w.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if e.Output != nil {
			break
		}
	}
	sb, err := r.engine.Open(t.Context(), "e-"+ref.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Terminate(t.Context()); err != nil {
		t.Fatal(err)
	}
	e := r.wait(ref)
	if e.Result.Reason != execution.SandboxLost || !e.Result.TreeEmpty || e.Result.ExitCode != nil {
		t.Errorf("%+v", e.Result)
	}
}
