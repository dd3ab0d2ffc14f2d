package modaltest

import (
	"context"
	"crypto/rand"
	"strings"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Sandboxes with a GPU are of Modal's first backend: the same calls under other names,
// and ids of another form, by which the SDK knows them.

// firstID makes an id as those of the first backend: 22 letters and digits.
func firstID() string { return "sb-" + strings.ToLower(rand.Text()[:22]) }

// SandboxCreate creates a sandbox and answers before it runs.
func (c *controlPlane) SandboxCreate(ctx context.Context, r *pb.SandboxCreateRequest) (*pb.SandboxCreateResponse, error) {
	var sources []*pb.SecretSource
	for _, id := range r.GetDefinition().GetSecretIds() {
		sources = append(sources, pb.SecretSource_builder{SecretId: &id}.Build())
	}
	answer, err := c.fake.create(ctx, first(ctx, "x-idempotency-key"), firstID(), pb.SandboxCreateV2Request_builder{
		AppId: r.GetAppId(), Definition: r.GetDefinition(), SecretSources: sources, Tags: r.GetTags(),
	}.Build())
	if err != nil {
		return nil, err
	}
	return pb.SandboxCreateResponse_builder{SandboxId: answer.GetSandboxId()}.Build(), nil
}

// SandboxGetTaskId is SandboxGetTaskIdV2.
func (c *controlPlane) SandboxGetTaskId(ctx context.Context, r *pb.SandboxGetTaskIdRequest) (*pb.SandboxGetTaskIdResponse, error) {
	return c.SandboxGetTaskIdV2(ctx, r)
}

// TaskGetCommandRouterAccess tells where a task's router is.
func (c *controlPlane) TaskGetCommandRouterAccess(_ context.Context, r *pb.TaskGetCommandRouterAccessRequest) (*pb.TaskGetCommandRouterAccessResponse, error) {
	f := c.fake
	f.mu.Lock()
	s := f.tasks[r.GetTaskId()]
	f.mu.Unlock()
	if s == nil {
		return nil, status.Errorf(codes.NotFound, "task %s not found", r.GetTaskId())
	}
	return pb.TaskGetCommandRouterAccessResponse_builder{Jwt: f.token(s.task, f.cfg.RouterTokenLife), Url: f.routerURL()}.Build(), nil
}

// SandboxWait is SandboxWaitV2.
func (c *controlPlane) SandboxWait(ctx context.Context, r *pb.SandboxWaitRequest) (*pb.SandboxWaitResponse, error) {
	return c.SandboxWaitV2(ctx, r)
}

// SandboxTerminate is SandboxTerminateV2.
func (c *controlPlane) SandboxTerminate(ctx context.Context, r *pb.SandboxTerminateRequest) (*pb.SandboxTerminateResponse, error) {
	return c.SandboxTerminateV2(ctx, r)
}

// SandboxGetTunnels is SandboxGetTunnelsV2.
func (c *controlPlane) SandboxGetTunnels(ctx context.Context, r *pb.SandboxGetTunnelsRequest) (*pb.SandboxGetTunnelsResponse, error) {
	return c.SandboxGetTunnelsV2(ctx, r)
}

// SandboxTagsSet is SandboxTagsSetV2.
func (c *controlPlane) SandboxTagsSet(ctx context.Context, r *pb.SandboxTagsSetRequest) (*emptypb.Empty, error) {
	return c.SandboxTagsSetV2(ctx, r)
}

// SandboxTagsGet is SandboxTagsGetV2.
func (c *controlPlane) SandboxTagsGet(ctx context.Context, r *pb.SandboxTagsGetRequest) (*pb.SandboxTagsGetResponse, error) {
	return c.SandboxTagsGetV2(ctx, r)
}

// SandboxGetExitSnapshot is SandboxGetExitSnapshotV2.
func (c *controlPlane) SandboxGetExitSnapshot(ctx context.Context, r *pb.SandboxGetExitSnapshotRequest) (*pb.SandboxGetExitSnapshotResponse, error) {
	return c.SandboxGetExitSnapshotV2(ctx, r)
}

// SandboxList is SandboxListV2, for those of the first backend only.
func (c *controlPlane) SandboxList(ctx context.Context, r *pb.SandboxListRequest) (*pb.SandboxListResponse, error) {
	return c.list(r, func(s *sandbox) bool { return s.first }), ctx.Err()
}

// SandboxGetLogs sends nothing, for as long as the client waits: the programs that
// sandboxes of the first backend are made for are not logged.
func (c *controlPlane) SandboxGetLogs(r *pb.SandboxGetLogsRequest, stream grpc.ServerStreamingServer[pb.TaskLogsBatch]) error {
	s, err := c.fake.sandbox(r.GetSandboxId())
	if err != nil {
		return err
	}
	select {
	case <-s.over:
		return stream.Send(pb.TaskLogsBatch_builder{Eof: true}.Build())
	case <-time.After(time.Duration(float64(r.GetTimeout()) * float64(time.Second))):
		return nil
	case <-stream.Context().Done():
		return status.FromContextError(stream.Context().Err()).Err()
	}
}
