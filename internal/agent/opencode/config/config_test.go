package config_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/agent/opencode/config"
	"github.com/harvest-run/executord/internal/guestfiles"
)

// settings are the opencode.json of options.
func settings(t *testing.T, o config.Options) (map[string]any, string) {
	t.Helper()
	files, err := o.Files()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(files, func(f guestfiles.File) bool { return f.Path == "/app/opencode.json" })
	var s map[string]any
	if err := json.Unmarshal(files[i].Data, &s); err != nil {
		t.Fatal(err)
	}
	return s, string(files[i].Data)
}

func TestFiles(t *testing.T) {
	files, err := config.Options{}.Files()
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, f := range files {
		paths = append(paths, f.Path)
		if f.Mode != 0o444 || len(f.Data) == 0 {
			t.Errorf("%s: mode %o, %d bytes", f.Path, f.Mode, len(f.Data))
		}
		if strings.HasSuffix(f.Path, ".json") && !json.Valid(f.Data) {
			t.Errorf("%s is no JSON", f.Path)
		}
		// OpenCode installs its plugin package unless the lock file names it at its version.
		if strings.HasSuffix(f.Path, "/package-lock.json") && !strings.Contains(string(f.Data), `"@opencode-ai/plugin": "`+config.Version+`"`) {
			t.Errorf("%s", f.Data)
		}
	}
	want := []string{"/app/.gitignore", "/app/AGENTS.md", "/app/memory-seed.json", "/app/opencode.json", "/app/package-lock.json", "/app/package.json"}
	if !slices.Equal(paths, want) {
		t.Errorf("%v", paths)
	}
}

// What the agent must not do, and what it is told about when to stop, stays in its
// instructions.
func TestInstructions(t *testing.T) {
	files, err := config.Options{}.Files()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Path != "/app/AGENTS.md" {
			continue
		}
		for _, want := range []string{
			"Never `git pull` and never `git stash`", `git add -A && git commit -m "wip: snapshot before sync" --no-verify`,
			"checkpoint-<branch>-$(date +%s)", "--force-with-lease", "three attempts", "panic button", "## Memory", "## Finishing",
		} {
			if !strings.Contains(string(f.Data), want) {
				t.Errorf("AGENTS.md is without %q", want)
			}
		}
	}
}

// The seed is what the memory server's file is made from: entities and relations between
// them.
func TestSeed(t *testing.T) {
	files, err := config.Options{}.Files()
	if err != nil {
		t.Fatal(err)
	}
	var seed struct {
		Entities []struct {
			Name, EntityType string
			Observations     []string
		}
		Relations []struct{ From, To, RelationType string }
	}
	i := slices.IndexFunc(files, func(f guestfiles.File) bool { return f.Path == config.MemorySeed })
	if err := json.Unmarshal(files[i].Data, &seed); err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	for _, e := range seed.Entities {
		names[e.Name] = true
		if e.EntityType == "" || len(e.Observations) == 0 {
			t.Errorf("%+v", e)
		}
	}
	for _, r := range seed.Relations {
		if !names[r.From] || !names[r.To] || r.RelationType == "" {
			t.Errorf("%+v", r)
		}
	}
}

func TestDefaults(t *testing.T) {
	s, _ := settings(t, config.Options{})
	if s["share"] != "disabled" || s["autoupdate"] != false || !slices.Equal(s["disabled_providers"].([]any), []any{"opencode"}) {
		t.Errorf("%v", s)
	}
	if p := s["permission"].(map[string]any); p["*"] != "allow" || p["question"] != "deny" {
		t.Errorf("%v", p)
	}
	for _, absent := range []string{"model", "small_model", "provider"} {
		if _, ok := s[absent]; ok {
			t.Errorf("%s is set", absent)
		}
	}
	var names []string
	for name, server := range s["mcp"].(map[string]any) {
		names = append(names, name)
		command := server.(map[string]any)["command"].([]any)
		if command[0] != config.Node || !strings.HasPrefix(command[1].(string), config.Tools+"/node_modules/") {
			t.Errorf("%s is started by %v", name, command)
		}
	}
	slices.Sort(names)
	if !slices.Equal(names, []string{"devtools", "filesystem", "memory", "playwright"}) {
		t.Errorf("%v", names)
	}
}

func TestKeys(t *testing.T) {
	s, text := settings(t, config.Options{
		Model:  "anthropic/claude",
		GitHub: config.Key{Env: "GITHUB_TOKEN"}, Gemini: config.Key{File: "/dev/shm/keys/gemini"},
		Sentry: config.Key{Env: "SENTRY_AUTH_TOKEN"}, Linear: config.Key{URL: "http://127.0.0.1:9/linear"},
		Providers: map[string]config.Provider{
			"anthropic": {BaseURL: "http://127.0.0.1:9/anthropic", Key: config.Key{Env: "ANTHROPIC_API_KEY"}},
			"ours":      {Compatible: true, BaseURL: "http://127.0.0.1:9/v1", Models: []string{"m/1"}},
		},
	})
	if s["model"] != "anthropic/claude" || s["small_model"] != "anthropic/claude" {
		t.Errorf("%v, %v", s["model"], s["small_model"])
	}
	for _, want := range []string{
		`"Authorization": "Bearer {env:GITHUB_TOKEN}"`, `"GEMINI_API_KEY": "{file:/dev/shm/keys/gemini}"`, `"SENTRY_ACCESS_TOKEN": "{env:SENTRY_AUTH_TOKEN}"`,
		`"url": "http://127.0.0.1:9/linear"`, `"url": "https://api.githubcopilot.com/mcp/"`, `"apiKey": "{env:ANTHROPIC_API_KEY}"`,
		`"npm": "@ai-sdk/openai-compatible"`, `"m/1": {`, `"oauth": false`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("without %s:\n%s", want, text)
		}
	}
	if n := len(s["mcp"].(map[string]any)); n != 8 {
		t.Errorf("%d servers", n)
	}
	linear := s["mcp"].(map[string]any)["linear"].(map[string]any)
	if headers, ok := linear["headers"]; ok {
		t.Errorf("the server whose key is added outside is shown %v", headers)
	}
}

// TestRefuses what is no name and what could end a reference and begin another.
func TestRefuses(t *testing.T) {
	for name, o := range map[string]config.Options{
		"a model":           {Model: "claude"},
		"a small model":     {SmallModel: "a/{env:X}"},
		"a variable":        {GitHub: config.Key{Env: "A}B"}},
		"two places":        {GitHub: config.Key{Env: "A", File: "/b"}},
		"a relative file":   {Sentry: config.Key{File: "b"}},
		"a way up":          {Sentry: config.Key{File: "/a/../b"}},
		"a brace in a file": {Sentry: config.Key{File: "/a}{env:B"}},
		"a URL of a program": {
			Gemini: config.Key{URL: "http://127.0.0.1:1"},
		},
		"a provider":                 {Providers: map[string]config.Provider{"A b": {}}},
		"a provider without models":  {Providers: map[string]config.Provider{"a": {Compatible: true, BaseURL: "http://x"}}},
		"a provider without address": {Providers: map[string]config.Provider{"a": {Compatible: true, Models: []string{"m"}}}},
		"a provider's key":           {Providers: map[string]config.Provider{"a": {Key: config.Key{Env: "1"}}}},
	} {
		if files, err := o.Files(); err == nil {
			t.Errorf("%s: %v", name, files)
		}
	}
}
