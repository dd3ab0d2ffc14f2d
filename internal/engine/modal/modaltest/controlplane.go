package modaltest

import (
	"context"
	"sort"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// controlPlane answers the SDK's calls to Modal itself.
type controlPlane struct {
	pb.UnimplementedModalClientServer
	fake *Fake
}

// builderVersion is the version of the image builder that the workspace has.
const builderVersion = "2025.06"

// first is a value of the metadata of a call.
func first(ctx context.Context, key string) string {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}

// AuthTokenGet gives out a token for further calls.
func (c *controlPlane) AuthTokenGet(context.Context, *pb.AuthTokenGetRequest) (*pb.AuthTokenGetResponse, error) {
	return pb.AuthTokenGetResponse_builder{Token: c.fake.token("", c.fake.cfg.AuthTokenLife)}.Build(), nil
}

// EnvironmentGetOrCreate tells what the one environment is like.
func (c *controlPlane) EnvironmentGetOrCreate(_ context.Context, r *pb.EnvironmentGetOrCreateRequest) (*pb.EnvironmentGetOrCreateResponse, error) {
	if name := r.GetDeploymentName(); name != "" && name != "main" {
		return nil, status.Errorf(codes.NotFound, "environment %q not found", name)
	}
	return pb.EnvironmentGetOrCreateResponse_builder{
		EnvironmentId: "en-main",
		Metadata: pb.EnvironmentMetadata_builder{
			Name: "main", Settings: pb.EnvironmentSettings_builder{ImageBuilderVersion: builderVersion}.Build(),
		}.Build(),
	}.Build(), nil
}

// AppGetOrCreate finds or makes an app.
func (c *controlPlane) AppGetOrCreate(_ context.Context, r *pb.AppGetOrCreateRequest) (*pb.AppGetOrCreateResponse, error) {
	f := c.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	id, ok := f.apps[r.GetAppName()]
	if !ok {
		if r.GetObjectCreationType() != pb.ObjectCreationType_OBJECT_CREATION_TYPE_CREATE_IF_MISSING {
			return nil, status.Errorf(codes.NotFound, "app %q not found", r.GetAppName())
		}
		id = newID("ap")
		f.apps[r.GetAppName()] = id
	}
	return pb.AppGetOrCreateResponse_builder{AppId: id}.Build(), nil
}

// SandboxCreateV2 creates a sandbox and answers when it runs.
func (c *controlPlane) SandboxCreateV2(ctx context.Context, r *pb.SandboxCreateV2Request) (*pb.SandboxCreateV2Response, error) {
	return c.fake.create(ctx, first(ctx, "x-idempotency-key"), newID("sb"), r)
}

// sandbox finds a sandbox that the control plane knows.
func (f *Fake) sandbox(id string) (*sandbox, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.sandboxes[id]; s != nil && !s.forgotten {
		return s, nil
	}
	return nil, status.Errorf(codes.NotFound, "sandbox %s not found", id)
}

// SandboxGetTaskIdV2 tells the task of a sandbox, or how it ended.
func (c *controlPlane) SandboxGetTaskIdV2(_ context.Context, r *pb.SandboxGetTaskIdRequest) (*pb.SandboxGetTaskIdResponse, error) {
	s, err := c.fake.sandbox(r.GetSandboxId())
	if err != nil {
		return nil, err
	}
	return pb.SandboxGetTaskIdResponse_builder{TaskId: &s.task}.Build(), nil
}

// SandboxGetCommandRouterAccess tells where a sandbox's router is.
func (c *controlPlane) SandboxGetCommandRouterAccess(_ context.Context, r *pb.SandboxGetCommandRouterAccessRequest) (*pb.SandboxGetCommandRouterAccessResponse, error) {
	s, err := c.fake.sandbox(r.GetSandboxId())
	if err != nil {
		return nil, err
	}
	return pb.SandboxGetCommandRouterAccessResponse_builder{
		Jwt: c.fake.token(s.task, c.fake.cfg.RouterTokenLife), Url: c.fake.routerURL(),
	}.Build(), nil
}

// SandboxWaitV2 holds the call for as long as the client says, unless there is a result.
func (c *controlPlane) SandboxWaitV2(ctx context.Context, r *pb.SandboxWaitRequest) (*pb.SandboxWaitResponse, error) {
	s, err := c.fake.sandbox(r.GetSandboxId())
	if err != nil {
		return nil, err
	}
	result, err := c.fake.wait(ctx, s, time.Duration(float64(r.GetTimeout())*float64(time.Second)))
	if err != nil {
		return nil, err
	}
	if _, err := c.fake.sandbox(s.id); err != nil {
		return nil, err // forgotten meanwhile
	}
	return pb.SandboxWaitResponse_builder{Result: result, Metadata: pb.SandboxHandleMetadata_builder{AppId: s.app, Result: result}.Build()}.Build(), nil
}

// SandboxTerminateV2 ends a sandbox; that it has ended is no error.
func (c *controlPlane) SandboxTerminateV2(_ context.Context, r *pb.SandboxTerminateRequest) (*pb.SandboxTerminateResponse, error) {
	s, err := c.fake.sandbox(r.GetSandboxId())
	if err != nil {
		return nil, err
	}
	c.fake.mu.Lock()
	before := s.result
	c.fake.mu.Unlock()
	c.fake.finish(s, ended{result: result(pb.GenericResult_GENERIC_STATUS_TERMINATED, "terminated"), commit: true})
	return pb.SandboxTerminateResponse_builder{ExistingResult: before}.Build(), nil
}

// SandboxGetFromNameV2 finds a sandbox by its name.
func (c *controlPlane) SandboxGetFromNameV2(_ context.Context, r *pb.SandboxGetFromNameRequest) (*pb.SandboxGetFromNameResponse, error) {
	f := c.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	app := f.apps[r.GetAppName()]
	var found *sandbox
	for _, s := range f.sandboxes {
		if s.forgotten || app == "" || s.app != app || s.name != r.GetSandboxName() || s.ending && !r.GetIncludeTerminated() {
			continue
		}
		if found == nil || s.created.After(found.created) {
			found = s
		}
	}
	if found == nil {
		return nil, status.Errorf(codes.NotFound, "sandbox with name %q not found", r.GetSandboxName())
	}
	return pb.SandboxGetFromNameResponse_builder{SandboxId: found.id}.Build(), nil
}

// SandboxGetFromName finds none: the fake has no names for sandboxes of the first backend.
func (c *controlPlane) SandboxGetFromName(_ context.Context, r *pb.SandboxGetFromNameRequest) (*pb.SandboxGetFromNameResponse, error) {
	return nil, status.Errorf(codes.NotFound, "sandbox with name %q not found", r.GetSandboxName())
}

// seconds is a time as the protocol has it.
func seconds(t time.Time) float64 { return float64(t.UnixMicro()) / 1e6 }

// SandboxListV2 lists running sandboxes, the newest first, those from before a time.
func (c *controlPlane) SandboxListV2(_ context.Context, r *pb.SandboxListRequest) (*pb.SandboxListResponse, error) {
	return c.list(r, func(*sandbox) bool { return true }), nil
}

func (c *controlPlane) list(r *pb.SandboxListRequest, wanted func(*sandbox) bool) *pb.SandboxListResponse {
	f := c.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	var found []*sandbox
	for _, s := range f.sandboxes {
		before := r.GetBeforeTimestamp() == 0 || seconds(s.created) < r.GetBeforeTimestamp()
		if !before || !wanted(s) || s.forgotten || s.ending && !r.GetIncludeFinished() || r.GetAppId() != "" && s.app != r.GetAppId() || !s.hasTags(r.GetTags()) {
			continue
		}
		found = append(found, s)
	}
	sort.Slice(found, func(i, j int) bool { return found[i].created.After(found[j].created) })
	var page []*pb.SandboxInfo
	for _, s := range found[:min(len(found), f.cfg.PageSize)] {
		page = append(page, pb.SandboxInfo_builder{
			Id: s.id, CreatedAt: seconds(s.created), AppId: s.app, Name: s.name, ImageId: s.image.id, Tags: tagList(s.tags),
			TimeoutSecs: s.definition.GetTimeoutSecs(), TaskInfo: pb.TaskInfo_builder{Id: s.task, SandboxId: s.id, Result: s.result}.Build(),
		}.Build())
	}
	return pb.SandboxListResponse_builder{Sandboxes: page}.Build()
}

func (s *sandbox) hasTags(want []*pb.SandboxTag) bool {
	for _, t := range want {
		if v, ok := s.tags[t.GetTagName()]; !ok || v != t.GetTagValue() {
			return false
		}
	}
	return true
}

// SandboxTagsSetV2 replaces the tags of a sandbox.
func (c *controlPlane) SandboxTagsSetV2(_ context.Context, r *pb.SandboxTagsSetRequest) (*emptypb.Empty, error) {
	s, err := c.fake.sandbox(r.GetSandboxId())
	if err != nil {
		return nil, err
	}
	c.fake.mu.Lock()
	defer c.fake.mu.Unlock()
	s.tags = tagMap(r.GetTags())
	return &emptypb.Empty{}, nil
}

// SandboxTagsGetV2 tells the tags of a sandbox.
func (c *controlPlane) SandboxTagsGetV2(_ context.Context, r *pb.SandboxTagsGetRequest) (*pb.SandboxTagsGetResponse, error) {
	s, err := c.fake.sandbox(r.GetSandboxId())
	if err != nil {
		return nil, err
	}
	c.fake.mu.Lock()
	defer c.fake.mu.Unlock()
	return pb.SandboxTagsGetResponse_builder{Tags: tagList(s.tags)}.Build(), nil
}
