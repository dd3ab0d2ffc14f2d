package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/config"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/fault"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeEngine makes sandboxes that nothing runs in. It outlives the daemons of a test,
// as sandboxes do.
type fakeEngine struct {
	mu        sync.Mutex
	sandboxes map[string]*fakeSandbox
	// stuck are those that Terminate fails for, broken those that Open fails for.
	stuck, broken map[string]bool
	listErr       error
	ended         []string
	closed        int
}

func newFakeEngine(ids ...string) *fakeEngine {
	e := &fakeEngine{sandboxes: make(map[string]*fakeSandbox), stuck: make(map[string]bool), broken: make(map[string]bool)}
	for _, id := range ids {
		e.sandboxes[id] = &fakeSandbox{id: id, engine: e, done: make(chan struct{})}
	}
	return e
}

func (e *fakeEngine) Name() string      { return "fake" }
func (e *fakeEngine) Isolation() string { return "none" }
func (e *fakeEngine) Capabilities() []engine.Capability {
	return []engine.Capability{{Name: "limit.pids", Available: true}}
}
func (e *fakeEngine) DefaultLimits() engine.Limits    { return engine.Limits{PIDs: 9} }
func (e *fakeEngine) CheckLimits(engine.Limits) error { return nil }
func (e *fakeEngine) CheckSpec(engine.Spec) error     { return nil }

// Images and Volumes are not asked for.
func (e *fakeEngine) Images() engine.Images   { return nil }
func (e *fakeEngine) Volumes() engine.Volumes { return nil }

func (e *fakeEngine) Create(_ context.Context, spec engine.Spec) (engine.Sandbox, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if sb, ok := e.sandboxes[spec.ID]; ok {
		return sb, nil
	}
	sb := &fakeSandbox{id: spec.ID, engine: e, limits: spec.Limits, done: make(chan struct{})}
	e.sandboxes[spec.ID] = sb
	return sb, nil
}

// named is a fakeEngine under another name.
type named struct {
	*fakeEngine
	name string
}

func (n named) Name() string { return n.name }

func (e *fakeEngine) Open(_ context.Context, id string) (engine.Sandbox, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.broken[id] {
		return nil, errors.New("the pipe is broken")
	}
	if sb, ok := e.sandboxes[id]; ok {
		return sb, nil
	}
	return nil, fault.New(fault.NotFound, "SANDBOX_NOT_FOUND", "no sandbox %q", id)
}

func (e *fakeEngine) List(context.Context) ([]string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.listErr != nil {
		return nil, e.listErr
	}
	var ids []string
	for id := range e.sandboxes {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, nil
}

func (e *fakeEngine) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed++
	return nil
}

// gone names the sandboxes that were terminated, sorted.
func (e *fakeEngine) gone() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Sorted(slices.Values(e.ended))
}

type fakeSandbox struct {
	id     string
	engine *fakeEngine
	limits engine.Limits
	done   chan struct{}
}

func (s *fakeSandbox) ID() string            { return s.id }
func (s *fakeSandbox) Limits() engine.Limits { return s.limits }
func (s *fakeSandbox) Dial(context.Context) (net.Conn, error) {
	return nil, errors.New("there is no guest in it")
}
func (s *fakeSandbox) Done() <-chan struct{} { return s.done }
func (s *fakeSandbox) Deadline() time.Time   { return time.Time{} }
func (s *fakeSandbox) Snapshot(context.Context, engine.SnapshotRequest) (engine.ImageRef, error) {
	return "", errors.New("there is nothing in it")
}
func (s *fakeSandbox) CommitVolumes(context.Context) error { return nil }
func (s *fakeSandbox) Usage(context.Context) (engine.Usage, error) {
	return engine.Usage{}, nil
}

func (s *fakeSandbox) Terminate(ctx context.Context) (engine.Remains, error) {
	if ctx.Err() != nil {
		return engine.Remains{}, context.Cause(ctx)
	}
	s.engine.mu.Lock()
	defer s.engine.mu.Unlock()
	if s.engine.stuck[s.id] {
		return engine.Remains{}, errors.New("it does not die")
	}
	if s.engine.sandboxes[s.id] == s {
		delete(s.engine.sandboxes, s.id)
		close(s.done)
		s.engine.ended = append(s.engine.ended, s.id)
	}
	return engine.Remains{Processes: 1}, nil
}

// open is an OpenEngine that always gives this engine.
func (e *fakeEngine) open(context.Context, *configv1.Config, *slog.Logger) (engines.Set, error) {
	return engines.Set{e}, nil
}

// settings are those of a daemon on a socket in a directory of its own.
func settings(t *testing.T, args ...string) *configv1.Config {
	t.Helper()
	dir := t.TempDir()
	loaded, err := config.Load(config.Input{
		Args: append([]string{
			"--state-dir=" + filepath.Join(dir, "state"), "--listen=unix:" + filepath.Join(dir, "sock"), "--drain-timeout=0s",
			"--pool-size=0", // most tests count sandboxes
		}, args...),
		WorkingDirectory: dir,
	})
	if err != nil {
		t.Fatal(err)
	}
	return loaded
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// eventually waits for something that happens soon.
func eventually(t *testing.T, done func() bool) {
	t.Helper()
	for range 1000 {
		if done() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("it did not happen")
}

// syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

var _ io.Writer = (*syncBuffer)(nil)

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
