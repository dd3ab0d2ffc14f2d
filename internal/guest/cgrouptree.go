package guest

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// killAllAfter is how long the kernel has to kill a cgroup before it is helped.
const killAllAfter = 20 * time.Millisecond

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
		_ = unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR)
		return nil, fmt.Errorf("open the command's cgroup: %w", err)
	}
	return &cgroupTree{parent: parent, name: name, dir: os.NewFile(uintptr(fd), name)}, nil
}

func (t *cgroupTree) adopt(attr *syscall.SysProcAttr) {
	attr.UseCgroupFD = true
	attr.CgroupFD = int(t.dir.Fd())
}

func (t *cgroupTree) started(int) {}

func (t *cgroupTree) processes() ([]int, error) {
	text, err := t.read("cgroup.procs")
	return pidList(text), err
}

func (t *cgroupTree) kill(patience time.Duration) bool {
	if err := t.write("cgroup.kill", "1"); err == nil && waitEmpty(t, killAllAfter) {
		return true
	}
	// Before Linux 5.14 there is no cgroup.kill, and it does nothing to a process whose
	// first thread has ended: it signals that thread. A signal to the process works.
	return killAll(t, patience)
}

func (t *cgroupTree) cpu() (user, system time.Duration, ok bool) {
	text, err := t.read("cpu.stat")
	if err != nil {
		return 0, 0, false
	}
	return parseCPUStat(string(text))
}

func parseCPUStat(text string) (user, system time.Duration, ok bool) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		micros, err := strconv.ParseInt(value, 10, 64)
		if err != nil || micros < 0 {
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

func (t *cgroupTree) read(file string) ([]byte, error) {
	fd, err := unix.Openat(int(t.dir.Fd()), file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var out []byte
	buf := make([]byte, 4096)
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if n <= 0 || err != nil {
			return out, err
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
