package daemon

import (
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// timerSlack is how late the kernel may wake the threads of executord: less than the
// millisecond to which the runtime's timers are exact. With the kernel's default of
// 50 µs the runtime, which looks every 20 µs after each time that something happened
// whether a thread holds others up, interrupts the programs beside it as often.
const timerSlack = 300 * time.Microsecond

// letTimersBeLate sets the slack of the threads that there are, of which later ones have
// it. The runtime's own can only be reached like this. Whoever may not do that loses a
// little speed.
func letTimersBeLate(slack time.Duration) {
	threads, _ := filepath.Glob("/proc/self/task/[0-9]*")
	for _, t := range threads {
		_ = os.WriteFile(filepath.Join("/proc", filepath.Base(t), "timerslack_ns"), []byte(strconv.FormatInt(slack.Nanoseconds(), 10)), 0)
	}
}
