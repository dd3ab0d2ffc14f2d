package modaltest

import (
	"context"
	"fmt"
	"maps"
	"slices"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// secret is a secret of the workspace, or of one request.
type secret struct {
	name string // empty: of one request
	env  map[string]string
}

// environmentLocked puts together what secrets give, in their order, as variables.
func (f *Fake) environmentLocked(sources []*pb.SecretSource) ([]string, error) {
	env := make(map[string]string)
	for _, source := range sources {
		if source.HasEnv() {
			maps.Copy(env, source.GetEnv().GetContents())
			continue
		}
		s := f.secrets[source.GetSecretId()]
		if s == nil {
			return nil, status.Errorf(codes.NotFound, "secret %s not found", source.GetSecretId())
		}
		maps.Copy(env, s.env)
	}
	return pairs(env), nil
}

// SecretGetOrCreate finds a named secret, or keeps what a request brings.
func (c *controlPlane) SecretGetOrCreate(_ context.Context, r *pb.SecretGetOrCreateRequest) (*pb.SecretGetOrCreateResponse, error) {
	f := c.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	if name := r.GetDeploymentName(); name != "" && len(r.GetEnvDict()) == 0 {
		for id, s := range f.secrets {
			if s.name != name {
				continue
			}
			for _, key := range r.GetRequiredKeys() {
				if _, ok := s.env[key]; !ok {
					return nil, status.Errorf(codes.NotFound, "secret %q is missing key %q", name, key)
				}
			}
			return pb.SecretGetOrCreateResponse_builder{SecretId: id, Metadata: pb.SecretMetadata_builder{Name: name, Keys: slices.Sorted(maps.Keys(s.env))}.Build()}.Build(), nil
		}
		return nil, status.Errorf(codes.NotFound, "secret %q not found", name)
	}
	id := newID("st")
	f.secrets[id] = &secret{name: r.GetDeploymentName(), env: r.GetEnvDict()}
	return pb.SecretGetOrCreateResponse_builder{SecretId: id}.Build(), nil
}

// VolumeGetOrCreate finds or makes a volume.
func (c *controlPlane) VolumeGetOrCreate(_ context.Context, r *pb.VolumeGetOrCreateRequest) (*pb.VolumeGetOrCreateResponse, error) {
	f := c.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	answer := func(v *volume) (*pb.VolumeGetOrCreateResponse, error) {
		return pb.VolumeGetOrCreateResponse_builder{
			VolumeId: v.id, Version: v.version, Metadata: pb.VolumeMetadata_builder{Version: v.version, Name: v.name}.Build(),
		}.Build(), nil
	}
	if name := r.GetDeploymentName(); name != "" {
		for _, v := range f.volumes {
			if v.name == name {
				return answer(v)
			}
		}
		if r.GetObjectCreationType() != pb.ObjectCreationType_OBJECT_CREATION_TYPE_CREATE_IF_MISSING {
			return nil, status.Errorf(codes.NotFound, "volume %q not found", name)
		}
	}
	v, err := f.newVolume(r.GetDeploymentName(), r.GetVersion())
	if err != nil {
		return nil, status.Error(codes.Internal, fmt.Sprint(err))
	}
	f.volumes[v.id] = v
	return answer(v)
}

// VolumeHeartbeat keeps a volume of one program; the fake keeps all.
func (c *controlPlane) VolumeHeartbeat(context.Context, *pb.VolumeHeartbeatRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// VolumeDelete deletes a volume. Sandboxes that have it mounted keep what they see.
func (c *controlPlane) VolumeDelete(_ context.Context, r *pb.VolumeDeleteRequest) (*emptypb.Empty, error) {
	f := c.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.volumes[r.GetVolumeId()]
	if v == nil {
		return nil, status.Errorf(codes.NotFound, "volume %s not found", r.GetVolumeId())
	}
	delete(f.volumes, v.id)
	if err := v.delete(); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &emptypb.Empty{}, nil
}
