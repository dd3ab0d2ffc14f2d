package cgroup

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Version 2 with controllers cannot be had where version 1 holds them. Two things
// stand in for it: directories that look like it, and hugetlb, which is in version 2
// even on hybrid hosts.
func TestFindV2TakesTheBestHome(t *testing.T) {
	// fake makes a home in which our directory is there already, as the kernel would
	// have made it. A controller that is not offered cannot be handed down.
	fake := func(t *testing.T, handedDown string, writable bool) string {
		home := t.TempDir()
		dir := filepath.Join(home, "executord-x")
		for _, d := range []string{home, dir} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(d, "cgroup.subtree_control"), []byte(handedDown), 0o600); err != nil {
				t.Fatal(err)
			}
			if !writable {
				// As a group with processes of its own: it can be read, not written.
				if err := os.Remove(filepath.Join(d, "cgroup.subtree_control")); err != nil {
					t.Fatal(err)
				}
				if err := os.Mkdir(filepath.Join(d, "cgroup.subtree_control"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		return home
	}
	newHost := func() *Host {
		return &Host{
			name: "executord-x", v1: map[string]string{}, inV2: map[string]bool{},
			missing: map[string]string{Memory: "no v1", PIDs: "no v1", CPU: "no v1"},
		}
	}
	t.Run("all in the first", func(t *testing.T) {
		first, second := fake(t, "cpu memory pids", true), fake(t, "cpu memory pids", true)
		h := newHost()
		if err := h.findV2([]string{first, second}); err != nil {
			t.Error(err)
		}
		if h.v2 != filepath.Join(first, "executord-x") || len(h.inV2) != 3 || len(h.missing) != 0 {
			t.Errorf("%+v", h)
		}
	})
	t.Run("the second has more", func(t *testing.T) {
		first, second := fake(t, "", false), fake(t, "cpu memory pids", true)
		h := newHost()
		if err := h.findV2([]string{first, second}); err == nil {
			t.Error("nothing is said of the first")
		}
		if h.v2 != filepath.Join(second, "executord-x") || len(h.inV2) != 3 || len(h.missing) != 0 {
			t.Errorf("%+v", h)
		}
	})
	t.Run("neither has any", func(t *testing.T) {
		first, second := fake(t, "", false), fake(t, "", false)
		h := newHost()
		if err := h.findV2([]string{first, second}); err == nil {
			t.Error("no error")
		}
		// Killing works without a controller.
		if h.v2 != filepath.Join(first, "executord-x") || len(h.inV2) != 0 || len(h.missing) != 3 {
			t.Errorf("%+v", h)
		}
	})
	t.Run("what version 1 has is not asked for", func(t *testing.T) {
		home := fake(t, "", false)
		h := newHost()
		for _, c := range controllers() {
			h.v1[c] = "/somewhere"
			delete(h.missing, c)
		}
		if err := h.findV2([]string{home}); err != nil {
			t.Error(err)
		}
		if h.v2 == "" || len(h.inV2) != 0 {
			t.Errorf("%+v", h)
		}
	})
	t.Run("no home at all", func(t *testing.T) {
		h := newHost()
		if err := h.findV2([]string{"/proc/nowhere"}); err == nil || h.v2 != "" {
			t.Errorf("%v, %+v", err, h)
		}
	})
}

func TestEnableInVersion2(t *testing.T) {
	h := host(t, "")
	root := filepath.Dir(h.v2)
	offered, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil || !contains(string(offered), "hugetlb") {
		t.Skipf("version 2 does not offer hugetlb here: %q, %v", offered, err)
	}
	had, err := os.ReadFile(filepath.Join(root, "cgroup.subtree_control"))
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(h.v2, "home")
	below := filepath.Join(dir, "below")
	if err := os.MkdirAll(below, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeAll(dir); err != nil {
			t.Error(err)
		}
		if !contains(string(had), "hugetlb") {
			_ = write(filepath.Join(h.v2, "cgroup.subtree_control"), "-hugetlb")
			_ = write(filepath.Join(root, "cgroup.subtree_control"), "-hugetlb")
		}
	})
	// From the root down, twice: what is handed down already is no error.
	for range 2 {
		if err := errors.Join(enable("hugetlb", root, h.v2), enable("hugetlb", h.v2, dir)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := os.ReadFile(filepath.Join(below, "cgroup.controllers")); err != nil || !contains(string(got), "hugetlb") {
		t.Errorf("below the home there are the controllers %q, %v", got, err)
	}
	if err := enable("nonsense", h.v2, dir); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a controller that is none: %v", err)
	}

	// A group with processes of its own cannot hand anything down, and that is said.
	busy := filepath.Join(dir, "busy")
	if err := os.Mkdir(busy, 0o755); err != nil {
		t.Fatal(err)
	}
	at, err := os.Open(busy)
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(at.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	err = enable("hugetlb", dir, busy)
	if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "processes of its own") {
		t.Errorf("a group with processes: %v, want EBUSY and why", err)
	}
	if err := write(filepath.Join(busy, "cgroup.kill"), "1"); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
}

func TestDetachedMount(t *testing.T) {
	h := host(t, "")
	dir, err := mountDetached()
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	// It is the same tree, and nobody else sees the mount.
	at := "/proc/self/fd/" + strconv.Itoa(int(dir.Fd()))
	if _, err := os.Stat(filepath.Join(at, "cgroup.controllers")); err != nil {
		t.Error(err)
	}
	if after, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Count(string(after), "cgroup2") != strings.Count(string(mounts), "cgroup2") {
		t.Errorf("the mount is seen: %v", err)
	}
	// Groups can be made, killed and removed through it, and their path is not kept.
	through := &Host{name: h.name + "-detached", v1: map[string]string{}, inV2: map[string]bool{}, missing: map[string]string{}}
	through.detached, err = mountDetached()
	if err != nil {
		t.Fatal(err)
	}
	defer through.Close()
	if err := through.findV2([]string{"/proc/self/fd/" + strconv.Itoa(int(through.detached.Fd()))}); err != nil {
		t.Logf("controllers: %v", err)
	}
	g := through.Open("x")
	if err := makeAll(g, Limits{}, 0x60000000); err != nil {
		t.Fatal(err)
	}
	if p := g.Paths(); p.V2 != "" {
		t.Errorf("the path %q would be kept", p.V2)
	}
	if again := through.OpenAt("x", g.Paths()); again.v2 != g.v2 {
		t.Errorf("found again at %q, want %q", again.v2, g.v2)
	}
	s := start(t, g, "sleep 1000")
	if err := g.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	s.wait()
	if err := g.Remove(); err != nil {
		t.Error(err)
	}
}

// What is written and read where version 2 has the controllers, on a directory with
// the files that the kernel would have made.
func TestControllersOfVersion2(t *testing.T) {
	dir := t.TempDir()
	commands := filepath.Join(dir, "x", commandGroup)
	if err := os.MkdirAll(commands, 0o755); err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{
		"memory.max": "", "memory.swap.max": "", "pids.max": "", "cpu.max": "",
		"memory.peak": "5000\n", "memory.events": "low 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n",
		"pids.events": "max 9\n", "cpu.stat": "usage_usec 1500000\nuser_usec 1\nsystem_usec 2\n",
	} {
		if err := os.WriteFile(filepath.Join(commands, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h := &Host{v1: map[string]string{}, v2: dir, inV2: map[string]bool{Memory: true, PIDs: true, CPU: true}}
	g := h.Open("x")
	for _, c := range controllers() {
		if ok, how := h.Can(c); !ok || !strings.Contains(how, "version 2") {
			t.Errorf("%s: %v, %q", c, ok, how)
		}
	}
	if err := g.Limit(Limits{MemoryBytes: 1 << 20, PIDs: 33, CPUMillis: 250}); err != nil {
		t.Fatal(err)
	}
	// The guest has a group of its own here, so it is not counted.
	for file, want := range map[string]string{"memory.max": "1048576", "memory.swap.max": "0", "pids.max": "33", "cpu.max": "25000 100000"} {
		if got, err := os.ReadFile(filepath.Join(commands, file)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v, want %q", file, got, err, want)
		}
	}
	want := Usage{PeakMemoryBytes: 5000, OOMKills: 2, PIDsRefused: 9, CPU: 1500 * time.Millisecond}
	if got, err := g.Usage(); err != nil || got != want {
		t.Errorf("usage %+v, %v, want %+v", got, err, want)
	}
	// An older kernel has no memory.peak; a broken file is an error and not a 0.
	if err := errors.Join(os.Remove(filepath.Join(commands, "memory.peak")), os.WriteFile(filepath.Join(commands, "pids.events"), []byte("max x\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if got, err := g.Usage(); err == nil || got.PeakMemoryBytes != 0 || got.OOMKills != 2 {
		t.Errorf("usage %+v, %v, want an error about pids.events", got, err)
	}
	// No swap: that limit is left out. No memory limit: that is an error.
	if err := os.Remove(filepath.Join(commands, "memory.swap.max")); err != nil {
		t.Fatal(err)
	}
	if err := g.Limit(Limits{MemoryBytes: 2 << 20}); err != nil {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(commands, "memory.max")); err != nil {
		t.Fatal(err)
	}
	if err := g.Limit(Limits{MemoryBytes: 2 << 20}); err == nil {
		t.Error("a limit was said to be set that was not")
	}
	if files, err := g.OpenTasks(); err != nil || len(files) != 0 {
		t.Errorf("tasks files of version 1: %v, %v", files, err)
	}
}
