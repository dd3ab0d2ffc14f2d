package workspace

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guestclient"
	"github.com/harvest-run/executord/internal/testgit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host runs commands on the host, as a guest would in its sandbox. HOME is a directory of the test.
type host struct {
	t    *testing.T
	home string
}

func newHost(t *testing.T) host {
	t.Helper()
	h := host{t, t.TempDir()}
	if err := os.WriteFile(h.config(), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return h
}

// config is git's configuration for the system.
func (h host) config() string { return filepath.Join(h.home, "gitconfig") }

func (h host) command(ctx context.Context, c guestclient.Command) *exec.Cmd {
	name := c.Args[0]
	if !strings.Contains(name, "/") {
		for _, dir := range filepath.SplitList(c.Env["PATH"]) {
			if path := filepath.Join(dir, name); isFile(path) {
				name = path
				break
			}
		}
	}
	cmd := exec.CommandContext(ctx, name, c.Args[1:]...)
	cmd.Dir = c.Dir
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.Env = []string{"HOME=" + h.home, "GIT_CONFIG_SYSTEM=" + h.config(), "GIT_CONFIG_GLOBAL=/dev/null"}
	for name, text := range c.Env {
		cmd.Env = append(cmd.Env, name+"="+text)
	}
	cmd.Stdin = bytes.NewReader(c.Input)
	return cmd
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

func exitOf(cmd *exec.Cmd, err error) (*guestv1.Exit, error) {
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		return nil, err
	}
	return &guestv1.Exit{Status: &guestv1.Exit_Code{Code: int32(cmd.ProcessState.ExitCode())}}, nil
}

func (h host) Run(ctx context.Context, c guestclient.Command) (guestclient.Outcome, error) {
	cmd := h.command(ctx, c)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	exit, err := exitOf(cmd, cmd.Run())
	return guestclient.Outcome{Exit: exit, Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}, err
}

type sinkWriter struct {
	stream guestv1.Stream
	sink   func(guestv1.Stream, []byte) error
}

func (s sinkWriter) Write(p []byte) (int, error) { return len(p), s.sink(s.stream, p) }

func (h host) RunStream(ctx context.Context, c guestclient.Command, sink func(guestv1.Stream, []byte) error) (*guestv1.Exit, error) {
	cmd := h.command(ctx, c)
	cmd.Stderr = sinkWriter{guestv1.Stream_STREAM_STDERR, sink}
	return exitOf(cmd, cmd.Run())
}

// rig is a server with a repository, and a clone of it.
type rig struct {
	t      *testing.T
	server *testgit.Server
	host   host
	root   string
	Tree
}

func me() Identity { return Identity{"Developer", "dev@example.com"} }

const harvest = "Developer (Harvest) <dev@example.com>"

func newRig(t *testing.T, files map[string]string) *rig {
	t.Helper()
	r := &rig{t: t, server: testgit.New(t, testgit.Config{}), host: newHost(t), root: t.TempDir()}
	url := r.server.Repository("owner/repo", files)
	r.must(Configure(t.Context(), r.host, Setup{Identity: me(), ConfigFile: r.host.config(), GuardDir: filepath.Join(r.host.home, "sbin")}))
	c, err := Clone(t.Context(), r.host, r.root, Repository{URL: url, Name: "repo"}, nil)
	r.must(err)
	r.Tree = c.Tree
	return r
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// write writes files of the working tree; "" removes one.
func (r *rig) write(files map[string]string) {
	r.t.Helper()
	for name, text := range files {
		path := filepath.Join(r.Dir, name)
		if text == "" {
			r.must(os.Remove(path))
			continue
		}
		r.must(os.MkdirAll(filepath.Dir(path), 0o755))
		r.must(os.WriteFile(path, []byte(text), 0o644))
	}
}

func (r *rig) read(name string) string {
	r.t.Helper()
	text, err := os.ReadFile(filepath.Join(r.Dir, name))
	r.must(err)
	return string(text)
}

// user runs git as the agent would, with the guard, and fails the test if that fails.
func (r *rig) user(args ...string) string {
	r.t.Helper()
	out, code := r.guarded(args...)
	if code != 0 {
		r.t.Fatalf("git %q: %d: %s", args, code, out)
	}
	return strings.TrimSpace(out)
}

func (r *rig) guarded(args ...string) (string, int) {
	r.t.Helper()
	cmd := r.host.command(r.t.Context(), guestclient.Command{
		Args: append([]string{"git"}, args...), Dir: r.Dir,
		Env: map[string]string{"PATH": filepath.Join(r.host.home, "sbin") + ":" + os.Getenv("PATH"), "GIT_TERMINAL_PROMPT": "0", "LANG": "C", "GIT_EDITOR": "true"},
	})
	out, err := cmd.CombinedOutput()
	if _, err := exitOf(cmd, err); err != nil {
		r.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// commitAll commits everything as the agent would.
func (r *rig) commitAll(message string) string {
	r.t.Helper()
	r.user("add", "-A")
	r.user("commit", "-q", "-m", message)
	return r.user("rev-parse", "HEAD")
}

// state is all that a command must not change.
func (r *rig) state() string {
	r.t.Helper()
	return r.user("status", "--porcelain=v2", "--branch", "-uall") + "\n" + r.user("for-each-ref", "refs/heads", "refs/remotes") + "\n" + r.user("ls-files", "-s") + r.user("diff") + r.user("diff", "--cached")
}
