package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestfiles"
)

// defaultStepTime bounds a step that says nothing else.
const defaultStepTime = 15 * time.Minute

// Recipe says how an image is made.
type Recipe struct {
	// Name of the image: 1 to 63 characters of a-z, 0-9, ".", "_" and "-", the first a
	// letter or digit.
	Name string
	// From is what its sandbox starts from; "" is the engine's base.
	From engine.ImageRef
	// Network is what its steps reach.
	Network egress.Policy
	// Limits of its sandbox.
	Limits engine.Limits
	// Steps are done in this order; the first that fails ends the build.
	Steps []Step
}

// Step is one piece of a Recipe: files, then a program.
type Step struct {
	// Name tells people what it does.
	Name string
	// Files are written first, over what is there.
	Files []guestfiles.File
	// Args are a program and its arguments, run as root.
	Args []string
	// Script, instead of Args, is run by /bin/bash, which stops at what fails.
	Script string
	// Env are its variables, NAME=value.
	Env []string
	// Dir is where it runs; "" is "/".
	Dir string
	// Timeout is 15 minutes if it is 0.
	Timeout time.Duration
	// Key stands for what the step takes from elsewhere and cannot be seen in the rest: a
	// commit, the version of what is mounted. Another Key is another image.
	Key string
}

// Hash is equal for recipes that make the same. What they fetch may be newer all the
// same.
func (r Recipe) Hash() string {
	h := sha256.New()
	// It has no type that JSON cannot encode, and a hash never returns an error.
	_ = json.NewEncoder(h).Encode(r)
	return hex.EncodeToString(h.Sum(nil))
}

// check says what is wrong with a Recipe: they are made by executord itself.
func (r Recipe) check() error {
	if !regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`).MatchString(r.Name) {
		return fmt.Errorf("image name %q is not 1 to 63 characters of a-z, 0-9, \".\", \"_\" and \"-\"", r.Name)
	}
	if len(r.Steps) == 0 {
		return fmt.Errorf("recipe %s has no step", r.Name)
	}
	if err := r.Network.Validate(); err != nil {
		return fmt.Errorf("recipe %s: %w", r.Name, err)
	}
	for i, s := range r.Steps {
		if err := s.check(); err != nil {
			return fmt.Errorf("step %d (%s) of recipe %s %w", i+1, s.Name, r.Name, err)
		}
	}
	return nil
}

func (s Step) check() error {
	switch {
	case s.Name == "":
		return fmt.Errorf("has no name")
	case len(s.Args) > 0 && s.Script != "":
		return fmt.Errorf("has both a program and a script")
	case len(s.Args) == 0 && s.Script == "" && len(s.Files) == 0:
		return fmt.Errorf("does nothing")
	}
	for _, f := range s.Files {
		if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" || strings.ContainsAny(f.Path, "\n\x00") {
			return fmt.Errorf("has a file at %q, which is not an absolute clean path", f.Path)
		}
	}
	return nil
}

// args are the program that the step runs; none if it only has files.
func (s Step) args() []string {
	if s.Script == "" {
		return s.Args
	}
	// By standard input a script that reads would read itself.
	return []string{"/bin/bash", "-eu", "-o", "pipefail", "-c", s.Script}
}

func (s Step) timeout() time.Duration {
	if s.Timeout == 0 {
		return defaultStepTime
	}
	return s.Timeout
}
