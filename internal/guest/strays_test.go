package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func TestStarvedBetween(t *testing.T) {
	const ms = time.Millisecond
	for name, c := range map[string]struct {
		before, after schedule
		want          time.Duration
	}{
		"sleeps":                   {schedule{'S', 5 * ms, 1 * ms}, schedule{'S', 5 * ms, 1 * ms}, 0},
		"runs":                     {schedule{'R', 5 * ms, 1 * ms}, schedule{'R', 15 * ms, 1 * ms}, 0},
		"waits for a processor":    {schedule{'R', 5 * ms, 1 * ms}, schedule{'R', 5 * ms, 1 * ms}, 10 * ms},
		"had to wait in between":   {schedule{'S', 5 * ms, 1 * ms}, schedule{'S', 6 * ms, 4 * ms}, 3 * ms},
		"had to wait, and runs":    {schedule{'R', 5 * ms, 1 * ms}, schedule{'R', 8 * ms, 8 * ms}, 7 * ms},
		"had to wait since before": {schedule{'R', 5 * ms, 1 * ms}, schedule{'R', 6 * ms, 500 * ms}, 10 * ms},
		"waits for a disk":         {schedule{'S', 5 * ms, 1 * ms}, schedule{'D', 6 * ms, 1 * ms}, 10 * ms},
		"stopped":                  {schedule{'R', 5 * ms, 1 * ms}, schedule{'T', 5 * ms, 1 * ms}, 0},
		"told nonsense":            {schedule{'S', 5 * ms, 9 * ms}, schedule{'S', 5 * ms, 1 * ms}, 0},
	} {
		if got := starvedBetween(c.before, c.after, 10*ms); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// TestStarvation watches a process that sleeps and one that has to share a processor
// with others.
func TestStarvation(t *testing.T) {
	if _, ok := scheduleOf(os.Getpid()); !ok {
		t.Skip("this kernel does not tell how processes are scheduled")
	}
	start := func(name string, args ...string) int {
		cmd := exec.Command(name, args...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Signal(syscall.SIGKILL)
			_ = cmd.Wait()
		})
		return cmd.Process.Pid
	}
	watch := func(pid int) (total time.Duration) {
		tree := &fakeTree{}
		tree.set(pid)
		w := newStarvation()
		if first := w.since(tree, time.Second); first != 0 {
			t.Errorf("starved for %v before it was looked at", first)
		}
		for range 20 {
			time.Sleep(10 * time.Millisecond)
			total += w.since(tree, 10*time.Millisecond)
		}
		return total
	}
	sleeps := start("sleep", "60")
	var crowd int
	for range 6 {
		crowd = start("taskset", "-c", "0", "sh", "-c", "while :; do :; done")
	}
	time.Sleep(200 * time.Millisecond)
	idle, starved := watch(sleeps), watch(crowd)
	if idle > 20*time.Millisecond || starved < 5*idle || starved < 20*time.Millisecond {
		t.Errorf("of 200 ms one that sleeps was starved for %v, one of six on a processor for %v", idle, starved)
	}
	if _, ok := scheduleOf(1 << 23); ok {
		t.Error("a process that is not there is scheduled")
	}
}

// throttled makes a control group whose processes get a two-hundredth of a processor, in
// rare turns, or skips the test.
func throttled(t *testing.T) (tasks string) {
	t.Helper()
	dir, err := os.MkdirTemp("/sys/fs/cgroup/cpu", "guest-test-")
	if err != nil {
		t.Skip("no control group of version 1 can be made: ", err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	for file, text := range map[string]string{"cpu.cfs_period_us": "200000", "cpu.cfs_quota_us": "1000"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0); err != nil {
			t.Skip(err)
		}
	}
	return filepath.Join(dir, "tasks")
}

// TestTailOfStarvedTee gives the tee so little of the processor that it cannot write
// its last line within the window.
func TestTailOfStarvedTee(t *testing.T) {
	overTrees(t, func(t *testing.T, g *guestProcess) {
		const size = 50 << 10
		script := "exec > >(echo $BASHPID > %s; for ((i = 0; i < 1000; i++)); do :; done; exec tee f); head -c %d /dev/zero; exit 3"
		o := g.run(g.sh("x", fmt.Sprintf(script, throttled(t), size)))
		wantCode(t, o, 3)
		if len(o.stdout) != size {
			t.Errorf("%d bytes of %d", len(o.stdout), size)
		}
	})
}
