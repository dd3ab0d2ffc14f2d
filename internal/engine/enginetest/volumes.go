package enginetest

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// volumeCases are about directories that outlive sandboxes, and what bounds those.
func volumeCases() []testCase {
	return []testCase{
		{"a volume outlives its sandbox and the engine", volumeOutlives},
		{"a volume is shared by sandboxes that live", volumeShared},
		{"a volume is no part of a snapshot", volumeNotInSnapshot},
		{"a deleted volume is gone", volumeDeleted},
		{"a sandbox has several volumes", volumesSeveral},
		{"files of volumes give nobody's rights", volumesWithoutRights},
		{"what no volume can be is refused", volumesRefused},
		{"a sandbox tells how long it lives", deadline},
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

// volume makes a volume of a name of its own, which is deleted with the case.
func (h *house) volume(name string) string {
	h.t.Helper()
	h.count++
	name = "enginetest-" + strconv.FormatInt(time.Now().UnixNano(), 36) + "-" + itoa(h.count) + "-" + name
	if err := h.engine.Volumes().Ensure(h.ctx(), name); err != nil {
		h.t.Fatalf("make volume %s: %v", name, err)
	}
	h.volumes = append(h.volumes, name)
	return name
}

func mounted(name, path string) []engine.VolumeMount {
	return []engine.VolumeMount{{Name: name, Path: path}}
}

// commit makes what was written to the volumes of a sandbox seen by others.
func (b *box) commit() {
	b.h.t.Helper()
	if err := b.CommitVolumes(b.h.ctx()); err != nil {
		b.h.t.Fatalf("commit the volumes of %s: %v", b.ID(), err)
	}
}

func volumeOutlives(t *testing.T, h *house) {
	name := h.volume("outlives")
	a := h.make(engine.Spec{ID: "vol-a", Volumes: mounted(name, "/memory/of/agents")})
	a.script("cd /memory/of/agents; id -u; mkdir d; echo kept > d/file; chmod 640 d/file; ln -s d/file link; ln d/file hard")
	a.commit()
	a.terminate()
	h.reopen()
	if err := h.engine.Volumes().Ensure(h.ctx(), name); err != nil {
		t.Fatal(err)
	}
	b := h.make(engine.Spec{ID: "vol-b", Volumes: mounted(name, "/workspace/elsewhere")})
	if got := b.script("cd /workspace/elsewhere; cat link hard; stat -c '%a %u %g' d/file; rm -r d link; ls"); got != "kept\nkept\n640 0 0\nhard" {
		t.Errorf("%q", got)
	}
	b.answers()
}

func volumeShared(t *testing.T, h *house) {
	name := h.volume("shared")
	a := h.make(engine.Spec{ID: "vol-a", Volumes: mounted(name, "/a")})
	b := h.make(engine.Spec{ID: "vol-b", Volumes: mounted(name, "/b")})
	a.script("echo of a > /a/file; mkdir /a/dir")
	a.commit()
	if got := b.script("cat /b/file; stat -c '%u %g' /b/file; ls /b"); got != "of a\n0 0\ndir\nfile" {
		t.Errorf("the other sees %q", got)
	}
	b.script("echo of b >> /b/file; rmdir /b/dir; echo x > /b/new")
	b.commit()
	if got := a.script("cat /a/file; ls /a"); got != "of a\nof b\nfile\nnew" {
		t.Errorf("the first sees %q", got)
	}
	// The end of one leaves the other's alone.
	b.terminate()
	if got := a.script("ls /a"); got != "file\nnew" {
		t.Errorf("after the other's end: %q", got)
	}
}

func volumeNotInSnapshot(t *testing.T, h *house) {
	name := h.volume("apart")
	a := h.make(engine.Spec{ID: "vol-a", Volumes: mounted(name, "/memory")})
	a.script("echo in the volume > /memory/file; echo beside > /workspace/file")
	a.commit()
	ref := a.snapshot()
	b := h.make(engine.Spec{ID: "vol-b", Image: ref})
	if got := b.script("cat /workspace/file; ls -A /memory"); got != "beside" {
		t.Errorf("in the snapshot: %q", got)
	}
	a.script("echo later >> /memory/file")
	a.commit()
	c := h.make(engine.Spec{ID: "vol-c", Image: ref, Volumes: mounted(name, "/memory")})
	if got := c.script("cat /workspace/file /memory/file"); got != "beside\nin the volume\nlater" {
		t.Errorf("from the snapshot, with the volume: %q", got)
	}
}

func volumeDeleted(t *testing.T, h *house) {
	name := h.volume("deleted")
	a := h.make(engine.Spec{ID: "vol-a", Volumes: mounted(name, "/v")})
	a.script("echo x > /v/file")
	a.commit()
	a.terminate()
	for range 2 {
		if err := h.engine.Volumes().Delete(h.ctx(), name); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.engine.Volumes().Ensure(h.ctx(), name); err != nil {
		t.Fatal(err)
	}
	b := h.make(engine.Spec{ID: "vol-b", Volumes: mounted(name, "/v")})
	if got := b.script("ls -A /v"); got != "" {
		t.Errorf("in a fresh volume of the name: %q", got)
	}
}

func volumesSeveral(t *testing.T, h *house) {
	var mounts []engine.VolumeMount
	for i, path := range []string{"/workspace/a", "/workspace/b/c d", "/root/.cache", "/opt/tool", "/var/lib/x", "/home/y", "/srv/z", "/deep/er/and/deeper"} {
		mounts = append(mounts, engine.VolumeMount{Name: h.volume(itoa(i)), Path: path})
	}
	a := h.make(engine.Spec{ID: "vol-a", Volumes: mounts})
	for i, m := range mounts {
		a.script("echo " + itoa(i) + " > '" + m.Path + "/which'")
	}
	a.commit()
	for i, m := range mounts {
		if got := a.script("cat '" + m.Path + "/which'; ls -A '" + m.Path + "'"); got != itoa(i)+"\nwhich" {
			t.Errorf("%s: %q", m.Path, got)
		}
	}
}

func volumesWithoutRights(t *testing.T, h *house) {
	a := h.make(engine.Spec{ID: "vol-a", Volumes: mounted(h.volume("rights"), "/workspace/a")})
	// A file of a volume can become no device and gives nobody's rights.
	out := a.run("bash", "-c", "findmnt -no OPTIONS /workspace/a || grep ' /workspace/a ' /proc/mounts")
	if options := string(out.stdout); !strings.Contains(options, "nosuid") || !strings.Contains(options, "nodev") {
		t.Errorf("mounted with %q", options)
	}
}

func volumesRefused(t *testing.T, h *house) {
	for _, name := range []string{"", ".", "..", "../x", "a/b", "A", "a b", "-a", strings.Repeat("a", 64)} {
		if err := h.engine.Volumes().Ensure(h.ctx(), name); fault.KindOf(err) != fault.Invalid {
			t.Errorf("make %q: %v", name, err)
		}
	}
	name := h.volume("refused")
	for _, path := range []string{"", "/", "x", "/x/", "/x/../y", "/proc/x", "/sys", "/dev/shm", "/usr/lib"} {
		spec := engine.Spec{ID: "vol", Volumes: mounted(name, path)}
		if err := h.engine.CheckSpec(spec); fault.KindOf(err) != fault.Invalid {
			t.Errorf("check %q: %v", path, err)
		}
		if sb, err := h.engine.Create(h.ctx(), spec); fault.KindOf(err) != fault.Invalid {
			t.Errorf("at %q: %v, %v", path, sb, err)
		}
	}
	missing := engine.Spec{ID: "vol", Volumes: mounted(name+"-missing", "/v")}
	if sb, err := h.engine.Create(h.ctx(), missing); fault.ReasonOf(err) != "VOLUME_NOT_FOUND" {
		t.Errorf("with a volume that is not there: %v, %v", sb, err)
	}
	h.mustBeGone("vol")
}

// A deadline is in the future and stays, for whoever opens the sandbox.
func deadline(t *testing.T, h *house) {
	sb, err := h.engine.Create(h.ctx(), engine.Spec{ID: "deadline", Lifetime: time.Minute, Labels: map[string]string{"case": "deadline"}})
	if err != nil {
		t.Fatal(err)
	}
	first := sb.Deadline()
	if !first.IsZero() && time.Until(first) <= 0 {
		t.Errorf("it ended at %v", first)
	}
	h.reopen()
	if again := h.open("deadline").Deadline(); !again.Truncate(time.Second).Equal(first.Truncate(time.Second)) {
		t.Errorf("until %v, then %v", first, again)
	}
}
