package layercopy_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/harvest-run/executord/internal/engine/local/layercopy"
)

// tell describes a tree so that two that differ in anything that counts differ in it.
func tell(t *testing.T, root string) string {
	t.Helper()
	var lines []string
	inodes := make(map[uint64]string)
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		line := fmt.Sprintf("%q mode %o owner %d:%d mtime %d.%09d", name, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size %d sum %x", len(text), bytes.Count(text, []byte{7})+len(bytes.Trim(text, "\x00")))
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" device %d", st.Rdev)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			if first, ok := inodes[st.Ino]; ok {
				line += " is " + first
			}
			inodes[st.Ino] = name
		}
		for _, attr := range []string{"user.a", "user.overlay.opaque", "user.overlay.origin", "user.overlay.overlay.opaque", "security.capability"} {
			value := make([]byte, 100)
			if n, err := unix.Lgetxattr(path, attr, value); err == nil {
				line += fmt.Sprintf(" %s=%x", attr, value[:n])
			}
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func must(t testing.TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// everything makes one of each kind of file.
func everything(t *testing.T, dir string) {
	t.Helper()
	at := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.MkdirAll(at("d/e/f"), 0o755), os.WriteFile(at("d/file"), []byte("text"), 0o640), os.WriteFile(at("empty"), nil, 0o400),
		os.Link(at("d/file"), at("d/e/hard")), os.Symlink("d/file", at("soft")), os.Symlink("/etc/shadow", at("far")),
		os.Link(at("soft"), at("soft-hard")), unix.Mkfifo(at("pipe"), 0o606), os.Chmod(at("pipe"), 0o606), unix.Mknod(at("deleted"), unix.S_IFCHR, 0),
		os.Link(at("deleted"), at("d/deleted-too")), unix.Setxattr(at("d/file"), "user.a", []byte("b\x00c"), 0),
		unix.Setxattr(at("d/e"), "user.overlay.opaque", []byte("y"), 0), unix.Setxattr(at("d/e"), "user.overlay.overlay.opaque", []byte("y"), 0),
		os.WriteFile(at("program"), []byte("#!"), 0o755), os.Chmod(at("d/e/f"), 0o1777|fs.ModeSticky))
	f, err := os.Create(at("holes"))
	must(t, err)
	_, one := f.WriteAt([]byte("begin"), 3<<20)
	_, two := f.WriteAt(bytes.Repeat([]byte("7"), 1<<20), 100<<20)
	must(t, one, two, f.Truncate(200<<20), f.Close())
	l, err := net.Listen("unix", at("d/socket"))
	must(t, err)
	t.Cleanup(func() { l.Close() })
	if os.Geteuid() == 0 {
		must(t, os.Lchown(at("d/file"), 1000, 1001), os.Lchown(at("soft"), 7, 8), os.Lchown(at("d"), 9, 65535), os.Lchown(at("program"), 33, 33),
			unix.Setxattr(at("program"), "security.capability", []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 0))
	}
	must(t, os.Chmod(at("program"), 0o755|fs.ModeSetuid))
	for _, name := range []string{"d/file", "program", "d/e", "d"} {
		must(t, os.Chtimes(at(name), time.Unix(1, 2), time.Unix(981173106, 789)))
	}
}

func TestCopy(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "copy")
	everything(t, from)
	must(t, os.Chmod(from, 0o711), unix.Setxattr(filepath.Join(from, "d/file"), "user.overlay.origin", []byte("handle"), 0))
	must(t, layercopy.Copy(t.Context(), from, to, nil))
	must(t, os.Remove(filepath.Join(from, "d/socket")), unix.Removexattr(filepath.Join(from, "d/file"), "user.overlay.origin"))
	must(t, os.Chtimes(filepath.Join(from, "d"), time.Unix(1, 2), time.Unix(981173106, 789)))
	if got, want := tell(t, to), tell(t, from); got != want {
		t.Errorf("the copy is\n%s\nwant\n%s", got, want)
	}
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(to, "holes"), &st))
	if st.Blocks*512 > 8<<20 {
		t.Errorf("the holes take %d bytes", st.Blocks*512)
	}
	// Nothing is shared.
	must(t, os.WriteFile(filepath.Join(from, "d/file"), []byte("changed"), 0))
	if text, err := os.ReadFile(filepath.Join(to, "d/file")); string(text) != "text" || err != nil {
		t.Errorf("%q, %v", text, err)
	}
}

func TestCopySkips(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "copy")
	everything(t, from)
	var seen []string
	must(t, layercopy.Copy(t.Context(), from, to, func(path string) bool {
		seen = append(seen, path)
		return path == "d" || path == "soft"
	}))
	for _, name := range []string{"d", "soft"} {
		if _, err := os.Lstat(filepath.Join(to, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(to, "soft-hard")); err != nil || slices.Contains(seen, "d/e") || !slices.Contains(seen, "empty") {
		t.Errorf("%v, seen %q", err, seen)
	}
}

func TestCopyRefuses(t *testing.T) {
	from := t.TempDir()
	deep := from
	for range layercopy.MaxDepth {
		deep = filepath.Join(deep, "d")
	}
	must(t, os.MkdirAll(deep, 0o755))
	if err := layercopy.Copy(t.Context(), from, filepath.Join(t.TempDir(), "copy"), nil); !errors.Is(err, layercopy.ErrTooDeep) {
		t.Errorf("too deep: %v", err)
	}
	must(t, os.Remove(deep))
	must(t, layercopy.Copy(t.Context(), from, filepath.Join(t.TempDir(), "copy"), nil))

	bad := errors.New("bad")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(bad)
	if err := layercopy.Copy(ctx, from, filepath.Join(t.TempDir(), "copy"), nil); !errors.Is(err, bad) {
		t.Errorf("nobody waits: %v", err)
	}
	if err := layercopy.Copy(t.Context(), from, t.TempDir(), nil); !errors.Is(err, fs.ErrExist) {
		t.Errorf("onto something: %v", err)
	}
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(from, link))
	if err := layercopy.Copy(t.Context(), link, filepath.Join(t.TempDir(), "copy"), nil); err == nil {
		t.Error("a link was followed")
	}
}

// The model of Merge is the kernel: an overlay of random layers looks the same whether
// they lie over one another or were made one. Made by an overlay as well, in a user
// namespace's way of writing.
func TestMergeLooksTheSame(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root; the copies are the same for an ordinary user")
	}
	for seed := range uint64(25) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			dir := t.TempDir()
			base := filepath.Join(dir, "base")
			must(t, os.Mkdir(base, 0o755))
			change(t, r, base, 40)
			lower := []string{base}
			var layers []string // uppermost first
			for n := range 4 {
				upper := filepath.Join(dir, fmt.Sprintf("upper-%d", n))
				mounted(t, lower, upper, func(at string) { change(t, r, at, 40) })
				lower = append([]string{upper}, lower...)
				layers = append([]string{upper}, layers...)
			}
			one := filepath.Join(dir, "one")
			must(t, layercopy.Copy(t.Context(), layers[0], one, nil))
			for _, below := range layers[1:] {
				must(t, layercopy.Merge(t.Context(), below, one))
			}
			must(t, layercopy.Settle(t.Context(), one, base))
			var want, got string
			mounted(t, lower, filepath.Join(dir, "look-a"), func(at string) { want = contents(t, at) })
			mounted(t, []string{one, base}, filepath.Join(dir, "look-b"), func(at string) { got = contents(t, at) })
			if got != want {
				t.Errorf("as one layer:\n%s\nwant\n%s", got, want)
			}
			if want == "" {
				t.Error("there is nothing in it")
			}
		})
	}
}

// mounted calls f with the place where an overlay is mounted.
func mounted(t *testing.T, lower []string, upper string, f func(at string)) {
	t.Helper()
	work, at := upper+".work", upper+".at"
	must(t, os.MkdirAll(upper, 0o755), os.Mkdir(work, 0o755), os.Mkdir(at, 0o755))
	options := "userxattr,lowerdir=" + strings.Join(lower, ":") + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", at, "overlay", 0, options); err != nil {
		t.Fatalf("mount (%s): %v", options, err)
	}
	defer func() { must(t, unix.Unmount(at, 0)) }()
	f(at)
}

// change does random things to a tree.
func change(t *testing.T, r *rand.Rand, root string, steps int) {
	t.Helper()
	name := func() string {
		parts := []string{root}
		for range 1 + r.IntN(3) {
			parts = append(parts, string(rune('a'+r.IntN(4))))
		}
		return filepath.Join(parts...)
	}
	for n := range steps {
		path := name()
		// Errors are as good as anything: something else is in the way.
		switch r.IntN(6) {
		case 0:
			_ = os.RemoveAll(path)
		case 1, 2:
			_ = os.MkdirAll(path, 0o755)
		case 3:
			_ = os.WriteFile(path, fmt.Appendf(nil, "%d %d", n, r.Uint64()), 0o644)
		case 4:
			_ = os.Rename(path, name())
		case 5:
			_ = os.Chmod(path, fs.FileMode(0o700|r.IntN(0o100)))
		}
	}
}

func contents(t *testing.T, root string) string {
	t.Helper()
	var text strings.Builder
	must(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		fmt.Fprintf(&text, "%s %v", name, info.Mode())
		if d.Type().IsRegular() {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&text, " %s", content)
		}
		text.WriteByte('\n')
		return nil
	}))
	return text.String()
}
