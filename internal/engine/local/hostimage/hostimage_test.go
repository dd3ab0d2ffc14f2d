package hostimage

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// file is a file of a fake host: its content, or where it links to.
type file struct {
	text, link string
	mode       fs.FileMode
}

// fakeHost makes the root of a host.
func fakeHost(t *testing.T, files map[string]file) string {
	t.Helper()
	root := t.TempDir()
	for path, f := range files {
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		switch {
		case f.link != "":
			err = os.Symlink(f.link, full)
		case strings.HasSuffix(path, "/"):
			if err = os.MkdirAll(full, 0o755); err == nil {
				err = os.Chmod(full, f.mode)
			}
		default:
			if err = os.WriteFile(full, []byte(f.text), 0o600); err == nil {
				err = os.Chmod(full, f.mode)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { // what an ordinary user closed to itself
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if d != nil && d.IsDir() {
				_ = os.Chmod(path, 0o700)
			}
			return nil
		})
	})
	return root
}

// debian is a small host of today.
func debian() map[string]file {
	return map[string]file{
		"usr/bin/true": {text: "program", mode: 0o755}, "usr/lib/": {mode: 0o755}, "usr/lib64/": {mode: 0o755}, "usr/sbin/": {mode: 0o755},
		"bin": {link: "usr/bin"}, "sbin": {link: "usr/sbin"}, "lib": {link: "usr/lib"}, "lib64": {link: "usr/lib64"},
		"etc/ld.so.cache":     {text: "cache", mode: 0o644},
		"etc/os-release":      {link: "../usr/lib/os-release"},
		"etc/ssl/certs/a.pem": {text: "certificate", mode: 0o644}, "etc/ssl/certs/b.pem": {link: "/usr/share/ca-certificates/b.crt"},
		"etc/ssl/openssl.cnf":   {text: "conf", mode: 0o644},
		"etc/alternatives/java": {link: "/usr/lib/jvm/bin/java"},
		"etc/passwd":            {text: "root:x:0:0:the host's:/root:/bin/sh\n", mode: 0o644},
	}
}

// tree lists what is under a directory.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	got := make(map[string]string)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		got[rel] = info.Mode().String()
		if link, err := os.Readlink(path); err == nil {
			got[rel] = "-> " + link
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

const testBoot = "0b007-1d-of-the-tests"

func images(dir, host string, extra ...string) *Images {
	return New(Config{Dir: dir, Host: host, Boot: testBoot, Extra: extra})
}

func prepare(t *testing.T, dir, host string, extra ...string) *Image {
	t.Helper()
	img, err := images(dir, host, extra...).Prepare()
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestSkeleton(t *testing.T) {
	host, dir := fakeHost(t, debian()), t.TempDir()
	// Whatever umask executord was started with.
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	img := prepare(t, dir, host)
	if !slices.Equal(img.Trees, []string{"/usr"}) {
		t.Errorf("trees %q", img.Trees)
	}
	got := tree(t, img.Skeleton)
	want := map[string]string{
		".": "drwxr-xr-x", "bin": "-> usr/bin", "sbin": "-> usr/sbin", "lib": "-> usr/lib", "lib64": "-> usr/lib64",
		"usr": "drwxr-xr-x", "tmp": "dtrwxrwxrwx", "var/tmp": "dtrwxrwxrwx", "root": "drwx------", "proc": "dr-xr-xr-x", "sys": "dr-xr-xr-x",
		"workspace": "drwxr-xr-x", "home": "drwxr-xr-x", "etc": "drwxr-xr-x", "var/lib": "drwxr-xr-x",
		"etc/passwd": "-rw-r--r--", "etc/group": "-rw-r--r--", "etc/hosts": "-rw-r--r--", "etc/mtab": "-> ../proc/self/mounts",
		"etc/ld.so.cache": "-rw-r--r--", "etc/os-release": "-> ../usr/lib/os-release",
		"etc/ssl": "drwxr-xr-x", "etc/ssl/certs": "drwxr-xr-x", "etc/ssl/certs/a.pem": "-rw-r--r--", "etc/ssl/certs/b.pem": "-> /usr/share/ca-certificates/b.crt",
		"etc/alternatives": "drwxr-xr-x", "etc/alternatives/java": "-> /usr/lib/jvm/bin/java",
	}
	for path, mode := range want {
		if got[path] != mode {
			t.Errorf("%s: %q, want %q", path, got[path], mode)
		}
	}
	if _, ok := got["usr/bin"]; ok {
		t.Error("the host's /usr was copied")
	}
	text, err := os.ReadFile(filepath.Join(img.Skeleton, "etc/passwd"))
	if err != nil || strings.Contains(string(text), "host") {
		t.Errorf("passwd is the host's: %q, %v", text, err)
	}
	if text, err := os.ReadFile(filepath.Join(img.Skeleton, "etc/ssl/certs/a.pem")); err != nil || string(text) != "certificate" {
		t.Errorf("certificate %q, %v", text, err)
	}
}

func TestNothingPrivateIsCopied(t *testing.T) {
	const secret = "the secret"
	files := debian()
	for path, mode := range map[string]fs.FileMode{
		// Not named.
		"etc/shadow": 0o644, "etc/ssh/ssh_host_ed25519_key": 0o644, "etc/environment": 0o644, "etc/sudoers": 0o644, "etc/machine-id": 0o644,
		"etc/ssl/private/key.pem": 0o644, "etc/fstab": 0o644, "etc/cron.d/job": 0o644, "etc/secret.conf": 0o644, "etc/wpa_supplicant/wifi.conf": 0o644,
		"root/.ssh/id_ed25519": 0o644, "home/user/.netrc": 0o644, "var/lib/data": 0o644, "srv/data": 0o644, "opt/app/config": 0o644, "data/x": 0o644,
		// Named, or in what is named, and not everybody's.
		"etc/login.defs": 0o600, "etc/ld.so.conf.d/secret.conf": 0o640, "etc/ssl/certs/key.pem": 0o600, "etc/java-17/security/keystore": 0o660,
		"etc/alternatives/private": 0o400,
		// Everybody's by its own mode, in a directory that is not.
		"etc/perl/closed/file": 0o644, "etc/perl/searchable/deep/file": 0o644, "etc/vim/file": 0o644,
	} {
		files[path] = file{text: secret, mode: mode}
	}
	// Not everybody's, and reached by a link from what is copied.
	files["etc/ssl/certs/stolen.pem"] = file{link: "../private/key.pem"}
	files["etc/alternatives/stolen"] = file{link: "/etc/shadow"}
	host := fakeHost(t, files)
	for dir, mode := range map[string]fs.FileMode{"etc/perl/closed": 0o700, "etc/perl/searchable": 0o711, "etc/vim": 0o750} {
		if err := os.Chmod(filepath.Join(host, dir), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(host, "etc/perl/fifo"), 0o666); err != nil {
		t.Fatal(err)
	}
	img := prepare(t, t.TempDir(), host)
	err := filepath.WalkDir(img.Skeleton, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 {
			return nil // what it names is not in the sandbox
		}
		if !d.Type().IsRegular() {
			t.Errorf("%s: a %v was copied", path, d.Type())
			return nil
		}
		text, err := os.ReadFile(path)
		if strings.Contains(string(text), secret) {
			t.Errorf("%s has a secret", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	got := tree(t, img.Skeleton)
	if got["etc/perl"] == "" || got["etc/java-17"] == "" || got["etc/ssl/certs/a.pem"] == "" {
		t.Error("what is everybody's was left out too, so nothing was shown")
	}
	for _, dir := range []string{"etc/perl/closed", "etc/perl/searchable", "etc/vim"} {
		if got[dir] != "" {
			t.Errorf("%s is there: even its names are private", dir)
		}
	}
}

func TestLayoutsOfHosts(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]file
		extra []string
		trees []string
		have  map[string]string
	}{
		"links, as today": {debian(), nil, []string{"/usr"}, map[string]string{"bin": "-> usr/bin", "lib64": "-> usr/lib64"}},
		"directories, as of old": {
			map[string]file{"usr/bin/env": {mode: 0o755}, "bin/sh": {mode: 0o755}, "sbin/init": {mode: 0o755}, "lib/libc.so": {mode: 0o644}, "lib64/ld.so": {mode: 0o755}, "etc/": {mode: 0o755}},
			nil, []string{"/bin", "/lib", "/lib64", "/sbin", "/usr"},
			map[string]string{"bin": "drwxr-xr-x", "lib": "drwxr-xr-x", "lib64": "drwxr-xr-x", "sbin": "drwxr-xr-x"},
		},
		"mixed, without lib64": {
			map[string]file{"usr/lib/x": {mode: 0o644}, "bin/sh": {mode: 0o755}, "lib": {link: "usr/lib"}, "sbin": {link: "bin"}, "etc/": {mode: 0o755}},
			nil, []string{"/bin", "/usr"}, map[string]string{"bin": "drwxr-xr-x", "lib": "-> usr/lib", "sbin": "-> bin"},
		},
		"absolute links": {
			map[string]file{"usr/bin/x": {mode: 0o644}, "bin": {link: "/usr/bin"}, "etc/": {mode: 0o755}},
			nil, []string{"/usr"}, map[string]string{"bin": "-> /usr/bin"},
		},
		"a file where a directory should be": {
			map[string]file{"usr/bin/x": {mode: 0o644}, "libx32": {text: "x", mode: 0o644}, "etc/": {mode: 0o755}},
			nil, []string{"/usr"}, map[string]string{},
		},
		"extra directories": {
			map[string]file{"usr/bin/x": {mode: 0o644}, "opt/tools/bin/x": {mode: 0o755}, "home/ci/cache/x": {mode: 0o644}, "etc/": {mode: 0o755}},
			[]string{"/opt/tools", "/home/ci/cache", "/opt/tools", "/usr"}, []string{"/home/ci/cache", "/opt/tools", "/usr"},
			map[string]string{"opt/tools": "drwxr-xr-x", "home/ci": "drwxr-xr-x", "home/ci/cache": "drwxr-xr-x"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			img := prepare(t, t.TempDir(), fakeHost(t, c.files), c.extra...)
			if diff := cmp.Diff(c.trees, img.Trees); diff != "" {
				t.Errorf("trees (-want +got):\n%s", diff)
			}
			got := tree(t, img.Skeleton)
			for path, mode := range c.have {
				if got[path] != mode {
					t.Errorf("%s: %q, want %q", path, got[path], mode)
				}
			}
			// Each tree has a place to be mounted at, and nothing of the host in it.
			for _, dir := range img.Trees {
				entries, err := os.ReadDir(filepath.Join(img.Skeleton, dir))
				if err != nil {
					t.Error(err)
				}
				for _, e := range entries {
					if !slices.ContainsFunc(img.Trees, func(other string) bool { return strings.HasPrefix(other, filepath.Join(dir, e.Name())) }) {
						t.Errorf("%s/%s is in the skeleton", dir, e.Name())
					}
				}
			}
		})
	}
}

func TestExtraPathsAreChecked(t *testing.T) {
	host := fakeHost(t, map[string]file{"usr/bin/x": {mode: 0o644}, "opt/file": {mode: 0o644}, "etc/": {mode: 0o755}})
	dir := t.TempDir()
	for _, extra := range []string{"", ".", "/", "opt", "/opt/", "/opt/../opt", "//opt", "/missing", "/opt/file"} {
		if _, err := images(dir, host, extra).Prepare(); err == nil {
			t.Errorf("extra path %q was accepted", extra)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestImageChangesWithTheHost(t *testing.T) {
	host, dir := fakeHost(t, debian()), t.TempDir()
	first := prepare(t, dir, host)
	// One that goes on looking, and knows the names in directories that did not change.
	kept := images(dir, host)
	past := time.Now().Add(-time.Hour)
	settle := func() {
		t.Helper()
		for _, d := range []string{"etc", "etc/ssl"} {
			// The time of the change cannot be set, but what was made of it.
			if err := os.Chtimes(filepath.Join(host, d), past, past); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := kept.Prepare(); err != nil {
			t.Fatal(err)
		}
		if kept.names.stamps == nil {
			kept.names.stamps = make(map[string]stamp)
			for _, d := range []string{"etc", "etc/ssl", "etc/pki/tls", "etc/pki/ca-trust"} {
				kept.names.stamps[filepath.Join(host, d)], _ = stampOf(filepath.Join(host, d))
			}
		}
	}
	settle()
	if again := prepare(t, dir, host); again.Skeleton != first.Skeleton || again.ID != first.ID {
		t.Errorf("the same host gave %+v, then %+v", first, again)
	}
	seen := map[string]string{first.ID: "the host as it was"}
	for _, change := range []struct {
		name string
		make func() error
	}{
		{"software was installed", func() error {
			return os.WriteFile(filepath.Join(host, "etc/ld.so.cache"), []byte("a longer cache"), 0o644)
		}},
		{"the cache was written again with the same size", func() error {
			return os.Chtimes(filepath.Join(host, "etc/ld.so.cache"), time.Time{}, time.Now().Add(time.Hour))
		}},
		{"a certificate came", func() error {
			return os.WriteFile(filepath.Join(host, "etc/ssl/certs/new.pem"), []byte("new"), 0o644)
		}},
		{"an alternative went", func() error { return os.Remove(filepath.Join(host, "etc/alternatives/java")) }},
		{"a file of the list appeared", func() error { return os.WriteFile(filepath.Join(host, "etc/inputrc"), []byte("x"), 0o644) }},
		{"a mode changed", func() error { return os.Chmod(filepath.Join(host, "etc/inputrc"), 0o600) }},
		{"lib32 appeared", func() error { return os.Symlink("usr/lib32", filepath.Join(host, "lib32")) }},
		{"sbin became a link elsewhere", func() error {
			return errors.Join(os.Remove(filepath.Join(host, "sbin")), os.Symlink("usr/bin", filepath.Join(host, "sbin")))
		}},
	} {
		time.Sleep(10 * time.Millisecond) // two changes within a tick of the file system look like one
		if err := change.make(); err != nil {
			t.Fatal(err)
		}
		img := prepare(t, dir, host)
		if before, ok := seen[img.ID]; ok {
			t.Errorf("%s: the image is that of %q", change.name, before)
		}
		seen[img.ID] = change.name
		if again, err := kept.Prepare(); err != nil || again.ID != img.ID {
			t.Errorf("%s: who looked before has %v, %v, want %s", change.name, again, err, img.ID)
		}
		settle()
		if img.Skeleton == first.Skeleton {
			t.Errorf("%s: the skeleton of live sandboxes was changed", change.name)
		}
	}
	if text, err := os.ReadFile(filepath.Join(prepare(t, dir, host).Skeleton, "etc/ld.so.cache")); err != nil || string(text) != "a longer cache" {
		t.Errorf("the last image has the cache %q, %v", text, err)
	}
	// The extra paths and what lies elsewhere in /etc or in /usr count too, or do not.
	base := prepare(t, dir, host)
	if img := prepare(t, dir, host, "/usr/bin"); img.ID == base.ID {
		t.Error("an extra path does not change the image")
	}
	if err := os.WriteFile(filepath.Join(host, "usr/bin/new"), []byte("x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if img := prepare(t, dir, host); img.ID != base.ID {
		t.Error("a program in /usr changes the image, which does not have it")
	}
	// All stay, for the sandboxes that may have them.
	for id := range seen {
		if found, _ := filepath.Glob(filepath.Join(dir, "host-*-"+id)); len(found) != 1 {
			t.Errorf("the skeleton of %q is gone", seen[id])
		}
	}
}

func TestImagesOfAnEarlierRunOfTheHostGo(t *testing.T) {
	host, dir := fakeHost(t, debian()), t.TempDir()
	img := prepare(t, dir, host)
	run, ok := strings.CutSuffix(filepath.Base(img.Skeleton), img.ID)
	if !ok {
		t.Fatalf("skeleton %s", img.Skeleton)
	}
	// As a crash of the host may leave it: there, and empty.
	old := filepath.Join(dir, "host-00000000-"+img.ID)
	half := filepath.Join(dir, run+"new-123") // another executord may be making it now
	for _, d := range []string{filepath.Join(old, "etc"), half} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if again := prepare(t, dir, host); again.Skeleton != img.Skeleton {
		t.Errorf("the image is now %s", again.Skeleton)
	}
	if err := os.WriteFile(filepath.Join(host, "etc/inputrc"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	next := prepare(t, dir, host)
	for path, want := range map[string]bool{old: false, half: true, img.Skeleton: true, next.Skeleton: true} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s: %v, want it to be there: %v", path, err, want)
		}
	}
}

func TestPrepareConcurrently(t *testing.T) {
	host, dir := fakeHost(t, debian()), t.TempDir()
	made := make([]*Image, 16)
	var wait sync.WaitGroup
	for i := range made {
		wait.Go(func() {
			img, err := images(dir, host).Prepare()
			if err != nil {
				t.Errorf("caller %d: %v", i, err)
				return
			}
			// Whoever gets it gets it whole.
			if _, err := os.Lstat(filepath.Join(img.Skeleton, "etc/mtab")); err != nil {
				t.Errorf("caller %d: the last file is not there: %v", i, err)
			}
			made[i] = img
		})
	}
	wait.Wait()
	for _, img := range made {
		if img != nil && img.Skeleton != made[0].Skeleton {
			t.Errorf("%s and %s", img.Skeleton, made[0].Skeleton)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v, want one image", entries, err)
	}
}

func TestHostThatIsNone(t *testing.T) {
	// A host without /etc or /usr is odd, and no reason to fail.
	if _, err := images(t.TempDir(), t.TempDir()).Prepare(); err != nil {
		t.Error(err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := images(filepath.Join(file, "images"), t.TempDir()).Prepare(); err == nil {
		t.Error("an image was made below a file")
	}
}

// The real host, so that what programs need is in its image.
func TestThisHost(t *testing.T) {
	img := prepare(t, t.TempDir(), "/")
	got := tree(t, img.Skeleton)
	for _, path := range []string{"etc/ld.so.cache", "etc/passwd", "etc/nsswitch.conf", "usr", "dev", "proc"} {
		if got[path] == "" {
			t.Errorf("%s is missing", path)
		}
	}
	for path := range got {
		for _, bad := range []string{"shadow", "ssh", "sudoers", "machine-id", "private", "secret"} {
			if strings.HasPrefix(path, "etc/"+bad) || strings.HasPrefix(path, "etc/ssl/"+bad) {
				t.Errorf("%s is in the image", path)
			}
		}
	}
	t.Logf("%d files and directories", len(got))
}
