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
	if !path.IsAbs(m.Path) || path.Clean(m.Path) != m.Path || m.Path == "/" || slices.ContainsFunc([]string{"/proc", "/sys", "/dev", "/usr"}, taken) {
		return fmt.Errorf("volume %q: path %q must be absolute and clean, and not / or below /proc, /sys, /dev or /usr", m.Name, m.Path)
	}
	return nil
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
			if m.Path == other.Path || strings.HasPrefix(m.Path, other.Path+"/") || strings.HasPrefix(other.Path, m.Path+"/") {
				return fmt.Errorf("volumes %q and %q: %q and %q lie in one another", other.Name, m.Name, other.Path, m.Path)
			}
		}
	}
	return nil
}
