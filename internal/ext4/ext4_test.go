package ext4

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// What is made below a directory that was spread lies in several parts of an ext4, and
// on other file systems works as ever.
func TestSpread(t *testing.T) {
	for _, parent := range []string{t.TempDir(), "/dev/shm"} {
		dir, err := os.MkdirTemp(parent, "ext4-")
		if err != nil {
			t.Logf("%s: %v", parent, err)
			continue
		}
		defer os.RemoveAll(dir)
		for range 2 {
			if err := Spread(dir); err != nil {
				t.Error(err)
			}
		}
		var kind unix.Statfs_t
		if err := unix.Statfs(dir, &kind); err != nil {
			t.Fatal(err)
		}
		// Inodes are numbered by group, 8,192 or so in each.
		groups := make(map[uint64]bool)
		for i := range 32 {
			var st unix.Stat_t
			path := filepath.Join(dir, strconv.Itoa(i))
			if err := errors.Join(os.Mkdir(path, 0o700), unix.Stat(path, &st)); err != nil {
				t.Fatal(err)
			}
			groups[st.Ino/2048] = true
		}
		if kind.Type == unix.EXT4_SUPER_MAGIC && kind.Blocks*uint64(kind.Bsize) > 8<<30 && len(groups) < 2 {
			t.Errorf("in %s all directories lie in one group", parent)
		}
	}
	if err := Spread(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of a directory that is not there: %v", err)
	}
}
