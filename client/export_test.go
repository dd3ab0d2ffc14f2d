package client

import "runtime/debug"

// VersionIn lets the tests try other binaries than this one.
func VersionIn(info *debug.BuildInfo) string { return versionIn(info) }
