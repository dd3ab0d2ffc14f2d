package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrInUse is in the chain of Open's error if another executord has the directory.
var ErrInUse = errors.New("is in use by another executord")

const (
	// orphanTime is how long the lock of a holder that has died is waited for: a process
	// that it was just starting keeps the lock until it has come to its exec.
	orphanTime  = 5 * time.Second
	orphanRetry = 10 * time.Millisecond
)

// lockDir makes this process the only one on a state directory until the file it
// returns is closed, which the kernel also does when the process dies. The file
// holds the pid of its holder, for people. It is closed on exec, so that sandboxes
// that outlive executord do not hold the lock.
func lockDir(dir string) (*os.File, error) {
	file, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock of state directory %q: %w", dir, err)
	}
	if err := takeLock(file, dir); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

func takeLock(file *os.File, dir string) error {
	err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	for begun := time.Now(); errors.Is(err, unix.EWOULDBLOCK) && died(holder(file)) && time.Since(begun) < orphanTime; {
		time.Sleep(orphanRetry)
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("state directory %q %w (pid %s)", dir, ErrInUse, holder(file))
	}
	if err != nil {
		return fmt.Errorf("lock state directory %q: %w", dir, err)
	}
	// The file stays when the lock goes: removing it would let two processes lock two
	// files of one name.
	if err := file.Truncate(0); err != nil {
		return fmt.Errorf("write the lock of state directory %q: %w", dir, err)
	}
	if _, err := file.WriteAt(strconv.AppendInt(nil, int64(os.Getpid()), 10), 0); err != nil {
		return fmt.Errorf("write the lock of state directory %q: %w", dir, err)
	}
	return nil
}

// died says whether a process is known to be gone.
func died(pid string) bool {
	n, err := strconv.Atoi(pid)
	return err == nil && n > 0 && errors.Is(unix.Kill(n, 0), unix.ESRCH)
}

// holder reads the pid of the lock's holder. It is "unknown" in the moment between
// taking the lock and writing the pid.
func holder(file *os.File) string {
	content := make([]byte, 20)
	n, _ := file.ReadAt(content, 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(content[:n])))
	if err != nil {
		return "unknown"
	}
	return strconv.Itoa(pid)
}
