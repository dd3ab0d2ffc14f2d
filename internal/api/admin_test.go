package api

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/pool"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
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
		Pool:          pool.Stats{Size: 2, Ready: 1, Hits: 7, Misses: 8},
		Admission: admission.Stats{
			Config:  admission.Config{MaxRunning: 9, MaxSandboxes: 10, MaxQueued: 11, MaxQueueWait: 12 * time.Second},
			Running: 13, Sandboxes: 14, Queued: 15,
		},
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
		WarmPool:      &executorv1.WarmPool{Size: 2, Ready: 1, Hits: 7, Misses: 8},
		Admission: &executorv1.Admission{
			Running: 13, Queued: 15, Sandboxes: 14, MaxRunning: 9, MaxQueued: 11,
			MaxQueueWait: durationpb.New(12 * time.Second), MaxSandboxes: 10,
		},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// With the check of an engine that is asked for.
	want.Engines[0].Checks = []*executorv1.Capability{{Name: "credentials", Detail: "none\uFFFD", Remedy: "get some"}}
	got, err = b.admin.GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{CheckEngine: "local"})
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" || err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	_, err = b.admin.GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{CheckEngine: "moon"})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("the check of an unknown engine: %v", err)
	}
}
