package local

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/hostimage"
	"golang.org/x/sys/unix"
)

func TestSandboxesAreSpread(t *testing.T) {
	e := newEngine(t)
	f, err := os.Open(e.sandboxDir(""))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var kind unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &kind); err != nil {
		t.Fatal(err)
	}
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if kind.Type == unix.EXT4_SUPER_MAGIC && (err != nil || flags&0x20000 == 0) {
		t.Errorf("flags %#x, %v", flags, err)
	}
}

func TestMakeLayers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layer")
	img := &hostimage.Image{Trees: []string{"/opt/tools", "/usr"}}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	old := unix.Umask(0o077)
	err := makeLayers(dir, img)
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]fs.FileMode{
		"root/upper": 0o755, "root/upper/run": 0o755, "root/upper/run/executor": 0o700, "root/work": 0o700,
		"root-usr/upper": 0o755, "root-usr/work": 0o700, "root-opt-tools/upper": 0o755, "root-opt-tools/work": 0o700,
	} {
		if info, err := os.Stat(filepath.Join(dir, path)); err != nil || info.Mode() != want|fs.ModeDir {
			t.Errorf("%s: %v, %v, want %v", path, info, err, want)
		}
	}
	if err := makeLayers(dir, img); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over those of another: %v", err)
	}
}

// The directory for source files looks as if the guest had made it.
func TestRuntimeDirectory(t *testing.T) {
	sb := sandboxFor(t, newEngine(t), engine.Spec{ID: "runtime"})
	out, err := runPython(t.Context(), sb, "look", `import os
for d in "/run", "/run/executor": s = os.stat(d); print(oct(s.st_mode), s.st_uid, s.st_gid)
print(os.listdir("/run"))`)
	if want := "0o40755 0 0\n0o40700 0 0\n['executor']\n"; err != nil || out.stdout != want {
		t.Errorf("%v, %v, want %q", out, err, want)
	}
}

// A record that is written again is whole: it is one file, written in place.
func TestRecordIsWrittenInPlace(t *testing.T) {
	e := newEngine(t)
	sb := sandboxFor(t, e, engine.Spec{ID: "record", Limits: engine.Limits{}}).(*sandbox)
	r, err := readRecord(filepath.Join(sb.dir, recordName))
	if err != nil || r.PID != sb.process.pid || r.Boot != e.boot || r.StartTicks == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	entries, err := os.ReadDir(sb.dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("%v, %v, want the layers, the record and the socket", entries, err)
	}
}
