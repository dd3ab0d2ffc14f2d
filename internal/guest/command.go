package guest

import (
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

const (
	// killPatience bounds the wait for killed processes to be gone. One in
	// uninterruptible sleep can take longer; then the exit says that the tree was
	// not seen empty.
	killPatience = 5 * time.Second
	// holderPatience bounds the wait for the end of the pipes after the tree is gone:
	// a process of another command can hold one that it was sent over a socket.
	holderPatience = time.Second

	spoolBytes = 1 << 20
)

// command is one execution inside the guest: its processes, its output, its end.
// Its goroutine run owns it; the others only order stops and read the spool.
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
	pipes     []*os.File // of stdout and stderr, or the terminal; closed by run
	terminal  *terminal  // nil without one
	input     *input     // nil if it is not open
	sourceDir string
	// over closes when nobody of the tree is left to write.
	over chan struct{}
	// ended closes when the exit can be read and nothing is left to clean up.
	ended chan struct{}

	alive sync.RWMutex // held for writing by what makes it dead
	dead  bool         // the leader has ended

	mu      sync.Mutex
	cause   guestv1.StopCause // why it is being stopped, if it is
	killAt  time.Time         // when the grace is over
	ordered chan struct{}     // has one element when cause or killAt is news
	active  time.Time         // when it was last seen active; zero if nobody looks
}

func newCommand(id string) *command {
	return &command{
		id: id, spool: newSpool(spoolBytes),
		started: make(chan struct{}), over: make(chan struct{}), ended: make(chan struct{}), ordered: make(chan struct{}, 1),
	}
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

	if err := checkStart(r); err != nil {
		return err
	}
	args := append([]string(nil), r.GetArgs()...)
	dir := r.GetWorkingDirectory()
	if err := workingDirectory(dir, r.GetCreateWorkingDirectory()); err != nil {
		return err
	}
	if name := r.GetSourceName(); name != "" {
		c.sourceDir = filepath.Join(g.runtimeDirectory, c.id)
		undo = append(undo, func() { _ = os.RemoveAll(c.sourceDir) })
		if args[r.GetSourceArgument()], err = writeSource(c.sourceDir, name, r.GetSource()); err != nil {
			return err
		}
	}
	path, err := lookPath(args[0], r.GetEnv(), dir)
	if err != nil {
		return err
	}

	if c.tree, err = g.newTree(c.id); err != nil {
		return resourceError(err)
	}
	undo = append(undo, c.tree.remove)
	attr := &syscall.ProcAttr{
		Dir: dir, Env: withInherited(r.GetEnv(), g.environment),
		// A session of its own: nothing that the command does to its group or its
		// terminal reaches another command.
		Sys: &syscall.SysProcAttr{Setsid: true},
	}
	done, disconnect, err := c.connect(g, r, attr)
	if err != nil {
		return err
	}
	defer done()
	undo = append(undo, disconnect)
	c.tree.adopt(attr.Sys)
	c.begun = time.Now()
	c.pid, c.died, err = g.reaper.spawn(func() (int, error) {
		pid, err := g.spawner.startLimited(path, args, attr, r.GetOpenFiles())
		if err == nil {
			c.tree.started(pid)
		}
		return pid, err
	})
	if err != nil {
		return execError(path, err)
	}
	c.micros = uint64(time.Since(arrived).Microseconds())
	return nil
}

// isOver says whether nobody of the tree is left to write.
func (c *command) isOver() bool {
	select {
	case <-c.over:
		return true
	default:
		return false
	}
}

// stop orders the end. It never waits: whoever orders it may be the one who has to
// read output for the command to come to its end. The first cause stands, a later
// order can only shorten the grace.
func (c *command) stop(cause guestv1.StopCause, grace time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := time.Now().Add(grace)
	if c.cause != guestv1.StopCause_STOP_CAUSE_UNSPECIFIED && !at.Before(c.killAt) {
		return
	}
	c.killAt = at
	if c.cause == guestv1.StopCause_STOP_CAUSE_UNSPECIFIED {
		c.cause = cause
	}
	select {
	case c.ordered <- struct{}{}:
	default:
	}
}

// order is the stop that is in force; no cause means none.
func (c *command) order() (guestv1.StopCause, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause, c.killAt
}

// run follows the command to its end and leaves the exit in the spool.
func (c *command) run(stock *stock, timeout, idle, grace time.Duration) {
	var pumps sync.WaitGroup
	streams := [...]guestv1.Stream{guestv1.Stream_STREAM_STDOUT, guestv1.Stream_STREAM_STDERR}
	for i, pipe := range c.pipes {
		pumps.Go(func() { pump(pipe, newSource(c.spool, streams[i], stock)) })
	}
	end := &ending{tree: c.tree, found: make(map[int]bool)}
	leader := c.lead(end, timeout, idle, grace)
	c.leaderIsDead()
	if !c.awaitStrays(end) {
		end.kill()
	}
	close(c.over)
	c.drain(&pumps)

	exit := c.exitOf(leader)
	exit.StopCause = end.cause
	exit.Killed = end.killed
	exit.Reaped, exit.TreeEmpty = end.outcome()
	exit.DiscardedBytes = c.spool.givenUp()
	c.spool.finish(exit)

	// What is left to clean up is nothing that anybody waits for.
	c.tree.remove()
	if c.sourceDir != "" {
		_ = os.RemoveAll(c.sourceDir)
	}
	close(c.ended)
}

// ending is what run does about the end of the tree and finds out about it.
type ending struct {
	tree   tree
	cause  guestv1.StopCause // of the stop that was carried out, if one was
	found  map[int]bool      // processes that were left, or had to be killed
	killed bool              // TERM and the grace did not do
	empty  bool              // the tree was seen empty
}

// find notes who is there and says whether nobody is.
func (e *ending) find() bool {
	pids, err := e.tree.processes()
	for _, pid := range pids {
		e.found[pid] = true
	}
	e.empty = err == nil && len(pids) == 0
	return e.empty
}

// terminate asks everybody to end.
func (e *ending) terminate() {
	pids, _ := e.tree.processes()
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGTERM)
		// A stopped process takes TERM only once it goes on.
		_ = syscall.Kill(pid, syscall.SIGCONT)
	}
}

// kill ends whoever is there.
func (e *ending) kill() {
	if !e.find() {
		e.killed = e.killed || e.cause != guestv1.StopCause_STOP_CAUSE_UNSPECIFIED
		e.empty = e.tree.kill(killPatience)
	}
}

// outcome is how many of those that were found are gone, and whether all are.
func (e *ending) outcome() (reaped uint32, empty bool) {
	if e.empty {
		return uint32(len(e.found)), true
	}
	pids, err := e.tree.processes()
	for _, pid := range pids {
		delete(e.found, pid)
	}
	return uint32(len(e.found)), err == nil && len(pids) == 0
}

// lead waits for the end of the leader and carries out stops meanwhile.
func (c *command) lead(end *ending, timeout, idle, grace time.Duration) death {
	var timedOut <-chan time.Time
	if timeout > 0 {
		t := time.NewTimer(timeout)
		defer t.Stop()
		timedOut = t.C
	}
	kill := time.NewTimer(time.Hour)
	kill.Stop()
	defer kill.Stop()
	idleness := c.watchIdle(idle, grace)
	defer idleness.stop()
	for {
		select {
		case d := <-c.died:
			return d
		case <-timedOut:
			timedOut = nil
			c.stop(guestv1.StopCause_STOP_CAUSE_TIMEOUT, grace)
		case <-idleness.timer.C:
			idleness.look()
		case <-c.ordered:
			idleness.stop()
			cause, at := c.order()
			if end.cause == guestv1.StopCause_STOP_CAUSE_UNSPECIFIED {
				if d, ok := c.alreadyDead(); ok {
					return d
				}
				end.cause = cause
				if time.Until(at) > 0 {
					end.terminate()
				}
			}
			kill.Reset(time.Until(at))
		case <-kill.C:
			end.kill()
		}
	}
}

// alreadyDead finds a leader that ended by itself before it was stopped and whose end
// is only not told yet.
func (c *command) alreadyDead() (death, bool) {
	pids, err := c.tree.processes()
	if err != nil || slices.Contains(pids, c.pid) {
		return death{}, false
	}
	t := time.NewTimer(killPatience) // a process that traces it may keep its end from us
	defer t.Stop()
	select {
	case d := <-c.died:
		return d, true
	case <-t.C:
		return death{}, false
	}
}

// drain waits for the end of the pipes, or of the terminal; nobody of the tree holds them any more. If
// somebody else does, what is in them is taken and they are given up. A pump that
// waits for room in the spool is waited for: its bytes are the command's.
func (c *command) drain(pumps *sync.WaitGroup) {
	patience := time.AfterFunc(holderPatience, func() {
		for _, p := range c.pipes {
			_ = p.SetReadDeadline(time.Unix(1, 0))
		}
	})
	defer patience.Stop()
	if c.terminal != nil {
		c.terminal.release()
	}
	pumps.Wait()
	for _, p := range c.pipes {
		p.Close()
	}
}

// exitOf translates how the leader ended.
func (c *command) exitOf(d death) *guestv1.Exit {
	exit := &guestv1.Exit{
		CpuUserMicros:   uint64(time.Duration(d.usage.Utime.Nano()).Microseconds()),
		CpuSystemMicros: uint64(time.Duration(d.usage.Stime.Nano()).Microseconds()),
		MaxRssBytes:     uint64(d.usage.Maxrss) << 10,
		CoreDumped:      d.status.CoreDump(),
		RunMicros:       uint64(max(d.when.Sub(c.begun), 0).Microseconds()),
	}
	if user, system, ok := c.tree.cpu(); ok {
		exit.CpuUserMicros, exit.CpuSystemMicros = uint64(user.Microseconds()), uint64(system.Microseconds())
	}
	if d.status.Signaled() {
		exit.Status = &guestv1.Exit_Signal{Signal: int32(d.status.Signal())}
	} else {
		exit.Status = &guestv1.Exit_Code{Code: int32(d.status.ExitStatus())}
	}
	if first, ok := c.spool.firstOutput(); ok {
		micros := uint64(max(first.Sub(c.begun), 0).Microseconds())
		exit.FirstOutputMicros = &micros
	}
	return exit
}
