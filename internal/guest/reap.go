package guest

import (
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// reaper waits for every child of the guest. As process 1 of its namespace the
// guest inherits all orphans too; those are reaped and forgotten.
type reaper struct {
	mu       sync.Mutex
	waiting  map[int]chan<- death
	children sync.Cond
	closed   bool
	done     sync.WaitGroup
}

// death is how a process ended.
type death struct {
	status syscall.WaitStatus
	usage  syscall.Rusage
	when   time.Time
}

func newReaper() *reaper {
	r := &reaper{waiting: make(map[int]chan<- death)}
	r.children.L = &r.mu
	r.done.Go(r.loop)
	return r
}

// spawn runs start, which must make one child, so that the child's death cannot be
// missed however soon it comes. The death is sent on the channel, which has room.
func (r *reaper) spawn(start func() (pid int, err error)) (pid int, died <-chan death, err error) {
	c := make(chan death, 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err = start()
	if err != nil {
		return 0, nil, err
	}
	r.waiting[pid] = c
	r.children.Signal()
	return pid, c, nil
}

// loop looks for dead children without taking them away, so that the table is
// locked only while one is taken: a child whose start has not returned yet stays.
func (r *reaper) loop() {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOWAIT, nil)
		r.mu.Lock()
		switch err {
		case nil:
			r.take()
		case unix.ECHILD:
			for len(r.waiting) == 0 && !r.closed {
				r.children.Wait()
			}
		}
		closed := r.closed
		r.mu.Unlock()
		if closed {
			return
		}
	}
}

// take reaps the dead children that are there, but not for ever: a program whose
// orphans die faster than this must not keep others from being started.
func (r *reaper) take() {
	for range 64 {
		var d death
		pid, err := syscall.Wait4(-1, &d.status, syscall.WNOHANG, &d.usage)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		d.when = time.Now()
		if c, ok := r.waiting[pid]; ok {
			delete(r.waiting, pid)
			c <- d
		}
	}
}

// signal sends a signal to target, a leader or a group of its session, if the leader
// has not been reaped: until then its id, and its session's, are nobody else's.
func (r *reaper) signal(leader, target int, sig syscall.Signal) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.waiting[leader]; !ok {
		return false
	}
	_ = syscall.Kill(target, sig) // a group in the foreground may have ended
	return true
}

// close ends the loop; for a guest that has no children left.
func (r *reaper) close() {
	r.mu.Lock()
	r.closed = true
	r.children.Signal()
	r.mu.Unlock()
	r.done.Wait()
}
