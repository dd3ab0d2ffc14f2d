package guest

import (
	"os"
	"path/filepath"
	"strconv"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

const (
	// lookEvery is the least time between two looks at what a tree uses.
	lookEvery = time.Second
	// looks is how often in its idle time-out a tree is looked at.
	looks = 10
	// busyShare is the part of one core below which a tree counts as idle: what a shell
	// loop around sleep uses, or a program that polls, is no work.
	busyShare = 100
	// clockTick is the unit of times in /proc: USER_HZ, which is the same everywhere.
	clockTick = time.Second / 100
)

// idleness finds out how long a command has been idle. It is for the goroutine that
// leads the command; what others are told is in command.active.
type idleness struct {
	command *command
	timeout time.Duration
	grace   time.Duration
	timer   *time.Timer // fires when it is time to look
	looked  time.Time   // when the tree was last looked at
	cpu     time.Duration
}

// watchIdle begins to look; it never does where there is no idle time-out.
func (c *command) watchIdle(timeout, grace time.Duration) *idleness {
	i := &idleness{command: c, timeout: timeout, grace: grace, timer: time.NewTimer(time.Hour)}
	i.timer.Stop()
	if timeout > 0 {
		i.looked = c.begun
		c.touch(c.begun)
		i.timer.Reset(i.next())
	}
	return i
}

// stop ends the looking.
func (i *idleness) stop() { i.timer.Stop() }

// look looks at the command, and stops it if it has been idle for too long.
func (i *idleness) look() {
	now := time.Now()
	c := i.command
	cpu := treeCPU(c.tree)
	// A tree's time can also shrink, where processes are counted one by one: then one of
	// them has ended.
	used := max(cpu-i.cpu, i.cpu-cpu)
	if used > now.Sub(i.looked)/busyShare || c.spool.full() {
		c.touch(now)
	}
	i.looked, i.cpu = now, cpu
	if c.idle(now) >= i.timeout {
		c.stop(guestv1.StopCause_STOP_CAUSE_IDLE, i.grace)
		return
	}
	i.timer.Reset(i.next())
}

// next is how long to wait for the next look: a part of the time-out, or what is left
// of it, but never less than lookEvery.
func (i *idleness) next() time.Duration {
	left := i.timeout - i.command.idle(i.looked)
	return max(min(i.timeout/looks, left), lookEvery) - time.Since(i.looked)
}

// touch notes that the command was active. Input is activity too: whoever hands some to
// the command calls it.
func (c *command) touch(at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if at.After(c.active) {
		c.active = at
	}
}

// idle is how long the command has been idle; 0 where nobody looks.
func (c *command) idle(now time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.active.IsZero() {
		return 0
	}
	since := c.active
	if at, ok := c.spool.lastOutput(); ok && at.After(since) {
		since = at
	}
	return max(now.Sub(since), 0)
}

// treeCPU is the processor time that the processes of a tree have used.
func treeCPU(t tree) time.Duration {
	if user, system, ok := t.cpu(); ok {
		return user + system
	}
	var sum time.Duration
	pids, _ := t.processes()
	for _, pid := range pids {
		text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
		if err != nil {
			continue
		}
		sum += parseCPU(text)
	}
	return sum
}
