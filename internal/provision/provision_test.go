package provision

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/agent/opencode"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/image"
	"github.com/harvest-run/executord/internal/secret"
	"github.com/harvest-run/executord/internal/session"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// images knows one image.
type images struct{ err error }

func (i images) Ensure(_ context.Context, engineName, name string, progress func(image.Event)) (image.Build, error) {
	progress(image.Event{Started: &image.Started{}})
	progress(image.Event{Step: &image.StepBegun{Name: "apt"}})
	return image.Build{Ref: engine.ImageRef(engineName + "/" + name)}, i.err
}

func newProvisioner(t *testing.T, named ...string) *Provisioner {
	t.Helper()
	source, err := secret.NewSource(named, func(string) string { return "from the environment" })
	if err != nil {
		t.Fatal(err)
	}
	p := New(Config{
		Images: images{}, Secrets: source, Plain: true,
		Identity: session.Identity{Name: "Dev", Email: "dev@x"}, Model: session.Model{Provider: "anthropic", Model: "m"},
	})
	t.Cleanup(func() { p.Close() })
	return p
}

func TestResolve(t *testing.T) {
	p := newProvisioner(t)
	var told []string
	for name, want := range map[string]engine.ImageRef{"": "local/base", "mine": "local/mine"} {
		ref, err := p.Resolve(t.Context(), "local", name, func(text string) { told = append(told, text) })
		if err != nil || ref != want {
			t.Errorf("%q: %q, %v", name, ref, err)
		}
	}
	if len(told) != 2 || !strings.HasSuffix(told[0], ": apt") {
		t.Errorf("%q", told)
	}
	p.cfg.Images = images{errors.New("no")}
	if _, err := p.Resolve(t.Context(), "local", "", func(string) {}); err == nil {
		t.Error("no error")
	}
}

// TestGuests keeps one client for a sandbox, until that ends or everything does.
func TestGuests(t *testing.T) {
	fake := enginefake.New(enginefake.Config{})
	defer fake.Shutdown()
	p := newProvisioner(t)
	one, err := fake.Create(t.Context(), engine.Spec{ID: "a"})
	if err != nil {
		t.Fatal(err)
	}
	other, err := fake.Create(t.Context(), engine.Spec{ID: "b"})
	if err != nil {
		t.Fatal(err)
	}
	before := p.guest(one)
	if p.guest(one) != before || p.guest(other) == before {
		t.Error("not one client for each")
	}
	if _, err := before.Info(t.Context()); err != nil {
		t.Error(err)
	}
	fake.Die("a")
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.guest(other).Info(t.Context()); err == nil {
		t.Error("a client after the close")
	}
}

func TestPlan(t *testing.T) {
	p := newProvisioner(t)
	got, err := p.Plan([]session.Repository{{URL: "o/n", Branch: "b", Depth: 2}, {URL: "https://h.example/x/n"}, {URL: "http://127.0.0.1:99/a/b.git", Directory: "mine"}})
	if err != nil {
		t.Fatal(err)
	}
	want := []session.Repository{
		{URL: "https://github.com/o/n", Branch: "b", Depth: 2, Directory: "n"}, {URL: "https://h.example/x/n", Directory: "x-n"},
		{URL: "http://127.0.0.1:99/a/b.git", Directory: "mine"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, err := p.Plan([]session.Repository{{URL: "file:///etc"}}); fault.KindOf(err) != fault.Invalid {
		t.Error(err)
	}
}

func TestCheck(t *testing.T) {
	p := newProvisioner(t, "github=env:GITHUB")
	model := func(provider, url string) *session.Model {
		return &session.Model{Provider: provider, Model: "m", BaseURL: url}
	}
	for what, test := range map[string]struct {
		way    session.Way
		reason string
	}{
		"nothing":             {session.Way{}, ""},
		"a named one":         {session.Way{Secrets: map[string]string{gitHubToken: "github"}}, ""},
		"one that is not":     {session.Way{Secrets: map[string]string{gitHubToken: "gitlab"}}, "SECRET_NOT_FOUND"},
		"a key":               {session.Way{Model: model("anthropic", ""), Values: map[string]string{anthropicKey: "k"}}, ""},
		"no key":              {session.Way{Model: model("anthropic", "")}, "CREDENTIALS_REQUIRED"},
		"the default's":       {session.Way{Model: &session.Model{}}, "CREDENTIALS_REQUIRED"},
		"log-ins":             {session.Way{Model: model("anthropic", ""), Auth: "{}"}, ""},
		"another's key":       {session.Way{Model: model("openai", ""), Values: map[string]string{anthropicKey: "k"}}, "CREDENTIALS_REQUIRED"},
		"its own server":      {session.Way{Model: model("anthropic", "http://127.0.0.1:1/v1")}, ""},
		"an unknown one":      {session.Way{Model: model("mistral", "")}, "MODEL_PROVIDER"},
		"an unknown server":   {session.Way{Model: model("mine", "https://h.example/v1")}, ""},
		"no URL":              {session.Way{Model: model("mine", "ftp://h.example")}, "MODEL_URL"},
		"a password in a URL": {session.Way{Model: model("mine", "https://a:b@h.example")}, "MODEL_URL"},
	} {
		t.Run(what, func(t *testing.T) {
			if err := p.Check(test.way); fault.ReasonOf(err) != test.reason {
				t.Errorf("%v, want %q", err, test.reason)
			}
		})
	}
}

// TestRoutes has a way to each host and service, with a credential only where there is
// one.
func TestRoutes(t *testing.T) {
	p := newProvisioner(t, "linear=env:LINEAR")
	routes, err := p.routes(session.Way{
		Values: map[string]string{gitHubToken: "x", anthropicKey: "y"}, Secrets: map[string]string{linearKey: "linear"},
		Repositories: []session.Repository{{URL: "https://github.com/o/n"}, {URL: "https://github.com/o/m"}, {URL: "http://127.0.0.1:9/a/b"}},
		Model:        &session.Model{Provider: "anthropic", Model: "m", BaseURL: "https://proxy.example/v1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string][3]string)
	for _, r := range routes {
		got[r.Name] = [3]string{r.Prefix, r.Upstream, r.Secret}
	}
	want := map[string][3]string{
		"git:github.com": {"/git/github.com/", "https://github.com/", gitHubToken}, "git:127.0.0.1:9": {"/git/127.0.0.1:9/", "http://127.0.0.1:9/", ""},
		"github-api": {"/github-api/", "https://api.github.com/", gitHubToken}, "github-api:gh": {"", "https://api.github.com/", gitHubToken},
		"model": {"/model/", "https://proxy.example/v1/", anthropicKey}, "github-mcp": {"/github-mcp/", "https://api.githubcopilot.com/mcp/", gitHubToken},
		"linear-mcp": {"/linear-mcp/", "https://mcp.linear.app/mcp/", linearKey},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// After a restart the name of what was given is known, and not its value: the way says so
	// when it is used.
	routes, err = p.routes(session.Way{Inline: []string{gitHubToken}, Repositories: []session.Repository{{URL: "https://github.com/o/n"}}})
	if err != nil || len(routes) != 1 || routes[0].Secret != gitHubToken {
		t.Errorf("%+v, %v", routes, err)
	}
	if _, err := p.bag(session.Way{}).Lookup(gitHubToken); fault.ReasonOf(err) != "CREDENTIALS_REQUIRED" {
		t.Error(err)
	}
	value, err := p.bag(session.Way{Secrets: map[string]string{linearKey: "linear"}}).Lookup(linearKey)
	if err != nil || value.Reveal() != "from the environment" {
		t.Errorf("%v, %v", value, err)
	}
}

// TestOptions: no key is in the agent's configuration.
func TestOptions(t *testing.T) {
	p := newProvisioner(t)
	b := p.bag(session.Way{Values: map[string]string{gitHubToken: "hunter2", geminiKey: "hunter2", sentryToken: "hunter2", linearKey: "hunter2", openAIKey: "hunter2"}})
	for _, provider := range []session.Model{{Provider: "openai", Model: "m"}, {Provider: "mine", Model: "m", BaseURL: "https://h.example/v1"}} {
		made, err := p.provider(provider)
		if err != nil {
			t.Fatal(err)
		}
		o := options(made, b)
		o.Permission = permissions(session.InteractionPolicy{Mode: "ASK"})
		text, err := o.JSON()
		if err != nil {
			t.Fatal(err)
		}
		if !json.Valid(text) || strings.Contains(string(text), "hunter2") {
			t.Errorf("%s", text)
		}
		for _, part := range []string{`"` + provider.Provider + `/m"`, "http://127.0.0.1:3129/model", "/dev/shm/.harvest/gemini", "/github-mcp", "/linear-mcp", `"bash": "ask"`} {
			if !strings.Contains(string(text), part) {
				t.Errorf("%s has no %s", text, part)
			}
		}
	}
	if missing := withoutKey(p.bag(session.Way{Values: map[string]string{linearKey: "x"}})); !slices.Equal(missing, []string{"gemini", "github", "sentry"}) {
		t.Errorf("%q", missing)
	}
	if permissions(session.InteractionPolicy{}) != nil || permissions(session.InteractionPolicy{Mode: "DENY"})["question"] != "deny" {
		t.Error("permissions")
	}
}

func TestStatus(t *testing.T) {
	got := statusOf(opencode.Status{State: opencode.Ready, Version: "1.18.33", MCP: []opencode.MCP{{Name: "memory", State: "connected"}, {Name: "x", State: "failed", Detail: "d"}}}, []string{"sentry"})
	want := session.AgentStatus{State: session.AgentReady, Version: "opencode 1.18.33", MCP: []session.MCPServer{
		{Name: "memory", State: "CONNECTED"}, {Name: "x", State: "FAILED", Detail: "d"}, {Name: "sentry", State: "NO_KEY"},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

const patch = `diff --git a/a.go b/a.go
index 1..2 100644
--- a/a.go
+++ b/a.go
@@ -1,2 +1,2 @@
--- not a header
+++ nor this
 same
diff --git a/new b/new
new file mode 100644
--- /dev/null
+++ b/new
@@ -0,0 +1 @@
+x
diff --git a/gone b/gone
deleted file mode 100644
--- a/gone
+++ /dev/null
@@ -1 +0,0 @@
-x
diff --git a/old b/other
similarity index 100%
rename from old
rename to other
diff --git "a/\303\274" "b/\303\274"
--- "a/\303\274"
+++ "b/\303\274"
@@ -1 +1 @@
-x
+y
diff --git a/img.png b/img.png
new file mode 100644
Binary files /dev/null and b/img.png differ
`

func TestSplitPatch(t *testing.T) {
	files := splitPatch([]byte(patch))
	var got []agent.FileDiff
	whole := ""
	for _, f := range files {
		whole += f.Patch
		f.Patch = ""
		got = append(got, f)
	}
	want := []agent.FileDiff{
		{Path: "a.go", Change: agent.FileModified, Additions: 1, Deletions: 1}, {Path: "new", Change: agent.FileAdded, Additions: 1},
		{Path: "gone", Change: agent.FileDeleted, Deletions: 1}, {Path: "other", Change: agent.FileModified},
		{Path: "ü", Change: agent.FileModified, Additions: 1, Deletions: 1}, {Path: "img.png", Change: agent.FileAdded},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if whole != patch {
		t.Error("something of the patch is lost")
	}
}

func FuzzSplitPatch(f *testing.F) {
	f.Add(patch)
	f.Fuzz(func(t *testing.T, text string) {
		whole := ""
		for _, file := range splitPatch([]byte(text)) {
			whole += file.Patch
		}
		if want := strings.ToValidUTF8(text, "\uFFFD"); whole != want {
			t.Errorf("%q became %q", want, whole)
		}
	})
}
