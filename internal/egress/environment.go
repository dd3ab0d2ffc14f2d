package egress

import (
	"slices"
	"strconv"
	"strings"

	"github.com/harvest-run/executord/internal/engine"
)

// Environment adds to a command's variables, each NAME=value, those by which programs
// find the proxy. What the command has itself stands. Without a proxy nothing is added.
func (p *Proxy) Environment(env []string) []string {
	if p == nil || p.policy.Mode != engine.NetworkEgress {
		return env
	}
	const local = "localhost,127.0.0.1,::1"
	proxy := "http://127.0.0.1:" + strconv.Itoa(Port)
	for _, variable := range []struct{ name, value string }{
		// Nobody has agreed on capitals: curl wants http_proxy in small letters, others
		// look for the large ones only.
		{"HTTP_PROXY", proxy}, {"http_proxy", proxy},
		{"HTTPS_PROXY", proxy}, {"https_proxy", proxy},
		{"ALL_PROXY", proxy}, {"all_proxy", proxy},
		{"NO_PROXY", local}, {"no_proxy", local},
		// Node's own fetch and http look at the others only with this.
		{"NODE_USE_ENV_PROXY", "1"},
		// Yarn from 2 on has names of its own. npm, pnpm, pip, uv, git, cargo and go take the above.
		{"YARN_HTTP_PROXY", proxy}, {"YARN_HTTPS_PROXY", proxy},
	} {
		if !slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, variable.name+"=") }) {
			env = append(env, variable.name+"="+variable.value)
		}
	}
	return env
}
