package enginetest

import (
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
)

// imageCases are about snapshots and what is made from them.
func imageCases() []testCase {
	return []testCase{
		{"a snapshot holds what was written, as it was", snapshotHolds},
		{"a snapshot is of one moment, while processes write", snapshotOfOneMoment},
		{"sandboxes of one image do not see each other", imageIsShared},
		{"snapshots of snapshots add up", snapshotsAddUp},
		{"an image outlives its sandbox and the engine", imageOutlives},
		{"a deleted image is gone, and what was made from it lives on", imageDeleted},
		{"an image is gone when its time has passed", imageExpires},
		{"there is no image that nobody made", imageMissing},
		{"a sandbox that is ended makes no snapshot", snapshotOfNothing},
	}
}

// snapshot makes an image that is deleted with the case.
func (b *box) snapshot() engine.ImageRef {
	b.h.t.Helper()
	ref, err := b.Snapshot(b.h.ctx(), engine.SnapshotRequest{})
	if err != nil {
		b.h.t.Fatalf("make a snapshot of %s: %v", b.ID(), err)
	}
	if ref == "" {
		b.h.t.Fatalf("the snapshot of %s has no name", b.ID())
	}
	b.h.images = append(b.h.images, ref)
	return ref
}

// make makes a sandbox of any kind and fails the test if it cannot.
func (h *house) make(spec engine.Spec) *box {
	h.t.Helper()
	sb, err := h.engine.Create(h.ctx(), spec)
	if err != nil {
		h.t.Fatalf("create %s from %q: %v", spec.ID, spec.Image, err)
	}
	return h.box(sb)
}

// script runs a bash script to its end, as executord runs its own commands, and returns
// what it printed.
func (b *box) script(text string) string {
	b.h.t.Helper()
	out, err := b.guest.Run(b.h.ctx(), guestclient.Command{
		Args: []string{"bash", "-ec", text}, Dir: "/", OpenFiles: b.Limits().OpenFiles,
	})
	if err != nil || out.Code() != 0 {
		b.h.t.Fatalf("script %q in %s: %v, code %d, stdout %q, stderr %q", text, b.ID(), err, out.Code(), out.Stdout, out.Stderr)
	}
	return strings.TrimSuffix(string(out.Stdout), "\n")
}

// files makes all kinds of files, and tell prints what is to be seen of them.
const (
	files = `
mkdir -p /workspace/repo/deep/er /workspace/empty /root/.config
cd /workspace/repo
echo text > file; printf '\0\1\377' > bytes; : > nothing
echo secret > private; chmod 600 private
echo run > program; chmod 4755 program
chmod 1777 /workspace/empty; chmod 711 deep
ln file hard; ln -s file soft; ln -s /nowhere dangling
mkfifo pipe
truncate -s 50M holes; printf end >> holes
printf '%s' odd > $'a name\nwith \xff bytes'
echo config > /root/.config/file; echo changed > /etc/hostname
touch -d '2001-02-03 04:05:06.789 UTC' file deep
python3 -c 'import os; os.setxattr("bytes", "user.note", b"kept")' || echo none > no-attributes
python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("socket")'
rm -r /media; rm -rf /srv; mkdir /srv; echo new > /srv/new
`
	tell = `
cd /workspace/repo
find . /workspace/empty /root/.config /srv -not -name socket -printf '%p %y %m %U %G %n %l' -a \( -type d -printf '\n' -o -printf ' %s\n' \) | LC_ALL=C sort
sha256sum file bytes private hard soft holes $'a name\nwith \xff bytes' /root/.config/file /etc/hostname /srv/new
stat -c '%y' file deep
[ "$(stat -c %i file)" = "$(stat -c %i hard)" ] && echo linked
[ $(stat -c %b holes) -lt 1000 ] && echo sparse
[ -e no-attributes ] || python3 -c 'import os; print(os.getxattr("bytes", "user.note"))'
[ -e /media ] || echo deleted
[ -e /opt ] && echo still there
`
)

func snapshotHolds(t *testing.T, h *house) {
	a := h.create("holds-a", engine.Limits{})
	a.script(files)
	want := a.script(tell)
	for _, line := range []string{"linked", "sparse", "deleted", "still there"} {
		if !strings.Contains(want, line) {
			t.Fatalf("the files are not as they should be: %s", want)
		}
	}
	b := h.make(engine.Spec{ID: "holds-b", Image: a.snapshot()})
	if got := b.script(tell); got != want {
		t.Errorf("in the snapshot is\n%s\nwant\n%s", got, want)
	}
	// What is there can be used and changed like any other.
	b.script("cd /workspace/repo; echo more >> file; rm bytes private; mv deep deeper; mkdir /media; rmdir /workspace/empty; ls /run /tmp > /dev/null")
	if got := b.script("cd /workspace/repo; cat file; ls -d deeper/er bytes deep 2>/dev/null || true"); got != "text\nmore\ndeeper/er" {
		t.Errorf("after changes: %q", got)
	}
	if got := a.script(tell); got != want {
		t.Errorf("the sandbox that the snapshot is of has changed:\n%s", got)
	}
	b.answers()
}

// capable says whether the engine has a capability. One that does not tell has it.
func (h *house) capable(name string) bool {
	for _, c := range h.engine.Capabilities() {
		if c.Name == name {
			return c.Available
		}
	}
	return true
}

// The writer writes a number into one file and then into another: at no moment are they
// further apart than one.
func snapshotOfOneMoment(t *testing.T, h *house) {
	a := h.create("moment-a", engine.Limits{})
	a.begin("write", "python3", "-c", `import os
one, two = open("/workspace/one", "wb"), open("/workspace/two", "wb")
os.mkdir("/workspace/many")
for n in range(1 << 40):
    for f in one, two: os.pwrite(f.fileno(), b"%12d" % n, 0)
    open("/workspace/many/%d" % (n % 500), "w").write(str(n))
    if n == 1000: print("ready", flush=True)`)
	a.wrote("write", "ready\n")
	if !h.capable("snapshot") {
		// It must say so, and not make half of one.
		_, err := a.Snapshot(h.ctx(), engine.SnapshotRequest{})
		mustFault(t, "snapshot while processes run", err, fault.FailedPrecondition, "SNAPSHOT_NOT_AVAILABLE")
		return
	}
	for range 3 {
		ref := a.snapshot()
		b := h.make(engine.Spec{ID: "moment-b", Image: ref})
		got := b.script(`cd /workspace; python3 -c '
one, two = int(open("one").read()), int(open("two").read())
many = sorted(int(open("many/%d" % i).read() or -1) for i in range(500))
behind = max(one, two) - many[1] - 499 # one may be empty: it is opened and then written
print(one - two in (0, 1), one >= 1000, behind in (-1, 0, 1, 2) or (one, two, many[:3], many[-3:]))'`)
		if got != "True True True" {
			t.Errorf("the files are of several moments: %s", got)
		}
		b.terminate()
	}
	// And it goes on.
	before := a.script("cat /workspace/one")
	eventually(t, "the writer goes on", func() bool { return a.script("cat /workspace/one") != before })
}

func imageIsShared(t *testing.T, h *house) {
	a := h.create("shared-a", engine.Limits{})
	a.script("echo original > /workspace/file; mkdir /workspace/dir; touch /workspace/dir/x")
	ref := a.snapshot()
	b, c := h.make(engine.Spec{ID: "shared-b", Image: ref}), h.make(engine.Spec{ID: "shared-c", Image: ref})
	b.script("echo b > /workspace/file; rm -r /workspace/dir; echo b > /workspace/of-b")
	a.script("echo a > /workspace/file; echo a > /workspace/of-a")
	if got := c.script("cd /workspace; cat file; ls"); got != "original\ndir\nfile" {
		t.Errorf("a sibling sees %q", got)
	}
	if got := h.make(engine.Spec{ID: "shared-d", Image: ref}).script("cd /workspace; cat file; ls"); got != "original\ndir\nfile" {
		t.Errorf("the image has become %q", got)
	}
}

// More than any chain of layers that an engine may keep.
func snapshotsAddUp(t *testing.T, h *house) {
	const generations = 11
	b := h.create("adds-0", engine.Limits{})
	b.script("mkdir -p /workspace/d/always /workspace/d/e{0,1,2}/gone; echo 0 > /workspace/always; for i in $(seq 20); do mkdir /workspace/d/$i; echo 0 > /workspace/d/$i/f; done")
	for n := 1; n <= generations; n++ {
		ref := b.snapshot()
		b.terminate()
		b = h.make(engine.Spec{ID: "adds-" + string(rune('a'+n)), Image: ref})
		b.script(strings.ReplaceAll(`cd /workspace; echo N > of-N; echo N >> always
rm d/N/f
[ N = 1 ] || rm of-$((N-1))
rm -r d/e$((N%3)); mkdir d/e$((N%3)); echo N > d/e$((N%3))/again
echo N > d/always/N`, "N", itoa(n)))
	}
	want := b.script("cd /workspace; find . | LC_ALL=C sort; cat always of-*; cat d/e*/*")
	c := h.make(engine.Spec{ID: "adds-last", Image: b.snapshot()})
	if got := c.script("cd /workspace; find . | LC_ALL=C sort; cat always of-*; cat d/e*/*"); got != want || !strings.Contains(want, "./of-11\n") || strings.Contains(want, "./of-10\n") {
		t.Errorf("after %d generations:\n%s\nwant\n%s", generations, got, want)
	}
}

func imageOutlives(t *testing.T, h *house) {
	a := h.create("outlives", engine.Limits{})
	a.script("echo kept > /workspace/file")
	ref := a.snapshot()
	a.terminate()
	h.reopen()
	if ok, err := h.engine.Images().Exists(h.ctx(), ref); !ok || err != nil {
		t.Errorf("with the next engine the image exists: %v, %v", ok, err)
	}
	b := h.make(engine.Spec{ID: "outlives", Image: ref})
	if got := b.script("cat /workspace/file"); got != "kept" {
		t.Errorf("%q", got)
	}
	h.reopen() // the sandbox over it lives on as well, and so do its snapshots
	b = h.open("outlives")
	b.script("echo more >> /workspace/file")
	c := h.make(engine.Spec{ID: "outlives-c", Image: b.snapshot()})
	if got := c.script("cat /workspace/file"); got != "kept\nmore" {
		t.Errorf("%q", got)
	}
}

func imageDeleted(t *testing.T, h *house) {
	a := h.create("deleted-a", engine.Limits{})
	a.script("seq 100000 > /workspace/big; mkdir /workspace/d; seq 100 | (cd /workspace/d; xargs touch)")
	ref := a.snapshot()
	b := h.make(engine.Spec{ID: "deleted-b", Image: ref})
	for range 2 {
		if err := h.engine.Images().Delete(h.ctx(), ref); err != nil {
			t.Fatal(err)
		}
	}
	if ok, err := h.engine.Images().Exists(h.ctx(), ref); ok || err != nil {
		t.Errorf("after its end it exists: %v, %v", ok, err)
	}
	if sb, err := h.engine.Create(h.ctx(), engine.Spec{ID: "deleted-c", Image: ref}); fault.ReasonOf(err) != "IMAGE_NOT_FOUND" {
		t.Errorf("made %v, %v", sb, err)
	}
	time.Sleep(200 * time.Millisecond) // for what removes it in the background
	const look = "cd /workspace; tail -1 big; sha256sum big | cut -c1-8; ls d | wc -l"
	want := a.script(look)
	if got := b.script(look); got != want {
		t.Errorf("in a sandbox from it: %q, want %q", got, want)
	}
	c := h.make(engine.Spec{ID: "deleted-d", Image: b.snapshot()})
	b.terminate()
	time.Sleep(200 * time.Millisecond)
	if got := c.script(look); got != want {
		t.Errorf("in a sandbox from its sandbox: %q, want %q", got, want)
	}
}

func imageExpires(t *testing.T, h *house) {
	a := h.create("expires", engine.Limits{})
	ref, err := a.Snapshot(h.ctx(), engine.SnapshotRequest{TTL: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	h.images = append(h.images, ref)
	eventually(t, "the image is gone", func() bool {
		ok, err := h.engine.Images().Exists(h.ctx(), ref)
		if err != nil {
			t.Fatal(err)
		}
		return !ok
	})
}

func imageMissing(t *testing.T, h *house) {
	for _, ref := range []engine.ImageRef{"snapshot-nobody-made", "../images", "a/b", ".", engine.ImageRef(strings.Repeat("a", 300)), "A", "a\x00"} {
		if ok, err := h.engine.Images().Exists(h.ctx(), ref); ok || err != nil {
			t.Errorf("%q exists: %v, %v", ref, ok, err)
		}
		if err := h.engine.Images().Delete(h.ctx(), ref); err != nil {
			t.Errorf("delete %q: %v", ref, err)
		}
		if sb, err := h.engine.Create(h.ctx(), engine.Spec{ID: "missing", Image: ref}); fault.ReasonOf(err) != "IMAGE_NOT_FOUND" {
			t.Errorf("from %q: %v, %v", ref, sb, err)
		}
	}
	h.mustBeGone("missing")
}

func snapshotOfNothing(t *testing.T, h *house) {
	a := h.create("nothing", engine.Limits{})
	a.terminate()
	if ref, err := a.Snapshot(h.ctx(), engine.SnapshotRequest{}); err == nil {
		h.images = append(h.images, ref)
		t.Errorf("a snapshot of what is gone: %q", ref)
	}
}
