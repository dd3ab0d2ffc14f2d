package base_test

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/agent/opencode/config"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/image/base"
)

// TestLocked: one OpenCode each, at the version that the configuration is made for, and
// everything with a hash.
func TestLocked(t *testing.T) {
	for noAVX2, name := range map[bool]string{false: "opencode-linux-x64", true: "opencode-linux-x64-baseline"} {
		manifest, lock, err := base.Locked(noAVX2)
		if err != nil {
			t.Fatal(err)
		}
		var m struct{ Dependencies map[string]string }
		var l struct {
			Packages map[string]struct {
				Version, Integrity, Resolved string
				Dependencies                 map[string]string
			}
		}
		if err := json.Unmarshal(manifest, &m); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(lock, &l); err != nil {
			t.Fatal(err)
		}
		found := 0
		for path, p := range l.Packages {
			if strings.Contains(path, "opencode-linux-x64") {
				found++
				if path != "node_modules/"+name || p.Version != config.Version {
					t.Errorf("%s %s is locked", path, p.Version)
				}
			}
			if path != "" && (!strings.HasPrefix(p.Integrity, "sha512-") || p.Resolved != "") {
				t.Errorf("%s: integrity %q, resolved %q", path, p.Integrity, p.Resolved)
			}
		}
		if found != 1 || len(m.Dependencies) != len(l.Packages[""].Dependencies) {
			t.Errorf("%d builds of OpenCode; %v and %v", found, m.Dependencies, l.Packages[""].Dependencies)
		}
		for dependency, version := range m.Dependencies {
			if strings.ContainsAny(version, "^~*") || l.Packages["node_modules/"+dependency].Version != version {
				t.Errorf("%s %s is not pinned", dependency, version)
			}
		}
	}
}

// TestConfigured: what the configuration starts is installed.
func TestConfigured(t *testing.T) {
	manifest, _, err := base.Locked(false)
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range servers(t) {
		rest := strings.TrimPrefix(s.Command[1], config.Tools+"/node_modules/")
		parts := strings.SplitN(rest, "/", 3)
		pkg := parts[0]
		if strings.HasPrefix(pkg, "@") {
			pkg += "/" + parts[1]
		}
		if !strings.Contains(string(manifest), `"`+pkg+`"`) {
			t.Errorf("%s is started from %s, which is not installed", name, pkg)
		}
	}
}

func TestRecipe(t *testing.T) {
	plain, err := base.Recipe(base.Config{})
	if err != nil {
		t.Fatal(err)
	}
	hosts := func(r egress.Policy) []string {
		var all []string
		for _, rule := range r.Rules {
			all = append(all, rule.String())
		}
		return all
	}
	if plain.Network.Mode != engine.NetworkEgress || !slices.Equal(hosts(plain.Network), []string{"deb.debian.org", "registry.npmjs.org"}) {
		t.Errorf("%+v", plain.Network)
	}
	own, err := base.Recipe(base.Config{
		DebianMirror: "http://10.1.2.3:8081/debian-mirror", NpmRegistry: "https://npm.corp.example/a", Allow: []egress.Rule{{Host: "10.9.9.9"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(hosts(own.Network), []string{"10.1.2.3:8081", "npm.corp.example", "10.9.9.9"}) {
		t.Errorf("%v", hosts(own.Network))
	}
	hashes := map[string]bool{plain.Hash(): true, own.Hash(): true}
	for _, cfg := range []base.Config{{DpkgStatus: []byte("x")}, {Key: "k"}, {NoAVX2: true}, {Packages: []string{"hello"}}, {Cache: "/c"}} {
		r, err := base.Recipe(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if hashes[r.Hash()] {
			t.Errorf("%+v makes no difference", cfg)
		}
		hashes[r.Hash()] = true
		if cfg.Cache != "" && r.Network.Mode != engine.NetworkNone {
			t.Errorf("from a cache it has the network %+v", r.Network)
		}
	}
	for _, step := range plain.Steps {
		cmd := exec.CommandContext(t.Context(), "bash", "-n")
		cmd.Stdin = strings.NewReader(step.Script)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %s", step.Name, out)
		}
	}
}
