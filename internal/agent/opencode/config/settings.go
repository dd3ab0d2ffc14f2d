package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
)

// settings of OpenCode, as far as they are set here.
type settings struct {
	Schema            string              `json:"$schema"`
	Model             string              `json:"model,omitempty"`
	SmallModel        string              `json:"small_model,omitempty"`
	Share             string              `json:"share"`
	AutoUpdate        bool                `json:"autoupdate"`
	DisabledProviders []string            `json:"disabled_providers"`
	Permission        map[string]string   `json:"permission"`
	Provider          map[string]provider `json:"provider,omitempty"`
	MCP               map[string]server   `json:"mcp"`
}

type provider struct {
	NPM     string            `json:"npm,omitempty"`
	Name    string            `json:"name,omitempty"`
	Options map[string]string `json:"options,omitempty"`
	Models  map[string]model  `json:"models,omitempty"`
}

type model struct {
	Name string `json:"name,omitempty"`
}

// server is an MCP server: a program that is started, or an address.
type server struct {
	Type        string            `json:"type"`
	Command     []string          `json:"command,omitempty"`
	Environment map[string]string `json:"environment,omitempty"`
	URL         string            `json:"url,omitempty"`
	Headers     map[string]string `json:"headers,omitempty"`
	// OAuth is false for a server that is shown a key: nobody is there to log in.
	OAuth *bool `json:"oauth,omitempty"`
	// Timeout in milliseconds. The first prompt waits for servers that have not answered.
	Timeout int `json:"timeout,omitempty"`
}

// startTime is how long a server may take to start, in milliseconds.
const startTime = 30_000

const modules = Tools + "/node_modules/"

func (o Options) settings() ([]byte, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	s := settings{
		Schema: "https://opencode.ai/config.json",
		Model:  o.Model, SmallModel: o.SmallModel,
		Share: "disabled", AutoUpdate: false,
		// It is on without any key, and would be sent the code.
		DisabledProviders: []string{"opencode"},
		// The sandbox is the bound of what may be done. A question that nobody sees would
		// hold the agent for ever.
		Permission: map[string]string{"*": "allow", "question": "deny"},
		Provider:   o.providers(),
		MCP:        o.servers(),
	}
	if s.SmallModel == "" {
		s.SmallModel = s.Model
	}
	if o.Permission != nil {
		s.Permission = o.Permission
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(s); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

func (o Options) check() error {
	form := regexp.MustCompile(`^[^/{}\s]+/[^{}\s]+$`)
	for _, m := range []string{o.Model, o.SmallModel} {
		if m != "" && !form.MatchString(m) {
			return fmt.Errorf("model %q is not PROVIDER/MODEL", m)
		}
	}
	for name, key := range map[string]Key{"github": o.GitHub, "gemini": o.Gemini, "sentry": o.Sentry, "linear": o.Linear} {
		if err := key.check(); err != nil {
			return fmt.Errorf("key of %s: %w", name, err)
		}
		if key.URL != "" && name != "github" && name != "linear" {
			return fmt.Errorf("key of %s: its server is a program and has no URL", name)
		}
	}
	id := regexp.MustCompile(`^[a-z0-9][a-z0-9._-]*$`)
	for name, p := range o.Providers {
		if !id.MatchString(name) {
			return fmt.Errorf("provider %q: its id must be of a-z, 0-9, \".\", \"_\" and \"-\"", name)
		}
		if err := p.Key.check(); err != nil {
			return fmt.Errorf("key of provider %s: %w", name, err)
		}
		if p.Compatible && (p.BaseURL == "" || len(p.Models) == 0) {
			return fmt.Errorf("provider %s: one that OpenCode does not know needs a base URL and models", name)
		}
	}
	return nil
}

func (o Options) providers() map[string]provider {
	all := make(map[string]provider)
	for id, p := range o.Providers {
		made := provider{Options: make(map[string]string)}
		if p.BaseURL != "" {
			made.Options["baseURL"] = p.BaseURL
		}
		if key := p.Key.reference(); key != "" {
			made.Options["apiKey"] = key
		}
		if p.Compatible {
			made.NPM, made.Name = "@ai-sdk/openai-compatible", p.Name
			if made.Name == "" {
				made.Name = id
			}
			made.Models = make(map[string]model)
			for _, m := range p.Models {
				made.Models[m] = model{m}
			}
		}
		all[id] = made
	}
	return all
}

// servers are started from the files of the image: npx would ask the registry, and
// takes a third of a second more for each.
func (o Options) servers() map[string]server {
	run := func(script string, args ...string) server {
		return server{Type: "local", Command: append([]string{Node, modules + script}, args...), Timeout: startTime}
	}
	const chromium = "/usr/bin/chromium"
	memory := run("@modelcontextprotocol/server-memory/dist/index.js")
	memory.Environment = map[string]string{"MEMORY_FILE_PATH": MemoryFile}
	devtools := run("chrome-devtools-mcp/build/src/bin/chrome-devtools-mcp.js", "--headless", "--isolated",
		"--executablePath", chromium, "--chromeArg=--no-sandbox", "--chromeArg=--disable-dev-shm-usage",
		"--no-usage-statistics", "--no-performance-crux")
	// It would ask the registry for a newer version of itself.
	devtools.Environment = map[string]string{"CHROME_DEVTOOLS_MCP_NO_UPDATE_CHECKS": "1"}
	all := map[string]server{
		"memory":     memory,
		"filesystem": run("@modelcontextprotocol/server-filesystem/dist/index.js", Workspace),
		// Chromium's own sandbox needs user namespaces, which code here may not make.
		"playwright": run("@playwright/mcp/cli.js", "--headless", "--isolated", "--no-sandbox",
			"--browser", "chromium", "--executable-path", chromium, "--output-dir", "/tmp/playwright"),
		"devtools": devtools,
	}
	if o.GitHub.given() {
		all["github"] = remote(o.GitHub, "https://api.githubcopilot.com/mcp/", map[string]string{"X-MCP-Toolsets": "repos,issues,pull_requests"})
	}
	if o.Linear.given() {
		all["linear"] = remote(o.Linear, "https://mcp.linear.app/mcp", nil)
	}
	if o.Gemini.given() {
		s := run("@houtini/gemini-mcp/dist/cli.js")
		s.Environment = map[string]string{"GEMINI_API_KEY": o.Gemini.reference()}
		all["gemini"] = s
	}
	if o.Sentry.given() {
		s := run("@sentry/mcp-server/dist/index.js")
		s.Environment = map[string]string{"SENTRY_ACCESS_TOKEN": o.Sentry.reference()}
		all["sentry"] = s
	}
	return all
}

// remote is a server at an address.
func remote(key Key, url string, headers map[string]string) server {
	if key.URL != "" {
		url = key.URL
	}
	s := server{Type: "remote", URL: url, Headers: make(map[string]string), OAuth: new(bool), Timeout: startTime}
	for name, value := range headers {
		s.Headers[name] = value
	}
	if reference := key.reference(); reference != "" {
		s.Headers["Authorization"] = "Bearer " + reference
	}
	return s
}
