package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

func kindOf(err error) guestv1.Error_Kind {
	if se, ok := errors.AsType[*startError](err); ok {
		return se.kind
	}
	return guestv1.Error_KIND_UNSPECIFIED
}

func TestLookPath(t *testing.T) {
	root := t.TempDir()
	for path, mode := range map[string]os.FileMode{
		"a/tool": 0o755, "b/tool": 0o755, "b/only": 0o755, "a/plain": 0o644, "b/plain": 0o755, "a/never": 0o600, "work/here": 0o755, "work/sub/there": 0o755,
	} {
		file := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(root+"/a/dir", 0o755); err != nil {
		t.Fatal(err)
	}
	both := "PATH=" + root + "/a:" + root + "/b"
	for name, c := range map[string]struct {
		program string
		env     []string
		want    string
		kind    guestv1.Error_Kind
	}{
		"first in PATH":                {"tool", []string{both}, "a/tool", 0},
		"later in PATH":                {"only", []string{both}, "b/only", 0},
		"past one that is no program":  {"plain", []string{both}, "b/plain", 0},
		"past one that is a directory": {"dir", []string{both}, "", guestv1.Error_KIND_NOT_EXECUTABLE},
		"only one that is no program":  {"never", []string{both}, "", guestv1.Error_KIND_NOT_EXECUTABLE},
		"nowhere":                      {"none", []string{both}, "", guestv1.Error_KIND_NO_SUCH_PROGRAM},
		"the last PATH counts":         {"tool", []string{"PATH=/nowhere", both}, "a/tool", 0},
		"PATH with what is not there":  {"only", []string{"PATH=/nowhere:/etc/passwd:" + root + "/b"}, "b/only", 0},
		"an empty element of PATH":     {"here", []string{"PATH=/nowhere::"}, "work/here", 0},
		"a relative element of PATH":   {"there", []string{"PATH=sub"}, "work/sub/there", 0},
		"an empty PATH":                {"sh", []string{"PATH="}, "", guestv1.Error_KIND_NO_SUCH_PROGRAM},
		"absolute":                     {root + "/a/tool", nil, "a/tool", 0},
		"relative":                     {"./here", []string{both}, "work/here", 0},
		"relative, deeper":             {"sub/there", []string{both}, "work/sub/there", 0},
		"relative, upwards":            {"../b/only", []string{both}, "b/only", 0},
		"relative, not there":          {"./tool", []string{both}, "", guestv1.Error_KIND_NO_SUCH_PROGRAM},
		"no name":                      {"", []string{both}, "", guestv1.Error_KIND_NO_SUCH_PROGRAM},
		"a name that is too long":      {strings.Repeat("x", 300), []string{both}, "", guestv1.Error_KIND_NO_SUCH_PROGRAM},
		"a path that is too long":      {"/" + strings.Repeat("x/", 5000), []string{both}, "", guestv1.Error_KIND_NO_SUCH_PROGRAM},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := lookPath(c.program, c.env, root+"/work")
			if kindOf(err) != c.kind || (err == nil) != (c.kind == 0) {
				t.Fatalf("%q, %v", got, err)
			}
			if err == nil && got != filepath.Join(root, c.want) {
				t.Errorf("found %q, want %s", got, c.want)
			}
		})
	}
	t.Run("without PATH", func(t *testing.T) {
		got, err := lookPath("sh", nil, "/")
		if err != nil || got != "/bin/sh" {
			t.Errorf("%q, %v", got, err)
		}
	})
}

func TestShebang(t *testing.T) {
	for text, want := range map[string]string{
		"#!/bin/sh\n":                       "/bin/sh",
		"#!/bin/sh":                         "/bin/sh",
		"#! \t/usr/bin/env python3\n":       "/usr/bin/env",
		"#!/bin/sh\t-e\n":                   "/bin/sh",
		"#!/bin/sh\r\n":                     "/bin/sh\r",
		"#!/a\x00b\n":                       "/a",
		"#!\n/bin/sh\n":                     "",
		"#!":                                "",
		"#!   \n":                           "",
		"":                                  "",
		"#":                                 "",
		" #!/bin/sh\n":                      "",
		"\x7fELF":                           "",
		"#!/" + strings.Repeat("x", 300):    "/" + strings.Repeat("x", 253),
		"#!/bin/sh\n#!" + "/other/sh\n":     "/bin/sh",
		"#!interpreter relative to nobody ": "interpreter",
	} {
		file := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		if got := shebang(file); got != want {
			t.Errorf("%.40q names the interpreter %q, want %q", text, got, want)
		}
	}
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o777); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{dir, fifo, dir + "/none", "/dev/zero"} {
		if got := shebang(file); got != "" { // and it must return
			t.Errorf("%s names the interpreter %q", file, got)
		}
	}
}

func FuzzShebang(f *testing.F) {
	f.Add([]byte("#!/bin/sh -e\n"))
	f.Add([]byte("#! \t"))
	f.Fuzz(func(t *testing.T, head []byte) {
		got := parseShebang(head)
		if strings.ContainsAny(got, " \t\n\x00") || len(got) > len(head) {
			t.Errorf("%q names the interpreter %q", head, got)
		}
	})
}

func TestExecError(t *testing.T) {
	for errno, want := range map[syscall.Errno]guestv1.Error_Kind{
		syscall.ENOENT:  guestv1.Error_KIND_NO_SUCH_PROGRAM,
		syscall.ENOEXEC: guestv1.Error_KIND_NOT_EXECUTABLE,
		syscall.EACCES:  guestv1.Error_KIND_NOT_EXECUTABLE,
		syscall.EPERM:   guestv1.Error_KIND_NOT_EXECUTABLE,
		syscall.E2BIG:   guestv1.Error_KIND_NOT_EXECUTABLE,
		syscall.ETXTBSY: guestv1.Error_KIND_NOT_EXECUTABLE,
		syscall.ELIBBAD: guestv1.Error_KIND_NOT_EXECUTABLE,
		syscall.EAGAIN:  guestv1.Error_KIND_EXHAUSTED,
		syscall.ENOMEM:  guestv1.Error_KIND_EXHAUSTED,
		syscall.EMFILE:  guestv1.Error_KIND_EXHAUSTED,
		syscall.ENFILE:  guestv1.Error_KIND_EXHAUSTED,
		syscall.EINVAL:  guestv1.Error_KIND_INTERNAL,
	} {
		err := execError("/bin/sh", errno)
		if got := errorOf(err); got.GetKind() != want || !strings.Contains(got.GetMessage(), "/bin/sh") {
			t.Errorf("%v becomes %v", errno, got)
		}
	}
}

func TestErrorOf(t *testing.T) {
	for name, err := range map[string]error{
		"long":            errors.New(strings.Repeat("x", 10<<10)),
		"long and wide":   errors.New(strings.Repeat("ü", 10<<10)),
		"not UTF-8":       errors.New("open \xff\xfe: nonsense"),
		"wrapped refusal": fmt.Errorf("start: %w", refuse(guestv1.Error_KIND_EXHAUSTED, "%s", strings.Repeat("y", 5000))),
	} {
		e := errorOf(err)
		if len(e.GetMessage()) > maxErrorText || strings.ToValidUTF8(e.GetMessage(), "") != e.GetMessage() || e.GetMessage() == "" {
			t.Errorf("%s: %.50q of %d bytes", name, e.GetMessage(), len(e.GetMessage()))
		}
	}
	if kind := errorOf(fmt.Errorf("start: %w", refuse(guestv1.Error_KIND_EXHAUSTED, "x"))).GetKind(); kind != guestv1.Error_KIND_EXHAUSTED {
		t.Errorf("a wrapped refusal becomes %v", kind)
	}
}

func TestResourceError(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.ENOMEM} {
		if err := resourceError(fmt.Errorf("write: %w", errno)); kindOf(err) != guestv1.Error_KIND_EXHAUSTED {
			t.Errorf("%v: %v", errno, err)
		}
	}
	if err := resourceError(os.ErrPermission); err != os.ErrPermission {
		t.Errorf("an error of another kind became %v", err)
	}
}

func TestWriteSourceOnAFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("no tmpfs can be mounted: ", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	if _, err := writeSource(dir+"/run/x", "main.py", make([]byte, 1<<20)); kindOf(err) != guestv1.Error_KIND_EXHAUSTED {
		t.Errorf("%v", err)
	}
	if path, err := writeSource(dir+"/run/x", "main.py", []byte("pass")); err != nil || path != dir+"/run/x/main.py" {
		t.Errorf("after the first was taken away: %q, %v", path, err)
	}
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{
		"x": true, "01jd-9": true, strings.Repeat("a", 63): true,
		"": false, strings.Repeat("a", 64): false, "A": false, "a.b": false, "a/b": false, "..": false, "a\x00": false, "ü": false, "a b": false,
	} {
		if validID(id) != want {
			t.Errorf("%q is valid: %v", id, !want)
		}
	}
}

func TestMilliseconds(t *testing.T) {
	if d := milliseconds(1 << 63); d < 0 || d.Hours() < 24*365*10 {
		t.Errorf("the largest number of milliseconds is %v", d)
	}
	if d := milliseconds(1500); d.Seconds() != 1.5 {
		t.Errorf("1500 ms are %v", d)
	}
}
