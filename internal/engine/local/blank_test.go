package local

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
)

// blankEngine is an engine that keeps so many guests ready, and has them.
func blankEngine(t *testing.T, want int, change ...func(*Config)) *Engine {
	t.Helper()
	cfg := testConfig(t)
	cfg.Blank = want
	for _, c := range change {
		c(&cfg)
	}
	e := engineOver(t, cfg)
	await(t, "guests are ready", func() bool { return len(waiting(e)) == want })
	return e
}

// waiting are the guests that are ready.
func waiting(e *Engine) []*blank {
	e.blanks.mu.Lock()
	defer e.blanks.mu.Unlock()
	return append([]*blank(nil), e.blanks.ready...)
}

// notes counts what is written down about guests that wait.
func notes(t *testing.T, e *Engine) int {
	t.Helper()
	entries, err := os.ReadDir(e.blankDir())
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// groupsOf counts the control groups of guests that wait, or waited.
func groupsOf(t *testing.T, e *Engine) int {
	t.Helper()
	if e.groups == nil {
		return 0
	}
	names, err := e.groups.List()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, name := range names {
		if strings.HasPrefix(name, "blank.") {
			n++
		}
	}
	return n
}

// A guest that waited becomes the sandbox, with everything that belongs to one; another
// takes its place.
func TestBlankBecomesTheSandbox(t *testing.T) {
	e := blankEngine(t, 2)
	before := waiting(e)
	if ids, err := e.List(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("guests that wait are sandboxes: %q, %v", ids, err)
	}
	if entries, err := os.ReadDir(e.sandboxDir("")); err != nil || len(entries) > 0 {
		t.Errorf("guests that wait have directories: %v, %v", entries, err)
	}
	sb := sandboxFor(t, e, engine.Spec{ID: "from-a-blank"}).(*sandbox)
	if sb.process.pid != before[0].process.pid {
		t.Errorf("the sandbox has process %d, not the oldest of those that waited, %d", sb.process.pid, before[0].process.pid)
	}
	mustLive(t, sb, "one")
	if out, err := runPython(t.Context(), sb, "name", `import socket; print(socket.gethostname())`); err != nil || out.stdout != "from-a-blank\n" {
		t.Errorf("%v, %v", out, err)
	}
	if ids, err := e.List(t.Context()); err != nil || len(ids) != 1 || ids[0] != "from-a-blank" {
		t.Errorf("sandboxes: %q, %v", ids, err)
	}
	await(t, "another is ready", func() bool { return len(waiting(e)) == 2 })
	if got := waiting(e); got[0] != before[1] {
		t.Error("the other one that waited is not the next")
	}
	if e.groups != nil && (notes(t, e) != 2 || groupsOf(t, e) != 3) {
		t.Errorf("%d notes and %d groups, of two guests that wait and one that waited", notes(t, e), groupsOf(t, e))
	}
}

// The limits of a sandbox hold though its groups were made before they were known.
func TestBlankIsLimited(t *testing.T) {
	needRoot(t)
	e := blankEngine(t, 1)
	pid := waiting(e)[0].process.pid
	sb := sandboxFor(t, e, engine.Spec{ID: "limited", Limits: engine.Limits{MemoryBytes: 64 << 20, PIDs: 5}}).(*sandbox)
	if sb.process.pid != pid {
		t.Fatal("the guest that waited was not used")
	}
	out, err := runPython(t.Context(), sb, "many", `import os, time
made = 0
try:
    for i in range(20):
        if os.fork() == 0: time.sleep(1000)
        made += 1
except BlockingIOError: pass
print(made)`)
	if err != nil || out.stdout != "4\n" {
		t.Errorf("%v, %v: want 4 children beside the first process", out, err)
	}
	if u, err := sb.Usage(t.Context()); err != nil || u.PIDsRefused < 1 {
		t.Errorf("%+v, %v", u, err)
	}
}

// A sandbox that was made of one is found by the next engine, which removes what the
// guests that waited had. They end by themselves when executord does.
func TestBlanksEndWithTheEngine(t *testing.T) {
	cfg := testConfig(t)
	cfg.Blank = 2
	e := openEngine(t, cfg)
	await(t, "guests are ready", func() bool { return len(waiting(e)) == 2 })
	stays, err := e.Create(t.Context(), engine.Spec{ID: "stays"})
	if err != nil {
		t.Fatal(err)
	}
	await(t, "guests are ready", func() bool { return len(waiting(e)) == 2 })
	// As if executord was killed: the kernel closes what it had open, nothing is removed.
	e.blanks.stop(errors.New("killed"))
	e.blanks.work.Wait()
	var pids []int
	for _, b := range waiting(e) {
		pids = append(pids, b.process.pid)
		b.close()
	}
	for _, pid := range pids {
		await(t, "a guest that waited ends by itself", func() bool { return !alive(pid) })
	}
	if root := e.groups != nil; root && (notes(t, e) != 2 || groupsOf(t, e) != 3) {
		t.Fatalf("%d notes and %d groups are left to find", notes(t, e), groupsOf(t, e))
	}
	cfg.Blank = 0
	next := openEngine(t, cfg)
	if next.groups != nil && (notes(t, next) != 0 || groupsOf(t, next) != 1) {
		t.Errorf("%d notes and %d groups are left", notes(t, next), groupsOf(t, next))
	}
	found, err := next.Open(t.Context(), "stays")
	if err != nil {
		t.Fatal(err)
	}
	mustLive(t, found, "one")
	if _, err := found.Terminate(t.Context()); err != nil {
		t.Error(err)
	}
	await(t, "the first engine sees the end", func() bool {
		select {
		case <-stays.Done():
			return true
		default:
			return false
		}
	})
	if err := errors.Join(next.Close(), e.Close()); err != nil {
		t.Error(err)
	}
}

// Close ends those that wait and removes what they had.
func TestBlanksAreEndedByClose(t *testing.T) {
	cfg := testConfig(t)
	cfg.Blank = 3
	e := openEngine(t, cfg)
	await(t, "guests are ready", func() bool { return len(waiting(e)) == 3 })
	ready := waiting(e)
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	for _, b := range ready {
		if alive(b.process.pid) {
			t.Errorf("process %d lives on", b.process.pid)
		}
	}
	if n := notes(t, e); n != 0 {
		t.Errorf("%d notes are left", n)
	}
}

// One that was killed is passed over, and what it had is removed.
func TestBlankThatEndedIsPassedOver(t *testing.T) {
	e := blankEngine(t, 2)
	before := waiting(e)
	if err := syscall.Kill(before[0].process.pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "it has ended", before[0].process.hasEnded)
	sb := sandboxFor(t, e, engine.Spec{ID: "next"}).(*sandbox)
	if sb.process.pid != before[1].process.pid {
		t.Errorf("the sandbox has process %d, want %d", sb.process.pid, before[1].process.pid)
	}
	mustLive(t, sb, "one")
	await(t, "they are replaced", func() bool { return len(waiting(e)) == 2 })
	if e.groups != nil && (notes(t, e) != 2 || groupsOf(t, e) != 3) {
		t.Errorf("%d notes and %d groups", notes(t, e), groupsOf(t, e))
	}
}

// One that does not answer costs time and nothing else: the sandbox is made from nothing.
func TestBlankThatHangs(t *testing.T) {
	e := blankEngine(t, 1)
	e.blanks.patience = 50 * time.Millisecond
	hangs := waiting(e)[0].process.pid
	if err := syscall.Kill(hangs, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	sb := sandboxFor(t, e, engine.Spec{ID: "all-the-same"}).(*sandbox)
	if sb.process.pid == hangs || alive(hangs) {
		t.Errorf("the sandbox has process %d; the one that hangs is %d and lives: %v", sb.process.pid, hangs, alive(hangs))
	}
	mustLive(t, sb, "one")
	await(t, "another is ready", func() bool { return len(waiting(e)) == 1 })
	if e.groups != nil && (notes(t, e) != 1 || groupsOf(t, e) != 1) {
		t.Errorf("%d notes and %d groups, want those of one that waits", notes(t, e), groupsOf(t, e))
	}
}

// A create that nobody waits for any more ends the guest that it took, and does not try
// another.
func TestBlankIsGivenUpWithTheContext(t *testing.T) {
	e := blankEngine(t, 1)
	taken := waiting(e)[0].process.pid
	if err := syscall.Kill(taken, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	cause := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
	defer cancel()
	if sb, err := e.Create(ctx, engine.Spec{ID: "given-up"}); !errors.Is(err, cause) {
		t.Errorf("%v, %v, want the context's cause", sb, err)
	}
	if alive(taken) {
		t.Error("the guest that was taken lives on")
	}
	if ids, err := e.List(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("left: %q, %v", ids, err)
	}
	if _, err := os.Stat(filepath.Join(e.dir, "sandboxes", "given-up")); !os.IsNotExist(err) {
		t.Errorf("its directory: %v", err)
	}
}

// A sandbox with the host's network cannot be made of one, which has a network of its
// own; where there is no other range of user ids, one that waits gives up its.
func TestBlankGivesUpItsUserIDs(t *testing.T) {
	needRoot(t)
	e := blankEngine(t, 1, func(c *Config) { c.UIDBase, c.UIDCount = 0x70ff0000, 1 })
	held := waiting(e)[0].process.pid
	sb := sandboxFor(t, e, engine.Spec{ID: "host", Network: engine.NetworkHost}).(*sandbox)
	if sb.process.pid == held || alive(held) {
		t.Errorf("the sandbox has process %d; the one that waited is %d and lives: %v", sb.process.pid, held, alive(held))
	}
	mustLive(t, sb, "one")
	if n := len(waiting(e)); n != 0 {
		t.Errorf("%d wait without a range of user ids", n)
	}
	if _, err := sb.Terminate(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, "one waits again, now that there is a range", func() bool { return len(waiting(e)) == 1 })
}
