package workspace

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/testgit"
)

func TestConfigure(t *testing.T) {
	r := newRig(t, map[string]string{"f": "x"})
	r.write(map[string]string{"f": "y"})
	r.commitAll("by the agent")
	if got := r.user("log", "-1", "--format=%an <%ae>|%cn <%ce>"); got != harvest+"|"+harvest {
		t.Error(got)
	}
	for name, want := range map[string]string{"push.autoSetupRemote": "true", "init.defaultBranch": "main"} {
		if got := r.user("config", name); got != want {
			t.Errorf("%s is %q", name, got)
		}
	}
	setup := Setup{
		Identity: Identity{"Eve <x>\n(Harvest)", "eve@example.com"}, Brokers: map[string]string{"git.example": r.server.URL + "/"},
		ConfigFile: r.host.Config(), GuardDir: filepath.Join(r.host.Home, "sbin"),
	}
	for range 2 { // it may be repeated
		r.must(Configure(t.Context(), r.host, setup))
	}
	if got := r.user("config", "user.name"); got != "Eve x (Harvest)" {
		t.Error(got)
	}
	for _, url := range []string{"https://git.example/owner/repo.git", "git@git.example:owner/repo.git", "ssh://git@git.example/owner/repo.git"} {
		if got := r.user("ls-remote", url, "main"); !strings.Contains(got, "refs/heads/main") {
			t.Errorf("%s: %s", url, got)
		}
	}
	for _, i := range []Identity{{}, {"x", "a b"}, {"(Harvest)", "a@b"}, {"x", strings.Repeat("a", 400)}} {
		if err := Configure(t.Context(), r.host, Setup{Identity: i}); fault.ReasonOf(err) != "IDENTITY" {
			t.Errorf("%+v: %v", i, err)
		}
	}
	theirs := t.TempDir()
	r.must(os.WriteFile(filepath.Join(theirs, "git"), []byte("own"), 0o755))
	setup.GuardDir = theirs
	if err := Configure(t.Context(), r.host, setup); err == nil {
		t.Error("somebody's git is replaced")
	}
}

func TestGuard(t *testing.T) {
	r := newRig(t, map[string]string{"f": "x"})
	r.user("config", "alias.up", "pull --rebase")
	r.user("config", "alias.shelve", "stash push")
	r.user("config", "alias.sh", "!git pull")
	r.user("config", "alias.st", "status")
	for _, args := range [][]string{
		{"pull"}, {"-C", r.Dir, "pull", "origin", "main"}, {"-c", "a.b=stash", "stash"}, {"--no-pager", "stash", "push"}, {"--git-dir", ".git", "pull"},
		{"--git-dir=.git", "pull"}, {"stash", "drop"}, {"stash", "-u"}, {"up"}, {"shelve"}, {"sh"}, {"-c", "x.y=z w", "-C", r.Dir, "stash", "save", "a b"},
	} {
		if out, code := r.guarded(args...); code != 1 || !strings.Contains(out, "git rebase origin/<branch>") {
			t.Errorf("git %q: %d, %s", args, code, out)
		}
	}
	for _, args := range [][]string{
		{"status"}, {"st"}, {"-c", "user.name=pull", "log", "-1"}, {"log", "--grep", "pull"}, {"stash", "list"}, {"commit", "--allow-empty", "-m", "pull stash 'a \"b"}, {"--version"}, {"branch", "pull"},
	} {
		if out, code := r.guarded(args...); code != 0 {
			t.Errorf("git %q: %d, %s", args, code, out)
		}
	}
	if got := r.user("log", "-1", "--format=%s"); got != `pull stash 'a "b` {
		t.Errorf("arguments are changed: %s", got)
	}
	if _, code := r.guarded(); code == 0 {
		t.Error("no arguments")
	}
	if _, err := r.git(t.Context(), "stash", "list"); err != nil {
		t.Error(err)
	}
}

func TestStatus(t *testing.T) {
	r := newRig(t, map[string]string{"a": "1", "b": "1", "c d": "1"})
	clean, err := r.Status(t.Context())
	if err != nil || !clean.Clean() || clean.Branch != "main" || clean.Upstream != "origin/main" || len(clean.Head) != 40 {
		t.Errorf("%+v, %v", clean, err)
	}
	r.write(map[string]string{"a": "2"})
	first := r.commitAll("mine")
	r.user("branch", "other")
	r.server.Commit("owner/repo", "main", "theirs", map[string]string{"z": "1"})
	r.user("fetch", "-q")
	r.user("mv", "b", "new\nline")
	r.write(map[string]string{"c d": "2", "dir/x": "1", "dir/y": "1", "u": "1"})
	r.user("add", "u")
	before := r.state()
	got, err := r.Status(t.Context())
	if err != nil || got.Ahead != 1 || got.Behind != 1 || got.Staged != 2 || got.Modified != 1 || got.Untracked != 1 || got.Conflicts != 0 || got.InProgress != "" ||
		!slices.Equal(got.Unpushed, []Unpushed{{"main", first, 1}, {"other", first, 1}}) || got.Clean() || !got.Dirty() || got.Stashes != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if after := r.state(); after != before {
		t.Errorf("it changed something:\n%s\n%s", before, after)
	}
	if _, err := r.git(t.Context(), "stash", "-u"); err != nil {
		t.Fatal(err)
	}
	r.user("checkout", "-q", "--detach")
	r.write(map[string]string{"a": "3"})
	detached := r.commitAll("on no branch")
	got, err = r.Status(t.Context())
	if err != nil || got.Branch != "" || got.Stashes != 1 || len(got.Unpushed) != 3 || got.Unpushed[0] != (Unpushed{"", detached, 1}) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestSafeCarryForward(t *testing.T) {
	r := newRig(t, map[string]string{"a": "1\n", "b": "1\n"})
	if got, err := r.SafeCarryForward(t.Context(), me()); err != nil || got.Snapshot != "" || got.Rebased {
		t.Errorf("nothing to do: %+v, %v", got, err)
	}
	r.server.Commit("owner/repo", "main", "theirs", map[string]string{"b": "2\n"})
	if got, err := r.SafeCarryForward(t.Context(), me()); err != nil || !got.Rebased || got.Snapshot != "" || r.read("b") != "2\n" {
		t.Errorf("behind: %+v, %v", got, err)
	}
	r.write(map[string]string{"a": "mine\n", "new": "mine\n"})
	r.server.Commit("owner/repo", "main", "theirs", map[string]string{"b": "3\n"})
	got, err := r.SafeCarryForward(t.Context(), me())
	if err != nil || !got.Rebased || got.Snapshot == "" || got.Checkpoint != "" || r.read("b") != "3\n" || r.read("new") != "mine\n" || r.user("status", "--porcelain") != "" ||
		r.user("log", "-1", "--format=%s %an <%ae>") != snapshotMessage+" "+harvest || r.user("branch", "--list", "checkpoint-*") != "" || got.Head != r.user("rev-parse", "HEAD") {
		t.Errorf("with work: %+v, %v", got, err)
	}
	// Conflicts: the branch is as it was, nothing is lost, and it is said where it is.
	r.server.Commit("owner/repo", "main", "theirs", map[string]string{"a": "theirs\n"})
	r.write(map[string]string{"later": "x"})
	got, err = r.SafeCarryForward(t.Context(), me())
	if err != nil || !slices.Equal(got.Conflicts, []string{"a"}) || got.Rebased || !strings.HasPrefix(got.Checkpoint, "checkpoint-main-") ||
		r.user("rev-parse", got.Checkpoint) != got.Snapshot || r.user("rev-parse", "HEAD") != got.Snapshot || r.read("a") != "mine\n" || r.read("later") != "x" {
		t.Errorf("conflict: %+v, %v", got, err)
	}
	if s, err := r.Status(t.Context()); err != nil || s.InProgress != "" || s.Branch != "main" {
		t.Errorf("%+v, %v", s, err)
	}
	// A rewritten branch on which others work.
	r.server.Git("owner/repo", "update-ref", "refs/heads/main", "main~2")
	r.server.Commit("owner/repo", "main", "rewritten", map[string]string{"q": "q"})
	got, err = r.SafeCarryForward(t.Context(), me())
	if err != nil || !got.Forced || got.Rebased || got.Checkpoint == "" {
		t.Errorf("forced: %+v, %v", got, err)
	}
	r.user("checkout", "-q", "-b", "local-only")
	if got, err := r.SafeCarryForward(t.Context(), me()); err != nil || !got.NoUpstream {
		t.Errorf("no upstream: %+v, %v", got, err)
	}
	r.server.Commit("owner/repo", "main", "theirs", map[string]string{"a": "theirs again\n"})
	r.user("fetch", "-q")
	if out, code := r.guarded("rebase", "origin/main"); code == 0 {
		t.Fatal(out)
	}
	if _, err := r.SafeCarryForward(t.Context(), me()); fault.ReasonOf(err) != "BUSY" {
		t.Error(err)
	}
	r.user("rebase", "--abort")
	r.user("checkout", "-q", "--detach")
	if _, err := r.SafeCarryForward(t.Context(), me()); fault.ReasonOf(err) != "DETACHED" {
		t.Error(err)
	}
	r.user("checkout", "-q", "main")
	r.server.Fail(testgit.Unavailable)
	r.write(map[string]string{"offline": "x"})
	if got, err := r.SafeCarryForward(t.Context(), me()); fault.KindOf(err) != fault.Unavailable || got.Snapshot == "" {
		t.Errorf("offline: %+v, %v", got, err)
	}
}

func TestPush(t *testing.T) {
	r := newRig(t, map[string]string{"a": "1\n"})
	r.user("checkout", "-q", "-b", "mine")
	r.write(map[string]string{"a": "2\n"})
	head := r.commitAll("work")
	if p, err := r.Push(t.Context(), false); err != nil || p.Branch != "mine" || !slices.Equal(p.Commits, []string{head}) || p.Forced || r.server.Git("owner/repo", "rev-parse", "mine") != head {
		t.Errorf("%+v, %v", p, err)
	}
	r.user("commit", "-q", "--amend", "-m", "better work")
	if _, err := r.Push(t.Context(), false); fault.ReasonOf(err) != "DIVERGED" {
		t.Error(err)
	}
	if p, err := r.Push(t.Context(), true); err != nil || !p.Forced {
		t.Errorf("%+v, %v", p, err)
	}
	// Somebody pushes meanwhile: the lease holds.
	r.server.Commit("owner/repo", "mine", "theirs", map[string]string{"b": "1"})
	r.user("commit", "-q", "--amend", "-m", "best work")
	if _, err := r.Push(t.Context(), true); fault.ReasonOf(err) != "PUSH_REJECTED" {
		t.Error(err)
	}
	r.user("fetch", "-q")
	if p, err := r.Push(t.Context(), true); err != nil || !p.Forced { // one human beside the agent
		t.Errorf("%+v, %v", p, err)
	}
	r.user("commit", "-q", "--allow-empty", "-m", "x\n\nCo-authored-by: A <a@example.com>\nCo-authored-by: B <b@example.com>")
	r.user("push", "-q")
	r.user("commit", "-q", "--amend", "--allow-empty", "-m", "y")
	if _, err := r.Push(t.Context(), true); fault.ReasonOf(err) != "SHARED_BRANCH" {
		t.Error(err)
	}
	r.user("checkout", "-q", "main")
	r.user("commit", "-q", "--amend", "-m", "z")
	if _, err := r.Push(t.Context(), true); fault.ReasonOf(err) != "SHARED_BRANCH" {
		t.Errorf("the main branch is forced: %v", err)
	}
	r.user("checkout", "-q", "--detach")
	if _, err := r.Push(t.Context(), false); fault.ReasonOf(err) != "DETACHED" {
		t.Error(err)
	}
}

func TestSquashSnapshots(t *testing.T) {
	r := newRig(t, map[string]string{"a": "1"})
	for i, message := range []string{"wip: one", "first", "wip: two", "wip: three", "second\n\nwith a body", "wip: four"} {
		r.write(map[string]string{"a": strings.Repeat("x", i+2)})
		r.commitAll(message)
	}
	r.write(map[string]string{"b": "not committed"})
	before := r.read("a")
	n, err := r.SquashSnapshots(t.Context(), me(), "all")
	if err != nil || n != 4 {
		t.Errorf("%d, %v", n, err)
	}
	if got := r.user("log", "--format=%s|%b|%an", "origin/main.."); got != "second|with a body\n|Developer (Harvest)\nfirst||Developer (Harvest)" {
		t.Errorf("%q", got)
	}
	if r.read("a") != before || r.user("status", "--porcelain") != "?? b" || r.user("show", "HEAD:a") != before {
		t.Errorf("files changed: %s", r.user("status", "--porcelain"))
	}
	if n, err := r.SquashSnapshots(t.Context(), me(), "all"); err != nil || n != 0 {
		t.Errorf("again: %d, %v", n, err)
	}
	r.user("reset", "-q", "--hard", "origin/main")
	for _, text := range []string{"q", "r"} {
		r.write(map[string]string{"a": text})
		r.commitAll("wip: " + text)
	}
	if n, err := r.SquashSnapshots(t.Context(), me(), "all of it"); err != nil || n != 1 || r.user("log", "--format=%s", "origin/main..") != "all of it" {
		t.Errorf("snapshots only: %d, %v", n, err)
	}
}

// saved restores what SaveWork kept into a fresh clone and returns a function that reads
// its files.
func (r *rig) restored(s Saved) func(ref, file string) string {
	r.t.Helper()
	dir := filepath.Join(r.t.TempDir(), "restored")
	git := func(args ...string) string {
		r.t.Helper()
		out, err := testgit.Command(dir, args...).CombinedOutput()
		if err != nil {
			r.t.Errorf("git %q: %v: %s", args, err, out)
		}
		return strings.TrimSuffix(string(out), "\n")
	}
	r.must(os.Mkdir(dir, 0o755))
	git("init", "-q")
	git("fetch", "-q", r.server.URL+"/owner/repo.git", "+refs/heads/*:refs/heads/*")
	if s.Bundle != "" {
		git("fetch", "-q", s.Bundle, "+refs/harvest/*:refs/heads/*")
	}
	return func(ref, file string) string { return git("show", ref+":"+file) }
}

func TestSaveWork(t *testing.T) {
	for name, c := range map[string]struct {
		failure testgit.Failure
		noPush  bool
	}{"pushed": {}, "refused": {testgit.RefusesPush, false}, "offline": {testgit.Unavailable, false}, "told not to": {testgit.Works, true}} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, map[string]string{"a": "1", "gone": "1", "staged": "1", ".gitignore": "ignored\nnode_modules/\n"})
			o := SaveOptions{Session: "s-1", Who: me(), Bundle: filepath.Join(t.TempDir(), "work.bundle"), MaxFile: 1000, NoPush: c.noPush}
			if s, err := r.SaveWork(t.Context(), o); err != nil || !s.Nothing || s.IgnoredCount != 0 {
				t.Errorf("nothing: %+v, %v", s, err)
			}
			r.user("checkout", "-q", "-b", "feature/x")
			r.write(map[string]string{"a": "on feature"})
			r.commitAll("on feature")
			r.write(map[string]string{"a": "shelved"})
			if _, err := r.git(t.Context(), "stash"); err != nil {
				t.Fatal(err)
			}
			r.user("checkout", "-q", "main")
			r.write(map[string]string{"a": "committed"})
			r.commitAll("mine")
			r.write(map[string]string{"staged": "in the index"})
			r.user("add", "staged")
			r.write(map[string]string{
				"staged": "in the tree", "a": "changed", "gone": "", "new file\nwith *": "new", "dir/deep/x": "deep", "ignored": "i", "node_modules/m/x": "i",
				"big": strings.Repeat("b", 2000),
			})
			r.must(os.Symlink("/etc/passwd", filepath.Join(r.Dir, "link")))
			r.must(os.Chmod(filepath.Join(r.Dir, "dir/deep/x"), 0o755))
			if out, err := testgit.Command("", "init", "-q", filepath.Join(r.Dir, "nested")).CombinedOutput(); err != nil {
				t.Fatalf("%s", out)
			}
			r.write(map[string]string{"nested/x": "x"})
			r.server.Fail(c.failure)
			before := r.state()
			var saved Saved
			for range 2 { // it may be repeated
				var err error
				if saved, err = r.SaveWork(t.Context(), o); err != nil {
					t.Fatal(err)
				}
			}
			if after := r.state(); after != before {
				t.Errorf("it changed something:\n%s\n%s", before, after)
			}
			r.server.Fail(testgit.Works)
			if pushed := name == "pushed"; (saved.Remote != "") != pushed || (saved.Bundle != "") == pushed || (saved.PushError != "") != (c.failure != testgit.Works) {
				t.Errorf("%+v", saved)
			}
			if !slices.Equal(saved.Left, []Left{{"nested", 0, NestedRepository}, {"big", 2000, TooLarge}}) || !slices.Equal(saved.Ignored, []string{"ignored", "node_modules/"}) {
				t.Errorf("left %+v, ignored %q", saved.Left, saved.Ignored)
			}
			read := r.restored(saved)
			for what, want := range map[[2]string]string{
				{"wip/s-1", "a"}: "changed", {"wip/s-1", "staged"}: "in the tree", {"wip/s-1^2", "staged"}: "in the index", {"wip/s-1", "new file\nwith *"}: "new",
				{"wip/s-1", "dir/deep/x"}: "deep", {"wip/s-1", "link"}: "/etc/passwd", {"wip/s-1^1", "a"}: "committed", {"wip/s-1--feature/x", "a"}: "on feature",
				{"wip/s-1--stash-0", "a"}: "shelved",
			} {
				if got := read(what[0], what[1]); got != want {
					t.Errorf("%s: %q", what, got)
				}
			}
			if got := r.user("ls-tree", "-r", saved.Refs[0].Commit); strings.Contains(got, "gone") || strings.Contains(got, "big") || strings.Contains(got, "nested") || strings.Contains(got, "ignored\n") ||
				!strings.Contains(got, "100755") || !strings.Contains(got, "120000") {
				t.Error(got)
			}
			if got := r.user("log", "-1", "--format=%an <%ae>", saved.Refs[0].Commit); got != harvest {
				t.Error(got)
			}
		})
	}
}

// Work is saved out of the middle of a rebase with conflicts, from a detached head, and
// before the first commit of a repository without a remote.
func TestSaveWorkInOddStates(t *testing.T) {
	r := newRig(t, map[string]string{"a": "1\n"})
	o := SaveOptions{Session: "s", Who: me(), Bundle: filepath.Join(t.TempDir(), "b")}
	r.write(map[string]string{"a": "mine\n"})
	r.commitAll("mine")
	r.server.Commit("owner/repo", "main", "theirs", map[string]string{"a": "theirs\n"})
	r.user("fetch", "-q")
	if out, code := r.guarded("rebase", "origin/main"); code == 0 {
		t.Fatal(out)
	}
	r.write(map[string]string{"other": "x"})
	saved, err := r.SaveWork(t.Context(), o)
	if err != nil || saved.Remote == "" {
		t.Fatalf("%+v, %v", saved, err)
	}
	read := r.restored(saved)
	if a, b := read("wip/s", "a"), read("wip/s--main", "a"); !strings.Contains(a, "<<<<<<<") || !strings.Contains(a, "mine") || b != "mine" || read("wip/s", "other") != "x" {
		t.Errorf("%q %q", a, b)
	}
	r.user("rebase", "--abort")
	fresh := filepath.Join(r.root, "fresh")
	if out, err := testgit.Command("", "init", "-q", "-b", "main", fresh).CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	r.Dir = fresh
	r.write(map[string]string{"first": "x"})
	saved, err = r.SaveWork(t.Context(), o)
	if err != nil || saved.Bundle == "" || saved.PushError != "" {
		t.Fatalf("%+v, %v", saved, err)
	}
	if got := r.restored(saved)("wip/s", "first"); got != "x" {
		t.Error(got)
	}
	for _, bad := range []SaveOptions{{Session: "../x", Bundle: "/x"}, {Session: "s", Bundle: "x"}} {
		if _, err := r.SaveWork(t.Context(), bad); err == nil {
			t.Errorf("%+v", bad)
		}
	}
}
