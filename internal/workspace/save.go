package workspace

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

const (
	// DefaultMaxFile is the size in bytes from which on a file that is not committed is
	// left out: servers refuse it, and with it everything else.
	DefaultMaxFile = 50 << 20
	// maxTold bounds the paths that are told of a kind.
	maxTold = 100
)

// SaveOptions say how to save work.
type SaveOptions struct {
	// Session names the refs: wip/SESSION, and wip/SESSION--BRANCH for the work on other branches.
	Session string
	Who     Identity
	// Bundle is the file, absolute and in the sandbox, that gets what cannot be pushed.
	Bundle string
	// MaxFile is DefaultMaxFile if it is 0.
	MaxFile int64
	// NoPush writes a bundle in any case.
	NoPush bool
}

// Saved is where work is.
type Saved struct {
	// Nothing says that there was nothing to save: all is on the remote.
	Nothing bool
	// Refs are what was saved, by the name that it has there.
	Refs []SavedRef
	// Remote is the URL that it was pushed to; "" if it was not.
	Remote string
	// Bundle is the file that it was written to; "" if it was not.
	Bundle string
	// PushError is why it was not pushed, where that was tried.
	PushError string
	// Left is what was not saved; Ignored are paths that .gitignore names, which are
	// never saved. Both have at most 100 entries; LeftCount and IgnoredCount say how many there are.
	Left                    []Left
	Ignored                 []string
	LeftCount, IgnoredCount int
}

// SavedRef is a ref that has work.
type SavedRef struct {
	// Name such as refs/heads/wip/SESSION. Locally it is below refs/harvest/.
	Name string
	// Branch it belongs to; "" for a detached head and for stashes.
	Branch string
	// Commit is its newest, Uncommitted whether that was made of what was not committed.
	Commit      string
	Uncommitted bool
}

// Left is a file that was not saved.
type Left struct {
	Path   string
	Size   int64
	Reason string
}

// Reasons for Left.
const (
	// TooLarge is a file of more than SaveOptions.MaxFile.
	TooLarge = "TOO_LARGE"
	// NestedRepository is a repository within the working tree, of which git would keep a
	// name only.
	NestedRepository = "NESTED_REPOSITORY"
)

// SaveWork keeps what exists in the sandbox only: files that are not committed, commits that are
// on no remote, on whatever branch, and stashes. It pushes them as wip/ branches of their own, or, where that is
// not possible, writes them to a bundle. Neither HEAD nor the index nor a file of the
// working tree changes, so it can be done at any time and again. What it had to leave it tells.
func (t Tree) SaveWork(ctx context.Context, o SaveOptions) (Saved, error) {
	if checkName(o.Session) != nil || !path.IsAbs(o.Bundle) {
		return Saved{}, errors.New("save work: it needs the name of a session and the path of a bundle")
	}
	s, err := t.Status(ctx)
	if err != nil {
		return Saved{}, err
	}
	var saved Saved
	if err := t.ignored(ctx, &saved); err != nil {
		return saved, err
	}
	work, err := t.snapshot(ctx, o, s, &saved)
	if err != nil {
		return saved, err
	}
	name := "refs/heads/wip/" + o.Session
	if work != "" {
		saved.Refs = append(saved.Refs, SavedRef{name, s.Branch, work, true})
	}
	for _, u := range s.Unpushed {
		switch {
		case u.Branch == s.Branch && work != "": // its parent
		case u.Branch == s.Branch:
			saved.Refs = append(saved.Refs, SavedRef{name, u.Branch, u.Head, false})
		default:
			saved.Refs = append(saved.Refs, SavedRef{name + "--" + u.Branch, u.Branch, u.Head, false})
		}
	}
	if s.Stashes > 0 {
		out, err := t.git(ctx, "log", "--walk-reflogs", "--format=%H", "refs/stash")
		if err != nil {
			return saved, err
		}
		for i, commit := range lines(out) {
			saved.Refs = append(saved.Refs, SavedRef{name + "--stash-" + strconv.Itoa(i), "", commit, false})
		}
	}
	if len(saved.Refs) == 0 {
		saved.Nothing = true
		return saved, nil
	}
	return saved, t.keep(ctx, o, &saved)
}

// local is where a saved ref lies in the repository itself, so that a snapshot of the
// sandbox has it too and git's own tidying leaves it.
func local(name string) string { return "refs/harvest/" + strings.TrimPrefix(name, "refs/heads/") }

// keep brings what was saved out of the repository.
func (t Tree) keep(ctx context.Context, o SaveOptions, saved *Saved) error {
	for _, ref := range saved.Refs {
		if _, err := t.git(ctx, "update-ref", local(ref.Name), ref.Commit); err != nil {
			return err
		}
	}
	remote, err := t.try(ctx, nil, "config", "--get", "remote.origin.url")
	if err != nil {
		return err
	}
	// By the URL, so that the wip/ refs do not become what the remote is known to have.
	if url := strings.TrimSpace(remote.stdout); url != "" && !o.NoPush {
		args := []string{"push", "--porcelain", "--no-verify", "--atomic", "--", url}
		for _, ref := range saved.Refs {
			args = append(args, "+"+local(ref.Name)+":"+ref.Name) // nobody else's: the session is in its name
		}
		out, err := t.try(ctx, nil, args...)
		if err == nil && out.code == 0 {
			saved.Remote = url
			return nil
		}
		if err == nil {
			err = out.failed("push")
			if rejected := strings.TrimSpace(out.stdout); strings.Contains(rejected, "rejected]") {
				err = fmt.Errorf("%w; %s", err, clip(rejected, 1<<10))
			}
		}
		if ctx.Err() != nil {
			return err
		}
		saved.PushError = err.Error()
	}
	// Without what the remote has, if it has anything.
	args := []string{"bundle", "create", "--quiet", o.Bundle + ".new"}
	for _, ref := range saved.Refs {
		args = append(args, local(ref.Name))
	}
	if out, err := t.try(ctx, nil, append(args, "--not", notOurs, "--remotes")...); err != nil {
		return err
	} else if out.code != 0 {
		return out.failed("write what could not be pushed to a bundle")
	}
	out, err := run(ctx, t.Runner, t.Dir, commandTime, nil, nil, "sh", "-c", `sync -- "$1" && mv -f -- "$1" "$2"`, "sh", o.Bundle+".new", o.Bundle)
	if err != nil {
		return err
	}
	if out.code != 0 {
		return out.failed("write a bundle")
	}
	saved.Bundle = o.Bundle
	return nil
}

// ignored lists what .gitignore names, directories as one.
func (t Tree) ignored(ctx context.Context, saved *Saved) error {
	out, err := t.git(ctx, "ls-files", "--others", "--ignored", "--exclude-standard", "--directory", "-z")
	if err != nil {
		return err
	}
	all := records(out)
	saved.IgnoredCount = len(all)
	saved.Ignored = all[:min(len(all), maxTold)]
	return nil
}

// snapshot makes a commit of all that is not committed, with an index of its own, and
// returns it; "" if there is nothing. What is staged and differs from both HEAD and the
// working tree is a second parent.
func (t Tree) snapshot(ctx context.Context, o SaveOptions, s Status, saved *Saved) (string, error) {
	if !s.Dirty() {
		return "", nil
	}
	env, err := o.Who.environment()
	if err != nil {
		return "", err
	}
	gitDir, err := t.git(ctx, "rev-parse", "--absolute-git-dir")
	if err != nil {
		return "", err
	}
	index := path.Join(gitDir, "harvest-index")
	env["GIT_INDEX_FILE"] = index
	// The index as it is knows which files have not changed.
	out, err := run(ctx, t.Runner, t.Dir, commandTime, nil, nil, "sh", "-c", `rm -f -- "$2" "$2.lock"; [ ! -e "$1" ] || cp -- "$1" "$2"`, "sh", path.Join(gitDir, "index"), index)
	if err != nil {
		return "", err
	}
	if out.code != 0 {
		return "", out.failed("copy the index")
	}
	var staged string
	if s.Conflicts == 0 {
		if staged, err = t.gitWith(ctx, env, "write-tree"); err != nil {
			return "", err
		}
	}
	if err := t.stage(ctx, o, env, saved); err != nil {
		return "", err
	}
	tree, err := t.gitWith(ctx, env, "write-tree")
	if err != nil {
		return "", err
	}
	_, err = run(ctx, t.Runner, t.Dir, commandTime, nil, nil, "rm", "-f", "--", index)
	if err != nil {
		return "", err
	}
	args := []string{"commit-tree", "-m", "wip: work of session " + o.Session + " that was not committed"}
	headTree := ""
	if s.Head != "" {
		if headTree, err = t.git(ctx, "rev-parse", s.Head+"^{tree}"); err != nil {
			return "", err
		}
		args = append(args, "-p", s.Head)
	}
	if staged != "" && staged != headTree && staged != tree {
		second := []string{"commit-tree", "-m", "wip: what was staged"}
		if s.Head != "" {
			second = append(second, "-p", s.Head)
		}
		commit, err := t.gitWith(ctx, env, append(second, staged)...)
		if err != nil {
			return "", err
		}
		args = append(args, "-p", commit)
	} else if tree == headTree {
		return "", nil // all that differs was left
	}
	return t.gitWith(ctx, env, append(args, tree)...)
}

// stage puts into the index of env what may be saved of the working tree.
func (t Tree) stage(ctx context.Context, o SaveOptions, env map[string]string, saved *Saved) error {
	out, err := t.gitWith(ctx, env, "ls-files", "--modified", "--others", "--exclude-standard", "-z")
	if err != nil {
		return err
	}
	var files []string
	for _, name := range slices.Compact(slices.Sorted(slices.Values(records(out)))) {
		if strings.HasSuffix(name, "/") {
			saved.leave(Left{strings.TrimSuffix(name, "/"), 0, NestedRepository})
			continue
		}
		files = append(files, name)
	}
	// Sizes of what is there and no link: the names go in by standard input, each as it is.
	sizes, err := run(ctx, t.Runner, t.Dir, commandTime, nil, []byte(strings.Join(files, "\x00")+"\x00"),
		"sh", "-c", `[ "$1" = 0 ] || xargs -0 stat --printf '%s %F %n\0' -- 2>/dev/null; true`, "sh", strconv.Itoa(len(files)))
	if err != nil {
		return err
	}
	limit := cmp.Or(o.MaxFile, DefaultMaxFile)
	large := make(map[string]bool)
	for _, record := range records(sizes.stdout) {
		text, rest, _ := strings.Cut(record, " ")
		name, regular := strings.CutPrefix(rest, "regular file ")
		if size, err := strconv.ParseInt(text, 10, 64); err == nil && regular && size > limit {
			large[name] = true
			saved.leave(Left{name, size, TooLarge})
		}
	}
	files = slices.DeleteFunc(files, func(name string) bool { return large[name] })
	if len(files) == 0 {
		return nil
	}
	// update-index and not add, which would take names for patterns; of a file that was
	// removed it removes the entry.
	args := append(append([]string{"git"}, hardened()...), "update-index", "--add", "--remove", "--replace", "-z", "--stdin")
	result, err := run(ctx, t.Runner, t.Dir, commandTime, env, []byte(strings.Join(files, "\x00")+"\x00"), args...)
	if err == nil && result.code != 0 {
		err = result.failed("take what is not committed")
	}
	return err
}

func (s *Saved) leave(l Left) {
	if s.LeftCount++; len(s.Left) < maxTold {
		s.Left = append(s.Left, l)
	}
}
