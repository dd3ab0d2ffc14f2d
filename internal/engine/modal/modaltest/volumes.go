package modaltest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// volume is what has been committed to a volume. Sandboxes see copies of it.
type volume struct {
	id, name string
	version  pb.VolumeFsVersion
	dir      string

	mu sync.Mutex // held while something is committed or copied
}

func (f *Fake) newVolume(name string, version pb.VolumeFsVersion) (*volume, error) {
	if version == pb.VolumeFsVersion_VOLUME_FS_VERSION_UNSPECIFIED {
		version = pb.VolumeFsVersion_VOLUME_FS_VERSION_V1
	}
	v := &volume{id: newID("vo"), name: name, version: version}
	v.dir = filepath.Join(f.dir, "volumes", v.id)
	return v, os.Mkdir(v.dir, 0o755)
}

func (v *volume) delete() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return os.RemoveAll(v.dir)
}

// mounted is a volume as one sandbox sees it: a copy, which it changes until it commits.
type mounted struct {
	volume *volume
	mount  *pb.VolumeMount
	dir    string // the copy

	seen map[string]stamp // what the copy was like when both were the same
}

// stamp tells whether a file was changed.
type stamp struct {
	size, changed int64
	inode         uint64
	mode          fs.FileMode
}

// prepare makes the copy, and says where the sandbox sees it.
func (m *mounted) prepare(at string) (bind, error) {
	m.dir = at
	if err := os.MkdirAll(at, 0o755); err != nil {
		return bind{}, err
	}
	m.volume.mu.Lock()
	defer m.volume.mu.Unlock()
	if err := m.refresh(context.Background()); err != nil {
		return bind{}, err
	}
	from := at
	if sub := m.mount.GetSubPath(); sub != "" {
		from = filepath.Join(at, sub)
		if err := os.MkdirAll(from, 0o755); err != nil {
			return bind{}, err
		}
	}
	return bind{From: from, To: m.mount.GetMountPath(), ReadOnly: m.mount.GetReadOnly()}, nil
}

// refresh makes the copy what the volume is. The volume is locked. The directory itself
// stays, as it is mounted.
func (m *mounted) refresh(ctx context.Context) error {
	err := filepath.WalkDir(m.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == m.dir {
			return err
		}
		if d.IsDir() { // stays if the volume has it: it may be mounted too
			rel, _ := filepath.Rel(m.dir, path) // below m.dir
			if info, err := os.Lstat(filepath.Join(m.volume.dir, rel)); err == nil && info.IsDir() {
				return nil
			}
			if err := os.RemoveAll(path); err != nil {
				return err
			}
			return fs.SkipDir
		}
		return os.Remove(path)
	})
	if err != nil {
		return err
	}
	if err := copyTree(ctx, m.volume.dir+"/.", m.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		if _, gone := os.Stat(m.volume.dir); gone == nil {
			return err
		}
	}
	m.seen, err = stamps(m.dir)
	return err
}

// stamps looks at everything below a directory.
func stamps(dir string) (map[string]stamp, error) {
	seen := make(map[string]stamp)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || path == dir {
			return nil // it went while this looked
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		s := stamp{mode: info.Mode()}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && !d.IsDir() {
			s.size, s.inode, s.changed = st.Size, st.Ino, st.Ctim.Nano()
		}
		seen[rel] = s
		return nil
	})
	return seen, err
}

// commit brings into the volume what the sandbox changed since both were the same: file
// by file, the last one wins. The volume is locked.
func (m *mounted) commit(ctx context.Context) error {
	if m.mount.GetReadOnly() {
		return nil
	}
	now, err := stamps(m.dir)
	if err != nil {
		return err
	}
	for path := range m.seen {
		if _, ok := now[path]; !ok {
			if err := os.RemoveAll(filepath.Join(m.volume.dir, path)); err != nil {
				return err
			}
		}
	}
	for path, s := range now {
		if m.seen[path] == s {
			continue
		}
		to := filepath.Join(m.volume.dir, path)
		if s.mode.IsDir() {
			err = errors.Join(os.MkdirAll(to, 0o755), os.Chmod(to, s.mode.Perm()))
		} else {
			err = errors.Join(os.RemoveAll(to), copyTree(ctx, filepath.Join(m.dir, path), to))
		}
		if err != nil {
			return fmt.Errorf("commit %s: %w", path, err)
		}
	}
	m.seen = now
	return nil
}

// commitVolumes makes what a sandbox wrote to its volumes visible to others.
func (f *Fake) commitVolumes(s *sandbox) error { return s.eachVolume((*mounted).commit) }

// errOpenFiles is the answer to a reload of a volume in use.
var errOpenFiles = errors.New("there are open files preventing the operation")

// reloadVolumes commits, and shows the sandbox what others have committed.
func (f *Fake) reloadVolumes(s *sandbox) error {
	if f.cfg.OpenFiles && s.hasOpenFiles() {
		return errors.Join(f.commitVolumes(s), errOpenFiles)
	}
	return s.eachVolume(func(m *mounted, ctx context.Context) error {
		return errors.Join(m.commit(ctx), m.refresh(ctx))
	})
}

// hasOpenFiles says whether a program in the sandbox has a file of a volume open. Links of
// its files are paths in its own root.
func (s *sandbox) hasOpenFiles() bool {
	inside, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", s.box.first.Process.Pid))
	if err != nil {
		return false // it has ended
	}
	programs, _ := filepath.Glob("/proc/[0-9]*/ns/mnt") // the pattern is well-formed
	for _, p := range programs {
		if ns, err := os.Readlink(p); err != nil || ns != inside {
			continue
		}
		files, _ := filepath.Glob(strings.TrimSuffix(p, "ns/mnt") + "fd/*")
		for _, file := range files {
			target, err := os.Readlink(file)
			if err == nil && slices.ContainsFunc(s.mounts, func(m *mounted) bool { return strings.HasPrefix(target, m.mount.GetMountPath()+"/") }) {
				return true
			}
		}
	}
	return false
}

func (s *sandbox) eachVolume(do func(*mounted, context.Context) error) error {
	var err error
	for _, m := range s.mounts {
		if m.dir == "" {
			continue // it was never mounted
		}
		m.volume.mu.Lock()
		err = errors.Join(err, do(m, context.Background()))
		m.volume.mu.Unlock()
	}
	return err
}

// TaskReloadVolumes commits and reloads the volumes of a sandbox.
func (r *router) TaskReloadVolumes(ctx context.Context, q *pb.TaskReloadVolumesRequest) (*pb.TaskReloadVolumesResponse, error) {
	s, err := r.task(ctx, q.GetTaskId())
	if err != nil {
		return nil, err
	}
	defer r.fake.occupy(s)()
	err = r.fake.reloadVolumes(s)
	if errors.Is(err, errOpenFiles) {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	if err != nil {
		return nil, internal(err)
	}
	return &pb.TaskReloadVolumesResponse{}, nil
}
