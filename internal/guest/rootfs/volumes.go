package rootfs

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"golang.org/x/sys/unix"
)

// volumes mounts the volumes in the new root, which is not the root yet. Nothing in it is
// to be trusted: an image may have links to anywhere in the place of any directory. They
// lead to somewhere in the new root, and what is mounted at /proc, /dev and /sys
// afterwards covers what was mounted there.
func (b *builder) volumes(volumes []*guestv1.Volume, root string) error {
	if len(volumes) == 0 {
		return nil
	}
	top, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(top)
	for _, v := range volumes {
		if err := b.volume(v, top); err != nil {
			return fmt.Errorf("volume at %q: %w", v.GetTarget(), err)
		}
	}
	return nil
}

func (b *builder) volume(v *guestv1.Volume, top int) error {
	mount, err := b.detached(v.GetSource())
	if err != nil {
		return err
	}
	defer unix.Close(mount)
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	if err := unix.MountSetattr(mount, "", unix.AT_EMPTY_PATH, attr); err != nil {
		return fmt.Errorf("keep devices and set-user-id programs out: %w", err)
	}
	at, err := makePath(top, v.GetTarget())
	if err != nil {
		return err
	}
	defer unix.Close(at)
	if err := unix.MoveMount(mount, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	return nil
}

// detached is the mount of a layer, which the caller closes.
func (b *builder) detached(l *guestv1.Layer) (int, error) {
	if fd, ok := b.opened[l]; ok {
		mount, err := unix.OpenTree(fd, "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return -1, fmt.Errorf("clone the mount: %w", err)
		}
		return mount, nil
	}
	i := int(l.GetMountFd())
	if i >= len(b.fds) {
		return -1, fmt.Errorf("source names descriptor %d of %d", i, len(b.fds))
	}
	return b.fds[i], nil
}

// makePath opens a directory of the tree below top, and makes what is missing of it. No
// link leads out of that tree.
func makePath(top int, target string) (int, error) {
	if !filepath.IsAbs(target) {
		return -1, errors.New("the path is not absolute")
	}
	how := &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	at, err := unix.FcntlInt(uintptr(top), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	done := ""
	for name := range strings.SplitSeq(strings.Trim(filepath.Clean(target), "/"), "/") {
		done += "/" + name
		next, err := unix.Openat2(top, done, how)
		if errors.Is(err, unix.ENOENT) {
			if err = unix.Mkdirat(at, name, 0o755); err == nil {
				next, err = unix.Openat2(top, done, how)
			}
		}
		unix.Close(at)
		if err != nil {
			return -1, fmt.Errorf("make directory %s: %w", strconv.Quote(done), err)
		}
		at = next
	}
	return at, nil
}
