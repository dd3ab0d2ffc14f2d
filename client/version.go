package client

import "runtime/debug"

// modulePath is this module's, by which its version is found in a binary that uses it.
const modulePath = "github.com/harvest-run/executord"

// Version is the version of this module in the running binary, such as "v0.1.0", or
// "devel+4e1f0c2" for a build from a checkout, or "devel" where nothing is known.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "devel"
	}
	return versionIn(info)
}

func versionIn(info *debug.BuildInfo) string {
	for _, module := range info.Deps {
		if module.Path == modulePath && module.Version != "" {
			return module.Version
		}
	}
	if info.Main.Path != modulePath {
		return "devel"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	for _, setting := range info.Settings {
		if setting.Key == "vcs.revision" && len(setting.Value) >= 7 {
			return "devel+" + setting.Value[:7]
		}
	}
	return "devel"
}
