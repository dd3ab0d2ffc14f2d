package guest

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

const (
	// drainWindow is how long processes that outlive their leader may go on before
	// they are killed: enough for the tee behind `exec > >(tee log)` to write its
	// last line, too short to be felt. Only time in which they could have written it
	// counts.
	drainWindow = 100 * time.Millisecond
	// lastWords is how much output such processes may write while we keep them waiting
	// for a reader: more than a tee can hold.
	lastWords = 4 << 20
	// starvedPatience bounds the time that does not count because the machine had none
	// for them.
	starvedPatience = 3 * time.Second
	// observedStrays is how many of them are looked at for that.
	observedStrays = 32
)

// awaitStrays waits until nothing of the tree is left: as long as the grace of a stop
// goes on, else only for the moment it takes to write some last words.
func (c *command) awaitStrays(end *ending) bool {
	if end.find() {
		return true
	}
	if end.cause != guestv1.StopCause_STOP_CAUSE_UNSPECIFIED {
		return c.awaitGrace(end)
	}
	enough := c.spool.written() + lastWords
	patience := starvedPatience
	watch := newStarvation()
	for left, pause := drainWindow, 200*time.Microsecond; left > 0; pause = min(2*pause, 10*time.Millisecond) {
		cause, at := c.order()
		ordered := cause != guestv1.StopCause_STOP_CAUSE_UNSPECIFIED
		if ordered && time.Until(at) < left {
			return c.awaitGrace(end)
		}
		var room <-chan struct{}
		if !ordered {
			room = c.spool.blocked(enough)
		}
		begun := time.Now()
		if c.pause(pause, room) && room == nil {
			// A pause that took longer than it should have: we did not get to run.
			counts := min(time.Since(begun), pause)
			starved := min(watch.since(c.tree, counts), patience)
			patience -= starved
			left -= counts - starved
		}
		if isEmpty(c.tree) {
			end.empty = true
			return true
		}
	}
	return false
}

// awaitGrace waits until the grace of a stop is over or nothing is left.
func (c *command) awaitGrace(end *ending) bool {
	for pause := 200 * time.Microsecond; ; pause = min(2*pause, 10*time.Millisecond) {
		_, at := c.order()
		left := time.Until(at)
		if left <= 0 {
			return false
		}
		c.pause(min(pause, left), nil)
		if isEmpty(c.tree) {
			end.empty = true
			return true
		}
	}
}

// pause waits for so long, or until room is given up if that is what is waited for;
// false if a stop was ordered meanwhile.
func (c *command) pause(d time.Duration, room <-chan struct{}) bool {
	var tick <-chan time.Time
	if room == nil {
		t := time.NewTimer(d)
		defer t.Stop()
		tick = t.C
	}
	select {
	case <-tick:
	case <-room:
	case <-c.ordered:
		return false
	}
	return true
}

// starvation finds out for how long processes would have run and could not: they
// waited for a processor or a disk.
type starvation struct{ last map[int]schedule }

// schedule is what the kernel tells of a process's time.
type schedule struct {
	state   byte
	ran     time.Duration // on a processor
	waiting time.Duration // for one, told when it got one
}

func newStarvation() *starvation { return &starvation{last: make(map[int]schedule)} }

// since returns for how much of the time that passed since the last call one of a
// tree's processes was starved.
func (s *starvation) since(t tree, passed time.Duration) time.Duration {
	pids, _ := t.processes()
	now := make(map[int]schedule, len(pids))
	var most time.Duration
	for _, pid := range pids[:min(len(pids), observedStrays)] {
		this, ok := scheduleOf(pid)
		if !ok {
			continue
		}
		now[pid] = this
		if before, ok := s.last[pid]; ok {
			most = max(most, starvedBetween(before, this, passed))
		}
	}
	s.last = now
	return min(most, passed)
}

// starvedBetween compares what was told of a process at the two ends of a time.
func starvedBetween(before, after schedule, passed time.Duration) time.Duration {
	switch {
	case after.state == 'D':
		return passed
	case after.state == 'R' && after.ran == before.ran:
		return passed // it waits still
	}
	return min(max(after.waiting-before.waiting, 0), passed)
}

// scheduleOf reads what the kernel tells of a process; false if it does not.
func scheduleOf(pid int) (schedule, bool) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return schedule{}, false
	}
	p, err := parseStat(pid, stat)
	if err != nil {
		return schedule{}, false
	}
	text, err := os.ReadFile(filepath.Join(dir, "schedstat"))
	if err != nil {
		return schedule{}, false
	}
	fields := strings.Fields(string(text))
	if len(fields) < 2 {
		return schedule{}, false
	}
	ran, err1 := strconv.ParseInt(fields[0], 10, 64)
	waiting, err2 := strconv.ParseInt(fields[1], 10, 64)
	return schedule{p.state, time.Duration(ran), time.Duration(waiting)}, err1 == nil && err2 == nil
}
