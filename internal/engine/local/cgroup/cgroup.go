// Package cgroup gives each sandbox of the local engine its control groups,
// whatever the host has: version 1, version 2, or the hybrid of both that many
// hosts run, where version 1 has the controllers and version 2 is there without
// them. Limits are set where the controller is; killing and counting processes is
// always done in version 2, which can do both without races.
//
// The guest stays outside the limited groups, so that a sandbox at its limits
// cannot starve it. Nothing here runs in the background.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The controllers that limits need.
const (
	Memory = "memory"
	PIDs   = "pids"
	CPU    = "cpu"
)

func controllers() []string { return []string{Memory, PIDs, CPU} }

// Host is what this host's control groups allow this process.
type Host struct {
	name string
	// v1 has, for each controller that version 1 holds, the directory for our groups.
	v1 map[string]string
	// v2 is the directory for our groups in version 2; "" if there is none.
	v2 string
	// inV2 are the controllers that version 2 gives us.
	inV2 map[string]bool
	// missing says for each other controller why.
	missing map[string]string
	// detached keeps a mount of version 2 that only this process has.
	detached *os.File
}

// Find looks for the places where groups can be made. name tells the groups of
// different state directories apart; parent, if not empty, is used as the path of
// the parent group in every hierarchy instead of this process's own.
func Find(name, parent string) (*Host, error) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("read own control groups: %w", err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("read own mounts: %w", err)
	}
	layout := parse(string(own), string(mounts), parent)
	h := &Host{name: name, v1: make(map[string]string), inV2: make(map[string]bool), missing: make(map[string]string)}
	for _, c := range controllers() {
		home, ok := layout.v1[c]
		if !ok {
			h.missing[c] = "no control group hierarchy of version 1 has the " + c + " controller"
			continue
		}
		dir := filepath.Join(home, name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			h.missing[c] = err.Error()
			continue
		}
		h.v1[c] = dir
	}
	if err := h.findV2(layout.v2); err != nil {
		for c := range h.missing {
			h.missing[c] += "; version 2: " + err.Error()
		}
	}
	return h, nil
}

// findV2 makes our directory in version 2, where most of the controllers can be had
// that version 1 does not have.
func (h *Host) findV2(homes []string) error {
	if len(homes) == 0 {
		dir, err := mountDetached()
		if err != nil {
			return err
		}
		h.detached = dir
		homes = []string{"/proc/self/fd/" + strconv.Itoa(int(dir.Fd()))}
	}
	wanted := make([]string, 0, 3)
	for _, c := range controllers() {
		if _, ok := h.v1[c]; !ok {
			wanted = append(wanted, c)
		}
	}
	var errs []error
	for _, home := range homes {
		dir := filepath.Join(home, h.name)
		granted, err := makeV2(home, dir, wanted)
		errs = append(errs, err)
		if granted == nil {
			continue
		}
		if h.v2 != "" && len(granted) <= len(h.inV2) {
			_ = os.Remove(dir) // the first will do
			continue
		}
		if h.v2 != "" {
			_ = os.Remove(h.v2)
		}
		h.v2, h.inV2 = dir, granted
		if len(granted) == len(wanted) {
			break
		}
	}
	for c := range h.inV2 {
		delete(h.missing, c)
	}
	return errors.Join(errs...)
}

// makeV2 makes our directory under one home and returns which of the wanted
// controllers it has; nil if no groups can be made there.
func makeV2(home, dir string, wanted []string) (granted map[string]bool, err error) {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	if err := unix.Access(filepath.Join(dir, "cgroup.procs"), unix.W_OK); err != nil {
		_ = os.Remove(dir)
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	granted = make(map[string]bool)
	var errs []error
	for _, c := range wanted {
		if err := enable(c, home, dir); err != nil {
			errs = append(errs, err)
			continue
		}
		granted[c] = true
	}
	return granted, errors.Join(errs...)
}

// enable hands a controller down to the groups under dir, a child of home.
func enable(controller, home, dir string) error {
	for _, d := range []string{home, dir} {
		file := filepath.Join(d, "cgroup.subtree_control")
		have, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if contains(string(have), controller) {
			continue
		}
		err = write(file, "+"+controller)
		switch {
		case errors.Is(err, unix.EBUSY):
			return fmt.Errorf("hand down the %s controller: %s has processes of its own: %w", controller, d, err)
		case errors.Is(err, unix.ENOENT): // not of the file, which was just read
			return fmt.Errorf("hand down the %s controller: %s does not have it", controller, d)
		case err != nil:
			return fmt.Errorf("hand down the %s controller: %w", controller, err)
		}
	}
	return nil
}

// write writes a control file. It must be there: os.WriteFile would try to make it,
// which the kernel answers with a refusal that hides what is wrong.
func write(file, text string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// mountDetached mounts version 2 where nobody else sees it.
func mountDetached() (*os.File, error) {
	conf, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open the cgroup2 file system: %w", err)
	}
	defer unix.Close(conf)
	if err := unix.FsconfigCreate(conf); err != nil {
		return nil, fmt.Errorf("make a cgroup2 file system: %w", err)
	}
	fd, err := unix.Fsmount(conf, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mount a cgroup2 file system: %w", err)
	}
	return os.NewFile(uintptr(fd), "cgroup2"), nil
}

// Can says whether a limit of this controller can be enforced, and how or why not.
func (h *Host) Can(controller string) (bool, string) {
	if dir, ok := h.v1[controller]; ok {
		return true, "control group version 1, " + dir
	}
	if h.inV2[controller] {
		return true, "control group version 2, " + h.v2
	}
	return false, h.missing[controller]
}

// CanKill says whether trees can be killed through a group, and where.
func (h *Host) CanKill() (bool, string) {
	if h.v2 == "" {
		return false, "no control group of version 2 can be made"
	}
	return true, h.v2
}

// List names the groups that exist in any hierarchy.
func (h *Host) List() ([]string, error) {
	seen := make(map[string]bool)
	var names []string
	for _, dir := range h.dirs() {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list control groups: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() && !seen[e.Name()] {
				seen[e.Name()] = true
				names = append(names, e.Name())
			}
		}
	}
	return names, nil
}

func (h *Host) dirs() []string {
	var dirs []string
	seen := make(map[string]bool)
	for _, d := range h.v1 {
		if !seen[d] {
			seen[d] = true
			dirs = append(dirs, d)
		}
	}
	if h.v2 != "" {
		dirs = append(dirs, h.v2)
	}
	return dirs
}

// Close removes our directories if no sandbox has a group in them any more.
func (h *Host) Close() error {
	for _, dir := range h.dirs() {
		_ = os.Remove(dir) // busy: sandboxes go on living
	}
	if h.detached != nil {
		return h.detached.Close()
	}
	return nil
}

// layout is where the hierarchies are mounted, as far as this process may see.
type layout struct {
	v1 map[string]string
	v2 []string // places to try, the best first
}

// parse reads /proc/self/cgroup and /proc/self/mountinfo.
func parse(own, mounts, parent string) layout {
	paths := make(map[string]string) // by controller, "" for version 2
	for line := range strings.Lines(own) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 {
			continue
		}
		for c := range strings.SplitSeq(fields[1], ",") {
			paths[c] = fields[2]
		}
	}
	l := layout{v1: make(map[string]string)}
	for line := range strings.Lines(mounts) {
		before, after, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		front, back := strings.Fields(before), strings.Fields(after)
		if !ok || len(front) < 5 || len(back) < 3 {
			continue
		}
		root, point := unescape(front[3]), unescape(front[4])
		// place is where a path of the hierarchy lies under this mount.
		place := func(path string) (string, bool) {
			if parent != "" {
				path = parent
			}
			// Outside of this process's cgroup namespace paths begin with "/..".
			rel, err := filepath.Rel(root, path)
			if err != nil || !filepath.IsLocal(rel) || strings.HasPrefix(path, "/..") {
				return "", false
			}
			return filepath.Join(point, rel), true
		}
		switch back[0] {
		case "cgroup":
			for _, c := range controllers() {
				if path, ok := paths[c]; ok && contains(strings.ReplaceAll(back[2], ",", " "), c) {
					if dir, ok := place(path); ok && l.v1[c] == "" {
						l.v1[c] = dir
					}
				}
			}
		case "cgroup2":
			if dir, ok := place(paths[""]); ok && len(l.v2) == 0 {
				l.v2 = append(l.v2, dir)
				if dir != point && parent == "" {
					// Where this process's own group has processes it cannot hand
					// controllers down; the root group can.
					l.v2 = append(l.v2, point)
				}
			}
		}
	}
	return l
}

// unescape undoes mountinfo's octal escapes.
func unescape(s string) string {
	if !strings.ContainsRune(s, '\\') {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func contains(list, word string) bool {
	for w := range strings.FieldsSeq(list) {
		if w == word {
			return true
		}
	}
	return false
}

// removeAll removes a group and those below it, which must be empty. The kernel may
// need a moment after the last process is gone.
func removeAll(dir string) error {
	for pause := 100 * time.Microsecond; ; pause *= 2 {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || pause > time.Second {
			return fmt.Errorf("remove control group %s: %w", dir, err)
		}
		// Looked for only now: most have none.
		below, err := removeBelow(dir)
		if err != nil {
			return err
		}
		if !below {
			time.Sleep(pause)
		}
	}
}

// removeBelow removes the groups below one and says whether there were any.
func removeBelow(dir string) (any bool, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		if e.IsDir() {
			any = true
			if err := removeAll(filepath.Join(dir, e.Name())); err != nil {
				return any, err
			}
		}
	}
	return any, nil
}
