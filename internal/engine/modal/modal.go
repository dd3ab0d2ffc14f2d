// Package modal is the distributed engine: sandboxes on Modal, through its Go SDK as it
// is. The SDK's own exec can neither stop a program nor find one again, so it is used for
// one thing only: to start `executor-guest dial`, whose standard input and output carry
// every pipe to the guest. The guest is the sandbox's first process, so that each ends
// with the other. Whatever has to be known of a sandbox is in its tags; a name made of its
// id keeps Modal from making a second one.
//
// What Modal says about ends is not believed by itself: a sandbox that was idle for too
// long, or evicted, looks like one that exited with 0.
package modal

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	sdk "github.com/modal-labs/modal-client/go"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// Config says where and how sandboxes are made. Zero fields take the defaults.
type Config struct {
	// Owner tells this executord's sandboxes from those of another in the same app; 1 to
	// 63 characters of a-z, 0-9 and "-". Required, and the same after every restart.
	Owner string
	// Guest is the executor-guest for linux/amd64. Required.
	Guest []byte
	// Client is used instead of one made from the fields below; Close leaves it open.
	Client *sdk.Client
	// TokenID and TokenSecret are the credentials; "" takes them from MODAL_TOKEN_ID and
	// MODAL_TOKEN_SECRET or ~/.modal.toml, as Modal's own tools do.
	TokenID, TokenSecret string
	// App is Modal's app for the sandboxes; made if it is missing. "harvest-agent-executor".
	App string
	// Environment is Modal's environment; "" is the profile's.
	Environment string
	// Image is the registry tag of the base image. "debian:13-slim".
	Image string
	// ImageCommands are lines of a Dockerfile that follow it; nil installs what programs
	// usually expect, and [] nothing.
	ImageCommands []string
	// Regions, Runtime ("gvisor" or "vm") are where a Spec does not say.
	Regions []string
	Runtime string
	// Defaults are the limits of a sandbox whose Spec names none. Limits that Modal does
	// not enforce are left out.
	Defaults engine.Limits
	// Lifetime is that of a sandbox whose Spec does not say how long it is wanted. At
	// most, and by default, 24 h, after which Modal ends every sandbox.
	Lifetime time.Duration
	// IdleTimeout is after how long Modal ends a sandbox that nobody talks to, which is
	// one whose executord has been away for so long. 1 h; negative is never.
	IdleTimeout time.Duration
	// OpenNetwork allows sandboxes with a network of their own: NetworkHost.
	// OutboundCIDRs, if there are any, are all that those reach.
	OpenNetwork   bool
	OutboundCIDRs []string
	// Headers are put into the requests of such sandboxes on their way out, by Modal.
	Headers []Header
	// VolumeVersion is that of volumes: 1 or 2. 2.
	VolumeVersion int
	// SnapshotTimeout bounds a snapshot. 10 min.
	SnapshotTimeout time.Duration
	// ExitSnapshots makes Modal take a snapshot of each sandbox that ends by itself.
	ExitSnapshots bool
	// MaxSandboxes bounds those that are alive, MaxCreatesPerMinute how many are asked
	// for. 100 and 60.
	MaxSandboxes, MaxCreatesPerMinute int
	// StartTimeout bounds the time from when Modal has placed a sandbox until its guest
	// answers. 5 min.
	StartTimeout time.Duration
	// RenewBytes and RenewAfter say when the pipe to a sandbox is replaced, because Modal
	// keeps all that a program ever wrote. 1 GiB and 6 h.
	RenewBytes int64
	RenewAfter time.Duration
	// Logger gets what no caller is told; nil drops it.
	Logger *slog.Logger
}

// Header is what Modal puts into requests to a domain.
type Header struct {
	// Domain may begin with "*.".
	Domain string
	// Secret is the named secret whose keys the values refer to as $KEY.
	Secret string
	// Headers by name.
	Headers map[string]string
}

var (
	_ engine.Engine    = (*Engine)(nil)
	_ engine.Explained = (*sandbox)(nil)
)

// Engine makes sandboxes on Modal.
type Engine struct {
	cfg       Config
	client    *sdk.Client
	ownClient bool
	guestFile string
	ceiling   *ceiling
	lag       time.Duration // resultLag

	closing chan struct{}
	work    sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	sandboxes map[string]*sandbox
	busy      map[string]chan struct{} // ids that somebody works on
	found     map[string]bool          // seen alive, and not yet known to be gone
	ids       map[string]string        // our id by Modal's, as far as it was asked for

	preparing chan struct{} // has room for the one who asks for what follows
	app       *sdk.App
	base      *sdk.Image
	objects   objects
}

// New makes the engine and finds out which sandboxes there are. An error of kind
// Unavailable may be gone a moment later.
func New(ctx context.Context, cfg Config) (*Engine, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("configuration of the engine modal: %w", err)
	}
	sum := sha256.Sum256(cfg.Guest)
	e := &Engine{
		cfg: cfg, client: cfg.Client, guestFile: guestDirectory + "executor-guest-" + hex.EncodeToString(sum[:8]),
		ceiling: newCeiling(cfg.MaxSandboxes, cfg.MaxCreatesPerMinute), lag: resultLag, closing: make(chan struct{}), preparing: make(chan struct{}, 1),
		sandboxes: make(map[string]*sandbox), busy: make(map[string]chan struct{}), found: make(map[string]bool), ids: make(map[string]string),
	}
	if e.client == nil {
		throttle := maxThrottle
		var err error
		e.client, err = sdk.NewClientWithOptions(&sdk.ClientParams{
			TokenID: cfg.TokenID, TokenSecret: cfg.TokenSecret, Environment: cfg.Environment,
			Logger: slog.New(warnings{cfg.Logger.Handler()}), MaxThrottleWait: &throttle,
		})
		if err != nil {
			return nil, fault.Wrap(err, fault.FailedPrecondition, reasonCredentials, "make a client of Modal")
		}
		e.ownClient = true
	}
	if _, err := e.theApp(ctx); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	ids, err := e.list(ctx)
	if err != nil {
		return nil, errors.Join(err, e.Close())
	}
	for _, id := range ids {
		e.found[id] = true
		e.ceiling.found(id)
	}
	return e, nil
}

// DefaultImage is what a Config gets that names no image.
const DefaultImage = "debian:13-slim"

// DefaultImageCommands install what programs usually expect into DefaultImage.
func DefaultImageCommands() []string {
	return []string{
		"RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends" +
			" bash ca-certificates curl git jq nodejs npm procps python3 python3-venv && rm -rf /var/lib/apt/lists/*",
	}
}

// complete checks the configuration and sets what it leaves to us.
func (c *Config) complete() error {
	set(&c.App, "harvest-agent-executor")
	set(&c.Image, DefaultImage)
	set(&c.Lifetime, maxLifetime)
	set(&c.IdleTimeout, time.Hour)
	set(&c.VolumeVersion, 2)
	set(&c.SnapshotTimeout, 10*time.Minute)
	set(&c.MaxSandboxes, 100)
	set(&c.MaxCreatesPerMinute, 60)
	set(&c.StartTimeout, 5*time.Minute)
	set(&c.RenewBytes, 1<<30)
	set(&c.RenewAfter, 6*time.Hour)
	c.IdleTimeout = max(c.IdleTimeout, 0)
	if c.ImageCommands == nil {
		c.ImageCommands = DefaultImageCommands()
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case !validID(c.Owner):
		return fmt.Errorf("owner %q: must be 1 to 63 characters of a-z, 0-9 and \"-\"", c.Owner)
	case len(c.Guest) == 0:
		return errors.New("there is no executor-guest to start")
	case !objectName().MatchString(c.App):
		return fmt.Errorf("app %q: not a name that Modal can have", c.App)
	case c.Lifetime < time.Second || c.Lifetime > maxLifetime:
		return fmt.Errorf("lifetime %v: must be 1 s to %v", c.Lifetime, maxLifetime)
	case c.VolumeVersion != 1 && c.VolumeVersion != 2:
		return fmt.Errorf("volume version %d: must be 1 or 2", c.VolumeVersion)
	case c.MaxSandboxes < 0 || c.MaxCreatesPerMinute < 0:
		return errors.New("a ceiling is below zero")
	case len(c.OutboundCIDRs) > 0 && !c.OpenNetwork:
		return errors.New("outbound CIDRs are of the open network, which is not allowed")
	}
	if _, ok := runtimeOf(c.Runtime); !ok {
		return fmt.Errorf("runtime %q: must be gvisor or vm", c.Runtime)
	}
	for _, cidr := range c.OutboundCIDRs {
		if p, err := netip.ParsePrefix(cidr); err != nil || !p.Addr().Is4() {
			return fmt.Errorf("outbound CIDR %q: must be one of IPv4, such as 10.0.0.0/8", cidr)
		}
	}
	return nil
}

// set gives a field that is zero its default.
func set[T comparable](field *T, to T) {
	var zero T
	if *field == zero {
		*field = to
	}
}

// warnings is a handler without what the SDK says at lower levels: whole command lines.
type warnings struct{ slog.Handler }

func (w warnings) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && w.Handler.Enabled(ctx, l)
}

// Name is "modal".
func (e *Engine) Name() string { return "modal" }

// Isolation is that of the runtime: "gvisor" unless another is configured.
func (e *Engine) Isolation() string { return either(e.cfg.Runtime, "gvisor") }

// Capabilities says what Modal has and what it does not.
func (e *Engine) Capabilities() []engine.Capability {
	const elsewhere = "use the engine local"
	open := engine.Capability{Name: "network.host", Available: e.cfg.OpenNetwork, Detail: "Modal's own network, to anywhere"}
	if len(e.cfg.OutboundCIDRs) > 0 {
		open.Detail = fmt.Sprintf("Modal's own network, to %v", e.cfg.OutboundCIDRs)
	}
	if !open.Available {
		open.Detail, open.Remedy = "the configuration does not allow it", "set modal.open_network"
	}
	return []engine.Capability{
		{Name: "limit.memory", Available: true, Detail: "by Modal"},
		{Name: "limit.cpu", Available: true, Detail: "by Modal"},
		{Name: "limit.pids", Detail: "Modal has no such limit", Remedy: elsewhere},
		{Name: "limit.disk", Detail: "Modal has no such limit", Remedy: elsewhere},
		{Name: "limit.open_files", Available: true, Detail: "of each process, by the guest"},
		{Name: "network.none", Available: true, Detail: "everything is blocked, names too"},
		{Name: "network.egress", Available: true, Detail: "through the guest and executord's proxy"},
		open,
		{Name: "snapshot", Available: true, Detail: "of the whole file system, by Modal"},
		{Name: "volumes", Available: true, Detail: fmt.Sprintf("Modal's, version %d", e.cfg.VolumeVersion)},
		{Name: "placement", Available: true, Detail: "GPU, regions and runtime are handed to Modal"},
		{Name: "secrets", Available: true, Detail: "Modal's named secrets"},
		{Name: "lifetime", Available: true, Detail: fmt.Sprintf("at most %v, by Modal", maxLifetime)},
	}
}

// claim makes the caller the only one who works on an id, until done is called.
func (e *Engine) claim(ctx context.Context, id string) (done func(), err error) {
	for {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		e.mu.Lock()
		other, busy := e.busy[id]
		if !busy {
			mine := make(chan struct{})
			e.busy[id] = mine
			e.mu.Unlock()
			return sync.OnceFunc(func() {
				e.mu.Lock()
				delete(e.busy, id)
				e.mu.Unlock()
				close(mine)
			}), nil
		}
		e.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// detached is a context for what must go on when the caller has gone. It ends with the
// engine.
func (e *Engine) detached(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), limit, fmt.Errorf("not done within %v", limit))
	ending, end := context.WithCancelCause(ctx)
	watched := e.spawn(func() {
		select {
		case <-e.closing:
			end(errClosing)
		case <-ending.Done():
		}
	})
	if !watched {
		end(errClosing)
	}
	return ending, func() {
		end(nil)
		cancel()
	}
}

// spawn runs f beside the caller, unless the engine is closed: then it says false.
func (e *Engine) spawn(f func()) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return false
	}
	e.work.Go(f)
	return true
}

var errClosing = errors.New("the engine is being closed")

// known is a sandbox that is followed already; nil if it is not.
func (e *Engine) known(id string) *sandbox {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sandboxes[id]
}

// keep follows a sandbox.
func (e *Engine) keep(sb *sandbox) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return errClosing
	}
	e.sandboxes[sb.id] = sb
	e.ids[sb.modalID] = sb.id
	delete(e.found, sb.id)
	e.ceiling.found(sb.id)
	e.work.Go(sb.follow)
	return nil
}

// forget gives a sandbox up, of which nothing is left.
func (e *Engine) forget(sb *sandbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.ids, sb.modalID)
	if e.sandboxes[sb.id] == sb {
		delete(e.sandboxes, sb.id)
		e.ceiling.gone(sb.id)
	}
}

// lost notes that nothing is left of an id.
func (e *Engine) lost(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.found, id)
	if e.sandboxes[id] == nil {
		e.ceiling.gone(id)
	}
}

// Open finds a sandbox again.
func (e *Engine) Open(ctx context.Context, id string) (engine.Sandbox, error) {
	if !validID(id) {
		return nil, notFound(id)
	}
	done, err := e.claim(ctx, id)
	if err != nil {
		return nil, err
	}
	defer done()
	if sb := e.known(id); sb != nil {
		return sb, nil
	}
	sb, err := e.find(ctx, id)
	if err != nil {
		return nil, err
	}
	return sb, e.keep(sb)
}

// find looks for a sandbox by its name, and whether it is what it should be and lives.
func (e *Engine) find(ctx context.Context, id string) (*sandbox, error) {
	call, cancel := within(ctx, callTimeout)
	defer cancel()
	handle, err := e.client.Sandboxes.FromName(call, e.cfg.App, nameOf(e.cfg.Owner, id), &sdk.SandboxFromNameParams{Environment: e.cfg.Environment})
	if isGone(err) {
		e.lost(id)
		return nil, notFound(id)
	}
	if err != nil {
		return nil, translate(ctx, err, "look for sandbox "+id)
	}
	tags, err := handle.GetTags(call, nil)
	var code *int
	if err == nil {
		code, err = handle.Poll(call, nil)
	}
	if isGone(err) || code != nil {
		e.lost(id)
		return nil, errors.Join(notFound(id), handle.Detach())
	}
	if err != nil {
		return nil, errors.Join(translate(ctx, err, "look at sandbox "+id), handle.Detach())
	}
	if tags[tagOwner] != e.cfg.Owner || tags[tagID] != id {
		return nil, errors.Join(fault.New(fault.AlreadyExists, reasonTaken, "the name of sandbox %s is that of another's", id), handle.Detach())
	}
	r, err := parseRecord(tags)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("sandbox %s: %w", id, err), handle.Detach())
	}
	return e.newSandbox(handle, r), nil
}

// List names the sandboxes that are alive, and those that were and have not been ended.
func (e *Engine) List(ctx context.Context) ([]string, error) {
	ids, err := e.list(ctx)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	ids = slices.AppendSeq(ids, maps.Keys(e.sandboxes))
	ids = slices.AppendSeq(ids, maps.Keys(e.found))
	e.mu.Unlock()
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// list asks Modal.
func (e *Engine) list(ctx context.Context) ([]string, error) {
	app, err := e.theApp(ctx)
	if err != nil {
		return nil, err
	}
	call, cancel := within(ctx, 5*callTimeout)
	defer cancel()
	all, err := e.client.Sandboxes.List(call, &sdk.SandboxListParams{AppID: app.AppID, Tags: map[string]string{tagOwner: e.cfg.Owner}, Environment: e.cfg.Environment})
	if err != nil {
		return nil, translate(ctx, err, "list sandboxes")
	}
	var ids []string
	for handle, err := range all {
		if err != nil {
			return nil, translate(ctx, err, "list sandboxes")
		}
		id, err := e.idOf(call, handle)
		if err != nil {
			return nil, translate(ctx, err, "look at sandbox "+handle.SandboxID)
		}
		if id != "" {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// idOf is our id of a sandbox of Modal's; "" if it has gone meanwhile.
func (e *Engine) idOf(ctx context.Context, handle *sdk.Sandbox) (string, error) {
	e.mu.Lock()
	id, ok := e.ids[handle.SandboxID]
	e.mu.Unlock()
	if ok {
		return id, nil
	}
	tags, err := handle.GetTags(ctx, nil)
	if isGone(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if id = tags[tagID]; validID(id) {
		e.mu.Lock()
		e.ids[handle.SandboxID] = id
		e.mu.Unlock()
		return id, nil
	}
	return "", nil
}

// Close gives up following the sandboxes, which go on living.
func (e *Engine) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	close(e.closing)
	e.mu.Unlock()
	e.work.Wait()
	e.mu.Lock()
	all := slices.Collect(maps.Values(e.sandboxes))
	e.mu.Unlock()
	var errs []error
	for _, sb := range all {
		errs = append(errs, sb.detach())
	}
	if e.ownClient {
		e.client.Close()
	}
	return errors.Join(errs...)
}
