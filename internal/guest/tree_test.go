package guest

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	line := func(name, state string, threads int) string {
		return fmt.Sprintf("7 (%s) %s 3 7 5 0 -1 4194560 1 0 0 0 2 3 0 0 20 0 %d 0 12345 8192 100 18446744073709551615", name, state, threads)
	}
	want := process{identity: identity{7, 12345}, parent: 3, session: 5, alive: true}
	for name, c := range map[string]struct {
		text  string
		alive bool
	}{
		"plain":                    {line("sh", "S", 1), true},
		"spaces":                   {line("a b c", "R", 1), true},
		"parentheses":              {line(") Z 1 (x", "S", 1), true},
		"a line":                   {line("a\nb) Z 1 1 1", "D", 1), true},
		"nameless":                 {line("", "S", 1), true},
		"zombie":                   {line("sh", "Z", 1), false},
		"dead":                     {line("sh", "X", 1), false},
		"without its first thread": {line("sh", "Z", 2), true},
		"stopped":                  {line("sh", "T", 1), true},
	} {
		t.Run(name, func(t *testing.T) {
			want := want
			want.alive = c.alive
			_, after, _ := strings.Cut(c.text[strings.LastIndexByte(c.text, ')'):], " ")
			want.state = after[0]
			if got, err := parseStat(7, []byte(c.text)); err != nil || got != want {
				t.Errorf("%+v, %v; want %+v", got, err, want)
			}
		})
	}
	for _, text := range []string{"", "7", "7 (sh", "7 (sh) S 1 2", line("sh", "S", 1)[:40]} {
		if got, err := parseStat(7, []byte(text)); err == nil {
			t.Errorf("%q was read as %+v", text, got)
		}
	}
	self, err := readProcess(os.Getpid())
	if err != nil || self.parent != os.Getppid() || !self.alive || self.start == 0 {
		t.Errorf("this process is %+v, %v", self, err)
	}
}

func FuzzParseStat(f *testing.F) {
	text, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte("1 ())))"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if p, err := parseStat(1, text); err == nil && p.pid != 1 {
			t.Errorf("%q is %+v", text, p)
		}
	})
}

// at is a process of a made-up table.
func at(pid, parent, session int, start uint64) process {
	return process{identity: identity{pid, start}, parent: parent, session: session, alive: true}
}

// TestMembers plays tables of processes, one after another, to a tree whose leader is
// process 1000000 (no process has such an id: nothing here is looked up in /proc).
func TestMembers(t *testing.T) {
	const id = 1_000_000
	leader := at(id, 1, id, 50)
	for name, c := range map[string][]struct {
		table []process
		want  []int
	}{
		"descendants": {
			{[]process{at(id+3, id+2, 9, 60), at(id+2, id, 9, 60), leader, at(id+4, 1, 9, 60)}, []int{id + 3, id + 2, id}},
		},
		"the session of an ended leader": {
			{[]process{at(id+1, 1, id, 60), at(id+2, 1, 9, 60)}, []int{id + 1}},
		},
		"a member that left everything": {
			{[]process{leader, at(id+1, id, id, 60)}, []int{id, id + 1}},
			{[]process{at(id+1, 1, id+1, 60)}, []int{id + 1}},
			{[]process{at(id+1, 1, id+1, 60), at(id+2, id+1, id+2, 70)}, []int{id + 1, id + 2}},
			{[]process{at(id+2, 1, id+2, 70)}, []int{id + 2}},
		},
		"the id of a member goes to another": {
			{[]process{leader, at(id+1, id, id, 60)}, []int{id, id + 1}},
			{[]process{at(id+1, 1, 9, 90)}, nil},
		},
		"the id of the leader goes to another": {
			{[]process{leader, at(id+1, id, 9, 60)}, []int{id, id + 1}},
			// A new command has it, with a session of its own and a child in it.
			{[]process{at(id, 1, id, 90), at(id+5, id, id, 91), at(id+1, 1, 9, 60)}, []int{id + 1}},
			{[]process{at(id+5, 1, id, 91), at(id+1, 1, 9, 60)}, []int{id + 1}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			tree := &procTree{id: "nobodys", leader: leader}
			for i, step := range c {
				if got := tree.members(step.table); !slices.Equal(got, step.want) {
					t.Errorf("step %d: %v, want %v", i, got, step.want)
				}
			}
		})
	}
}

// TestProcTreeOfChild follows a real process.
func TestProcTreeOfChild(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	id := fmt.Sprintf("marked-%d", os.Getpid()) // as nobody else on this machine
	cmd.Env = []string{"A=b", marker + id, "C=d"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tree := &procTree{id: "x"}
	if pids, err := tree.processes(); pids != nil || err != nil {
		t.Errorf("before its start: %v, %v", pids, err)
	}
	tree.started(cmd.Process.Pid)
	// The marker alone is enough: this tree's leader is nobody.
	marked := &procTree{id: id, leader: process{identity: identity{pid: 1_000_000, start: 1}}}
	other := &procTree{id: id[:len(id)-1], leader: process{identity: identity{pid: 1_000_000, start: 1}}}
	eventually(t, "the program runs", func() bool { return hasVariable(cmd.Process.Pid, "A=b") })
	for name, c := range map[string]struct {
		tree *procTree
		want []int
	}{"leader": {tree, []int{cmd.Process.Pid}}, "marker": {marked, []int{cmd.Process.Pid}}, "another marker": {other, nil}} {
		if pids, err := c.tree.processes(); err != nil || !slices.Equal(pids, c.want) {
			t.Errorf("%s: %v, %v; want %v", name, pids, err, c.want)
		}
	}
	if !tree.kill(10 * time.Second) {
		t.Error("not empty after KILL")
	}
	if pids, err := marked.processes(); len(pids) > 0 || err != nil {
		t.Errorf("a zombie counts: %v, %v", pids, err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("ended with %v", err)
	}
	if user, system, ok := tree.cpu(); ok {
		t.Errorf("counts processor time: %v %v", user, system)
	}
	tree.remove()
}

func TestHasVariable(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	cmd.Env = []string{"FIRST=1", "BIG=" + strings.Repeat("x", 100<<10), "MORE=" + strings.Repeat("y", 120<<10), "NEAR=1", "LAST=1"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	pid := cmd.Process.Pid
	eventually(t, "the program runs", func() bool { return hasVariable(pid, "FIRST=1") })
	for variable, want := range map[string]bool{
		"NEAR=1": true, "LAST=1": true, "AST=1": false, "LAST=": false, "LAST=11": false, "FIRST=": false, "x": false,
	} {
		if hasVariable(pid, variable) != want {
			t.Errorf("%s: %v", variable, !want)
		}
	}
	if hasVariable(1_000_000, "FIRST=1") {
		t.Error("a process that is not there has it")
	}
}

func TestParseCPUStat(t *testing.T) {
	for text, want := range map[string]struct {
		user, system time.Duration
		ok           bool
	}{
		"usage_usec 12\nuser_usec 5\nsystem_usec 7\nnr_periods 0\n": {5 * time.Microsecond, 7 * time.Microsecond, true},
		"user_usec 5": {5 * time.Microsecond, 0, true},
		"":            {},
		"user_usec x\nsystem_usec -3\nuser_usec\n":   {},
		"user_usec 99999999999999999999999999999999": {},
	} {
		if user, system, ok := parseCPUStat(text); user != want.user || system != want.system || ok != want.ok {
			t.Errorf("%q: %v %v %v", text, user, system, ok)
		}
	}
}

func TestPidList(t *testing.T) {
	for text, want := range map[string][]int{
		"": nil, "1\n22\n333\n": {1, 22, 333}, "0\n5\n": {5}, "-3\nx\n7": {7}, "99999999999999999999\n8\n": {8},
	} {
		if got := pidList([]byte(text)); !slices.Equal(got, want) {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

// TestCgroupTreeErrors looks at trees whose directory is not what it should be: they
// must not be taken for empty.
func TestCgroupTreeErrors(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	tree, err := newCgroupTree(dir, "id")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tree.processes(); err == nil || isEmpty(tree) {
		t.Error("a directory that is no cgroup is an empty tree")
	}
	if tree.kill(time.Millisecond) {
		t.Error("a directory that is no cgroup was killed")
	}
	if _, _, ok := tree.cpu(); ok {
		t.Error("a directory that is no cgroup counts time")
	}
	again, err := newCgroupTree(dir, "id")
	if err != nil {
		t.Fatalf("one that is there is taken: %v", err)
	}
	again.dir.Close()
	tree.remove()
	if _, err := os.Stat(dir.Name() + "/x-id"); !os.IsNotExist(err) {
		t.Errorf("left after remove: %v", err)
	}
	gone, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	if _, err := newCgroupTree(gone, "id"); err == nil {
		t.Error("a cgroup was made nowhere")
	}
}
