package cgroup

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

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host finds the groups of this host under a name of the test's own, and looks at its
// end whether anything is left of them.
func host(t *testing.T, parent string) *Host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making control groups takes root")
	}
	name := fmt.Sprintf("executord-test-%d-%d", os.Getpid(), time.Now().UnixNano())
	h, err := Find(name, parent)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		for _, dir := range h.dirs() {
			if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s is left", dir)
			}
		}
	})
	return h
}

func TestFindTellsWhatThisHostCan(t *testing.T) {
	h := host(t, "")
	for _, c := range controllers() {
		ok, how := h.Can(c)
		t.Logf("%s: %v, %s", c, ok, how)
		if how == "" {
			t.Errorf("%s: no word on how, or why not", c)
		}
		if ok != (h.missing[c] == "") {
			t.Errorf("%s: can %v, but missing because %q", c, ok, h.missing[c])
		}
	}
	ok, where := h.CanKill()
	t.Logf("kill: %v, %s", ok, where)
	if !ok {
		t.Error("version 2 can be mounted by root everywhere")
	}
}

func TestFindWhereThereIsNothing(t *testing.T) {
	h := host(t, "/there/is/no/such/group")
	for _, c := range controllers() {
		if ok, why := h.Can(c); ok || why == "" {
			t.Errorf("%s: %v, %q under a parent that is not there", c, ok, why)
		}
	}
}

// started is a process in a group.
type started struct {
	*exec.Cmd
	t *testing.T
}

// start starts a shell script in a group: cloned into version 2, as the guest does, and
// joining version 1 by itself.
func start(t *testing.T, g *Group, script string) started {
	t.Helper()
	cmd := exec.Command("bash", "-c", `for f in $TASKS; do echo 0 > $f; done; exec bash -c "$0"`, script)
	commands, err := g.OpenCommands()
	if err != nil {
		t.Fatal(err)
	}
	defer commands.Close()
	tasks, err := g.OpenTasks()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range tasks {
		names = append(names, f.Name())
		f.Close()
	}
	cmd.Env = append(os.Environ(), "TASKS="+strings.Join(names, " "))
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(commands.Fd()), Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start in a group: %v", err)
	}
	return started{cmd, t}
}

func (s started) wait() syscall.WaitStatus {
	s.t.Helper()
	err := s.Wait()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	return s.ProcessState.Sys().(syscall.WaitStatus)
}

// makeAll makes all groups of a sandbox, as the engine does; on an error nothing is left.
func makeAll(g *Group, limits Limits, owner int) error {
	guest, err := g.CreateForGuest()
	if guest != nil {
		guest.Close()
	}
	if err == nil {
		err = g.CreateForCommands(owner)
	}
	if err == nil {
		err = g.Limit(limits)
	}
	if err != nil {
		return errors.Join(err, g.Remove())
	}
	return nil
}

func create(t *testing.T, h *Host, name string, limits Limits) *Group {
	t.Helper()
	g := h.Open(name)
	if err := makeAll(g, limits, 0x60000000); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := errors.Join(g.Kill(ctx), g.Remove()); err != nil {
			t.Error(err)
		}
	})
	return g
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

func TestLimitsAreSet(t *testing.T) {
	h := host(t, "")
	g := create(t, h, "limited", Limits{MemoryBytes: 64 << 20, PIDs: 33, CPUMillis: 250})
	for _, c := range []struct {
		controller string
		files      map[string]string // in version 1 and 2
	}{
		{Memory, map[string]string{"memory.limit_in_bytes": "67108864", "memory.max": "67108864"}},
		{PIDs, map[string]string{"pids.max": "34"}}, // version 1 counts the guest's thread
		{CPU, map[string]string{"cpu.cfs_quota_us": "25000", "cpu.max": "25000 100000"}},
	} {
		dir, err := g.dirOf(c.controller)
		if err != nil {
			t.Skipf("this host: %v", err)
		}
		seen := 0
		for file, want := range c.files {
			text, err := os.ReadFile(filepath.Join(dir, file))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			seen++
			if got := strings.TrimSpace(string(text)); err != nil || got != want {
				t.Errorf("%s: %q, %v, want %q", file, got, err, want)
			}
		}
		if seen == 0 {
			t.Errorf("%s: no limit was found in %s", c.controller, dir)
		}
	}
}

func TestNoLimitsAreSetWhereNoneAreAsked(t *testing.T) {
	h := host(t, "")
	g := create(t, h, "free", Limits{})
	dir, err := g.dirOf(PIDs)
	if err != nil {
		t.Skipf("this host: %v", err)
	}
	if text, err := os.ReadFile(filepath.Join(dir, "pids.max")); err != nil || string(text) != "max\n" {
		t.Errorf("pids.max: %q, %v", text, err)
	}
}

func TestCreateThatFailsLeavesNothing(t *testing.T) {
	h := host(t, "")
	g := h.Open("wrong")
	// The kernel takes no quota under a millisecond.
	if err := makeAll(g, Limits{CPUMillis: 1}, 0x60000000); err == nil {
		t.Error("a quota of 0.1 ms was accepted")
	}
	if names, err := h.List(); err != nil || len(names) > 0 {
		t.Errorf("left: %q, %v", names, err)
	}
	// And one that is there already is not taken over.
	create(t, h, "there", Limits{})
	if _, err := h.Open("there").CreateForGuest(); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create again: %v, want that it exists", err)
	}
}

func TestUsageAndEvidence(t *testing.T) {
	h := host(t, "")
	g := create(t, h, "used", Limits{MemoryBytes: 64 << 20, PIDs: 20})
	usage := func() Usage {
		t.Helper()
		u, err := g.Usage()
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	if u := usage(); u.OOMKills != 0 || u.PIDsRefused != 0 {
		t.Errorf("before anything ran: %+v", u)
	}
	status := start(t, g, `python3 -c 'x = []
while True: x.append(b"x" * (1 << 20))'; exit $?`).wait()
	u := usage()
	if u.OOMKills < 1 || u.PeakMemoryBytes < 32<<20 || u.PeakMemoryBytes > 64<<20 || u.CPU == 0 {
		t.Errorf("after a kill for memory (%v): %+v", status, u)
	}
	start(t, g, `exec python3 -c 'import os, signal, time
try:
    while True:
        if os.fork() == 0: time.sleep(1000)
except BlockingIOError: os.kill(0, signal.SIGKILL)'`).wait()
	if again := usage(); again.PIDsRefused < 1 || again.OOMKills != u.OOMKills || again.CPU < u.CPU {
		t.Errorf("after forks were refused: %+v, before %+v", again, u)
	}
}

func TestUsageOfNothingIsNoError(t *testing.T) {
	h := host(t, "")
	if u, err := h.Open("never").Usage(); err != nil || u != (Usage{}) {
		t.Errorf("%+v, %v", u, err)
	}
}

func TestKillEndsAll(t *testing.T) {
	h := host(t, "")
	g := create(t, h, "crowd", Limits{})
	s := start(t, g, `trap '' TERM INT HUP; for i in $(seq 100); do sleep 1000 & setsid sleep 1000 & done; wait`)
	eventually(t, "200 processes run", func() bool { pids, _ := g.Processes(); return len(pids) > 200 })
	if err := g.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if pids, ok := g.Processes(); !ok || len(pids) > 0 {
		t.Errorf("left: %v, %v", pids, ok)
	}
	if status := s.wait(); status.Signal() != syscall.SIGKILL {
		t.Errorf("the first ended by %v", status)
	}
	// There is nothing to kill any more, and that is no error.
	if err := errors.Join(g.Kill(t.Context()), g.Remove(), g.Kill(t.Context()), g.Remove()); err != nil {
		t.Error(err)
	}
}

func TestKillEndsWhatForksWithoutEnd(t *testing.T) {
	h := host(t, "")
	g := create(t, h, "bomb", Limits{PIDs: 300})
	s := start(t, g, `exec python3 -c 'import os, time
while True:
    try: os.fork()
    except BlockingIOError: time.sleep(0.001)'`)
	eventually(t, "a fork is refused", func() bool { u, err := g.Usage(); return err != nil || u.PIDsRefused > 0 })
	if err := g.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.wait()
	if err := g.Remove(); err != nil {
		t.Error(err)
	}
}

// A process that the freezer of version 1 holds does not die before it is thawed, as
// one that waits for a broken disk does not.
func TestKillGivesUpWithItsContext(t *testing.T) {
	h := host(t, "")
	freezer := filepath.Join("/sys/fs/cgroup/freezer", h.name)
	if err := os.Mkdir(freezer, 0o755); err != nil {
		t.Skipf("no freezer of version 1 here: %v", err)
	}
	t.Cleanup(func() {
		if err := removeAll(freezer); err != nil {
			t.Error(err)
		}
	})
	g := create(t, h, "frozen", Limits{})
	s := start(t, g, "sleep 1000")
	if err := write(filepath.Join(freezer, "cgroup.procs"), strconv.Itoa(s.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	if err := write(filepath.Join(freezer, "freezer.state"), "FROZEN"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is frozen", func() bool {
		text, err := os.ReadFile(filepath.Join(freezer, "freezer.state"))
		return err != nil || string(text) == "FROZEN\n"
	})
	cause := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
	defer cancel()
	if err := g.Kill(ctx); !errors.Is(err, cause) {
		t.Errorf("%v, want the context's cause", err)
	}
	if err := write(filepath.Join(freezer, "freezer.state"), "THAWED"); err != nil {
		t.Fatal(err)
	}
	if err := g.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	s.wait()
}

// Without version 2 there is nothing to kill by, and the callers are told.
func TestWithoutVersion2(t *testing.T) {
	h := &Host{v1: map[string]string{}, inV2: map[string]bool{}, missing: map[string]string{CPU: "none here"}}
	if ok, why := h.CanKill(); ok || why == "" {
		t.Errorf("can kill: %v, %q", ok, why)
	}
	if ok, why := h.Can(CPU); ok || why != "none here" {
		t.Errorf("can limit: %v, %q", ok, why)
	}
	g := h.Open("x")
	if _, ok := g.Processes(); ok {
		t.Error("processes are said to be counted")
	}
	guest, err := g.CreateForGuest()
	commands, err2 := g.OpenCommands()
	if guest != nil || commands != nil || errors.Join(err, err2) != nil {
		t.Errorf("groups of version 2: %v, %v, %v, %v", guest, commands, err, err2)
	}
	if err := errors.Join(makeAll(g, Limits{}, 0), g.Kill(t.Context()), g.Remove()); err != nil {
		t.Error(err)
	}
	if err := makeAll(g, Limits{CPUMillis: 100}, 0); err == nil {
		t.Error("a limit was accepted that no controller holds")
	}
}

func TestRemoveOfABusyGroupIsAnError(t *testing.T) {
	h := host(t, "")
	g := create(t, h, "busy", Limits{})
	s := start(t, g, "sleep 1000")
	if err := g.Remove(); !errors.Is(err, unix.EBUSY) {
		t.Errorf("%v, want EBUSY", err)
	}
	if err := g.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	s.wait()
}

func TestGuestAndCommandsHaveGroupsOfTheirOwn(t *testing.T) {
	h := host(t, "")
	g := create(t, h, "parts", Limits{MemoryBytes: 1 << 30})
	guest, err := os.Open(filepath.Join(g.v2, guestGroup))
	if err != nil {
		t.Fatal(err)
	}
	defer guest.Close()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(guest.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if pids, ok := g.Processes(); !ok || len(pids) != 0 {
		t.Errorf("the guest is counted as a command: %v, %v", pids, ok)
	}
	// The guest's part belongs to the root of the sandbox, the limits do not.
	for path, want := range map[string]uint32{
		"": 0, "cgroup.procs": 0x60000000, "commands": 0x60000000, "commands/cgroup.procs": 0x60000000, "guest": 0,
		"guest/cgroup.procs": 0x60000000, "commands/cgroup.subtree_control": 0, "cgroup.subtree_control": 0, "cgroup.kill": 0, "commands/cgroup.max.descendants": 0,
	} {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(g.v2, path), &st); err != nil || st.Uid != want || st.Gid != want {
			t.Errorf("%q belongs to %d:%d, %v, want %d", path, st.Uid, st.Gid, err, want)
		}
	}
	if err := g.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the guest was not killed")
	}
}

func TestList(t *testing.T) {
	h := host(t, "")
	if names, err := h.List(); err != nil || len(names) > 0 {
		t.Errorf("at first: %q, %v", names, err)
	}
	create(t, h, "a", Limits{})
	b := create(t, h, "b", Limits{})
	// What was made only in part is listed too.
	if err := os.Remove(filepath.Join(b.v2, commandGroup)); err != nil {
		t.Fatal(err)
	}
	for dir := range b.v1 {
		if err := os.Remove(b.v1[dir]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	names, err := h.List()
	slices.Sort(names)
	if err != nil || !slices.Equal(names, []string{"a", "b"}) {
		t.Errorf("%q, %v, want a and b", names, err)
	}
}

// An executord that is started from another group finds the groups of the one before.
func TestGroupsAreFoundFromElsewhere(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("making control groups takes root")
	}
	before, after := elsewhere(t), elsewhere(t)
	old := &Host{}
	g := create(t, before, "moved", Limits{MemoryBytes: 64 << 20})
	s := start(t, g, "sleep 1000")
	*old = *before

	if _, err := os.Stat(after.Open("moved").v2); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("both look in the same place: %v", err)
	}
	found := after.OpenAt("moved", g.Paths())
	if pids, ok := found.Processes(); !ok || len(pids) != 1 {
		t.Errorf("processes %v, %v, want one", pids, ok)
	}
	eventually(t, "its usage is counted", func() bool { u, err := found.Usage(); return err == nil && u.PeakMemoryBytes > 0 })
	if err := errors.Join(found.Kill(t.Context()), found.Remove()); err != nil {
		t.Fatal(err)
	}
	s.wait()
	for _, dir := range old.dirs() {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left of the executord before", dir)
		}
	}
}

// elsewhere is a host whose groups lie under a parent of the test's own.
func elsewhere(t *testing.T) *Host {
	t.Helper()
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	parent := fmt.Sprintf("/executord-test-parent-%d", time.Now().UnixNano())
	l := parse(string(own), string(mounts), parent)
	dirs := slices.Clone(l.v2)
	for _, dir := range l.v1 {
		dirs = append(dirs, dir)
	}
	for _, dir := range dirs {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(dir) }) // after the host's own
	}
	return host(t, parent)
}

func TestPathsWithoutARecord(t *testing.T) {
	h := host(t, "")
	if got, want := h.OpenAt("x", Paths{}), h.Open("x"); got.v2 != want.v2 || len(got.v1) != len(want.v1) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestReadField(t *testing.T) {
	file := filepath.Join(t.TempDir(), "events")
	if err := os.WriteFile(file, []byte("low 0\nmax 17\nmaximum 3\nempty\nbad x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int64{"low": 0, "max": 17, "maximum": 3, "none": 0} {
		if got, err := readField(file, name); err != nil || got != want {
			t.Errorf("%s: %d, %v, want %d", name, got, err, want)
		}
	}
	for _, name := range []string{"empty", "bad"} {
		if _, err := readField(file, name); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := os.WriteFile(file, []byte("12345\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := readField(file, ""); err != nil || got != 12345 {
		t.Errorf("the only number: %d, %v", got, err)
	}
	if _, err := readField(file+"x", "max"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}
