package provision

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/harvest-run/executord/internal/agent/opencode/config"
	"github.com/harvest-run/executord/internal/broker"
	"github.com/harvest-run/executord/internal/guestclient"
	"github.com/harvest-run/executord/internal/guestfiles"
)

// keyDir is where keys lie that an MCP server must have itself: on a tmpfs, which no
// snapshot has.
const keyDir = "/dev/shm/.harvest"

// Credentials of MCP servers.
const (
	geminiKey   = "GEMINI_API_KEY"
	sentryToken = "SENTRY_AUTH_TOKEN"
	linearKey   = "LINEAR_API_KEY"
)

// gitHubServer and linearServer are reached over HTTP: their keys stay outside.
func gitHubServer() broker.Route {
	return broker.Route{Name: "github-mcp", Prefix: "/github-mcp/", Upstream: "https://api.githubcopilot.com/mcp/", Secret: gitHubToken, Scheme: broker.Bearer}
}

func linearServer() broker.Route {
	return broker.Route{Name: "linear-mcp", Prefix: "/linear-mcp/", Upstream: "https://mcp.linear.app/mcp/", Secret: linearKey, Scheme: broker.Bearer}
}

// serverRoutes are the ways to MCP servers.
func serverRoutes(b bag) []broker.Route {
	var routes []broker.Route
	for _, r := range []broker.Route{gitHubServer(), linearServer()} {
		if b.has(r.Secret) {
			routes = append(routes, r)
		}
	}
	return routes
}

// programs are the MCP servers that run in the sandbox and have a key there.
func programs() map[string]string {
	return map[string]string{"gemini": geminiKey, "sentry": sentryToken}
}

// options are the agent's configuration in a sandbox with these credentials.
func options(p provider, b bag) config.Options {
	o := config.Options{
		Model: p.id + "/" + p.model,
		Providers: map[string]config.Provider{p.id: {
			// The key is added on the way; OpenCode wants to have one.
			BaseURL: broker.URL(p.route(b)), Key: config.Key{Env: placeholder}, Compatible: p.compatible,
		}},
	}
	if p.compatible {
		made := o.Providers[p.id]
		made.Models = []string{p.model}
		o.Providers[p.id] = made
	}
	if b.has(gitHubToken) {
		o.GitHub = config.Key{URL: broker.URL(gitHubServer())}
	}
	if b.has(linearKey) {
		o.Linear = config.Key{URL: broker.URL(linearServer())}
	}
	if b.has(geminiKey) {
		o.Gemini = config.Key{File: keyDir + "/gemini"}
	}
	if b.has(sentryToken) {
		o.Sentry = config.Key{File: keyDir + "/sentry"}
	}
	return o
}

// placeholder is the variable that has what OpenCode takes for its key.
const placeholder = "HARVEST_NO_KEY"

// writeKeys puts the keys of MCP servers where these read them.
func writeKeys(ctx context.Context, guest *guestclient.Client, b bag) error {
	var files []guestfiles.File
	all := programs()
	for _, server := range slices.Sorted(maps.Keys(all)) {
		if !b.has(all[server]) {
			continue
		}
		value, err := b.Lookup(all[server])
		if err != nil {
			return fmt.Errorf("key of the MCP server %s: %w", server, err)
		}
		files = append(files, guestfiles.File{Path: keyDir + "/" + server, Mode: 0o600, Data: []byte(value.Reveal())})
	}
	return guestfiles.Write(ctx, guest, "agent-keys", files)
}

// withoutKey are the MCP servers that were left out.
func withoutKey(b bag) []string {
	var names []string
	for server, name := range map[string]string{"github": gitHubToken, "linear": linearKey, "gemini": geminiKey, "sentry": sentryToken} {
		if !b.has(name) {
			names = append(names, server)
		}
	}
	slices.Sort(names)
	return names
}
