package engine

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
)

// Check returns an error if a volume cannot be called so.
func (m VolumeMount) Check() error {
	if !volumeName().MatchString(m.Name) {
		return fmt.Errorf("volume %q: a name has 1 to 63 characters of a-z, 0-9, \".\", \"_\" and \"-\", the first of a-z and 0-9", m.Name)
	}
	taken := func(dir string) bool { return m.Path == dir || strings.HasPrefix(m.Path, dir+"/") }
	switch {
	case !path.IsAbs(m.Path) || path.Clean(m.Path) != m.Path || m.Path == "/" || strings.ContainsRune(m.Path, 0):
		return fmt.Errorf("volume %q: path %q must be absolute and clean, and not /", m.Name, m.Path)
	case len(m.Path) > maxVolumePath:
		return fmt.Errorf("volume %q: a path of %d bytes; at most %d", m.Name, len(m.Path), maxVolumePath)
	case slices.ContainsFunc(withoutVolumes(), taken):
		return fmt.Errorf("volume %q: path %q must not be or lie below %s", m.Name, m.Path, strings.Join(withoutVolumes(), ", "))
	case m.Path == "/run":
		return fmt.Errorf("volume %q: /run has what the guest keeps", m.Name)
	}
	return nil
}

// maxVolumePath bounds the path of a volume, in bytes.
const maxVolumePath = 1024

// withoutVolumes are the directories where no volume can be: of the system, or of the
// guest.
func withoutVolumes() []string {
	return []string{"/proc", "/sys", "/dev", "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/run/executor"}
}

func volumeName() *regexp.Regexp { return regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`) }

// CheckVolumes returns an error if a sandbox cannot have these volumes together.
func CheckVolumes(mounts []VolumeMount) error {
	if len(mounts) > MaxVolumes {
		return fmt.Errorf("%d volumes; a sandbox has at most %d", len(mounts), MaxVolumes)
	}
	for i, m := range mounts {
		if err := m.Check(); err != nil {
			return err
		}
		for _, other := range mounts[:i] {
			if m.Name == other.Name {
				return fmt.Errorf("volume %q: twice in one sandbox", m.Name)
			}
			if m.Path == other.Path || strings.HasPrefix(m.Path, other.Path+"/") || strings.HasPrefix(other.Path, m.Path+"/") {
				return fmt.Errorf("volumes %q and %q: %q and %q lie in one another", other.Name, m.Name, other.Path, m.Path)
			}
		}
	}
	return nil
}
