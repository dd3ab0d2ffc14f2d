// Package engines is the choice that an executord has between engines. A record names
// the engine that its sandbox is on, and everything that is done with that sandbox, also
// after a restart, goes there.
package engines

import (
	"slices"
	"strings"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// Set are the engines of an executord, the default one first. It has at least one, and
// no two of the same name.
type Set []engine.Engine

// Default is the engine of what names none.
func (s Set) Default() engine.Engine { return s[0] }

// Names are those of the engines, the default one's first.
func (s Set) Names() []string {
	names := make([]string, len(s))
	for i, e := range s {
		names[i] = e.Name()
	}
	return names
}

// Get returns the engine of a name; "" is the default. A fault FailedPrecondition
// (ENGINE_NOT_AVAILABLE), with the names that there are, if there is none.
func (s Set) Get(name string) (engine.Engine, error) {
	if name == "" {
		return s.Default(), nil
	}
	if i := slices.IndexFunc(s, func(e engine.Engine) bool { return e.Name() == name }); i >= 0 {
		return s[i], nil
	}
	names := strings.Join(s.Names(), ", ")
	return nil, fault.New(fault.FailedPrecondition, "ENGINE_NOT_AVAILABLE", "this executord has no engine %q; it has %s", name, names).
		With("engine", name).With("available", names)
}

// IsDefault says whether a name means the default engine.
func (s Set) IsDefault(name string) bool { return name == "" || name == s.Default().Name() }
