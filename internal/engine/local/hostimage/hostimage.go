// Package hostimage makes the local engine's default image out of the host itself,
// so that nothing has to be downloaded before the first run: the host's /usr,
// read-only, over a skeleton of empty directories and a synthesised /etc. It is an
// allow-list: what is not named here (homes, /root, /var, /srv, /mnt, most of /etc)
// is not in the sandbox.
package hostimage

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Image is a root file system in layers that are on this host.
type Image struct {
	// ID changes when the skeleton would.
	ID string
	// Skeleton is the lowest layer of "/".
	Skeleton string
	// Trees are directories of the host that are seen at the same path.
	Trees []string
}

// directories of the skeleton and their modes.
func directories() map[string]fs.FileMode {
	return map[string]fs.FileMode{
		"dev": 0o755, "proc": 0o555, "sys": 0o555, "etc": 0o755, "etc/ssl": 0o755, "home": 0o755, "mnt": 0o755, "media": 0o755,
		"opt": 0o755, "root": 0o700, "run": 0o755, "srv": 0o755, "tmp": 0o777 | fs.ModeSticky, "usr": 0o755,
		"var": 0o755, "var/cache": 0o755, "var/lib": 0o755, "var/log": 0o755, "var/spool": 0o755,
		"var/tmp": 0o777 | fs.ModeSticky, "workspace": 0o755,
	}
}

// etcCopied are patterns of files and directories of the host's /etc without which
// programs in /usr do not work, and that name neither people nor secrets.
func etcCopied() []string {
	return []string{
		"alternatives", "bash.bashrc", "ca-certificates", "ca-certificates.conf", "chromium*", "debian_version", "fonts", "gai.conf", "inputrc",
		"java*", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "login.defs", "mailcap", "mime.types", "os-release",
		"perl", "pki/tls/certs", "pki/ca-trust/extracted", "profile", "protocols", "python3*", "rpc", "services",
		"ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone", "vim", "xattr.conf",
	}
}

// etcWritten are files of /etc that do not come from the host.
func etcWritten() map[string]string {
	return map[string]string{
		"passwd": "root:x:0:0:root:/root:/bin/bash\n" +
			"daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n" +
			"bin:x:2:2:bin:/bin:/usr/sbin/nologin\n" +
			"www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n" +
			"sandbox:x:1000:1000:sandbox:/workspace:/bin/bash\n" +
			"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
		"group": "root:x:0:\ndaemon:x:1:\nbin:x:2:\nsys:x:3:\ntty:x:5:\ndisk:x:6:\nmail:x:8:\nwww-data:x:33:\nutmp:x:43:\n" +
			"video:x:44:\nstaff:x:50:\nusers:x:100:\nsandbox:x:1000:\nnogroup:x:65534:\n",
		"hosts":         "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
		"nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n",
		"resolv.conf":   "",
		"hostname":      "sandbox\n",
		"shells":        "/bin/sh\n/bin/bash\n",
		"host.conf":     "multi on\n",
	}
}

// Config says of which host images are made, and where they are kept.
type Config struct {
	// Dir holds the images; made if it is missing.
	Dir string
	// Host is the host's root directory, "/" but in tests.
	Host string
	// Boot is the id of this run of the host, at least 8 characters.
	Boot string
	// Extra are further directories of the host to show, read-only layers like /usr.
	Extra []string
}

// Images makes the images of one host.
type Images struct {
	cfg   Config
	names *nameCache
}

// New makes no image yet.
func New(cfg Config) *Images {
	return &Images{cfg: cfg, names: newNameCache(filepath.Join(cfg.Host, "etc"), etcCopied())}
}

// Prepare makes the image, or finds that it is there and still fits the host: it is
// asked for each sandbox, because the host may have got new software since the last.
func (im *Images) Prepare() (*Image, error) {
	dir, host := im.cfg.Dir, im.cfg.Host
	links, trees, err := topLevel(host)
	if err != nil {
		return nil, fmt.Errorf("look at the host's root directory: %w", err)
	}
	for _, path := range im.cfg.Extra {
		if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" {
			return nil, fmt.Errorf("extra path %q: must be absolute, clean and not /", path)
		}
		if info, err := os.Stat(filepath.Join(host, path)); err != nil || !info.IsDir() {
			return nil, fmt.Errorf("extra path %q: is not a directory of the host", path)
		}
		trees = append(trees, path)
	}
	slices.Sort(trees) // parents before what is mounted into them
	trees = slices.Compact(trees)
	// Of one run of the host only: what was written shortly before a crash may be
	// there without its content, and every sandbox that used it is gone.
	run := "host-" + im.cfg.Boot[:8] + "-"
	names := im.names.get()
	id := fingerprint(host, names, links, trees)
	img := &Image{ID: id, Skeleton: filepath.Join(dir, run+id), Trees: trees}
	if _, err := os.Stat(img.Skeleton); err == nil {
		return img, nil
	}
	// Made aside and renamed: a skeleton that is there is whole.
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(dir, run+"new-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(work) }() // gone if all went well; else swept at the next run of the host
	if err := build(work, host, names, links, img.Trees); err != nil {
		return nil, fmt.Errorf("make the skeleton of the host image: %w", err)
	}
	if err := os.Chmod(work, 0o755); err != nil {
		return nil, err
	}
	if err := os.Rename(work, img.Skeleton); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return img, sweep(dir, run)
}

// sweep removes what earlier runs of the host left.
func sweep(dir, run string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), run) {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("remove an image of an earlier run of the host: %w", err)
			}
		}
	}
	return nil
}

// topLevel finds which of /bin, /lib and their like are links into /usr, to be made
// again, and which are directories, to be layers of their own beside /usr.
func topLevel(host string) (links map[string]string, trees []string, err error) {
	links, trees = make(map[string]string), []string{"/usr"}
	for _, name := range []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
		path := filepath.Join(host, name)
		info, err := os.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, nil, err
		case info.Mode()&fs.ModeSymlink != 0:
			if links[name], err = os.Readlink(path); err != nil {
				return nil, nil, err
			}
		case info.IsDir():
			trees = append(trees, "/"+name)
		}
	}
	return links, trees, nil
}

func build(work, host string, names []string, links map[string]string, trees []string) error {
	dirs := directories()
	for _, name := range slices.Sorted(maps.Keys(dirs)) { // parents first
		if err := makeDir(filepath.Join(work, name), dirs[name]); err != nil {
			return err
		}
	}
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(work, name)); err != nil {
			return err
		}
	}
	for _, tree := range trees {
		if err := makeDirs(work, tree); err != nil {
			return err
		}
	}
	for _, name := range names {
		if err := makeDirs(work, filepath.Join("etc", filepath.Dir(name))); err != nil {
			return err
		}
		if err := copyTree(filepath.Join(work, "etc", name), filepath.Join(host, "etc", name)); err != nil {
			return err
		}
	}
	for name, text := range etcWritten() {
		if err := writeFile(filepath.Join(work, "etc", name), strings.NewReader(text), 0o644); err != nil {
			return err
		}
	}
	return os.Symlink("../proc/self/mounts", filepath.Join(work, "etc/mtab"))
}

// makeDir makes one directory, or takes the one that is there, with exactly this mode:
// it must not depend on the umask.
func makeDir(path string, mode fs.FileMode) error {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Chmod(path, mode)
}

// makeDirs makes those directories on the way from root to path that are missing.
func makeDirs(root, path string) error {
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		root = filepath.Join(root, name)
		if _, err := os.Lstat(root); err == nil {
			continue
		}
		if err := makeDir(root, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// copyTree copies what everybody on the host may read. What is missing, and what is
// private or lies in a private directory, is left out.
func copyTree(to, from string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			return nil
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		info, err := d.Info()
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // it went while this looked
		case err != nil:
			return err
		case d.IsDir() && info.Mode().Perm()&0o005 != 0o005:
			return fs.SkipDir
		case d.IsDir():
			return makeDir(target, 0o755)
		case info.Mode()&fs.ModeSymlink != 0:
			link, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return os.Symlink(link, target)
		case !info.Mode().IsRegular() || info.Mode().Perm()&0o004 == 0:
			return nil
		}
		in, err := os.Open(path)
		if err != nil {
			return err
		}
		defer in.Close()
		return writeFile(target, in, info.Mode().Perm())
	})
}

// writeFile makes a file with exactly this mode.
func writeFile(path string, from io.Reader, mode fs.FileMode) error {
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, from)
	return errors.Join(err, out.Chmod(mode), out.Close())
}

// fingerprint covers the files that change when software is installed on the host,
// and the rules of this package.
func fingerprint(host string, names []string, links map[string]string, trees []string) string {
	h := sha256.New()
	for _, name := range names {
		if info, err := os.Lstat(filepath.Join(host, "etc", name)); err == nil {
			fmt.Fprintf(h, "%s %v %d %d\n", name, info.Mode(), info.Size(), info.ModTime().UnixNano())
		}
	}
	written, dirs := etcWritten(), directories()
	for _, name := range slices.Sorted(maps.Keys(written)) {
		fmt.Fprintf(h, "%s %q\n", name, written[name])
	}
	for _, name := range slices.Sorted(maps.Keys(dirs)) {
		fmt.Fprintf(h, "%s %v\n", name, dirs[name])
	}
	for _, name := range slices.Sorted(maps.Keys(links)) {
		fmt.Fprintf(h, "%s -> %s\n", name, links[name])
	}
	fmt.Fprintf(h, "%q\n", trees)
	return hex.EncodeToString(h.Sum(nil))[:16]
}
