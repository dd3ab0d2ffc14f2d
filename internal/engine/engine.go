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
	// Create makes the sandbox spec.ID, or returns the one that has this id: a
	// repeat after a crash never makes two. It returns when the guest answers.
	Create(ctx context.Context, spec Spec) (Sandbox, error)
	// Open returns a sandbox made earlier, also by an executord before this one. A
	// fault of kind NotFound means that it is gone and that nothing of it is left.
	Open(ctx context.Context, id string) (Sandbox, error)
	// List names every sandbox of this executord that is alive or has left anything.
	List(ctx context.Context) ([]string, error)
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

// Spec says which sandbox to make.
type Spec struct {
	// ID is chosen by the caller: 1 to 63 characters of a-z, 0-9 and "-".
	ID string
	// Limits are what is asked for; zero fields take the defaults.
	Limits Limits
	// Network is the kind of network; "" is NetworkNone.
	Network Network
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
	// DiskBytes bounds all that the sandbox writes into files.
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
