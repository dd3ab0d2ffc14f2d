package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// file makes the new file path with an empty file system in it, from a template where
// there can be one.
func (m *Maker) file(ctx context.Context, path string, bytes int64) error {
	template, err := m.template(ctx, bytes)
	if err != nil {
		return err
	}
	if template == "" {
		return m.format(ctx, path, bytes)
	}
	return copySparse(template, path, bytes)
}

// template returns the file with an empty file system of this size; "" if there are
// enough others.
func (m *Maker) template(ctx context.Context, bytes int64) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if path, ok := m.templates[bytes]; ok {
		return path, nil
	}
	if len(m.templates) == maxTemplates {
		return "", nil
	}
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return "", err
	}
	path := filepath.Join(m.dir, strconv.FormatInt(bytes, 10)+".ext4")
	if err := m.format(ctx, path, bytes); err != nil {
		return "", errors.Join(err, os.RemoveAll(path))
	}
	m.templates[bytes] = path
	return path, nil
}

// format makes an empty file system in a new file.
func (m *Maker) format(ctx context.Context, path string, bytes int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(bytes), f.Close()); err != nil {
		return err
	}
	// No journal: nothing of a sandbox has to survive a crash of the host. Whole features,
	// whatever the host's mke2fs.conf says. Tables of inodes are left to be zero, and nothing is
	// kept for root. One inode for each 16 KiB. The same id for all, which nobody asks for.
	cmd := exec.CommandContext(ctx, m.mkfs, "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0",
		"-O", "none,sparse_super,large_file,huge_file,filetype,dir_index,dir_nlink,ext_attr,extent,flex_bg,uninit_bg,extra_isize,64bit",
		"-E", "nodiscard,lazy_itable_init=1,root_owner=0:0", path)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C"}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %.300s", m.mkfs, err, out)
	}
	return nil
}

// copySparse copies what a file of this size has, and leaves its holes.
func copySparse(from, to string, size int64) (err error) {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		return nil // btrfs and xfs share it
	}
	if err := dst.Truncate(size); err != nil {
		return err
	}
	for at := int64(0); ; {
		begin, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look for data: %w", err)
		}
		end, err := unix.Seek(int(src.Fd()), begin, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("look for a hole: %w", err)
		}
		if _, err := io.Copy(io.NewOffsetWriter(dst, begin), io.NewSectionReader(src, begin, end-begin)); err != nil {
			return err
		}
		at = end
	}
}
