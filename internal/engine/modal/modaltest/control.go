package modaltest

import (
	"fmt"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func internal(err error) error { return status.Error(codes.Internal, err.Error()) }

// ExpireTokens makes all tokens for routers invalid that were given out so far.
func (f *Fake) ExpireTokens() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.revoked = time.Now()
}

// SetScheduling is how long each creation takes from now on, beside its work.
func (f *Fake) SetScheduling(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trouble.scheduling = d
}

// SetStartup is how long the router of each new sandbox is unavailable after its creation
// was answered.
func (f *Fake) SetStartup(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trouble.startup = d
}

// SetResultLag is how long the control plane does not know yet that a sandbox has ended.
func (f *Fake) SetResultLag(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trouble.resultLag = d
}

// RefuseBuilds makes builds of images that are not built yet fail with this message;
// empty: succeed again.
func (f *Fake) RefuseBuilds(message string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.builds.refuse = message
}

// DelayBuilds makes builds of images that are not built yet take so long.
func (f *Fake) DelayBuilds(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.builds.delay = d
}

// Gone says what the control plane tells of a sandbox that went by itself.
type Gone string

const (
	// GoneFailed is a result that says INTERNAL_FAILURE.
	GoneFailed Gone = "failed"
	// GoneTerminated is a result that says TERMINATED, as if somebody had ended it.
	GoneTerminated Gone = "terminated"
	// GoneEvicted is a result that says MEMORY_MANAGER_EVICTION; its exit code is 0.
	GoneEvicted Gone = "evicted"
	// GoneForgotten is none: the sandbox is not found.
	GoneForgotten Gone = "forgotten"
	// GoneSilent is none: it never gets a result.
	GoneSilent Gone = "silent"
)

// Preempt takes a sandbox away at once, with everything in it: nothing is committed.
func (f *Fake) Preempt(id string, how Gone) error {
	s, err := f.sandbox(id)
	if err != nil {
		return fmt.Errorf("preempt: %w", err)
	}
	e := ended{}
	switch how {
	case GoneFailed:
		e.result = internalFailure("worker was preempted")
	case GoneTerminated:
		e.result = result(pb.GenericResult_GENERIC_STATUS_TERMINATED, "terminated")
	case GoneEvicted:
		e.result = result(pb.GenericResult_GENERIC_STATUS_MEMORY_MANAGER_EVICTION, "evicted by the memory manager")
	case GoneForgotten:
		e.forget = true
	case GoneSilent:
	default:
		return fmt.Errorf("preempt: unknown way %q", how)
	}
	f.finish(s, e)
	return nil
}

// KillWorker takes a sandbox's worker away: connections to it are reset, for good, and
// its processes are gone. The control plane says for so long that the sandbox runs, and
// then that it failed.
func (f *Fake) KillWorker(id string, runsFor time.Duration) error {
	s, err := f.sandbox(id)
	if err != nil {
		return fmt.Errorf("kill the worker: %w", err)
	}
	f.mu.Lock()
	s.workerDead = true
	box := s.box
	processes := s.programsLocked()
	f.mu.Unlock()
	gone := status.Error(codes.Unavailable, "the worker is gone")
	for _, p := range processes {
		p.lose(gone)
	}
	if box != nil {
		box.end()
	}
	f.boxes.Go(func() {
		select {
		case <-time.After(runsFor):
			f.finish(s, ended{result: internalFailure("the worker failed")})
		case <-s.over:
		}
	})
	return nil
}
