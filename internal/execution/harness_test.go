package execution_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/filter"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/idempotency/idempotencytest"
)

// memory is a Store in memory. before is called with what is about to be done; an
// error of it is the call's, and nothing is done. after is called when it was done.
type memory struct {
	idempotencytest.Memory
	mu            sync.Mutex
	records       map[string]execution.Execution
	updates       []execution.Execution
	before, after func(op string, e execution.Execution) error
}

func newMemory() *memory { return &memory{records: make(map[string]execution.Execution)} }

func (m *memory) do(op string, e execution.Execution, f func() error) error {
	m.mu.Lock()
	before, after := m.before, m.after
	m.mu.Unlock()
	if before != nil {
		if err := before(op, e); err != nil {
			return err
		}
	}
	m.mu.Lock()
	err := f()
	m.mu.Unlock()
	if err == nil && after != nil {
		err = after(op, e)
	}
	return err
}

func (m *memory) hook(before, after func(op string, e execution.Execution) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.before, m.after = before, after
}

func (m *memory) InsertExecution(ctx context.Context, e execution.Execution) error {
	return m.do("insert", e, func() error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if _, ok := m.records[e.ID]; ok {
			return fault.New(fault.AlreadyExists, "EXECUTION_EXISTS", "execution %q exists", e.ID)
		}
		m.records[e.ID] = e
		return nil
	})
}

func (m *memory) InsertExecutionOnce(ctx context.Context, key idempotency.Key, e execution.Execution) error {
	return m.Once(key, e.ID, func() error { return m.InsertExecution(ctx, e) })
}

func (m *memory) DeleteExecutionOnce(ctx context.Context, key idempotency.Key, id string) error {
	return m.Once(key, id, func() error { return m.DeleteExecution(ctx, id) })
}

func (m *memory) UpdateExecution(ctx context.Context, e execution.Execution) error {
	return m.do("update", e, func() error {
		old, ok := m.records[e.ID]
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !ok:
			return notFound(e.ID)
		case old.State > e.State:
			return fault.New(fault.FailedPrecondition, "EXECUTION_ENDED", "state %d must not go back to %d", old.State, e.State)
		}
		m.records[e.ID] = e
		m.updates = append(m.updates, e)
		return nil
	})
}

func (m *memory) GetExecution(_ context.Context, id string) (e execution.Execution, err error) {
	err = m.do("get", execution.Execution{ID: id}, func() error {
		var ok bool
		if e, ok = m.records[id]; !ok {
			return notFound(id)
		}
		return nil
	})
	return e, err
}

func (m *memory) ListExecutions(_ context.Context, q execution.Query) (page []execution.Execution, err error) {
	err = m.do("list", execution.Execution{}, func() error {
		ids := slices.Sorted(maps.Keys(m.records))
		if !q.Ascending {
			slices.Reverse(ids)
		}
		for _, id := range ids {
			e := m.records[id]
			switch {
			case !q.Caller.Sees(e.Owner):
			case q.Session != "" && e.Session != q.Session, q.InAnySession && e.Session == "",
				q.Before != "" && !q.Ascending && id >= q.Before, q.Ascending && id <= q.Before,
				q.MinID != "" && id < q.MinID, q.MaxID != "" && id > q.MaxID, q.Unfinished && e.State == execution.Ended:
			case len(page) < q.Limit:
				page = append(page, e)
			}
		}
		return nil
	})
	return page, err
}

func (m *memory) ExecutionsWindow(ctx context.Context, q execution.Query) (string, error) {
	page, err := m.ListExecutions(ctx, q)
	if err != nil || len(page) < q.Limit {
		return "", err
	}
	return page[len(page)-1].ID, nil
}

func (m *memory) UnfinishedExecutions(context.Context) (all []execution.Execution, err error) {
	err = m.do("unfinished", execution.Execution{}, func() error {
		for _, id := range slices.Sorted(maps.Keys(m.records)) {
			if e := m.records[id]; e.State != execution.Ended {
				all = append(all, e)
			}
		}
		return nil
	})
	return all, err
}

func (m *memory) StoredBytes(_ context.Context, owner string) (sum int64, err error) {
	err = m.do("sum", execution.Execution{}, func() error {
		for _, e := range m.records {
			if e.Owner == owner && e.Result != nil {
				for _, total := range e.Result.Totals {
					sum += total.Size - total.Dropped
				}
			}
		}
		return nil
	})
	return sum, err
}

func (m *memory) DeleteExecution(_ context.Context, id string) error {
	return m.do("delete", execution.Execution{ID: id}, func() error {
		if _, ok := m.records[id]; !ok {
			return notFound(id)
		}
		delete(m.records, id)
		return nil
	})
}

func (m *memory) CountEnded(context.Context) (sum execution.Stored, err error) {
	err = m.do("count", execution.Execution{}, func() error {
		for _, e := range m.records {
			if e.State == execution.Ended {
				sum.Executions++
				sum.Bytes += e.LogBytes
			}
		}
		return nil
	})
	return sum, err
}

func (m *memory) ListEnded(_ context.Context, q execution.KeptQuery) (page []execution.Kept, err error) {
	order := func(a, b execution.Kept) int { return cmp.Or(a.Time.Compare(b.Time), strings.Compare(a.ID, b.ID)) }
	err = m.do("list ended", execution.Execution{}, func() error {
		for _, e := range m.records {
			k := execution.Kept{ID: e.ID, LogBytes: e.LogBytes, Time: e.EndTime}
			if q.Expired {
				k.Time = e.EndTime.Add(e.Policies.Retention)
			}
			if e.State == execution.Ended && k.Time.Before(q.Before) && order(k, q.After) > 0 && (!q.Expired || e.Policies.Retention > 0) {
				page = append(page, k)
			}
		}
		slices.SortFunc(page, order)
		page = page[:min(len(page), q.Limit)]
		return nil
	})
	return page, err
}

func (m *memory) DeleteEnded(_ context.Context, ids []string) error {
	return m.do("delete ended", execution.Execution{}, func() error {
		for _, id := range ids {
			if m.records[id].State == execution.Ended {
				delete(m.records, id)
			}
		}
		return nil
	})
}

func (m *memory) Sync(ctx context.Context) error {
	return m.do("sync", execution.Execution{}, func() error { return context.Cause(ctx) })
}

func (m *memory) stored(id string) (execution.Execution, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e, ok := m.records[id]
	return e, ok
}

func (m *memory) all() []execution.Execution {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.records))
}

func notFound(id string) error {
	return fault.New(fault.NotFound, "EXECUTION_NOT_FOUND", "there is no execution %q", id)
}

// sessions are the running ones, by id.
type sessions struct {
	mu      sync.Mutex
	running map[string]engine.Sandbox
	engine  string
	hook    func() // called before Sandbox answers
	// lifetime of all of them, and when it ends; 0 is one that does not matter.
	lifetime time.Duration
	expires  time.Time
	// told is what began and ended.
	told []string
}

func (s *sessions) Sandbox(_ context.Context, id string, _ caller.Caller) (engine.Sandbox, error) {
	if s.hook != nil {
		s.hook()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if sb, ok := s.running[id]; ok {
		return sb, nil
	}
	return nil, fault.New(fault.FailedPrecondition, "SESSION_NOT_RUNNING", "session %q has ended", id)
}

func (s *sessions) EngineOf(context.Context, string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.engine, nil
}

func (s *sessions) Expiry(context.Context, string) (time.Time, time.Duration, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.expires, s.lifetime, nil
}

// Began and Ended count what runs, by session.
func (s *sessions) Began(session, execution string) { s.note(session, execution, "") }

func (s *sessions) Ended(session, execution, reason string) { s.note(session, execution, reason) }

func (s *sessions) note(session, execution, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = append(s.told, strings.TrimSpace(session+" "+execution+" "+reason))
}

func (s *sessions) end(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.running, id)
}

// rig is a Service with all that it needs.
type rig struct {
	*execution.Service
	t        *testing.T
	engine   engine.Engine
	fake     *enginefake.Engine // nil with a real engine
	store    execution.Store
	memory   *memory // nil with a real store
	sessions *sessions
	config   func(*execution.Config) // changes that of the Services that are opened
	dir      string
	quota    execution.Quota
	log      *lockedBuffer
	// pool and admission are the Config's.
	pool      execution.Pool
	admission *admission.Controller
}

// Delete deletes an execution by a request without a name.
func (r *rig) Delete(ctx context.Context, ref execution.Ref) error {
	return r.Service.Delete(ctx, ref, idempotency.Key{})
}

// List reads a page that takes no time to find.
func (r *rig) List(ctx context.Context, q execution.Query) ([]execution.Execution, error) {
	page, next, err := r.Service.List(ctx, q)
	if next != "" {
		r.t.Errorf("the page ends at %s", next)
	}
	return page, err
}

// newRig makes a rig with a fake engine and a store in memory, for a test in a bubble.
func newRig(t *testing.T, cfg enginefake.Config) *rig {
	t.Helper()
	fake := enginefake.New(cfg)
	t.Cleanup(fake.Shutdown)
	m := newMemory()
	r := &rig{
		t: t, engine: fake, fake: fake, store: m, memory: m, log: &lockedBuffer{},
		sessions: &sessions{running: make(map[string]engine.Sandbox)}, dir: filepath.Join(t.TempDir(), "logs"),
	}
	r.open()
	return r
}

// scripted is the Config of a fake engine whose commands all do the same.
func scripted(s enginefake.Script) enginefake.Config {
	return enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script { return s }}
}

// open makes a Service; it is closed at the end of the test.
func (r *rig) open() {
	r.t.Helper()
	cfg := execution.Config{
		Engines: engines.Set{r.engine}, Store: r.store, Sessions: r.sessions, Dir: r.dir, Pool: r.pool, Admission: r.admission,
		DefaultRetainedBytes: 64 << 20, MaxRetainedBytes: 1 << 30, Quota: r.quota,
		Logger: slog.New(slog.NewTextHandler(r.log, nil)),
	}
	if r.config != nil {
		r.config(&cfg)
	}
	s, err := execution.New(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.Service = s
	r.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			r.t.Errorf("close: %v", err)
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

// session makes a sandbox and lets it be that of a running session.
func (r *rig) session(id string) engine.Sandbox {
	r.t.Helper()
	sb, err := r.engine.Create(r.t.Context(), engine.Spec{ID: "s-" + id, Limits: engine.Limits{MemoryBytes: 256 << 20}})
	if err != nil {
		r.t.Fatal(err)
	}
	r.sessions.mu.Lock()
	defer r.sessions.mu.Unlock()
	r.sessions.running[id], r.sessions.engine = sb, r.engine.Name()
	return sb
}

// start starts a command and returns its name.
func (r *rig) start(request execution.Request) execution.Ref {
	r.t.Helper()
	if len(request.Command.Args) == 0 && request.Command.Source == "" {
		request.Command.Args = []string{"program"}
	}
	e, err := r.Start(r.t.Context(), request)
	if err != nil {
		r.t.Fatal(err)
	}
	return execution.Ref{Session: e.Session, ID: e.ID}
}

// run starts a command and returns how it ended.
func (r *rig) run(request execution.Request) *execution.Result {
	r.t.Helper()
	return r.wait(r.start(request)).Result
}

func (r *rig) wait(ref execution.Ref) execution.Execution {
	r.t.Helper()
	e, err := r.Wait(r.t.Context(), ref)
	if err != nil {
		r.t.Fatal(err)
	}
	if e.State != execution.Ended || e.Result == nil {
		r.t.Fatalf("waited for %s and got state %d", ref.ID, e.State)
	}
	return e
}

func (r *rig) get(ref execution.Ref) execution.Execution {
	r.t.Helper()
	e, err := r.Get(r.t.Context(), ref)
	if err != nil {
		r.t.Fatal(err)
	}
	return e
}

func (r *rig) cancel(ref execution.Ref, grace time.Duration) execution.Execution {
	r.t.Helper()
	e, err := r.Cancel(r.t.Context(), ref, execution.Cancellation{Grace: &grace, By: "tester"})
	if err != nil {
		r.t.Fatal(err)
	}
	return e
}

// list names the engine's sandboxes after a sweep: those that nothing unfinished
// needs are ended, as the daemon does.
func (r *rig) list() []string {
	r.t.Helper()
	ctx := r.t.Context()
	found, err := r.engine.List(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	unfinished, err := r.store.UnfinishedExecutions(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	needed := make(map[string]bool)
	for _, e := range unfinished {
		needed[e.Sandbox] = true
	}
	r.sessions.mu.Lock()
	for id := range r.sessions.running {
		needed["s-"+id] = true
	}
	r.sessions.mu.Unlock()
	for _, id := range found {
		if needed[id] {
			continue
		}
		sb, err := r.engine.Open(ctx, id)
		if fault.KindOf(err) == fault.NotFound {
			continue
		}
		if err == nil {
			_, err = sb.Terminate(ctx)
		}
		if err != nil {
			r.t.Error(err)
		}
	}
	left, err := r.engine.List(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	return left
}

// told is all that a watcher was told.
type told struct {
	events []execution.Event
	output map[string][]byte // from the first byte told on
	from   map[string]int64  // offset of that byte
	gaps   []execution.Gap
	result *execution.Result
	// at is the time of each event since the first.
	at []time.Duration
}

// watch reads a log from behind a cursor to its end and checks all that is promised.
func (r *rig) watch(ref execution.Ref, after *execution.Cursor) told {
	r.t.Helper()
	w, err := r.Watch(r.t.Context(), ref, after)
	if err != nil {
		r.t.Fatal(err)
	}
	defer w.Close()
	got, err := read(r.t.Context(), w, ref, after)
	if err != nil {
		r.t.Fatal(err)
	}
	return got
}

// read reads a Watcher to its end. Its error says which promise was broken.
func read(ctx context.Context, w *execution.Watcher, ref execution.Ref, after *execution.Cursor) (told, error) {
	got := told{output: make(map[string][]byte), from: make(map[string]int64)}
	expect := uint64(1)
	epoch := w.Cursor().Epoch
	if after != nil && after.Epoch == epoch {
		expect = after.Sequence + 1
	}
	next := make(map[string]int64)
	whole := expect == 1
	for {
		e, err := w.Next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return got, err
		}
		if len(got.events) > 0 {
			got.at = append(got.at, e.Time.Sub(got.events[0].Time))
		} else {
			got.at = append(got.at, 0)
		}
		got.events = append(got.events, e)
		if e.Cursor != w.Cursor() || e.Cursor.Epoch != epoch {
			return got, fmt.Errorf("event %v and the watcher is at %v, epoch %s", e.Cursor, w.Cursor(), epoch)
		}
		if got.result != nil {
			return got, fmt.Errorf("event %d follows the result", e.Cursor.Sequence)
		}
		switch {
		case e.Gap != nil:
			got.gaps = append(got.gaps, *e.Gap)
			if e.Gap.MissingEvents > 0 && e.Cursor.Sequence != expect+e.Gap.MissingEvents-1 {
				return got, fmt.Errorf("%d events are missing from %d on, and the gap is at %d", e.Gap.MissingEvents, expect, e.Cursor.Sequence)
			}
			for _, p := range e.Gap.Resume {
				next[p.Stream] = p.Offset
				whole = whole && p.Offset == 0
			}
		case e.Cursor.Sequence != expect:
			return got, fmt.Errorf("event %d where %d is expected", e.Cursor.Sequence, expect)
		case e.Started != nil:
			if e.Cursor.Sequence != 1 || e.Started.Execution != ref {
				return got, fmt.Errorf("started %v is event %d", e.Started.Execution, e.Cursor.Sequence)
			}
		case e.Output != nil:
			o := e.Output
			if at, known := next[o.Stream]; (known || whole) && o.Offset != at {
				return got, fmt.Errorf("%s goes on at %d, not at %d", o.Stream, o.Offset, at)
			}
			if _, ok := got.from[o.Stream]; !ok {
				got.from[o.Stream] = o.Offset
			}
			next[o.Stream] = o.Offset + int64(len(o.Data))
			got.output[o.Stream] = append(got.output[o.Stream], o.Data...)
		case e.Result != nil:
			got.result = e.Result
		}
		expect = e.Cursor.Sequence + 1
	}
	if got.result == nil {
		return got, errors.New("the log ended without a result")
	}
	if whole && (len(got.events) < 2 || got.events[len(got.gaps)].Started == nil) {
		return got, errors.New("the first event is not started")
	}
	for _, total := range got.result.Totals {
		have := got.from[total.Stream] + int64(len(got.output[total.Stream]))
		if at, known := next[total.Stream]; known && at != total.Size || whole && have != total.Size {
			return got, fmt.Errorf("%s has %d bytes, told were %d", total.Stream, total.Size, have)
		}
		if sum := crc32.Checksum(got.output[total.Stream], crc32.MakeTable(crc32.Castagnoli)); whole && sum != total.CRC32C {
			return got, fmt.Errorf("%s has CRC %08x, told was %08x", total.Stream, total.CRC32C, sum)
		}
	}
	return got, nil
}

// bubble runs a test in a bubble of synctest.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

// wantFault checks kind and reason of an error.
func wantFault(t *testing.T, err error, kind fault.Kind, reason string) {
	t.Helper()
	if fault.KindOf(err) != kind || fault.ReasonOf(err) != reason {
		t.Errorf("error %v is of kind %d and reason %q, want kind %d and %q", err, fault.KindOf(err), fault.ReasonOf(err), kind, reason)
	}
}

// contains checks that a text has all pieces.
func contains(t *testing.T, text string, pieces ...string) {
	t.Helper()
	for _, p := range pieces {
		if !strings.Contains(text, p) {
			t.Errorf("%q is not in %q", p, text)
		}
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

func ptr[T any](v T) *T { return &v }

func parseFilter(t *testing.T, text string) filter.Filter {
	t.Helper()
	f, err := filter.Parse(text, filter.Schema{
		Enums: map[string][]string{"state": {"STARTING", "RUNNING", "STOPPING", "ENDED"}, "reason": {"EXITED", "CANCELLED"}},
		Maps:  []string{"labels"}, Times: []string{"create_time", "end_time"},
	})
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return f
}
