package testgit

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// git runs one and returns what it said and whether it went well.
func git(dir string, args ...string) (string, bool) {
	out, err := Command(dir, args...).CombinedOutput()
	return string(out), err == nil
}

func with(token string) string {
	return "http.extraHeader=Authorization: " + BasicAuth("me", token)
}

func TestCloneAndPush(t *testing.T) {
	s := New(t, Config{Token: "right", PublicReads: true})
	url := s.Repository("owner/repo", map[string]string{"README.md": "hello\n", "dir/file": "x"})
	if want := s.URL + "/owner/repo.git"; url != want {
		t.Errorf("%s, want %s", url, want)
	}
	dir := filepath.Join(t.TempDir(), "clone")
	if out, ok := git("", "clone", "-q", url, dir); !ok {
		t.Fatal(out)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "dir/file")); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
	second := s.Commit("owner/repo", "other", "on another branch", map[string]string{"new": "y", "dir/file": ""})
	if out, ok := git(dir, "fetch", "-q"); !ok {
		t.Fatal(out)
	}
	if got, _ := git(dir, "rev-parse", "origin/other"); strings.TrimSpace(got) != second {
		t.Errorf("%s, want %s", got, second)
	}
	git(dir, "commit", "-q", "--allow-empty", "-m", "mine")
	if out, ok := git(dir, "push", "origin", "main"); ok {
		t.Errorf("a push without a token is taken: %s", out)
	}
	if out, ok := git(dir, "-c", with("wrong"), "push", "origin", "main"); ok {
		t.Errorf("a push with a wrong token is taken: %s", out)
	}
	if out, ok := git(dir, "-c", with("right"), "push", "origin", "main"); !ok {
		t.Errorf("%s", out)
	}
	if got, want := s.Git("owner/repo", "log", "-1", "--format=%s", "main"), "mine"; got != want {
		t.Errorf("%q", got)
	}
	var pushes []Request
	for _, r := range s.Requests() {
		if r.Push() {
			pushes = append(pushes, r)
		}
	}
	if len(pushes) != 1 || pushes[0].User != "me" || pushes[0].Token != "right" || pushes[0].Status != 200 {
		t.Errorf("%+v", pushes)
	}
}

func TestFailures(t *testing.T) {
	s, other := New(t, Config{}), New(t, Config{})
	var noise strings.Builder // does not get smaller in a pack
	for range 100 {
		fmt.Fprintln(&noise, rand.Uint64())
	}
	url := s.Repository("a/b", map[string]string{"f": noise.String()})
	other.Repository("a/b", map[string]string{"f": "elsewhere"})
	s.Target = other.URL
	for name, c := range map[string]struct {
		failure Failure
		works   bool
		says    string
	}{
		"unavailable":      {Unavailable, false, "503"},
		"cut":              {Cut, false, "early EOF"},
		"pushes refused":   {RefusesPush, true, ""},
		"at another place": {Elsewhere, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s.Fail(c.failure)
			dir := filepath.Join(t.TempDir(), "clone")
			out, ok := git("", "clone", "-q", url, dir)
			if ok != c.works || !strings.Contains(out, c.says) && !strings.Contains(out, "hung up") {
				t.Errorf("%v: %s", ok, out)
			}
			if c.failure == RefusesPush {
				git(dir, "commit", "-q", "--allow-empty", "-m", "mine")
				if out, ok := git(dir, "push", "origin", "main"); ok || !strings.Contains(out, "403") {
					t.Errorf("%v: %s", ok, out)
				}
			}
		})
	}
	s.Fail(Works)
	s.Set(Config{Delay: 20 * time.Millisecond})
	begun := time.Now()
	if out, ok := git("", "ls-remote", url); !ok || time.Since(begun) < 20*time.Millisecond {
		t.Errorf("%v after %v: %s", ok, time.Since(begun), out)
	}
	if got := s.Repository("a/empty", nil); !strings.HasSuffix(got, "/a/empty.git") {
		t.Error(got)
	}
	s.Fail(Stalled)
	cmd := Command("", "ls-remote", url)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("a server that stalls answered")
	}
}
