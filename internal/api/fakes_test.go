package api

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/session"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeExecutions keeps executions in memory; tests write their logs.
type fakeExecutions struct {
	mu   sync.Mutex
	logs map[execution.Ref]*fakeLog
	// requests are those that Start got, cancellations those that Cancel got, queries
	// those that List got.
	requests      []execution.Request
	cancellations []execution.Cancellation
	queries       []execution.Query
	// keys are those of all requests that change something.
	keys []idempotency.Key
	// short is how many List finds before it gives up looking; 0 for all.
	short int
	// signals are those that were sent, sizes those that terminals got.
	signals []string
	sizes   []execution.TerminalSize
	// writers are the attached ones.
	writers map[execution.Ref]*fakeAttachment
	// watchers counts those that are open.
	watchers int
	// onStart writes the log of a new execution; nil leaves it empty.
	onStart func(*fakeLog)
	// parents, if it is set, has the sessions that something can be started in.
	parents *fakeSessions
	// hook is called first by each method; its error is returned.
	hook func(ctx context.Context, method string) error
}

func (f *fakeExecutions) note(key idempotency.Key) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.keys = append(f.keys, key)
}

func (f *fakeExecutions) before(ctx context.Context, method string) error {
	if f.hook != nil {
		return f.hook(ctx, method)
	}
	return nil
}

// add makes an execution with an empty log.
func (f *fakeExecutions) add(e execution.Execution) *fakeLog {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := &fakeLog{ref: execution.Ref{Session: e.Session, ID: e.ID}, record: e, changed: make(chan struct{})}
	if f.logs == nil {
		f.logs = make(map[execution.Ref]*fakeLog)
	}
	f.logs[l.ref] = l
	return l
}

func (f *fakeExecutions) log(ref execution.Ref) (*fakeLog, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if l, ok := f.logs[bare(ref)]; ok && ref.Caller.Sees(l.read().Owner) {
		return l, nil
	}
	return nil, fault.New(fault.NotFound, "EXECUTION_NOT_FOUND", "execution %q does not exist", ref.ID)
}

// bare is a ref without who names it.
func bare(ref execution.Ref) execution.Ref { return execution.Ref{Session: ref.Session, ID: ref.ID} }

func (f *fakeExecutions) openWatchers() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.watchers
}

func (f *fakeExecutions) Start(ctx context.Context, r execution.Request) (execution.Execution, error) {
	if err := f.before(ctx, "Start"); err != nil {
		return execution.Execution{}, err
	}
	f.note(r.Key)
	// As the real one does.
	if err := r.Command.Validate(); err != nil {
		return execution.Execution{}, err
	}
	if r.Session != "" && r.Limits != (engine.Limits{}) {
		return execution.Execution{}, fault.InvalidField("LIMITS_WITH_PARENT", "limits", "must not be set with a parent")
	}
	if r.Session != "" && f.parents != nil {
		if _, err := f.parents.Get(ctx, session.Ref{ID: r.Session, Caller: r.Caller}); err != nil {
			return execution.Execution{}, err
		}
	}
	f.mu.Lock()
	by := r.Caller
	r.Caller = caller.Caller{} // every request has one: the tests of callers look at the owner
	f.requests = append(f.requests, r)
	f.mu.Unlock()
	e := execution.Execution{
		ID: "new", Owner: by.Owner, Session: r.Session, Command: r.Command, Limits: r.Limits, Labels: r.Labels,
		RetainedBytes: r.RetainedBytes, State: execution.Starting, CreateTime: time.Unix(1, 0),
	}
	l := f.add(e)
	if f.onStart != nil {
		f.onStart(l)
	}
	return e, nil
}

func (f *fakeExecutions) lastRequest(t *testing.T) execution.Request {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.requests) == 0 {
		t.Fatal("nothing was started")
	}
	return f.requests[len(f.requests)-1]
}

func (f *fakeExecutions) Get(ctx context.Context, ref execution.Ref) (execution.Execution, error) {
	if err := f.before(ctx, "Get"); err != nil {
		return execution.Execution{}, err
	}
	l, err := f.log(ref)
	if err != nil {
		return execution.Execution{}, err
	}
	return l.read(), nil
}

func (f *fakeExecutions) List(ctx context.Context, q execution.Query) ([]execution.Execution, string, error) {
	if err := f.before(ctx, "List"); err != nil {
		return nil, "", err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.queries = append(f.queries, q)
	var found []execution.Execution
	for ref, l := range f.logs {
		switch {
		case !q.Caller.Sees(l.record.Owner):
		case q.Before != "" && ref.ID >= q.Before,
			q.Session != "" && ref.Session != q.Session,
			q.InAnySession && ref.Session == "":
		default:
			found = append(found, l.record)
		}
	}
	slices.SortFunc(found, func(a, b execution.Execution) int { return -compare(a.ID, b.ID) })
	if f.short > 0 && f.short < len(found) {
		return found[:f.short], found[f.short].ID + "x", nil // it goes on with the next
	}
	return found[:min(len(found), q.Limit)], "", nil
}

func compare(a, b string) int { return bytes.Compare([]byte(a), []byte(b)) }

func (f *fakeExecutions) Wait(ctx context.Context, ref execution.Ref) (execution.Execution, error) {
	if err := f.before(ctx, "Wait"); err != nil {
		return execution.Execution{}, err
	}
	l, err := f.log(ref)
	if err != nil {
		return execution.Execution{}, err
	}
	for {
		_, changed := l.from(0)
		if e := l.read(); e.State == execution.Ended {
			return e, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return l.read(), context.Cause(ctx)
		}
	}
}

func (f *fakeExecutions) Watch(ctx context.Context, ref execution.Ref, after *execution.Cursor) (Watcher, error) {
	if err := f.before(ctx, "Watch"); err != nil {
		return nil, err
	}
	l, err := f.log(ref)
	if err != nil {
		return nil, err
	}
	w := &fakeWatcher{log: l, fake: f}
	if after != nil {
		w.position = int(after.Sequence)
		w.cursor = *after
	}
	if events, _ := l.from(0); w.position > len(events) {
		return nil, fault.New(fault.OutOfRange, "CURSOR_IN_FUTURE", "the log has %d events", len(events))
	}
	f.mu.Lock()
	f.watchers++
	f.mu.Unlock()
	return w, nil
}

func (f *fakeExecutions) ReadOutput(ctx context.Context, ref execution.Ref, stream string, offset int64, p []byte) (int, error) {
	if err := f.before(ctx, "ReadOutput"); err != nil {
		return 0, err
	}
	l, err := f.log(ref)
	if err != nil {
		return 0, err
	}
	var all []byte
	events, _ := l.from(0)
	for _, e := range events {
		if e.Output != nil && e.Output.Stream == stream {
			all = append(all, e.Output.Data...)
		}
	}
	if offset >= int64(len(all)) {
		return 0, io.EOF
	}
	n := copy(p, all[offset:])
	if offset+int64(n) == int64(len(all)) {
		return n, io.EOF
	}
	return n, nil
}

func (f *fakeExecutions) Cancel(ctx context.Context, ref execution.Ref, c execution.Cancellation) (execution.Execution, error) {
	if err := f.before(ctx, "Cancel"); err != nil {
		return execution.Execution{}, err
	}
	l, err := f.log(ref)
	if err != nil {
		return execution.Execution{}, err
	}
	f.note(c.Key)
	f.mu.Lock()
	f.cancellations = append(f.cancellations, c)
	f.mu.Unlock()
	l.end(execution.Result{Reason: execution.Cancelled, CancelledBy: c.By})
	return l.read(), nil
}

func (f *fakeExecutions) Delete(ctx context.Context, ref execution.Ref, key idempotency.Key) error {
	f.note(key)
	if err := f.before(ctx, "Delete"); err != nil {
		return err
	}
	l, err := f.log(ref)
	if err != nil {
		return err
	}
	if l.read().State != execution.Ended {
		return fault.New(fault.FailedPrecondition, "EXECUTION_NOT_ENDED", "execution %q runs", ref.ID)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.logs, bare(ref))
	return nil
}

// fakeLog is the log of one execution.
type fakeLog struct {
	ref execution.Ref

	mu     sync.Mutex
	record execution.Execution
	events []execution.Event
	offset map[string]int64
	input  []byte
	closed bool
	// room bounds the input, if it is not 0.
	room    int
	changed chan struct{}
}

func (l *fakeLog) read() execution.Execution {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.record
}

func (l *fakeLog) from(position int) ([]execution.Event, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.events[min(position, len(l.events)):], l.changed
}

func (l *fakeLog) append(e execution.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.Cursor = execution.Cursor{Epoch: "e1", Sequence: uint64(len(l.events) + 1)}
	e.Time = time.Now()
	if e.Output != nil {
		if l.offset == nil {
			l.offset = make(map[string]int64)
		}
		e.Output.Offset = l.offset[e.Output.Stream]
		l.offset[e.Output.Stream] += int64(len(e.Output.Data))
	}
	l.events = append(l.events, e)
	if e.Result != nil {
		l.record.State, l.record.Result = execution.Ended, e.Result
	}
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *fakeLog) start() { l.append(execution.Event{Started: &execution.Started{Execution: l.ref}}) }

func (l *fakeLog) output(stream, data string) {
	l.append(execution.Event{Output: &execution.Output{Stream: stream, Data: []byte(data)}})
}

func (l *fakeLog) end(r execution.Result) { l.append(execution.Event{Result: &r}) }

// exit ends it with an exit code.
func (l *fakeLog) exit(code int32) {
	l.end(execution.Result{Reason: execution.Exited, ExitCode: &code, TreeEmpty: true})
}

type fakeWatcher struct {
	log      *fakeLog
	fake     *fakeExecutions
	position int
	cursor   execution.Cursor
	closed   bool
}

func (w *fakeWatcher) Next(ctx context.Context) (execution.Event, error) {
	for {
		events, changed := w.log.from(w.position)
		if len(events) > 0 {
			w.position++
			w.cursor = events[0].Cursor
			return events[0], nil
		}
		if w.log.read().State == execution.Ended {
			return execution.Event{}, io.EOF
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return execution.Event{}, context.Cause(ctx)
		}
	}
}

func (w *fakeWatcher) Cursor() execution.Cursor { return w.cursor }

func (w *fakeWatcher) LastEventTime() time.Time {
	if events, _ := w.log.from(0); len(events) > 0 {
		return events[len(events)-1].Time
	}
	return time.Time{}
}

func (w *fakeWatcher) Close() {
	w.fake.mu.Lock()
	defer w.fake.mu.Unlock()
	if w.closed {
		panic("closed twice")
	}
	w.closed = true
	w.fake.watchers--
}

// fakeSessions keeps sessions in memory.
type fakeSessions struct {
	mu         sync.Mutex
	sessions   map[string]session.Session
	requests   []session.Request
	requesters []string
	queries    []session.Query
	keys       []idempotency.Key
	// short is as in fakeExecutions.
	short int
	// started lets WaitStarted return.
	started chan struct{}
	// events are what WatchSession tells.
	events  []session.Event
	updates []session.Update
	err     error
}

func (f *fakeSessions) put(s session.Session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.sessions == nil {
		f.sessions = make(map[string]session.Session)
	}
	f.sessions[s.ID] = s
}

func (f *fakeSessions) Create(_ context.Context, r session.Request) (session.Session, error) {
	if f.err != nil {
		return session.Session{}, f.err
	}
	f.mu.Lock()
	by := r.Caller
	r.Caller = caller.Caller{}
	f.requests = append(f.requests, r)
	f.keys = append(f.keys, r.Key)
	f.mu.Unlock()
	s := session.Session{ID: "s1", Owner: by.Owner, State: session.Starting, Limits: r.Limits, Lifetime: r.Lifetime, Labels: r.Labels}
	f.put(s)
	return s, nil
}

func (f *fakeSessions) Get(_ context.Context, ref session.Ref) (session.Session, error) {
	if f.err != nil {
		return session.Session{}, f.err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if s, ok := f.sessions[ref.ID]; ok && ref.Caller.Sees(s.Owner) {
		return s, nil
	}
	return session.Session{}, fault.New(fault.NotFound, "SESSION_NOT_FOUND", "session %q does not exist", ref.ID)
}

func (f *fakeSessions) WaitStarted(ctx context.Context, ref session.Ref) (session.Session, error) {
	s, err := f.Get(ctx, ref)
	if err != nil {
		return session.Session{}, err
	}
	select {
	case <-f.started:
		return f.Get(ctx, ref)
	case <-ctx.Done():
		return s, context.Cause(ctx)
	}
}

func (f *fakeSessions) List(_ context.Context, q session.Query) ([]session.Session, string, error) {
	if f.err != nil {
		return nil, "", f.err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.queries = append(f.queries, q)
	var found []session.Session
	for id, s := range f.sessions {
		if q.Caller.Sees(s.Owner) && (q.Before == "" || id < q.Before) && (q.Terminated || s.State != session.Terminated) {
			found = append(found, s)
		}
	}
	slices.SortFunc(found, func(a, b session.Session) int { return -compare(a.ID, b.ID) })
	if f.short > 0 && f.short < len(found) {
		return found[:f.short], found[f.short].ID + "x", nil // it goes on with the next
	}
	return found[:min(len(found), q.Limit)], "", nil
}

func (f *fakeSessions) Terminate(ctx context.Context, ref session.Ref, requester string, key idempotency.Key) (session.Session, error) {
	s, err := f.Get(ctx, ref)
	if err != nil {
		return session.Session{}, err
	}
	s.State, s.Reason, s.Detail = session.Terminated, session.Requested, "by "+requester
	f.put(s)
	f.mu.Lock()
	f.requesters = append(f.requesters, requester)
	f.keys = append(f.keys, key)
	f.mu.Unlock()
	return s, nil
}

// change answers for the RPCs that change a session.
func (f *fakeSessions) change(ctx context.Context, ref session.Ref, key idempotency.Key, do func(*session.Session)) (session.Session, error) {
	s, err := f.Get(ctx, ref)
	if err != nil {
		return session.Session{}, err
	}
	do(&s)
	f.put(s)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.keys = append(f.keys, key)
	return s, nil
}

func (f *fakeSessions) Update(ctx context.Context, ref session.Ref, u session.Update) (session.Session, error) {
	return f.change(ctx, ref, u.Key, func(s *session.Session) {
		f.mu.Lock()
		f.updates = append(f.updates, u)
		f.mu.Unlock()
		if u.Labels != nil {
			s.Labels = *u.Labels
		}
	})
}

func (f *fakeSessions) Pause(ctx context.Context, ref session.Ref, key idempotency.Key) (session.Session, error) {
	return f.change(ctx, ref, key, func(s *session.Session) { s.State = session.Paused })
}

func (f *fakeSessions) Resume(ctx context.Context, ref session.Ref, r session.Resumption) (session.Session, error) {
	return f.change(ctx, ref, r.Key, func(s *session.Session) { s.State = session.Resuming })
}

func (f *fakeSessions) Fork(ctx context.Context, ref session.Ref, r session.Request) (session.Session, error) {
	if _, err := f.Get(ctx, ref); err != nil {
		return session.Session{}, err
	}
	s, err := f.Create(ctx, r)
	s.Details.ForkedFrom = ref.ID
	return s, err
}

func (f *fakeSessions) Diff(ctx context.Context, ref session.Ref) ([]session.RepositoryDiff, error) {
	if _, err := f.Get(ctx, ref); err != nil {
		return nil, err
	}
	return []session.RepositoryDiff{{Path: "/workspace/a", Branch: "main", Unpushed: 2, Files: []agent.FileDiff{{Path: "x", Change: agent.FileAdded, Patch: "+x"}}}}, nil
}

// WatchSession tells events, and then the end or nothing more.
func (f *fakeSessions) WatchSession(ctx context.Context, ref session.Ref, after *journal.Cursor) (SessionWatcher, error) {
	if _, err := f.Get(ctx, ref); err != nil {
		return nil, err
	}
	w := &fakeSessionWatcher{events: f.events, at: journal.Cursor{Epoch: "e"}}
	if after != nil {
		w.at = *after
	}
	return w, nil
}

type fakeSessionWatcher struct {
	events []session.Event
	at     journal.Cursor
}

func (w *fakeSessionWatcher) Next(ctx context.Context) (session.Event, error) {
	n := int(w.at.Sequence)
	if n < len(w.events) {
		w.at.Sequence++
		e := w.events[n]
		e.Cursor, e.Time = w.at, time.Unix(int64(n), 0)
		return e, nil
	}
	if n > 0 && w.events[n-1].Ended != nil {
		return session.Event{}, io.EOF
	}
	<-ctx.Done()
	return session.Event{}, context.Cause(ctx)
}

func (w *fakeSessionWatcher) Cursor() journal.Cursor   { return w.at }
func (w *fakeSessionWatcher) LastEventTime() time.Time { return time.Unix(9, 0) }
func (w *fakeSessionWatcher) Close()                   {}

// fakeInfo tells a fixed ServerInfo.
type fakeInfo struct {
	info ServerInfo
	err  error
}

func (f *fakeInfo) ServerInfo(context.Context) (ServerInfo, error) { return f.info, f.err }

func (f *fakeInfo) CheckEngine(_ context.Context, name string) ([]engine.Capability, error) {
	if name != "local" {
		return nil, fault.New(fault.FailedPrecondition, "ENGINE_NOT_AVAILABLE", "there is no engine %q", name)
	}
	return []engine.Capability{{Name: "credentials", Detail: "none\xff", Remedy: "get some"}}, nil
}

// bench is a running server with fakes behind it and a client before it.
type bench struct {
	server     *Server
	executions *fakeExecutions
	sessions   *fakeSessions
	turns      *fakeTurns
	images     *fakeImages
	info       *fakeInfo
	keys       *auth.Keys
	keyStore   *memoryKeys
	// shutdown ends the server's shutdown context.
	shutdown context.CancelCauseFunc
	logs     *syncBuffer
	dial     func(...grpc.DialOption) *grpc.ClientConn

	executor executorv1.ExecutorServiceClient
	session  executorv1.SessionServiceClient
	admin    executorv1.AdminServiceClient
	auth     executorv1.AuthServiceClient
}

// newBench serves until the test ends.
func newBench(t *testing.T, change ...func(*Config)) *bench {
	t.Helper()
	b := &bench{
		executions: &fakeExecutions{},
		sessions:   &fakeSessions{started: make(chan struct{})},
		images:     newFakeImages(t),
		info:       &fakeInfo{},
		keyStore:   &memoryKeys{},
		logs:       &syncBuffer{},
	}
	b.turns = &fakeTurns{sessions: b.sessions}
	keys, err := auth.OpenKeys(t.Context(), b.keyStore, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	b.keys = keys
	cfg := Config{
		Executions: b.executions, Sessions: b.sessions, Turns: b.turns, Images: b.images, Info: b.info, Keys: keys, Reflection: true,
		Logger: slog.New(slog.NewTextHandler(b.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, f := range change {
		f(&cfg)
	}
	shutdown, cancel := context.WithCancelCause(context.Background())
	b.shutdown = cancel
	server, err := NewServer(shutdown, cfg)
	if err != nil {
		t.Fatal(err)
	}
	b.server = server
	listener := bufconn.Listen(64 << 10)
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(listener); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(func() {
		server.Stop()
		serving.Wait()
		cancel(nil)
	})
	b.dial = func(options ...grpc.DialOption) *grpc.ClientConn {
		conn, err := grpc.NewClient("passthrough:///bufconn", append([]grpc.DialOption{
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return listener.DialContext(ctx)
			}),
		}, options...)...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	conn := b.dial()
	b.executor = executorv1.NewExecutorServiceClient(conn)
	b.session = executorv1.NewSessionServiceClient(conn)
	b.admin = executorv1.NewAdminServiceClient(conn)
	b.auth = executorv1.NewAuthServiceClient(conn)
	return b
}

// memoryKeys is a store of API keys that keeps them nowhere else.
type memoryKeys struct{ err error }

func (m *memoryKeys) InsertKey(context.Context, auth.Key) error   { return m.err }
func (m *memoryKeys) UpdateKey(context.Context, auth.Key) error   { return m.err }
func (m *memoryKeys) AllKeys(context.Context) ([]auth.Key, error) { return nil, m.err }

// waitUntil waits, for long, until something is so.
func waitUntil(t *testing.T, so func() bool) {
	t.Helper()
	for range 3000 {
		if so() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("it did not come about")
}

func copyFile(from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, 0o600)
}

func textLogger(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }

// syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// wantError checks code and reason of an error and returns its details.
func wantError(t *testing.T, err error, code codes.Code, reason string) details {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %v %s", code, reason)
	}
	d := detailsOf(t, err)
	if status.Code(err) != code || d.info.GetReason() != reason {
		t.Fatalf("error is %v with reason %q, want %v with %q", err, d.info.GetReason(), code, reason)
	}
	return d
}

// details are the details of a status.
type details struct {
	info         *errdetails.ErrorInfo
	bad          *errdetails.BadRequest
	retry        *errdetails.RetryInfo
	resource     *errdetails.ResourceInfo
	precondition *errdetails.PreconditionFailure
	quota        *errdetails.QuotaFailure
}

func detailsOf(t *testing.T, err error) details {
	t.Helper()
	var d details
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			d.info = detail
		case *errdetails.BadRequest:
			d.bad = detail
		case *errdetails.RetryInfo:
			d.retry = detail
		case *errdetails.ResourceInfo:
			d.resource = detail
		case *errdetails.PreconditionFailure:
			d.precondition = detail
		case *errdetails.QuotaFailure:
			d.quota = detail
		default:
			t.Fatalf("unexpected detail %T", detail)
		}
	}
	if d.info == nil {
		t.Fatalf("%v has no ErrorInfo", err)
	}
	if d.info.GetDomain() != "executord.harvest.run" {
		t.Fatalf("domain is %q", d.info.GetDomain())
	}
	return d
}

// fields are the paths in the BadRequest.
func (d details) fields() []string {
	var paths []string
	for _, v := range d.bad.GetFieldViolations() {
		paths = append(paths, v.GetField())
	}
	return paths
}
