package api

import (
	"context"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/pool"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Info knows the server as a whole. The daemon is meant.
type Info interface {
	ServerInfo(ctx context.Context) (ServerInfo, error)
	// CheckEngine looks for what an engine needs that is not on this host. A fault
	// FailedPrecondition (ENGINE_NOT_AVAILABLE) if there is no such engine.
	CheckEngine(ctx context.Context, name string) ([]engine.Capability, error)
}

// ServerInfo is what GetServerInfo tells.
type ServerInfo struct {
	// Version of executord and GoVersion that built it.
	Version   string
	GoVersion string
	// StartTime is when the process started.
	StartTime time.Time
	// Engines are those that make sandboxes, the default one first.
	Engines []EngineInfo
	// RunningExecutions and RunningSessions have not ended.
	RunningExecutions int
	RunningSessions   int
	// Draining is true once new work is refused.
	Draining bool
	// DefaultLimits are those of a request that names none.
	DefaultLimits engine.Limits
	// Pool is how the sandboxes do that are kept ready.
	Pool pool.Stats
	// Admission is how much runs, waits and may.
	Admission admission.Stats
	// StoredExecutions have ended and are kept; StoredBytes is what all logs take.
	StoredExecutions int64
	StoredBytes      int64
	// FreeBytes is what is free under the state directory; 0 if that is not known.
	FreeBytes int64
	// DiskFull is true while new work is refused for that.
	DiskFull bool
}

// EngineInfo describes one engine.
type EngineInfo struct {
	Name         string
	Isolation    string
	Capabilities []engine.Capability
	// Sandboxes that are alive.
	Sandboxes int
}

// adminService implements the AdminService.
type adminService struct {
	executorv1.UnimplementedAdminServiceServer
	info Info
}

// GetServerInfo implements executorv1.AdminServiceServer.
func (s *adminService) GetServerInfo(ctx context.Context, req *executorv1.GetServerInfoRequest) (*executorv1.GetServerInfoResponse, error) {
	var checks []engine.Capability
	if name := req.GetCheckEngine(); name != "" {
		var err error
		if checks, err = s.info.CheckEngine(ctx, name); err != nil {
			return nil, err
		}
	}
	info, err := s.info.ServerInfo(ctx)
	if err != nil {
		return nil, err
	}
	resp := &executorv1.GetServerInfoResponse{
		Version:           info.Version,
		GoVersion:         info.GoVersion,
		StartTime:         timestamp(info.StartTime),
		RunningExecutions: int64(info.RunningExecutions),
		RunningSessions:   int64(info.RunningSessions),
		Draining:          info.Draining,
		DefaultLimits:     limitsProto(info.DefaultLimits),
		WarmPool: &executorv1.WarmPool{
			Size: int64(info.Pool.Size), Ready: int64(info.Pool.Ready), Hits: info.Pool.Hits, Misses: info.Pool.Misses,
		},
		Admission:        admissionProto(info.Admission),
		StoredExecutions: info.StoredExecutions,
		StoredBytes:      info.StoredBytes,
		FreeBytes:        info.FreeBytes,
		DiskFull:         info.DiskFull,
	}
	for _, e := range info.Engines {
		described := &executorv1.Engine{Name: e.Name, Isolation: e.Isolation, Sandboxes: int64(e.Sandboxes)}
		described.Capabilities = capabilitiesProto(e.Capabilities)
		if e.Name == req.GetCheckEngine() {
			described.Checks = capabilitiesProto(checks)
		}
		resp.Engines = append(resp.Engines, described)
	}
	return resp, nil
}

func capabilitiesProto(all []engine.Capability) []*executorv1.Capability {
	var out []*executorv1.Capability
	for _, c := range all {
		out = append(out, &executorv1.Capability{Name: text(c.Name), Available: c.Available, Detail: text(c.Detail), Remedy: text(c.Remedy)})
	}
	return out
}

func admissionProto(a admission.Stats) *executorv1.Admission {
	return &executorv1.Admission{
		Running: int64(a.Running), Queued: int64(a.Queued), Sandboxes: int64(a.Sandboxes),
		MaxRunning: int64(a.MaxRunning), MaxQueued: int64(a.MaxQueued),
		MaxQueueWait: durationpb.New(a.MaxQueueWait), MaxSandboxes: int64(a.MaxSandboxes),
	}
}
