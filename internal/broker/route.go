package broker

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/secret"
)

// maxRoutes bounds the routes of a sandbox.
const maxRoutes = 64

// Scheme is how a credential is shown.
type Scheme string

// The schemes.
const (
	// Bearer is Authorization: Bearer SECRET.
	Bearer Scheme = "bearer"
	// Basic is Authorization: Basic with User and the secret as password.
	Basic Scheme = "basic"
	// Header is a header of its own, such as X-Api-Key: SECRET.
	Header Scheme = "header"
)

// Route passes on what is asked for below a prefix, or of a host.
type Route struct {
	// Name is what counts, logs and errors call it; unique.
	Name string `json:"name"`
	// Prefix of paths, such as /git/github.com/; with a slash at both ends, no other
	// route's. "" for a route with Host.
	Prefix string `json:"prefix,omitempty"`
	// Host that a client names, such as api.github.localhost, on port 80; for clients
	// whose address has no path. The client has to find it at 127.0.0.1 by itself.
	Host string `json:"host,omitempty"`
	// Upstream is what the prefix stands for: https://HOST[:PORT]/[PATH/].
	Upstream string `json:"upstream"`
	// Secret is the name of the credential; "" adds none.
	Secret string `json:"secret,omitempty"`
	// Scheme says how it is shown.
	Scheme Scheme `json:"scheme,omitempty"`
	// User is that of Basic.
	User string `json:"user,omitempty"`
	// Header is the name of the one of Header.
	Header string `json:"header,omitempty"`
	// Extra are headers that are added, behind a comma where the client has them, such as
	// Anthropic-Beta. They are no secrets.
	Extra map[string]string `json:"extra,omitempty"`
	// Allow is what may be asked for; everything if it is empty.
	Allow []Allow `json:"allow,omitempty"`
	// Git answers in words that git shows to people.
	Git bool `json:"git,omitempty"`
}

// Allow names requests.
type Allow struct {
	// Methods, such as GET; all if there are none.
	Methods []string `json:"methods,omitempty"`
	// Path below the prefix, without a slash at its beginning: * stands for a segment,
	// ** for any number of them.
	Path string `json:"path"`
	// Query is what the query must be, if it is not "".
	Query string `json:"query,omitempty"`
}

// Git is the route to a git server over HTTPS, for the name that workspace.Configure writes
// into git's configuration. With repositories, each OWNER/NAME as in the URL and without .git, only these
// are reached; push says whether they may be written to.
func Git(host, secretName string, push bool, repositories ...string) Route {
	r := Route{
		Name: "git:" + host, Prefix: GitPrefix(host), Upstream: "https://" + host + "/", Secret: secretName, Git: true,
		Scheme: Basic, User: "x-access-token",
	}
	if secretName == "" {
		r.Scheme, r.User = "", ""
	}
	paths := []string{"**"}
	if len(repositories) > 0 {
		paths = nil
		for _, name := range repositories {
			paths = append(paths, name, name+".git")
		}
	}
	for _, path := range paths {
		r.Allow = append(r.Allow,
			Allow{[]string{http.MethodGet}, path + "/info/refs", "service=git-upload-pack"},
			Allow{[]string{http.MethodPost}, path + "/git-upload-pack", ""},
			// Large files: what is where. They are moved from and to other hosts.
			Allow{[]string{http.MethodPost}, path + "/info/lfs/objects/batch", ""},
		)
		if push {
			r.Allow = append(r.Allow,
				Allow{[]string{http.MethodGet}, path + "/info/refs", "service=git-receive-pack"},
				Allow{[]string{http.MethodPost}, path + "/git-receive-pack", ""},
				Allow{nil, path + "/info/lfs/locks/**", ""}, Allow{nil, path + "/info/lfs/locks", ""},
			)
		}
	}
	return r
}

// GitPrefix is the prefix of the route to a git server.
func GitPrefix(host string) string { return "/git/" + host + "/" }

// GitHubAPI are the routes to GitHub's API: for programs that take its address, and for
// gh, which takes GH_HOST=github.localhost, any GH_TOKEN, and api.github.localhost at
// 127.0.0.1.
func GitHubAPI(secretName string) []Route {
	api := Route{Name: "github-api", Prefix: "/github-api/", Upstream: "https://api.github.com/", Secret: secretName, Scheme: Bearer}
	gh := api
	gh.Name, gh.Prefix, gh.Host = "github-api:gh", "", "api.github.localhost"
	return []Route{api, gh}
}

// Model is the route to the models of a provider, by its whole base URL such as
// https://api.openai.com/v1/. The credential is shown in a header of its own, such as
// X-Api-Key, or as a bearer token where that is ""; with no secret there is none.
func Model(upstream, secretName, header string) Route {
	if !strings.HasSuffix(upstream, "/") {
		upstream += "/"
	}
	r := Route{Name: "model", Prefix: "/model/", Upstream: upstream, Secret: secretName}
	switch {
	case secretName == "":
	case header != "":
		r.Scheme, r.Header = Header, header
	default:
		r.Scheme = Bearer
	}
	return r
}

// table is what a Gate passes on, ready to be asked.
type table struct {
	routes  []*route
	secrets Secrets
	rules   []egress.Rule
	web     bool
}

type route struct {
	Route
	upstream *url.URL
}

// table checks routes.
func (b *Broker) table(routes []Route, secrets Secrets) (*table, error) {
	t := &table{secrets: secrets, rules: slices.Clone(b.cfg.Private)}
	if len(routes) > maxRoutes {
		return nil, fault.New(fault.Invalid, "BROKER_ROUTES", "there are %d routes, at most %d are allowed", len(routes), maxRoutes)
	}
	for _, r := range routes {
		upstream, err := b.checkRoute(r)
		if err != nil {
			return nil, fault.New(fault.Invalid, "BROKER_ROUTE", "route %q: %v", r.Name, err)
		}
		for _, other := range t.routes {
			if other.Name == r.Name || r.Prefix != "" && other.Prefix == r.Prefix || r.Host != "" && other.Host == r.Host {
				return nil, fault.New(fault.Invalid, "BROKER_ROUTE", "route %q: another one has its name, prefix or host", r.Name)
			}
		}
		t.routes = append(t.routes, &route{r, upstream})
		t.web = t.web || r.Host != ""
		host := upstream.Hostname()
		// An address that is special is reached by Config.Private only.
		if addr, err := netip.ParseAddr(host); err != nil || !egress.IsSpecial(addr) {
			t.rules = append(t.rules, egress.Rule{Host: host, Ports: []uint16{portOf(upstream)}})
		}
	}
	// A longer prefix says more.
	slices.SortStableFunc(t.routes, func(a, b *route) int { return len(b.Prefix) - len(a.Prefix) })
	return t, nil
}

func portOf(u *url.URL) uint16 {
	if port, err := strconv.ParseUint(u.Port(), 10, 16); err == nil {
		return uint16(port)
	}
	if u.Scheme == "http" {
		return 80
	}
	return 443
}

func (b *Broker) checkRoute(r Route) (*url.URL, error) {
	if r.Name == "" || len(r.Name) > 128 {
		return nil, fmt.Errorf("it needs a name of at most 128 bytes")
	}
	if (r.Prefix == "") == (r.Host == "") {
		return nil, fmt.Errorf("it needs a prefix or a host, and not both")
	}
	if r.Prefix != "" && (r.Prefix[0] != '/' || !strings.HasSuffix(r.Prefix, "/") || dirty(r.Prefix)) {
		return nil, fmt.Errorf("prefix %q is not a plain path with a slash at both ends", r.Prefix)
	}
	u, err := url.Parse(r.Upstream)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || !strings.HasSuffix(u.Path, "/") || dirty(u.EscapedPath()) ||
		u.Scheme != "https" && u.Scheme != "http" {
		return nil, fmt.Errorf("upstream is not https://HOST[:PORT]/[PATH/]") // it may have a credential in it: not repeated
	}
	if err := (egress.Policy{Mode: "egress", Rules: []egress.Rule{{Host: u.Hostname(), Ports: []uint16{portOf(u)}}}}).Validate(); err != nil {
		return nil, fmt.Errorf("upstream: %w", err)
	}
	if u.Scheme == "http" && !b.private(u) {
		return nil, fmt.Errorf("upstream %s has no TLS; only one that the operator names as private may", u.Host)
	}
	switch r.Scheme {
	case "":
		if r.Secret != "" {
			return nil, fmt.Errorf("it has a secret and no scheme")
		}
	case Bearer, Basic, Header:
		if r.Secret == "" {
			return nil, fmt.Errorf("it has a scheme and no secret")
		}
		if r.Scheme == Header && !httpguts.ValidHeaderFieldName(r.Header) {
			return nil, fmt.Errorf("%q is not the name of a header", r.Header)
		}
	default:
		return nil, fmt.Errorf("scheme %q is not one of bearer, basic, header", string(r.Scheme))
	}
	for name, text := range r.Extra {
		if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(text) {
			return nil, fmt.Errorf("%q is not a header", name)
		}
	}
	return u, nil
}

// private says whether the operator names the upstream.
func (b *Broker) private(u *url.URL) bool {
	addr, err := netip.ParseAddr(u.Hostname())
	if err != nil {
		return false
	}
	return slices.ContainsFunc(b.cfg.Private, func(rule egress.Rule) bool {
		in := rule.Host == addr.String()
		if prefix, err := netip.ParsePrefix(rule.Host); err == nil {
			in = prefix.Contains(addr)
		}
		return in && (len(rule.Ports) == 0 || slices.Contains(rule.Ports, portOf(u)))
	})
}

// find returns the route of a request and the escaped path below it.
func (t *table) find(host, path string) (*route, string) {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	for _, r := range t.routes {
		if r.Host != "" {
			if strings.EqualFold(r.Host, host) {
				return r, strings.TrimPrefix(path, "/")
			}
			continue
		}
		if rest, ok := strings.CutPrefix(path, r.Prefix); ok {
			return r, rest
		}
	}
	return nil, ""
}

// dirty says whether a path can mean another one to somebody who cleans it: it has
// segments . or .., or empty ones. An encoded slash counts as one.
func dirty(escaped string) bool {
	path, err := url.PathUnescape(escaped)
	if err != nil || strings.ContainsAny(path, "\\\x00") {
		return true
	}
	for i, segment := range strings.Split(path, "/") {
		if segment == "." || segment == ".." || segment == "" && i > 0 && i < strings.Count(path, "/") {
			return true
		}
	}
	return false
}

// allows says whether a route lets a request through.
func (r *route) allows(method, rest, query string) bool {
	if len(r.Allow) == 0 {
		return true
	}
	path, err := url.PathUnescape(rest)
	if err != nil {
		return false
	}
	segments := strings.Split(path, "/")
	return slices.ContainsFunc(r.Allow, func(a Allow) bool {
		return (len(a.Methods) == 0 || slices.Contains(a.Methods, method)) && (a.Query == "" || a.Query == query) &&
			matches(strings.Split(a.Path, "/"), segments)
	})
}

// matches compares segments with those of a pattern.
func matches(pattern, path []string) bool {
	for i, p := range pattern {
		if p == "**" {
			for n := i; n <= len(path); n++ {
				if matches(pattern[i+1:], path[n:]) {
					return true
				}
			}
			return false
		}
		if i >= len(path) || p != path[i] && p != "*" {
			return false
		}
	}
	return len(pattern) == len(path)
}

// header is the name and the value of what shows the credential.
func (r *route) header(v secret.Value) (name, text string) {
	switch r.Scheme {
	case Basic:
		return "Authorization", "Basic " + base64.StdEncoding.EncodeToString([]byte(r.User+":"+v.Reveal()))
	case Header:
		return r.Route.Header, v.Reveal()
	default:
		return "Authorization", "Bearer " + v.Reveal()
	}
}
