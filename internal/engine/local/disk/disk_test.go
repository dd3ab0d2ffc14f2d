package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newMaker returns a Maker and a directory on the disk, which has holes in files.
func newMaker(t *testing.T) (*Maker, string) {
	t.Helper()
	dir := t.TempDir()
	m, err := NewMaker(filepath.Join(dir, "templates"))
	if err != nil {
		t.Fatal(err)
	}
	if ok, why, remedy := m.Can(); !ok {
		t.Skipf("%s; %s", why, remedy)
	}
	return m, dir
}

// made is a mounted disk.
type made struct {
	path   string
	device int
	mount  *os.File
	root   string // a path to its root
}

func makeDisk(t *testing.T, m *Maker, path string, bytes int64) *made {
	t.Helper()
	d, err := m.Create(t.Context(), path, bytes)
	if err != nil {
		t.Fatal(err)
	}
	mount, err := d.Mount()
	if err := errors.Join(err, d.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mount.Close() })
	return &made{path, d.Device, mount, fmt.Sprintf("/proc/self/fd/%d", mount.Fd())}
}

// awaitGone fails the test if the device is not let go.
func (d *made) awaitGone(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := AwaitDetached(ctx, d.path, d.device); err != nil {
		t.Error(err)
	}
	if left := attached(t, d.path); left != "" {
		t.Errorf("%s still has %s", left, d.path)
	}
}

// attached is the loop device of a file, by what the kernel lists.
func attached(t *testing.T, path string) string {
	t.Helper()
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if text, _ := os.ReadFile(f); strings.HasPrefix(string(text), path) {
			return f
		}
	}
	return ""
}

// used is what a file takes of the disk.
func used(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestDisk(t *testing.T) {
	m, dir := newMaker(t)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	const size = 64<<20 + 1 // and not a whole block
	d := makeDisk(t, m, filepath.Join(dir, "a"), size)
	if n := used(t, d.path); n > 1<<20 {
		t.Errorf("an empty one takes %d bytes", n)
	}
	if now, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(now), fmt.Sprintf("loop%d ", d.device)) {
		t.Errorf("there is a mount on the host: %v\n%s\nbefore\n%s", err, now, mounts)
	}
	if attached(t, d.path) == "" {
		t.Error("the kernel does not list the file's loop device")
	}
	f, err := os.Create(d.root + "/fill")
	if err != nil {
		t.Fatal(err)
	}
	n, err := f.Write(make([]byte, 2*size))
	if !errors.Is(err, unix.ENOSPC) || n < size*9/10 || n >= size {
		t.Errorf("wrote %d of %d bytes, %v", n, size, err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Error(err)
	}
	if n := used(t, d.path); n > size || n < size/2 {
		t.Errorf("full, it takes %d bytes", n)
	}
	d.mount.Close()
	d.awaitGone(t)
	if n := used(t, d.path); n > size {
		t.Errorf("at the end it takes %d bytes", n)
	}
}

func TestInodes(t *testing.T) {
	m, dir := newMaker(t)
	d := makeDisk(t, m, filepath.Join(dir, "a"), 16<<20)
	made := 0
	var err error
	for ; made < 100_000 && err == nil; made++ {
		err = os.WriteFile(fmt.Sprintf("%s/%d", d.root, made), nil, 0o600)
	}
	if !errors.Is(err, unix.ENOSPC) || made < 900 || made > 2000 {
		t.Errorf("%d files, %v", made, err)
	}
	d.mount.Close()
	d.awaitGone(t)
	if n := used(t, d.path); n > 16<<20 {
		t.Errorf("it takes %d bytes", n)
	}
}

// Several mounts are of one file system, which is there until the last has gone.
func TestMounts(t *testing.T) {
	m, dir := newMaker(t)
	d, err := m.Create(t.Context(), filepath.Join(dir, "a"), 16<<20)
	if err != nil {
		t.Fatal(err)
	}
	a, errA := d.Mount()
	b, errB := d.Mount()
	if err := errors.Join(errA, errB, d.Close()); err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := os.WriteFile(fmt.Sprintf("/proc/self/fd/%d/x", a.Fd()), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if text, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d/x", b.Fd())); string(text) != "text" {
		t.Errorf("%q, %v", text, err)
	}
	over := &made{path: filepath.Join(dir, "a"), device: d.Device}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("enough"))
	defer cancel()
	if err := AwaitDetached(ctx, over.path, over.device); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Errorf("while it is mounted: %v", err)
	}
	b.Close()
	over.awaitGone(t)
}

// What was not written yet is not written for an end that nobody will read.
func TestDiscard(t *testing.T) {
	m, dir := newMaker(t)
	const size = 512 << 20
	d := makeDisk(t, m, filepath.Join(dir, "a"), size)
	if err := os.WriteFile(d.root+"/big", make([]byte, size/2), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Discard(d.path, d.device); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.root+"/more", []byte("x"), 0o600); err == nil {
		t.Error("it can still be written")
	}
	if err := Discard(d.path, d.device); err != nil {
		t.Errorf("a second time: %v", err)
	}
	d.mount.Close()
	d.awaitGone(t)
	if err := Discard(d.path, d.device); err != nil {
		t.Errorf("of one that is gone: %v", err)
	}
}

// Another file's loop device with the same number is not touched.
func TestDiscardOfAnother(t *testing.T) {
	m, dir := newMaker(t)
	d := makeDisk(t, m, filepath.Join(dir, "a"), 16<<20)
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{other, filepath.Join(dir, "missing")} {
		for _, device := range []int{d.device, 1 << 19} {
			if err := errors.Join(Discard(path, device), AwaitDetached(t.Context(), path, device)); err != nil {
				t.Errorf("%s on %d: %v", path, device, err)
			}
		}
	}
	if err := os.WriteFile(d.root+"/x", []byte("x"), 0o600); err != nil {
		t.Error(err)
	}
}

func TestManyAtOnce(t *testing.T) {
	m, dir := newMaker(t)
	var (
		all   sync.WaitGroup
		disks [16]*made
	)
	for i := range disks {
		all.Go(func() {
			// More sizes than are kept ready.
			disks[i] = makeDisk(t, m, filepath.Join(dir, fmt.Sprint(i)), 16<<20+int64(i)<<20)
		})
	}
	all.Wait()
	seen := make(map[int]bool)
	for _, d := range disks {
		if d == nil || seen[d.device] {
			t.Fatalf("device twice or none: %+v", d)
		}
		seen[d.device] = true
	}
	if kept, err := os.ReadDir(m.dir); err != nil || len(kept) != maxTemplates {
		t.Errorf("%d kept ready, %v", len(kept), err)
	}
	for _, d := range disks {
		d.mount.Close()
	}
	for _, d := range disks {
		d.awaitGone(t)
	}
}

func TestCreateFails(t *testing.T) {
	m, dir := newMaker(t)
	taken := filepath.Join(dir, "taken")
	if err := os.WriteFile(taken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Create(t.Context(), taken, 16<<20); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a file: %v", err)
	}
	if _, err := m.Create(t.Context(), filepath.Join(dir, "tiny"), 4096); err == nil || !strings.Contains(err.Error(), "mkfs.ext4") {
		t.Errorf("of no size: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Create(ctx, filepath.Join(dir, "late"), 32<<20); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
	// What failed is not taken for a template.
	d := makeDisk(t, m, filepath.Join(dir, "then"), 32<<20)
	d.mount.Close()
	d.awaitGone(t)
}

func TestCan(t *testing.T) {
	m := &Maker{}
	if ok, why, remedy := m.Can(); ok || !strings.Contains(why, "mkfs.ext4") || !strings.Contains(remedy, "e2fsprogs") {
		t.Errorf("without mkfs.ext4: %v, %q, %q", ok, why, remedy)
	}
	t.Setenv("PATH", "relative:/nowhere")
	if findProgram("no-such-program") != "" {
		t.Error("found what is not there")
	}
}

func TestLargest(t *testing.T) {
	m, dir := newMaker(t)
	began := time.Now()
	d := makeDisk(t, m, filepath.Join(dir, "large"), 1<<40)
	t.Logf("1 TiB: %v, %d bytes", time.Since(began), used(t, d.path))
	if n := used(t, d.path); n > 64<<20 {
		t.Errorf("an empty one of 1 TiB takes %d bytes", n)
	}
	d.mount.Close()
	d.awaitGone(t)
}

func BenchmarkCreate(b *testing.B) {
	dir := b.TempDir()
	m, err := NewMaker(filepath.Join(dir, "templates"))
	if err != nil {
		b.Fatal(err)
	}
	for i := 0; b.Loop(); i++ {
		path := filepath.Join(dir, fmt.Sprint(i))
		d, err := m.Create(b.Context(), path, 1<<30)
		if err != nil {
			b.Fatal(err)
		}
		mount, err := d.Mount()
		if err := errors.Join(err, d.Close()); err != nil {
			b.Fatal(err)
		}
		mount.Close()
		if err := errors.Join(AwaitDetached(b.Context(), path, d.Device), os.Remove(path)); err != nil {
			b.Fatal(err)
		}
	}
}
