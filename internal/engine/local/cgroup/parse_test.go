package cgroup

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Lines of /proc/self/mountinfo, as the named systems have them.
const (
	legacyMounts = `24 0 254:0 / / rw,relatime - ext4 /dev/vda1 rw
30 24 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd
32 30 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct
33 30 0:31 / /sys/fs/cgroup/memory rw,nosuid shared:16 - cgroup cgroup rw,memory
34 30 0:32 / /sys/fs/cgroup/pids rw,nosuid shared:17 - cgroup cgroup rw,pids
35 30 0:33 / /sys/fs/cgroup/cpuset rw,nosuid shared:18 - cgroup cgroup rw,cpuset
`
	unifiedMounts = `24 0 254:0 / / rw,relatime - ext4 /dev/vda1 rw
30 24 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
`
	hybridMounts = legacyMounts + `36 30 0:38 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
`
	// A container that shares its host's cgroup namespace sees the host's paths, and of
	// each hierarchy only its own part.
	dockerV1Mounts = `600 500 0:50 / / rw - overlay overlay rw,lowerdir=/a:/b
610 600 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
611 610 0:31 /docker/0123abcd /sys/fs/cgroup/memory ro,nosuid master:16 - cgroup cgroup rw,memory
612 610 0:30 /docker/0123abcd /sys/fs/cgroup/cpu,cpuacct ro,nosuid master:15 - cgroup cgroup rw,cpu,cpuacct
613 610 0:32 /docker/0123abcd /sys/fs/cgroup/pids ro,nosuid master:17 - cgroup cgroup rw,pids
`
	dockerV2Mounts = `600 500 0:50 / / rw - overlay overlay rw,lowerdir=/a:/b
610 600 0:26 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw
`
)

func TestParse(t *testing.T) {
	for name, c := range map[string]struct {
		own, mounts, parent string
		v1                  map[string]string
		v2                  []string
	}{
		"version 1, a service": {
			own:    "12:pids:/system.slice/executord.service\n5:memory:/system.slice/executord.service\n4:cpu,cpuacct:/system.slice\n1:name=systemd:/system.slice/executord.service\n",
			mounts: legacyMounts,
			v1: map[string]string{
				"memory": "/sys/fs/cgroup/memory/system.slice/executord.service",
				"pids":   "/sys/fs/cgroup/pids/system.slice/executord.service",
				"cpu":    "/sys/fs/cgroup/cpu,cpuacct/system.slice",
			},
		},
		"version 2, a service": {
			own: "0::/system.slice/executord.service\n", mounts: unifiedMounts,
			// The root group too: the own one has processes.
			v2: []string{"/sys/fs/cgroup/system.slice/executord.service", "/sys/fs/cgroup"},
		},
		"version 2, in the root group": {
			own: "0::/\n", mounts: unifiedMounts, v2: []string{"/sys/fs/cgroup"},
		},
		"version 2, a user's session": {
			own: "0::/user.slice/user-1000.slice/session-3.scope\n", mounts: unifiedMounts,
			v2: []string{"/sys/fs/cgroup/user.slice/user-1000.slice/session-3.scope", "/sys/fs/cgroup"},
		},
		"hybrid": {
			own:    "12:pids:/a\n5:memory:/b\n4:cpu,cpuacct:/\n0::/c\n",
			mounts: hybridMounts,
			v1:     map[string]string{"memory": "/sys/fs/cgroup/memory/b", "pids": "/sys/fs/cgroup/pids/a", "cpu": "/sys/fs/cgroup/cpu,cpuacct"},
			v2:     []string{"/sys/fs/cgroup/unified/c", "/sys/fs/cgroup/unified"},
		},
		"hybrid, one controller unmounted": {
			own:    "12:pids:/\n5:memory:/\n4:cpu,cpuacct:/\n0::/\n",
			mounts: strings.Replace(hybridMounts, "cgroup cgroup rw,pids", "tmpfs tmpfs rw", 1),
			v1:     map[string]string{"memory": "/sys/fs/cgroup/memory", "cpu": "/sys/fs/cgroup/cpu,cpuacct"},
			v2:     []string{"/sys/fs/cgroup/unified"},
		},
		"a container on version 1": {
			own:    "12:pids:/docker/0123abcd\n5:memory:/docker/0123abcd/nested\n4:cpu,cpuacct:/docker/0123abcd\n",
			mounts: dockerV1Mounts,
			v1: map[string]string{
				"memory": "/sys/fs/cgroup/memory/nested", "pids": "/sys/fs/cgroup/pids", "cpu": "/sys/fs/cgroup/cpu,cpuacct",
			},
		},
		"a container on version 2 with a namespace": {
			own: "0::/\n", mounts: dockerV2Mounts, v2: []string{"/sys/fs/cgroup"},
		},
		"outside of the namespace's root": {
			own: "5:memory:/../other\n0::/../../init.scope\n", mounts: hybridMounts,
		},
		"a mount of another part of the tree": {
			own:    "5:memory:/mine\n",
			mounts: "611 610 0:31 /docker/other /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
		},
		"two mounts, the second is the one": {
			own: "5:memory:/mine\n",
			mounts: "611 610 0:31 /docker/other /mnt/part rw - cgroup cgroup rw,memory\n" +
				"612 610 0:31 / /mnt/whole rw - cgroup cgroup rw,memory\n613 610 0:31 / /mnt/again rw - cgroup cgroup rw,memory\n",
			v1: map[string]string{"memory": "/mnt/whole/mine"},
		},
		"a parent is named": {
			own: "12:pids:/a\n5:memory:/b\n4:cpu,cpuacct:/\n0::/c\n", mounts: hybridMounts, parent: "/executord.slice",
			v1: map[string]string{
				"memory": "/sys/fs/cgroup/memory/executord.slice", "pids": "/sys/fs/cgroup/pids/executord.slice",
				"cpu": "/sys/fs/cgroup/cpu,cpuacct/executord.slice",
			},
			v2: []string{"/sys/fs/cgroup/unified/executord.slice"},
		},
		"a path with a space and a colon": {
			own:    "5:memory:/a:b c\n",
			mounts: `611 610 0:31 / /my\040groups rw - cgroup cgroup rw,memory` + "\n",
			v1:     map[string]string{"memory": "/my groups/a:b c"},
		},
		"nothing":             {},
		"lines of no meaning": {own: "x\n::\n1:memory\n", mounts: "\n-\n1 2 3\n1 2 0:1 / /x rw - cgroup\n1 2 0:1 / /x rw cgroup cgroup rw,memory\n"},
	} {
		t.Run(name, func(t *testing.T) {
			got := parse(c.own, c.mounts, c.parent)
			if c.v1 == nil {
				c.v1 = map[string]string{}
			}
			if diff := cmp.Diff(c.v1, got.v1); diff != "" {
				t.Errorf("version 1 (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(c.v2, got.v2); diff != "" {
				t.Errorf("version 2 (-want +got):\n%s", diff)
			}
		})
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "/plain": "/plain", `/a\040b`: "/a b", `/tab\011x`: "/tab\tx", `/back\134slash`: `/back\slash`, `/nl\012`: "/nl\n",
		`\`: `\`, `\04`: `\04`, `\999`: `\999`, `\400`: `\400`, `x\040`: "x ",
	} {
		if got := unescape(in); got != want {
			t.Errorf("unescape(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("0::/a\n4:cpu,cpuacct:/b\n", hybridMounts, "")
	f.Add("5:memory:/../x\n", dockerV1Mounts, "/p")
	f.Add("5:memory:\n", `1 2 3 \04 \ - cgroup cgroup rw,memory`, "..")
	f.Fuzz(func(t *testing.T, own, mounts, parent string) {
		l := parse(own, mounts, parent)
		for c, dir := range l.v1 {
			if dir == "" || !strings.Contains(mounts, c) {
				t.Errorf("%s is at %q", c, dir)
			}
		}
	})
}
