// Package version says which executord this is. Releases stamp it in at link time
// (-ldflags "-X github.com/harvest-run/executord/internal/version.version=v0.1.0");
// other builds are named after what the go command recorded. It imports only the
// standard library.
package version

import (
	"runtime"
	"runtime/debug"
)

// version is set by the linker of a release and by nothing else.
var version string

// String is the version, such as "v0.1.0", "devel+4e1f0c2" or "devel+4e1f0c2.dirty".
func String() string {
	info, _ := debug.ReadBuildInfo()
	return describe(version, info)
}

// Go is the version of Go that built this program, such as "go1.26.8".
func Go() string { return runtime.Version() }

// describe chooses the best name that there is.
func describe(stamp string, info *debug.BuildInfo) string {
	if stamp != "" {
		return stamp
	}
	name := "devel"
	if info == nil {
		return name
	}
	settings := make(map[string]string, len(info.Settings))
	for _, setting := range info.Settings {
		settings[setting.Key] = setting.Value
	}
	revision := settings["vcs.revision"]
	if revision == "" {
		// Not built from a checkout: go install module@version knows the version.
		if v := info.Main.Version; v != "" && v != "(devel)" {
			return v
		}
		return name
	}
	name += "+" + revision[:min(7, len(revision))]
	if settings["vcs.modified"] == "true" {
		name += ".dirty"
	}
	return name
}
