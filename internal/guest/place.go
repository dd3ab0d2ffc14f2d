package guest

import (
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/harvest-run/executord/internal/guest/mux"
	"golang.org/x/sys/unix"
)

// Names in the place of a guest that is not told where to be. An execution's id has no
// dot, so that none of its directories is one of these.
const (
	socketFile = "guest.sock"
	lockFile   = "guest.lock"
)

// place is the private directory of such a guest: its socket is there, and the source
// files of commands.
func place() string {
	if uid := os.Geteuid(); uid != 0 {
		return filepath.Join(os.TempDir(), ".executor-"+strconv.Itoa(uid))
	}
	return "/run/executor"
}

// claim makes the place, or finds it, and takes the lock of it. held means that another
// guest has that.
func claim(dir string) (lock *os.File, held bool, err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return nil, false, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, false, err
	}
	// Where anybody may make directories, it must not be somebody else's.
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return nil, false, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return nil, false, fmt.Errorf("%s is not a directory of this user alone", dir)
	}
	lock, err = os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, false, err
	}
	// Not a file that says so: what was in a snapshot would say it too.
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, errors.Is(err, unix.EWOULDBLOCK), err
	}
	return lock, false, nil
}

// reach connects to the guest in a place, which may be about to start.
func reach(dir string, patience time.Duration) (*net.UnixConn, error) {
	address := &net.UnixAddr{Name: filepath.Join(dir, socketFile), Net: "unix"}
	deadline := time.Now().Add(patience)
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		conn, err := net.DialUnix("unix", nil, address)
		if err == nil {
			return conn, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no guest answers: %w", err)
		}
		time.Sleep(pause)
	}
}

// startPatience is how long a guest may take from its start until it answers.
const startPatience = 20 * time.Second

// Dial copies the standard input and output to the guest of this box: many connections
// over one pipe, in a session of package mux. It returns when that ends, or nobody is at
// its other end any more.
func Dial(stdin, stdout *os.File) error {
	dir := place()
	first, err := reach(dir, startPatience)
	if err != nil {
		return err
	}
	if err := first.Close(); err != nil {
		return err
	}
	return mux.Serve(stdio{stdin, stdout}, func() (mux.HalfConn, error) { return reach(dir, 0) })
}

// stdio is a pipe made of two files.
type stdio struct{ in, out *os.File }

func (s stdio) Read(p []byte) (int, error)  { return s.in.Read(p) }
func (s stdio) Write(p []byte) (int, error) { return s.out.Write(p) }
func (s stdio) Close() error                { return errors.Join(s.in.Close(), s.out.Close()) }

// keepOpenFilesFromPrograms marks every descriptor beyond the standard ones to be closed
// when a program is started.
func keepOpenFilesFromPrograms() error {
	err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	if !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	// A kernel before 5.11, or one that only looks like Linux.
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}
