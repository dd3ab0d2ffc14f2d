package modaltest

import (
	"bufio"
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
	"time"
)

// group is a control group: one of all boxes, and below it one of each. It can be frozen,
// and bounds memory, as far as the host has that; the zero value does neither.
type group struct {
	dir    string // of the second version
	memory string // of the first version's controller of memory, where the second has none
}

// newGroups makes the group of all boxes.
func newGroups(name string) (group, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return group{}, err
	}
	defer f.Close()
	var g group
	for lines := bufio.NewScanner(f); lines.Scan(); {
		before, after, _ := strings.Cut(lines.Text(), " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		switch {
		case len(fields) < 5 || len(kind) < 3:
		case kind[0] == "cgroup2":
			g.dir = filepath.Join(fields[4], name)
			// Where it is not there, or is another's, memory is not bounded.
			_ = os.WriteFile(filepath.Join(fields[4], "cgroup.subtree_control"), []byte("+memory"), 0o644)
		case kind[0] == "cgroup" && slices.Contains(strings.Split(kind[2], ","), "memory"):
			g.memory = filepath.Join(fields[4], name)
		}
	}
	for _, dir := range []*string{&g.dir, &g.memory} {
		if *dir == "" {
			continue
		}
		sweepGroups(filepath.Dir(*dir))
		if os.Mkdir(*dir, 0o755) != nil {
			*dir = "" // a read-only one, as in containers
		}
	}
	if g.dir != "" {
		_ = os.WriteFile(filepath.Join(g.dir, "cgroup.subtree_control"), []byte("+memory"), 0o644)
	}
	return g, nil
}

// sweepGroups removes the groups of fakes whose processes were killed, which takes their
// sandboxes with it. What is not empty yet is left for the next one.
func sweepGroups(parent string) {
	entries, _ := filepath.Glob(filepath.Join(parent, dirPrefix+"*")) // the pattern is well-formed
	for _, e := range entries {
		if name, _ := strings.CutPrefix(filepath.Base(e), dirPrefix); !dead(name) {
			continue
		}
		below, _ := filepath.Glob(filepath.Join(e, "ta-*"))
		for _, dir := range append(below, e) {
			_ = os.Remove(dir)
		}
	}
}

// of makes the group of one box.
func (g group) of(name string, memory uint32) (group, error) {
	var err error
	if g.dir != "" {
		g.dir = filepath.Join(g.dir, name)
		err = os.Mkdir(g.dir, 0o755)
	}
	if g.memory != "" {
		g.memory = filepath.Join(g.memory, name)
		err = errors.Join(err, os.Mkdir(g.memory, 0o755))
	}
	if err != nil || memory == 0 {
		return g, err
	}
	limit := []byte(strconv.FormatInt(int64(memory)<<20, 10))
	if g.memory != "" {
		return g, os.WriteFile(filepath.Join(g.memory, "memory.limit_in_bytes"), limit, 0o644)
	}
	if at := filepath.Join(g.dir, "memory.max"); g.dir != "" {
		if err = os.WriteFile(at, limit, 0o644); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	return g, err
}

// start starts a program in the group.
func (g group) start(cmd *exec.Cmd) error {
	if err := g.startIn(cmd); err != nil || g.memory == "" {
		return err
	}
	// It does nothing yet.
	return os.WriteFile(filepath.Join(g.memory, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644)
}

func (g group) startIn(cmd *exec.Cmd) error {
	if g.dir == "" {
		return cmd.Start()
	}
	dir, err := os.Open(g.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	return cmd.Start()
}

// remove removes the group, whose processes have ended: the kernel may take a moment.
func (g group) remove() error {
	var all error
	for _, dir := range []string{g.dir, g.memory} {
		if dir == "" {
			continue
		}
		err := os.Remove(dir)
		for n := 0; n < 100 && err != nil && !errors.Is(err, fs.ErrNotExist); n++ {
			time.Sleep(10 * time.Millisecond)
			err = os.Remove(dir)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			all = errors.Join(all, err)
		}
	}
	return all
}

// frozen does something while no process of the box runs: what it sees is of one moment.
// Without control groups they go on running.
func (b *box) frozen(do func() error) error {
	if b.group.dir == "" {
		return do()
	}
	if err := b.freeze("1"); err != nil {
		return fmt.Errorf("freeze a sandbox: %w", err)
	}
	defer func() { _ = b.freeze("0") }() // it has ended: nothing to do
	return do()
}

func (b *box) freeze(state string) error {
	if err := os.WriteFile(filepath.Join(b.group.dir, "cgroup.freeze"), []byte(state), 0o644); err != nil {
		return err
	}
	for range 1000 {
		text, err := os.ReadFile(filepath.Join(b.group.dir, "cgroup.events"))
		if err != nil {
			return err
		}
		if strings.Contains(string(text), "frozen "+state) {
			return nil
		}
		time.Sleep(time.Millisecond)
	}
	return errors.New("it does not come to it")
}

// copyOpen copies an open directory, which the copying program has as its file 3.
func copyOpen(ctx context.Context, dir *os.File, from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "cp", "-ax", "--reflink=auto", from, to)
	cmd.ExtraFiles = []*os.File{dir}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("copy %s: %w: %s", dir.Name(), err, out)
	}
	return nil
}
