// Package workspace is what executord does with git in a session's sandbox: it clones
// repositories, tells whose work it is, keeps the rules of Safe-Carry-Forward, and saves
// what would be lost with the sandbox. All of it runs inside, by commands of a Runner,
// with no more rights than the agent has there and with no credentials: those are added
// on the way out (internal/broker). What a repository or an agent has prepared can
// make a command fail or lie about the repository, and nothing else; hooks, fsmonitor,
// signing and credential helpers are off for the commands of this package.
package workspace

import (
	"context"
	"fmt"
	"path"
	"strings"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
)

// Root is where repositories are cloned to, each into a directory of its name.
const Root = "/workspace"

const (
	// commandTime bounds a git command that reaches no server, networkTime one that does.
	commandTime = 10 * time.Minute
	networkTime = time.Hour
	// maxOutput bounds what is read of a command, in bytes.
	maxOutput = 16 << 20
)

// Runner runs commands in the sandbox. A *guestclient.Client is one.
type Runner interface {
	Run(ctx context.Context, c guestclient.Command) (guestclient.Outcome, error)
	RunStream(ctx context.Context, c guestclient.Command, sink func(stream guestv1.Stream, data []byte) error) (*guestv1.Exit, error)
}

// environment is that of all commands of this package: without the guard, which lies
// in /usr/local/sbin, without questions, and in English, which is parsed.
func environment() map[string]string {
	return map[string]string{
		"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8",
		"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "SSH_ASKPASS": "", "GIT_EDITOR": "true", "GIT_PAGER": "cat", "GIT_OPTIONAL_LOCKS": "0",
		// No ext::, which runs a program, and no ssh, which would ask. http is what
		// https becomes on its way to the broker.
		"GIT_ALLOW_PROTOCOL": "https:http",
		// A connection over which less than a kilobyte per second comes for two minutes is dead.
		"GIT_HTTP_LOW_SPEED_LIMIT": "1000", "GIT_HTTP_LOW_SPEED_TIME": "120",
	}
}

// hardened are the settings by which nothing that a repository brings is run.
func hardened() []string {
	return []string{
		"-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.pager=cat", "-c", "diff.external=", "-c", "commit.gpgSign=false",
		"-c", "tag.gpgSign=false", "-c", "push.gpgSign=false", "-c", "credential.helper=", "-c", "submodule.recurse=false", "-c", "fetch.recurseSubmodules=false",
		"-c", "push.recurseSubmodules=no", "-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "rebase.autoStash=false", "-c", "advice.detachedHead=false",
	}
}

// Tree is a checked-out repository in a sandbox.
type Tree struct {
	// Runner runs the commands.
	Runner Runner
	// Dir is its directory, absolute.
	Dir string
}

// result is what a command said.
type result struct {
	code           int
	stdout, stderr string
}

// failed is the error of a command that ended with another code than 0.
func (o result) failed(what string) error {
	text := strings.TrimSpace(o.stderr)
	if text == "" {
		text = strings.TrimSpace(o.stdout)
	}
	return classify(what, o.code, text)
}

// classify makes a fault of what git says.
func classify(what string, code int, text string) error {
	text = clip(text, 2<<10)
	for _, known := range []struct {
		part   string
		kind   fault.Kind
		reason string
	}{
		{"No space left on device", fault.Exhausted, "DISK_FULL"},
		{"Disk quota exceeded", fault.Exhausted, "DISK_FULL"},
		{"Remote branch", fault.FailedPrecondition, "BRANCH_NOT_FOUND"},
		{"couldn't find remote ref", fault.FailedPrecondition, "BRANCH_NOT_FOUND"},
		{"refused the credential", fault.FailedPrecondition, "CREDENTIALS_REFUSED"},
		{"could not read Username", fault.FailedPrecondition, "CREDENTIALS_REFUSED"},
		{"Authentication failed", fault.FailedPrecondition, "CREDENTIALS_REFUSED"},
		{"(NO_CREDENTIAL)", fault.FailedPrecondition, "CREDENTIALS_REFUSED"},
		{"error: 403", fault.FailedPrecondition, "CREDENTIALS_REFUSED"},
		{"not found", fault.FailedPrecondition, "REPOSITORY_NOT_FOUND"},
		{"does not appear to be a git repository", fault.FailedPrecondition, "REPOSITORY_NOT_FOUND"},
		{"not a git repository", fault.FailedPrecondition, "REPOSITORY_NOT_FOUND"},
		{"not allowed", fault.FailedPrecondition, "PROTOCOL_NOT_ALLOWED"},
		{"error: 5", fault.Unavailable, "GIT_SERVER"},
		{"Could not resolve host", fault.Unavailable, "GIT_SERVER"},
		{"Failed to connect", fault.Unavailable, "GIT_SERVER"},
		{"early EOF", fault.Unavailable, "GIT_SERVER"},
		{"hung up unexpectedly", fault.Unavailable, "GIT_SERVER"},
		{"RPC failed", fault.Unavailable, "GIT_SERVER"},
		{"Operation too slow", fault.Unavailable, "GIT_SERVER"},
	} {
		if strings.Contains(text, known.part) {
			return fault.New(known.kind, known.reason, "%s: %s", what, text)
		}
	}
	return fault.New(fault.FailedPrecondition, "GIT_FAILED", "%s: git ended with code %d: %s", what, code, text)
}

func clip(text string, n int) string {
	if len(text) > n {
		text = "…" + strings.ToValidUTF8(text[len(text)-n:], "")
	}
	return text
}

// run runs a command in a directory.
func run(ctx context.Context, r Runner, dir string, timeout time.Duration, env map[string]string, input []byte, args ...string) (result, error) {
	all := environment()
	for name, text := range env {
		all[name] = text
	}
	out, err := r.Run(ctx, guestclient.Command{Args: args, Env: all, Dir: dir, Input: input, Timeout: timeout, Limit: maxOutput})
	if err != nil {
		return result{}, fmt.Errorf("run %s: %w", path.Base(args[0]), err)
	}
	if out.Exit.GetStopCause() == guestv1.StopCause_STOP_CAUSE_TIMEOUT {
		return result{}, fault.New(fault.Unavailable, "GIT_TIMEOUT", "%s did not end within %v", path.Base(args[0]), timeout)
	}
	return result{out.Code(), string(out.Stdout), string(out.Stderr)}, nil
}

// try runs git and returns what it said, whatever its exit code.
func (t Tree) try(ctx context.Context, env map[string]string, args ...string) (result, error) {
	timeout := commandTime
	if args[0] == "fetch" || args[0] == "push" {
		timeout = networkTime
	}
	return run(ctx, t.Runner, t.Dir, timeout, env, nil, append(append([]string{"git"}, hardened()...), args...)...)
}

// git runs git and returns what it wrote, without the last end of line.
func (t Tree) git(ctx context.Context, args ...string) (string, error) {
	return t.gitWith(ctx, nil, args...)
}

func (t Tree) gitWith(ctx context.Context, env map[string]string, args ...string) (string, error) {
	out, err := t.try(ctx, env, args...)
	if err != nil {
		return "", err
	}
	if out.code != 0 {
		return "", out.failed("git " + args[0])
	}
	return strings.TrimSuffix(out.stdout, "\n"), nil
}

// lines are those of a text, without empty ones.
func lines(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == '\n' })
}

// records are those of a text that ends each with NUL.
func records(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return r == 0 })
}
