package workspace

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
)

// Checkout is a repository that was cloned.
type Checkout struct {
	// Tree is where it lies.
	Tree Tree
	// Branch is the one that is checked out; "" for none.
	Branch string
	// Head is the commit; "" in an empty repository.
	Head string
	// Existing says that an earlier clone was found, perhaps with work in it.
	Existing bool
}

// Clone clones a repository that Plan has checked into root/NAME, and tells how far it
// has come. It appears there all at once, so that a repeat after a crash finds either
// nothing or the whole, which it leaves as it is. Faults: AlreadyExists with reason WORKSPACE_OCCUPIED
// for a directory that is something else; FailedPrecondition with BRANCH_NOT_FOUND,
// REPOSITORY_NOT_FOUND or CREDENTIALS_REFUSED; Unavailable with GIT_SERVER; Exhausted with DISK_FULL.
func Clone(ctx context.Context, r Runner, root string, repository Repository, progress func(Progress)) (Checkout, error) {
	if checkName(repository.Name) != nil {
		return Checkout{}, errors.New("clone a repository that is not planned")
	}
	t := Tree{r, path.Join(root, repository.Name)}
	existing, err := t.adopt(ctx, repository)
	if err != nil {
		return Checkout{}, err
	}
	if !existing {
		if err := t.clone(ctx, root, repository, progress); err != nil {
			return Checkout{}, err
		}
	}
	status, err := t.head(ctx)
	if err != nil {
		return Checkout{}, err
	}
	return Checkout{t, status.Branch, status.Head, existing}, nil
}

// adopt finds what an earlier Clone made.
func (t Tree) adopt(ctx context.Context, repository Repository) (bool, error) {
	out, err := run(ctx, t.Runner, "", commandTime, nil, nil, "sh", "-c",
		`if [ ! -e "$1" ] && [ ! -L "$1" ]; then echo none; elif [ -d "$1/.git" ] && [ ! -L "$1" ] && [ ! -L "$1/.git" ]; then echo git; elif [ -d "$1" ] && [ ! -L "$1" ] && rmdir "$1" 2>/dev/null; then echo none; else echo other; fi`,
		"sh", t.Dir)
	if err != nil {
		return false, err
	}
	switch strings.TrimSpace(out.stdout) {
	case "none":
		return false, nil
	case "git":
		// Not with url.*.insteadOf, which git remote would apply.
		if got, err := t.git(ctx, "config", "--local", "--get", "remote.origin.url"); err == nil && got == repository.URL {
			return true, nil
		}
	}
	return false, fault.New(fault.AlreadyExists, "WORKSPACE_OCCUPIED", "%s is there and is not a clone of %s", t.Dir, repository.URL)
}

// clone makes a fresh one beside its place and moves it there.
func (t Tree) clone(ctx context.Context, root string, repository Repository, progress func(Progress)) error {
	temporary := path.Join(root, ".clone-"+repository.Name)
	out, err := run(ctx, t.Runner, "", commandTime, nil, nil, "sh", "-c", `rm -rf -- "$1" && mkdir -p -- "$2"`, "sh", temporary, root)
	if err != nil {
		return err
	}
	if out.code != 0 {
		return out.failed("make room for a clone")
	}
	args := append([]string{"git"}, hardened()...)
	// Without templates there are no hooks. Links are kept as links; what they point at is
	// looked at by nobody here.
	args = append(args, "clone", "--progress", "--template=", "--no-hardlinks", "--no-recurse-submodules", "--origin=origin")
	if repository.Branch != "" {
		args = append(args, "--branch="+repository.Branch)
	}
	if repository.Depth > 0 {
		args = append(args, "--depth="+strconv.Itoa(repository.Depth), "--no-single-branch")
	}
	args = append(args, "--", repository.URL, temporary)
	if err := t.follow(ctx, "clone "+repository.URL, root, args, progress); err != nil {
		return err
	}
	if repository.Submodules {
		args := append(append([]string{"git"}, hardened()...), "submodule", "update", "--init", "--recursive", "--progress")
		if err := t.follow(ctx, "clone submodules of "+repository.URL, temporary, args, progress); err != nil {
			return err
		}
	}
	// mv -T renames, and refuses what is there by now; sync makes the clone outlive a crash.
	out, err = run(ctx, t.Runner, "", commandTime, nil, nil, "sh", "-c", `mv -T -n -- "$1" "$2" && [ ! -e "$1" ]`, "sh", temporary, t.Dir)
	if err == nil && out.code != 0 {
		err = fault.New(fault.AlreadyExists, "WORKSPACE_OCCUPIED", "%s has come into being during the clone", t.Dir)
	}
	return err
}

// follow runs a git that tells its progress.
func (t Tree) follow(ctx context.Context, what, dir string, args []string, progress func(Progress)) error {
	if progress == nil {
		progress = func(Progress) {}
	}
	var messages []string
	kept := 0
	parser := newProgressParser(progress, func(line string) {
		if kept += len(line); kept < 64<<10 {
			messages = append(messages, line)
		}
	})
	exit, err := t.Runner.RunStream(ctx, guestclient.Command{Args: args, Env: environment(), Dir: dir, Timeout: networkTime},
		func(stream guestv1.Stream, data []byte) error {
			if stream == guestv1.Stream_STREAM_STDERR {
				parser.write(data)
			}
			return nil
		})
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	parser.end()
	outcome := guestclient.Outcome{Exit: exit}
	switch {
	case exit.GetStopCause() == guestv1.StopCause_STOP_CAUSE_TIMEOUT:
		return fault.New(fault.Unavailable, "GIT_TIMEOUT", "%s did not end within %v", what, networkTime)
	case outcome.Code() != 0:
		return classify(what, outcome.Code(), strings.Join(messages, "\n"))
	}
	return nil
}
