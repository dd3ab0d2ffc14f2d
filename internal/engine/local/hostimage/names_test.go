package hostimage

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestNameCache(t *testing.T) {
	root := t.TempDir()
	c := newNameCache(root, []string{"a*", "b", "sub/c"})
	add := func(name string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	var want []string
	for _, name := range []string{"a1", "b", "a0", "sub/c"} {
		add(name)
		add(name + "-other")
		if want = append(want, name); name != "sub/c" && name != "b" {
			want = append(want, name+"-other")
		}
		got := slices.Sorted(slices.Values(c.get()))
		if slices.Sort(want); !slices.Equal(got, want) {
			t.Errorf("with %s: %q, want %q", name, got, want)
		}
		if c.stamps != nil {
			t.Error("relied on a directory that changed just now")
		}
	}
	// As if the changes were long ago: nothing is looked for again.
	c.stamps = make(map[string]stamp)
	for _, dir := range []string{root, filepath.Join(root, "sub")} {
		c.stamps[dir], _ = stampOf(dir)
	}
	c.names = []string{"known"}
	if got := c.get(); !slices.Equal(got, []string{"known"}) {
		t.Errorf("looked again for %q", got)
	}
	time.Sleep(10 * time.Millisecond) // past the tick of the file system
	if err := os.Remove(filepath.Join(root, "sub/c")); err != nil {
		t.Fatal(err)
	}
	if got := c.get(); slices.Contains(got, "sub/c") || !slices.Contains(got, "a1") {
		t.Errorf("after one went: %q", got)
	}
	if s, age := stampOf(filepath.Join(root, "missing")); s != (stamp{}) || age < settled {
		t.Errorf("of what is not there: %v, %v", s, age)
	}
}
