package local

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/cgroup"
	"github.com/harvest-run/executord/internal/fault"
	"golang.org/x/sys/unix"
)

// abandon makes a sandbox with a process in it and closes the engine. What an
// executord after it finds is then the test's to spoil.
func abandon(t *testing.T, cfg Config, id string) (guest int, dir string) {
	t.Helper()
	e := openEngine(t, cfg)
	sb, err := e.Create(t.Context(), engine.Spec{ID: id})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := runPython(t.Context(), sb, "start", "import os; os.fork() == 0 and (os.setsid(), os.execvp('sleep', ['sleep', '1000']))"); err != nil {
		t.Fatalf("%v, %v", out, err)
	}
	guest, dir = sb.(*sandbox).process.pid, e.sandboxDir(id)
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	return guest, dir
}

// alive says whether any of a process is, be it its last thread.
func alive(pid int) bool {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return !ended(fd)
}

// reap takes the test's own child away when it has ended.
func reap(t *testing.T, pid int) {
	t.Helper()
	await(t, "the process ends", func() bool { return !alive(pid) })
	_, _ = syscall.Wait4(pid, nil, 0, nil)
}

// mustBeGone opens a sandbox that must be gone, and looks that nothing of it is left.
func mustBeGone(t *testing.T, e *Engine, id string) {
	t.Helper()
	if sb, err := e.Open(t.Context(), id); fault.KindOf(err) != fault.NotFound {
		t.Errorf("open %s: %v, %v, want a fault of kind NotFound", id, sb, err)
	}
	if _, err := os.Lstat(e.sandboxDir(id)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory of %s: %v, want that it is gone", id, err)
	}
	if ids, err := e.List(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("left: %q, %v", ids, err)
	}
}

func rewrite(t *testing.T, dir string, change func(*record)) {
	t.Helper()
	path := filepath.Join(dir, recordName)
	r, err := readRecord(path)
	if err != nil {
		t.Fatal(err)
	}
	change(&r)
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A record that cannot be read says nothing of the guest, which lives: it is found by
// what it listens on and ended.
func TestDamagedRecord(t *testing.T) {
	for name, text := range map[string]string{
		"empty": "", "cut off": `{"limits":{"memory_bytes":10`, "garbage": "\x00\xff", "of another kind": `[1,2]`, "wrong types": `{"pid":"x"}`,
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t)
			guest, dir := abandon(t, cfg, "damaged")
			if err := os.WriteFile(filepath.Join(dir, recordName), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			e := engineOver(t, cfg)
			mustBeGone(t, e, "damaged")
			if alive(guest) {
				t.Error("the guest lives on")
			}
		})
	}
}

// If the guest cannot be found by its socket either, as root its control group still
// ends it.
func TestDamagedRecordWithoutSocket(t *testing.T) {
	needRoot(t)
	cfg := testConfig(t)
	guest, dir := abandon(t, cfg, "damaged")
	if err := errors.Join(os.WriteFile(filepath.Join(dir, recordName), nil, 0o600), os.Remove(filepath.Join(dir, socketName))); err != nil {
		t.Fatal(err)
	}
	e := engineOver(t, cfg)
	mustBeGone(t, e, "damaged")
	reap(t, guest)
}

// The process that has the guest's number now is somebody else: it must not be hurt.
func TestProcessIDsAreUsedAgain(t *testing.T) {
	cfg := testConfig(t)
	guest, dir := abandon(t, cfg, "reused")
	stranger := exec.Command("sleep", "1000")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = stranger.Process.Kill()
		_ = stranger.Wait()
	}()
	if err := syscall.Kill(guest, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	reap(t, guest)
	for name, change := range map[string]func(*record){
		"of another that started at another time": func(r *record) { r.PID = stranger.Process.Pid },
		"of another in an earlier run of the host": func(r *record) {
			s, err := statOf(stranger.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			r.PID, r.StartTicks, r.Boot = stranger.Process.Pid, s.ticks, "an earlier one"
		},
		"of executord itself":        func(r *record) { r.PID = os.Getpid() },
		"of the host's first":        func(r *record) { r.PID = 1 },
		"of a group":                 func(r *record) { r.PID = -1 },
		"of nobody":                  func(r *record) { r.PID = 0 },
		"of what cannot be":          func(r *record) { r.PID = 1 << 30 },
		"of a kernel thread":         func(r *record) { r.PID = 2 },
		"of a thread of executord's": func(r *record) { r.PID = otherThread(t) },
	} {
		t.Run(name, func(t *testing.T) {
			mkdir(t, dir) // the case before was found dead, and all of it removed
			if _, err := os.Stat(filepath.Join(dir, recordName)); err != nil {
				text := `{"pid":1,"start_ticks":1,"boot":"` + mustBoot(t) + `"}`
				if err := os.WriteFile(filepath.Join(dir, recordName), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			rewrite(t, dir, change)
			e := engineOver(t, cfg)
			mustBeGone(t, e, "reused")
			if !alive(stranger.Process.Pid) {
				t.Fatal("the stranger was killed")
			}
		})
	}
}

func mustBoot(t *testing.T) string {
	t.Helper()
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	return boot
}

// otherThread is the id of a thread of this process that is not its first.
func otherThread(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if id := atoi(t, e.Name()); id != os.Getpid() {
			return id
		}
	}
	t.Skip("this process has one thread")
	return 0
}

// What executord leaves when it dies while it makes a sandbox.
func TestCrashLeftovers(t *testing.T) {
	for name, leave := range map[string]func(t *testing.T, e *Engine){
		"a directory":              func(t *testing.T, e *Engine) { mkdir(t, e.sandboxDir("half")) },
		"layers":                   func(t *testing.T, e *Engine) { mkdir(t, filepath.Join(e.sandboxDir("half"), layerName, "root/upper")) },
		"a record without a guest": func(t *testing.T, e *Engine) { writeRecord(t, e, `{"limits":{"pids":10}}`) },
		"a record that is not whole": func(t *testing.T, e *Engine) {
			mkdir(t, e.sandboxDir("half"))
			if err := os.WriteFile(filepath.Join(e.sandboxDir("half"), recordName+".new"), []byte(`{"lim`), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"control groups": func(t *testing.T, e *Engine) {
			needRoot(t)
			if err := makeGroups(e.groups.Open("half"), cgroup.Limits{MemoryBytes: 1 << 20}); err != nil {
				t.Fatal(err)
			}
		},
		"control groups in part": func(t *testing.T, e *Engine) {
			needRoot(t)
			g := e.groups.Open("half")
			if err := makeGroups(g, cgroup.Limits{}); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(filepath.Join(g.Paths().V2, "guest")); err != nil {
				t.Fatal(err)
			}
		},
		"control groups with a process": func(t *testing.T, e *Engine) {
			needRoot(t)
			g := e.groups.Open("half")
			if err := makeGroups(g, cgroup.Limits{}); err != nil {
				t.Fatal(err)
			}
			guest, err := os.Open(filepath.Join(g.Paths().V2, "guest"))
			if err != nil {
				t.Fatal(err)
			}
			defer guest.Close()
			cmd := exec.Command("sleep", "1000")
			cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(guest.Fd())}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cmd.Wait() })
		},
		"a socket that nobody answers": func(t *testing.T, e *Engine) {
			writeRecord(t, e, `not a record`)
			f, err := bindSocket(filepath.Join(e.sandboxDir("half"), socketName))
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEngine(t)
			leave(t, e)
			if ids, err := e.List(t.Context()); err != nil || len(ids) != 1 || ids[0] != "half" {
				t.Errorf("listed: %q, %v, want half", ids, err)
			}
			mustBeGone(t, e, "half")
			// And the same again, but met by a create.
			leave(t, e)
			sandboxFor(t, e, engine.Spec{ID: "half"})
		})
	}
}

func makeGroups(g *cgroup.Group, limits cgroup.Limits) error {
	guest, err := g.CreateForGuest()
	if err != nil {
		return err
	}
	return errors.Join(guest.Close(), g.CreateForCommands(0x60000000), g.Limit(limits))
}

func mkdir(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

func writeRecord(t *testing.T, e *Engine, text string) {
	t.Helper()
	mkdir(t, e.sandboxDir("half"))
	if err := os.WriteFile(filepath.Join(e.sandboxDir("half"), recordName), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Being short of descriptors says nothing about a sandbox: it must live on.
func TestNoDescriptorsLeft(t *testing.T) {
	cfg := testConfig(t)
	guest, _ := abandon(t, cfg, "lives")
	e := engineOver(t, cfg)
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	highest := 0
	for _, f := range entries {
		highest = max(highest, atoi(t, f.Name()))
	}
	failed := 0
	// One more at a time, so that each step of the way fails once.
	for limit := 3; limit <= highest+8; limit++ {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: uint64(limit), Max: old.Max}); err != nil {
			t.Fatal(err)
		}
		sb, err := e.Open(t.Context(), "lives")
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
			t.Fatal(err)
		}
		if err == nil {
			if failed == 0 {
				t.Error("no open failed, so nothing was shown")
			}
			if out, err := runPython(t.Context(), sb, "alive", `print("alive")`); err != nil || out.stdout != "alive\n" {
				t.Errorf("it does not answer: %v, %v", out, err)
			}
			if _, err := sb.Terminate(t.Context()); err != nil {
				t.Error(err)
			}
			return
		}
		failed++
		if fault.KindOf(err) == fault.NotFound || !errors.Is(err, syscall.EMFILE) {
			t.Fatalf("open with %d descriptors: %v, want that there were too few", limit, err)
		}
		if !alive(guest) {
			t.Fatalf("open with %d descriptors killed the sandbox", limit)
		}
	}
	t.Error("open failed to the end")
}

// Restarted from another control group, such as another login, executord finds what
// it made, and leaves nothing where it was.
func TestRestartFromAnotherGroup(t *testing.T) {
	needRoot(t)
	cfg := testConfig(t)
	before := groupParent(t)
	after := groupParent(t)
	cfg.CgroupParent = before
	e := openEngine(t, cfg)
	sb, err := e.Create(t.Context(), engine.Spec{ID: "moved", Limits: engine.Limits{MemoryBytes: 256 << 20, PIDs: 50}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := runPython(t.Context(), sb, "use", `x = b"x" * (50 << 20)`); err != nil {
		t.Fatal(err)
	}
	old := sb.(*sandbox).group.Paths()
	if !strings.Contains(old.V2, before) {
		t.Errorf("group %q, want it under %s", old.V2, before)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	cfg.CgroupParent = after
	e = engineOver(t, cfg)
	sb, err = e.Open(t.Context(), "moved")
	if err != nil {
		t.Fatal(err)
	}
	if u, err := sb.Usage(t.Context()); err != nil || u.PeakMemoryBytes < 50<<20 {
		t.Errorf("usage %+v, %v, want that of before", u, err)
	}
	if _, err := sb.Terminate(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, dir := range append([]string{old.V2}, old.V1["memory"], old.V1["pids"]) {
		for _, d := range []string{dir, filepath.Dir(dir)} {
			if _, err := os.Stat(d); dir != "" && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is left: %v", d, err)
			}
		}
	}
}

// groupParent makes a control group in every hierarchy, for the time of a test.
func groupParent(t *testing.T) string {
	t.Helper()
	parent := "/executord-test-" + strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-")) + "-" + filepath.Base(t.TempDir()) + "-" + filepath.Base(filepath.Dir(t.TempDir()))
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.procs"); err == nil {
		hierarchies = []string{"/sys/fs/cgroup/cgroup.procs"}
	}
	for _, h := range hierarchies {
		dir := filepath.Join(filepath.Dir(h), parent)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Logf("no group in %s: %v", filepath.Dir(h), err)
			continue
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
	}
	return parent
}
