package workspace

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/testgit"
)

func TestClone(t *testing.T) {
	s, h, root := testgit.New(t, testgit.Config{}), newHost(t), t.TempDir()
	files := map[string]string{}
	for i := range 200 {
		files[fmt.Sprintf("dir/%d", i)] = fmt.Sprint(rand.Uint64(), rand.Uint64())
	}
	url := s.Repository("owner/repo", files)
	for i := range 5 {
		s.Commit("owner/repo", "feature/x", fmt.Sprint("commit ", i), map[string]string{"f": fmt.Sprint(i)})
	}
	var steps []Progress
	c, err := Clone(t.Context(), h, root, Repository{URL: url, Name: "repo"}, func(p Progress) { steps = append(steps, p) })
	if err != nil {
		t.Fatal(err)
	}
	if c.Tree.Dir != filepath.Join(root, "repo") || c.Branch != "main" || len(c.Head) != 40 || c.Existing {
		t.Errorf("%+v", c)
	}
	i := slices.IndexFunc(steps, func(p Progress) bool { return p.Phase == "receiving objects" && p.Percent == 100 && p.Done })
	if i < 0 || steps[i].Total < 200 || steps[i].Objects != steps[i].Total {
		t.Errorf("%+v", steps)
	}
	if entries, err := os.ReadDir(filepath.Join(c.Tree.Dir, ".git", "hooks")); len(entries) > 0 {
		t.Errorf("it has hooks: %v, %v", entries, err)
	}
	// Again: it is found, with what was done in it.
	if err := os.WriteFile(filepath.Join(c.Tree.Dir, "work"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if c, err := Clone(t.Context(), h, root, Repository{URL: url, Name: "repo"}, nil); err != nil || !c.Existing || !isFile(filepath.Join(c.Tree.Dir, "work")) {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := Clone(t.Context(), h, root, Repository{URL: s.Repository("other/repo", nil), Name: "repo"}, nil); fault.ReasonOf(err) != "WORKSPACE_OCCUPIED" {
		t.Error(err)
	}
	// After a crash in the middle of one, and into a directory that is there and empty.
	for _, dir := range []string{".clone-second/.git", "second"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	shallow, err := Clone(t.Context(), h, root, Repository{URL: url, Name: "second", Branch: "feature/x", Depth: 2}, nil)
	if err != nil || shallow.Branch != "feature/x" {
		t.Fatalf("%+v, %v", shallow, err)
	}
	if n, err := shallow.Tree.git(t.Context(), "rev-list", "--count", "HEAD"); n != "2" {
		t.Errorf("%s commits, %v", n, err)
	}
	if empty, err := Clone(t.Context(), h, root, Repository{URL: s.Repository("owner/empty", nil), Name: "empty"}, nil); err != nil || empty.Head != "" {
		t.Errorf("%+v, %v", empty, err)
	}
	if left, _ := filepath.Glob(filepath.Join(root, ".clone-*")); len(left) > 0 {
		t.Errorf("%q are left", left)
	}
	if err := os.Symlink("/etc", filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		repository Repository
		failure    testgit.Failure
		cfg        testgit.Config
		reason     string
	}{
		"no branch":     {Repository{URL: url, Name: "a", Branch: "absent"}, testgit.Works, testgit.Config{}, "BRANCH_NOT_FOUND"},
		"no repository": {Repository{URL: s.URL + "/owner/absent.git", Name: "b"}, testgit.Works, testgit.Config{}, "REPOSITORY_NOT_FOUND"},
		"token":         {Repository{URL: url, Name: "c"}, testgit.Works, testgit.Config{Token: "x"}, "CREDENTIALS_REFUSED"},
		"unavailable":   {Repository{URL: url, Name: "d"}, testgit.Unavailable, testgit.Config{}, "GIT_SERVER"},
		"cut":           {Repository{URL: url, Name: "e"}, testgit.Cut, testgit.Config{}, "GIT_SERVER"},
		"a link":        {Repository{URL: url, Name: "link"}, testgit.Works, testgit.Config{}, "WORKSPACE_OCCUPIED"},
		"a program":     {Repository{URL: "ext::touch " + root + "/owned", Name: "f"}, testgit.Works, testgit.Config{}, "PROTOCOL_NOT_ALLOWED"},
		"a file":        {Repository{URL: "file://" + s.Dir("owner/repo"), Name: "g"}, testgit.Works, testgit.Config{}, "PROTOCOL_NOT_ALLOWED"},
		"an option":     {Repository{URL: "--upload-pack=touch " + root + "/owned", Name: "h"}, testgit.Works, testgit.Config{}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s.Fail(c.failure)
			s.Set(c.cfg)
			defer s.Set(testgit.Config{})
			defer s.Fail(testgit.Works)
			_, err := Clone(t.Context(), h, root, c.repository, nil)
			if err == nil || c.reason != "" && fault.ReasonOf(err) != c.reason {
				t.Errorf("%v (%s)", err, fault.ReasonOf(err))
			}
			if isFile(filepath.Join(root, "owned")) || name != "a link" && isDir(filepath.Join(root, c.repository.Name)) {
				t.Error("something was made")
			}
		})
	}
}

func isDir(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.IsDir()
}

// A repository that wants something run, or to reach out of its directory, gets nothing.
func TestHostileRepository(t *testing.T) {
	s, h, root := testgit.New(t, testgit.Config{}), newHost(t), t.TempDir()
	owned := filepath.Join(t.TempDir(), "owned")
	command := "#!/bin/sh\ntouch " + owned + "\n"
	url := s.Repository("evil/repo", map[string]string{
		"hooks/post-checkout": command, ".githooks/post-checkout": command, ".git-hooks/pre-push": command,
		".gitattributes": "* filter=evil diff=evil merge=evil\n", ".gitconfig": "[core]\n\tfsmonitor = touch " + owned + "\n\thooksPath = hooks\n",
		".gitmodules": "[submodule \"x\"]\n\tpath = x\n\turl = ext::sh -c \"touch% " + owned + "\"\n\tupdate = !touch " + owned + "\n",
		"big":         strings.Repeat("0123456789abcdef", 1<<16),
	})
	tree := filepath.Join(t.TempDir(), "tree")
	for _, args := range [][]string{{"clone", "-q", url, tree}} {
		if out, err := testgit.Command("", args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for name, to := range map[string]string{"out": "/etc/passwd", "up": "../../..", "git": ".git"} {
		if err := os.Symlink(to, filepath.Join(tree, name)); err != nil {
			t.Fatal(err)
		}
	}
	// Entries that only a server sends on purpose: a gitlink without a repository.
	for _, args := range [][]string{
		{"add", "-A"}, {"update-index", "--add", "--cacheinfo", "160000,0123456789012345678901234567890123456789,x"}, {"commit", "-q", "-m", "links"}, {"push", "-q"},
	} {
		if out, err := testgit.Command(tree, args...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	c, err := Clone(t.Context(), h, root, Repository{URL: url, Name: "repo"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Clone(t.Context(), h, root, Repository{URL: url, Name: "with", Submodules: true}, nil); err == nil {
		t.Error("a submodule of ext:: was cloned")
	}
	// What an agent that was talked into it could set inside.
	for _, setting := range [][]string{
		{"core.fsmonitor", "touch " + owned}, {"core.hooksPath", filepath.Join(c.Tree.Dir, "hooks")}, {"diff.external", "touch " + owned},
		{"credential.helper", "!touch " + owned}, {"core.sshCommand", "touch " + owned}, {"gpg.program", "hooks/post-checkout"}, {"commit.gpgSign", "true"},
		{"core.pager", "touch " + owned},
	} {
		if _, err := c.Tree.git(t.Context(), "config", setting[0], setting[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(c.Tree.Dir, "new"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Tree.Status(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := c.Tree.SaveWork(t.Context(), SaveOptions{Session: "s", Who: me(), Bundle: filepath.Join(root, "b")}); err != nil {
		t.Error(err)
	}
	if _, err := c.Tree.SafeCarryForward(t.Context(), me()); err != nil {
		t.Error(err)
	}
	if _, err := c.Tree.Push(t.Context(), false); err != nil {
		t.Error(err)
	}
	if isFile(owned) {
		t.Error("something was run")
	}
}

func TestParseURL(t *testing.T) {
	for in, want := range map[string]Remote{
		"https://github.com/owner/repo.git":                 {"https://github.com/owner/repo.git", "github.com", "owner", "repo"},
		"https://GitHub.com/Owner/Repo/":                    {"https://github.com/Owner/Repo", "github.com", "Owner", "Repo"},
		"git@github.com:owner/repo.git":                     {"https://github.com/owner/repo.git", "github.com", "owner", "repo"},
		"ssh://git@github.com/owner/repo":                   {"https://github.com/owner/repo", "github.com", "owner", "repo"},
		"https://gitlab.example:8443/a/b/c.git":             {"https://gitlab.example:8443/a/b/c.git", "gitlab.example:8443", "a/b", "c"},
		"http://127.0.0.1:80/o/r":                           {"", "", "", ""},
		"https://user:hunter2@github.com/o/r":               {},
		"https://hunter2@github.com/o/r":                    {},
		"ext::sh -c hunter2":                                {},
		"--upload-pack=hunter2":                             {},
		"file:///etc":                                       {},
		"/etc":                                              {},
		"https://github.com/o/r?x=hunter2":                  {},
		"https://github.com/o/r#hunter2":                    {},
		"https://github.com/../r":                           {},
		"https://github.com/o//r":                           {},
		"https://github.com/-o/r":                           {},
		"https://github.com/o/.git":                         {},
		"https://github.com/":                               {},
		"https://-oProxyCommand=hunter2/o/r":                {},
		"https://github.com/o/r\nhunter2":                   {},
		"ssh://git@-oProxyCommand/o/r":                      {},
		"git@github.com:-o/r":                               {},
		"ssh://root@github.com/o/r":                         {},
		"https://[::1]/o/r":                                 {},
		"git://github.com/o/r":                              {},
		"https://github.com/o/" + strings.Repeat("r", 3000): {},
	} {
		got, err := ParseURL(in, false)
		if got != want || (err != nil) != (want == Remote{}) || err != nil && (fault.KindOf(err) != fault.Invalid || strings.Contains(err.Error(), "hunter2")) {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
	}
	if got, err := ParseURL("http://127.0.0.1:80/o/r", true); err != nil || got.Host != "127.0.0.1:80" {
		t.Errorf("%+v, %v", got, err)
	}
}

func FuzzParseURL(f *testing.F) {
	for _, text := range []string{"https://github.com/owner/repo.git", "git@h:a/b", "ssh://git@h/a", "--upload-pack=x", "ext::x"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseURL(text, true)
		if err != nil {
			return
		}
		if !strings.HasPrefix(got.URL, "https://") && !strings.HasPrefix(got.URL, "http://") || strings.ContainsAny(got.URL, " \n\x00'\"\\") {
			t.Errorf("%q became %q", text, got.URL)
		}
		if again, err := ParseURL(got.URL, true); err != nil || again != got {
			t.Errorf("%q is not stable: %+v, %v", text, again, err)
		}
	})
}

func TestPlan(t *testing.T) {
	of := func(urls ...string) (all []Repository) {
		for _, u := range urls {
			all = append(all, Repository{URL: "https://h.example/" + u})
		}
		return all
	}
	for want, in := range map[string][]Repository{
		"repo":                 of("o/repo.git"),
		"repo p-repo":          of("o/repo", "p/repo"),
		"repo o-Repo o-repo-2": of("o/repo", "o/Repo", "o/repo"),
		"x b":                  {{URL: "https://h.example/a/b", Name: "x"}, {URL: "https://h.example/a/b"}},
		"a-b b":                {{URL: "https://h.example/a/b"}, {URL: "https://h.example/x/y", Name: "b"}},
		"a-b-c":                of("o/a~b+c"),
	} {
		got, err := Plan(in, false)
		var names []string
		for _, r := range got {
			names = append(names, r.Name)
		}
		if err != nil || strings.Join(names, " ") != want {
			t.Errorf("%q, %v, want %q", names, err, want)
		}
	}
	for reason, r := range map[string]Repository{
		"REPOSITORY_BRANCH": {URL: "https://h.example/a/b", Branch: "--upload-pack=x"}, "REPOSITORY_NAME": {URL: "https://h.example/a/b", Name: "../x"},
		"REPOSITORY_DEPTH": {URL: "https://h.example/a/b", Depth: -1}, "REPOSITORY_URL": {URL: "x"},
	} {
		if _, err := Plan([]Repository{r}, false); fault.ReasonOf(err) != reason {
			t.Errorf("%s: %v", reason, err)
		}
	}
	if _, err := Plan([]Repository{{URL: "https://h.example/a/b", Name: "x"}, {URL: "https://h.example/a/c", Name: "X"}}, false); fault.ReasonOf(err) != "REPOSITORY_NAME" {
		t.Error(err)
	}
	for _, name := range []string{"a..b", "a b", "-a", "a.lock", "a/.b", "/a", "a/", "a//b", "@", "a@{b", "a~1", "a\x01", "a."} {
		if checkBranch(name) == nil {
			t.Errorf("%q is a branch", name)
		}
	}
}

func TestProgress(t *testing.T) {
	var steps []Progress
	var messages []string
	p := newProgressParser(func(s Progress) { steps = append(steps, s) }, func(line string) { messages = append(messages, line) })
	text := "Cloning into '/workspace/x'...\nremote: Enumerating objects: 12, done.        \nremote: Counting objects:  50% (6/12)\x1b[K\rremote: Counting objects: 100% (12/12), done.\x1b[K\n" +
		"Receiving objects:  45% (450/1000), 1.50 MiB | 2.25 KiB/s\rReceiving objects: 100% (1000/1000), 3.00 GiB | 10 bytes/s, done.\nResolving deltas: 100% (3/3), done.\nfatal: it \x1b[31mbroke"
	for _, b := range []byte(text) {
		p.write([]byte{b})
	}
	p.end()
	want := []Progress{
		{"enumerating objects", true, -1, 12, 0, 0, 0, true},
		{"counting objects", true, 50, 6, 12, 0, 0, false},
		{"counting objects", true, 100, 12, 12, 0, 0, true},
		{"receiving objects", false, 45, 450, 1000, 3 << 19, 2304, false},
		{"receiving objects", false, 100, 1000, 1000, 3 << 30, 10, true},
		{"resolving deltas", false, 100, 3, 3, 0, 0, true},
	}
	if !slices.Equal(steps, want) {
		t.Errorf("%+v", steps)
	}
	if !slices.Equal(messages, []string{"Cloning into '/workspace/x'...", "fatal: it ?[31mbroke"}) {
		t.Errorf("%q", messages)
	}
}

func FuzzProgress(f *testing.F) {
	f.Add([]byte("Receiving objects:  45% (450/1000), 1.50 MiB | 2.25 KiB/s\r"), uint8(3))
	f.Add([]byte("remote: Counting objects: 999999999999999999, 999999999999.999 TiB, done.\n"), uint8(1))
	f.Fuzz(func(t *testing.T, data []byte, cut uint8) {
		read := func(size int) (steps []Progress, messages []string) {
			p := newProgressParser(func(s Progress) { steps = append(steps, s) }, func(line string) { messages = append(messages, line) })
			for rest := data; len(rest) > 0; {
				n := min(size, len(rest))
				p.write(rest[:n])
				rest = rest[n:]
			}
			p.end()
			return steps, messages
		}
		steps, messages := read(len(data) + 1)
		again, lines := read(int(cut) + 1)
		if !slices.Equal(steps, again) || !slices.Equal(messages, lines) {
			t.Errorf("cut: %+v %q, whole: %+v %q", again, lines, steps, messages)
		}
		for _, s := range steps {
			if s.Percent < -1 || s.Percent > 100 || s.Objects < 0 || s.Total < 0 || s.Bytes < 0 || s.BytesPerSecond < 0 {
				t.Errorf("%+v", s)
			}
		}
	})
}
