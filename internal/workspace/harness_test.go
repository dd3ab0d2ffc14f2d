package workspace

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/harvest-run/executord/internal/guestclient"
	"github.com/harvest-run/executord/internal/testgit"
	"github.com/harvest-run/executord/internal/workspace/workspacetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newHost makes a Runner on the host.
func newHost(t *testing.T) workspacetest.Host {
	t.Helper()
	return workspacetest.NewHost(t)
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// rig is a server with a repository, and a clone of it.
type rig struct {
	t      *testing.T
	server *testgit.Server
	host   workspacetest.Host
	root   string
	Tree
}

func me() Identity { return Identity{"Developer", "dev@example.com"} }

const harvest = "Developer (Harvest) <dev@example.com>"

func newRig(t *testing.T, files map[string]string) *rig {
	t.Helper()
	r := &rig{t: t, server: testgit.New(t, testgit.Config{}), host: newHost(t), root: t.TempDir()}
	url := r.server.Repository("owner/repo", files)
	r.must(Configure(t.Context(), r.host, Setup{Identity: me(), ConfigFile: r.host.Config(), GuardDir: filepath.Join(r.host.Home, "sbin")}))
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
	cmd := r.host.Command(r.t.Context(), guestclient.Command{
		Args: append([]string{"git"}, args...), Dir: r.Dir,
		Env: map[string]string{"PATH": filepath.Join(r.host.Home, "sbin") + ":" + os.Getenv("PATH"), "GIT_TERMINAL_PROMPT": "0", "LANG": "C", "GIT_EDITOR": "true"},
	})
	out, err := cmd.CombinedOutput()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
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
