package disk

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

const loopControl = "/dev/loop-control"

func deviceName(device int) string { return "/dev/loop" + strconv.Itoa(device) }

// attach gives the file a loop device, which the kernel lets go when nobody has it open
// or mounted any more.
func attach(path string) (*os.File, int, error) {
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	defer file.Close()
	control, err := os.OpenFile(loopControl, os.O_RDWR, 0)
	if err != nil {
		return nil, 0, err
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(file.Fd()), Size: blockBytes}
	// Direct: not a second copy of everything in the host's memory. Where the file
	// system under it cannot do that, the kernel goes without.
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	// Others on this host look for free devices too, and between the look and the
	// taking one can be faster.
	for range 1000 {
		loop, device, err := free(control)
		if errors.Is(err, unix.ENXIO) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, 0, err
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &config)
		if err == nil {
			// Some kernels mount nothing that is open for writing.
			held, err := os.Open(deviceName(device))
			loop.Close()
			return held, device, err
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, 0, fmt.Errorf("configure %s: %w", deviceName(device), err)
		}
	}
	return nil, 0, errors.New("others took every free one")
}

// free opens a loop device that has no file.
func free(control *os.File) (*os.File, int, error) {
	device, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return nil, 0, fmt.Errorf("find a free one: %w", err)
	}
	loop, err := os.OpenFile(deviceName(device), os.O_RDWR, 0)
	return loop, device, err
}
