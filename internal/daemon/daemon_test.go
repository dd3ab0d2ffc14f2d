package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/engine/engines"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"
)

// running is a daemon that serves.
type running struct {
	t        *testing.T
	cancel   context.CancelCauseFunc
	done     chan error
	sessions executorv1.SessionServiceClient
	executor executorv1.ExecutorServiceClient
	admin    executorv1.AdminServiceClient
}

// start runs a daemon until stop or the end of the test.
func start(t *testing.T, cfg Config) *running {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = discard()
	}
	d, err := cfg.Complete(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	r := &running{t: t, cancel: cancel, done: make(chan error, 1)}
	var target string
	if addr := d.Addr(); addr.Network() == "unix" {
		target = "unix:" + addr.String()
	} else {
		target = addr.String()
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	r.sessions = executorv1.NewSessionServiceClient(conn)
	r.executor = executorv1.NewExecutorServiceClient(conn)
	r.admin = executorv1.NewAdminServiceClient(conn)
	goRun(t, func() { r.done <- d.Run(ctx) })
	// Before goRun's, which waits.
	t.Cleanup(func() { cancel(nil) })
	return r
}

// stop stops it and returns what Run did.
func (r *running) stop() error {
	r.t.Helper()
	r.cancel(errors.New("the test is over"))
	return <-r.done
}

func (r *running) session(name string) *executorv1.Session {
	r.t.Helper()
	resp, err := r.sessions.GetSession(r.t.Context(), &executorv1.GetSessionRequest{Name: name, Wait: durationpb.New(600e9)})
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.GetSession()
}

func (r *running) createSession() string {
	r.t.Helper()
	resp, err := r.sessions.CreateSession(r.t.Context(), &executorv1.CreateSessionRequest{})
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.GetSession().GetName()
}

// TestKeepAndTerminate leads sessions through restarts of the daemon.
func TestKeepAndTerminate(t *testing.T) {
	fake := newFakeEngine("stray")
	cfg := settings(t)
	first := start(t, Config{Settings: cfg, OpenEngines: fake.open})
	name := first.createSession()
	if s := first.session(name); s.GetState() != executorv1.Session_STATE_RUNNING || s.GetLimits().GetPids() != 9 {
		t.Fatalf("%v", s)
	}
	eventually(t, func() bool { return fmt.Sprint(fake.gone()) == "[stray]" })
	info, err := first.admin.GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if e := info.GetEngines(); len(e) != 1 || e[0].GetName() != "fake" || e[0].GetSandboxes() != 1 || len(e[0].GetCapabilities()) != 1 {
		t.Errorf("engines: %v", e)
	}
	if info.GetRunningSessions() != 1 || info.GetDraining() || info.GetVersion() == "" || info.GetDefaultLimits().GetPids() != 9 || info.GetStartTime() == nil {
		t.Errorf("%v", info)
	}
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(fake.gone()) != "[stray]" || fake.closed != 1 {
		t.Errorf("a stop that keeps ended %v; the engine was closed %d times", fake.gone(), fake.closed)
	}

	cfg.OnStop = configv1.OnStop_ON_STOP_TERMINATE
	second := start(t, Config{Settings: cfg, OpenEngines: fake.open})
	if s := second.session(name); s.GetState() != executorv1.Session_STATE_RUNNING {
		t.Fatalf("after a restart: %v", s)
	}
	if err := second.stop(); err != nil {
		t.Fatal(err)
	}
	if n := len(fake.gone()); n != 2 {
		t.Errorf("a stop that terminates ended %v", fake.gone())
	}

	third := start(t, Config{Settings: cfg, OpenEngines: fake.open})
	if s := third.session(name); s.GetState() != executorv1.Session_STATE_TERMINATED || s.GetEndReason() != executorv1.Session_END_REASON_SERVER_STOPPED {
		t.Errorf("%v", s)
	}
	if err := third.stop(); err != nil {
		t.Fatal(err)
	}
}

func TestPageTokensSurviveARestart(t *testing.T) {
	fake := newFakeEngine()
	cfg := settings(t)
	first := start(t, Config{Settings: cfg, OpenEngines: fake.open})
	for range 2 {
		first.createSession()
	}
	page, err := first.sessions.ListSessions(t.Context(), &executorv1.ListSessionsRequest{PageSize: 1})
	if err != nil || page.GetNextPageToken() == "" {
		t.Fatalf("%v, %v", page, err)
	}
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
	second := start(t, Config{Settings: cfg, OpenEngines: fake.open})
	next, err := second.sessions.ListSessions(t.Context(), &executorv1.ListSessionsRequest{PageSize: 1, PageToken: page.GetNextPageToken()})
	if err != nil || len(next.GetSessions()) != 1 || next.GetSessions()[0].GetName() == page.GetSessions()[0].GetName() {
		t.Errorf("%v, %v", next, err)
	}
}

func TestReadKey(t *testing.T) {
	dir := t.TempDir()
	first, err := readKey(dir, "a.key")
	if err != nil || len(first) != keySize {
		t.Fatalf("%d bytes, %v", len(first), err)
	}
	second, err := readKey(dir, "a.key")
	if err != nil || string(second) != string(first) {
		t.Errorf("another key the second time, %v", err)
	}
	if other, err := readKey(dir, "b.key"); err != nil || string(other) == string(first) {
		t.Errorf("the same key under another name, %v", err)
	}
	path := filepath.Join(dir, "a.key")
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	// A write that was cut off is no key.
	if err := os.WriteFile(path+".new", []byte("cut"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 5); err != nil {
		t.Fatal(err)
	}
	if third, err := readKey(dir, "a.key"); err != nil || len(third) != keySize {
		t.Errorf("%d bytes of a file that is cut off, %v", len(third), err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*.new")); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
	if _, err := readKey(filepath.Join(dir, "none"), "a.key"); err == nil {
		t.Error("no error without a directory")
	}
}

// TestCompleteFails has everything that can be wrong at the start. After each failure
// the state directory is free again and the engine closed.
func TestCompleteFails(t *testing.T) {
	occupied, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer occupied.Close()
	tests := map[string]struct {
		change func(t *testing.T, c *Config, e *fakeEngine)
		want   string
	}{
		"port in use": {
			func(t *testing.T, c *Config, _ *fakeEngine) { c.Settings.Listen = occupied.Addr().String() },
			"the port is in use by another program; choose another one with --listen",
		},
		"socket in use": {
			func(t *testing.T, c *Config, _ *fakeEngine) {
				path := filepath.Join(t.TempDir(), "busy")
				l, err := net.Listen("unix", path)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { l.Close() })
				c.Settings.Listen = "unix:" + path
			},
			"it is in use by another program",
		},
		"a file at the socket": {
			func(t *testing.T, c *Config, _ *fakeEngine) {
				path := filepath.Join(t.TempDir(), "file")
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				c.Settings.Listen = "unix:" + path
			},
			"there is a file that is not a socket",
		},
		"no directory for the socket": {
			func(t *testing.T, c *Config, _ *fakeEngine) { c.Settings.Listen = "unix:/nonexistent/dir/sock" },
			"listen on socket",
		},
		"engine": {
			func(t *testing.T, c *Config, _ *fakeEngine) {
				c.OpenEngines = func(context.Context, *configv1.Config, *slog.Logger) (engines.Set, error) {
					return nil, errors.New("no namespaces")
				}
			},
			"no namespaces",
		},
		"state directory is a file": {
			func(t *testing.T, c *Config, _ *fakeEngine) {
				path := filepath.Join(t.TempDir(), "file")
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				c.Settings.StateDir = path
			},
			"make state directory",
		},
		"state directory of everybody": {
			func(t *testing.T, c *Config, _ *fakeEngine) {
				c.Settings.StateDir = t.TempDir()
				if err := os.Chmod(c.Settings.StateDir, 0o777); err != nil {
					t.Fatal(err)
				}
			},
			"can be written to by others (mode 0777); make it private: chmod 700",
		},
		"damaged state": {
			func(t *testing.T, c *Config, _ *fakeEngine) {
				if err := os.MkdirAll(c.Settings.StateDir, 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(c.Settings.StateDir, "executord.db"), []byte("no database"), 0o600); err != nil {
					t.Fatal(err)
				}
			},
			"executord.db",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			fake := newFakeEngine("s-1")
			cfg := Config{Settings: settings(t), Logger: discard(), OpenEngines: fake.open}
			good := settings(t)
			good.StateDir = cfg.Settings.StateDir
			test.change(t, &cfg, fake)
			d, err := cfg.Complete(t.Context())
			if err == nil {
				d.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			if opened := name != "engine" && !strings.Contains(name, "state"); opened && fake.closed != 1 {
				t.Errorf("the engine was closed %d times", fake.closed)
			}
			if len(fake.gone()) != 0 {
				t.Errorf("%v were ended", fake.gone())
			}
			if name == "damaged state" {
				return
			}
			// Nothing holds the state directory any more.
			fake.listErr = nil
			d, err = Config{Settings: good, Logger: discard(), OpenEngines: fake.open}.Complete(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestTwoDaemonsOnOneStateDirectory(t *testing.T) {
	fake := newFakeEngine()
	first := settings(t)
	start(t, Config{Settings: first, OpenEngines: fake.open})
	second := settings(t)
	second.StateDir = first.StateDir
	_, err := Config{Settings: second, Logger: discard(), OpenEngines: fake.open}.Complete(t.Context())
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("is in use by another executord (pid %d)", os.Getpid())) {
		t.Errorf("%v", err)
	}
}

func TestModes(t *testing.T) {
	cfg := settings(t)
	start(t, Config{Settings: cfg, OpenEngines: newFakeEngine().open})
	for path, want := range map[string]os.FileMode{
		cfg.GetStateDir(): os.ModeDir | 0o700,
		strings.TrimPrefix(cfg.GetListen(), "unix:"): os.ModeSocket | 0o600,
	} {
		info, err := os.Stat(path)
		if err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v; want %v", path, info.Mode(), err, want)
		}
	}
}

func TestDeadSocketIsReplaced(t *testing.T) {
	cfg := settings(t)
	path := strings.TrimPrefix(cfg.GetListen(), "unix:")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	r := start(t, Config{Settings: cfg, OpenEngines: newFakeEngine().open})
	if _, err := r.admin.GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{}); err != nil {
		t.Error(err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

func TestAnyPort(t *testing.T) {
	cfg := settings(t)
	cfg.Listen = "localhost:0"
	r := start(t, Config{Settings: cfg, OpenEngines: newFakeEngine().open})
	if _, err := r.admin.GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{}); err != nil {
		t.Error(err)
	}
}

func TestCompleteIsInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("stopped by SIGTERM")
	cfg := Config{Settings: settings(t), Logger: discard(), OpenEngines: func(ctx context.Context, _ *configv1.Config, _ *slog.Logger) (engines.Set, error) {
		cancel(why)
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}}
	if _, err := cfg.Complete(ctx); !errors.Is(err, why) {
		t.Errorf("%v", err)
	}
}

func TestClosers(t *testing.T) {
	var c closers
	var order []string
	for _, name := range []string{"a", "b", "c"} {
		c.add(name, func() error {
			order = append(order, name)
			if name == "b" {
				return errors.New("stuck")
			}
			return nil
		})
	}
	if err := c.close(); err == nil || err.Error() != "close b: stuck" {
		t.Errorf("%v", err)
	}
	if err := c.close(); err != nil || fmt.Sprint(order) != "[c b a]" {
		t.Errorf("%v, %v", order, err)
	}
}
