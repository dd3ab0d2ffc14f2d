package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The slack of every thread is set, and can be set back; as an ordinary user only that
// of the thread itself.
func TestLetTimersBeLate(t *testing.T) {
	slacks := func() map[string]int {
		t.Helper()
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil || len(threads) < 2 {
			t.Fatalf("%v, %v", threads, err)
		}
		found := make(map[string]int)
		for _, thread := range threads {
			text, err := os.ReadFile(filepath.Join("/proc", thread.Name(), "timerslack_ns"))
			if err == nil { // else it is gone, or not ours to see
				found[strings.TrimSpace(string(text))]++
			}
		}
		return found
	}
	if os.Geteuid() != 0 {
		letTimersBeLate(timerSlack) // which fails without a word
		return
	}
	before := slacks()
	if before["50000"] == 0 {
		t.Skipf("this process does not have the kernel's default: %v", before)
	}
	defer letTimersBeLate(50 * time.Microsecond)
	letTimersBeLate(timerSlack)
	if after := slacks(); after["300000"] == 0 || after["50000"] != 0 {
		t.Errorf("%v, before %v", after, before)
	}
}
