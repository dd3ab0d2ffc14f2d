package enginetest

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestclient"
)

// fileLimitCases are about the limits of what is written and of what is open.
func fileLimitCases() []testCase {
	return []testCase{
		{"the limit of disk holds, wherever is written", diskLimit},
		{"files without content meet the limit of disk", inodeLimit},
		{"a full sandbox is told why nothing starts, and goes on with room", fullDisk},
		{"a sandbox with a limit of disk lives on with the next engine", diskReopened},
		{"the end of a full sandbox is quick", fullDiskEnds},
		{"the limit of open files holds and cannot be raised", openFilesLimit},
	}
}

// testDisk is large enough that the file system's own part is small.
const testDisk = 64 << 20

func diskLimit(t *testing.T, h *house) {
	b := h.create("disk", engine.Limits{DiskBytes: testDisk})
	if size := number(t, b.sh("df --output=size -B1 /workspace | tail -1")); size > testDisk || size < testDisk*8/10 {
		t.Errorf("df says %d bytes, want nearly %d", size, testDisk)
	}
	for _, dir := range []string{"/workspace", "/tmp", "/usr/lib", "/etc", "/var/tmp", "/root"} {
		out := b.run("bash", "-c", "mkdir -p "+dir+" && dd if=/dev/zero of="+dir+"/fill bs=1M count=1000; stat -c %s "+dir+"/fill; rm "+dir+"/fill")
		size := number(t, string(out.stdout))
		if !strings.Contains(string(out.stderr), "No space left on device") || size > testDisk || size < testDisk*8/10 {
			t.Errorf("in %s: %d bytes, %v", dir, size, out)
		}
	}
	// What is read-only below is written above, and counts.
	out := b.run("bash", "-c", "for i in $(seq 100); do cp -a /usr/bin/bash /usr/lib/copy-$i || exit 3; done")
	if !exited(out, 3) || !strings.Contains(string(out.stderr), "No space left on device") {
		t.Errorf("copies: %v", out)
	}
	other := h.create("other", engine.Limits{DiskBytes: testDisk})
	if text := other.sh("dd if=/dev/zero of=/tmp/x bs=1M count=30 2>&1 && stat -c %s /tmp/x"); !strings.HasSuffix(text, strconv.Itoa(30<<20)) {
		t.Errorf("another sandbox: %q", text)
	}
}

// number reads what a program counted.
func number(t *testing.T, text string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	if err != nil {
		t.Error(err)
	}
	return n
}

func inodeLimit(t *testing.T, h *house) {
	b := h.create("inodes", engine.Limits{DiskBytes: testDisk})
	out := b.run("python3", "-c", `import os
os.makedirs("/workspace/many")
n = 0
try:
    while n < 1000000:
        os.close(os.open(f"/workspace/many/{n}", os.O_CREAT | os.O_WRONLY))
        n += 1
except OSError as e:
    print(e.errno, n)`)
	var errno, made int
	if _, err := fmt.Sscan(string(out.stdout), &errno, &made); err != nil || errno != 28 || made < 1000 || made > testDisk/4096 {
		t.Errorf("%v, want ENOSPC at some thousand files", out)
	}
	b.answers()
}

func fullDisk(t *testing.T, h *house) {
	b := h.create("stuffed", engine.Limits{DiskBytes: testDisk})
	b.run("bash", "-c", "cat /dev/zero > /workspace/fill; for i in $(seq 10000); do echo x > /workspace/$i || break; done")
	b.answers()
	// Programs that are there start; what needs room says that there is none.
	if out := b.run("echo", "still"); string(out.stdout) != "still\n" {
		t.Errorf("a program in a full sandbox: %v", out)
	}
	r := request("source", "cat", "")
	r.SourceName, r.SourceArgument, r.Source = "text", 1, make([]byte, 512<<10)
	_, err := b.guest.Start(h.ctx(), r)
	if guestclient.KindOf(err) != guestv1.Error_KIND_EXHAUSTED {
		t.Errorf("a start that needs room: %v, want KIND_EXHAUSTED", err)
	}
	b.sh("rm /workspace/fill")
	if _, err := b.guest.Start(h.ctx(), r); err != nil {
		t.Errorf("with room again: %v", err)
	} else if out := b.finish("source"); !exited(out, 0) || len(out.stdout) != 512<<10 {
		t.Errorf("with room again: %v", out)
	}
}

func diskReopened(t *testing.T, h *house) {
	limits := engine.Limits{DiskBytes: testDisk}.Or(h.engine.DefaultLimits())
	h.create("kept", limits).sh("echo text > /workspace/file")
	h.reopen()
	b := h.open("kept")
	if b.Limits() != limits {
		t.Errorf("limits %+v, want %+v", b.Limits(), limits)
	}
	out := b.run("bash", "-c", "cat /workspace/file; cat /dev/zero > /workspace/fill")
	if string(out.stdout) != "text\n" || !strings.Contains(string(out.stderr), "No space left on device") {
		t.Errorf("after the engine was opened again: %v", out)
	}
	b.terminate()
	h.mustBeGone("kept")
	h.mustList(h.ctx())
}

func fullDiskEnds(t *testing.T, h *house) {
	began := time.Now()
	h.create("idle", engine.Limits{DiskBytes: testDisk}).terminate()
	idle := time.Since(began)

	b := h.create("brim", engine.Limits{DiskBytes: 1 << 30})
	b.run("bash", "-c", "mkdir many; for i in $(seq 200); do mkdir many/$i; touch many/$i/{1..200}; done; head -c 400M /dev/zero > fill")
	b.begin("writes", "bash", "-c", "echo writes; while :; do head -c 50M /dev/zero > more; done")
	b.wrote("writes", "writes\n")
	began = time.Now()
	b.terminate()
	// It is not written before it is removed, and its files are not removed one by one.
	if took := time.Since(began); took > 20*idle+2*time.Second {
		t.Errorf("the end took %v, the whole life of an idle one %v", took, idle)
	}
	h.mustBeGone("brim")
	h.mustList(h.ctx())
}

func openFilesLimit(t *testing.T, h *house) {
	b := h.create("files", engine.Limits{OpenFiles: 100})
	if got := b.sh("ulimit -Sn; ulimit -Hn; sh -c 'ulimit -n'; setsid bash -c 'ulimit -n'"); got != "100\n100\n100\n100" {
		t.Errorf("ulimit says %q", got)
	}
	if out := b.run("bash", "-c", "ulimit -n 101"); exited(out, 0) {
		t.Errorf("the limit was raised: %v", out)
	}
	out := b.run("python3", "-c", `import os, resource
for limit in (100, 101), (101, 101), (100, resource.RLIM_INFINITY):
    try: resource.setrlimit(resource.RLIMIT_NOFILE, limit); print("raised to", limit)
    except (ValueError, OSError): pass
held = []
try:
    while len(held) < 10000: held.append(os.open("/dev/null", os.O_RDONLY))
except OSError as e: print(e.errno, max(held))
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
print(resource.getrlimit(resource.RLIMIT_NOFILE))`)
	if want := "24 99\n(50, 50)\n"; string(out.stdout) != want {
		t.Errorf("%v, want %q", out, want)
	}
	// The guest is not meant.
	for i := range 60 {
		b.begin(fmt.Sprint("at-once-", i), "sleep", "1000")
	}
	b.answers()
	b.terminate()
}
