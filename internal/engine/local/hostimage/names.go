package hostimage

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// settled is how old the last change of a directory must be for its time to tell of
// every later change: file systems count in ticks of some milliseconds.
const settled = time.Second

// nameCache finds the names that patterns match. It looks into a directory again only
// when that has changed.
type nameCache struct {
	root     string
	patterns []string

	mu     sync.Mutex
	stamps map[string]stamp // by directory; nil if names cannot be relied on
	names  []string
}

// stamp is what changes when a name in a directory does; zero if it is not there.
type stamp struct {
	inode             uint64
	modified, changed syscall.Timespec
}

func newNameCache(root string, patterns []string) *nameCache {
	return &nameCache{root: root, patterns: patterns}
}

// get returns the names, relative to the root. They are not to be changed.
func (c *nameCache) get() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stamps != nil && c.unchanged() {
		return c.names
	}
	stamps, reliable := make(map[string]stamp), true
	var names []string
	for _, pattern := range c.patterns {
		full := filepath.Join(c.root, pattern)
		dir := filepath.Dir(full)
		if _, ok := stamps[dir]; !ok {
			s, age := stampOf(dir)
			stamps[dir] = s
			reliable = reliable && age >= settled
		}
		found, _ := filepath.Glob(full) // the patterns are well formed
		for _, path := range found {
			names = append(names, strings.TrimPrefix(path, c.root+"/"))
		}
	}
	c.names, c.stamps = names, nil
	if reliable {
		c.stamps = stamps
	}
	return names
}

func (c *nameCache) unchanged() bool {
	for dir, before := range c.stamps {
		if now, _ := stampOf(dir); now != before {
			return false
		}
	}
	return true
}

// stampOf looks at a directory, and says how long ago it changed.
func stampOf(dir string) (stamp, time.Duration) {
	info, err := os.Stat(dir)
	if err != nil {
		return stamp{}, settled // when it comes, that shows
	}
	st := info.Sys().(*syscall.Stat_t)
	return stamp{st.Ino, st.Mtim, st.Ctim}, time.Since(time.Unix(st.Ctim.Unix()))
}
