package daemon

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/api"
	"github.com/harvest-run/executord/internal/diskspace"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/engine/pool"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/version"
)

// serverInfo implements api.Info.
type serverInfo struct {
	start      time.Time
	engines    engines.Set
	executions keeper
	sessions   interface{ Running() int }
	pool       interface{ Stats() pool.Stats }
	admission  *admission.Controller
	disk       *diskspace.Floor
	settings   *configv1.Config
	draining   atomic.Bool
}

// keeper runs executions and keeps those that have ended.
type keeper interface {
	Running() int
	Stored() execution.Stored
}

// CheckEngine implements api.Info.
func (s *serverInfo) CheckEngine(ctx context.Context, name string) ([]engine.Capability, error) {
	e, err := s.engines.Get(name)
	if err != nil {
		return nil, err
	}
	if e.Name() == modalName && s.settings != nil {
		return checkModal(ctx, s.settings), nil
	}
	return nil, nil // its capabilities say it all
}

// setDraining notes that new work is refused.
func (s *serverInfo) setDraining() { s.draining.Store(true) }

// describeTime bounds how long an engine may take to tell of itself.
const describeTime = 5 * time.Second

// describe describes an engine. One that cannot tell what it has, as one elsewhere may
// not, is no reason to tell nothing of the others.
func describe(ctx context.Context, e engine.Engine) api.EngineInfo {
	info := api.EngineInfo{Name: e.Name(), Isolation: e.Isolation(), Capabilities: e.Capabilities()}
	ctx, cancel := context.WithTimeoutCause(ctx, describeTime, fmt.Errorf("no answer within %v", describeTime))
	defer cancel()
	sandboxes, err := e.List(ctx)
	if err != nil {
		info.Capabilities = append(slices.Clone(info.Capabilities), engine.Capability{
			Name: "sandboxes", Detail: fmt.Sprintf("list sandboxes: %v", err), Remedy: "executord doctor --engine " + e.Name() + " says more",
		})
	}
	info.Sandboxes = len(sandboxes)
	return info
}

// ServerInfo describes the server as it is now.
func (s *serverInfo) ServerInfo(ctx context.Context) (api.ServerInfo, error) {
	described := make([]api.EngineInfo, len(s.engines))
	var asked sync.WaitGroup
	for i, e := range s.engines {
		asked.Go(func() { described[i] = describe(ctx, e) })
	}
	asked.Wait()
	stored := s.executions.Stored()
	free, err := s.disk.Free()
	if err != nil {
		free = 0 // it is nothing that would keep the rest from being told
	}
	return api.ServerInfo{
		Version:           version.String(),
		GoVersion:         version.Go(),
		StartTime:         s.start,
		Engines:           described,
		RunningExecutions: s.executions.Running(),
		RunningSessions:   s.sessions.Running(),
		Draining:          s.draining.Load(),
		DefaultLimits:     s.engines.Default().DefaultLimits(),
		Pool:              s.pool.Stats(),
		Admission:         s.admission.Stats(),
		StoredExecutions:  stored.Executions,
		StoredBytes:       stored.Bytes,
		FreeBytes:         free,
		DiskFull:          s.disk.Check() != nil,
	}, nil
}
