package provision

import (
	"context"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/harvest-run/executord/internal/broker"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/secret"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/workspace"
)

// The names of credentials that mean something. Those of MCP servers are in servers.go.
const (
	// gitHubToken is for github.com; gitToken for all other hosts of repositories.
	gitHubToken  = "GITHUB_TOKEN"
	gitToken     = "GIT_TOKEN"
	anthropicKey = "ANTHROPIC_API_KEY"
	openAIKey    = "OPENAI_API_KEY"
)

const gitHub = "github.com"

// bag finds credentials by the names that a session knows them by.
type bag struct {
	values map[string]string
	names  map[string]string
	source *secret.Source
}

// Lookup implements broker.Secrets.
func (b bag) Lookup(name string) (secret.Value, error) {
	if text, ok := b.values[name]; ok {
		return secret.NewValue(text)
	}
	if named, ok := b.names[name]; ok {
		return b.source.Lookup(named)
	}
	return secret.Value{}, fault.New(fault.FailedPrecondition, "CREDENTIALS_REQUIRED", "the credential %s was not given; after a restart of executord what was given with a session has to be given again", name)
}

func (b bag) has(name string) bool {
	_, value := b.values[name]
	_, named := b.names[name]
	return value || named
}

// bag has the credentials of a session's ways out.
func (p *Provisioner) bag(w session.Way) bag { return bag{w.Values, w.Secrets, p.cfg.Secrets} }

// Check implements session.Credentials.
func (p *Provisioner) Check(w session.Way) error {
	b := p.bag(w)
	for _, name := range w.Secrets {
		if !slices.Contains(p.cfg.Secrets.Names(), name) {
			return fault.New(fault.NotFound, "SECRET_NOT_FOUND", "there is no secret %q in this server's configuration", name)
		}
	}
	if w.Model == nil {
		return nil
	}
	provider, err := p.provider(*w.Model)
	if err != nil {
		return err
	}
	if !b.has(provider.secret) && w.Auth == "" && provider.upstream == providers()[provider.id].upstream {
		return fault.New(fault.FailedPrecondition, "CREDENTIALS_REQUIRED", "the models of %s need the credential %s: give its value, or name a secret of the server's", provider.id, provider.secret)
	}
	return nil
}

// Open implements session.Credentials.
func (p *Provisioner) Open(ctx context.Context, sb engine.Sandbox, w session.Way) error {
	routes, err := p.routes(w)
	if err != nil {
		return err
	}
	if len(routes) == 0 {
		return nil
	}
	_, err = p.cfg.Broker.Open(ctx, sb, routes, p.bag(w))
	return err
}

// routes are all the ways out with credentials.
func (p *Provisioner) routes(w session.Way) ([]broker.Route, error) {
	b := p.bag(w)
	var routes []broker.Route
	hosts := make(map[string][]string)
	plain := make(map[string]bool)
	for _, r := range w.Repositories {
		remote, err := workspace.ParseURL(r.URL, p.cfg.Plain)
		if err != nil {
			return nil, err
		}
		hosts[remote.Host] = append(hosts[remote.Host], path.Join(remote.Owner, remote.Name))
		plain[remote.Host] = strings.HasPrefix(remote.URL, "http://")
	}
	for host, repositories := range hosts {
		name := gitToken
		if host == gitHub {
			name = gitHubToken
		}
		if !b.has(name) && !slices.Contains(w.Inline, name) {
			name = ""
		}
		route := broker.Git(host, name, name != "", repositories...)
		if plain[host] {
			route.Upstream = "http://" + host + "/"
		}
		routes = append(routes, route)
	}
	slices.SortFunc(routes, func(a, b broker.Route) int { return strings.Compare(a.Name, b.Name) })
	if b.has(gitHubToken) {
		routes = append(routes, broker.GitHubAPI(gitHubToken)...)
	}
	if w.Model != nil {
		provider, err := p.provider(*w.Model)
		if err != nil {
			return nil, err
		}
		routes = append(routes, provider.route(b))
		routes = append(routes, serverRoutes(b)...)
	}
	return routes, nil
}

// provider is where models are had.
type provider struct {
	// id is OpenCode's name of it.
	id, model string
	upstream  string
	secret    string
	// header shows the credential; "" shows it as a bearer token.
	header string
	// compatible says that OpenCode does not know it.
	compatible bool
}

func providers() map[string]provider {
	return map[string]provider{
		"anthropic": {id: "anthropic", upstream: "https://api.anthropic.com/v1/", secret: anthropicKey, header: "X-Api-Key"},
		"openai":    {id: "openai", upstream: "https://api.openai.com/v1/", secret: openAIKey},
	}
}

// provider finds out where a model is had; that of the configuration if none was named.
func (p *Provisioner) provider(m session.Model) (provider, error) {
	if m.Provider == "" {
		m = p.cfg.Model
	}
	made, known := providers()[m.Provider]
	if !known {
		if m.BaseURL == "" {
			return provider{}, fault.InvalidField("MODEL_PROVIDER", "agent.model.provider", "%q is not anthropic or openai; another one needs a base_url that speaks OpenAI's chat API", m.Provider)
		}
		made = provider{id: m.Provider, secret: openAIKey, compatible: true}
	}
	made.model = m.Model
	if m.BaseURL != "" {
		u, err := url.Parse(m.BaseURL)
		if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return provider{}, fault.InvalidField("MODEL_URL", "agent.model.base_url", "must be https://HOST/PATH, without user, query and fragment")
		}
		made.upstream = strings.TrimSuffix(m.BaseURL, "/") + "/"
	}
	return made, nil
}

// route is the way to a provider. A server of one's own may want no credential.
func (p provider) route(b bag) broker.Route {
	if !b.has(p.secret) {
		return broker.Model(p.upstream, "", "")
	}
	return broker.Model(p.upstream, p.secret, p.header)
}

// gitBrokers are the addresses in the sandbox that take the place of the hosts of
// repositories.
func (p *Provisioner) gitBrokers(repositories []session.Repository) (map[string]string, error) {
	all := make(map[string]string)
	for _, r := range repositories {
		remote, err := workspace.ParseURL(r.URL, p.cfg.Plain)
		if err != nil {
			return nil, fmt.Errorf("repository %s: %w", r.Directory, err)
		}
		all[remote.Host] = broker.URL(broker.Git(remote.Host, "", false)) + "/"
	}
	return all, nil
}
