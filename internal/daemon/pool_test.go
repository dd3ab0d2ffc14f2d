package daemon

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"google.golang.org/protobuf/types/known/durationpb"
)

func (r *running) info() *executorv1.GetServerInfoResponse {
	r.t.Helper()
	info, err := r.admin.GetServerInfo(r.t.Context(), &executorv1.GetServerInfoRequest{})
	if err != nil {
		r.t.Fatal(err)
	}
	return info
}

// warm names the sandboxes that a pool made.
func (e *fakeEngine) warm(t *testing.T) []string {
	t.Helper()
	all, err := e.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(all, func(id string) bool { return !strings.HasPrefix(id, "w-") })
}

// A stop ends what is ready, also one that keeps what runs, and the sandbox of a session
// that came from the pool is kept like any other.
func TestPoolIsDrained(t *testing.T) {
	fake := newFakeEngine()
	cfg := settings(t, "--pool-size=2")
	first := start(t, Config{Settings: cfg, OpenEngines: fake.open})
	eventually(t, func() bool { return len(fake.warm(t)) == 2 })
	ready := fake.warm(t)
	name := first.createSession()
	first.session(name)
	eventually(t, func() bool { return first.info().GetWarmPool().GetReady() == 2 })
	if p := first.info().GetWarmPool(); p.GetSize() != 2 || p.GetHits() != 1 || p.GetMisses() != 0 {
		t.Errorf("%v", p)
	}
	if a := first.info().GetAdmission(); a.GetSandboxes() != 1 || a.GetRunning() != 0 || a.GetMaxRunning() != 256 || a.GetMaxQueueWait().AsDuration() != 30e9 {
		t.Errorf("%v", a)
	}
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
	left := fake.warm(t)
	if len(left) != 1 || !slices.Contains(ready, left[0]) {
		t.Fatalf("left: %v, ready were %v", left, ready)
	}
	second := start(t, Config{Settings: cfg, OpenEngines: fake.open})
	if s := second.session(name); s.GetState() != executorv1.Session_STATE_RUNNING {
		t.Errorf("%v", s)
	}
	if err := second.stop(); err != nil {
		t.Fatal(err)
	}
	if again := fake.warm(t); !slices.Equal(again, left) {
		t.Errorf("left: %v, were %v", again, left)
	}
}

// What the pool of an executord that was killed had ready is ended at the next start,
// which does not touch what its own pool makes.
func TestPoolOfTheDead(t *testing.T) {
	fake := newFakeEngine("w-01arz3ndektsv4rrffq69g5fav", "w-01arz3ndektsv4rrffq69g5faw")
	r := start(t, Config{Settings: settings(t, "--pool-size=2"), OpenEngines: fake.open})
	eventually(t, func() bool { return len(fake.gone()) == 2 && r.info().GetWarmPool().GetReady() == 2 })
	if warm := fake.warm(t); len(warm) != 2 || slices.ContainsFunc(warm, func(id string) bool { return strings.HasPrefix(id, "w-01arz3") }) {
		t.Errorf("%v", warm)
	}
}

// Sessions that are too many wait, and are woken by a stop.
func TestSessionsWaitForAPlace(t *testing.T) {
	fake := newFakeEngine()
	r := start(t, Config{Settings: settings(t, "--admission-max-sandboxes=1"), OpenEngines: fake.open})
	name := r.createSession()
	r.session(name)
	var group sync.WaitGroup
	defer group.Wait()
	next := make(chan string, 1)
	group.Go(func() {
		resp, err := r.sessions.CreateSession(t.Context(), &executorv1.CreateSessionRequest{Lifetime: durationpb.New(60e9)})
		if err != nil {
			t.Error(err)
		}
		next <- resp.GetSession().GetName()
	})
	eventually(t, func() bool { return r.info().GetAdmission().GetQueued() == 1 })
	if _, err := r.sessions.TerminateSession(t.Context(), &executorv1.TerminateSessionRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	if s := r.session(<-next); s.GetState() != executorv1.Session_STATE_RUNNING {
		t.Errorf("%v", s)
	}
	refused := make(chan error, 1)
	group.Go(func() {
		_, err := r.sessions.CreateSession(t.Context(), &executorv1.CreateSessionRequest{})
		refused <- err
	})
	eventually(t, func() bool { return r.info().GetAdmission().GetQueued() == 1 })
	r.cancel(errors.New("stop"))
	wantDraining(t, <-refused)
}
