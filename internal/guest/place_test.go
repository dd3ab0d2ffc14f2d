package guest

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestClaim(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "place")
	lock, held, err := claim(dir)
	if err != nil || held {
		t.Fatal(held, err)
	}
	if _, held, err := claim(dir); err == nil || !held {
		t.Errorf("a second one: held %v, %v", held, err)
	}
	lock.Close()
	// What a snapshot kept of it says nothing.
	again, held, err := claim(dir)
	if err != nil || held {
		t.Fatal(held, err)
	}
	again.Close()
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func TestClaimOfWhatIsNotOurs(t *testing.T) {
	for name, prepare := range map[string]func(dir string) error{
		"anybody may write": func(dir string) error {
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			return os.Chmod(dir, 0o777)
		},
		"a link": func(dir string) error { return os.Symlink(os.TempDir(), dir) },
		"a file": func(dir string) error { return os.WriteFile(dir, nil, 0o600) },
	} {
		dir := filepath.Join(t.TempDir(), "place")
		if err := prepare(dir); err != nil {
			t.Fatal(err)
		}
		if lock, held, err := claim(dir); err == nil || held {
			lock.Close()
			t.Errorf("%s: taken", name)
		}
	}
}

func TestInherited(t *testing.T) {
	got := inherited([]string{"A=1", "MODAL_TOKEN=x", "B=", "=odd", "PATH=/theirs"})
	if !slices.Equal(got, []string{"A=1", "B=", "PATH=/theirs"}) {
		t.Errorf("%q", got)
	}
	env := []string{"PATH=/ours", "B=mine"}
	if all := withInherited(env, got); !slices.Equal(all, []string{"PATH=/ours", "B=mine", "A=1"}) {
		t.Errorf("%q", all)
	}
	if all := withInherited(env, nil); !slices.Equal(all, env) {
		t.Errorf("%q", all)
	}
}
