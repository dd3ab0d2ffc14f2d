package guest

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// marker is the variable by which procTree knows processes that left their parents.
const marker = "EXECUTOR_EXECUTION="

// environLimit bounds what is read of an environment: a process can make its own
// appear as large as its address space.
const environLimit = 256 << 10

// procTree follows the processes of a command through /proc, where there is no
// cgroup: children of members, members of its session, and processes that carry its
// marker in their environment. A process that changes all three before it is looked
// at gets away until its sandbox ends.
type procTree struct {
	mu     sync.Mutex // held while the table of processes is looked at
	id     string
	leader process
	// known says of every process that was looked at whether it is a member. What
	// once was one stays one.
	known map[identity]bool
	// reused is set when the leader's id went to another process, so that the session
	// of that number is not the leader's any more.
	reused bool
}

// identity names a process for as long as the machine runs: ids are used again.
type identity struct {
	pid   int
	start uint64 // clock ticks since the boot
}

type process struct {
	identity
	parent, session int
	state           byte // as /proc tells it
	alive           bool
}

func (t *procTree) adopt(*syscall.SysProcAttr) {}

func (t *procTree) started(pid int) {
	t.leader.pid = pid
	if p, err := readProcess(pid); err == nil {
		t.leader = p
	}
}

func (t *procTree) processes() ([]int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.leader.pid == 0 {
		return nil, nil
	}
	pids, err := t.look()
	if err == nil && len(pids) == 0 {
		// A process that forked and ended while the table was being read may have
		// hidden its child.
		pids, err = t.look()
	}
	return pids, err
}

// look reads the table of processes once.
func (t *procTree) look() ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	self := os.Getpid()
	var all []process
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == self {
			continue
		}
		if p, err := readProcess(pid); err == nil && p.alive {
			all = append(all, p)
		}
	}
	return t.members(all), nil
}

// members picks those of all processes that belong to the tree.
func (t *procTree) members(all []process) []int {
	known := make(map[identity]bool, len(all))
	member := make(map[int]bool)
	for _, p := range all {
		t.reused = t.reused || p.pid == t.leader.pid && !t.isLeader(p)
	}
	for _, p := range all {
		if t.known[p.identity] || t.isLeader(p) || !t.reused && p.session == t.leader.pid {
			member[p.pid] = true
		}
	}
	adoptChildren(all, member)
	for _, p := range all {
		if _, looked := t.known[p.identity]; !member[p.pid] && !looked && hasVariable(p.pid, marker+t.id) {
			member[p.pid] = true
		}
	}
	adoptChildren(all, member)
	var pids []int
	for _, p := range all {
		known[p.identity] = member[p.pid]
		if member[p.pid] {
			pids = append(pids, p.pid)
		}
	}
	t.known = known
	return pids
}

// isLeader says whether a process is the one that was started, and not a later one
// with its id.
func (t *procTree) isLeader(p process) bool {
	return p.pid == t.leader.pid && (p.start == t.leader.start || t.leader.start == 0)
}

// adoptChildren makes the descendants of members members.
func adoptChildren(all []process, member map[int]bool) {
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			if !member[p.pid] && member[p.parent] {
				member[p.pid], grown = true, true
			}
		}
	}
}

func (t *procTree) kill(patience time.Duration) bool { return killAll(t, patience) }

func (t *procTree) cpu() (time.Duration, time.Duration, bool) { return 0, 0, false }

func (t *procTree) remove() {}

// readProcess reads what the kernel tells of a process.
func readProcess(pid int) (process, error) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return process{}, err
	}
	return parseStat(pid, text)
}

// parseStat reads a line of /proc/PID/stat.
func parseStat(pid int, text []byte) (process, error) {
	// The second field, the name in parentheses, may hold anything.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 20 {
		return process{}, io.ErrUnexpectedEOF
	}
	p := process{identity: identity{pid: pid}}
	p.parent, _ = strconv.Atoi(fields[1])
	p.session, _ = strconv.Atoi(fields[3])
	p.start, _ = strconv.ParseUint(fields[19], 10, 64)
	// A process whose first thread has ended looks like a zombie while others run.
	threads, _ := strconv.Atoi(fields[17])
	p.state = fields[0][0]
	p.alive = fields[0] != "X" && (fields[0] != "Z" || threads > 1)
	return p, nil
}

// parseCPU reads from a line of /proc/PID/stat what the process and the children that it
// has waited for have used.
func parseCPU(text []byte) time.Duration {
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 15 {
		return 0
	}
	var ticks int64
	for _, field := range fields[11:15] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err == nil && n > 0 && n < 1<<40 {
			ticks += n
		}
	}
	return time.Duration(ticks) * clockTick
}

// hasVariable says whether a process began with this "NAME=value" in its environment.
func hasVariable(pid int, variable string) bool {
	f, err := os.Open(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
	if err != nil {
		return false
	}
	defer f.Close()
	environ, err := io.ReadAll(io.LimitReader(f, environLimit))
	if err != nil {
		return false
	}
	want := []byte(variable + "\x00")
	return bytes.HasPrefix(environ, want) || bytes.Contains(environ, append([]byte{0}, want...))
}
