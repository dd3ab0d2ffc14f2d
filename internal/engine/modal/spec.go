package modal

import (
	"context"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"time"

	sdk "github.com/modal-labs/modal-client/go"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

const (
	// maxLifetime is Modal's own limit. A sandbox cannot be made to live longer later.
	maxLifetime = 24 * time.Hour
	// maxOpenFiles is more than any kernel lets a process have.
	maxOpenFiles = 1 << 20
	// requestShare is the part of a limit that is kept free for a sandbox, and paid for,
	// while it does not use more.
	requestShare = 4
	leastCPU     = 0.125 // cores
	leastMemory  = 128   // MiB
)

// CheckLimits refuses what Modal does not enforce.
func (e *Engine) CheckLimits(l engine.Limits) error {
	if l.MemoryBytes < 0 || l.PIDs < 0 || l.CPUMillis < 0 || l.DiskBytes < 0 || l.OpenFiles < 0 {
		return fault.New(fault.Invalid, "LIMIT_NEGATIVE", "limits %+v: must not be negative", l)
	}
	switch {
	case l.PIDs > 0:
		return notEnforceable("pids", "Modal does not limit processes")
	case l.DiskBytes > 0:
		return notEnforceable("disk_bytes", "Modal does not limit what a sandbox writes")
	case l.OpenFiles > maxOpenFiles:
		return notEnforceable("open_files", fmt.Sprintf("no process can have more than %d", maxOpenFiles))
	}
	return nil
}

func notEnforceable(field, why string) error {
	return fault.New(fault.FailedPrecondition, "LIMIT_NOT_ENFORCEABLE",
		"limits.%s cannot be enforced on the engine modal: %s; ask for no such limit", field, why).With("field", "limits."+field)
}

// DefaultLimits are the configured ones, without those that Modal does not have.
func (e *Engine) DefaultLimits() engine.Limits {
	l := e.cfg.Defaults
	l.PIDs, l.DiskBytes = 0, 0
	return l
}

func gpuName() *regexp.Regexp    { return regexp.MustCompile(`^[A-Za-z0-9-]{1,32}(:[1-9][0-9]?)?$`) }
func objectName() *regexp.Regexp { return regexp.MustCompile(`^[a-zA-Z0-9._-]{1,64}$`) }

// CheckSpec refuses what no sandbox can be made of.
func (e *Engine) CheckSpec(s engine.Spec) error {
	if err := e.CheckLimits(s.Limits); err != nil {
		return err
	}
	if err := engine.CheckVolumes(s.Volumes); err != nil {
		return fault.New(fault.Invalid, "VOLUMES", "%v", err)
	}
	if s.Lifetime < 0 {
		return fault.New(fault.Invalid, "LIFETIME_NEGATIVE", "lifetime %v: must not be negative", s.Lifetime)
	}
	for _, v := range s.Volumes {
		if strings.Contains(v.Path, ":") {
			return fault.New(fault.Invalid, "VOLUMES", "volume %q: its path must not have a \":\"", v.Name)
		}
	}
	for name := range s.Labels {
		if strings.HasPrefix(name, tagPrefix) {
			return fault.New(fault.Invalid, "LABEL_RESERVED", "label %q: those that begin with %q are executord's own", name, tagPrefix)
		}
	}
	for _, name := range s.Secrets {
		if !objectName().MatchString(name) {
			return fault.New(fault.Invalid, "SECRET_NAME", "secret %q: not a name that Modal can have", name)
		}
	}
	if s.Image != "" && !objectName().MatchString(string(s.Image)) {
		return imageNotFound(s.Image, nil)
	}
	if err := e.checkNetwork(s.Network); err != nil {
		return err
	}
	return checkPlacement(s.Placement)
}

func (e *Engine) checkNetwork(n engine.Network) error {
	switch n {
	case "", engine.NetworkNone, engine.NetworkEgress:
		return nil
	case engine.NetworkHost:
		if e.cfg.OpenNetwork {
			return nil
		}
		return fault.New(fault.FailedPrecondition, "NETWORK_NOT_AVAILABLE",
			"sandboxes on Modal have no network of their own, because the configuration does not say that they may (modal.open_network)")
	}
	return fault.New(fault.Invalid, "NETWORK_UNKNOWN", "network %q: no such kind", n)
}

func checkPlacement(p engine.Placement) error {
	if p.GPU != "" && !gpuName().MatchString(p.GPU) {
		return fault.New(fault.FailedPrecondition, "PLACEMENT_NOT_AVAILABLE", "gpu %q: must be a type and perhaps a number, such as \"A100\" or \"T4:2\"", p.GPU)
	}
	if _, ok := runtimeOf(p.Runtime); !ok {
		return fault.New(fault.FailedPrecondition, "PLACEMENT_NOT_AVAILABLE", "runtime %q: Modal has \"gvisor\" and \"vm\"", p.Runtime)
	}
	if slices.Contains(p.Regions, "") {
		return fault.New(fault.FailedPrecondition, "PLACEMENT_NOT_AVAILABLE", "a region has no name")
	}
	return nil
}

func runtimeOf(name string) (sdk.SandboxRuntime, bool) {
	switch name {
	case "":
		return "", true
	case "gvisor":
		return sdk.SandboxRuntimeGVisor, true
	case "vm":
		return sdk.SandboxRuntimeVM, true
	}
	return "", false
}

// params says to Modal what a Spec says, and to us what will have to be known.
func (e *Engine) params(ctx context.Context, s engine.Spec) (*sdk.SandboxCreateParams, record, error) {
	r := record{id: s.ID, guest: e.guestFile, limits: s.Limits.Or(e.DefaultLimits())}
	lifetime := s.Lifetime
	if lifetime == 0 {
		lifetime = e.cfg.Lifetime
	}
	// Whole seconds, and never one that is there too short.
	lifetime = min((lifetime + time.Second - 1).Truncate(time.Second), maxLifetime)
	r.until = time.Now().Add(lifetime)
	runtime, _ := runtimeOf(either(s.Placement.Runtime, e.cfg.Runtime))
	p := &sdk.SandboxCreateParams{
		Timeout: lifetime, IdleTimeout: e.cfg.IdleTimeout, Runtime: runtime, GPU: s.Placement.GPU, Regions: s.Placement.Regions,
		Name: nameOf(e.cfg.Owner, s.ID), Command: e.entrypoint(s),
	}
	if len(p.Regions) == 0 {
		p.Regions = e.cfg.Regions
	}
	if n := r.limits.CPUMillis; n > 0 {
		p.CPULimit = float64(n) / 1000
		p.CPU = min(p.CPULimit, max(p.CPULimit/requestShare, leastCPU))
	}
	if n := r.limits.MemoryBytes; n > 0 {
		p.MemoryLimitMiB = int(min((n+1<<20-1)>>20, math.MaxInt32))
		p.MemoryMiB = min(p.MemoryLimitMiB, max(p.MemoryLimitMiB/requestShare, leastMemory))
	}
	if e.cfg.ExitSnapshots {
		p.ExperimentalOptions = map[string]any{"enable_exit_snapshot": true}
	}
	if err := e.network(ctx, s.Network, p); err != nil {
		return nil, record{}, err
	}
	for _, name := range s.Secrets {
		secret, err := e.secret(ctx, name)
		if err != nil {
			return nil, record{}, err
		}
		p.Secrets = append(p.Secrets, secret)
	}
	for _, m := range s.Volumes {
		v, err := e.volume(ctx, m.Name, false)
		if err != nil {
			return nil, record{}, err
		}
		if p.Volumes == nil {
			p.Volumes = make(map[string]*sdk.Volume)
		}
		p.Volumes[m.Path] = v
		r.volumes = append(r.volumes, m.Path)
	}
	p.Tags = r.tags(e.cfg.Owner, s.Labels)
	return p, r, nil
}

// network blocks everything, also for egress: what may get out goes through the guest and
// our own proxy, which resolves names itself and leaves no DNS open, as Modal's lists of
// domains do.
func (e *Engine) network(ctx context.Context, n engine.Network, p *sdk.SandboxCreateParams) error {
	if n != engine.NetworkHost {
		p.BlockNetwork = true
		return nil
	}
	if len(e.cfg.OutboundCIDRs) > 0 {
		p.OutboundCIDRAllowlist = &sdk.Allowlist{Entries: e.cfg.OutboundCIDRs}
	}
	if len(e.cfg.Headers) == 0 {
		return nil
	}
	policy := sdk.NewExperimentalOutboundPolicy()
	for _, h := range e.cfg.Headers {
		secret, err := e.secret(ctx, h.Secret)
		if err != nil {
			return err
		}
		policy = policy.WithHeaderReplacement(sdk.ExperimentalOutboundPolicyHeaderReplacement{Domain: h.Domain, Headers: h.Headers, Secret: secret})
	}
	p.ExperimentalOutboundPolicy = &policy
	return nil
}

func either(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
