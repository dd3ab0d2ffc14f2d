package modaltest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// setup says what a sandbox is going to see.
type setup struct {
	// Base is the directory that relative paths here are of.
	Base string
	// Root is an empty directory, the sandbox's "/".
	Root string
	// Trees are mounted first, "/" before the others.
	Trees []tree
	// Binds are directories of the host that are seen in the sandbox, its volumes.
	Binds []bind
	// Program is the path of this program on the host.
	Program string
	// Hostname is the sandbox's id.
	Hostname string
	// Shared says that it has the host's network.
	Shared bool
}

// tree is a directory of the sandbox that is made of layers.
type tree struct {
	Path string
	// Lower are its layers that others have too, the highest first.
	Lower []string
	// Upper and Work are the sandbox's own.
	Upper, Work string
}

type bind struct {
	From, To string
	ReadOnly bool
}

// enter makes this process see the sandbox and nothing of the host. It is in mount,
// process and network namespaces of its own already.
func (s *setup) enter() error {
	steps := []struct {
		what string
		do   func() error
	}{
		{"make mounts private", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") }},
		{"mount the root", s.mountTrees},
		{"mount devices", s.mountDevices},
		{"mount volumes", s.mountBinds},
		{"change the root", s.pivot},
		{"hide what is the host's", hide},
		{"set the host name", func() error { return unix.Sethostname([]byte(s.Hostname)) }},
		{"bring up loopback", s.loopback},
		{"drop capabilities", dropCapabilities},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return nil
}

func (s *setup) mountTrees() error {
	if err := os.Chdir(s.Base); err != nil { // short paths: the options of a mount have one page
		return err
	}
	for _, t := range s.Trees {
		options := "lowerdir=" + strings.Join(t.Lower, ":") + ",upperdir=" + t.Upper + ",workdir=" + t.Work
		if err := unix.Mount("overlay", filepath.Join(s.Root, t.Path), "overlay", unix.MS_NODEV, options); err != nil {
			return fmt.Errorf("%s (%s): %w", t.Path, options, err)
		}
	}
	return nil
}

func (s *setup) mountDevices() error {
	at := func(name string) string { return filepath.Join(s.Root, name) }
	for _, name := range []string{"proc", "sys", "dev"} {
		if err := os.MkdirAll(at(name), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("proc", at("proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	if err := unix.Mount("sysfs", at("sys"), "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", at("dev"), "tmpfs", unix.MS_NOSUID, "mode=755,size=64k"); err != nil {
		return err
	}
	for _, name := range []string{"dev/pts", "dev/shm"} {
		if err := os.Mkdir(at(name), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("devpts", at("dev/pts"), "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", at("dev/shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777,size=64m"); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		if err := bindFile("/dev/"+name, at("dev/"+name)); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, at("dev/"+name)); err != nil {
			return err
		}
	}
	// A mount of its own, so that no snapshot has it.
	if err := os.MkdirAll(at("__modal"), 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", at("__modal"), "tmpfs", unix.MS_NOSUID, "mode=755,size=64k"); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(at(toolsPath)), 0o755); err != nil {
		return err
	}
	return bindFile(s.Program, at(toolsPath))
}

// bindFile shows a file of the host at a path where there is nothing yet.
func bindFile(from, to string) error {
	f, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("show %s: %w", from, err)
	}
	return nil
}

func (s *setup) mountBinds() error {
	if s.Shared { // names are found as on the host
		if err := unix.Mount("/etc/resolv.conf", filepath.Join(s.Root, "etc/resolv.conf"), "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	for _, b := range s.Binds {
		to := filepath.Join(s.Root, b.To)
		if err := os.MkdirAll(to, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(b.From, to, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("show %s: %w", b.To, err)
		}
		flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_NODEV)
		if b.ReadOnly {
			flags |= unix.MS_RDONLY
		}
		if err := unix.Mount("", to, "", flags, ""); err != nil {
			return err
		}
	}
	return nil
}

func (s *setup) pivot() error {
	if err := os.Chdir(s.Root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return err
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	return os.Chdir("/")
}

// hide makes read-only what in /proc would change the host. Without the capability for
// mounts nobody in the sandbox can undo it.
func hide() error {
	for _, path := range []string{"/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"} {
		err := unix.Mount(path, path, "", unix.MS_BIND|unix.MS_REC, "")
		if err == nil {
			err = unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// loopback brings up the one interface that an empty network namespace has.
func (s *setup) loopback() error {
	if s.Shared {
		return nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
}

// dropCapabilities leaves what container runtimes give to root, but for making devices.
func dropCapabilities() error {
	keep := map[int]bool{
		unix.CAP_CHOWN: true, unix.CAP_DAC_OVERRIDE: true, unix.CAP_FSETID: true, unix.CAP_FOWNER: true, unix.CAP_NET_RAW: true,
		unix.CAP_SETGID: true, unix.CAP_SETUID: true, unix.CAP_SETFCAP: true, unix.CAP_SETPCAP: true,
		unix.CAP_NET_BIND_SERVICE: true, unix.CAP_SYS_CHROOT: true, unix.CAP_KILL: true, unix.CAP_AUDIT_WRITE: true,
	}
	for c := 0; ; c++ {
		if keep[c] {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); errors.Is(err, unix.EINVAL) {
			return nil // beyond the last
		} else if err != nil {
			return err
		}
	}
}
