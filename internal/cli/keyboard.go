package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// keyboard reads stdin, and gives up when a context ends: a program that has ended does
// not wait for a line that nobody types.
type keyboard struct {
	from io.Reader
}

// read reads some bytes. Only a file can be given up on: another reader must not wait.
func (k keyboard) read(ctx context.Context, p []byte) (int, error) {
	file, ok := k.from.(*os.File)
	if !ok {
		return k.from.Read(p)
	}
	if err := awaitInput(ctx, file); err != nil {
		return 0, err
	}
	n, err := file.Read(p)
	if errors.Is(err, unix.EIO) {
		return n, io.EOF // its terminal is gone
	}
	return n, err
}

// awaitInput returns when a file has something to read, or its end, or ctx has ended.
func awaitInput(ctx context.Context, file *os.File) error {
	var wake [2]int
	if err := unix.Pipe2(wake[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return fmt.Errorf("wait for stdin: %w", err)
	}
	// The writing end is closed by what the context's end calls, if that is called.
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { unix.Close(wake[1]); close(woken) })
	defer func() {
		if stop() {
			unix.Close(wake[1])
		} else {
			<-woken
		}
		unix.Close(wake[0])
	}()
	raw, err := file.SyscallConn()
	if err != nil {
		return fmt.Errorf("wait for stdin: %w", err)
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(wake[0]), Events: unix.POLLIN}}
		for {
			if _, failed = unix.Poll(fds, -1); !errors.Is(failed, unix.EINTR) {
				return
			}
		}
	})
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("wait for stdin: %w", err)
	case failed != nil:
		return fmt.Errorf("wait for stdin: %w", failed)
	}
	return nil
}
