package guest

import (
	"bytes"
	"strconv"
	"syscall"
	"time"
)

// A tree is all processes that come from one command, however they tried to get
// away from it.
type tree interface {
	// adopt makes the command that attr starts the tree's first process.
	adopt(attr *syscall.SysProcAttr)
	// started tells the tree its first process, before that can be reaped.
	started(pid int)
	// processes are those alive. An error means that it cannot be said at the moment.
	processes() ([]int, error)
	// kill sends KILL to all and waits until none is left or the patience is over.
	// It returns whether none is left.
	kill(patience time.Duration) (empty bool)
	// cpu is the processor time of all of them; false where it is not counted.
	cpu() (user, system time.Duration, ok bool)
	// remove gives up what the tree holds; it must be empty.
	remove()
}

// signalAll sends a signal to every process of a tree.
func signalAll(t tree, sig syscall.Signal) {
	pids, _ := t.processes()
	for _, pid := range pids {
		_ = syscall.Kill(pid, sig) // one that is gone by now has had its end
	}
}

// isEmpty says whether a tree was seen to be empty.
func isEmpty(t tree) bool {
	pids, err := t.processes()
	return err == nil && len(pids) == 0
}

// waitEmpty polls until a tree is empty or the patience is over.
func waitEmpty(t tree, patience time.Duration) bool {
	deadline := time.Now().Add(patience)
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 5*time.Millisecond) {
		if isEmpty(t) {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(pause)
	}
}

// killAll sends KILL to whatever is there until nothing is.
func killAll(t tree, patience time.Duration) bool {
	deadline := time.Now().Add(patience)
	for {
		signalAll(t, syscall.SIGKILL)
		if waitEmpty(t, 5*time.Millisecond) {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}

// pidList reads process ids, one on a line. 0 stands for one of another namespace.
func pidList(text []byte) []int {
	var pids []int
	for field := range bytes.FieldsSeq(text) {
		if pid, err := strconv.Atoi(string(field)); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}
