package modaltest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// defaultTTL is how long a snapshot is kept that says nothing of it.
const defaultTTL = 30 * 24 * time.Hour

// exitSnapshot is the snapshot that is made of a sandbox at its end, if it wants one.
type exitSnapshot struct {
	image  string
	failed string
}

// copyTree copies a directory with everything that overlays know of it.
func copyTree(ctx context.Context, from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "cp", "-a", "--reflink=auto", from, to).CombinedOutput()
	if err != nil {
		return fmt.Errorf("copy %s: %w: %s", from, err, out)
	}
	return nil
}

// snapshot makes an image of what a sandbox has in its root now, without its volumes.
func (f *Fake) snapshot(ctx context.Context, s *sandbox, ttl time.Duration) (*image, error) {
	img := &image{id: newID("im"), env: s.image.env, workdir: s.workdir, commands: s.image.commands}
	layer := filepath.Join("layers", img.id)
	upper := filepath.Join(f.boxDir(s), "upper")
	if err := s.box.frozen(func() error { return copyTree(ctx, upper, filepath.Join(f.dir, layer)) }); err != nil {
		return nil, err
	}
	img.layers = append([]string{layer}, s.image.layers...)
	f.keep(img, ttl)
	return img, nil
}

// keep makes an image known. A ttl of 0 is the default, a negative one for ever.
func (f *Fake) keep(img *image, ttl time.Duration) {
	if ttl == 0 {
		ttl = defaultTTL
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if ttl > 0 {
		img.expires = f.clock.now().Add(ttl)
	}
	f.images[img.id] = img
}

// once makes a snapshot, or finds the one that was made for the same request.
func (f *Fake) once(s *sandbox, request string, do func() (*image, error)) (string, error) {
	f.mu.Lock()
	id := s.snapshots[request]
	f.mu.Unlock()
	if id != "" && request != "" {
		return id, nil
	}
	img, err := do()
	if err != nil {
		return "", status.Error(codes.Internal, err.Error())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s.snapshots[request] = img.id
	return img.id, nil
}

// TaskSnapshotFilesystem makes an image of a sandbox's root.
func (r *router) TaskSnapshotFilesystem(ctx context.Context, q *pb.TaskSnapshotFilesystemRequest) (*pb.TaskSnapshotFilesystemResponse, error) {
	s, err := r.task(ctx, q.GetTaskId())
	if err != nil {
		return nil, err
	}
	defer r.fake.occupy(s)()
	id, err := r.fake.once(s, q.GetSnapshotId(), func() (*image, error) {
		return r.fake.snapshot(ctx, s, time.Duration(q.GetTtlSeconds())*time.Second)
	})
	if err != nil {
		return nil, err
	}
	return pb.TaskSnapshotFilesystemResponse_builder{ImageId: id}.Build(), nil
}

func (s *sandbox) wantsExitSnapshot() bool {
	return s.definition.GetExperimentalOptionsV2()["enable_exit_snapshot"] == "true"
}

// takeExitSnapshot makes the snapshot of a sandbox that ends, if it wants one.
func (f *Fake) takeExitSnapshot(s *sandbox) {
	if !s.wantsExitSnapshot() || s.box == nil {
		return
	}
	var e exitSnapshot
	img, err := f.snapshot(context.Background(), s, 0)
	if err != nil {
		e.failed = err.Error()
	} else {
		e.image = img.id
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s.exit = e
}
