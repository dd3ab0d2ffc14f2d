package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A tree is all processes that come from one command, however they tried to get
// away from it.
type tree interface {
	// adopt makes the command that attr starts the tree's first process.
	adopt(attr *syscall.SysProcAttr)
	// started tells the tree its first process.
	started(pid int)
	// processes are those alive.
	processes() []int
	// kill sends KILL to all and waits until none is left or the patience is over.
	// It returns how many there were and whether none is left.
	kill(patience time.Duration) (killed int, empty bool)
	// cpu is the processor time of all of them; false where it is not counted.
	cpu() (user, system time.Duration, ok bool)
	// remove gives up what the tree holds; it must be empty.
	remove()
}

// signalAll sends a signal to every process of a tree.
func signalAll(t tree, sig syscall.Signal) {
	for _, pid := range t.processes() {
		_ = syscall.Kill(pid, sig) // one that is gone by now has had its end
	}
}

// waitEmpty polls until a tree is empty or the patience is over.
func waitEmpty(t tree, patience time.Duration) bool {
	deadline := time.Now().Add(patience)
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 5*time.Millisecond) {
		if len(t.processes()) == 0 {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(pause)
	}
}

// cgroupTree holds the processes of a command in a cgroup of their own, which
// nothing they do can leave.
type cgroupTree struct {
	parent *os.File // the directory in which it was made
	name   string
	dir    *os.File
}

func newCgroupTree(parent *os.File, id string) (*cgroupTree, error) {
	name := "x-" + id
	if err := unix.Mkdirat(int(parent.Fd()), name, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("make the command's cgroup: %w", err)
	}
	fd, err := unix.Openat(int(parent.Fd()), name, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the command's cgroup: %w", err)
	}
	return &cgroupTree{parent: parent, name: name, dir: os.NewFile(uintptr(fd), name)}, nil
}

func (t *cgroupTree) adopt(attr *syscall.SysProcAttr) {
	attr.UseCgroupFD = true
	attr.CgroupFD = int(t.dir.Fd())
}

func (t *cgroupTree) started(int) {}

func (t *cgroupTree) processes() []int {
	return pidList(t.read("cgroup.procs"))
}

func (t *cgroupTree) kill(patience time.Duration) (int, bool) {
	there := t.processes()
	if len(there) == 0 {
		return 0, true
	}
	if err := t.write("cgroup.kill", "1"); err != nil {
		// Before Linux 5.14: signal what is there until nothing is.
		deadline := time.Now().Add(patience)
		for len(t.processes()) > 0 && time.Now().Before(deadline) {
			signalAll(t, syscall.SIGKILL)
			waitEmpty(t, 5*time.Millisecond)
		}
	}
	return len(there), waitEmpty(t, patience)
}

func (t *cgroupTree) cpu() (user, system time.Duration, ok bool) {
	for line := range strings.Lines(string(t.read("cpu.stat"))) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		micros, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			continue
		}
		switch name {
		case "user_usec":
			user, ok = time.Duration(micros)*time.Microsecond, true
		case "system_usec":
			system = time.Duration(micros) * time.Microsecond
		}
	}
	return user, system, ok
}

func (t *cgroupTree) remove() {
	t.dir.Close()
	// A process that was just reaped may keep the directory busy for a moment.
	for range 50 {
		err := unix.Unlinkat(int(t.parent.Fd()), t.name, unix.AT_REMOVEDIR)
		if !errors.Is(err, unix.EBUSY) {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func (t *cgroupTree) read(file string) []byte {
	fd, err := unix.Openat(int(t.dir.Fd()), file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	var out []byte
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(fd, buf)
		if n <= 0 || err != nil {
			return out
		}
		out = append(out, buf[:n]...)
	}
}

func (t *cgroupTree) write(file, text string) error {
	fd, err := unix.Openat(int(t.dir.Fd()), file, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(text))
	return err
}

func pidList(text []byte) []int {
	var pids []int
	for _, field := range bytes.Fields(text) {
		if pid, err := strconv.Atoi(string(field)); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// marker is the variable by which procTree knows processes that left their parents.
const marker = "EXECUTOR_EXECUTION="

// procTree follows the processes of a command through /proc, where there is no
// cgroup: children of members, members of its sessions, and processes that carry
// its marker in their environment. A process that changes all three at once gets
// away until its sandbox ends.
type procTree struct {
	id     string
	leader int
}

func (t *procTree) adopt(*syscall.SysProcAttr) {}

func (t *procTree) started(pid int) { t.leader = pid }

func (t *procTree) processes() []int {
	if t.leader == 0 {
		return nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	self := os.Getpid()
	type process struct{ pid, parent, session int }
	var all []process
	member := make(map[int]bool)
	want := []byte(marker + t.id)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == self {
			continue
		}
		parent, session, alive := procStat(pid)
		if !alive {
			continue
		}
		all = append(all, process{pid, parent, session})
		if pid == t.leader || session == t.leader || hasVariable(pid, want) {
			member[pid] = true
		}
	}
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			if !member[p.pid] && member[p.parent] {
				member[p.pid], grown = true, true
			}
		}
	}
	pids := make([]int, 0, len(member))
	for _, p := range all {
		if member[p.pid] {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

func (t *procTree) kill(patience time.Duration) (int, bool) {
	there := t.processes()
	deadline := time.Now().Add(patience)
	for left := there; len(left) > 0; left = t.processes() {
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if waitEmpty(t, 5*time.Millisecond) {
			return len(there), true
		}
		if time.Now().After(deadline) {
			return len(there), false
		}
	}
	return len(there), true
}

func (t *procTree) cpu() (time.Duration, time.Duration, bool) { return 0, 0, false }

func (t *procTree) remove() {}

// procStat reads a process's parent and session; false for one that is gone or a zombie.
func procStat(pid int) (parent, session int, alive bool) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, 0, false
	}
	// The second field, the name in parentheses, may hold anything.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 4 || fields[0] == "Z" || fields[0] == "X" {
		return 0, 0, false
	}
	parent, _ = strconv.Atoi(fields[1])
	session, _ = strconv.Atoi(fields[3])
	return parent, session, true
}

func hasVariable(pid int, want []byte) bool {
	environ, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
	if err != nil {
		return false
	}
	for v := range bytes.SplitSeq(environ, []byte{0}) {
		if bytes.Equal(v, want) {
			return true
		}
	}
	return false
}
