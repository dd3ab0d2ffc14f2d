package rootfs

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"golang.org/x/sys/unix"
)

// What Build does cannot be undone: the tests look at processes in namespaces of
// their own, this binary in the role of a part of the tests. As the tests run as root
// on a host, there is no user namespace here; engine/local tests the whole.
const roleVariable = "ROOTFS_TEST_ROLE"

func TestMain(m *testing.M) {
	role := os.Getenv(roleVariable)
	if role == "" {
		os.Exit(m.Run())
	}
	if err := roles()[role](os.Getenv("ROOTFS_TEST_DIR")); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func roles() map[string]func(dir string) error {
	return map[string]func(dir string) error{
		"build": buildAndLook,
		"no layer": func(dir string) error {
			s := setupIn(dir)
			s.Overlays[0].Lower[0].Source = &guestv1.Layer_Path{Path: dir + "/none"}
			return Build(s, nil)
		},
		"no descriptor": func(dir string) error {
			s := setupIn(dir)
			s.Overlays[0].Lower[0].Source = &guestv1.Layer_MountFd{MountFd: 3}
			return Build(s, []int{0, 0, 0})
		},
		"not a mount": func(dir string) error {
			s := setupIn(dir)
			s.Overlays[0].Lower[0].Source = &guestv1.Layer_MountFd{MountFd: 0}
			return Build(s, []int{0})
		},
		"no target": func(dir string) error {
			s := setupIn(dir)
			s.Overlays[1].Target = "/none"
			return Build(s, nil)
		},
		"no upper": func(dir string) error {
			s := setupIn(dir)
			s.Overlays[0].WritableName = "none"
			return Build(s, nil)
		},
		"no root": func(string) error { return Build(&guestv1.Setup{}, nil) },
		"remount": remount,
		"volumes": buildWithVolumes,
		"volume on a file": func(dir string) error {
			s := setupIn(dir)
			s.Volumes = []*guestv1.Volume{{Source: path(dir + "/a"), Target: "/etc/marker/x"}}
			return Build(s, nil)
		},
		"no volume": func(dir string) error {
			s := setupIn(dir)
			s.Volumes = []*guestv1.Volume{{Source: &guestv1.Layer{Source: &guestv1.Layer_MountFd{MountFd: 3}}, Target: "/v"}}
			return Build(s, nil)
		},
		"volume at no path": func(dir string) error {
			s := setupIn(dir)
			s.Volumes = []*guestv1.Volume{{Source: path(dir + "/a"), Target: "v"}}
			return Build(s, nil)
		},
	}
}

// run runs a role in namespaces of its own.
func run(t *testing.T, role, dir string) (string, error) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"="+role, "ROOTFS_TEST_DIR="+dir, "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// files are made for a test, in the layers "skeleton", "a" and "b".
func files(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{
		"skeleton/proc", "skeleton/dev", "skeleton/sys", "skeleton/tmp", "skeleton/etc", "skeleton/usr", "skeleton/data", "skeleton/opt",
		"layer/root/upper", "layer/root/work", "layer/opt/upper", "layer/opt/work", "a", "b", "host/secret",
	} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"skeleton/etc/marker": "skeleton", "a/both": "upper", "b/both": "lower", "b/below": "lower",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func path(p string) *guestv1.Layer { return &guestv1.Layer{Source: &guestv1.Layer_Path{Path: p}} }

// setupIn has a writable overlay, a single layer, two layers, and one that shares the
// writable layer.
func setupIn(dir string) *guestv1.Setup {
	return &guestv1.Setup{
		ShmBytes: 3 << 20,
		Overlays: []*guestv1.Overlay{
			{Target: "/", Lower: []*guestv1.Layer{path(dir + "/skeleton")}, Writable: path(dir + "/layer"), WritableName: "root"},
			{Target: "/usr", Lower: []*guestv1.Layer{path("/usr")}},
			{Target: "/data", Lower: []*guestv1.Layer{path(dir + "/a"), path(dir + "/b")}},
		},
	}
}

// buildAndLook builds a root file system and prints what it looks like from inside.
func buildAndLook(dir string) error {
	setup := setupIn(dir)
	// One overlay of detached mounts, as executord's own are.
	var fds []int
	mount := func(p string) *guestv1.Layer {
		fd, err := unix.OpenTree(unix.AT_FDCWD, p, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			panic(err)
		}
		fds = append(fds, fd)
		return &guestv1.Layer{Source: &guestv1.Layer_MountFd{MountFd: uint32(len(fds) - 1)}}
	}
	setup.Overlays = append(setup.Overlays, &guestv1.Overlay{
		Target: "/opt", Lower: []*guestv1.Layer{mount(dir + "/a")}, Writable: mount(dir + "/layer"), WritableName: "opt",
	})
	if err := errors.Join(Build(setup, fds), LetGo()); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(look(dir))
}

// look does things in the new root and notes how they went.
func look(dir string) map[string]string {
	seen := make(map[string]string)
	note := func(name string, value any, err error) {
		if err != nil {
			value = errnoOf(err)
		}
		seen[name] = fmt.Sprint(value)
	}
	list := func(name string) {
		entries, err := os.ReadDir(name)
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		note("list "+name, strings.Join(names, " "), err)
	}
	read := func(name string) {
		text, err := os.ReadFile(name)
		note("read "+name, string(text), err)
	}
	write := func(name string) {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o644)
		if err == nil {
			_, err = f.WriteString("written")
			f.Close()
		}
		note("write "+name, "ok", err)
	}
	exists := func(name string) {
		_, err := os.Lstat(name)
		note("exists "+name, "yes", err)
	}
	for _, d := range []string{"/", "/dev", "/tmp", "/sys/firmware", "/proc/acpi"} {
		list(d)
	}
	for _, f := range []string{"/etc/marker", "/data/both", "/data/below", "/opt/both", "/proc/kcore", "/dev/null"} {
		read(f)
	}
	for _, f := range []string{"/etc/new", "/usr/new", "/data/new", "/opt/new", "/dev/null", "/dev/shm/new", "/tmp/new", "/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/sys/new", "/proc/irq/default_smp_affinity"} {
		write(f)
	}
	for _, f := range []string{dir, dir + "/host/secret", "/root", "/usr/bin/env"} {
		exists(f)
	}
	cwd, err := os.Getwd()
	note("the working directory", cwd, err)
	self, err := os.Readlink("/proc/self")
	note("own id", self, err)
	zeros := make([]byte, 3)
	f, err := os.Open("/dev/zero")
	if err == nil {
		_, err = f.Read(zeros)
	}
	note("three zeros", zeros, err)
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err == nil {
		n, e := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
		note("first terminal", n, e)
	} else {
		note("first terminal", nil, err)
	}
	var fs unix.Statfs_t
	err = unix.Statfs("/dev/shm", &fs)
	note("size of /dev/shm", int64(fs.Blocks)*fs.Bsize, err)
	info, err := os.Stat("/dev/shm")
	note("mode of /dev/shm", info.Mode(), err)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	var points []string
	for line := range strings.Lines(string(mounts)) {
		points = append(points, strings.Fields(line)[4])
	}
	slices.Sort(points)
	note("mounts", strings.Join(points, " "), err)
	return seen
}

func errnoOf(err error) string {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

func TestBuild(t *testing.T) {
	dir := files(t)
	out, err := run(t, "build", dir)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var seen map[string]string
	if err := json.Unmarshal([]byte(out), &seen); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for what, want := range map[string]string{
		"list /":                               "data dev etc opt proc sys tmp usr",
		"list /dev":                            "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero",
		"list /tmp":                            "",
		"read /etc/marker":                     "skeleton",
		"read /data/both":                      "upper",
		"read /data/below":                     "lower",
		"read /opt/both":                       "upper",
		"read /proc/kcore":                     "",
		"read /dev/null":                       "",
		"write /etc/new":                       "ok",
		"write /usr/new":                       "EROFS",
		"write /data/new":                      "EROFS",
		"write /opt/new":                       "ok",
		"write /dev/null":                      "ok",
		"write /dev/shm/new":                   "ok",
		"write /tmp/new":                       "ok",
		"write /proc/sys/kernel/hostname":      "EROFS",
		"write /proc/sysrq-trigger":            "ok", // into /dev/null
		"write /sys/new":                       "EROFS",
		"write /proc/irq/default_smp_affinity": "EROFS",
		"exists " + dir:                        "ENOENT",
		"exists " + dir + "/host/secret":       "ENOENT",
		"exists /root":                         "ENOENT",
		"exists /usr/bin/env":                  "yes",
		"the working directory":                "/",
		"own id":                               "1",
		"three zeros":                          "[0 0 0]",
		"first terminal":                       "0",
		"size of /dev/shm":                     "3145728",
		"mode of /dev/shm":                     "dtrwxrwxrwx",
	} {
		name := strings.TrimSuffix(strings.Fields(what)[1], "/new")
		if _, err := os.Stat(name); strings.HasPrefix(name, "/proc/") && os.IsNotExist(err) {
			want = "ENOENT" // not every kernel has it
		}
		if seen[what] != want {
			t.Errorf("%s: %q, want %q", what, seen[what], want)
		}
	}
	for _, what := range []string{"list /sys/firmware", "list /proc/acpi"} {
		if got := seen[what]; got != "" && got != "ENOENT" {
			t.Errorf("%s: %q, want nothing", what, got)
		}
	}
	for point := range strings.SplitSeq(seen["mounts"], " ") {
		first := strings.Split(point, "/")[1]
		if !slices.Contains([]string{"", "data", "dev", "opt", "proc", "sys", "usr"}, first) {
			t.Errorf("%s is mounted", point)
		}
	}
	for _, written := range []string{"layer/root/upper/etc/new", "layer/root/upper/tmp/new", "layer/opt/upper/new"} {
		if text, err := os.ReadFile(filepath.Join(dir, written)); err != nil || string(text) != "written" {
			t.Errorf("%s: %q, %v", written, text, err)
		}
	}
	for _, layer := range []string{"skeleton/etc/new", "a/new", "b/new"} {
		if _, err := os.Stat(filepath.Join(dir, layer)); !os.IsNotExist(err) {
			t.Errorf("%s: a lower layer was written: %v", layer, err)
		}
	}
}

func TestBuildFails(t *testing.T) {
	for role, want := range map[string]string{
		"no layer":      `none": no such file or directory`,
		"no descriptor": `overlay at "/": layer names descriptor 3 of 3`,
		"not a mount":   `overlay at "/": attach layer`,
		"no target":     `overlay at "/none": move the mount`,
		"no upper":      `overlay at "/": mount`,
		"no root":       "setup names no overlay",
	} {
		t.Run(role, func(t *testing.T) {
			out, err := run(t, role, files(t))
			if err == nil || !strings.Contains(out, want) {
				t.Errorf("%v, %q; want %q", err, out, want)
			}
		})
	}
}

// remount makes mounts with all sorts of flags read-only and prints their options.
func remount(dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	for _, flags := range []uintptr{
		0, unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, unix.MS_NOATIME, unix.MS_NODIRATIME | unix.MS_RELATIME, unix.MS_STRICTATIME,
	} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", flags, ""); err != nil {
			return err
		}
		var before, after unix.Statfs_t
		if err := unix.Statfs(dir, &before); err != nil {
			return err
		}
		if err := makeReadOnly(dir); err != nil {
			return err
		}
		if err := unix.Statfs(dir, &after); err != nil {
			return err
		}
		if after.Flags != before.Flags|unix.ST_RDONLY {
			return fmt.Errorf("flags %#x became %#x", before.Flags, after.Flags)
		}
		if err := unix.Unmount(dir, 0); err != nil {
			return err
		}
	}
	if err := makeReadOnly(dir + "/none"); !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("what is not there: %w", err)
	}
	return nil
}

func TestRemountKeepsFlags(t *testing.T) {
	if out, err := run(t, "remount", t.TempDir()); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
