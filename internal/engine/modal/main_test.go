package modal

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
	"github.com/harvest-run/executord/internal/guestbinary/guestbuild"
	"go.uber.org/goleak"
)

// envGuest names the file with the guest that TestMain built.
const envGuest = "EXECUTORD_TEST_GUEST"

func TestMain(m *testing.M) {
	modaltest.MaybeRun()
	code, err := runAll(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func runAll(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "executord-modal-test-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	if _, err := guestbuild.Build(dir); err != nil {
		return 1, err
	}
	os.Setenv(envGuest, filepath.Join(dir, "executor-guest"))
	code := m.Run()
	if code != 0 {
		return code, nil
	}
	return 0, goleak.Find()
}

func guestOf(t testing.TB) []byte {
	t.Helper()
	guest, err := os.ReadFile(os.Getenv(envGuest))
	if err != nil {
		t.Fatal(err)
	}
	return guest
}

// fakeOf starts a fake of Modal that the engines of this test talk to.
func fakeOf(t *testing.T, cfg modaltest.Config) *modaltest.Fake {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("the fake of Modal makes namespaces, as root")
	}
	fake, err := modaltest.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := fake.Close(); err != nil {
			t.Error(err)
		}
	})
	fake.Setenv(t)
	return fake
}

// testConfig is a configuration with limits for everything that can have one.
func testConfig(t *testing.T) Config {
	t.Helper()
	cfg := Config{
		Owner: "test", Guest: guestOf(t), ImageCommands: []string{}, MaxCreatesPerMinute: 10_000,
		Defaults: engine.Limits{MemoryBytes: 1 << 30, CPUMillis: 2000, OpenFiles: 1024},
	}
	if testing.Verbose() {
		cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	return cfg
}

func openEngine(t *testing.T, cfg Config) *Engine {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("the engine took more than a minute"))
	defer cancel()
	e, err := New(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// guestProcess finds the guest of a sandbox of the fake among the processes of this host.
func guestProcess(t *testing.T, id string) int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		text, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		args := strings.Split(string(text), "\x00")
		if len(args) >= 3 && strings.HasPrefix(args[0], guestDirectory) && args[1] == "daemon" && args[2] == id {
			return pid
		}
	}
	t.Fatalf("no guest of %s is running", id)
	return 0
}

func killGuest(t *testing.T, id string) {
	t.Helper()
	pid := guestProcess(t, id)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); syscall.Kill(pid, 0) == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the guest of %s does not end", id)
		}
	}
}
