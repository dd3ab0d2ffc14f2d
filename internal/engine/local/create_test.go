package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
	"golang.org/x/sys/unix"
)

func TestWithShortPath(t *testing.T) {
	dir := t.TempDir()
	long := dir
	for len(long) < 200 {
		long = filepath.Join(long, "a-directory-with-a-long-name")
	}
	if err := os.MkdirAll(long, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(dir, "s"), filepath.Join(long, "s")} {
		f, err := bindSocket(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if info, err := os.Stat(path); err != nil || info.Mode()&fs.ModeSocket == 0 {
			t.Errorf("%s: %v, %v, want a socket", path, info, err)
		}
		err = withShortPath(path, func(short string) error {
			if len(short) > 107 {
				t.Errorf("%q has %d bytes", short, len(short))
			}
			_, err := os.Stat(short)
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	if err := withShortPath(filepath.Join(long, "missing", "s"), func(string) error { return nil }); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory that is not there: %v", err)
	}
}

func TestLongStateDirectory(t *testing.T) {
	cfg := freshConfig(t)
	for len(cfg.StateDir) < 200 {
		cfg.StateDir = filepath.Join(cfg.StateDir, "a-directory-with-a-long-name")
	}
	noteKey(t, cfg)
	e := engineOver(t, cfg)
	sb := sandboxFor(t, e, engine.Spec{ID: strings.Repeat("l", 63)})
	if out, err := runPython(t.Context(), sb, "x", `print("alive")`); err != nil || out.stdout != "alive\n" {
		t.Errorf("%v, %v", out, err)
	}
}

// Whatever umask executord was started with, other users in a sandbox get through.
func TestUmask(t *testing.T) {
	cfg := freshConfig(t)
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	e := engineOver(t, cfg)
	sb := sandboxFor(t, e, engine.Spec{ID: "masked"})
	out, err := runPython(t.Context(), sb, "modes", `import os
print(*[oct(os.stat(p).st_mode & 0o7777) for p in ("/", "/usr", "/etc", "/etc/passwd", "/tmp", "/dev/shm", "/dev/null", "/run")])`)
	if want := "0o755 0o755 0o755 0o644 0o1777 0o1777 0o666 0o755\n"; err != nil || out.stdout != want {
		t.Errorf("%v, %v, want %q", out, err, want)
	}
}

// Directories that the configuration names are seen, and writes to them stay in the sandbox.
func TestExtraPaths(t *testing.T) {
	cfg := testConfig(t)
	shown := filepath.Join(t.TempDir(), "shown")
	if err := errors.Join(os.Mkdir(shown, 0o755), os.WriteFile(filepath.Join(shown, "file"), []byte("of the host"), 0o644)); err != nil {
		t.Fatal(err)
	}
	cfg.ExtraPaths = []string{shown}
	e := engineOver(t, cfg)
	sb := sandboxFor(t, e, engine.Spec{ID: "extra"})
	out, err := runPython(t.Context(), sb, "use", fmt.Sprintf(`import os
d = %q
print(open(d + "/file").read(), os.listdir(os.path.dirname(d)))
open(d + "/file", "a").write("x"); open(d + "/made", "w")`, shown))
	if want := "of the host ['shown']\n"; err != nil || out.stdout != want || out.stderr != "" {
		t.Errorf("%v, %v, want %q", out, err, want)
	}
	if got := listing(t, shown); strings.Count(got, "\n") != 1 || !strings.Contains(got, "file -rw-r--r-- 11") {
		t.Errorf("on the host: %s", got)
	}
}

// What executord was started with, or opens later and forgets to mark, does not go on
// to the process that forks guests or to a guest, which would hand it to every command.
func TestInheritedDescriptorsAreKept(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "inherited")
	if err := os.WriteFile(secret, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	inherit := func() {
		t.Helper()
		fd, err := unix.Open(secret, unix.O_RDONLY, 0) // and not close-on-exec
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
	}
	inherit()
	e := newEngine(t)
	inherit()
	sb := sandboxFor(t, e, engine.Spec{ID: "heir"}).(*sandbox)
	for name, pid := range map[string]int{"the process that forks guests": e.forker.process.Pid, "the guest": sb.process.pid} {
		dir := "/proc/" + strconv.Itoa(pid) + "/fd"
		entries, err := os.ReadDir(dir)
		if os.Geteuid() != 0 && errors.Is(err, fs.ErrPermission) {
			continue // the guest, which is undumpable
		}
		if err != nil || len(entries) < 4 {
			t.Errorf("%s has %d descriptors, %v", name, len(entries), err)
		}
		for _, f := range entries {
			if link, _ := os.Readlink(filepath.Join(dir, f.Name())); link == secret {
				t.Errorf("%s has descriptor %s", name, f.Name())
			}
		}
	}
}

// A service manager may protect executord from the host's out-of-memory killer; what
// runs in sandboxes does not get that.
func TestProtectionIsNotInherited(t *testing.T) {
	own := filepath.Join(t.TempDir(), "oom_score_adj")
	for text, want := range map[string]string{"-500\n": "0", "-1\n": "0", "0\n": "300", "200\n": "300"} {
		if err := os.WriteFile(own, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Down to what it was born with, a score may be set back without privileges.
		file := "/proc/" + strconv.Itoa(cmd.Process.Pid) + "/oom_score_adj"
		if err := errors.Join(os.WriteFile(file, []byte("300"), 0), unprotect(cmd.Process.Pid, own)); err != nil {
			t.Error(err)
		}
		if got, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("of an executord with %q: %q, %v, want %s", text, got, err, want)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	if err := unprotect(os.Getpid(), own+"x"); err == nil {
		t.Error("a score that cannot be read is no error")
	}
}
