package api

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/engine"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func TestGetServerInfo(t *testing.T) {
	b := newBench(t)
	b.info.info = ServerInfo{
		Version: "v1", GoVersion: "go1.26", StartTime: time.Unix(5, 0),
		Engines: []EngineInfo{
			{Name: "local", Isolation: "namespaces", Sandboxes: 2, Capabilities: []engine.Capability{
				{Name: "limit.memory", Available: true, Detail: "cgroup v1 at /a\xff"},
				{Name: "cgroup.kill", Detail: "no unified tree", Remedy: "mount it"},
			}},
			{Name: "other"},
		},
		RunningExecutions: 3, RunningSessions: 4, Draining: true,
		DefaultLimits: engine.Limits{MemoryBytes: 1, CPUMillis: 2, PIDs: 3},
	}
	got, err := b.admin.GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	want := &executorv1.GetServerInfoResponse{
		Version: "v1", GoVersion: "go1.26", StartTime: &timestamppb.Timestamp{Seconds: 5},
		Engines: []*executorv1.Engine{
			{Name: "local", Isolation: "namespaces", Sandboxes: 2, Capabilities: []*executorv1.Capability{
				{Name: "limit.memory", Available: true, Detail: "cgroup v1 at /a\uFFFD"},
				{Name: "cgroup.kill", Detail: "no unified tree", Remedy: "mount it"},
			}},
			{Name: "other"},
		},
		RunningExecutions: 3, RunningSessions: 4, Draining: true,
		DefaultLimits: &executorv1.Limits{MemoryBytes: 1, CpuMillis: 2, Pids: 3},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
