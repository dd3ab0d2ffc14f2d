package modaltest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// image is what sandboxes start from: layers over what every registry image is here.
type image struct {
	id       string
	layers   []string // directories of the fake's, the highest first, each with one per tree
	commands []string // its Dockerfile, all layers
	env      []string
	workdir  string
	expires  time.Time // by the fake's clock; zero: never
	path     string    // what a snapshot of a directory is of
	finished time.Time // by the real clock: when its build is over
	failure  string    // why its build failed
}

// builds is how builds of images go, those to come.
type builds struct {
	refuse string
	delay  time.Duration
}

// baseLayer is the layer that all images have: it hides what the host's image has and
// images of registries do not.
const baseLayer = "layers/base"

func (f *Fake) makeBaseLayer() error {
	root := filepath.Join(f.dir, baseLayer, "root")
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	err := unix.Mknod(filepath.Join(root, "workspace"), unix.S_IFCHR, 0) // what overlays have for "is not there"
	if err != nil {
		return fmt.Errorf("hide /workspace: %w", err)
	}
	return nil
}

// imageLocked finds an image from which something can start.
func (f *Fake) imageLocked(id string) (*image, error) {
	img := f.images[id]
	switch {
	case img == nil, img.failure != "":
		return nil, status.Errorf(codes.NotFound, "image %s not found", id)
	case !img.expires.IsZero() && !f.clock.now().Before(img.expires):
		return nil, status.Errorf(codes.NotFound, "image %s has expired", id)
	case img.path != "":
		return nil, status.Errorf(codes.InvalidArgument, "image %s is of a directory", id)
	}
	return img, nil
}

// ImageGetOrCreate builds one layer of an image, or finds it built.
func (c *controlPlane) ImageGetOrCreate(_ context.Context, r *pb.ImageGetOrCreateRequest) (*pb.ImageGetOrCreateResponse, error) {
	f := c.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	key := fmt.Sprintf("%v %q %v", r.GetImage().GetBaseImages(), r.GetImage().GetDockerfileCommands(), r.GetImage().GetSecretIds())
	img := f.images[f.built[key]]
	if img == nil || img.failure != "" || r.GetForceBuild() {
		var err error
		if img, err = f.buildLocked(r.GetImage()); err != nil {
			return nil, err
		}
		f.images[img.id], f.built[key] = img, img.id
	}
	answer := pb.ImageGetOrCreateResponse_builder{ImageId: img.id, Metadata: imageMetadata()}.Build()
	if !time.Now().Before(img.finished) {
		answer.SetResult(img.outcome()) // else the client joins the build
	}
	return answer, nil
}

func imageMetadata() *pb.ImageMetadata {
	version := builderVersion
	return pb.ImageMetadata_builder{ImageBuilderVersion: &version}.Build()
}

func (i *image) outcome() *pb.GenericResult {
	if i.failure != "" {
		return result(pb.GenericResult_GENERIC_STATUS_FAILURE, i.failure)
	}
	return result(pb.GenericResult_GENERIC_STATUS_SUCCESS, "")
}

// buildLocked makes an image out of the commands of a layer. ENV and WORKDIR have their
// effect; RUN is recorded and not run, as what it does depends on the network.
func (f *Fake) buildLocked(definition *pb.Image) (*image, error) {
	img := &image{id: newID("im"), layers: []string{baseLayer}, finished: time.Now().Add(f.builds.delay), failure: f.builds.refuse}
	for _, b := range definition.GetBaseImages() {
		base, err := f.imageLocked(b.GetImageId())
		if err != nil {
			return nil, err
		}
		img.layers, img.workdir = slices.Clone(base.layers), base.workdir
		img.commands, img.env = slices.Clone(base.commands), slices.Clone(base.env)
	}
	for _, command := range definition.GetDockerfileCommands() {
		word, rest, _ := strings.Cut(strings.TrimSpace(command), " ")
		rest = strings.TrimSpace(rest)
		switch strings.ToUpper(word) {
		case "FROM":
			if len(definition.GetBaseImages()) > 0 {
				continue // "FROM base": what is already there
			}
		case "WORKDIR":
			img.workdir = rest
		case "ENV":
			if name, value, ok := strings.Cut(rest, "="); ok {
				img.env = mergeEnv(img.env, []string{name + "=" + strings.Trim(value, `"`)})
			}
		}
		img.commands = append(img.commands, command)
	}
	if img.workdir != "" {
		layer := filepath.Join("layers", img.id)
		if err := os.MkdirAll(filepath.Join(f.dir, layer, "root", img.workdir), 0o755); err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		img.layers = append([]string{layer}, img.layers...)
	}
	return img, nil
}

// ImageJoinStreaming waits for a build, and tells its log and its result.
func (c *controlPlane) ImageJoinStreaming(r *pb.ImageJoinStreamingRequest, stream grpc.ServerStreamingServer[pb.ImageJoinStreamingResponse]) error {
	f := c.fake
	f.mu.Lock()
	img := f.images[r.GetImageId()]
	f.mu.Unlock()
	if img == nil {
		return status.Errorf(codes.NotFound, "image %s not found", r.GetImageId())
	}
	for i, command := range img.commands {
		log := pb.TaskLogs_builder{Data: fmt.Sprintf("=> step %d: %s\n", i, command), FileDescriptor: pb.FileDescriptor_FILE_DESCRIPTOR_STDOUT}.Build()
		if err := stream.Send(pb.ImageJoinStreamingResponse_builder{EntryId: fmt.Sprint(i), TaskLogs: []*pb.TaskLogs{log}}.Build()); err != nil {
			return err
		}
	}
	select {
	case <-time.After(time.Until(img.finished)):
	case <-stream.Context().Done():
		return status.FromContextError(stream.Context().Err()).Err()
	}
	return stream.Send(pb.ImageJoinStreamingResponse_builder{Result: img.outcome(), Metadata: imageMetadata(), Eof: true}.Build())
}

// ImageFromId says whether there is an image.
func (c *controlPlane) ImageFromId(_ context.Context, r *pb.ImageFromIdRequest) (*pb.ImageFromIdResponse, error) {
	f := c.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	img := f.images[r.GetImageId()]
	if img == nil || !img.expires.IsZero() && !f.clock.now().Before(img.expires) {
		return nil, status.Errorf(codes.NotFound, "image %s not found", r.GetImageId())
	}
	return pb.ImageFromIdResponse_builder{ImageId: img.id, Metadata: imageMetadata()}.Build(), nil
}

// ImageDelete deletes an image. Sandboxes that were made of it live on.
func (c *controlPlane) ImageDelete(_ context.Context, r *pb.ImageDeleteRequest) (*emptypb.Empty, error) {
	f := c.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.images[r.GetImageId()] == nil {
		return nil, status.Errorf(codes.NotFound, "image %s not found", r.GetImageId())
	}
	delete(f.images, r.GetImageId()) // its layers stay: others stand on them
	return &emptypb.Empty{}, nil
}

// ImagePublish gives an image a name.
func (c *controlPlane) ImagePublish(_ context.Context, r *pb.ImagePublishRequest) (*pb.ImagePublishResponse, error) {
	f := c.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.imageLocked(r.GetImageId()); err != nil {
		return nil, err
	}
	f.tags[r.GetTag()] = r.GetImageId()
	return pb.ImagePublishResponse_builder{ImageId: r.GetImageId()}.Build(), nil
}

// ImageGetByTag finds an image by its name.
func (c *controlPlane) ImageGetByTag(_ context.Context, r *pb.ImageGetByTagRequest) (*pb.ImageGetByTagResponse, error) {
	f := c.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	id := f.tags[r.GetTag()]
	if f.images[id] == nil {
		return nil, status.Errorf(codes.NotFound, "image %q not found", r.GetTag())
	}
	return pb.ImageGetByTagResponse_builder{ImageId: id}.Build(), nil
}
