package local

import (
	"fmt"
	"os"
	"path/filepath"
)

// shareNames puts into the upper layer of a sandbox's root how the host resolves names.
// Only a sandbox with the host's network sees that: to the others it would tell of a
// network that they do not have.
func shareNames(upper string) error {
	etc := filepath.Join(upper, "etc")
	if err := os.MkdirAll(etc, 0o755); err != nil {
		return err
	}
	// Whatever umask executord was started with.
	for _, dir := range []string{upper, etc} {
		if err := os.Chmod(dir, 0o755); err != nil {
			return err
		}
	}
	for _, name := range []string{"resolv.conf", "hosts"} {
		text, err := os.ReadFile(filepath.Join("/etc", name))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read how the host resolves names: %w", err)
		}
		path := filepath.Join(etc, name)
		if err := os.WriteFile(path, text, 0o644); err != nil {
			return err
		}
		if err := os.Chmod(path, 0o644); err != nil {
			return err
		}
	}
	return nil
}
