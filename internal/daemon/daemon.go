// Package daemon is executord as a whole, and the only place that names concrete
// types: it reads the configuration, opens what it names in order, serves, and stops
// in order. Config is completed to a Daemon, which Run serves until its context ends;
// Main is the program around them. The goroutines of a Daemon are those of its parts
// and of one lifecycle.Group; Run waits for all of them.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/api"
	"github.com/harvest-run/executord/internal/broker"
	"github.com/harvest-run/executord/internal/diskspace"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/engine/pool"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/image"
	"github.com/harvest-run/executord/internal/secret"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/store"
	"github.com/harvest-run/executord/internal/telemetry"
	"github.com/harvest-run/executord/internal/turn"
	"github.com/harvest-run/executord/internal/version"
)

// telemetryTime bounds the sending of the last traces and metrics at a stop.
const telemetryTime = 5 * time.Second

// Config is what a Daemon is made of.
type Config struct {
	// Settings are those that config.Load has checked.
	Settings *configv1.Config
	Logger   *slog.Logger
	// OpenEngines makes the engines; nil makes those that Settings name.
	OpenEngines func(ctx context.Context, settings *configv1.Config, logger *slog.Logger) (engines.Set, error)
}

// Daemon is an executord that is ready to serve.
type Daemon struct {
	log      *slog.Logger
	settings *configv1.Config

	engines    engines.Set
	executions executions
	sessions   sessions
	pool       warmPool
	server     server
	listener   net.Listener
	info       *serverInfo
	keys       keys
	// requests are the requests that are remembered, for a time.
	requests idempotency.Expirer
	disk     *diskspace.Floor
	// broker adds credentials to requests of sandboxes; secrets are those that the operator
	// named.
	broker  *broker.Broker
	secrets *secret.Source
	// strays are sandboxes of an earlier time that nobody needs; known says what does.
	strays []stray
	known  unfinished
	// cutOff ends the streams that are open.
	cutOff context.CancelCauseFunc
	opened closers
}

// executions is what a Daemon does with an execution.Service.
type executions interface {
	// Drain refuses new ones and waits until none runs or ctx ends.
	Drain(ctx context.Context) error
	// StopAll ends all that run and returns when they have ended.
	StopAll(ctx context.Context) error
	Running() int
}

// sessions is what a Daemon does with a session.Service.
type sessions interface {
	// Drain refuses new ones.
	Drain()
	// StopAll ends all that live and returns when they have ended.
	StopAll(ctx context.Context) error
	Running() int
}

// warmPool is what a Daemon does with a pool.Pool.
type warmPool interface {
	// Run keeps sandboxes ready until Drain is called, and ends them.
	Run(ctx context.Context) error
	Drain()
}

// server is what a Daemon does with an api.Server.
type server interface {
	Serve(l net.Listener) error
	SetServing(serving bool)
	GracefulStop()
	Stop()
}

// keys is what a Daemon does with auth.Keys.
type keys interface {
	// Run writes when keys were used until ctx ends.
	Run(ctx context.Context)
}

// Complete opens everything, takes up what an executord before this one left, and
// listens. On an error everything that was opened is closed again; sandboxes live on.
func (c Config) Complete(ctx context.Context) (_ *Daemon, err error) {
	d := &Daemon{log: c.Logger, settings: c.Settings}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.opened.close())
		}
	}()
	dir := c.Settings.GetStateDir()
	if err := makePrivate(dir); err != nil {
		return nil, err
	}
	d.disk = diskspace.New(diskspace.Config{Dir: dir, MinFree: c.Settings.GetRetention().GetMinFreeBytes()})
	st, err := store.Open(ctx, store.Config{Dir: dir})
	if err != nil {
		return nil, err
	}
	d.opened.add("state", st.Close)
	d.requests = st

	// Before anything is taken up: a certificate that cannot be read is found at once.
	who, err := c.openCallers(ctx, d, st)
	if err != nil {
		return nil, err
	}
	d.keys = who.keys

	open := c.OpenEngines
	if open == nil {
		open = openEngines
	}
	if d.engines, err = open(ctx, c.Settings, c.Logger); err != nil {
		return nil, err
	}
	for _, e := range d.engines {
		d.opened.add("engine "+e.Name(), e.Close)
	}

	measured, err := telemetry.New(ctx, telemetry.Config{Version: version.String()})
	if err != nil {
		return nil, err
	}
	d.opened.add("telemetry", func() error {
		last, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), telemetryTime, errors.New("nobody takes the telemetry"))
		defer cancel()
		return measured.Close(last)
	})
	allowed := admission.New(admissionConfig(c.Settings.GetAdmission()))
	// It makes nothing before Run, and so nothing that could be taken for a stray.
	ready := pool.New(pool.Config{
		Engine: d.engines.Default(), Size: int(c.Settings.GetPool().GetSize()), MaxAge: c.Settings.GetPool().GetMaxAge().AsDuration(),
		Busy: allowed.Saturated, Logger: c.Logger,
	})
	d.pool = ready
	domain, err := c.openServices(ctx, d, st, measured, allowed, ready)
	if err != nil {
		return nil, err
	}
	d.known = st
	if d.strays, err = findStrays(ctx, d.engines, st, c.Logger); err != nil {
		return nil, err
	}
	pageTokenKey, err := readKey(dir, pageTokenFile)
	if err != nil {
		return nil, err
	}
	requestIDKey, err := readKey(dir, requestIDFile)
	if err != nil {
		return nil, err
	}
	d.info = &serverInfo{
		start: time.Now(), engines: d.engines, executions: domain.executions, sessions: domain.sessions, pool: ready, admission: allowed, disk: d.disk, settings: c.Settings,
	}
	shutdown, cutOff := context.WithCancelCause(context.WithoutCancel(ctx))
	d.cutOff = cutOff
	d.opened.add("streams", func() error { cutOff(context.Canceled); return nil })
	server, err := api.NewServer(shutdown, api.Config{
		Executions: watchable{domain.executions}, Sessions: watchableSessions{domain.sessions}, Turns: watchableTurns{domain.turns}, Images: watchableImages{domain.images}, Info: d.info,
		Keys: who.keys, Auth: who.authenticator, Certificates: who.certificates,
		Logger: c.Logger, PageTokenKey: pageTokenKey, RequestIDKey: requestIDKey,
		Reflection: c.Settings.GetReflection(), Stats: measured.Handler(),
	})
	if err != nil {
		return nil, fmt.Errorf("make the server: %w", err)
	}
	d.server = server
	d.opened.add("server", func() error { server.Stop(); return nil })
	if d.listener, err = listen(ctx, c.Settings.GetListen()); err != nil {
		return nil, err
	}
	// The server closes it too, but only once it serves it.
	d.opened.add("listener", func() error { return ignoreClosed(d.listener.Close()) })
	return d, nil
}

// services are what the api serves.
type services struct {
	sessions   *session.Service
	executions *execution.Service
	turns      *turn.Service
	images     *image.Service
}

// openServices makes the services and lets them recover.
func (c Config) openServices(ctx context.Context, d *Daemon, st *store.Store, measured *telemetry.Telemetry, allowed *admission.Controller, ready *pool.Pool) (services, error) {
	observer, err := measured.NewExecutions()
	if err != nil {
		return services{}, err
	}
	quotas := c.Settings.GetAuth().GetQuotas()
	network, err := c.openNetwork(d.engines)
	if err != nil {
		return services{}, err
	}
	// Closed after those whose sandboxes it serves.
	d.opened.add("network", network.Close)
	turns, err := c.openTurns(d, st)
	if err != nil {
		return services{}, err
	}
	if d.broker, d.secrets, err = c.openBroker(); err != nil {
		return services{}, err
	}
	d.opened.add("broker", d.broker.Close)
	images, err := c.openImages(ctx, d, st, network)
	if err != nil {
		return services{}, err
	}
	fitted := c.openProvision(d, images, network)
	sessionService, err := session.New(session.Config{
		Engines: d.engines, Store: st, Admission: allowed, Pool: ready, Network: network, Dir: filepath.Join(c.Settings.GetStateDir(), "sessions"),
		Parts:       session.Parts{Images: fitted, Credentials: fitted, Workspace: fitted, Agents: fitted, Turns: turns},
		MaxPerOwner: quotas.GetSessions(), CheckRoom: d.disk.Check, Logger: c.Logger,
	})
	if err != nil {
		return services{}, fmt.Errorf("make the session service: %w", err)
	}
	output := c.Settings.GetOutput()
	retention := c.Settings.GetRetention()
	executionService, err := execution.New(execution.Config{
		Engines: d.engines, Store: st, Sessions: sessionService, Admission: allowed, Pool: ready, Network: network,
		Dir:                  filepath.Join(c.Settings.GetStateDir(), "executions"),
		DefaultRetainedBytes: output.GetDefaultRetainedBytes(),
		MaxRetainedBytes:     output.GetMaxRetainedBytes(),
		Quota:                execution.Quota{Running: quotas.GetRunningExecutions(), StoredBytes: quotas.GetStoredBytes()},
		Retention: execution.Retention{
			MaxAge: retention.GetMaxAge().AsDuration(), MaxTotalBytes: retention.GetMaxTotalBytes(),
		},
		CheckRoom: d.disk.Check,
		Observer:  observer,
		Logger:    c.Logger,
	})
	if err != nil {
		return services{}, fmt.Errorf("make the execution service: %w", err)
	}
	if err := measured.Gauge(executionService, sessionService); err != nil {
		return services{}, err
	}
	sessionService.SetExecutions(executionService)
	turns.SetSessions(sessionHome{sessionService})
	// Closed in the opposite order: a session that ends asks for its executions' end.
	d.opened.add("turns", turns.Close)
	d.opened.add("executions", executionService.Close)
	d.opened.add("sessions", sessionService.Close)
	d.sessions, d.executions = sessionService, executionService

	// Turns before sessions, which bring their agents; sessions before executions, which
	// look for their sandboxes.
	if err := turns.Recover(ctx); err != nil {
		return services{}, fmt.Errorf("take up turns: %w", err)
	}
	if err := sessionService.Recover(ctx); err != nil {
		return services{}, fmt.Errorf("take up sessions: %w", err)
	}
	if err := executionService.Recover(ctx); err != nil {
		return services{}, fmt.Errorf("take up executions: %w", err)
	}
	return services{sessionService, executionService, turns, images}, nil
}

func admissionConfig(settings *configv1.Admission) admission.Config {
	return admission.Config{
		MaxRunning: int(settings.GetMaxRunning()), MaxSandboxes: int(settings.GetMaxSandboxes()),
		MaxQueued: int(settings.GetMaxQueued()), MaxQueueWait: settings.GetMaxQueueWait().AsDuration(),
	}
}

// Addr is where the Daemon listens.
func (d *Daemon) Addr() net.Addr { return d.listener.Addr() }

// Close closes a Daemon that is not run. What runs in sandboxes goes on.
func (d *Daemon) Close() error { return d.opened.close() }

// makePrivate makes the state directory, and refuses one in which others can write:
// they could put anything in the place of logs and sockets.
func makePrivate(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("look at state directory: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return fmt.Errorf("state directory %q can be written to by others (mode %04o); make it private: chmod 700 %s", dir, mode, dir)
	}
	return nil
}

// closers closes what was opened, the last first.
type closers struct {
	all []closer
}

type closer struct {
	name  string
	close func() error
}

func (c *closers) add(name string, f func() error) { c.all = append(c.all, closer{name, f}) }

// close closes everything once and returns all errors.
func (c *closers) close() error {
	var errs []error
	for len(c.all) > 0 {
		last := c.all[len(c.all)-1]
		c.all = c.all[:len(c.all)-1]
		if err := last.close(); err != nil {
			errs = append(errs, fmt.Errorf("close %s: %w", last.name, err))
		}
	}
	return errors.Join(errs...)
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// watchable is an execution.Service as the api wants it: with a Watcher that is an
// interface.
type watchable struct {
	*execution.Service
}

// Attach implements api.Executions.
func (w watchable) Attach(ctx context.Context, ref execution.Ref, writer string, takeOver bool) (api.Attachment, error) {
	attachment, err := w.Service.Attach(ctx, ref, writer, takeOver)
	if err != nil {
		// Not a nil pointer in an interface.
		return nil, err
	}
	return attachment, nil
}

// Watch implements api.Executions.
func (w watchable) Watch(ctx context.Context, ref execution.Ref, after *execution.Cursor) (api.Watcher, error) {
	watcher, err := w.Service.Watch(ctx, ref, after)
	if err != nil {
		return nil, err
	}
	return watcher, nil
}

// drainTimeout is how long a stop waits for what runs.
func (d *Daemon) drainTimeout() time.Duration { return d.settings.GetDrainTimeout().AsDuration() }

// terminates says whether a stop ends what still runs after that.
func (d *Daemon) terminates() bool {
	return d.settings.GetOnStop() == configv1.OnStop_ON_STOP_TERMINATE
}
