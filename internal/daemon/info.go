package daemon

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/api"
	"github.com/harvest-run/executord/internal/diskspace"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/pool"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/version"
)

// serverInfo implements api.Info.
type serverInfo struct {
	start      time.Time
	engine     engine.Engine
	executions keeper
	sessions   interface{ Running() int }
	pool       interface{ Stats() pool.Stats }
	admission  *admission.Controller
	disk       *diskspace.Floor
	draining   atomic.Bool
}

// keeper runs executions and keeps those that have ended.
type keeper interface {
	Running() int
	Stored() execution.Stored
}

// setDraining notes that new work is refused.
func (s *serverInfo) setDraining() { s.draining.Store(true) }

// ServerInfo describes the server as it is now.
func (s *serverInfo) ServerInfo(ctx context.Context) (api.ServerInfo, error) {
	sandboxes, err := s.engine.List(ctx)
	if err != nil {
		return api.ServerInfo{}, fmt.Errorf("list sandboxes: %w", err)
	}
	stored := s.executions.Stored()
	free, err := s.disk.Free()
	if err != nil {
		free = 0 // it is nothing that would keep the rest from being told
	}
	return api.ServerInfo{
		Version:   version.String(),
		GoVersion: version.Go(),
		StartTime: s.start,
		Engines: []api.EngineInfo{{
			Name: s.engine.Name(), Isolation: s.engine.Isolation(),
			Capabilities: s.engine.Capabilities(), Sandboxes: len(sandboxes),
		}},
		RunningExecutions: s.executions.Running(),
		RunningSessions:   s.sessions.Running(),
		Draining:          s.draining.Load(),
		DefaultLimits:     s.engine.DefaultLimits(),
		Pool:              s.pool.Stats(),
		Admission:         s.admission.Stats(),
		StoredExecutions:  stored.Executions,
		StoredBytes:       stored.Bytes,
		FreeBytes:         free,
		DiskFull:          s.disk.Check() != nil,
	}, nil
}
