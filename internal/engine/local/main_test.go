package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestbinary/guestbuild"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// ordinaryUser is the one that the tests are run as a second time.
const ordinaryUser = 65534

// Names of the environment by which the second run knows its place.
const (
	envGuest = "EXECUTORD_TEST_GUEST" // a file with the guest
	envTemp  = "EXECUTORD_TEST_TEMP"  // where to put files
)

// guestOf is the guest that TestMain built, or was given.
func guestOf(t testing.TB) []byte {
	t.Helper()
	guest, err := os.ReadFile(os.Getenv(envGuest))
	if err != nil {
		t.Fatal(err)
	}
	return guest
}

func TestMain(m *testing.M) {
	code, err := runAll(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "FAIL:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// runAll gives the tests a guest and a directory, and looks whether they leave
// anything: files, processes, control groups, mounts, descriptors, goroutines.
func runAll(m *testing.M) (code int, err error) {
	dir := os.Getenv(envTemp)
	if dir == "" {
		if dir, err = os.MkdirTemp("", "executord-local-test-"); err != nil {
			return 1, err
		}
		defer os.RemoveAll(dir)
		// An ordinary user must get through to what it is given below.
		if err := os.Chmod(dir, 0o755); err != nil {
			return 1, err
		}
		if _, err := guestbuild.Build(dir); err != nil {
			return 1, err
		}
		os.Setenv(envGuest, filepath.Join(dir, "executor-guest"))
	}
	temp := filepath.Join(dir, "tmp-"+strconv.Itoa(os.Geteuid()))
	if err := os.Mkdir(temp, 0o755); err != nil {
		return 1, err
	}
	os.Setenv("TMPDIR", temp)

	// Orphans of what the tests start come to this process, so that none is missed.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return 1, err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return 1, err
	}
	code = m.Run()
	if code != 0 {
		// What failed may well have left something, which would live on.
		endChildren()
		return code, leftGroups(temp)
	}
	return 0, errors.Join(goleak.Find(), leftProcesses(), leftMounts(string(mounts), temp), leftLoops(temp), leftGroups(temp), leftDescriptors(), leftFiles(temp))
}

// endChildren kills what the tests started and did not end; guests end all in their
// sandboxes.
func endChildren() {
	for {
		lists, _ := filepath.Glob("/proc/self/task/*/children")
		for _, list := range lists {
			text, _ := os.ReadFile(list)
			for field := range strings.FieldsSeq(string(text)) {
				if pid, err := strconv.Atoi(field); err == nil {
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
			}
		}
		if _, err := syscall.Wait4(-1, nil, 0, nil); err == syscall.ECHILD {
			return
		}
	}
}

func leftProcesses() error {
	var status syscall.WaitStatus
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		switch {
		case errors.Is(err, syscall.ECHILD):
			return nil
		case err != nil:
			return err
		case pid > 0:
			return fmt.Errorf("process %d was left unreaped", pid)
		case time.Now().After(deadline):
			text, _ := exec.Command("ps", "-o", "pid,args", "--ppid", strconv.Itoa(os.Getpid())).Output()
			return fmt.Errorf("processes are left:\n%s", text)
		}
	}
}

func leftMounts(before, temp string) error {
	now, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(now)) {
		// Where the guest puts a root together, if that ever showed outside; other
		// programs may mount elsewhere meanwhile.
		if point := strings.Fields(line)[4]; !strings.Contains(before, line) &&
			(point == "/tmp" || strings.HasPrefix(point, "/tmp/root") || strings.HasPrefix(point, "/tmp/l") || strings.HasPrefix(point, temp)) {
			return fmt.Errorf("a mount is left: %s", line)
		}
	}
	return nil
}

// leftGroups looks for control groups of the engines that the tests opened, and removes
// them; other executords may work on this host meanwhile.
func leftGroups(temp string) error {
	keys, err := os.ReadFile(filepath.Join(temp, keysName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(temp, keysName)); err != nil {
		return err
	}
	var (
		left   []error
		groups []string
	)
	err = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "executord-") &&
			slices.Contains(strings.Fields(string(keys)), strings.TrimPrefix(d.Name(), "executord-")) {
			left = append(left, fmt.Errorf("control group %s is left", path))
			groups = append(groups, path)
		}
		return nil
	})
	for _, top := range groups {
		var below []string
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				below = append(below, path)
			}
			return nil
		})
		for _, dir := range slices.Backward(below) {
			_ = os.Remove(dir)
		}
	}
	return errors.Join(append(left, err)...)
}

// Names in the directory for temporary files: of the file in which the tests note the
// keys of their engines, and of their images.
const (
	keysName   = "keys"
	imagesName = "images"
)

func leftDescriptors() error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	var left []error
	for _, e := range entries {
		link, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err == nil && (strings.Contains(link, "executor") || strings.Contains(link, "pidfd")) {
			left = append(left, fmt.Errorf("descriptor %s is left: %s", e.Name(), link))
		}
	}
	return errors.Join(left...)
}

func leftFiles(temp string) error {
	if err := os.RemoveAll(filepath.Join(temp, imagesName)); err != nil {
		return err
	}
	entries, err := os.ReadDir(temp)
	if err != nil {
		return err
	}
	for _, e := range entries {
		return fmt.Errorf("%s is left in the directory for temporary files", e.Name())
	}
	return os.Remove(temp)
}

// testConfig is a Config over a fresh state directory. Its images are shared with the
// other tests': making one takes longer than most tests.
func testConfig(t testing.TB) Config {
	t.Helper()
	cfg := freshConfig(t)
	images := filepath.Join(os.Getenv("TMPDIR"), imagesName)
	if err := errors.Join(os.MkdirAll(images, 0o700), os.Mkdir(filepath.Join(cfg.StateDir, "local"), 0o700),
		os.Symlink(images, filepath.Join(cfg.StateDir, "local", "images"))); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// freshConfig is a Config over a fresh state directory with nothing in it.
func freshConfig(t testing.TB) Config {
	t.Helper()
	cfg := Config{
		StateDir: t.TempDir(), Guest: guestOf(t),
		// Apart from the ranges of an executord with the default configuration.
		UIDBase: 0x60000000, UIDCount: 512,
		Defaults: engine.Limits{MemoryBytes: 1 << 30, PIDs: 512, CPUMillis: 64_000},
	}
	noteKey(t, cfg)
	return cfg
}

func noteKey(t testing.TB, cfg Config) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(os.Getenv("TMPDIR"), keysName), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := fmt.Fprintln(f, (&Engine{cfg: cfg}).key()); err != nil {
		t.Fatal(err)
	}
}

// openEngine opens an engine; whoever asked closes it.
func openEngine(t testing.TB, cfg Config) *Engine {
	t.Helper()
	e, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatalf("open the engine: %v", err)
	}
	return e
}

// engineOver opens an engine for one test and closes it with the test, which must have
// ended its sandboxes by then.
func engineOver(t testing.TB, cfg Config) *Engine {
	t.Helper()
	e := openEngine(t, cfg)
	t.Cleanup(func() {
		ids, err := e.List(context.Background())
		if err != nil || len(ids) > 0 {
			t.Errorf("sandboxes are left: %q, %v", ids, err)
		}
		if err := e.Close(); err != nil {
			t.Errorf("close the engine: %v", err)
		}
	})
	return e
}

// newEngine opens an engine over a fresh state for one test.
func newEngine(t testing.TB) *Engine {
	t.Helper()
	return engineOver(t, testConfig(t))
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("takes root: an ordinary user's engine has nothing of this")
	}
}

// await polls until a condition holds.
func await(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}
