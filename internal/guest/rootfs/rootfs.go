// Package rootfs builds the root file system of a sandbox from inside its own
// namespaces, as process 1, and moves into it: overlays over the layers that
// executord names, then /proc, /dev and /sys of the sandbox's own. Nothing of the
// host's file system stays reachable that is not a layer. It is linked into the
// guest: x/sys and the standard library only.
package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"golang.org/x/sys/unix"
)

// staging is where the new root is put together: a tmpfs that only this mount
// namespace sees, over a directory that every host has.
const staging = "/tmp"

// Build makes the root file system that setup describes and makes it the root of
// the calling process's mount namespace. fds are the descriptors that setup names. The
// old root has still to be let go.
func Build(setup *guestv1.Setup, fds []int) error {
	if len(setup.GetOverlays()) == 0 {
		return errors.New("setup names no overlay for the root")
	}
	// From here on nothing that is mounted goes back to the host.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// Paths are opened before the staging tmpfs can hide them.
	opened := make(map[*guestv1.Layer]int)
	for _, l := range layers(setup) {
		if p, ok := l.GetSource().(*guestv1.Layer_Path); ok {
			fd, err := unix.Open(p.Path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("open layer %q: %w", p.Path, err)
			}
			defer unix.Close(fd)
			opened[l] = fd
		}
	}
	if err := unix.Mount("tmpfs", staging, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700,size=1m"); err != nil {
		return fmt.Errorf("mount the staging tmpfs: %w", err)
	}
	b := &builder{fds: fds, opened: opened}
	// Each is made at a place of its own in the staging tmpfs, so none waits for
	// another, and moved to where it belongs when all are there. What takes long first.
	var work []func() error
	for i, o := range setup.GetOverlays() {
		work = append(work, func() error {
			if err := b.overlay(i, o); err != nil {
				return fmt.Errorf("overlay at %q: %w", o.GetTarget(), err)
			}
			return nil
		})
	}
	work = append(work, func() error { return devices(setup.GetShmBytes()) }, func() error { return procAndSys(setup.GetHostNetwork()) })
	if err := inParallel(work); err != nil {
		return err
	}
	for i, o := range setup.GetOverlays()[1:] {
		if err := move(overlayPoint(i+1), overlayPoint(0)+o.GetTarget()); err != nil {
			return fmt.Errorf("overlay at %q: %w", o.GetTarget(), err)
		}
	}
	if err := b.volumes(setup.GetVolumes(), overlayPoint(0)); err != nil {
		return err
	}
	for _, name := range []string{"proc", "dev", "sys"} {
		if err := move(staging+"/"+name, overlayPoint(0)+"/"+name); err != nil {
			return fmt.Errorf("/%s: %w", name, err)
		}
	}
	return enter(overlayPoint(0))
}

// layers are all that a setup names.
func layers(setup *guestv1.Setup) []*guestv1.Layer {
	var all []*guestv1.Layer
	for _, o := range setup.GetOverlays() {
		all = append(append(all, o.GetLower()...), o.GetWritable())
	}
	for _, v := range setup.GetVolumes() {
		all = append(all, v.GetSource())
	}
	return all
}

// lanes is how many things are done at a time: those that wait are few, and a thread
// takes its time to be made as well.
const lanes = 2

// inParallel does all of the work and returns the errors.
func inParallel(work []func() error) error {
	var (
		next  atomic.Int32
		extra sync.WaitGroup
		errs  = make([]error, len(work)) // each by its own index
	)
	lane := func() {
		for i := next.Add(1) - 1; int(i) < len(work); i = next.Add(1) - 1 {
			errs[i] = work[i]()
		}
	}
	for range lanes - 1 {
		extra.Go(lane)
	}
	lane()
	extra.Wait()
	return errors.Join(errs...)
}

// builder makes the mounts, each below its own directory in the staging tmpfs.
type builder struct {
	fds    []int
	opened map[*guestv1.Layer]int
}

// overlayPoint is where an overlay is mounted until it is moved.
func overlayPoint(i int) string { return staging + "/root" + strconv.Itoa(i) }

// move moves a mount with those below it.
func move(from, to string) error {
	if err := unix.MoveMount(unix.AT_FDCWD, from, unix.AT_FDCWD, to, 0); err != nil {
		return fmt.Errorf("move the mount into place: %w", err)
	}
	return nil
}

// layer makes a layer reachable under a path short enough for many of them to fit
// into one mount option page.
func (b *builder) layer(path string, l *guestv1.Layer) (string, error) {
	if fd, ok := b.opened[l]; ok {
		return "/proc/self/fd/" + strconv.Itoa(fd), nil
	}
	i := int(l.GetMountFd())
	if i >= len(b.fds) {
		return "", fmt.Errorf("layer names descriptor %d of %d", i, len(b.fds))
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return "", err
	}
	if err := unix.MoveMount(b.fds[i], "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return "", fmt.Errorf("attach layer: %w", err)
	}
	unix.Close(b.fds[i])
	return path, nil
}

// overlay mounts the overlay of this index at its overlayPoint.
func (b *builder) overlay(index int, o *guestv1.Overlay) error {
	at := staging + "/l" + strconv.Itoa(index) + "-"
	lower := make([]string, len(o.GetLower()))
	for i, l := range o.GetLower() {
		path, err := b.layer(at+strconv.Itoa(i), l)
		if err != nil {
			return err
		}
		lower[i] = path
	}
	// userxattr: the only overlay attributes a user namespace may write. volatile: a
	// sandbox's own layer never has to survive a crash of the host, and without it
	// its end would wait for a sync of the whole disk.
	options := "userxattr,lowerdir=" + strings.Join(lower, ":")
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV)
	if o.GetWritable() == nil {
		flags |= unix.MS_RDONLY
	} else {
		w, err := b.layer(at+"w", o.GetWritable())
		if err != nil {
			return err
		}
		dir := filepath.Join(w, o.GetWritableName())
		options += ",volatile,upperdir=" + dir + "/upper,workdir=" + dir + "/work"
	}
	target := overlayPoint(index)
	if err := os.Mkdir(target, 0o755); err != nil {
		return err
	}
	if o.GetWritable() == nil && len(lower) == 1 {
		// One read-only layer is no overlay, which wants two.
		if err := unix.Mount(lower[0], target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
		return makeReadOnly(target)
	}
	if err := unix.Mount("overlay", target, "overlay", flags, options); err != nil {
		return fmt.Errorf("mount (%s): %w", options, err)
	}
	return nil
}

// quiet are the flags of mounts in which there is nothing to run.
const quiet = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// devices mounts /dev.
func devices(shmBytes uint64) error {
	const dev = staging + "/dev"
	if err := os.Mkdir(dev, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", dev, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0755,size=64k"); err != nil {
		return fmt.Errorf("mount /dev: %w", err)
	}
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		node := filepath.Join(dev, name)
		if err := os.WriteFile(node, nil, 0o666); err != nil {
			return err
		}
		if err := unix.Mount("/dev/"+name, node, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind /dev/%s: %w", name, err)
		}
	}
	for _, d := range []string{"pts", "shm"} {
		if err := os.Mkdir(filepath.Join(dev, d), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("devpts", dev+"/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620"); err != nil {
		return fmt.Errorf("mount /dev/pts: %w", err)
	}
	if err := unix.Mount("tmpfs", dev+"/shm", "tmpfs", quiet, "mode=1777,size="+strconv.FormatUint(shmBytes, 10)); err != nil {
		return fmt.Errorf("mount /dev/shm: %w", err)
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
		"stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, filepath.Join(dev, name)); err != nil {
			return err
		}
	}
	return nil
}

// procAndSys mounts /proc and /sys.
func procAndSys(hostNetwork bool) error {
	const proc, sys = staging + "/proc", staging + "/sys"
	for _, d := range []string{proc, sys} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("proc", proc, "proc", quiet, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	err := unix.Mount("sysfs", sys, "sysfs", quiet|unix.MS_RDONLY, "")
	if errors.Is(err, unix.EPERM) && hostNetwork {
		// It belongs to the network's owner, and that is the host: what is left of it in
		// the sandbox is an empty directory.
		err = unix.Mount("tmpfs", sys, "tmpfs", quiet|unix.MS_RDONLY, "size=0")
	}
	if err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	return mask()
}

// mask hides what /proc and /sys tell of the host or let a process change.
func mask() error {
	for _, name := range []string{"proc/kcore", "proc/keys", "proc/latency_stats", "proc/timer_list", "proc/sched_debug", "proc/sysrq-trigger", "proc/kmsg", "proc/kallsyms", "proc/kpagecount", "proc/kpageflags", "proc/kpagecgroup", "proc/modules"} {
		err := unix.Mount(os.DevNull, filepath.Join(staging, name), "", unix.MS_BIND, "")
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("mask /%s: %w", name, err)
		}
	}
	// One empty file system is seen in all places.
	const empty = staging + "/empty"
	if err := os.Mkdir(empty, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", empty, "tmpfs", quiet|unix.MS_RDONLY, "size=0"); err != nil {
		return fmt.Errorf("mount what masks directories: %w", err)
	}
	for _, name := range []string{"proc/acpi", "proc/scsi", "sys/firmware", "sys/fs/bpf", "sys/kernel/debug", "sys/kernel/tracing", "sys/kernel/security", "sys/devices/virtual/powercap"} {
		err := unix.Mount(empty, filepath.Join(staging, name), "", unix.MS_BIND, "")
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("mask /%s: %w", name, err)
		}
	}
	for _, name := range []string{"proc/sys", "proc/bus", "proc/fs", "proc/irq", "proc/pressure"} {
		path := filepath.Join(staging, name)
		err := unix.Mount(path, path, "", unix.MS_BIND|unix.MS_REC, "")
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("bind /%s: %w", name, err)
		}
		if err := makeReadOnly(path); err != nil {
			return fmt.Errorf("make /%s read-only: %w", name, err)
		}
	}
	return nil
}

// makeReadOnly makes a mount read-only and leaves its other flags: a user namespace
// may not clear those that were set outside of it.
func makeReadOnly(path string) error {
	return unix.MountSetattr(unix.AT_FDCWD, path, 0, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}

// enter makes the new root the root.
func enter(root string) error {
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot into the new root: %w", err)
	}
	return nil
}

// LetGo lets the old root go, after Build and before anybody else's program is started:
// it lies over the new one at the working directory. Detached, it takes the staging
// tmpfs, the layers' mounts and every path of the host with it. The kernel takes its
// time for that, in which what begins at "/" is the new root's already.
func LetGo() error {
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let the old root go: %w", err)
	}
	return os.Chdir("/")
}
