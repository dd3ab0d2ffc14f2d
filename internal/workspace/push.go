package workspace

import (
	"context"
	"strings"

	"github.com/harvest-run/executord/internal/fault"
)

// Pushed is what Push did.
type Pushed struct {
	Branch, Head string
	// Commits are those that the remote did not have, newest first.
	Commits []string
	// Forced says that the remote's branch was replaced.
	Forced bool
}

// Push pushes the branch that is checked out to origin. A history that was rewritten is
// pushed only with force, which takes that the branch is the agent's own: it is not the remote's main
// one, and at most one human beside the agent has commits on it, co-authors counted. Even so the remote's branch
// must be where it was last seen. Faults: FailedPrecondition with DETACHED, with DIVERGED without force, with
// SHARED_BRANCH, with PUSH_REJECTED; those of a push.
func (t Tree) Push(ctx context.Context, force bool) (Pushed, error) {
	s, err := t.head(ctx)
	if err != nil {
		return Pushed{}, err
	}
	if s.Branch == "" || s.Head == "" {
		return Pushed{}, fault.New(fault.FailedPrecondition, "DETACHED", "%s has no branch with commits checked out", t.Dir)
	}
	p := Pushed{Branch: s.Branch, Head: s.Head}
	known, err := t.resolve(ctx, "refs/remotes/origin/"+s.Branch)
	if err != nil {
		return p, err
	}
	args := []string{"rev-list", s.Head, "--not", "--remotes=origin"}
	if known != "" {
		args = []string{"rev-list", known + ".." + s.Head}
	}
	out, err := t.git(ctx, args...)
	if err != nil {
		return p, err
	}
	p.Commits = lines(out)
	push := []string{"push", "--porcelain", "--no-verify", "--set-upstream"}
	if known != "" {
		diverged, err := t.not(ctx, "merge-base", "--is-ancestor", known, s.Head)
		if err != nil {
			return p, err
		}
		if diverged {
			if !force {
				return p, fault.New(fault.FailedPrecondition, "DIVERGED", "origin/%s has commits that %s has not: carry the work forward first", s.Branch, s.Branch)
			}
			own, err := t.own(ctx, s.Branch)
			if err != nil {
				return p, err
			}
			if !own {
				return p, fault.New(fault.FailedPrecondition, "SHARED_BRANCH", "%s is not the agent's own: others have commits on it, or it is the main one", s.Branch)
			}
			p.Forced = true
			push = append(push, "--force-with-lease=refs/heads/"+s.Branch+":"+known)
		}
	}
	result, err := t.try(ctx, nil, append(push, "origin", "refs/heads/"+s.Branch+":refs/heads/"+s.Branch)...)
	if err != nil {
		return p, err
	}
	if result.code != 0 {
		if strings.Contains(result.stdout, "[rejected]") || strings.Contains(result.stdout, "[remote rejected]") {
			return p, fault.New(fault.FailedPrecondition, "PUSH_REJECTED", "push %s: %s", s.Branch, clip(strings.TrimSpace(result.stdout+result.stderr), 2<<10))
		}
		return p, result.failed("push " + s.Branch)
	}
	return p, nil
}

// own says whether a branch of origin is the agent's own, by its authors.
func (t Tree) own(ctx context.Context, branch string) (bool, error) {
	main, err := t.mainBranch(ctx)
	if err != nil || branch == main {
		return false, err
	}
	args := []string{"log", "--format=%an <%ae>%n%(trailers:key=Co-authored-by,valueonly,unfold)", "refs/remotes/origin/" + branch}
	if base, err := t.resolve(ctx, "refs/remotes/origin/"+main); err != nil {
		return false, err
	} else if base != "" {
		args = append(args, "--not", base)
	}
	out, err := t.git(ctx, args...)
	if err != nil {
		return false, err
	}
	humans := make(map[string]bool)
	for _, author := range lines(out) {
		name, email, _ := strings.Cut(author, "<")
		if name = strings.TrimSpace(name); name != "" && !strings.HasSuffix(name, Harvest) {
			humans[strings.ToLower(strings.TrimSuffix(strings.TrimSpace(email), ">"))] = true
		}
	}
	return len(humans) <= 1, nil
}

// mainBranch is the one that origin checks out, or else main or master.
func (t Tree) mainBranch(ctx context.Context) (string, error) {
	out, err := t.try(ctx, nil, "symbolic-ref", "--quiet", "--short", "refs/remotes/origin/HEAD")
	if err != nil {
		return "", err
	}
	if name, ok := strings.CutPrefix(strings.TrimSpace(out.stdout), "origin/"); ok {
		return name, nil
	}
	if old, err := t.resolve(ctx, "refs/remotes/origin/master"); err != nil || old != "" {
		return "master", err
	}
	return "main", nil
}

// SquashSnapshots makes the snapshots among the commits that origin/<branch> lacks part
// of the commits that they belong to: those before them, or, where there is none, the one behind. A branch
// of snapshots only becomes one commit with the message. Neither files nor the index change,
// and nothing can conflict, since only the history between is left out. It returns how many were squashed; 0
// too where the commits are not in one line.
func (t Tree) SquashSnapshots(ctx context.Context, who Identity, message string) (int, error) {
	env, err := who.environment()
	if err != nil {
		return 0, err
	}
	s, err := t.head(ctx)
	if err != nil {
		return 0, err
	}
	if s.Branch == "" || s.Head == "" {
		return 0, fault.New(fault.FailedPrecondition, "DETACHED", "%s has no branch with commits checked out", t.Dir)
	}
	base, err := t.resolve(ctx, "refs/remotes/origin/"+s.Branch)
	if err == nil && base == "" {
		var main string
		if main, err = t.mainBranch(ctx); err == nil {
			base, err = t.resolve(ctx, "refs/remotes/origin/"+main)
		}
	}
	if err != nil || base == "" {
		return 0, err
	}
	out, err := t.git(ctx, "log", "--reverse", "-z", "--format=%H%n%P%n%an%n%ae%n%ad%n%B", "--date=raw", base+".."+s.Head)
	if err != nil {
		return 0, err
	}
	groups, squashed := group(records(out), message)
	if squashed == 0 {
		return 0, nil
	}
	parent := ""
	for _, g := range groups {
		if parent == "" {
			parent = g.parent
		}
		as := map[string]string{"GIT_COMMITTER_NAME": env["GIT_COMMITTER_NAME"], "GIT_COMMITTER_EMAIL": env["GIT_COMMITTER_EMAIL"],
			"GIT_AUTHOR_NAME": g.name, "GIT_AUTHOR_EMAIL": g.email, "GIT_AUTHOR_DATE": g.date}
		if parent, err = t.gitWith(ctx, as, "commit-tree", "-p", parent, "-m", strings.TrimSpace(g.message), g.last+"^{tree}"); err != nil {
			return 0, err
		}
	}
	_, err = t.git(ctx, "update-ref", "-m", "squash snapshots", "refs/heads/"+s.Branch, parent, s.Head)
	return squashed, err
}

// kept is a commit that is made of some.
type kept struct {
	parent, last               string
	name, email, date, message string
	snapshot                   bool
}

// group puts snapshots, which are of what git log told, to other commits.
func group(commits []string, message string) (groups []kept, squashed int) {
	for _, text := range commits {
		part := strings.SplitN(text, "\n", 6)
		if len(part) < 6 || strings.Contains(part[1], " ") || part[1] == "" {
			return nil, 0 // a merge, or a root
		}
		c := kept{part[1], part[0], part[2], part[3], part[4], part[5], strings.HasPrefix(part[5], "wip:")}
		if n := len(groups); n > 0 && (c.snapshot || groups[n-1].snapshot) {
			before := &groups[n-1]
			if !c.snapshot { // its own words, and the parent of the snapshots before it
				c.parent = before.parent
				*before = c
			}
			before.last = c.last
			squashed++
			continue
		}
		groups = append(groups, c)
	}
	for i := range groups {
		if groups[i].snapshot && message != "" {
			groups[i].message = message
			if len(commits) == 1 {
				squashed++ // it gets the message
			}
		}
	}
	return groups, squashed
}
