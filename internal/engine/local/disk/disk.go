// Package disk makes file systems of a fixed size in files: what is written into one
// fails with ENOSPC at its size, whatever room the host has, and its inodes end with it.
//
// Each is an ext4 without a journal, in a sparse file behind a loop device, and mounted
// only as detached mounts: no name on the host leads to it. The kernel lets the loop device
// go when the last mount does, so that whatever ends whoever made it, what is left is
// the file.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Maker makes disks. Its methods may be called from any goroutine.
type Maker struct {
	dir  string
	mkfs string

	mu        sync.Mutex
	templates map[int64]string // by size; made once
}

// maxTemplates bounds what is kept ready, of a few hundred KiB each. Another size is made anew
// for each disk.
const maxTemplates = 8

// blockBytes is the size of a block, of the file system and of the loop device.
const blockBytes = 4096

// NewMaker returns a Maker that keeps empty file systems, one for each size that is asked
// for, in dir, which is its own and is emptied. Nothing is made before it is needed.
func NewMaker(dir string) (*Maker, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("empty the directory of disks: %w", err)
	}
	return &Maker{dir: dir, mkfs: findProgram("mkfs.ext4"), templates: make(map[int64]string)}, nil
}

// Can says whether disks can be made here, how or why not, and what to do about it.
func (m *Maker) Can() (ok bool, detail, remedy string) {
	if m.mkfs == "" {
		return false, "mkfs.ext4 is not installed", "apt-get install e2fsprogs"
	}
	const load = "load the loop module; in a container, give it the host's /dev and CAP_SYS_ADMIN"
	control, err := os.OpenFile(loopControl, os.O_RDWR, 0)
	if err != nil {
		return false, fmt.Sprintf("there are no loop devices: %v", err), load
	}
	defer control.Close()
	// The device is not taken: the next who looks for one finds it too.
	loop, _, err := free(control)
	if err != nil {
		return false, fmt.Sprintf("there is no free loop device: %v", err), load
	}
	loop.Close()
	fs, err := unix.Fsopen("ext4", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false, fmt.Sprintf("ext4 cannot be mounted: %v", err), "use a kernel with ext4, of Linux 5.8 or newer"
	}
	unix.Close(fs)
	return true, "a file system of that size for each sandbox, behind a loop device", ""
}

// findProgram looks in PATH and where administrators' programs are, which is not in
// everybody's PATH.
func findProgram(name string) string {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); filepath.IsAbs(path) && err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path
		}
	}
	return ""
}

// A Disk is a file system that was just made. Whoever made it mounts it and closes it; it
// is there as long as one of the mounts is.
type Disk struct {
	path string
	loop *os.File
	// Device is the number of the loop device.
	Device int
}

// Create makes a file system of so many bytes in the new file path and attaches it to a
// loop device. On an error there may be the file, and nothing else.
func (m *Maker) Create(ctx context.Context, path string, bytes int64) (*Disk, error) {
	if err := m.file(ctx, path, bytes&^(blockBytes-1)); err != nil {
		return nil, fmt.Errorf("make a file system of %d bytes: %w", bytes, err)
	}
	loop, device, err := attach(path)
	if err != nil {
		return nil, fmt.Errorf("attach a loop device: %w", err)
	}
	return &Disk{path, loop, device}, nil
}

// Close gives up the disk, which stays where it is mounted.
func (d *Disk) Close() error { return d.loop.Close() }

// Mount mounts the file system, detached. Each mount is of the same one.
func (d *Disk) Mount() (*os.File, error) {
	fd, err := mount(deviceName(d.Device))
	if err != nil {
		return nil, fmt.Errorf("mount the file system of %s: %w", d.path, err)
	}
	return os.NewFile(uintptr(fd), d.path), nil
}

func mount(device string) (int, error) {
	c, err := unix.Fsopen("ext4", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(c)
	if err := unix.FsconfigSetString(c, "source", device); err != nil {
		return -1, err
	}
	// The tables of inodes are zero by the file's being sparse: writing that would fill it.
	// A barrier would be a sync of the host's disk, for what no crash has to be survived by.
	for _, option := range []string{"noinit_itable", "nobarrier"} {
		if err := unix.FsconfigSetFlag(c, option); err != nil {
			return -1, fmt.Errorf("option %s: %w", option, err)
		}
	}
	if err := unix.FsconfigCreate(c); err != nil {
		return -1, err
	}
	return unix.Fsmount(c, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOATIME)
}

// Discard has the file system in the file at path, behind the loop device of this number,
// forget what it has not written yet: its end would wait for that, and nobody will
// read it. Every use of it fails from then on. One that is not there any more is no error.
func Discard(path string, device int) error {
	loop, err := held(path, device)
	if loop == nil {
		return err
	}
	defer loop.Close() // until then the device is this file's and no other's
	fd, err := mount(deviceName(device))
	if err != nil {
		return fmt.Errorf("mount the file system of %s: %w", path, err)
	}
	defer unix.Close(fd)
	root, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	const (
		shutdown   = 0x8004587d // FS_IOC_SHUTDOWN
		noLogFlush = 2
	)
	if err := unix.IoctlSetPointerInt(root, shutdown, noLogFlush); err != nil {
		return fmt.Errorf("shut down the file system of %s: %w", path, err)
	}
	return nil
}

// AwaitDetached waits until the loop device of this number is not the file's any more.
func AwaitDetached(ctx context.Context, path string, device int) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		loop, err := held(path, device)
		if loop == nil {
			return err
		}
		loop.Close()
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("loop device %d still has %s: %w", device, path, context.Cause(ctx))
		}
	}
}

// held opens the loop device if it has the file at path: nil if it has not, or if there
// is no such file.
func held(path string, device int) (*os.File, error) {
	var file unix.Stat_t
	if err := unix.Stat(path, &file); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	loop, err := os.OpenFile(deviceName(device), os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	info, err := unix.IoctlLoopGetStatus64(int(loop.Fd()))
	if err == nil && info.Inode == file.Ino && info.Device == file.Dev {
		return loop, nil
	}
	loop.Close()
	if err == nil || errors.Is(err, unix.ENXIO) {
		return nil, nil
	}
	return nil, fmt.Errorf("ask loop device %d what it has: %w", device, err)
}
