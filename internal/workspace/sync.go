package workspace

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/harvest-run/executord/internal/fault"
)

// snapshotMessage is that of a commit before a sync. Those whose message begins with
// "wip:" are squashed before the last push.
const snapshotMessage = "wip: snapshot before sync"

// Sync is what SafeCarryForward did.
type Sync struct {
	// Snapshot is the commit that was made of what was not committed; "" for none.
	Snapshot string
	// Checkpoint is the branch that has the state before, if it was kept.
	Checkpoint string
	// Rebased says that commits were moved, Head where the branch is now.
	Rebased bool
	Head    string
	// Conflicts are the files for which the rebase was given up; then the branch is as it
	// was, with the snapshot, and the checkpoint is kept.
	Conflicts []string
	// NoUpstream says that the remote has no such branch: nothing was to be done.
	NoUpstream bool
	// Forced says that the remote's branch was rewritten. On a branch that others work on
	// too nothing more was done then, and the checkpoint is kept.
	Forced bool
}

// SafeCarryForward brings a branch up to date without a moment in which work exists in
// the working tree only: it commits a snapshot, fetches, and rebases onto
// origin/<branch>, with a checkpoint branch while that can go wrong. Conflicts and forced updates are a result
// and no error. Faults: FailedPrecondition with BUSY in the middle of another operation, with DETACHED
// without a branch; those of a fetch.
func (t Tree) SafeCarryForward(ctx context.Context, who Identity) (Sync, error) {
	env, err := who.environment()
	if err != nil {
		return Sync{}, err
	}
	s, err := t.Status(ctx)
	if err != nil {
		return Sync{}, err
	}
	switch {
	case s.InProgress != "" || s.Conflicts > 0:
		return Sync{}, fault.New(fault.FailedPrecondition, "BUSY", "%s is in the middle of a %s; finish or abort it first", t.Dir, orSomething(s.InProgress))
	case s.Branch == "":
		return Sync{}, fault.New(fault.FailedPrecondition, "DETACHED", "%s has no branch checked out", t.Dir)
	}
	done := Sync{Head: s.Head}
	if s.Dirty() {
		if done.Snapshot, err = t.Commit(ctx, who, snapshotMessage); err != nil {
			return done, err
		}
		done.Head = done.Snapshot
	}
	remote := "refs/remotes/origin/" + s.Branch
	before, err := t.resolve(ctx, remote)
	if err != nil {
		return done, err
	}
	if _, err := t.git(ctx, "fetch", "--no-tags", "origin"); err != nil {
		return done, err
	}
	after, err := t.resolve(ctx, remote)
	if err != nil || after == "" {
		done.NoUpstream = err == nil
		return done, err
	}
	if before != "" && before != after {
		if done.Forced, err = t.not(ctx, "merge-base", "--is-ancestor", before, after); err != nil {
			return done, err
		}
	}
	if behind, err := t.not(ctx, "merge-base", "--is-ancestor", after, done.Head); err != nil || !behind {
		return done, err
	}
	return t.carry(ctx, env, s.Branch, after, done)
}

// carry rebases onto a commit.
func (t Tree) carry(ctx context.Context, env map[string]string, branch, onto string, done Sync) (Sync, error) {
	// Only a branch that has nothing of its own cannot go wrong.
	risky, err := t.not(ctx, "merge-base", "--is-ancestor", done.Head, onto)
	if err != nil {
		return done, err
	}
	if risky {
		if done.Checkpoint, err = t.Checkpoint(ctx, branch); err != nil {
			return done, err
		}
	}
	if done.Forced {
		own, err := t.own(ctx, branch)
		if err != nil || !own {
			return done, err
		}
	}
	out, err := t.try(ctx, env, "rebase", "--no-autostash", onto)
	if err != nil {
		return done, err
	}
	if out.code != 0 {
		conflicts, err := t.git(ctx, "diff", "--name-only", "--diff-filter=U", "-z")
		if err != nil {
			return done, err
		}
		if _, err := t.git(ctx, "rebase", "--abort"); err != nil {
			return done, fmt.Errorf("give up a rebase that failed (the work is in %s): %w", done.Checkpoint, err)
		}
		if done.Conflicts = records(conflicts); len(done.Conflicts) == 0 {
			return done, out.failed("rebase " + branch)
		}
		return done, nil
	}
	done.Rebased = true
	if done.Head, err = t.git(ctx, "rev-parse", "HEAD"); err != nil {
		return done, err
	}
	if risky {
		if _, err := t.git(ctx, "branch", "-D", done.Checkpoint); err != nil {
			return done, err
		}
		done.Checkpoint = ""
	}
	return done, nil
}

func orSomething(operation string) string {
	if operation == "" {
		return "conflict"
	}
	return operation
}

// Checkpoint makes a branch checkpoint-<branch>-<unix time> where HEAD is, and returns
// its name.
func (t Tree) Checkpoint(ctx context.Context, branch string) (string, error) {
	base := fmt.Sprintf("checkpoint-%s-%d", branch, time.Now().Unix())
	for name, n := base, 2; ; name, n = fmt.Sprintf("%s-%d", base, n), n+1 {
		if taken, err := t.resolve(ctx, "refs/heads/"+name); err != nil {
			return "", err
		} else if taken != "" {
			continue
		}
		_, err := t.git(ctx, "branch", "--no-track", name, "HEAD")
		return name, err
	}
}

// Commit commits everything that is not ignored, without running the repository's
// hooks, and returns the commit; that of HEAD if there was nothing to commit.
func (t Tree) Commit(ctx context.Context, who Identity, message string) (string, error) {
	env, err := who.environment()
	if err != nil {
		return "", err
	}
	if strings.TrimSpace(message) == "" {
		return "", fault.InvalidField("COMMIT_MESSAGE", "message", "is empty")
	}
	if _, err := t.git(ctx, "add", "-A"); err != nil {
		return "", err
	}
	staged, err := t.not(ctx, "diff", "--cached", "--quiet")
	if err != nil {
		return "", err
	}
	if staged {
		if _, err := t.gitWith(ctx, env, "commit", "--quiet", "--no-verify", "--cleanup=whitespace", "-m", message); err != nil {
			return "", err
		}
	}
	return t.git(ctx, "rev-parse", "HEAD")
}

// resolve returns the commit of a ref; "" if there is none.
func (t Tree) resolve(ctx context.Context, ref string) (string, error) {
	out, err := t.try(ctx, nil, "rev-parse", "--verify", "--quiet", "--end-of-options", ref+"^{commit}")
	return strings.TrimSpace(out.stdout), err
}

// not asks git a question that it answers with its exit code: false for 0, true for 1.
func (t Tree) not(ctx context.Context, args ...string) (bool, error) {
	out, err := t.try(ctx, nil, args...)
	if err == nil && out.code > 1 {
		err = out.failed("git " + args[0])
	}
	return out.code == 1, err
}
