package local

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/local/hostimage"
	"golang.org/x/sys/unix"
)

// trees are those that have an overlay each, the root first.
func trees(img *hostimage.Image) []string { return append([]string{"/"}, img.Trees...) }

// ownLayers makes the directories of what a sandbox writes: in a disk of their own if
// there is a limit.
func (e *Engine) ownLayers(ctx context.Context, s *setup, sb *sandbox, img *hostimage.Image) (err error) {
	if sb.limits.DiskBytes == 0 {
		dir := filepath.Join(sb.dir, layerName)
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		return makeLayers(dir, img)
	}
	if s.disk, err = e.disks.Create(ctx, filepath.Join(sb.dir, diskName), sb.limits.DiskBytes); err != nil {
		return err
	}
	sb.loop = &s.disk.Device
	if s.layers, err = s.disk.Mount(); err != nil {
		return err
	}
	// Before its ids are shifted: then there is nobody in it who executord is.
	return makeLayers("/proc/self/fd/"+strconv.Itoa(int(s.layers.Fd())), img)
}

// makeLayers makes in dir, for each tree, an upper and a work directory. The one in which the guest keeps source files is there already:
// the guest would have to copy up what is above it.
func makeLayers(dir string, img *hostimage.Image) error {
	type directory struct {
		path string
		open bool // for everybody in the sandbox, whatever umask executord was started with
	}
	var dirs []directory
	for _, tree := range trees(img) {
		own := filepath.Join(dir, overlayName(tree))
		dirs = append(dirs, directory{own, false}, directory{own + "/work", false}, directory{own + "/upper", true})
	}
	upper := filepath.Join(dir, overlayName("/"), "upper")
	dirs = append(dirs, directory{upper + filepath.Dir(runtimeDirectory), true}, directory{upper + runtimeDirectory, false})
	for _, d := range dirs {
		mode := os.FileMode(0o700)
		if d.open {
			mode = 0o755
		}
		if err := os.Mkdir(d.path, mode); err != nil {
			return err
		}
		if d.open {
			if err := os.Chmod(d.path, mode); err != nil {
				return err
			}
		}
	}
	return nil
}

// addLayers names the layers of each tree: as mounts that shift the ids on disk to
// those of the sandbox, so that all sandboxes share them, or for an ordinary user,
// who cannot make such mounts, as paths.
func (e *Engine) addLayers(s *setup, sb *sandbox, img *hostimage.Image) error {
	var (
		layer func(path string, readOnly bool) (*guestv1.Layer, error)
		own   func() (*guestv1.Layer, error)
	)
	if e.root {
		userns, err := os.Open("/proc/" + strconv.Itoa(sb.process.pid) + "/ns/user")
		if err != nil {
			return fmt.Errorf("open the guest's user namespace: %w", err)
		}
		defer userns.Close()
		layer = func(path string, readOnly bool) (*guestv1.Layer, error) {
			f, err := shiftedMount(path, int(userns.Fd()), readOnly)
			if err != nil {
				return nil, err
			}
			return &guestv1.Layer{Source: &guestv1.Layer_MountFd{MountFd: s.add(f)}}, nil
		}
		if s.disk != nil {
			own = func() (*guestv1.Layer, error) {
				f, err := s.diskMount()
				if err != nil {
					return nil, err
				}
				l := &guestv1.Layer{Source: &guestv1.Layer_MountFd{MountFd: s.add(f)}}
				return l, shiftIDs(f, int(userns.Fd()), false)
			}
		}
	} else {
		layer = func(path string, _ bool) (*guestv1.Layer, error) {
			return &guestv1.Layer{Source: &guestv1.Layer_Path{Path: path}}, nil
		}
	}
	if own == nil {
		own = func() (*guestv1.Layer, error) { return layer(filepath.Join(sb.dir, layerName), false) }
	}
	images, err := e.imageLayers(sb, img)
	if err != nil {
		return err
	}
	for _, tree := range trees(img) {
		lower := tree
		if tree == "/" {
			lower = img.Skeleton
		}
		var below []*guestv1.Layer
		for _, path := range append(images[tree], lower) {
			l, err := layer(path, true)
			if err != nil {
				return err
			}
			below = append(below, l)
		}
		// One mount for each overlay: two of them may not share an upper's mount.
		writable, err := own()
		if err != nil {
			return err
		}
		s.message.Overlays = append(s.message.Overlays, &guestv1.Overlay{
			Target: tree, Lower: below, Writable: writable, WritableName: overlayName(tree),
		})
	}
	return e.addVolumes(s, sb, layer)
}

// overlayName is the directory of a tree's own layer.
func overlayName(tree string) string {
	if tree == "/" {
		return "root"
	}
	return "root" + strings.ReplaceAll(tree, "/", "-")
}

// shiftedMount clones the mount at path with the ids of a user namespace: what
// belongs to 0 on disk belongs to that namespace's root in the mount.
func shiftedMount(path string, userns int, readOnly bool) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("clone the mount of %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	if err := shiftIDs(f, userns, readOnly); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// shiftIDs gives a detached mount the ids of a user namespace.
func shiftIDs(mount *os.File, userns int, readOnly bool) error {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV, Userns_fd: uint64(userns)}
	if readOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(int(mount.Fd()), "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("shift the ids of a mount of %s: %w", mount.Name(), &shiftError{err})
	}
	return nil
}

// diskMount is one more mount of the disk: the one through which the directories were
// made, or a new one.
func (s *setup) diskMount() (*os.File, error) {
	if f := s.layers; f != nil {
		s.layers = nil
		return f, nil
	}
	return s.disk.Mount()
}

// shiftError marks that a file system has no id-mapped mounts.
type shiftError struct{ err error }

func (e *shiftError) Error() string { return e.err.Error() }
func (e *shiftError) Unwrap() error { return e.err }
