package modaltest

import (
	"context"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ended says how a sandbox ends.
type ended struct {
	result *pb.GenericResult // nil: nobody ever says
	commit bool              // what it wrote to its volumes is committed, and its exit snapshot made
	forget bool              // the control plane forgets it
}

func result(s pb.GenericResult_GenericStatus, exception string) *pb.GenericResult {
	return pb.GenericResult_builder{Status: s, Exception: exception}.Build()
}

func internalFailure(exception string) *pb.GenericResult {
	return result(pb.GenericResult_GENERIC_STATUS_INTERNAL_FAILURE, exception)
}

// exitResult is the result of a sandbox whose own program ended.
func exitResult(p *process) *pb.GenericResult {
	code := p.code
	if p.signal != 0 {
		code = 128 + p.signal
	}
	s := pb.GenericResult_GENERIC_STATUS_SUCCESS
	if code != 0 {
		s = pb.GenericResult_GENERIC_STATUS_FAILURE
	}
	return pb.GenericResult_builder{Status: s, Exitcode: int32(code)}.Build()
}

// errTaskOver is what the router says of the calls to a task that has ended.
func errTaskOver(task string) error {
	return status.Errorf(codes.NotFound, "task %s has finished", task)
}

// finish ends a sandbox, once: what comes later waits for the first.
func (f *Fake) finish(s *sandbox, how ended) {
	f.mu.Lock()
	if s.ending {
		f.mu.Unlock()
		<-s.over
		return
	}
	s.ending = true
	box := s.box
	f.mu.Unlock()
	defer close(s.over)
	if how.commit {
		f.lastWords(s)
	}
	f.mu.Lock()
	entry, tunnels := s.entry, s.tunnels
	processes := s.programsLocked()
	f.mu.Unlock()
	for _, p := range processes { // before they end: their output is gone, and not over
		p.lose(errTaskOver(s.task))
	}
	if box != nil {
		box.end()
	}
	if entry != nil {
		entry.closeInput()
	}
	for _, p := range processes { // nobody is told of them any more
		p.discard()
	}
	for _, t := range tunnels {
		t.close()
	}
	f.mu.Lock()
	s.result, s.forgotten = how.result, how.forget
	s.known = time.Now().Add(f.trouble.resultLag)
	f.mu.Unlock()
	if err := f.remove(s); err != nil {
		f.log.Error("remove a sandbox", "error", err)
	}
}

// programsLocked are the programs that were started in a sandbox, but for its own.
func (s *sandbox) programsLocked() []*process {
	all := make([]*process, 0, len(s.processes))
	for _, p := range s.processes {
		if p != nil { // one that is being started
			all = append(all, p)
		}
	}
	return all
}

// destroy ends a sandbox without anybody hearing of it.
func (f *Fake) destroy(s *sandbox) {
	f.finish(s, ended{})
	f.mu.Lock()
	entry := s.entry
	f.mu.Unlock()
	if entry != nil {
		entry.discard()
	}
}

// lastWords commits a sandbox's volumes and makes its exit snapshot, if it wants one.
func (f *Fake) lastWords(s *sandbox) {
	if err := f.commitVolumes(s); err != nil {
		f.log.Error("commit the volumes of a sandbox that ends", "error", err)
	}
	f.takeExitSnapshot(s)
}

// reapOverdue ends the sandboxes whose time is over or that were idle for too long.
func (f *Fake) reapOverdue() {
	now := f.clock.now()
	f.mu.Lock()
	due := make(map[*sandbox]*pb.GenericResult)
	for _, s := range f.sandboxes {
		switch {
		case s.ending || s.workerDead:
		case !now.Before(s.deadline):
			due[s] = result(pb.GenericResult_GENERIC_STATUS_TIMEOUT, "sandbox timed out")
		case s.idle > 0 && s.busy == 0 && now.Sub(s.lastBusy) >= s.idle:
			due[s] = result(pb.GenericResult_GENERIC_STATUS_IDLE_TIMEOUT, "sandbox was idle")
		}
	}
	f.mu.Unlock()
	for s, r := range due {
		f.finish(s, ended{result: r, commit: true})
	}
}

// occupy says that something keeps the sandbox from being idle, until leave is called.
func (f *Fake) occupy(s *sandbox) (leave func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s.busy++
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		s.busy--
		s.lastBusy = f.clock.now()
	}
}

// wait waits for the result of a sandbox, for so long at most; nil if there is none yet.
func (f *Fake) wait(ctx context.Context, s *sandbox, patience time.Duration) (*pb.GenericResult, error) {
	end := time.NewTimer(patience)
	defer end.Stop()
	select {
	case <-s.over:
	default:
		if patience <= 0 {
			return nil, nil
		}
		select {
		case <-s.over:
		case <-end.C:
			return nil, nil
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	f.mu.Lock()
	r, lag := s.result, time.Until(s.known)
	f.mu.Unlock()
	if lag <= 0 && r != nil {
		return r, nil
	}
	if r == nil {
		lag = patience + time.Hour // never
	}
	select {
	case <-time.After(min(lag, patience)):
		if lag <= patience {
			return r, nil
		}
		return nil, nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}
