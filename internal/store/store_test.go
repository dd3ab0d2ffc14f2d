package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childVariable); dir != "" {
		os.Exit(child(dir))
	}
	goleak.VerifyTestMain(m)
}

// open opens a store and closes it when the test ends.
func open(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(context.Background(), Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

func closeStore(t testing.TB, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Errorf("Close() = %v", err)
	}
}

// wantFault fails the test unless err is a fault of this kind and reason.
func wantFault(t *testing.T, err error, kind fault.Kind, reason string) {
	t.Helper()
	if err == nil || fault.KindOf(err) != kind || fault.ReasonOf(err) != reason {
		t.Errorf("got the error %v (kind %d, reason %q), want kind %d, reason %q",
			err, fault.KindOf(err), fault.ReasonOf(err), kind, reason)
	}
}

// number makes ids that sort as their numbers do.
func number(n int) string { return fmt.Sprintf("x%06d", n) }

// A time with nanoseconds, as it is read: in UTC and without a monotonic clock.
var someTime = time.Date(2026, 11, 23, 14, 5, 6, 123456789, time.UTC)

func newExecution(id string) execution.Execution {
	return execution.Execution{
		ID:            id,
		Command:       execution.Command{Args: []string{"echo", id}, Timeout: time.Minute},
		Limits:        engine.Limits{MemoryBytes: 1 << 30, PIDs: 100},
		RetainedBytes: 1 << 20,
		Engine:        "local",
		State:         execution.Starting,
		Epoch:         "epoch1",
		CreateTime:    someTime,
	}
}

func newSession(id string) session.Session {
	return session.Session{
		ID: id, State: session.Starting, Engine: "local", Sandbox: "box-" + id,
		Limits: engine.Limits{CPUMillis: 500}, Lifetime: time.Hour, CreateTime: someTime,
	}
}

func TestOpenMakesPrivateFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "state ?#%&")
	s := open(t, dir)
	if err := s.InsertExecution(t.Context(), newExecution("a")); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", entry.Name(), info.Mode())
		}
		names = append(names, entry.Name())
	}
	if got := strings.Join(names, " "); got != "executord.db executord.db-shm executord.db-wal lock" {
		t.Errorf("the directory holds %s", got)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory has mode %v (%v), want 0700", info.Mode(), err)
	}
}

func TestOpenProtectsFileAgain(t *testing.T) {
	dir := t.TempDir()
	closeStore(t, open(t, dir))
	file := filepath.Join(dir, fileName)
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	open(t, dir)
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file has mode %v (%v), want 0600", info.Mode(), err)
	}
}

// The settings that durability depends on, as SQLite reports them.
func TestSettings(t *testing.T) {
	s := open(t, t.TempDir())
	for pragma, want := range map[string]string{
		"journal_mode": "wal", "synchronous": "1", "foreign_keys": "1", "busy_timeout": "5000",
	} {
		var got string
		if err := s.writer.QueryRow("PRAGMA " + pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %q (%v), want %q", pragma, got, err, want)
		}
	}
	if _, err := s.reader.Exec("DELETE FROM executions"); err == nil {
		t.Error("a reading connection can write")
	}
}

func TestCloseTwiceAndUseAfter(t *testing.T) {
	s := open(t, t.TempDir())
	for range 2 {
		closeStore(t, s)
	}
	if err := s.InsertExecution(t.Context(), newExecution("a")); err == nil {
		t.Error("an insert succeeded after Close")
	}
	if _, err := s.GetExecution(t.Context(), "a"); err == nil || fault.KindOf(err) == fault.NotFound {
		t.Errorf("a read after Close returned %v, want an error other than not found", err)
	}
}

func TestCloseFoldsLogIn(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if err := s.InsertExecution(t.Context(), newExecution("a")); err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)
	if _, err := os.Stat(filepath.Join(dir, fileName+"-wal")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the write-ahead log is there after Close (%v)", err)
	}
}

func TestEndedContextWritesNothing(t *testing.T) {
	s := open(t, t.TempDir())
	why := errors.New("caller left")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	for range 100 { // a select between two that are ready chooses by chance
		if err := s.InsertExecution(ctx, newExecution("a")); !errors.Is(err, why) {
			t.Fatalf("the insert returned %v, want the cause %v", err, why)
		}
	}
	_, err := s.GetExecution(t.Context(), "a")
	wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")

	// Also one that waits for its turn.
	s.turn <- struct{}{}
	ctx, stop := context.WithTimeoutCause(t.Context(), time.Millisecond, why)
	defer stop()
	if err := s.InsertExecution(ctx, newExecution("a")); !errors.Is(err, why) {
		t.Errorf("the waiting insert returned %v, want the cause %v", err, why)
	}
	<-s.turn

	// One that has begun is finished.
	ctx, cancel = context.WithCancelCause(t.Context())
	err = s.write(ctx, func(ctx context.Context) error {
		cancel(why)
		_, err := s.writer.ExecContext(ctx, "DELETE FROM executions")
		return err
	})
	if err != nil {
		t.Errorf("a write that had begun returned %v", err)
	}
}

func TestFullStateIsAFault(t *testing.T) {
	s := open(t, t.TempDir())
	var pages int
	if err := s.writer.QueryRow("PRAGMA page_count").Scan(&pages); err != nil {
		t.Fatal(err)
	}
	if _, err := s.writer.Exec(fmt.Sprintf("PRAGMA max_page_count = %d", pages)); err != nil {
		t.Fatal(err)
	}
	e := newExecution("a")
	e.Command.Args = []string{strings.Repeat("x", 60000)}
	wantFault(t, s.InsertExecution(t.Context(), e), fault.Exhausted, "STATE_FULL")
	_, err := s.GetExecution(t.Context(), "a")
	wantFault(t, err, fault.NotFound, "EXECUTION_NOT_FOUND")
	if _, err := s.writer.Exec("PRAGMA max_page_count = 1000000"); err != nil {
		t.Fatal(err)
	}
	if err := s.InsertExecution(t.Context(), e); err != nil {
		t.Errorf("the insert failed when there was room again: %v", err)
	}
}

func TestBusyStateIsAFault(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if _, err := s.writer.Exec("PRAGMA busy_timeout = 1"); err != nil {
		t.Fatal(err)
	}
	other, err := openDatabase(filepath.Join(dir, fileName), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	tx, err := other.Begin() // immediate: it has the write lock
	if err != nil {
		t.Fatal(err)
	}
	wantFault(t, s.InsertExecution(t.Context(), newExecution("a")), fault.Unavailable, "STATE_BUSY")
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if err := s.InsertExecution(t.Context(), newExecution("a")); err != nil {
		t.Errorf("the insert failed when the lock was gone: %v", err)
	}
}

const childVariable = "STORE_TEST_CHILD"

// child opens the store and inserts executions for ever. It tells each id once it is
// acknowledged.
func child(dir string) int {
	s, err := Open(context.Background(), Config{Dir: dir})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for n := 0; ; n++ {
		e := newExecution(number(n))
		if err := s.InsertExecution(context.Background(), e); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		e.State = execution.Running
		if err := s.UpdateExecution(context.Background(), e); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		// A pipe: what was written is there for the parent whenever this process dies.
		fmt.Println(e.ID)
	}
}

func startChild(t *testing.T, dir string) (*exec.Cmd, *lines) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childVariable+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return cmd, newLines(out)
}

func TestKilledWriterLosesNothing(t *testing.T) {
	dir := t.TempDir()
	next := 0
	for round, least := range []int{1, 50, 400} {
		if round > 0 { // the child begins at the first number
			dir = t.TempDir()
		}
		cmd, out := startChild(t, dir)
		var acknowledged []string
		for len(acknowledged) < least {
			line, err := out.next()
			if err != nil {
				t.Fatalf("the child ended early: %v", err)
			}
			acknowledged = append(acknowledged, line)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for { // and what it told before it died
			line, err := out.next()
			if err != nil {
				break
			}
			acknowledged = append(acknowledged, line)
		}
		cmd.Wait()

		s := open(t, dir)
		for _, id := range acknowledged {
			if e, err := s.GetExecution(t.Context(), id); err != nil || e.State != execution.Running {
				t.Errorf("round %d: execution %s is lost or went back: state %d, %v", round, id, e.State, err)
			}
		}
		next += len(acknowledged)
		// The state of a killed executord can be written on.
		if err := s.InsertExecution(t.Context(), newExecution("y")); err != nil {
			t.Error(err)
		}
		closeStore(t, s)
	}
	t.Logf("%d executions were acknowledged before the kills", next)
}

func TestSecondHolderIsRefused(t *testing.T) {
	dir := t.TempDir()
	cmd, out := startChild(t, dir)
	if _, err := out.next(); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), Config{Dir: dir})
	want := fmt.Sprintf("state directory %q is in use by another executord (pid %d)", dir, cmd.Process.Pid)
	if err == nil || err.Error() != want {
		t.Errorf("Open() = %v, want %s", err, want)
	}
	cmd.Process.Kill()
	cmd.Wait()
	open(t, dir) // the lock dies with its holder
}

func TestSecondHolderInOneProcess(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if _, err := Open(t.Context(), Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Errorf("Open() = %v, want a refusal that names this process", err)
	}
	// Before its pid is written, the holder is not named.
	if err := os.Truncate(filepath.Join(dir, "lock"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), Config{Dir: dir}); err == nil || !strings.HasSuffix(err.Error(), "(pid unknown)") {
		t.Errorf("Open() = %v, want a refusal without a pid", err)
	}
	closeStore(t, s)
	open(t, dir)
}

func TestOpenUnusableDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{file, filepath.Join(file, "below")} {
		if _, err := Open(t.Context(), Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("Open(%q) = %v, want an error that names it", dir, err)
		}
	}
}
