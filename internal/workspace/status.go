package workspace

import (
	"context"
	"strconv"
	"strings"

	"github.com/harvest-run/executord/internal/fault"
)

// Status is how a repository stands.
type Status struct {
	// Branch that is checked out; "" for none. Head is its commit, "" before the first.
	Branch, Head string
	// Upstream is the branch that it follows, such as origin/main; "" for none.
	Upstream string
	// Ahead and Behind are the commits that it has and lacks.
	Ahead, Behind int
	// Staged and Modified files that are tracked, Untracked ones (a directory counts once),
	// and those in conflict.
	Staged, Modified, Untracked, Conflicts int
	// InProgress is "rebase", "merge", "cherry-pick", "revert", "bisect" or "".
	InProgress string
	// Unpushed are the branches with commits that no remote has, "" for those of a
	// detached head.
	Unpushed []Unpushed
	// Stashes is how many there are.
	Stashes int
}

// Unpushed is a branch with commits that no remote has.
type Unpushed struct {
	Branch, Head string
	Commits      int
}

// Dirty says whether something is not committed.
func (s Status) Dirty() bool { return s.Staged+s.Modified+s.Untracked+s.Conflicts > 0 }

// Clean says whether nothing would be lost with the repository.
func (s Status) Clean() bool { return !s.Dirty() && len(s.Unpushed) == 0 && s.Stashes == 0 }

// head finds the branch and the commit.
func (t Tree) head(ctx context.Context) (Status, error) {
	out, err := t.git(ctx, "status", "--porcelain=v2", "--branch", "-z", "--untracked-files=no", "--ignore-submodules=all")
	if err != nil {
		return Status{}, err
	}
	return parseStatus(out), nil
}

// Status tells how the repository stands. It changes nothing.
func (t Tree) Status(ctx context.Context) (Status, error) {
	args := []string{"status", "--porcelain=v2", "--branch", "-z", "--untracked-files=normal"}
	out, err := t.git(ctx, args...)
	if fault.ReasonOf(err) == "GIT_FAILED" {
		// A .gitmodules that git does not accept must not keep work from being seen.
		out, err = t.git(ctx, append(args, "--ignore-submodules=all")...)
	}
	if err != nil {
		return Status{}, err
	}
	s := parseStatus(out)
	if s.Unpushed, err = t.unpushed(ctx, s); err != nil {
		return Status{}, err
	}
	marks, err := run(ctx, t.Runner, t.Dir, commandTime, nil, nil, "sh", "-c",
		`g=$(git rev-parse --absolute-git-dir) || exit; for m in rebase-merge:rebase rebase-apply:rebase MERGE_HEAD:merge CHERRY_PICK_HEAD:cherry-pick REVERT_HEAD:revert BISECT_LOG:bisect; do `+
			`[ -e "$g/${m%%:*}" ] && { echo "${m#*:}"; break; }; done; echo; git stash list 2>/dev/null | wc -l`)
	if err != nil {
		return Status{}, err
	}
	if marks.code != 0 {
		return Status{}, marks.failed("look at the state of " + t.Dir)
	}
	progress, stashes, _ := strings.Cut(strings.TrimSpace(marks.stdout), "\n")
	if stashes == "" {
		progress, stashes = "", progress
	}
	s.InProgress = progress
	s.Stashes, _ = strconv.Atoi(strings.TrimSpace(stashes)) // wc writes a number
	return s, nil
}

// parseStatus reads git status --porcelain=v2 --branch -z.
func parseStatus(out string) Status {
	var s Status
	all := records(out)
	for i := 0; i < len(all); i++ {
		kind, rest, _ := strings.Cut(all[i], " ")
		switch kind {
		case "#":
			key, text, _ := strings.Cut(rest, " ")
			switch key {
			case "branch.oid":
				if text != "(initial)" {
					s.Head = text
				}
			case "branch.head":
				if text != "(detached)" {
					s.Branch = text
				}
			case "branch.upstream":
				s.Upstream = text
			case "branch.ab":
				ahead, behind, _ := strings.Cut(text, " ")
				s.Ahead, _ = strconv.Atoi(ahead) // +2
				s.Behind, _ = strconv.Atoi(behind)
				s.Behind = -s.Behind
			}
		case "1", "2":
			if len(rest) >= 2 {
				if rest[0] != '.' {
					s.Staged++
				}
				if rest[1] != '.' {
					s.Modified++
				}
			}
			if kind == "2" {
				i++ // the name before the renaming
			}
		case "u":
			s.Conflicts++
		case "?":
			s.Untracked++
		}
	}
	return s
}

// notOurs leaves out what SaveWork pushed: that a remote has it does not make it pushed.
const notOurs = "--exclude=*/wip/*"

// unpushed finds branches with commits that no remote has.
func (t Tree) unpushed(ctx context.Context, s Status) ([]Unpushed, error) {
	var all []Unpushed
	if s.Branch == "" && s.Head != "" {
		all = append(all, Unpushed{"", s.Head, 0})
	}
	refs, err := t.git(ctx, "for-each-ref", "--format=%(objectname) %(refname)", "refs/heads")
	if err != nil {
		return nil, err
	}
	for _, line := range lines(refs) {
		head, name, _ := strings.Cut(line, " ")
		all = append(all, Unpushed{strings.TrimPrefix(name, "refs/heads/"), head, 0})
	}
	var found []Unpushed
	for _, u := range all {
		args := []string{"rev-list", "--count", u.Head, "--not", notOurs, "--remotes"}
		if u.Branch == "" {
			args = append(args, "--branches") // what a branch has is told with that
		}
		out, err := t.git(ctx, args...)
		if err != nil {
			return nil, err
		}
		if u.Commits, _ = strconv.Atoi(out); u.Commits > 0 {
			found = append(found, u)
		}
	}
	return found, nil
}

// Diff is what the working tree differs by from a commit, as a patch: committed or not,
// with the files that git does not know yet and is not told to ignore. The index that is
// there is not touched.
func (t Tree) Diff(ctx context.Context, commit string) ([]byte, error) {
	env := map[string]string{"GIT_INDEX_FILE": diffIndex}
	defer func() {
		// A left-over index is written over by the next.
		_, _ = run(context.WithoutCancel(ctx), t.Runner, t.Dir, commandTime, nil, nil, "rm", "-f", "--", diffIndex)
	}()
	if commit == "" {
		commit = emptyTree
	}
	if _, err := t.gitWith(ctx, env, "read-tree", commit); err != nil {
		return nil, err
	}
	if _, err := t.gitWith(ctx, env, "add", "--all", "--ignore-errors", "--", "."); err != nil {
		return nil, err
	}
	text, err := t.gitWith(ctx, env, "diff", "--cached", "--no-color", "--no-ext-diff", "--no-textconv", "--find-renames", commit, "--")
	return []byte(text), err
}

const (
	diffIndex = "/tmp/.harvest-diff-index"
	// emptyTree is git's name of a tree with nothing in it.
	emptyTree = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
)
