package engine_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
)

func TestVolumeName(t *testing.T) {
	for name, good := range map[string]bool{
		"a": true, "0": true, "a-b_c.d": true, strings.Repeat("a", 63): true,
		"": false, ".": false, "..": false, ".a": false, "-a": false, "_a": false, "A": false, "aB": false,
		"a/b": false, "a b": false, "ä": false, "a\x00": false, strings.Repeat("a", 64): false,
	} {
		if err := (engine.VolumeMount{Name: name, Path: "/x"}).Check(); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestCheckVolumes(t *testing.T) {
	at := func(paths ...string) (mounts []engine.VolumeMount) {
		for i, p := range paths {
			mounts = append(mounts, engine.VolumeMount{Name: fmt.Sprintf("v%d", i), Path: p})
		}
		return mounts
	}
	many := func(n int) (paths []string) {
		for i := range n {
			paths = append(paths, fmt.Sprintf("/m%d", i))
		}
		return paths
	}
	for _, c := range []struct {
		mounts []engine.VolumeMount
		good   bool
	}{
		{nil, true},
		{at("/memory"), true},
		{at("/root/.cache/pip", "/root/.cache/npm"), true},
		{at("/devices"), true},
		{at("/run/other"), true},
		{at("/a b/ü"), true},
		{at(many(engine.MaxVolumes)...), true},
		{at(many(engine.MaxVolumes + 1)...), false},
		{at(""), false},
		{at("/"), false},
		{at("memory"), false},
		{at("/memory/"), false},
		{at("/a/../b"), false},
		{at("/a//b"), false},
		{at("/a\x00"), false},
		{at("/" + strings.Repeat("a", 1024)), false},
		{at("/proc"), false},
		{at("/proc/x"), false},
		{at("/sys/fs"), false},
		{at("/dev/shm"), false},
		{at("/usr/local"), false},
		{at("/bin"), false},
		{at("/run/executor"), false},
		{at("/run/executor/x"), false},
		{at("/run"), false}, // would hide what the guest keeps there
		{at("/a", "/a"), false},
		{at("/a", "/a/b"), false},
		{at("/a/b", "/a"), false},
		{at("/a", "/ab"), true},
		{[]engine.VolumeMount{{Name: "v", Path: "/a"}, {Name: "v", Path: "/b"}}, false},
		{[]engine.VolumeMount{{Name: "V", Path: "/a"}}, false},
	} {
		if err := engine.CheckVolumes(c.mounts); (err == nil) != c.good {
			t.Errorf("%v: %v", c.mounts, err)
		}
	}
}
