package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"golang.org/x/sys/unix"
)

// volumeStore keeps volumes: directories, owned on disk by a sandbox's root and seen by
// every sandbox that has them with its own ids.
type volumeStore struct {
	dir string

	mu   sync.Mutex
	uses map[string][]string // volumes by the sandbox that has them
}

// deletedPrefix begins the names of volumes that are being removed; no volume's own
// begins so.
const deletedPrefix = ".deleted-"

// openVolumeStore finds what is there, and removes what was being removed.
func openVolumeStore(dir, sandboxes string) (*volumeStore, error) {
	v := &volumeStore{dir: filepath.Join(dir, "volumes"), uses: make(map[string][]string)}
	if err := os.MkdirAll(v.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of volumes: %w", err)
	}
	entries, err := os.ReadDir(v.dir)
	if err != nil {
		return nil, err
	}
	for _, d := range entries {
		if strings.HasPrefix(d.Name(), deletedPrefix) {
			if err := removeTree(filepath.Join(v.dir, d.Name())); err != nil {
				return nil, fmt.Errorf("remove what is left of a volume: %w", err)
			}
		}
	}
	if entries, err = os.ReadDir(sandboxes); err != nil {
		return nil, err
	}
	for _, d := range entries {
		if r, err := readRecord(filepath.Join(sandboxes, d.Name(), recordName)); err == nil && len(r.Volumes) > 0 {
			v.uses[d.Name()] = r.Volumes
		}
	}
	return v, nil
}

func (v *volumeStore) path(name string) string { return filepath.Join(v.dir, name) }

func checkVolumeName(name string) error {
	if err := (engine.VolumeMount{Name: name, Path: "/volume"}).Check(); err != nil {
		return fault.New(fault.Invalid, "VOLUMES", "%v", err)
	}
	return nil
}

// Ensure makes the directory.
func (v *volumeStore) Ensure(_ context.Context, name string) error {
	if err := checkVolumeName(name); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	err := os.Mkdir(v.path(name), 0o755)
	switch {
	case errors.Is(err, fs.ErrExist):
		return nil
	case err == nil:
		err = os.Chmod(v.path(name), 0o755) // whatever umask executord was started with
	}
	if err != nil {
		return fmt.Errorf("make volume %s: %w", name, err)
	}
	return nil
}

// Delete removes the directory, unless a sandbox has it.
func (v *volumeStore) Delete(_ context.Context, name string) error {
	if err := checkVolumeName(name); err != nil {
		return err
	}
	aside, err := v.setAside(name)
	if err != nil || aside == "" {
		return err
	}
	if err := removeTree(aside); err != nil {
		return fmt.Errorf("delete volume %s: %w", name, err)
	}
	return nil
}

// setAside takes a volume its name and returns where it is; "" if there is none.
func (v *volumeStore) setAside(name string) (string, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for sandbox, names := range v.uses {
		for _, used := range names {
			if used == name {
				return "", fault.New(fault.FailedPrecondition, "VOLUME_IN_USE", "sandbox %s has volume %q: end it first", sandbox, name)
			}
		}
	}
	aside, err := os.MkdirTemp(v.dir, deletedPrefix)
	if err != nil {
		return "", err
	}
	err = os.Rename(v.path(name), filepath.Join(aside, name))
	if errors.Is(err, fs.ErrNotExist) {
		return "", os.Remove(aside)
	}
	if err != nil {
		return "", errors.Join(fmt.Errorf("delete volume %s: %w", name, err), os.Remove(aside))
	}
	return aside, nil
}

// missing names the first volume that is not there; "" if all are.
func (v *volumeStore) missing(mounts []engine.VolumeMount) (string, error) {
	for _, m := range mounts {
		if _, err := os.Lstat(v.path(m.Name)); errors.Is(err, fs.ErrNotExist) {
			return m.Name, nil
		} else if err != nil {
			return "", err
		}
	}
	return "", nil
}

// check is a fault if a volume is not there.
func (v *volumeStore) check(mounts []engine.VolumeMount) error {
	name, err := v.missing(mounts)
	if err == nil && name != "" {
		err = fault.New(fault.NotFound, "VOLUME_NOT_FOUND", "there is no volume %q", name)
	}
	return err
}

// hold keeps volumes for a sandbox until release.
func (v *volumeStore) hold(sandbox string, mounts []engine.VolumeMount) ([]string, error) {
	if len(mounts) == 0 {
		return nil, nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.check(mounts); err != nil {
		return nil, err
	}
	var names []string
	for _, m := range mounts {
		names = append(names, m.Name)
	}
	v.uses[sandbox] = names
	return names, nil
}

func (v *volumeStore) release(sandbox string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.uses, sandbox)
}

// sync writes to disk what was written to volumes. All are on one file system.
func (v *volumeStore) sync() error {
	dir, err := os.Open(v.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Syncfs(int(dir.Fd()))
}
