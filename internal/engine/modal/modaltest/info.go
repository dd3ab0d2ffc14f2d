package modaltest

import (
	"maps"
	"slices"
	"sort"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
)

// Info is what the fake knows of a sandbox, for tests to look at.
type Info struct {
	ID, Task, App, Name string
	Image               string
	// Dockerfile are the commands that its image was built by.
	Dockerfile []string
	Tags       map[string]string
	// Running is false as soon as its end has begun.
	Running bool
	// Result is how it ended, such as "TERMINATED"; empty if it has not, or nobody says.
	Result string
	// Created and Deadline are by the fake's clock.
	Created, Deadline time.Time
	IdleTimeout       time.Duration
	// MilliCPU and MemoryMiB are what was asked for, the others what is the most; 0: none.
	MilliCPU, MilliCPULimit   uint32
	MemoryMiB, MemoryLimitMiB uint32
	GPU, Runtime, Cloud       string
	Regions                   []string
	// Network is "OPEN", "BLOCKED" or "ALLOWLIST", with what is allowed.
	Network        string
	CIDRs, Domains []string
	// Volumes are names of volumes by where they are mounted.
	Volumes map[string]string
	// SecretNames are the named secrets that it was given.
	SecretNames []string
	// Headers are the domains to which headers are added, with the names of the secrets.
	Headers map[string]string
	// Execs is how many programs were started in it, Spooled how many bytes of output are
	// kept of them.
	Execs   int
	Spooled int64
	// PID is the first process, on the host; 0 when it has ended.
	PID int
}

// Sandboxes tells of all sandboxes, the oldest first, with those that have ended.
func (f *Fake) Sandboxes() []Info {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make([]Info, 0, len(f.sandboxes))
	for _, s := range f.sandboxes {
		all = append(all, f.infoLocked(s))
	}
	sort.Slice(all, func(i, j int) bool { return all[i].Created.Before(all[j].Created) })
	return all
}

func (f *Fake) infoLocked(s *sandbox) Info {
	d := s.definition
	r := d.GetResources()
	i := Info{
		ID: s.id, Task: s.task, App: s.app, Name: s.name, Image: s.image.id, Dockerfile: slices.Clone(s.image.commands),
		Tags: maps.Clone(s.tags), Running: !s.ending, Created: s.created, Deadline: s.deadline, IdleTimeout: s.idle,
		MilliCPU: r.GetMilliCpu(), MilliCPULimit: r.GetMilliCpuMax(), MemoryMiB: r.GetMemoryMb(), MemoryLimitMiB: r.GetMemoryMbMax(),
		GPU: r.GetGpuConfig().GetGpuType(), Runtime: d.GetRuntime(), Cloud: d.GetCloudProviderStr(),
		Regions: d.GetSchedulerPlacement().GetRegions(), Network: s.access.GetNetworkAccessType().String(),
		CIDRs: s.access.GetAllowedCidrs(), Domains: s.access.GetAllowedDomains(),
		Volumes: make(map[string]string), Headers: make(map[string]string),
	}
	if s.result != nil {
		i.Result = s.result.GetStatus().String()[len("GENERIC_STATUS_"):]
	}
	for _, m := range s.mounts {
		i.Volumes[m.mount.GetMountPath()] = m.volume.name
	}
	for _, id := range d.GetSecretIds() {
		if named := f.secrets[id]; named != nil && named.name != "" {
			i.SecretNames = append(i.SecretNames, named.name)
		}
	}
	for _, h := range s.outbound.GetHeaderReplacements() {
		if named := f.secrets[h.GetSecretId()]; named != nil {
			i.Headers[h.GetDomain()] = named.name
		}
	}
	for _, p := range s.processes {
		if p != nil {
			i.Execs++
			i.Spooled += p.stdout.length() + p.stderr.length()
		}
	}
	if s.box != nil && !s.ending {
		i.PID = s.box.first.Process.Pid
	}
	return i
}

// Definition is what was asked for when a sandbox was created; nil if there is none.
func (f *Fake) Definition(id string) *pb.Sandbox {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.sandboxes[id]; s != nil {
		return s.definition
	}
	return nil
}

// Running is how many sandboxes run.
func (f *Fake) Running() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, s := range f.sandboxes {
		if !s.ending {
			n++
		}
	}
	return n
}

// Images are the ids of the images that there are: built ones and snapshots.
func (f *Fake) Images() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.images))
}

// Volumes are the names of the volumes that there are.
func (f *Fake) Volumes() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var names []string
	for _, v := range f.volumes {
		names = append(names, v.name)
	}
	sort.Strings(names)
	return names
}
