package modal

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	sdk "github.com/modal-labs/modal-client/go"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guest/wire"
)

// usagePatience bounds the wait for what the guest says about usage.
const usagePatience = 5 * time.Second

// sandbox is one sandbox on Modal.
type sandbox struct {
	record
	engine  *Engine
	modalID string

	done    chan struct{} // closed when it has ended
	dialing chan struct{} // has room for the one who opens a line
	doubt   chan struct{} // has an element when somebody thinks that it may have ended
	ending  chan struct{} // has room for the one Terminate that works

	missed time.Time // since when its worker has nothing of it; of follow

	mu      sync.Mutex
	handle  *sdk.Sandbox
	line    *line // the one in use; nil without
	ordered bool  // its end was
	why     error // of its end
	used    engine.Usage
	gone    bool // Terminate has done its work
	reaping bool // guarded by the engine
	remains engine.Remains
}

func (e *Engine) newSandbox(handle *sdk.Sandbox, r record) *sandbox {
	return &sandbox{
		record: r, engine: e, modalID: handle.SandboxID, handle: handle, done: make(chan struct{}),
		dialing: make(chan struct{}, 1), doubt: make(chan struct{}, 1), ending: make(chan struct{}, 1),
	}
}

// ID is the Spec's.
func (sb *sandbox) ID() string { return sb.id }

// Limits are those in force.
func (sb *sandbox) Limits() engine.Limits { return sb.limits }

// Deadline is when Modal ends it.
func (sb *sandbox) Deadline() time.Time { return sb.until }

// Done is closed when the sandbox has ended.
func (sb *sandbox) Done() <-chan struct{} { return sb.done }

func (sb *sandbox) over() bool {
	select {
	case <-sb.done:
		return true
	default:
		return false
	}
}

// Ended says why the sandbox did, with the provider's words where it has some; nil while
// it lives.
func (sb *sandbox) Ended() error {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.why
}

// ended is that as an answer to whoever wants something of it.
func (sb *sandbox) ended() error {
	e := fault.New(fault.NotFound, "SANDBOX_ENDED", "sandbox %s has ended: %v", sb.id, sb.Ended())
	e.Err = errOver
	return e
}

func (sb *sandbox) current() *sdk.Sandbox {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.handle
}

// renewHandle forgets what the SDK knows of where the sandbox is, and its token.
func (sb *sandbox) renewHandle() {
	ctx, cancel := within(context.Background(), callTimeout)
	defer cancel()
	fresh, err := sb.engine.client.Sandboxes.FromID(ctx, sb.modalID, nil)
	if err != nil {
		return
	}
	sb.mu.Lock()
	old := sb.handle
	sb.handle = fresh
	sb.mu.Unlock()
	_ = old.Detach() // always nil
}

// openedLine is the line in use if it has not ended.
func (sb *sandbox) openedLine() *line {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.line == nil {
		return nil
	}
	select {
	case <-sb.line.session.Done():
		return nil
	default:
		return sb.line
	}
}

// use puts a line into use; false if nobody is going to close it.
func (sb *sandbox) use(l *line) bool {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	select {
	case <-sb.engine.closing:
		return false
	case <-sb.done:
		return false
	default:
	}
	sb.line = l
	sb.wake()
	return true
}

// wake has the sandbox looked at soon.
func (sb *sandbox) wake() {
	select {
	case sb.doubt <- struct{}{}:
	default:
	}
}

// Dial opens a pipe to the guest.
func (sb *sandbox) Dial(ctx context.Context) (net.Conn, error) {
	for attempt := 1; ; attempt++ {
		session, err := sb.connect(ctx)
		if err != nil {
			if ctx.Err() == nil {
				sb.wake()
			}
			return nil, err
		}
		conn, err := session.Dial(ctx)
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil || attempt == 3 {
			return nil, translate(ctx, err, "reach the guest of sandbox "+sb.id)
		}
	}
}

// Usage is what the guest tells, or the last that it told.
func (sb *sandbox) Usage(ctx context.Context) (engine.Usage, error) {
	if !sb.over() {
		if told, err := sb.ask(ctx); err == nil {
			sb.note(told)
		} else if ctx.Err() != nil {
			return engine.Usage{}, context.Cause(ctx)
		}
	}
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.used, nil
}

func (sb *sandbox) note(told *guestv1.UsageResponse) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	// What is told is bounded, and does not shrink: it is from the sandbox.
	cpu := time.Duration(min(told.GetCpuMicros(), 1<<52)) * time.Microsecond
	sb.used.CPU = max(sb.used.CPU, cpu)
	sb.used.PeakMemoryBytes = max(sb.used.PeakMemoryBytes, int64(min(told.GetPeakMemoryBytes(), 1<<60)))
}

// ask asks the guest for usage.
func (sb *sandbox) ask(ctx context.Context) (*guestv1.UsageResponse, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, usagePatience, errors.New("the guest did not tell its usage"))
	defer cancel()
	conn, err := sb.Dial(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	const id = 1
	if err := wire.Write(conn, &guestv1.Request{Id: id, Call: &guestv1.Request_Usage{Usage: &guestv1.UsageRequest{}}}); err != nil {
		return nil, err
	}
	resp := new(guestv1.Response)
	payload, err := (&wire.Reader{R: conn, Limit: wire.MaxAnswer}).Read(resp)
	if err != nil {
		return nil, err
	}
	if resp.GetId() != id || resp.GetUsage() == nil || payload != 0 {
		return nil, errors.New("the guest answered another question")
	}
	return resp.GetUsage(), nil
}

// Snapshot makes an image of the file system.
func (sb *sandbox) Snapshot(ctx context.Context, r engine.SnapshotRequest) (engine.ImageRef, error) {
	if sb.over() {
		return "", sb.ended()
	}
	ttl := r.TTL
	switch {
	case ttl < 0:
		return "", fault.New(fault.Invalid, "SNAPSHOT_TTL", "a snapshot cannot be kept for %v", ttl)
	case ttl == 0:
		ttl = sdk.NoExpiryTTL
	default:
		ttl = (ttl + time.Second - 1).Truncate(time.Second)
	}
	// The SDK's own time-out is far too short for a repository, and no bound by itself.
	call, cancel := within(ctx, sb.engine.cfg.SnapshotTimeout+callTimeout)
	defer cancel()
	image, err := sb.current().SnapshotFilesystem(call, &sdk.SandboxSnapshotFilesystemParams{Timeout: sb.engine.cfg.SnapshotTimeout, TTL: ttl})
	if err != nil {
		return "", translate(ctx, err, "make a snapshot of sandbox "+sb.id)
	}
	return engine.ImageRef(image.ImageID), nil
}

// CommitVolumes makes what was written lasting: with version 2 of Modal's volumes that is
// what sync does, with version 1 only a reload, which no file may be open for.
func (sb *sandbox) CommitVolumes(ctx context.Context) error {
	if len(sb.volumes) == 0 {
		return nil
	}
	if sb.over() {
		return sb.ended()
	}
	doing := "commit the volumes of sandbox " + sb.id
	call, cancel := within(ctx, sb.engine.cfg.SnapshotTimeout+callTimeout)
	defer cancel()
	handle := sb.current()
	if sb.engine.cfg.VolumeVersion == 2 {
		p, err := handle.Exec(call, append([]string{"sync"}, sb.volumes...), &sdk.SandboxExecParams{Stdout: sdk.Ignore, Stderr: sdk.Ignore})
		if err != nil {
			return translate(ctx, err, doing)
		}
		code, err := p.Wait(call, nil)
		if err != nil {
			return translate(ctx, err, doing)
		}
		if code != 0 {
			return fault.New(fault.Unavailable, reasonFailed, "%s: sync %s ended with %d", doing, strings.Join(sb.volumes, " "), code)
		}
	}
	err := handle.ReloadVolumes(call, &sdk.SandboxReloadVolumesParams{Timeout: sb.engine.cfg.SnapshotTimeout})
	if err != nil && sb.engine.cfg.VolumeVersion == 2 && ctx.Err() == nil && !inDoubt(err) {
		return nil // a file is open, and everything was committed
	}
	return translate(ctx, err, doing)
}

// ExitSnapshot waits for the snapshot that Modal takes of a sandbox that ended by itself,
// where the configuration asks for that. It is of the engine modal only.
func (sb *sandbox) ExitSnapshot(ctx context.Context) (engine.ImageRef, error) {
	limit := sb.engine.cfg.SnapshotTimeout
	call, cancel := within(ctx, limit+callTimeout)
	defer cancel()
	image, err := sb.current().ExperimentalGetExitSnapshot(call, &sdk.SandboxExperimentalGetExitSnapshotParams{Timeout: &limit})
	if err != nil {
		return "", translate(ctx, err, "find the exit snapshot of sandbox "+sb.id)
	}
	return engine.ImageRef(image.ImageID), nil
}

// detach gives the connections up, and leaves the sandbox.
func (sb *sandbox) detach() error { return sb.current().Detach() }

// String is for logs.
func (sb *sandbox) String() string { return fmt.Sprintf("%s (%s)", sb.id, sb.modalID) }
