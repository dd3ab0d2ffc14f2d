// Package guestbuild compiles the executor-guest of this source tree, for tests that
// start real sandboxes: they must not depend on which guest `make build` happened to
// embed. It is not linked into any program of this module.
package guestbuild

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// program is the guest's import path.
const program = "github.com/harvest-run/executord/cmd/executor-guest"

// Build compiles the guest, statically and as small as a release has it, into the
// file executor-guest in dir, and returns its bytes. The working directory must lie
// in this module, as that of every test does.
func Build(dir string) ([]byte, error) {
	file := filepath.Join(dir, "executor-guest")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", file, program)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the guest: %w\n%s", err, out)
	}
	return os.ReadFile(file)
}
