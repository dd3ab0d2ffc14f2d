package rootfs

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"golang.org/x/sys/unix"
)

// targets of volumes and where they are seen, in a root with links that lead out of it.
func targets() map[string]string {
	return map[string]string{
		"/plain": "/plain", "/made/on/the way": "/made/on/the way", "/out/v": "/v", "/up/w": "/w", "/etc/in": "/etc/in",
	}
}

// buildWithVolumes writes a file into each volume from inside, and prints what it found.
func buildWithVolumes(dir string) error {
	setup := setupIn(dir)
	for target := range targets() {
		source := dir + "/volume" + strings.ReplaceAll(target, "/", "-")
		if err := errors.Join(os.Mkdir(source, 0o755), os.WriteFile(source+"/from-outside", []byte(target), 0o644)); err != nil {
			return err
		}
		setup.Volumes = append(setup.Volumes, &guestv1.Volume{Source: path(source), Target: target})
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir+"/b", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	setup.Volumes = append(setup.Volumes, &guestv1.Volume{Source: &guestv1.Layer{Source: &guestv1.Layer_MountFd{MountFd: 0}}, Target: "/by/descriptor"})
	// A link to a place of the system leads below what is mounted there afterwards.
	setup.Volumes = append(setup.Volumes, &guestv1.Volume{Source: path(dir + "/a"), Target: "/process/v"})
	if err := errors.Join(Build(setup, []int{fd}), LetGo()); err != nil {
		return err
	}
	seen := make(map[string]string)
	for target, at := range targets() {
		text, err := os.ReadFile(at + "/from-outside")
		if err == nil {
			err = os.WriteFile(at+"/from-inside", []byte(target), 0o644)
		}
		seen[target] = fmt.Sprint(string(text), err)
	}
	text, err := os.ReadFile("/by/descriptor/below")
	seen["descriptor"] = fmt.Sprint(string(text), err)
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); fields[1] == "/plain" {
			seen["options"] = fields[3]
		}
	}
	_, err = os.Stat("/proc/v")
	seen["covered"] = fmt.Sprint(errors.Is(err, os.ErrNotExist))
	return json.NewEncoder(os.Stdout).Encode(seen)
}

func TestVolumes(t *testing.T) {
	dir := files(t)
	for link, to := range map[string]string{"out": "/", "up": "../../../..", "process": "/proc"} {
		if err := os.Symlink(to, filepath.Join(dir, "skeleton", link)); err != nil {
			t.Fatal(err)
		}
	}
	out, err := run(t, "volumes", dir)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var seen map[string]string
	if err := json.Unmarshal([]byte(out), &seen); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for target := range targets() {
		if seen[target] != target+"<nil>" {
			t.Errorf("%s: %q", target, seen[target])
		}
		text, err := os.ReadFile(dir + "/volume" + strings.ReplaceAll(target, "/", "-") + "/from-inside")
		if err != nil || string(text) != target {
			t.Errorf("%s: from inside came %q, %v", target, text, err)
		}
	}
	if seen["descriptor"] != "lower<nil>" || seen["covered"] != "true" || !strings.Contains(seen["options"], "nosuid") || !strings.Contains(seen["options"], "nodev") {
		t.Errorf("%v", seen)
	}
	for _, name := range []string{"/v", "/w"} {
		if _, err := os.Lstat(name); err == nil {
			t.Errorf("%s was made on the host", name)
		}
	}
}

func TestVolumesRefuse(t *testing.T) {
	for _, role := range []string{"volume on a file", "no volume", "volume at no path"} {
		out, err := run(t, role, files(t))
		if err == nil || !strings.Contains(out, "volume at") {
			t.Errorf("%s: %v, %s", role, err, out)
		}
	}
}
