package workspace

import (
	"fmt"
	"net/url"
	"regexp"
	"strings"

	"github.com/harvest-run/executord/internal/fault"
)

// Repository is one that is to be cloned.
type Repository struct {
	// URL is https://HOST/PATH, or git@HOST:PATH and ssh://git@HOST/PATH, which mean the
	// same here. Without credentials.
	URL string `json:"url"`
	// Branch to check out; "" is the remote's own.
	Branch string `json:"branch,omitempty"`
	// Depth is how many commits of its history are fetched; 0 all.
	Depth int `json:"depth,omitempty"`
	// Name of its directory below Root; "" is the last part of the URL.
	Name string `json:"name,omitempty"`
	// Submodules are cloned too.
	Submodules bool `json:"submodules,omitempty"`
}

// Remote is what a repository's URL says.
type Remote struct {
	// URL is the https form.
	URL string
	// Host has the port with it, if there is one. Owner is all between host and name.
	Host, Owner, Name string
}

// maxURL bounds a URL, in bytes.
const maxURL = 2048

// ParseURL reads the URL of a repository. plain allows http and not only https. Faults:
// Invalid; they do not repeat the URL, which may have a credential in it.
func ParseURL(text string, plain bool) (Remote, error) {
	wrong := func(format string, args ...any) (Remote, error) {
		return Remote{}, fault.InvalidField("REPOSITORY_URL", "url", format, args...)
	}
	if text == "" || len(text) > maxURL {
		return wrong("is empty or longer than %d bytes", maxURL)
	}
	for _, r := range text {
		if r <= ' ' || r == 0x7f || r == '\\' {
			return wrong("has blanks, control characters or backslashes")
		}
	}
	if scp := regexp.MustCompile(`^git@([A-Za-z0-9.-]+):([^/:][^:]*)$`).FindStringSubmatch(text); scp != nil {
		text = "https://" + scp[1] + "/" + scp[2]
	}
	u, err := url.Parse(text)
	if err != nil {
		return wrong("is not a URL")
	}
	if u.Scheme == "ssh" && u.User.String() == "git" {
		u.Scheme, u.User, u.Host = "https", nil, u.Hostname()
	}
	switch {
	case u.Scheme != "https" && (u.Scheme != "http" || !plain):
		return wrong("is not https://HOST/PATH")
	case u.User != nil:
		return wrong("has a user or password in it; credentials are given as a secret")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return wrong("has a query or fragment")
	case u.Host == "" || !regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?$`).MatchString(strings.ToLower(u.Host)):
		return wrong("has no plain host")
	}
	segments := strings.Split(strings.Trim(u.Path, "/"), "/")
	for _, s := range segments {
		if s == "" || s == "." || s == ".." || s[0] == '-' || !regexp.MustCompile(`^[A-Za-z0-9._~+@%-]+$`).MatchString(s) {
			return wrong("has a path that is not plain")
		}
	}
	last := len(segments) - 1
	r := Remote{Host: strings.ToLower(u.Host), Owner: strings.Join(segments[:last], "/"), Name: strings.TrimSuffix(segments[last], ".git")}
	if r.Name == "" {
		return wrong("names no repository")
	}
	r.URL = u.Scheme + "://" + r.Host + "/" + strings.Join(segments, "/")
	return r, nil
}

// checkName says what is wrong with the name of a directory.
func checkName(name string) error {
	if !regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$`).MatchString(name) {
		return fmt.Errorf("%q is not a name of 1 to 100 characters A-Z, a-z, 0-9, dot, hyphen and underscore that begins with a letter, digit or underscore", clip(name, 120))
	}
	return nil
}

// checkBranch says what is wrong with the name of a branch, as git check-ref-format.
func checkBranch(name string) error {
	bad := len(name) > 255 || name == "@" || strings.HasPrefix(name, "-") || strings.Contains(name, "..") || strings.Contains(name, "@{") ||
		strings.ContainsAny(name, " ~^:?*[\\\x7f") || strings.HasSuffix(name, ".")
	for part := range strings.SplitSeq(name, "/") {
		bad = bad || part == "" || part[0] == '.' || strings.HasSuffix(part, ".lock")
	}
	for _, r := range name {
		bad = bad || r < ' '
	}
	if bad {
		return fmt.Errorf("%q is not the name of a branch", clip(name, 120))
	}
	return nil
}

// Plan checks repositories and gives each the name of its directory: its own, that of
// its URL, with the owner before it if another one has that, and a number if need be. plain allows
// http. Faults: Invalid.
func Plan(repositories []Repository, plain bool) ([]Repository, error) {
	planned := make([]Repository, len(repositories))
	taken := make(map[string]bool)
	take := func(name string) bool {
		key := strings.ToLower(name) // so that it works where names differ by more only
		if taken[key] {
			return false
		}
		taken[key] = true
		return true
	}
	for i, r := range repositories {
		field := fmt.Sprintf("repositories[%d]", i)
		remote, err := ParseURL(r.URL, plain)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
		r.URL = remote.URL
		if r.Branch != "" {
			if err := checkBranch(r.Branch); err != nil {
				return nil, fault.InvalidField("REPOSITORY_BRANCH", field+".branch", "%v", err)
			}
		}
		if r.Depth < 0 {
			return nil, fault.InvalidField("REPOSITORY_DEPTH", field+".depth", "%d is negative", r.Depth)
		}
		if r.Name != "" {
			if err := checkName(r.Name); err != nil {
				return nil, fault.InvalidField("REPOSITORY_NAME", field+".name", "%v", err)
			}
			if !take(r.Name) {
				return nil, fault.InvalidField("REPOSITORY_NAME", field+".name", "%q is another one's", r.Name)
			}
		}
		planned[i] = r
	}
	for i, r := range planned {
		if r.Name != "" {
			continue
		}
		remote, err := ParseURL(r.URL, plain)
		if err != nil {
			return nil, err
		}
		plainName := func(text string) string {
			text = strings.TrimLeft(regexp.MustCompile(`[^A-Za-z0-9._-]+`).ReplaceAllString(text, "-"), ".-")
			return text[:min(len(text), 90)]
		}
		name := plainName(remote.Name)
		if name == "" {
			name = "repository"
		}
		if !take(name) {
			name = plainName(remote.Owner + "-" + remote.Name)
			for base, n := name, 2; !take(name); n++ {
				name = fmt.Sprintf("%s-%d", base, n)
			}
		}
		planned[i].Name = name
	}
	return planned, nil
}
