package modaltest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// directoryLayer is the name, in the layer of an image of a directory, of its content.
const directoryLayer = "directory"

// inside opens a directory as the processes of a sandbox see it: links do not lead out.
func (s *sandbox) inside(path string) (*os.File, error) {
	root, err := os.OpenFile(filepath.Join("/proc", strconv.Itoa(s.box.first.Process.Pid), "root"), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	fd, err := unix.Openat2(int(root.Fd()), path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// TaskSnapshotDirectory makes an image of one directory of a sandbox.
func (r *router) TaskSnapshotDirectory(ctx context.Context, q *pb.TaskSnapshotDirectoryRequest) (*pb.TaskSnapshotDirectoryResponse, error) {
	s, err := r.task(ctx, q.GetTaskId())
	if err != nil {
		return nil, err
	}
	f := r.fake
	defer f.occupy(s)()
	dir, err := s.inside(string(q.GetPath()))
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	defer dir.Close()
	id, err := f.once(s, q.GetSnapshotId(), func() (*image, error) {
		img := &image{id: newID("im"), path: string(q.GetPath())}
		layer := filepath.Join("layers", img.id)
		img.layers = []string{layer}
		from := fmt.Sprintf("/proc/self/fd/%d/.", 3)
		if err := s.box.frozen(func() error { return copyOpen(ctx, dir, from, filepath.Join(f.dir, layer, directoryLayer)) }); err != nil {
			return nil, err
		}
		f.keep(img, time.Duration(q.GetTtlSeconds())*time.Second)
		return img, nil
	})
	if err != nil {
		return nil, err
	}
	return pb.TaskSnapshotDirectoryResponse_builder{ImageId: id}.Build(), nil
}

// TaskMountDirectory shows an image of a directory, or an empty one, in a sandbox. What is
// written there is the sandbox's own.
func (r *router) TaskMountDirectory(ctx context.Context, q *pb.TaskMountDirectoryRequest) (*emptypb.Empty, error) {
	s, err := r.task(ctx, q.GetTaskId())
	if err != nil {
		return nil, err
	}
	f := r.fake
	defer f.occupy(s)()
	at, err := os.MkdirTemp(f.boxDir(s), "mount-")
	if err != nil {
		return nil, internal(err)
	}
	if err := os.Chmod(at, 0o755); err != nil {
		return nil, internal(err)
	}
	if id := q.GetImageId(); id != "" {
		f.mu.Lock()
		img := f.images[id]
		f.mu.Unlock()
		if img == nil {
			return nil, status.Errorf(codes.NotFound, "image %s not found", id)
		}
		if img.path == "" {
			return nil, status.Errorf(codes.Unimplemented, "the fake mounts images of directories only")
		}
		if err := copyTree(ctx, filepath.Join(f.dir, img.layers[0], directoryLayer)+"/.", at); err != nil {
			return nil, internal(err)
		}
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, at, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, internal(fmt.Errorf("clone the mount of %s: %w", at, err))
	}
	tree := os.NewFile(uintptr(fd), at)
	defer tree.Close()
	if err := s.box.ask(ctx, order{Op: "mount", Dir: string(q.GetPath())}, tree); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &emptypb.Empty{}, nil
}

// TaskUnmountDirectory takes back what TaskMountDirectory did.
func (r *router) TaskUnmountDirectory(ctx context.Context, q *pb.TaskUnmountDirectoryRequest) (*emptypb.Empty, error) {
	s, err := r.task(ctx, q.GetTaskId())
	if err != nil {
		return nil, err
	}
	if err := s.box.ask(ctx, order{Op: "unmount", Dir: string(q.GetPath())}); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	return &emptypb.Empty{}, nil
}

// mount and unmount are the first process's part.
func (in *inside) mount(o order, files []*os.File) error {
	if len(files) != 1 {
		return errors.New("a mount needs what to mount")
	}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return err
	}
	return unix.MoveMount(int(files[0].Fd()), "", unix.AT_FDCWD, o.Dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

func (in *inside) unmount(o order) error { return unix.Unmount(o.Dir, unix.MNT_DETACH) }

// SandboxGetExitSnapshotV2 tells the snapshot that was made at the end of a sandbox.
func (c *controlPlane) SandboxGetExitSnapshotV2(ctx context.Context, r *pb.SandboxGetExitSnapshotRequest) (*pb.SandboxGetExitSnapshotResponse, error) {
	f := c.fake
	s, err := f.sandbox(r.GetSandboxId())
	if err != nil {
		return nil, err
	}
	if !s.wantsExitSnapshot() {
		return nil, status.Error(codes.InvalidArgument, "exit snapshots were not enabled for the sandbox")
	}
	select {
	case <-s.over:
	case <-time.After(time.Duration(float64(r.GetTimeout()) * float64(time.Second))):
		return pb.SandboxGetExitSnapshotResponse_builder{Pending: &pb.SandboxGetExitSnapshotResponse_Pending{}}.Build(), nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.exit.image != "" {
		return pb.SandboxGetExitSnapshotResponse_builder{
			Success: pb.SandboxGetExitSnapshotResponse_Success_builder{ImageId: s.exit.image}.Build(),
		}.Build(), nil
	}
	return pb.SandboxGetExitSnapshotResponse_builder{Error: pb.SandboxGetExitSnapshotResponse_Error_builder{
		ErrorCode: pb.SandboxGetExitSnapshotResponse_ERROR_CODE_INTERNAL, Message: "no snapshot was made: " + s.exit.failed,
	}.Build()}.Build(), nil
}
