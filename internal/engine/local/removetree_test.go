package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// outside makes a directory that no removal may touch, and looks at its end that none did.
func outside(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "file"), []byte("keep"), 0o640), os.Mkdir(filepath.Join(dir, "closed"), 0o000)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		text, err := os.ReadFile(filepath.Join(dir, "file"))
		if err != nil || string(text) != "keep" {
			t.Errorf("the file outside: %q, %v", text, err)
		}
		if info, err := os.Stat(filepath.Join(dir, "file")); err != nil || info.Mode().Perm() != 0o640 {
			t.Errorf("the file outside: %v, %v", info, err)
		}
		if info, err := os.Stat(filepath.Join(dir, "closed")); err != nil || info.Mode().Perm() != 0 {
			t.Errorf("the directory outside was opened: %v, %v", info, err)
		}
		_ = os.Chmod(filepath.Join(dir, "closed"), 0o700)
	})
	return dir
}

func TestRemoveTree(t *testing.T) {
	for name, build := range map[string]func(t *testing.T, dir, outside string) error{
		"nothing":  func(t *testing.T, dir, outside string) error { return os.Remove(dir) },
		"an empty": func(t *testing.T, dir, outside string) error { return nil },
		"files and directories": func(t *testing.T, dir, outside string) error {
			return errors.Join(os.MkdirAll(filepath.Join(dir, "a/b/c"), 0o755), os.WriteFile(filepath.Join(dir, "a/b/file"), nil, 0o000))
		},
		"directories closed to everybody": func(t *testing.T, dir, outside string) error {
			err := os.MkdirAll(filepath.Join(dir, "a/b/c"), 0o755)
			for _, d := range []string{"a/b/c", "a/b", "a", ""} {
				err = errors.Join(err, os.Chmod(filepath.Join(dir, d), 0o000))
			}
			return err
		},
		"directories closed in part": func(t *testing.T, dir, outside string) error {
			var err error
			for i, mode := range []fs.FileMode{0o100, 0o200, 0o300, 0o400, 0o500, 0o600, 0o077} {
				d := filepath.Join(dir, fmt.Sprint(i))
				err = errors.Join(err, os.MkdirAll(filepath.Join(d, "below"), 0o755), os.WriteFile(filepath.Join(d, "file"), nil, 0o644), os.Chmod(d, mode))
			}
			return err
		},
		"links outside": func(t *testing.T, dir, outside string) error {
			return errors.Join(os.Symlink(outside, filepath.Join(dir, "directory")), os.Symlink(filepath.Join(outside, "file"), filepath.Join(dir, "file")),
				os.Symlink(filepath.Join(outside, "closed"), filepath.Join(dir, "closed")), os.Link(filepath.Join(outside, "file"), filepath.Join(dir, "hard")),
				os.Symlink("..", filepath.Join(dir, "up")), os.Symlink("self", filepath.Join(dir, "self")), os.Symlink("/nowhere", filepath.Join(dir, "dangling")))
		},
		"pipes, sockets and odd names": func(t *testing.T, dir, outside string) error {
			f, err := bindSocket(filepath.Join(dir, "socket"))
			if err != nil {
				return err
			}
			f.Close()
			err = syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o000)
			for _, n := range []string{"\n", " ", "-rf", "...", strings.Repeat("n", 255), "\xff\xfe", "*", "deep-1"} {
				err = errors.Join(err, os.Mkdir(filepath.Join(dir, n), 0o755))
			}
			return err
		},
		"many names": func(t *testing.T, dir, outside string) error {
			var err error
			for i := range 3000 {
				err = errors.Join(err, os.WriteFile(filepath.Join(dir, fmt.Sprint("f", i)), nil, 0o600))
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			out := outside(t)
			dir := filepath.Join(t.TempDir(), "tree")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := build(t, dir, out); err != nil {
				t.Fatal(err)
			}
			if err := removeTree(dir); err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("it is left: %v", err)
				_ = os.RemoveAll(dir)
			}
		})
	}
}

// nest makes directories inside each other, deeper than a path can say, and returns to
// where it was. Each is closed to its own owner.
func nest(t *testing.T, dir string, depth int) {
	t.Helper()
	at, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range depth {
		if err := errors.Join(unix.Mkdirat(at, "d", 0o700), unix.Symlinkat("/", at, "link")); err != nil {
			t.Fatal(err)
		}
		below, err := unix.Openat(at, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if i%3 == 0 && i > 0 {
			if err := unix.Fchmod(at, 0o000); err != nil {
				t.Fatal(err)
			}
		}
		unix.Close(at)
		at = below
	}
	unix.Close(at)
}

func TestRemoveDeepTreeWithFewDescriptors(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep")
	// Names that the removal would like to use are taken, as by one that was cut off.
	if err := errors.Join(os.Mkdir(dir, 0o755), os.MkdirAll(filepath.Join(dir, "deep-1/x"), 0o755), os.WriteFile(filepath.Join(dir, "deep-2"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	nest(t, dir, 3000)
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	highest := 0
	for _, f := range open {
		highest = max(highest, atoi(t, f.Name()))
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: uint64(highest + maxOpen + 10), Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	err = removeTree(dir)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is left: %v", err)
	}
}
