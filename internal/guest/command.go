package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"golang.org/x/sys/unix"
)

const (
	// drainWindow is how long processes that outlive their leader may go on before
	// they are killed: enough for the tee behind `exec > >(tee log)` to write its
	// last line, too short to be felt.
	drainWindow = 100 * time.Millisecond
	// killPatience bounds the wait for killed processes to be gone. One in
	// uninterruptible sleep can take longer; then the exit says that the tree was
	// not seen empty.
	killPatience = 5 * time.Second
	// holderPatience bounds the wait for the end of the pipes after the tree is gone:
	// a process of another command can hold one that it was sent over a socket.
	holderPatience = time.Second

	spoolBytes  = 1 << 20
	pipeBytes   = 1 << 20
	smallBuffer = 4 << 10
	largeBuffer = 128 << 10
)

// command is one execution inside the guest: its processes, its output, its end.
// Its goroutine run owns it; the others only send stops and read the spool.
type command struct {
	id    string
	spool *spool
	tree  tree
	// started closes once pid and micros, or failed, are set.
	started chan struct{}
	pid     int
	micros  uint64
	failed  error

	begun     time.Time
	died      <-chan death
	pipes     [2]*os.File
	read      sync.WaitGroup
	sourceDir string

	stops chan stop
	ended chan struct{}
}

// stop asks for the end of a command.
type stop struct {
	cause guestv1.StopCause
	grace time.Duration
}

// start makes the command's processes. On an error nothing of it is left.
func (c *command) start(g *Guest, r *guestv1.StartRequest, arrived time.Time) (err error) {
	var undo []func()
	defer func() {
		if err != nil {
			for _, f := range undo {
				f()
			}
		}
	}()

	args := append([]string(nil), r.GetArgs()...)
	if len(args) == 0 {
		return refuse(guestv1.Error_KIND_INVALID, "no program")
	}
	dir := r.GetWorkingDirectory()
	if err := workingDirectory(dir, r.GetCreateWorkingDirectory()); err != nil {
		return err
	}
	if name := r.GetSourceName(); name != "" {
		at := int(r.GetSourceArgument())
		if at >= len(args) || filepath.Base(name) != name {
			return refuse(guestv1.Error_KIND_INVALID, "source argument %d of %d, name %q", at, len(args), name)
		}
		c.sourceDir = filepath.Join(g.runtimeDirectory, c.id)
		undo = append(undo, func() { _ = os.RemoveAll(c.sourceDir) })
		if args[at], err = writeSource(c.sourceDir, name, r.GetSource()); err != nil {
			return err
		}
	}
	path, err := lookPath(args[0], r.GetEnv(), dir)
	if err != nil {
		return err
	}

	if c.tree, err = g.newTree(c.id); err != nil {
		return err
	}
	undo = append(undo, c.tree.remove)
	stdin, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer stdin.Close()
	var writers [2]int
	for i := range writers {
		if c.pipes[i], writers[i], err = outputPipe(); err != nil {
			return refuse(guestv1.Error_KIND_EXHAUSTED, "make a pipe: %v", err)
		}
		defer unix.Close(writers[i])
		undo = append(undo, func() { c.pipes[i].Close() })
	}
	attr := &syscall.ProcAttr{
		Dir: dir, Env: r.GetEnv(),
		Files: []uintptr{stdin.Fd(), uintptr(writers[0]), uintptr(writers[1])},
		// A session of its own: nothing that the command does to its group or its
		// terminal reaches another command.
		Sys: &syscall.SysProcAttr{Setsid: true},
	}
	c.tree.adopt(attr.Sys)
	c.begun = time.Now()
	c.pid, c.died, err = g.reaper.spawn(func() (int, error) { return g.spawner.start(path, args, attr) })
	if err != nil {
		return execError(path, err)
	}
	c.tree.started(c.pid)
	c.micros = uint64(time.Since(arrived).Microseconds())
	return nil
}

// run follows the command to its end and leaves the exit in the spool.
func (c *command) run(free *buffers, timeout, grace time.Duration) {
	for i, stream := range []guestv1.Stream{guestv1.Stream_STREAM_STDOUT, guestv1.Stream_STREAM_STDERR} {
		c.read.Go(func() { c.pump(c.pipes[i], stream, free) })
	}
	var timedOut, kill <-chan time.Time
	if timeout > 0 {
		t := time.NewTimer(timeout)
		defer t.Stop()
		timedOut = t.C
	}
	var (
		leader   death
		dead     bool
		cause    guestv1.StopCause
		killAt   time.Time
		killed   bool
		reaped   int
		stopping = func(s stop) {
			if cause == guestv1.StopCause_STOP_CAUSE_UNSPECIFIED {
				cause = s.cause
				signalAll(c.tree, syscall.SIGTERM)
				// A stopped process takes TERM only once it goes on.
				signalAll(c.tree, syscall.SIGCONT)
			}
			if at := time.Now().Add(s.grace); killAt.IsZero() || at.Before(killAt) {
				killAt = at
				kill = time.After(s.grace)
			}
		}
	)
	for !dead {
		select {
		case leader = <-c.died:
			dead = true
		case <-timedOut:
			timedOut = nil
			stopping(stop{guestv1.StopCause_STOP_CAUSE_TIMEOUT, grace})
		case s := <-c.stops:
			stopping(s)
		case <-kill:
			kill, killed = nil, true
			n, _ := c.tree.kill(killPatience)
			reaped += n
		}
	}
	// What outlives the leader has the rest of the grace if the command is being
	// stopped, else only the moment it takes to write its last words.
	left := drainWindow
	if cause != guestv1.StopCause_STOP_CAUSE_UNSPECIFIED {
		left = time.Until(killAt)
	}
	if !c.awaitStrays(left) {
		killed = killed || cause != guestv1.StopCause_STOP_CAUSE_UNSPECIFIED
	}
	n, empty := c.tree.kill(killPatience)
	reaped += n
	c.drain()
	ended := time.Now()

	exit := c.exitOf(leader)
	exit.StopCause = cause
	exit.Killed = killed
	exit.Reaped = uint32(reaped)
	exit.TreeEmpty = empty
	exit.RunMicros = uint64(ended.Sub(c.begun).Microseconds())
	if first, ok := c.spool.firstOutput(); ok {
		micros := uint64(first.Sub(c.begun).Microseconds())
		exit.FirstOutputMicros = &micros
	}
	c.tree.remove()
	if c.sourceDir != "" {
		_ = os.RemoveAll(c.sourceDir) // what the command left in it is its sandbox's to remove
	}
	c.spool.finish(exit)
	close(c.ended)
}

// awaitStrays waits until nothing of the tree is left, at most so long; a stop that
// comes meanwhile can shorten that.
func (c *command) awaitStrays(left time.Duration) bool {
	deadline := time.Now().Add(left)
	for pause := 200 * time.Microsecond; ; pause = min(2*pause, 5*time.Millisecond) {
		if len(c.tree.processes()) == 0 {
			return true
		}
		if !time.Now().Before(deadline) {
			return false
		}
		select {
		case s := <-c.stops:
			if at := time.Now().Add(s.grace); at.Before(deadline) {
				deadline = at
			}
		case <-time.After(pause):
		}
	}
}

// drain waits for the end of the pipes; nobody of the tree holds them any more.
func (c *command) drain() {
	done := make(chan struct{})
	var waiter sync.WaitGroup
	waiter.Go(func() { c.read.Wait(); close(done) })
	for waiting := true; waiting; {
		select {
		case <-done:
			waiting = false
		case <-time.After(holderPatience):
			// A reader that waits for room in the spool is waited for: its bytes are
			// the command's. Pipes that are empty and do not end are given up.
			if c.pipesIdle() {
				for _, p := range c.pipes {
					_ = p.SetReadDeadline(time.Unix(1, 0))
				}
			}
		}
	}
	waiter.Wait()
	for _, p := range c.pipes {
		p.Close()
	}
}

// pipesIdle says whether nothing is left to read in either pipe.
func (c *command) pipesIdle() bool {
	for _, p := range c.pipes {
		raw, err := p.SyscallConn()
		if err != nil {
			continue
		}
		waiting := 0
		_ = raw.Control(func(fd uintptr) { waiting, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
		if waiting > 0 {
			return false
		}
	}
	return true
}

// pump moves one pipe into the spool until the pipe ends.
func (c *command) pump(pipe *os.File, stream guestv1.Stream, free *buffers) {
	size := smallBuffer
	for {
		b := free.get(size)
		n, err := pipe.Read(b.bytes)
		if n > 0 {
			if n == len(b.bytes) {
				size = largeBuffer
			} else if n < smallBuffer {
				size = smallBuffer
			}
			c.spool.append(stream, b, n)
		} else {
			b.release()
		}
		if err != nil {
			return
		}
	}
}

// exitOf translates how the leader ended.
func (c *command) exitOf(d death) *guestv1.Exit {
	exit := &guestv1.Exit{
		CpuUserMicros:   uint64(time.Duration(d.usage.Utime.Nano()).Microseconds()),
		CpuSystemMicros: uint64(time.Duration(d.usage.Stime.Nano()).Microseconds()),
		MaxRssBytes:     uint64(d.usage.Maxrss) << 10,
		CoreDumped:      d.status.CoreDump(),
	}
	if user, system, ok := c.tree.cpu(); ok {
		exit.CpuUserMicros, exit.CpuSystemMicros = uint64(user.Microseconds()), uint64(system.Microseconds())
	}
	if d.status.Signaled() {
		exit.Status = &guestv1.Exit_Signal{Signal: int32(d.status.Signal())}
	} else {
		exit.Status = &guestv1.Exit_Code{Code: int32(d.status.ExitStatus())}
	}
	return exit
}

// workingDirectory checks the directory before the start, because execve's error
// would not tell it from a missing program.
func workingDirectory(dir string, create bool) error {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, os.ErrNotExist) && create:
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return refuse(guestv1.Error_KIND_NO_SUCH_PROGRAM, "make the working directory: %v", err)
		}
	case err != nil:
		return refuse(guestv1.Error_KIND_NO_SUCH_PROGRAM, "working directory %q: %v", dir, errors.Unwrap(err))
	case !info.IsDir():
		return refuse(guestv1.Error_KIND_NO_SUCH_PROGRAM, "working directory %q: is not a directory", dir)
	}
	return nil
}

// writeSource writes the source file into a directory of its own and returns its path.
func writeSource(dir, name string, source []byte) (string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make the directory for the source: %w", err)
	}
	path := filepath.Join(dir, name)
	// O_EXCL: nothing in the sandbox may have put a link there.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", fmt.Errorf("write the source: %w", err)
	}
	_, err = f.Write(source)
	if err := errors.Join(err, f.Close()); err != nil {
		return "", fmt.Errorf("write the source: %w", err)
	}
	return path, nil
}

// outputPipe makes a pipe: an end that is read without holding a thread, and the
// descriptor of the end for the program, which must be a blocking one.
func outputPipe() (r *os.File, w int, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, -1, err
	}
	if err := unix.SetNonblock(p[0], true); err != nil {
		unix.Close(p[0])
		unix.Close(p[1])
		return nil, -1, err
	}
	// A large pipe lets a fast writer run on while it is being read: three times the
	// throughput of the 64 KiB default. Refused where the user's pages are used up,
	// which costs only speed.
	_, _ = unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, pipeBytes)
	return os.NewFile(uintptr(p[0]), "output"), p[1], nil
}
