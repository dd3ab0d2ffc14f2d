// Package local is the embedded engine: sandboxes made of Linux namespaces, control
// groups, overlays and a system call filter, on the machine that executord runs on,
// with nothing else installed. The guest is forked straight into its namespaces, by a
// small process that lives as long as the engine, and builds its root file system itself; executord only prepares what needs the
// host's rights. Guests do not die with executord: they are found again by what lies
// in the state directory.
//
// As root every sandbox has a range of user ids of its own and its limits are
// enforced by control groups. As an ordinary user, where the host allows user
// namespaces, a sandbox has that one user and no limits; asking for one is refused.
//
// The kernel is shared with the host: this isolation is as good as the kernel is.
package local

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/cgroup"
	"github.com/harvest-run/executord/internal/engine/local/disk"
	"github.com/harvest-run/executord/internal/engine/local/hostimage"
	"github.com/harvest-run/executord/internal/engine/local/seccomp"
	"github.com/harvest-run/executord/internal/ext4"
	"github.com/harvest-run/executord/internal/fault"
)

// Config says where and how sandboxes are made.
type Config struct {
	// StateDir is executord's; the engine uses its "local" directory. It must be on a
	// file system that overlays can write to (not itself an overlay).
	StateDir string
	// Guest is the executor-guest binary.
	Guest []byte
	// UIDBase is the first of UIDCount ranges of 65,536 user and group ids of the
	// host, one for each sandbox that is alive; a multiple of 65,536, not 0. Used only
	// as root.
	UIDBase, UIDCount uint32
	// CgroupParent is the path of the parent control group in every hierarchy; ""
	// takes the group that this process is in.
	CgroupParent string
	// Defaults are the limits of a sandbox whose Spec names none.
	Defaults engine.Limits
	// ExtraPaths are further directories of the host that sandboxes see, like /usr.
	ExtraPaths []string
	// Blank is how many guests are kept ready to become sandboxes: processes in
	// namespaces of their own that wait, without a root file system. 0 keeps none.
	Blank int
	// Logger gets what no caller is told; nil drops it.
	Logger *slog.Logger
}

// Engine makes local sandboxes.
type Engine struct {
	cfg     Config
	root    bool // this process may do what takes the host's root
	dir     string
	boot    string // the id of this run of the host
	images  *hostimage.Images
	forker  *forker
	blanks  *blanks      // nil if none are kept
	groups  *cgroup.Host // nil for an ordinary user
	uids    *uidRanges
	disks   *disk.Maker // nil for an ordinary user
	filter  []byte
	capable []engine.Capability
	// What sandboxes are made from besides the host, and what outlives them.
	snapshots *imageStore
	volumes   *volumeStore

	mu        sync.Mutex
	sandboxes map[string]*sandbox
	creating  map[string]chan struct{}
	watchers  sync.WaitGroup
	// background is work that nobody waits for any more but Close.
	background sync.WaitGroup
}

// New prepares the engine and makes one sandbox to see that it can. Its errors say
// what is missing on this host and how to get it.
func New(ctx context.Context, cfg Config) (*Engine, error) {
	e, err := prepare(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := e.trial(ctx); err != nil {
		return nil, errors.Join(err, e.Close())
	}
	e.capable = e.capabilities()
	if cfg.Blank > 0 {
		e.blanks = newBlanks(ctx, e, cfg.Blank)
	}
	e.snapshots.start()
	return e, nil
}

// prepare does all of New but the trial.
func prepare(ctx context.Context, cfg Config) (_ *Engine, err error) {
	if len(cfg.Guest) == 0 {
		return nil, errors.New("the local engine has no executor-guest to start")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	e := &Engine{
		cfg: cfg, root: os.Geteuid() == 0, dir: filepath.Join(cfg.StateDir, "local"),
		sandboxes: make(map[string]*sandbox), creating: make(map[string]chan struct{}),
	}
	for _, d := range []string{e.dir, e.sandboxDir("")} {
		// 0700, because files of a sandbox's root lie below with the ids of the host's root.
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("make the engine's directory: %w", err)
		}
	}
	if err := ext4.Spread(e.sandboxDir("")); err != nil {
		return nil, err
	}
	if e.boot, err = bootID(); err != nil {
		return nil, fmt.Errorf("read the id of this run of the host: %w", err)
	}
	e.images = hostimage.New(hostimage.Config{Dir: filepath.Join(e.dir, "images"), Host: "/", Boot: e.boot, Extra: cfg.ExtraPaths})
	if err := e.apart(); err != nil {
		return nil, err
	}
	if e.snapshots, err = openImageStore(e.dir, e.sandboxDir(""), cfg.Logger); err != nil {
		return nil, err
	}
	if e.volumes, err = openVolumeStore(e.dir, e.sandboxDir("")); err != nil {
		return nil, err
	}
	program, err := guestFile(cfg.Guest)
	if err != nil {
		return nil, err
	}
	e.forker = newForker(program)
	defer func() {
		if err != nil {
			err = errors.Join(err, e.Close())
		}
	}()
	if e.root {
		if e.uids, err = newUIDRanges(cfg.UIDBase, cfg.UIDCount); err != nil {
			return nil, err
		}
		if e.disks, err = disk.NewMaker(filepath.Join(e.dir, "disks")); err != nil {
			return nil, err
		}
		if e.groups, err = cgroup.Find("executord-"+e.key(), cfg.CgroupParent); err != nil {
			return nil, fmt.Errorf("find control groups: %w", err)
		}
	}
	if err := e.sweepBlanks(ctx); err != nil {
		return nil, fmt.Errorf("remove guests that waited: %w", err)
	}
	if e.filter, err = seccomp.Assemble(e.commandGroups()); err != nil {
		return nil, err
	}
	return e, nil
}

// apart refuses a state directory that sandboxes would see: below it lie the files of
// all the others, and to the root of a sandbox every file of the host's root is its own.
func (e *Engine) apart() error {
	img, err := e.images.Prepare()
	if err != nil {
		return err
	}
	dir, err := filepath.EvalSymlinks(e.dir)
	if err != nil {
		return err
	}
	for _, tree := range img.Trees {
		seen, err := filepath.EvalSymlinks(tree)
		if err != nil {
			return err
		}
		if rel, err := filepath.Rel(seen, dir); err == nil && filepath.IsLocal(rel) {
			return fmt.Errorf("the state directory %s lies in %s, which sandboxes see", e.cfg.StateDir, tree)
		}
	}
	return nil
}

// trial makes a sandbox and ends it.
func (e *Engine) trial(ctx context.Context) error {
	// The time bounds a host that hangs; a sandbox takes milliseconds.
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("the first sandbox was not ready within a minute"))
	defer cancel()
	id := "trial-" + e.key()
	if old, err := e.Open(ctx, id); err == nil { // of a trial that was cut off
		if _, err := old.Terminate(ctx); err != nil {
			return err
		}
	}
	sb, err := e.Create(ctx, engine.Spec{ID: id})
	if err != nil {
		return fmt.Errorf("this host cannot make local sandboxes: %w%s", err, remedy(err, e.root))
	}
	_, err = sb.Terminate(ctx)
	return err
}

// key tells the groups of several state directories on one host apart.
func (e *Engine) key() string {
	path, err := filepath.Abs(e.cfg.StateDir)
	if err != nil {
		path = e.cfg.StateDir
	}
	sum := sha256.Sum256([]byte(path))
	return hex.EncodeToString(sum[:4])
}

func (e *Engine) sandboxDir(id string) string { return filepath.Join(e.dir, "sandboxes", id) }

// commandGroups says whether the guest can have a control group for each command.
func (e *Engine) commandGroups() bool {
	if e.groups == nil {
		return false
	}
	ok, _ := e.groups.CanKill()
	return ok
}

// Name is "local".
func (e *Engine) Name() string { return "local" }

// Isolation is "namespaces": the kernel is shared.
func (e *Engine) Isolation() string { return "namespaces" }

// Capabilities says what was found on this host.
func (e *Engine) Capabilities() []engine.Capability { return slices.Clone(e.capable) }

// DefaultLimits are the configured ones, without those that nobody here can enforce.
func (e *Engine) DefaultLimits() engine.Limits {
	l := e.cfg.Defaults
	if ok, _ := e.canLimit(cgroup.Memory); !ok {
		l.MemoryBytes = 0
	}
	if ok, _ := e.canLimit(cgroup.PIDs); !ok {
		l.PIDs = 0
	}
	if ok, _ := e.canLimit(cgroup.CPU); !ok {
		l.CPUMillis = 0
	}
	return e.enforceable(l)
}

func (e *Engine) canLimit(controller string) (bool, string) {
	if e.groups == nil {
		return false, "executord runs as an ordinary user, who has no control groups"
	}
	return e.groups.Can(controller)
}

// CheckLimits refuses what cannot be enforced.
func (e *Engine) CheckLimits(l engine.Limits) error {
	if l.MemoryBytes < 0 || l.PIDs < 0 || l.CPUMillis < 0 || l.DiskBytes < 0 || l.OpenFiles < 0 {
		return fault.New(fault.Invalid, "LIMIT_NEGATIVE", "limits %+v: must not be negative", l)
	}
	for _, asked := range []struct {
		field, controller string
		value             int64
	}{
		{"memory_bytes", cgroup.Memory, l.MemoryBytes}, {"pids", cgroup.PIDs, l.PIDs}, {"cpu_millis", cgroup.CPU, l.CPUMillis},
	} {
		if asked.value == 0 {
			continue
		}
		if ok, why := e.canLimit(asked.controller); !ok {
			return notEnforceable(asked.field, why, "run executord as root")
		}
	}
	return e.checkFiles(l)
}

// Create makes a sandbox, or returns the one that has the id and lives.
func (e *Engine) Create(ctx context.Context, spec engine.Spec) (engine.Sandbox, error) {
	if !validID(spec.ID) {
		return nil, fault.New(fault.Invalid, "SANDBOX_ID", "sandbox id %q: must be 1 to 63 characters of a-z, 0-9 and \"-\"", spec.ID)
	}
	if err := e.CheckSpec(spec); err != nil {
		return nil, err
	}
	done, err := e.claim(ctx, spec.ID)
	if err != nil {
		return nil, err
	}
	defer done()
	sb, err := e.open(spec.ID)
	if err == nil {
		select {
		case <-sb.done:
			// As after a restart: what is left of one that died makes room.
			_, err = sb.Terminate(ctx)
		default:
			return sb, nil
		}
	}
	if err != nil && fault.KindOf(err) != fault.NotFound {
		return nil, err
	}
	if sb, err = e.create(ctx, spec); err != nil {
		return nil, fmt.Errorf("make sandbox %s: %w", spec.ID, err)
	}
	e.keep(sb)
	return sb, nil
}

// validID is Spec's rule. An id is the name of a directory and of control groups, so
// nothing else may get that far.
func validID(id string) bool {
	if len(id) == 0 || len(id) > 63 {
		return false
	}
	return strings.Trim(id, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// claim makes the caller the only one who works on an id, until done is called.
func (e *Engine) claim(ctx context.Context, id string) (done func(), err error) {
	for {
		e.mu.Lock()
		other, busy := e.creating[id]
		if !busy {
			mine := make(chan struct{})
			e.creating[id] = mine
			e.mu.Unlock()
			return func() {
				e.mu.Lock()
				delete(e.creating, id)
				e.mu.Unlock()
				close(mine)
			}, nil
		}
		e.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// keep remembers a sandbox and watches for its end.
func (e *Engine) keep(sb *sandbox) {
	e.mu.Lock()
	e.sandboxes[sb.id] = sb
	e.mu.Unlock()
	e.watchers.Go(sb.watch)
}

func (e *Engine) forget(sb *sandbox) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.sandboxes[sb.id] == sb {
		delete(e.sandboxes, sb.id)
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
	sb, err := e.open(id)
	if err != nil {
		return nil, err
	}
	return sb, nil
}

// open returns a sandbox that is known, or that lives since an executord before
// this one. What is left of one that died is removed.
func (e *Engine) open(id string) (*sandbox, error) {
	e.mu.Lock()
	sb, ok := e.sandboxes[id]
	e.mu.Unlock()
	if ok {
		return sb, nil
	}
	sb, err := e.adopt(id)
	if err != nil {
		return nil, err
	}
	e.keep(sb)
	return sb, nil
}

// List names the sandboxes that have a directory or a control group.
func (e *Engine) List(context.Context) ([]string, error) {
	entries, err := os.ReadDir(e.sandboxDir(""))
	if err != nil {
		return nil, fmt.Errorf("list sandboxes: %w", err)
	}
	var ids []string
	for _, d := range entries {
		if validID(d.Name()) {
			ids = append(ids, d.Name())
		}
	}
	if e.groups != nil {
		names, err := e.groups.List()
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if validID(name) { // else it is a guest's that is no sandbox yet
				ids = append(ids, name)
			}
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// Close gives up following the sandboxes, which go on living, and ends the process that
// forked them.
func (e *Engine) Close() error {
	e.mu.Lock()
	followed := slices.Collect(maps.Values(e.sandboxes))
	clear(e.sandboxes)
	e.mu.Unlock()
	for _, sb := range followed {
		sb.process.stopWatching()
	}
	e.watchers.Wait()
	e.snapshots.close()
	e.background.Wait()
	for _, sb := range followed {
		sb.process.fd.Close()
	}
	errs := []error{e.blanks.close()}
	if e.groups != nil {
		errs = append(errs, e.groups.Close())
	}
	return errors.Join(append(errs, e.forker.close())...)
}

// notFound is the fault for an id that nothing is left of.
func notFound(id string) error {
	return fault.Wrap(fs.ErrNotExist, fault.NotFound, "SANDBOX_NOT_FOUND", "no sandbox %q", id)
}
