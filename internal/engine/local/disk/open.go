package disk

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Open opens the root directory of the file system in the file at path, which the loop
// device of this number has, through one more mount that is there until it is closed.
func Open(path string, device int) (*os.File, error) {
	loop, err := held(path, device)
	if err != nil {
		return nil, err
	}
	if loop == nil {
		return nil, fmt.Errorf("loop device %d does not have %s", device, path)
	}
	defer loop.Close() // until then the device is this file's and no other's
	fd, err := mount(deviceName(device))
	if err != nil {
		return nil, fmt.Errorf("mount the file system of %s: %w", path, err)
	}
	defer unix.Close(fd) // the directory keeps the mount
	root, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(root), path), nil
}
