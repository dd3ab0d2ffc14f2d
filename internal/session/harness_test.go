package session_test

import (
	"bytes"
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/idempotency/idempotencytest"
	"github.com/harvest-run/executord/internal/session"
)

// memory is a Store in memory. before is called with what is about to be done; an
// error of it is the call's, and nothing is done.
type memory struct {
	idempotencytest.Memory
	mu      sync.Mutex
	records map[string]session.Session
	states  []session.State // of all that was written
	before  func(op string, s session.Session) error
}

func newMemory() *memory { return &memory{records: make(map[string]session.Session)} }

func (m *memory) do(op string, s session.Session, f func() error) error {
	m.mu.Lock()
	before := m.before
	m.mu.Unlock()
	if before != nil {
		if err := before(op, s); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return f()
}

func (m *memory) hook(before func(op string, s session.Session) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.before = before
}

func (m *memory) InsertSession(ctx context.Context, s session.Session) error {
	return m.do("insert", s, func() error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		m.records[s.ID] = s
		m.states = append(m.states, s.State)
		return nil
	})
}

func (m *memory) InsertSessionOnce(ctx context.Context, key idempotency.Key, s session.Session) error {
	return m.Once(key, s.ID, func() error { return m.InsertSession(ctx, s) })
}

func (m *memory) UpdateSession(ctx context.Context, s session.Session) error {
	return m.do("update", s, func() error {
		old, ok := m.records[s.ID]
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !ok:
			return notFound(s.ID)
		case old.State.Stage() > s.State.Stage():
			return fault.New(fault.FailedPrecondition, "SESSION_ENDED", "state %d must not go back to %d", old.State, s.State)
		}
		m.records[s.ID] = s
		m.states = append(m.states, s.State)
		return nil
	})
}

func (m *memory) GetSession(_ context.Context, id string) (s session.Session, err error) {
	err = m.do("get", session.Session{ID: id}, func() error {
		var ok bool
		if s, ok = m.records[id]; !ok {
			return notFound(id)
		}
		return nil
	})
	return s, err
}

func (m *memory) ListSessions(_ context.Context, q session.Query) (page []session.Session, err error) {
	err = m.do("list", session.Session{}, func() error {
		ids := slices.Sorted(maps.Keys(m.records))
		if !q.Ascending {
			slices.Reverse(ids)
		}
		for _, id := range ids {
			s := m.records[id]
			if q.Caller.Sees(s.Owner) && (q.Before == "" || (id < q.Before) != q.Ascending && id != q.Before) && (q.Last == "" || (id > q.Last) != q.Ascending || id == q.Last) && (q.Terminated || s.State != session.Terminated) && len(page) < q.Limit {
				page = append(page, s)
			}
		}
		return nil
	})
	return page, err
}

func (m *memory) SessionsWindow(ctx context.Context, q session.Query) (string, error) {
	page, err := m.ListSessions(ctx, q)
	if err != nil || len(page) < q.Limit {
		return "", err
	}
	return page[len(page)-1].ID, nil
}

func (m *memory) UnfinishedSessions(context.Context) (all []session.Session, err error) {
	err = m.do("unfinished", session.Session{}, func() error {
		for _, id := range slices.Sorted(maps.Keys(m.records)) {
			if s := m.records[id]; s.State != session.Terminated {
				all = append(all, s)
			}
		}
		return nil
	})
	return all, err
}

func (m *memory) stored(id string) session.Session {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.records[id]
}

func (m *memory) written() []session.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.states)
}

func notFound(id string) error {
	return fault.New(fault.NotFound, "SESSION_NOT_FOUND", "there is no session %q", id)
}

// executions notes which sessions' executions were asked to end.
type executions struct {
	mu    sync.Mutex
	ended []string
	hook  func(ctx context.Context, id string) error
}

func (e *executions) EndSession(ctx context.Context, id string) error {
	e.mu.Lock()
	e.ended = append(e.ended, id)
	hook := e.hook
	e.mu.Unlock()
	if hook != nil {
		return hook(ctx, id)
	}
	return nil
}

func (e *executions) calls() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.ended)
}

// rig is a Service with all that it needs.
type rig struct {
	*session.Service
	t          *testing.T
	fake       *enginefake.Engine
	store      *memory
	executions *executions
	quota      int64
	log        *lockedBuffer
	// pool and admission are the Config's.
	pool      session.Pool
	admission *admission.Controller
	// parts are the Config's, dir has the logs.
	parts session.Parts
	dir   string
	// network is the Config's; nil for none.
	network *egress.Gateway
}

// The calls of a caller who has no name, for what nobody owns.

func (r *rig) Get(ctx context.Context, id string) (session.Session, error) {
	return r.Service.Get(ctx, session.Ref{ID: id})
}

func (r *rig) WaitStarted(ctx context.Context, id string) (session.Session, error) {
	return r.Service.WaitStarted(ctx, session.Ref{ID: id})
}

// Terminate ends a session by a request without a name.
func (r *rig) Terminate(ctx context.Context, id, requester string) (session.Session, error) {
	return r.Service.Terminate(ctx, session.Ref{ID: id}, requester, idempotency.Key{})
}

func (r *rig) Sandbox(ctx context.Context, id string) (engine.Sandbox, error) {
	return r.Service.Sandbox(ctx, id, caller.Caller{})
}

// List reads a page that takes no time to find.
func (r *rig) List(ctx context.Context, q session.Query) ([]session.Session, error) {
	page, next, err := r.Service.List(ctx, q)
	if next != "" {
		r.t.Errorf("the page ends at %s", next)
	}
	return page, err
}

func newRig(t *testing.T, hooks enginefake.Hooks) *rig {
	t.Helper()
	r := &rig{
		t: t, dir: t.TempDir(), store: newMemory(), executions: &executions{}, log: &lockedBuffer{},
		fake: enginefake.New(enginefake.Config{Hooks: hooks, Limits: engine.Limits{MemoryBytes: 1 << 30}}),
	}
	t.Cleanup(r.fake.Shutdown)
	r.open()
	return r
}

// open makes a Service; it is closed at the end of the test.
func (r *rig) open() {
	r.t.Helper()
	s, err := session.New(session.Config{
		Engines: engines.Set{r.fake}, Store: r.store, MaxPerOwner: r.quota, Pool: r.pool, Admission: r.admission, Parts: r.parts, Dir: r.dir, Network: r.network, Logger: slog.New(slog.NewTextHandler(r.log, nil)),
	})
	if err != nil {
		r.t.Fatal(err)
	}
	s.SetExecutions(r.executions)
	r.Service = s
	r.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			r.t.Error(err)
		}
	})
}

// restart closes the Service and opens another one that recovers.
func (r *rig) restart() {
	r.t.Helper()
	if err := r.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.open()
	if err := r.Recover(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) create(request session.Request) string {
	r.t.Helper()
	s, err := r.Create(r.t.Context(), request)
	if err != nil {
		r.t.Fatal(err)
	}
	return s.ID
}

// running makes a session and waits until it runs.
func (r *rig) running(request session.Request) string {
	r.t.Helper()
	id := r.create(request)
	s, err := r.WaitStarted(r.t.Context(), id)
	if err != nil || s.State != session.Running {
		r.t.Fatalf("%+v, %v", s, err)
	}
	return id
}

func (r *rig) get(id string) session.Session {
	r.t.Helper()
	s, err := r.Get(r.t.Context(), id)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// ended waits until a session has ended, and checks that nothing of it is left.
func (r *rig) ended(id string) session.Session {
	r.t.Helper()
	for range 10000 {
		synctest.Wait()
		if s := r.get(id); s.State == session.Terminated {
			if s.EndTime.IsZero() || s.Reason == "" || s.Detail == "" {
				r.t.Errorf("%+v", s)
			}
			if stored := r.store.stored(id); stored.State != session.Terminated || stored.Reason != s.Reason {
				r.t.Errorf("stored: %+v", stored)
			}
			if live := r.live(); slices.Contains(live, "s-"+id) {
				r.t.Errorf("it has ended and there is its sandbox: %v", live)
			}
			return s
		}
		time.Sleep(time.Second)
	}
	r.t.Fatalf("session %s did not end: %+v", id, r.get(id))
	return session.Session{}
}

func (r *rig) live() []string {
	r.t.Helper()
	ids, err := r.fake.List(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	return ids
}

// refused checks that nothing can be run in a session.
func (r *rig) refused(id, why string) {
	r.t.Helper()
	sb, err := r.Sandbox(r.t.Context(), id)
	wantFault(r.t, err, fault.FailedPrecondition, "SESSION_NOT_RUNNING")
	if sb != nil || err != nil && !strings.Contains(err.Error(), why) {
		r.t.Errorf("%v, %v, want %q", sb, err, why)
	}
}

func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

func wantFault(t *testing.T, err error, kind fault.Kind, reason string) {
	t.Helper()
	if fault.KindOf(err) != kind || fault.ReasonOf(err) != reason {
		t.Errorf("error %v is of kind %d and reason %q, want kind %d and %q", err, fault.KindOf(err), fault.ReasonOf(err), kind, reason)
	}
}

// lockedBuffer is for a logger that many write to.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
