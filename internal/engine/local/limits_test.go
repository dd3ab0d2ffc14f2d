package local

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local/disk"
	"github.com/harvest-run/executord/internal/fault"
	"golang.org/x/sys/unix"
)

// loopOf is the loop device of a file that the kernel lists; "" if it has none.
func loopOf(path string) string {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		if text, _ := os.ReadFile(f); strings.HasPrefix(string(text), path) {
			return strings.Split(f, "/")[3]
		}
	}
	return ""
}

// leftLoops looks for loop devices of files below the tests' directory.
func leftLoops(temp string) error {
	if l := loopOf(temp + "/"); l != "" {
		return fmt.Errorf("loop device %s is left", l)
	}
	return nil
}

// limitedConfig is testConfig with a limit of disk for all.
func limitedConfig(t *testing.T, bytes int64) Config {
	t.Helper()
	needRoot(t)
	cfg := testConfig(t)
	cfg.Defaults.DiskBytes = bytes
	return cfg
}

// A disk is no mount of the host's, and takes of the host what is in it, up to its size.
func TestDiskOfTheHost(t *testing.T) {
	const size = 128 << 20
	e := engineOver(t, limitedConfig(t, size))
	sb := sandboxFor(t, e, engine.Spec{ID: "disk"}).(*sandbox)
	image := filepath.Join(sb.dir, diskName)
	taken := func() int64 {
		var st unix.Stat_t
		if err := unix.Stat(image, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	empty := taken()
	loop := loopOf(image)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if loop == "" || err != nil || strings.Contains(string(mounts), "/dev/"+loop+" ") {
		t.Errorf("loop device %q, mounts:\n%s", loop, mounts)
	}
	out, err := runPython(t.Context(), sb, "fill", `import os
for d in "/workspace", "/usr/share", "/etc":
    os.makedirs(d, exist_ok=True)
    try:
        with open(d + "/fill", "wb", 0) as f:
            while True: f.write(bytes(1 << 20))
    except OSError as e: print(e.errno)
    os.sync()`)
	if want := "28\n28\n28\n"; err != nil || out.stdout != want {
		t.Errorf("%v, %v, want %q", out, err, want)
	}
	if full := taken(); empty > 1<<20 || full > size || full < size/2 {
		t.Errorf("empty it takes %d bytes of the host, full %d of %d", empty, full, size)
	}
	entries, err := os.ReadDir(sb.dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("%v, %v, want the disk, the record and the socket", entries, err)
	}
	if _, err := sb.Terminate(t.Context()); err != nil || loopOf(image) != "" {
		t.Errorf("after the end: %v, loop device %q", err, loopOf(image))
	}
}

// Whoever dies, and when, the kernel lets the loop devices go.
func TestDiskAfterCrash(t *testing.T) {
	cfg := limitedConfig(t, 64<<20)
	for name, spoil := range map[string]func(t *testing.T, guest int, dir string){
		"the guest dies": func(t *testing.T, guest int, _ string) {
			if err := syscall.Kill(guest, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			reap(t, guest)
		},
		"the record is damaged": func(t *testing.T, guest int, dir string) {
			if err := os.WriteFile(filepath.Join(dir, recordName), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"the host was started again, and another has the device": func(t *testing.T, guest int, dir string) {
			if err := syscall.Kill(guest, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			reap(t, guest)
			await(t, "the device is free", func() bool { return loopOf(dir) == "" })
			m, err := disk.NewMaker(filepath.Join(t.TempDir(), "templates"))
			if err != nil {
				t.Fatal(err)
			}
			other, err := m.Create(t.Context(), filepath.Join(t.TempDir(), "other"), 16<<20)
			if err != nil {
				t.Fatal(err)
			}
			mount, err := other.Mount()
			if err := errors.Join(err, other.Close()); err != nil {
				t.Fatal(err)
			}
			rewrite(t, dir, func(r *record) { r.Loop = &other.Device })
			t.Cleanup(func() {
				if err := os.WriteFile(fmt.Sprintf("/proc/self/fd/%d/x", mount.Fd()), []byte("x"), 0o600); err != nil {
					t.Errorf("the other's disk was touched: %v", err)
				}
				mount.Close()
				await(t, "the other's device is free", func() bool { return loopOf(mount.Name()) == "" })
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			guest, dir := abandon(t, cfg, "left")
			if loopOf(dir) == "" {
				t.Fatal("the sandbox has no loop device")
			}
			spoil(t, guest, dir)
			e := engineOver(t, cfg)
			mustBeGone(t, e, "left")
			if l := loopOf(dir); l != "" {
				t.Errorf("%s is left", l)
			}
		})
	}
}

// What an executord leaves that dies before the guest has the disk.
func TestDiskHalfMade(t *testing.T) {
	e := engineOver(t, limitedConfig(t, 64<<20))
	writeRecord(t, e, `{"limits":{"disk_bytes":67108864}}`)
	image := filepath.Join(e.sandboxDir("half"), diskName)
	d, err := e.disks.Create(t.Context(), image, 64<<20)
	if err != nil {
		t.Fatal(err)
	}
	mount, err := d.Mount()
	if err := errors.Join(err, d.Close(), mount.Close()); err != nil { // as its end does
		t.Fatal(err)
	}
	mustBeGone(t, e, "half")
	if l := loopOf(image); l != "" {
		t.Errorf("%s is left", l)
	}
}

// A create that fails behind the disk leaves nothing.
func TestCreateWithDiskFails(t *testing.T) {
	e := engineOver(t, limitedConfig(t, 64<<20))
	filter := e.filter
	e.filter = []byte("no filter")
	if _, err := e.Create(t.Context(), engine.Spec{ID: "fails"}); err == nil {
		t.Error("a guest took a filter that is none")
	}
	e.filter = filter
	if ids, err := e.List(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("listed: %q, %v", ids, err)
	}
	if l := loopOf(e.sandboxDir("")); l != "" {
		t.Errorf("%s is left", l)
	}
	file := filepath.Join(t.TempDir(), "file")
	var err error
	if e.disks, err = disk.NewMaker(filepath.Join(file, "templates")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := e.Create(t.Context(), engine.Spec{ID: "fails"}); err == nil {
		t.Error("a disk was made where none can be")
	}
}

// The record of a sandbox without a disk names none, and one with a disk is read back.
func TestRecordOfLoop(t *testing.T) {
	text, err := json.Marshal(record{})
	if err != nil || strings.Contains(string(text), "loop") {
		t.Errorf("%s, %v", text, err)
	}
	first := 0
	if text, err = json.Marshal(record{Loop: &first}); err != nil {
		t.Fatal(err)
	}
	var back record
	if err := json.Unmarshal(text, &back); err != nil || back.Loop == nil || *back.Loop != 0 {
		t.Errorf("%s: %+v, %v", text, back, err)
	}
}

func TestFileLimitsAreRefused(t *testing.T) {
	cfg := testConfig(t)
	cfg.Defaults.OpenFiles = 1 << 40
	cfg.Defaults.DiskBytes = 64 << 20
	e := engineOver(t, cfg)
	if got := e.DefaultLimits(); got.OpenFiles != 0 || (got.DiskBytes == 0) != (os.Geteuid() != 0) {
		t.Errorf("defaults %+v", got)
	}
	e.disks = nil // as for an ordinary user
	for field, l := range map[string]engine.Limits{"limits.disk_bytes": {DiskBytes: 64 << 20}, "limits.open_files": {OpenFiles: 1 << 40}} {
		err := e.CheckLimits(l)
		var f *fault.Error
		if fault.ReasonOf(err) != "LIMIT_NOT_ENFORCEABLE" || !errors.As(err, &f) || f.Meta["field"] != field {
			t.Errorf("%s: %v", field, err)
		}
		if !strings.Contains(fmt.Sprint(err), field) || !strings.Contains(fmt.Sprint(err), "ask for no such limit") {
			t.Errorf("%s: %v", field, err)
		}
	}
	for _, name := range []string{"limit.disk", "limit.open_files"} {
		found := false
		for _, c := range e.capabilities() {
			if c.Name != name {
				continue
			}
			found = true
			if c.Available == (name == "limit.disk") || c.Detail == "" || c.Available == (c.Remedy != "") {
				t.Errorf("%+v", c)
			}
		}
		if !found {
			t.Errorf("no capability %q", name)
		}
	}
}

func BenchmarkCreateWithDisk(b *testing.B) {
	needRoot(b)
	e := openEngine(b, testConfig(b))
	defer e.Close()
	for _, size := range []int64{0, 1 << 30} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			for i := 0; b.Loop(); i++ {
				sb, err := e.Create(b.Context(), engine.Spec{ID: fmt.Sprint("b-", i), Limits: engine.Limits{DiskBytes: size}})
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if _, err := sb.Terminate(b.Context()); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}
