package client

import (
	"runtime/debug"

	"github.com/harvest-run/executord/internal/version"
)

// modulePath is this module's, by which its version is found in a binary that uses it.
const modulePath = "github.com/harvest-run/executord"

// Version is the version of this module in the running binary, such as "v0.1.0", or
// "devel+4e1f0c2" for a build from a checkout, or "devel" where nothing is known.
func Version() string {
	info, _ := debug.ReadBuildInfo()
	return versionIn(info)
}

func versionIn(info *debug.BuildInfo) string {
	if info == nil {
		return "devel"
	}
	// In somebody else's binary the stamp of our own releases is not there.
	for _, module := range info.Deps {
		if module.Path == modulePath && module.Version != "" {
			return module.Version
		}
	}
	if info.Main.Path == modulePath {
		return version.String()
	}
	return "devel"
}
