package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
)

// does runs a script in a sandbox and returns what it printed.
func does(t testing.TB, sb engine.Sandbox, script string) string {
	t.Helper()
	c := guestclient.New(sb)
	defer c.Close()
	out, err := c.Run(t.Context(), guestclient.Command{Args: []string{"bash", "-ec", script}, Timeout: time.Minute})
	if err != nil || out.Code() != 0 {
		t.Fatalf("script %q: %v, %v, stdout %q, stderr %q", script, err, out.Exit, out.Stdout, out.Stderr)
	}
	return strings.TrimSuffix(string(out.Stdout), "\n")
}

// begin starts a script that runs until the sandbox's end, and waits for its first line.
func begin(t testing.TB, sb engine.Sandbox, script string) {
	t.Helper()
	c := guestclient.New(sb)
	t.Cleanup(c.Close)
	r := guestclient.Command{Args: []string{"bash", "-ec", script}, ID: "begin"}
	first := make(chan struct{})
	var work sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() {
		cancel()
		work.Wait()
	})
	work.Go(func() {
		out := false
		_, _ = c.RunStream(ctx, r, func(_ guestv1.Stream, _ []byte) error {
			if !out {
				out = true
				close(first)
			}
			return nil
		})
	})
	select {
	case <-first:
	case <-time.After(time.Minute):
		t.Fatal("the script wrote nothing")
	}
}

func mustSnapshot(t testing.TB, sb engine.Sandbox) engine.ImageRef {
	t.Helper()
	ref, err := sb.Snapshot(t.Context(), engine.SnapshotRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// leave makes a sandbox for the next engine.
func leave(t testing.TB, e *Engine, spec engine.Spec) engine.Sandbox {
	t.Helper()
	sb, err := e.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	return sb
}

// left are the layers and images on disk.
func (e *Engine) left(t testing.TB) (layers, images []string) {
	t.Helper()
	for dir, names := range map[string]*[]string{e.snapshots.layers: &layers, e.snapshots.images: &images} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range entries {
			*names = append(*names, d.Name())
		}
	}
	return layers, images
}

// Layers are shared, bounded, and gone with the last that needs them.
func TestLayers(t *testing.T) {
	e := newEngine(t)
	count := func(layers, images int) {
		t.Helper()
		await(t, fmt.Sprintf("%d layers of %d images are left", layers, images), func() bool {
			l, i := e.left(t)
			return len(l) == layers && len(i) == images
		})
	}
	end := func(sb engine.Sandbox) {
		t.Helper()
		if _, err := sb.Terminate(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	sb := sandboxFor(t, e, engine.Spec{ID: "l-0"})
	var refs []engine.ImageRef
	for n := 1; n <= maxLayers; n++ {
		does(t, sb, fmt.Sprintf("echo %d > /workspace/%d", n, n))
		ref := mustSnapshot(t, sb)
		refs = append(refs, ref)
		end(sb)
		sb = sandboxFor(t, e, engine.Spec{ID: fmt.Sprintf("l-%d", n), Image: ref})
	}
	count(maxLayers, maxLayers)
	does(t, sb, "echo last > /workspace/last; rm /workspace/1")
	flat := mustSnapshot(t, sb)
	if img, err := e.snapshots.find(flat); err != nil || len(img.Layers) != 1 {
		t.Errorf("%d layers, %v", len(img.Layers), err)
	}
	count(maxLayers+1, maxLayers+1)
	for _, ref := range refs {
		if err := e.Images().Delete(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	count(maxLayers+1, 1) // the sandbox is over them
	if got := does(t, sb, "ls /workspace"); got != "2\n3\n4\n5\n6\n7\n8\nlast" {
		t.Errorf("%q", got)
	}
	end(sb)
	count(1, 1)
	sb = sandboxFor(t, e, engine.Spec{ID: "l-flat", Image: flat})
	if got := does(t, sb, "ls /workspace"); got != "2\n3\n4\n5\n6\n7\n8\nlast" {
		t.Errorf("%q", got)
	}
	if err := e.Images().Delete(t.Context(), flat); err != nil {
		t.Fatal(err)
	}
	end(sb)
	count(0, 0)
}

// An image whose time has passed is removed, by this engine or the next, and so is what
// one left that was killed while it made one. What a sandbox is over stays.
func TestCollect(t *testing.T) {
	cfg := testConfig(t)
	e := openEngine(t, cfg)
	sb := leave(t, e, engine.Spec{ID: "a"})
	does(t, sb, "echo x > /workspace/x")
	brief, err := sb.Snapshot(t.Context(), engine.SnapshotRequest{TTL: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	await(t, "the image is removed", func() bool { l, i := e.left(t); return len(l)+len(i) == 0 })
	if ok, err := e.Images().Exists(t.Context(), brief); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
	used := mustSnapshot(t, sb)
	leave(t, e, engine.Spec{ID: "b", Image: used})
	if err := e.Images().Delete(t.Context(), used); err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Snapshot(t.Context(), engine.SnapshotRequest{TTL: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"layers/half", "layers/half/root", "volumes/.deleted-1", "volumes/.deleted-1/x"} {
		if err := os.Mkdir(filepath.Join(e.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(e.dir, "snapshots", ".new-1"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	next := engineOver(t, cfg)
	await(t, "what is left is removed", func() bool { l, i := next.left(t); return len(l) == 2 && len(i) == 1 })
	if entries, err := os.ReadDir(filepath.Join(e.dir, "volumes")); err != nil || len(entries) > 0 {
		t.Errorf("%v, %v", entries, err)
	}
	for _, id := range []string{"a", "b"} {
		sb, err := next.Open(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if got := does(t, sb, "cat /workspace/x"); got != "x" {
			t.Errorf("%s: %q", id, got)
		}
		if _, err := sb.Terminate(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "the layer of what was ended is removed", func() bool { l, _ := next.left(t); return len(l) == 1 })
}

// A sandbox with a limit of disk has its files in a file system of its own.
func TestSnapshotOfDisk(t *testing.T) {
	needRoot(t)
	e := newEngine(t)
	limits := engine.Limits{DiskBytes: 64 << 20}
	a := sandboxFor(t, e, engine.Spec{ID: "disk-a", Limits: limits})
	does(t, a, "head -c 20M /dev/zero | tr '\\0' x > /workspace/big; echo x > /usr/local/x; rm /usr/bin/env")
	begin(t, a, "while :; do date > /workspace/now; echo; done")
	ref := mustSnapshot(t, a)
	for id, limits := range map[string]engine.Limits{"disk-b": limits, "free-c": {}} {
		b := sandboxFor(t, e, engine.Spec{ID: id, Image: ref, Limits: limits})
		if got := does(t, b, "stat -c %s /workspace/big; cat /usr/local/x; ls /usr/bin/env 2>/dev/null || echo none; echo more >> /workspace/big; stat -c %s /workspace/big"); got != "20971520\nx\nnone\n20971525" {
			t.Errorf("%s: %q", id, got)
		}
		// What it starts from is no part of what it may write.
		if id == "disk-b" {
			does(t, b, "rm /workspace/big; head -c 50M /dev/zero > /workspace/zero; ! head -c 30M /dev/zero > /workspace/more")
		}
		mustSnapshot(t, b)
		if _, err := b.Terminate(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// An executord that is killed while it makes a snapshot leaves processes that stand still:
// the next one has them go on.
func TestThawed(t *testing.T) {
	needRoot(t)
	cfg := testConfig(t)
	e := openEngine(t, cfg)
	sb := leave(t, e, engine.Spec{ID: "frozen"})
	begin(t, sb, "while :; do date +%N > /workspace/now; echo; sleep 0.01; done")
	group := sb.(*sandbox).group
	if err := group.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	now := filepath.Join(e.dir, "sandboxes/frozen/layer/root/upper/workspace/now")
	read := func() string {
		text, err := os.ReadFile(now)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	before := read()
	time.Sleep(100 * time.Millisecond)
	if read() != before {
		t.Error("what is frozen goes on")
	}
	// The guest answers meanwhile, and what is started waits.
	c := guestclient.New(sb)
	defer c.Close()
	if _, err := c.Info(t.Context()); err != nil {
		t.Error(err)
	}
	started := make(chan error, 1)
	var work sync.WaitGroup
	defer work.Wait()
	work.Go(func() {
		_, err := c.Run(t.Context(), guestclient.Command{Args: []string{"touch", "/workspace/started"}})
		started <- err
	})
	time.Sleep(100 * time.Millisecond)
	if _, err := os.Lstat(filepath.Join(filepath.Dir(now), "started")); err == nil {
		t.Error("what is started does not wait")
	}
	if _, err := c.Info(t.Context()); err != nil {
		t.Error(err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	next := engineOver(t, cfg)
	again, err := next.Open(t.Context(), "frozen")
	if err != nil {
		t.Fatal(err)
	}
	await(t, "the processes go on", func() bool { text := read(); return text != before && text != "" })
	if err := <-started; err != nil {
		t.Error(err)
	}
	mustSnapshot(t, again)
	if _, err := again.Terminate(t.Context()); err != nil {
		t.Error(err)
	}
}

// What is frozen for a snapshot that nobody waits for any more goes on at once, and
// nothing is left of it; the end of the sandbox gives a snapshot up.
func TestSnapshotGivenUp(t *testing.T) {
	needRoot(t)
	e := newEngine(t)
	sb := sandboxFor(t, e, engine.Spec{ID: "given-up"})
	does(t, sb, "mkdir /workspace/many; cd /workspace/many; seq 30000 | xargs touch")
	begin(t, sb, "while :; do date +%N > /workspace/now; echo; sleep 0.01; done")
	bad := errors.New("bad")
	for _, after := range []time.Duration{0, 5 * time.Millisecond, 50 * time.Millisecond} {
		ctx, cancel := context.WithTimeoutCause(t.Context(), after, bad)
		if ref, err := sb.Snapshot(ctx, engine.SnapshotRequest{}); !errors.Is(err, bad) {
			t.Errorf("after %v: %q, %v", after, ref, err)
		}
		cancel()
		before := does(t, sb, "cat /workspace/now") // which takes a process that is not frozen
		await(t, "the processes go on", func() bool { return does(t, sb, "cat /workspace/now") != before })
		await(t, "nothing is left", func() bool { l, i := e.left(t); return len(l)+len(i) == 0 })
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			_, err := sb.Snapshot(t.Context(), engine.SnapshotRequest{})
			if errors.Is(err, errEnding) || err != nil && strings.Contains(err.Error(), "has ended") {
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	time.Sleep(100 * time.Millisecond)
	if _, err := sb.Terminate(t.Context()); err != nil {
		t.Error(err)
	}
	work.Wait()
}

// An ordinary user is refused while something runs, and only then.
func TestSnapshotWithoutGroups(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("root has control groups")
	}
	e := newEngine(t)
	sb := sandboxFor(t, e, engine.Spec{ID: "ordinary"})
	does(t, sb, "mkdir /workspace/d; echo x > /workspace/d/x; chmod 0 /workspace/d /workspace/d/x; rm -r /srv")
	ref := mustSnapshot(t, sb)
	begin(t, sb, "echo; sleep 1000")
	if _, err := sb.Snapshot(t.Context(), engine.SnapshotRequest{}); fault.ReasonOf(err) != "SNAPSHOT_NOT_AVAILABLE" {
		t.Error(err)
	}
	b := sandboxFor(t, e, engine.Spec{ID: "ordinary-b", Image: ref})
	if got := does(t, b, "stat -c %a /workspace/d /workspace/d/x; cat /workspace/d/x; ls -d /srv 2>/dev/null || echo none"); got != "0\n0\nx\nnone" {
		t.Errorf("%q", got)
	}
	if got := does(t, sb, "stat -c %a /workspace/d /workspace/d/x"); got != "0\n0" {
		t.Errorf("the copied files are left as %q", got)
	}
	// What nobody may look into can be removed.
	if _, err := b.Terminate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := e.Images().Delete(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	await(t, "nothing is left", func() bool { l, i := e.left(t); return len(l)+len(i) == 0 })
}

// What executord itself put into a sandbox is no part of its snapshots.
func TestSnapshotLeavesOut(t *testing.T) {
	e := newEngine(t)
	sb := sandboxFor(t, e, engine.Spec{ID: "out", Network: engine.NetworkHost})
	does(t, sb, "touch /etc/own; [ -e /etc/resolv.conf ]")
	img, err := e.snapshots.find(mustSnapshot(t, sb))
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	top := filepath.Join(e.snapshots.layers, img.Layers[0])
	_ = filepath.WalkDir(top, func(path string, _ os.DirEntry, err error) error {
		name, _ := filepath.Rel(top, path)
		found = append(found, name)
		return err
	})
	if want := []string{".", "root", "root/etc", "root/etc/own", "root/run"}; !slices.Equal(found, want) {
		t.Errorf("the layer has %q, want %q", found, want)
	}
}

// The files of a volume belong to root on disk, and to root in each sandbox. Nothing that
// an image has leads one elsewhere.
func TestVolumes(t *testing.T) {
	e := newEngine(t)
	sb := sandboxFor(t, e, engine.Spec{ID: "maker"})
	does(t, sb, "cd /workspace; ln -s /proc p; ln -s / r; ln -s /proc/1/root m; ln -s ../../../../etc e; ln -s /nowhere n; echo x > f; ln -s loop loop; ln -s /root/in ok; mkdir /root/in")
	ref := mustSnapshot(t, sb)
	if err := e.Volumes().Ensure(t.Context(), "v"); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"/workspace/p/v": "", "/workspace/r/v": "/v", "/workspace/e/v": "/etc/v", "/workspace/ok/v": "/root/in/v", "/workspace/p": "", "/workspace/m/v": "fails",
		"/workspace/n": "fails", "/workspace/f": "fails", "/workspace/f/v": "fails", "/workspace/loop/v": "fails",
	} {
		before, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		made, err := e.Create(t.Context(), engine.Spec{ID: "linked", Image: ref, Volumes: []engine.VolumeMount{{Name: "v", Path: path}}})
		if (err != nil) != (want == "fails") {
			t.Errorf("%s: %v", path, err)
		}
		if err == nil {
			got := does(t, made, "grep -c volumes /proc/self/mountinfo || true; awk '$4 ~ /volumes/ {print $5}' /proc/self/mountinfo; cat /proc/self/comm > /dev/null")
			if want != "" && !strings.HasSuffix(got, "\n"+want) {
				t.Errorf("%s: mounted at %q, want %s", path, got, want)
			}
			if _, err := made.Terminate(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if after, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(after), e.dir) && !strings.Contains(string(before), e.dir) {
			t.Errorf("%s: a mount is left on the host", path)
		}
	}
	a := sandboxFor(t, e, engine.Spec{ID: "a", Volumes: []engine.VolumeMount{{Name: "v", Path: "/v"}}})
	does(t, a, "echo x > /v/file")
	var st syscall.Stat_t
	if err := syscall.Stat(filepath.Join(e.dir, "volumes/v/file"), &st); err != nil || int(st.Uid) != os.Geteuid() {
		t.Errorf("on disk it belongs to %d, %v", st.Uid, err)
	}
	if err := e.Volumes().Delete(t.Context(), "v"); fault.ReasonOf(err) != "VOLUME_IN_USE" {
		t.Errorf("deleted while a sandbox has it: %v", err)
	}
	if err := a.CommitVolumes(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := a.Terminate(t.Context()); err != nil {
		t.Error(err)
	}
	if err := e.Volumes().Delete(t.Context(), "v"); err != nil {
		t.Error(err)
	}
}
