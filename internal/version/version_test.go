package version

import (
	"runtime/debug"
	"strings"
	"testing"
)

func TestDescribe(t *testing.T) {
	checkout := func(modified string) *debug.BuildInfo {
		return &debug.BuildInfo{
			Main: debug.Module{Version: "v0.0.0-20261123000000-4e1f0c2aaaaa"},
			Settings: []debug.BuildSetting{
				{Key: "vcs.revision", Value: "4e1f0c2aaaaabbbb"}, {Key: "vcs.modified", Value: modified},
			},
		}
	}
	for name, test := range map[string]struct {
		stamp string
		info  *debug.BuildInfo
		want  string
	}{
		"release":        {"v1.2.3", checkout("true"), "v1.2.3"},
		"checkout":       {"", checkout("false"), "devel+4e1f0c2"},
		"dirty checkout": {"", checkout("true"), "devel+4e1f0c2.dirty"},
		"short revision": {"", &debug.BuildInfo{Settings: []debug.BuildSetting{{Key: "vcs.revision", Value: "abc"}}}, "devel+abc"},
		"go install":     {"", &debug.BuildInfo{Main: debug.Module{Version: "v1.0.0"}}, "v1.0.0"},
		"go run":         {"", &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, "devel"},
		"nothing known":  {"", nil, "devel"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := describe(test.stamp, test.info); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

func TestThisBuild(t *testing.T) {
	if String() == "" || !strings.HasPrefix(Go(), "go") && !strings.HasPrefix(Go(), "devel") {
		t.Errorf("%q, %q", String(), Go())
	}
}
