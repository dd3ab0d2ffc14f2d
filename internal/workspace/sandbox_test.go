package workspace_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/harvest-run/executord/internal/broker"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestbinary/guestbuild"
	"github.com/harvest-run/executord/internal/guestclient"
	"github.com/harvest-run/executord/internal/secret"
	"github.com/harvest-run/executord/internal/testgit"
	"github.com/harvest-run/executord/internal/workspace"
	"github.com/harvest-run/executord/internal/workspace/memory"
)

// box is a real sandbox without network.
type box struct {
	t       *testing.T
	sandbox engine.Sandbox
	*guestclient.Client
}

func newBox(t *testing.T) box {
	t.Helper()
	return newBoxes(t, 1, "")[0]
}

// newBoxes makes sandboxes, with a volume of theirs at the memory's place if it has a name.
func newBoxes(t *testing.T, n int, volume string) []box {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: a sandbox that looks as in service")
	}
	guest, err := guestbuild.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	e, err := local.New(t.Context(), local.Config{
		StateDir: t.TempDir(), Guest: guest, UIDBase: 1879048192, UIDCount: 4000, Logger: slog.New(slog.DiscardHandler),
		Defaults: engine.Limits{MemoryBytes: 1 << 30, PIDs: 500},
	})
	if err != nil {
		t.Skipf("this host cannot make local sandboxes: %v", err)
	}
	var boxes []box
	t.Cleanup(func() {
		for _, b := range boxes {
			b.Close()
			if _, err := b.sandbox.Terminate(context.Background()); err != nil {
				t.Error(err)
			}
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	spec := engine.Spec{Network: engine.NetworkNone}
	if volume != "" {
		if err := e.Volumes().Ensure(t.Context(), volume); err != nil {
			t.Fatal(err)
		}
		spec.Volumes = []engine.VolumeMount{{Name: volume, Path: memory.Mount}}
	}
	for i := range n {
		spec.ID = fmt.Sprint("workspace-test-", i)
		sb, err := e.Create(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		boxes = append(boxes, box{t, sb, guestclient.New(sb)})
	}
	return boxes
}

// bash runs a script as the agent would, and returns what it wrote and its exit code.
func (b box) bash(dir, script string, input ...byte) (string, int) {
	b.t.Helper()
	out, err := b.Run(b.t.Context(), guestclient.Command{Args: []string{"bash", "-lc", script + "\n"}, Dir: dir, Input: input, Env: map[string]string{"GIT_TERMINAL_PROMPT": "0"}})
	if err != nil {
		b.t.Fatal(err)
	}
	return string(out.Stdout) + string(out.Stderr), out.Code()
}

func (b box) must(dir, script string) string {
	b.t.Helper()
	out, code := b.bash(dir, script)
	if code != 0 {
		b.t.Fatalf("%s: %d: %s", script, code, out)
	}
	return strings.TrimSpace(out)
}

// A whole working day in a sandbox without network: clone, push, submodules, an API and the end, all with
// credentials that are nowhere in it.
func TestCredentialsStayOutside(t *testing.T) {
	b := newBox(t)
	const token, key = "ghp_hunter2hunter2hunter2hunter2", "sk-ant-hunter2hunter2"
	server := testgit.New(t, testgit.Config{Token: token})
	server.Repository("owner/lib", map[string]string{"lib": "x"})
	server.Repository("owner/repo", map[string]string{"README": "hello\n"})
	var mu sync.Mutex
	var asked []*http.Request
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		asked = append(asked, r.Clone(context.Background()))
		mu.Unlock()
		fmt.Fprintf(w, "%s is fine", r.URL.Path)
	}))
	t.Cleanup(api.Close)

	var private []egress.Rule
	for _, address := range []string{server.URL, api.URL} {
		rule, err := egress.ParseRule(strings.TrimPrefix(address, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		private = append(private, rule)
	}
	var log strings.Builder
	gateway, err := broker.New(broker.Config{Private: private, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := gateway.Close(); err != nil {
			t.Error(err)
		}
		if strings.Contains(log.String(), "hunter2") || !strings.Contains(log.String(), "route=git:git.example") {
			t.Errorf("the log: %s", &log)
		}
	})
	bag, err := secret.NewBag(nil, map[string]string{"github": token, "model": key})
	if err != nil {
		t.Fatal(err)
	}
	git := broker.Git("git.example", "github", true)
	git.Upstream = server.URL + "/"
	model := broker.Model(api.URL, "model", "X-Api-Key")
	hub := broker.GitHubAPI("github")
	hub[0].Upstream, hub[1].Upstream = api.URL+"/", api.URL+"/"
	gate, err := gateway.Open(t.Context(), b.sandbox, append(hub, git, model), bag)
	if err != nil {
		t.Fatal(err)
	}
	if gateway.Of(b.sandbox.ID()) != gate {
		t.Error("the gate is not found")
	}
	if err := workspace.Configure(t.Context(), b, workspace.Setup{
		Identity: workspace.Identity{Name: "Developer", Email: "dev@example.com"}, Brokers: map[string]string{"git.example": broker.URL(git) + "/"},
	}); err != nil {
		t.Fatal(err)
	}

	plan, err := workspace.Plan([]workspace.Repository{{URL: "https://git.example/owner/repo.git"}}, false)
	if err != nil {
		t.Fatal(err)
	}
	steps := 0
	c, err := workspace.Clone(t.Context(), b, workspace.Root, plan[0], func(workspace.Progress) { steps++ })
	if err != nil || c.Tree.Dir != "/workspace/repo" || steps == 0 {
		t.Fatalf("%+v, %d steps, %v", c, steps, err)
	}
	b.must(c.Tree.Dir, `git checkout -qb work && git submodule --quiet add https://git.example/owner/lib.git lib && echo more >>README && git add -A && git commit -qm work && git push -q 2>&1`)
	if got := server.Git("owner/repo", "log", "-1", "--format=%an <%ae> %s", "work"); got != "Developer (Harvest) <dev@example.com> work" {
		t.Error(got)
	}
	b.must("/workspace", `git clone -q --recurse-submodules -b work https://git.example/owner/repo.git second && test -e second/lib/lib`)
	if out, code := b.bash(c.Tree.Dir, "git pull"); code == 0 || !strings.Contains(out, "git rebase origin/<branch>") {
		t.Errorf("the guard in a login shell: %d %s", code, out)
	}
	for script, want := range map[string]string{
		`curl -sS -H "x-api-key: mine" "$0/v1/messages"`:                                        "/v1/messages is fine",
		`curl -sS --resolve api.github.localhost:80:127.0.0.1 http://api.github.localhost/user`: "/user is fine",
		`curl -sS http://` + broker.Address() + `/github-api/repos/o/r`:                         "/repos/o/r is fine",
	} {
		if got := b.must("/", strings.ReplaceAll(script, "$0", broker.URL(model))); got != want {
			t.Errorf("%s: %s", script, got)
		}
	}
	mu.Lock()
	shown := map[string]bool{}
	for _, r := range asked {
		shown[r.Header.Get("X-Api-Key")+r.Header.Get("Authorization")] = true
	}
	mu.Unlock()
	if len(shown) != 2 || !shown[key] || !shown["Bearer "+token] {
		t.Errorf("%v", shown)
	}
	if out, code := b.bash("/", "git ls-remote "+server.URL+"/owner/repo.git"); code == 0 {
		t.Errorf("the server is reached without the broker: %s", out)
	}
	b.must(c.Tree.Dir, "echo unsaved >unsaved")
	saved, err := c.Tree.SaveWork(t.Context(), workspace.SaveOptions{Session: "s-1", Who: workspace.Identity{Name: "Developer", Email: "dev@example.com"}, Bundle: "/tmp/work.bundle"})
	if err != nil || saved.Remote == "" || server.Git("owner/repo", "show", "wip/s-1:unsaved") != "unsaved" {
		t.Errorf("%+v, %v", saved, err)
	}

	// Nowhere: no file, no environment, no command line, and no memory of the agent's processes.
	patterns := strings.Join([]string{
		"hunter2hunter2", base64.StdEncoding.EncodeToString([]byte("x-access-token:" + token))[4:40], base64.StdEncoding.EncodeToString([]byte(token))[:30],
	}, "\n") + "\n"
	out, code := b.bash("/", `cat >/dev/shm/patterns; grep -rlaF -f /dev/shm/patterns /workspace /root /etc /tmp /var /run /opt /home /app 2>/dev/null; `+
		`for p in /proc/[0-9]*; do grep -laF -f /dev/shm/patterns $p/environ $p/cmdline 2>/dev/null; done; rm /dev/shm/patterns; true`, []byte(patterns)...)
	if out != "" || code != 0 {
		t.Errorf("a credential is in %s (%d)", out, code)
	}
	if got, _ := b.bash("/", `echo "hunter2""hunter2" >/tmp/trap; grep -rlaF -f - /tmp`, []byte(patterns)...); !strings.Contains(got, "/tmp/trap") {
		t.Errorf("the search finds nothing at all: %s", got)
	}
	counts := gate.Counts()["git:git.example"]
	if counts.Requests < 10 || counts.ReceivedBytes == 0 || counts.SentBytes == 0 || counts.Failed != 0 {
		t.Errorf("%+v", counts)
	}
	// Without a credential git says so in words.
	none := git
	none.Secret, none.Scheme, none.User = "", "", ""
	if _, err := gateway.Open(t.Context(), b.sandbox, []broker.Route{none}, bag); err != nil {
		t.Fatal(err)
	}
	if _, err := workspace.Clone(t.Context(), b, workspace.Root, workspace.Repository{URL: plan[0].URL, Name: "third"}, nil); fault.ReasonOf(err) != "CREDENTIALS_REFUSED" || !strings.Contains(err.Error(), "asks for a credential") {
		t.Errorf("%v (%s)", err, fault.ReasonOf(err))
	}
	if out, code := b.bash("/", "git ls-remote https://git.example/owner/repo.git"); code == 0 || !strings.Contains(out, "asks for a credential and this executord has none") {
		t.Errorf("%d %s", code, out)
	}
}

// The memory works with what sandboxes have, on a volume that two of them share.
func TestMemoryInSandboxes(t *testing.T) {
	remote, err := workspace.ParseURL("https://github.com/harvest-run/repo", false)
	if err != nil {
		t.Fatal(err)
	}
	boxes := newBoxes(t, 2, memory.VolumeName(remote))
	memories := make([]*memory.Memory, len(boxes))
	var work sync.WaitGroup
	for i, b := range boxes {
		b.must("/", `mkdir -p /app && echo '{"entities":[{"name":"a","entityType":"k","observations":["0"]}],"relations":[]}' >/app/memory-seed.json`)
		work.Go(func() {
			var err error
			if memories[i], err = memory.Open(t.Context(), memory.Config{Runner: b, Session: fmt.Sprint("s-", i)}); err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	if t.Failed() {
		t.FailNow()
	}
	for i, b := range boxes {
		b.must("/", fmt.Sprintf(`sed -i 's/"0"/"0","%d"/' %s`, i+1, memory.File))
		work.Go(func() {
			if did, err := memories[i].Commit(t.Context()); err != nil || !did {
				t.Errorf("%v, %v", did, err)
			}
			if err := memories[i].Close(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	for _, b := range boxes {
		got := b.must("/", "cat "+memory.Mount+"/memory.jsonl; ls "+memory.Mount+"/sessions")
		if !strings.Contains(got, `"observations":["0","1","2"]`) && !strings.Contains(got, `"observations":["0","2","1"]`) || strings.Contains(got, "s-") {
			t.Error(got)
		}
	}
}
