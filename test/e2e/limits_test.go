package e2e

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// loops are the loop devices of files below a directory.
func loops(dir string) []string {
	var found []string
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		if text, _ := os.ReadFile(f); bytes.HasPrefix(text, []byte(dir)) {
			found = append(found, strings.TrimSpace(string(text)))
		}
	}
	return found
}

// onDisk is what the files below a directory take of the host.
func onDisk(t *testing.T, dir string) int64 {
	t.Helper()
	var total int64
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(path, &st) == nil {
			total += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return total
}

// TestDiskFill is fault case 29: a program fills its disk, with bytes and with files. It
// meets ENOSPC, the host loses no more than the limit, another sandbox nothing, and
// the end is quick.
func TestDiskFill(t *testing.T) {
	needRoot(t)
	const limit = 256 << 20
	d := start(t)
	for name, source := range map[string]string{
		"bytes": `import os
n = 0
try:
    with open("fill", "wb", 0) as f:
        while True: n += f.write(bytes(1 << 20))
except OSError as e: print(e.errno, n > 200 << 20, n < 256 << 20, flush=True)
os.sync()
print("full", flush=True)
import time; time.sleep(1000)`,
		"a million files": `import os
n = 0
try:
    while n < 1000000:
        if n % 1000 == 0: os.mkdir(f"d{n}")
        os.close(os.open(f"d{n - n % 1000}/{n}", os.O_CREAT | os.O_WRONLY)); n += 1
except OSError as e: print(e.errno, n > 10000, n < 100000, flush=True)
print("full", flush=True)
import time; time.sleep(1000)`,
	} {
		t.Run(name, func(t *testing.T) {
			// Each run looks at what was written and, for the host, at this state directory
			// only: others use this disk as well.
			before := onDisk(t, d.dir)
			out, errs, code := d.ctl("run", "--detach", "--limit-disk", "256MiB", "--lang", "python", source)
			if code != 0 {
				t.Fatalf("%s%s", out, errs)
			}
			execution := strings.TrimSpace(out)
			text := ""
			for range 600 {
				if text, _, _ = d.ctl("executions", "output", execution); strings.Contains(text, "full\n") {
					break
				}
				time.Sleep(100 * time.Millisecond)
			}
			if text != "28 True True\nfull\n" {
				t.Fatalf("the program says %q", text)
			}
			if grown := onDisk(t, d.dir) - before; grown > limit+16<<20 {
				t.Errorf("the host lost %d bytes to a limit of %d", grown, limit)
			}
			if out, errs, code := d.ctl("run", "--", "bash", "-c", "head -c 50M /dev/zero > x && echo other"); code != 0 || out != "other\n" {
				t.Errorf("another sandbox: %s%s", out, errs)
			}
			began := time.Now()
			if out, errs, code := d.ctl("executions", "cancel", "--grace", "0s", execution); code != 0 {
				t.Errorf("cancel: %s%s", out, errs)
			}
			for len(loops(d.dir)) > 0 && time.Since(began) < time.Minute {
				time.Sleep(5 * time.Millisecond)
			}
			took := time.Since(began)
			if left := loops(d.dir); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			// 2 s are promised on a machine that does only this; this one does not.
			if took > 20*time.Second {
				t.Errorf("the end took %v", took)
			}
			t.Logf("the end took %v", took)
		})
	}
}

// Disks go with their sandboxes, whenever executord is killed, and those of sandboxes
// that live are kept.
func TestKillWithDisks(t *testing.T) {
	needRoot(t)
	d := start(t, "--limits-disk-bytes=64MiB", "--limits-open-files=99", "--pool-size=0") // whose sandboxes have disks too
	c := d.dial()
	session, err := c.CreateSession(t.Context(), &executorv1.CreateSessionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Sessions().GetSession(t.Context(), &executorv1.GetSessionRequest{Name: session.GetName(), Wait: durationpb.New(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	if l := session.GetLimits(); l.GetDiskBytes() != 64<<20 || l.GetOpenFiles() != 99 {
		t.Errorf("the session's limits: %v", l)
	}
	execute(t, c, &executorv1.ExecuteRequest{Parent: session.GetName(), Command: bash("echo kept > file")})
	for range repetitions(t, 4) {
		ctx, cancel := context.WithCancel(t.Context())
		var clients sync.WaitGroup
		for range 3 {
			clients.Go(func() {
				c := d.client()
				defer c.Close()
				for ctx.Err() == nil {
					_, _ = c.Executor().StartExecution(ctx, &executorv1.StartExecutionRequest{Command: bash("head -c 10M /dev/zero > x; sync; sleep 0.1")})
				}
			})
		}
		time.Sleep(200*time.Millisecond + time.Duration(rand.IntN(600))*time.Millisecond)
		d.kill()
		cancel()
		clients.Wait()
		d.up()
		k := execute(t, c, &executorv1.ExecuteRequest{Parent: session.GetName(), Command: bash("cat file; ulimit -Hn; head -c 100M /dev/zero > fill; rm fill")})
		if k.stdout() != "kept\n99\n" || !strings.Contains(k.stderr(), "No space left") {
			t.Errorf("after a kill: %q, %q", k.stdout(), k.stderr())
		}
		var left []string
		for range 600 {
			if left = loops(d.dir); len(left) == 1 && strings.Contains(left[0], session.GetName()[len("sessions/"):]) {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if len(left) != 1 {
			t.Errorf("loop devices after a kill: %q, want that of %s", left, session.GetName())
		}
	}
	d.stop(syscall.SIGTERM)
	if left := loops(d.dir); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	d.up()
}

// A program cannot open more files than its limit, in a session neither, and cannot
// raise it.
func TestOpenFiles(t *testing.T) {
	d := start(t)
	const source = `import resource
print(resource.getrlimit(resource.RLIMIT_NOFILE))
try: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 65))
except ValueError as e: print(e)
held = []
try:
    while True: held.append(open("/dev/null"))
except OSError as e: print(e.errno, held[-1].fileno())`
	const want = "(64, 64)\nnot allowed to raise maximum limit\n24 63\n"
	if out, errs, code := d.ctl("run", "--limit-open-files", "64", "--lang", "python", source); code != 0 || out != want {
		t.Errorf("%d, %q, %s, want %q", code, out, errs, want)
	}
	out, errs, code := d.ctl("session", "create", "--limit-open-files", "64")
	if code != 0 {
		t.Fatal(errs)
	}
	session := strings.Fields(out)[0]
	for range 3 {
		if out, errs, code := d.ctl("exec", session, "--", "python3", "-c", source); code != 0 || out != want {
			t.Errorf("%d, %q, %s, want %q", code, out, errs, want)
		}
	}
	_, errs, code = d.ctl("run", "--limit-open-files", "1048576", "--", "bash", "-c", "ulimit -n")
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &own); err != nil {
		t.Fatal(err)
	}
	if (code == 0) != (own.Max >= 1<<20) || code != 0 && !strings.Contains(errs, "open_files") {
		t.Errorf("the most that can be asked for, where the host has %d: %d, %s", own.Max, code, errs)
	}
}

// An ordinary user's sandboxes have a limit of open files, and none of disk.
func TestFileLimitsAsOrdinaryUser(t *testing.T) {
	needRoot(t)
	d := startAs(t, &syscall.Credential{Uid: 65534, Gid: 65534}, "--limits-disk-bytes=64MiB")
	c := d.dial()
	_, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: argv("true"), Limits: &executorv1.Limits{DiskBytes: 64 << 20}})
	if status.Code(err) != codes.FailedPrecondition || client.Reason(err) != "LIMIT_NOT_ENFORCEABLE" || client.Metadata(err)["field"] != "limits.disk_bytes" {
		t.Errorf("%v %v", err, client.Metadata(err))
	}
	k := execute(t, c, &executorv1.ExecuteRequest{
		Command: bash("ulimit -n; ulimit -n 65 || echo refused"), Limits: &executorv1.Limits{OpenFiles: 64},
	})
	if k.stdout() != "64\nrefused\n" {
		t.Errorf("%q, %q", k.stdout(), k.stderr())
	}
	out, _, _ := d.ctl("admin", "info")
	if !strings.Contains(out, "limit.disk") || !strings.Contains(fmt.Sprint(out), "limit.open_files") {
		t.Errorf("admin info: %s", out)
	}
}
