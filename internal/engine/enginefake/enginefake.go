// Package enginefake is an engine in memory, for tests of what stands above the
// waist. Its sandboxes have a guest that speaks the protocol of proto/harvest/guest/v1
// over a net.Pipe, and runs Scripts instead of programs. Whatever can go wrong with an
// engine or a guest is a Hook.
//
// It waits for nothing but channels and the clock of package time, so that tests can
// run it in a bubble of testing/synctest. Its goroutines belong to the sandboxes;
// Shutdown ends all and waits for them.
package enginefake

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"slices"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// Config of an Engine. Its zero value makes one without faults, whose commands exit
// with 0 at once.
type Config struct {
	// Script says what a command does.
	Script func(r *guestv1.StartRequest) Script
	// Limits are the DefaultLimits.
	Limits engine.Limits
	// Lifetime is how long sandboxes live at most; 0 for any time.
	Lifetime time.Duration
	// Placement takes any; otherwise each is refused.
	Placement bool
	// Secrets are the names of those that there are.
	Secrets []string
	// Connect returns what serves connections to a port of a sandbox's loopback, or nil if
	// nobody listens there. A connection lasts until its server returns, and the server
	// must return when the connection is closed. Its halves are not closed by themselves.
	Connect func(sandbox string, port uint16) func(net.Conn)
	Hooks   Hooks
}

// Hooks are called where something can go wrong; nil ones are not. They may block,
// but not beyond the end of their context. They may be called from many goroutines.
type Hooks struct {
	// Create is called before a sandbox is made, Created after it was made and
	// before Create returns. An error of either is Create's.
	Create, Created func(ctx context.Context, id string) error
	// Open, Dial and Terminate are called before the thing itself is done, and their
	// errors are returned instead.
	Open, Dial, Terminate func(ctx context.Context, id string) error
	// Usage replaces the accounting, which is otherwise all zero.
	Usage func(ctx context.Context, id string) (engine.Usage, error)
	// Snapshot is called before one is made, Commit before volumes are committed.
	Snapshot, Commit func(ctx context.Context, id string) error
	// These are called with the name of the image or volume, before it is done.
	ImageExists, DeleteImage, EnsureVolume, DeleteVolume func(ctx context.Context, name string) error
	// List can fail.
	List func(ctx context.Context) error
	// Ask is called with each request before it is done; false drops it, and nothing
	// answers it.
	Ask func(sandbox string, q *guestv1.Request) bool
	// Answer is called before an answer of the guest is sent, and may change it.
	Answer func(sandbox string, q *guestv1.Request, a *Answer)
}

// Answer is what the guest is about to send.
type Answer struct {
	Response *guestv1.Response
	// Payload of the frame, which the sizes of a ReadResponse's chunks add up to.
	Payload []byte
	// Drop sends nothing, ever: the guest hangs.
	Drop bool
	// Cut sends half of the frame and closes the pipe.
	Cut bool
}

// Engine is an engine.Engine in memory. It outlives those who use it, as sandboxes
// outlive an executord.
type Engine struct {
	cfg Config

	mu        sync.Mutex
	sandboxes map[string]*sandbox
	made      []string
	started   []string
	specs     map[string]engine.Spec
	images    map[engine.ImageRef]time.Time // until when; zero for always
	snapshots []Snapshot
	volumes   map[string]int // how often each was committed
}

var _ engine.Engine = (*Engine)(nil)

// New makes an Engine.
func New(cfg Config) *Engine {
	if cfg.Script == nil {
		cfg.Script = func(*guestv1.StartRequest) Script { return Script{Exit: Exit(0)} }
	}
	return &Engine{
		cfg: cfg, sandboxes: make(map[string]*sandbox), specs: make(map[string]engine.Spec),
		images: make(map[engine.ImageRef]time.Time), volumes: make(map[string]int),
	}
}

// Shutdown ends every sandbox, however it is, and waits for all goroutines.
func (e *Engine) Shutdown() {
	e.mu.Lock()
	var all []*sandbox
	for id, sb := range e.sandboxes {
		delete(e.sandboxes, id)
		all = append(all, sb)
	}
	e.mu.Unlock()
	for _, sb := range all {
		sb.die()
		sb.work.Wait()
	}
}

// Die ends a sandbox by itself, as a crash of its guest does. What is left of it
// stays until it is terminated.
func (e *Engine) Die(id string) {
	if sb, ok := e.find(id); ok {
		sb.die()
	}
}

// Made are the ids of all sandboxes ever made, in order.
func (e *Engine) Made() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.made)
}

// Started are the ids of all commands ever started, in order; a repeated start does
// not count.
func (e *Engine) Started() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.started)
}

// Held are the ids of the commands that the guest of a sandbox holds.
func (e *Engine) Held(sandbox string) []string {
	if sb, ok := e.find(sandbox); ok {
		return sb.held()
	}
	return nil
}

// Pending is how many bytes of a command's output nobody has asked beyond: what its
// program wrote and was not yet given up.
func (e *Engine) Pending(sandbox, execution string) int64 {
	if sb, ok := e.find(sandbox); ok {
		if c, ok := sb.command(execution); ok {
			return c.pending()
		}
	}
	return 0
}

func (e *Engine) find(id string) (*sandbox, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	sb, ok := e.sandboxes[id]
	return sb, ok
}

// Name is "fake".
func (e *Engine) Name() string { return "fake" }

// Isolation is "none".
func (e *Engine) Isolation() string { return "none" }

// Capabilities is one.
func (e *Engine) Capabilities() []engine.Capability {
	return []engine.Capability{{Name: "fake", Available: true, Detail: "nothing is real"}}
}

// DefaultLimits are those of the Config.
func (e *Engine) DefaultLimits() engine.Limits { return e.cfg.Limits }

// CheckLimits refuses CPU limits.
func (e *Engine) CheckLimits(l engine.Limits) error {
	if l.CPUMillis != 0 {
		return fault.New(fault.FailedPrecondition, "LIMIT_NOT_ENFORCEABLE", "limits.cpu_millis cannot be enforced")
	}
	return nil
}

// CheckSpec also refuses images and volumes that are not there, and placement and secrets
// that are not in the Config.
func (e *Engine) CheckSpec(spec engine.Spec) error {
	if err := e.CheckLimits(spec.Limits); err != nil {
		return err
	}
	if err := engine.CheckVolumes(spec.Volumes); err != nil {
		return fault.New(fault.Invalid, "VOLUMES", "%v", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if spec.Image != "" && !e.hasImage(spec.Image) {
		return fault.New(fault.NotFound, "IMAGE_NOT_FOUND", "there is no image %q", spec.Image)
	}
	for _, m := range spec.Volumes {
		if _, ok := e.volumes[m.Name]; !ok {
			return fault.New(fault.NotFound, "VOLUME_NOT_FOUND", "there is no volume %q", m.Name)
		}
	}
	if !e.cfg.Placement && !spec.Placement.IsZero() {
		return fault.New(fault.FailedPrecondition, "PLACEMENT_NOT_AVAILABLE", "there is no choice of places")
	}
	for _, name := range spec.Secrets {
		if !slices.Contains(e.cfg.Secrets, name) {
			return fault.New(fault.FailedPrecondition, "SECRETS_NOT_AVAILABLE", "there is no secret %q", name)
		}
	}
	return nil
}

// Create makes a sandbox, or returns the one that lives.
func (e *Engine) Create(ctx context.Context, spec engine.Spec) (engine.Sandbox, error) {
	if err := call(ctx, e.cfg.Hooks.Create, spec.ID); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := e.CheckSpec(spec); err != nil {
		return nil, err
	}
	sb := e.adopt(spec)
	if err := call(ctx, e.cfg.Hooks.Created, spec.ID); err != nil {
		return nil, err
	}
	return sb, nil
}

func (e *Engine) adopt(spec engine.Spec) *sandbox {
	e.mu.Lock()
	defer e.mu.Unlock()
	if sb, ok := e.sandboxes[spec.ID]; ok && !sb.isDead() {
		return sb
	}
	sb := &sandbox{
		engine: e, id: spec.ID, spec: spec, limits: spec.Limits.Or(e.cfg.Limits), done: make(chan struct{}),
		commands: make(map[string]*command), pipes: make(map[net.Conn]struct{}),
	}
	if e.cfg.Lifetime > 0 {
		life := e.cfg.Lifetime
		if spec.Lifetime > 0 {
			life = min(life, spec.Lifetime)
		}
		sb.deadline = time.Now().Add(life)
	}
	e.sandboxes[spec.ID] = sb
	e.made = append(e.made, spec.ID)
	e.specs[spec.ID] = spec
	return sb
}

// Open finds a sandbox that lives; what is left of another is removed.
func (e *Engine) Open(ctx context.Context, id string) (engine.Sandbox, error) {
	if err := call(ctx, e.cfg.Hooks.Open, id); err != nil {
		return nil, err
	}
	sb, ok := e.find(id)
	if ok && !sb.isDead() {
		return sb, nil
	}
	if ok {
		e.remove(sb)
	}
	return nil, fault.Wrap(fs.ErrNotExist, fault.NotFound, "SANDBOX_NOT_FOUND", "no sandbox %q", id)
}

// List names the sandboxes that were not terminated.
func (e *Engine) List(ctx context.Context) ([]string, error) {
	if hook := e.cfg.Hooks.List; hook != nil {
		if err := hook(ctx); err != nil {
			return nil, err
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	ids := make([]string, 0, len(e.sandboxes))
	for id := range e.sandboxes {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids, nil
}

// Close does nothing: sandboxes go on living.
func (e *Engine) Close() error { return nil }

func (e *Engine) remove(sb *sandbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.sandboxes[sb.id] == sb {
		delete(e.sandboxes, sb.id)
	}
}

func call(ctx context.Context, hook func(context.Context, string) error, id string) error {
	if hook == nil {
		return nil
	}
	return hook(ctx, id)
}

// errDead is what dialling a dead sandbox brings.
var errDead = errors.New("the sandbox has ended")

// sandbox is an engine.Sandbox.
type sandbox struct {
	engine *Engine
	id     string
	spec   engine.Spec
	limits engine.Limits
	// deadline is only told: a test that wants it to come calls Die.
	deadline time.Time
	done     chan struct{}
	work     sync.WaitGroup // pipes and commands

	mu       sync.Mutex
	dead     bool
	remains  engine.Remains
	commands map[string]*command
	pipes    map[net.Conn]struct{}
}

func (sb *sandbox) ID() string            { return sb.id }
func (sb *sandbox) Limits() engine.Limits { return sb.limits }
func (sb *sandbox) Done() <-chan struct{} { return sb.done }
func (sb *sandbox) Deadline() time.Time   { return sb.deadline }

func (sb *sandbox) isDead() bool {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.dead
}

// Dial opens a pipe to the guest.
func (sb *sandbox) Dial(ctx context.Context) (net.Conn, error) {
	if err := call(ctx, sb.engine.cfg.Hooks.Dial, sb.id); err != nil {
		return nil, err
	}
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.dead {
		return nil, fmt.Errorf("dial the guest of sandbox %s: %w", sb.id, errDead)
	}
	ours, theirs := net.Pipe()
	sb.pipes[theirs] = struct{}{}
	sb.work.Go(func() { sb.serve(theirs) })
	return ours, nil
}

// Usage is what the hook says.
func (sb *sandbox) Usage(ctx context.Context) (engine.Usage, error) {
	if hook := sb.engine.cfg.Hooks.Usage; hook != nil {
		return hook(ctx, sb.id)
	}
	return engine.Usage{}, nil
}

// Terminate ends the sandbox and waits for its goroutines.
func (sb *sandbox) Terminate(ctx context.Context) (engine.Remains, error) {
	if err := call(ctx, sb.engine.cfg.Hooks.Terminate, sb.id); err != nil {
		return engine.Remains{}, err
	}
	sb.die()
	sb.work.Wait()
	sb.engine.remove(sb)
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.remains, nil
}

// die ends everything in the sandbox and does not wait for it.
func (sb *sandbox) die() {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.dead {
		return
	}
	sb.dead = true
	close(sb.done)
	for conn := range sb.pipes {
		conn.Close()
	}
	for _, c := range sb.commands {
		if !c.hasEnded() {
			sb.remains.Processes++
		}
	}
}
