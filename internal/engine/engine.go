// Package engine is the waist of the system: what a sandbox is, whatever it is
// made of. Everything above sees only these types; everything below implements
// them and passes the conformance suite in engine/enginetest. An engine makes a
// box with an executor-guest in it and hands over a pipe to that guest; running
// commands, reading output and stopping trees is the guest's work and the same on
// every engine.
package engine

import (
	"context"
	"net"
	"time"
)

// An Engine makes sandboxes and finds them again.
type Engine interface {
	// Name is what requests and records call it: "local", "modal".
	Name() string
	// Isolation says in a word what separates its sandboxes from the host.
	Isolation() string
	// Capabilities says what it can do on this host. Asked once, at the start.
	Capabilities() []Capability
	// DefaultLimits are the limits that a zero field of Spec.Limits gets: what is
	// configured, as far as the engine can enforce it.
	DefaultLimits() Limits
	// CheckLimits returns a fault (LIMIT_NOT_ENFORCEABLE) if a limit that is not
	// zero cannot be enforced.
	CheckLimits(Limits) error
	// CheckSpec returns a fault if no sandbox can be made after a Spec, whatever its ID:
	// that of CheckLimits, or FailedPrecondition with reason IMAGE_NOT_AVAILABLE,
	// VOLUMES_NOT_AVAILABLE, PLACEMENT_NOT_AVAILABLE or SECRETS_NOT_AVAILABLE for what the
	// engine does not have, or Invalid (VOLUMES), or where the engine knows without asking
	// anybody NotFound (IMAGE_NOT_FOUND, VOLUME_NOT_FOUND). Create returns all of these.
	CheckSpec(Spec) error
	// Create makes the sandbox spec.ID, or returns the one that has this id: a
	// repeat after a crash never makes two. It returns when the guest answers.
	Create(ctx context.Context, spec Spec) (Sandbox, error)
	// Open returns a sandbox made earlier, also by an executord before this one. A
	// fault of kind NotFound means that it is gone and that nothing of it is left.
	Open(ctx context.Context, id string) (Sandbox, error)
	// List names every sandbox of this executord that is alive or has left anything.
	List(ctx context.Context) ([]string, error)
	// Volumes are the directories that outlive sandboxes.
	Volumes() Volumes
	// Images are what sandboxes can be made from.
	Images() Images
	// Close waits for background work. Sandboxes go on living.
	Close() error
}

// A Sandbox is one isolated, machine-like place with a guest in it. Its methods may
// be called from any goroutine.
type Sandbox interface {
	// ID is the Spec's.
	ID() string
	// Limits are the limits in force.
	Limits() Limits
	// Deadline is when the engine ends the sandbox by a limit of its own; zero if it has
	// none.
	Deadline() time.Time
	// Snapshot makes an image of all that the sandbox's file system has, but for volumes and
	// what is in memory: as it is at one moment, also while processes run. A fault
	// FailedPrecondition (SNAPSHOT_NOT_AVAILABLE) where the engine makes none, or none while
	// processes run: the capability snapshot says that. On an error no image is left.
	Snapshot(ctx context.Context, r SnapshotRequest) (ImageRef, error)
	// CommitVolumes makes what was written to the sandbox's volumes lasting, and visible
	// to other sandboxes.
	CommitVolumes(ctx context.Context) error
	// Dial opens a byte pipe to the guest. Any number may be open.
	Dial(ctx context.Context) (net.Conn, error)
	// Done is closed when the sandbox has ended, by itself or by Terminate.
	Done() <-chan struct{}
	// Usage reads the engine's own accounting, also after the end until Terminate
	// has returned.
	Usage(ctx context.Context) (Usage, error)
	// Terminate ends every process of the sandbox, verifies that none is left and
	// removes everything that belongs to it. It is idempotent; once it returned nil
	// nothing is left.
	Terminate(ctx context.Context) (Remains, error)
}

// Explained is a Sandbox that may know why it ended, in words that include the provider's.
type Explained interface {
	// Ended is nil while the sandbox lives.
	Ended() error
}

// Spec says which sandbox to make.
type Spec struct {
	// ID is chosen by the caller: 1 to 63 characters of a-z, 0-9 and "-".
	ID string
	// Limits are what is asked for; zero fields take the defaults.
	Limits Limits
	// Network is the kind of network; "" is NetworkNone.
	Network Network
	// Image is what it is made from; "" is the engine's base.
	Image ImageRef
	// Volumes are mounted in it; at most MaxVolumes.
	Volumes []VolumeMount
	// Lifetime is how long it is going to be wanted; 0 if that is not known. An engine that
	// cannot let it live so long makes one that lives as long as it can: Deadline says.
	Lifetime time.Duration
	// Labels are shown where the engine shows its sandboxes.
	Labels map[string]string
	// Placement says where and on what it runs.
	Placement Placement
	// Secrets are names of the provider's, whose values are put into the environment of
	// the sandbox.
	Secrets []string
}

// MaxVolumes is the most volumes of a sandbox.
const MaxVolumes = 8

// ImageRef is an engine's name of an image. It means nothing to another engine.
type ImageRef string

// VolumeMount is a volume in a sandbox.
type VolumeMount struct {
	// Name has 1 to 63 characters of a-z, 0-9, ".", "_" and "-", the first of a-z and 0-9.
	Name string
	// Path is absolute and clean, at most 1,024 bytes, and not / or /run, nor /proc, /sys,
	// /dev, /usr, /bin, /sbin, /lib* or /run/executor or below them. What is missing of it is
	// made. Links in the sandbox's image are followed, within the sandbox.
	Path string
}

// Placement says where and on what a sandbox runs, for engines that have a choice. Its
// fields are in the provider's words; empty ones leave it to the engine.
type Placement struct {
	GPU     string   `json:"gpu,omitempty"`
	Regions []string `json:"regions,omitempty"`
	Runtime string   `json:"runtime,omitempty"`
}

// IsZero says whether everything is left to the engine.
func (p Placement) IsZero() bool { return p.GPU == "" && len(p.Regions) == 0 && p.Runtime == "" }

// SnapshotRequest says how a snapshot is made.
type SnapshotRequest struct {
	// TTL is how long it is kept; 0 until it is deleted.
	TTL time.Duration
}

// Volumes are directories that outlive sandboxes, each with a name.
type Volumes interface {
	// Ensure makes a volume that is not there. Invalid (VOLUMES) if none can have the name.
	Ensure(ctx context.Context, name string) error
	// Delete deletes a volume with all that is in it. One that is not there is deleted. A
	// fault FailedPrecondition (VOLUME_IN_USE) while a sandbox has it, where the engine
	// knows.
	Delete(ctx context.Context, name string) error
}

// Images are what snapshots made.
type Images interface {
	// Exists says whether there is such an image.
	Exists(ctx context.Context, ref ImageRef) (bool, error)
	// Delete deletes an image. Sandboxes that were made from it live on. One that is not
	// there is deleted.
	Delete(ctx context.Context, ref ImageRef) error
}

// Network is a kind of network that a sandbox has.
type Network string

// The kinds. Each engine has the first; Capabilities names the others that it has, as
// network.egress and network.host.
const (
	// NetworkNone is a loopback interface of the sandbox's own and nothing else.
	NetworkNone Network = "none"
	// NetworkEgress is the same for the engine: what gets out goes through the guest.
	NetworkEgress Network = "egress"
	// NetworkHost is the network of the machine that the sandbox runs on.
	NetworkHost Network = "host"
)

// Limits bound a sandbox. Zero means none, or in a Spec the default.
type Limits struct {
	MemoryBytes int64 `json:"memory_bytes,omitempty"`
	CPUMillis   int64 `json:"cpu_millis,omitempty"`
	PIDs        int64 `json:"pids,omitempty"`
	// DiskBytes bounds all that the sandbox writes into files, without those of volumes.
	DiskBytes int64 `json:"disk_bytes,omitempty"`
	// OpenFiles bounds the open files of each process. The engine only says whether it
	// can be enforced: the guest enforces it, for each command that is started.
	OpenFiles int64 `json:"open_files,omitempty"`
}

// Or returns l with its zero fields taken from defaults.
func (l Limits) Or(defaults Limits) Limits {
	if l.MemoryBytes == 0 {
		l.MemoryBytes = defaults.MemoryBytes
	}
	if l.CPUMillis == 0 {
		l.CPUMillis = defaults.CPUMillis
	}
	if l.PIDs == 0 {
		l.PIDs = defaults.PIDs
	}
	if l.DiskBytes == 0 {
		l.DiskBytes = defaults.DiskBytes
	}
	if l.OpenFiles == 0 {
		l.OpenFiles = defaults.OpenFiles
	}
	return l
}

// Usage is what a sandbox used since it was made, as far as the engine counts it.
type Usage struct {
	// PeakMemoryBytes is the most memory in use at a time; 0 if not counted.
	PeakMemoryBytes int64
	// CPU is the processor time of all its processes; 0 if not counted.
	CPU time.Duration
	// OOMKills counts the processes that the kernel killed because the memory limit
	// was reached.
	OOMKills int64
	// PIDsRefused counts the forks that the limit of processes refused.
	PIDsRefused int64
}

// Remains says what Terminate found.
type Remains struct {
	// Processes that were alive, without the guest.
	Processes int
}

// Capability is one thing that an engine may or may not be able to do on this host.
type Capability struct {
	// Name is stable, such as "limit.memory" or "language.node".
	Name string
	// Available says whether it is there.
	Available bool
	// Detail says how, or why not.
	Detail string
	// Remedy says what to do to get it, where something can be done.
	Remedy string
}
