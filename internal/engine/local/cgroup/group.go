package cgroup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits bound the commands of one sandbox; zero is no limit.
type Limits struct {
	MemoryBytes int64
	PIDs        int64
	CPUMillis   int64
}

// Usage is what the commands of one sandbox used; zero where nobody counted.
type Usage struct {
	PeakMemoryBytes int64
	OOMKills        int64
	PIDsRefused     int64
	CPU             time.Duration
}

// Group is the control groups of one sandbox.
type Group struct {
	host *Host
	name string
	v1   map[string]string
	inV2 map[string]bool
	v2   string // "" if there is no version 2
}

// Paths are where the groups of a sandbox are. They are kept with it, because an
// executord after this one may be started from another group and so look elsewhere.
type Paths struct {
	// Name is that of the directories; empty for the sandbox's id.
	Name string            `json:"name,omitempty"`
	V1   map[string]string `json:"v1,omitempty"` // directory by controller
	V2   string            `json:"v2,omitempty"`
	InV2 []string          `json:"in_v2,omitempty"` // controllers
}

// In version 2 the guest and the commands have groups of their own.
const (
	guestGroup   = "guest"
	commandGroup = "commands"
)

// Open returns the groups of a sandbox, whether they exist or not.
func (h *Host) Open(sandbox string) *Group {
	g := &Group{host: h, name: sandbox, v1: make(map[string]string), inV2: h.inV2}
	for c, dir := range h.v1 {
		g.v1[c] = filepath.Join(dir, sandbox)
	}
	if h.v2 != "" {
		g.v2 = filepath.Join(h.v2, sandbox)
	}
	return g
}

// OpenAt returns the groups of a sandbox that an earlier executord made there.
func (h *Host) OpenAt(sandbox string, at Paths) *Group {
	g := h.Open(cmp.Or(at.Name, sandbox))
	if len(at.V1) == 0 && at.V2 == "" {
		return g
	}
	g.v1, g.inV2 = at.V1, make(map[string]bool)
	for _, c := range at.InV2 {
		g.inV2[c] = true
	}
	if at.V2 != "" {
		g.v2 = at.V2
	}
	return g
}

// Paths tells where the groups are.
func (g *Group) Paths() Paths {
	p := Paths{Name: g.name, V1: g.v1, InV2: slices.Sorted(maps.Keys(g.inV2))}
	if g.host.detached == nil { // else the path means something to this process only
		p.V2 = g.v2
	}
	return p
}

// CreateForGuest makes the group into which the guest is cloned, and opens it; nil
// without version 2. On an error Remove removes what was made.
func (g *Group) CreateForGuest() (*os.File, error) {
	if g.v2 == "" {
		return nil, nil
	}
	dir := filepath.Join(g.v2, guestGroup)
	for _, d := range []string{g.v2, dir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, fmt.Errorf("make control groups: %w", err)
		}
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open control groups: %w", err)
	}
	return f, nil
}

// CreateForCommands makes the groups of the commands, without limits, after
// CreateForGuest. owner is the host's user id of the sandbox's root, to whom the
// guest's part is handed over. On an error Remove removes what was made.
func (g *Group) CreateForCommands(owner int) error {
	if err := g.createForCommands(owner); err != nil {
		return fmt.Errorf("make control groups: %w", err)
	}
	return nil
}

func (g *Group) createForCommands(owner int) error {
	made := make(map[string]bool)
	for _, dir := range g.v1 {
		if !made[dir] {
			made[dir] = true
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
		}
	}
	if g.v2 == "" {
		return nil
	}
	return g.handOver(owner)
}

// handOver makes the commands' part of version 2 and gives the guest its own.
func (g *Group) handOver(owner int) error {
	if err := os.Mkdir(filepath.Join(g.v2, commandGroup), 0o755); err != nil {
		return err
	}
	for c := range g.inV2 {
		if err := write(filepath.Join(g.v2, "cgroup.subtree_control"), "+"+c); err != nil {
			return err
		}
	}
	// The guest may make groups for its commands and move what it starts from its own
	// group into them, which takes the right to the group above both. It may not
	// change a limit: those files stay root's.
	for _, path := range []string{commandGroup, commandGroup + "/cgroup.procs", "cgroup.procs", guestGroup + "/cgroup.procs"} {
		if err := os.Chown(filepath.Join(g.v2, path), owner, owner); err != nil {
			return err
		}
	}
	return nil
}

// setting is one control file and its text.
type setting struct {
	controller, file, text string
	optional               bool
}

// Limit sets the limits of the commands, before there are any.
func (g *Group) Limit(l Limits) error {
	var settings []setting
	if l.MemoryBytes > 0 {
		n := strconv.FormatInt(l.MemoryBytes, 10)
		if g.inV2[Memory] {
			settings = append(settings, setting{Memory, "memory.max", n, false}, setting{Memory, "memory.swap.max", "0", true})
		} else {
			// Without the second, which not every kernel has, a sandbox would swap.
			settings = append(settings, setting{Memory, "memory.limit_in_bytes", n, false}, setting{Memory, "memory.memsw.limit_in_bytes", n, true})
		}
	}
	if l.PIDs > 0 {
		n := l.PIDs
		if !g.inV2[PIDs] {
			n++ // the guest's thread that starts programs is one of them
		}
		settings = append(settings, setting{PIDs, "pids.max", strconv.FormatInt(n, 10), false})
	}
	if l.CPUMillis > 0 {
		quota := strconv.FormatInt(l.CPUMillis*100, 10)
		if g.inV2[CPU] {
			settings = append(settings, setting{CPU, "cpu.max", quota + " 100000", false})
		} else {
			settings = append(settings, setting{CPU, "cpu.cfs_period_us", "100000", false}, setting{CPU, "cpu.cfs_quota_us", quota, false})
		}
	}
	for _, s := range settings {
		dir, err := g.dirOf(s.controller)
		if err != nil {
			return err
		}
		err = write(filepath.Join(dir, s.file), s.text)
		if err != nil && !s.optional {
			return fmt.Errorf("limit control groups: set %s to %s: %w", s.file, s.text, err)
		}
	}
	return nil
}

// dirOf is the directory in which a controller counts the commands.
func (g *Group) dirOf(controller string) (string, error) {
	if g.inV2[controller] {
		return filepath.Join(g.v2, commandGroup), nil
	}
	if dir, ok := g.v1[controller]; ok {
		return dir, nil
	}
	return "", fmt.Errorf("no control group has the %s controller", controller)
}

// OpenCommands opens the directory in which the guest makes a group for each
// command; nil without version 2.
func (g *Group) OpenCommands() (*os.File, error) {
	if g.v2 == "" {
		return nil, nil
	}
	return os.Open(filepath.Join(g.v2, commandGroup))
}

// OpenTasks opens the tasks files of version 1 that the guest's starting thread joins.
func (g *Group) OpenTasks() ([]*os.File, error) {
	var files []*os.File
	opened := make(map[string]bool)
	for _, dir := range g.v1 {
		if opened[dir] {
			continue // two controllers of one hierarchy
		}
		opened[dir] = true
		f, err := os.OpenFile(filepath.Join(dir, "tasks"), os.O_WRONLY, 0)
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

// Usage reads what was counted. What this kernel does not count is 0.
func (g *Group) Usage() (Usage, error) {
	var u Usage
	var errs []error
	read := func(controller, file, name string) int64 {
		dir, err := g.dirOf(controller)
		if err != nil {
			return 0 // nobody counts it
		}
		n, err := readField(filepath.Join(dir, file), name)
		if !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		return n
	}
	if g.inV2[Memory] {
		u.PeakMemoryBytes, u.OOMKills = read(Memory, "memory.peak", ""), read(Memory, "memory.events", "oom_kill")
	} else {
		u.PeakMemoryBytes, u.OOMKills = read(Memory, "memory.max_usage_in_bytes", ""), read(Memory, "memory.oom_control", "oom_kill")
	}
	u.PIDsRefused = read(PIDs, "pids.events", "max")
	if g.v2 != "" {
		micros, err := readField(filepath.Join(g.v2, commandGroup, "cpu.stat"), "usage_usec")
		if !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		u.CPU = time.Duration(micros) * time.Microsecond
	}
	return u, errors.Join(errs...)
}

// Processes are those alive, commands only, by the host's ids; false if nobody counts.
func (g *Group) Processes() ([]int, bool) {
	if g.v2 == "" {
		return nil, false
	}
	return processes(filepath.Join(g.v2, commandGroup)), true
}

// processes collects a group's and those of the groups below.
func processes(dir string) []int {
	var pids []int
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "cgroup.procs" {
			text, _ := os.ReadFile(path)
			for field := range strings.FieldsSeq(string(text)) {
				if pid, err := strconv.Atoi(field); err == nil {
					pids = append(pids, pid)
				}
			}
		}
		return nil // a group that went meanwhile has no processes
	})
	return pids
}

// Kill ends every process of the sandbox, the guest included, and returns when the
// kernel says that none is left.
func (g *Group) Kill(ctx context.Context) error {
	if g.v2 == "" {
		return nil
	}
	for pause := 50 * time.Microsecond; ; pause = min(2*pause, 20*time.Millisecond) {
		// Written again each time: what is being cloned into a group while the first
		// kill runs is not missed by the next.
		if err := write(filepath.Join(g.v2, "cgroup.kill"), "1"); err != nil && !gone(err) {
			return fmt.Errorf("kill control group: %w", err)
		}
		populated, err := readField(filepath.Join(g.v2, "cgroup.events"), "populated")
		if err != nil && !gone(err) {
			return fmt.Errorf("see whether control group %s is empty: %w", g.v2, err)
		}
		if populated == 0 {
			return nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("control group %s still has processes: %w", g.v2, context.Cause(ctx))
		}
	}
}

// gone says that an error means that the group is not there any more.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

// Remove removes the groups; no process may be in them.
func (g *Group) Remove() error {
	var errs []error
	ours := g.host.dirs()
	for _, dir := range append(slices.Collect(maps.Values(g.v1)), g.v2) {
		if dir == "" {
			continue
		}
		errs = append(errs, removeAll(dir))
		if parent := filepath.Dir(dir); !slices.Contains(ours, parent) {
			_ = os.Remove(parent) // of an earlier executord; the last sandbox takes it along
		}
	}
	return errors.Join(errs...)
}

// readField reads the number behind a name in a file of "name number" lines, or the
// only number of a file if name is empty. A name that is not there counts 0.
func readField(file, name string) (int64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		key, value, _ := strings.Cut(line, " ")
		if name == "" {
			key, value = "", line
		}
		if key != name {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", file, err)
		}
		return n, nil
	}
	return 0, nil
}
