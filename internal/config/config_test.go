package config

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// asRoot is the input of root with nothing set.
func asRoot(args ...string) Input {
	return Input{Args: args, WorkingDirectory: "/work"}
}

// withFile returns the input with a file of this content, which is named f.yaml.
func (in Input) withFile(t testing.TB, content string) Input {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	in.Args = append([]string{"--config", path}, in.Args...)
	return in
}

func (in Input) withEnv(env ...string) Input {
	in.Env = append(in.Env, env...)
	return in
}

func load(t testing.TB, in Input) *configv1.Config {
	t.Helper()
	config, err := Load(in)
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// defaults are written out here: changing one is a decision.
func defaults() *configv1.Config {
	return &configv1.Config{
		Listen:       "127.0.0.1:7070",
		StateDir:     "/var/lib/executord",
		DrainTimeout: durationpb.New(30 * time.Second),
		OnStop:       configv1.OnStop_ON_STOP_KEEP,
		Log:          &configv1.Log{Level: configv1.Log_LEVEL_INFO, Format: configv1.Log_FORMAT_TEXT},
		Limits:       &configv1.Limits{MemoryBytes: 2 << 30, Pids: 1024},
		Output:       &configv1.Output{DefaultRetainedBytes: 1 << 30, MaxRetainedBytes: 64 << 30},
		Reflection:   true,
		Local:        &configv1.Local{UidBase: 1879048192, UidCount: 4094, BlankGuests: 3, Enabled: true},
		Engine:       "local",
		Modal: &configv1.Modal{App: "harvest-agent-executor", Image: "debian:13-slim", VolumeVersion: 2, Lifetime: durationpb.New(24 * time.Hour),
			MaxSandboxes: 100, MaxCreatesPerMinute: 60, Secrets: []string{"harvest-github"}, IdleTimeout: durationpb.New(time.Hour)},
		Tls: &configv1.Tls{ClientAuth: configv1.Tls_CLIENT_AUTH_REQUEST},
		Auth: &configv1.Auth{Oidc: &configv1.Oidc{RoleClaim: "roles", Leeway: durationpb.New(30 * time.Second)},
			Certificates: &configv1.Certificates{}, Quotas: &configv1.Quotas{}},
		Network: &configv1.Network{DefaultMode: configv1.Network_MODE_NONE, MaxMode: configv1.Network_MODE_EGRESS},
		Admission: &configv1.Admission{
			MaxRunning: 256, MaxQueued: 1024, MaxQueueWait: durationpb.New(30 * time.Second), MaxSandboxes: 4000,
		},
		Pool:      &configv1.Pool{Size: 2, MaxAge: durationpb.New(10 * time.Minute)},
		Retention: &configv1.Retention{MaxAge: durationpb.New(7 * 24 * time.Hour), MaxTotalBytes: 32 << 30, MinFreeBytes: 64 << 20},
		Broker:    &configv1.Broker{},
		Sessions:  &configv1.Sessions{AuthorName: "Developer", AuthorEmail: "dev@example.com", Model: "anthropic/claude-sonnet-4-5"},
		Images:    &configv1.Images{DebianMirror: "http://deb.debian.org", NpmRegistry: "https://registry.npmjs.org"},
	}
}

func TestDefaults(t *testing.T) {
	for name, in := range map[string]Input{
		"nothing":             asRoot(),
		"empty file":          asRoot().withFile(t, ""),
		"file with a comment": asRoot().withFile(t, "# nothing\n"),
		"foreign variables":   asRoot().withEnv("PATH=/bin", "EXECUTOR_LISTEN=x", "executord_listen=x", "EXECUTORD", "=x"),
	} {
		if diff := cmp.Diff(defaults(), load(t, in), protocmp.Transform()); diff != "" {
			t.Errorf("%s: differs (-want +got):\n%s", name, diff)
		}
	}
}

// full has another value than the default in every field, as the layers write it.
func full() (map[string]string, *configv1.Config) {
	return map[string]string{
			"listen": "unix:/run/x.sock", "state_dir": "/state", "drain_timeout": "1m30s", "on_stop": "terminate",
			"log.level": "debug", "log.format": "json",
			"limits.memory_bytes": "512MiB", "limits.pids": "99", "limits.cpu_millis": "1500", "limits.disk_bytes": "5GiB", "limits.open_files": "4096",
			"output.default_retained_bytes": "2097152", "output.max_retained_bytes": "3MiB",
			"reflection": "false", "local.uid_base": "131072", "local.uid_count": "7",
			"local.cgroup_parent": "/a.slice", "local.extra_paths": "/opt/a", "local.blank_guests": "9",
			"tls.cert_file": "/t/cert", "tls.key_file": "/t/key", "tls.client_ca_file": "/t/ca", "tls.client_auth": "require",
			"auth.methods": "certificate", "auth.oidc.issuer": "https://issuer.example", "auth.oidc.audience": "us",
			"auth.oidc.role_claim": "groups", "auth.oidc.users": "*", "auth.oidc.operators": "ops", "auth.oidc.admins": "root:admin",
			"auth.oidc.leeway": "5s", "auth.oidc.algorithms": "ES256",
			"auth.certificates.users": "spiffe://example.org/ci", "auth.certificates.operators": "CN=ops", "auth.certificates.admins": "CN=root",
			"auth.quotas.running_executions": "3", "auth.quotas.sessions": "2", "auth.quotas.stored_bytes": "5GiB",
			"network.default_mode": "egress", "network.default_allow": "a.example", "network.max_mode": "host",
			"network.denied_cidrs": "10.0.0.0/8", "network.nameserver": "192.0.2.53:5353",
			"admission.max_running": "5", "admission.max_queued": "6", "admission.max_queue_wait": "7s", "admission.max_sandboxes": "8",
			"pool.size": "3", "pool.max_age": "1h",
			"retention.max_age": "0", "retention.max_total_bytes": "1GiB", "retention.min_free_bytes": "1048577",
			"engine": "modal", "local.enabled": "false",
			"modal.enabled": "true", "modal.app": "other", "modal.environment": "test", "modal.image": "alpine:3", "modal.dockerfile": "RUN true",
			"modal.regions": "us-east", "modal.runtime": "vm", "modal.volume_version": "1", "modal.lifetime": "2h", "modal.max_sandboxes": "9",
			"modal.max_creates_per_minute": "10", "modal.open_network": "true", "modal.outbound_cidrs": "192.0.2.0/24", "modal.secrets": "theirs",
			"modal.idle_timeout": "0", "modal.exit_snapshots": "true",
			"sessions.author_name": "Ann", "sessions.author_email": "ann@x", "sessions.model": "openai/gpt-x",
			"broker.secrets": "github=env:GITHUB_TOKEN", "broker.private_upstreams": "10.0.0.1:443",
			"images.debian_mirror": "http://mirror.example/d", "images.npm_registry": "https://npm.example", "images.allow": "10.0.0.1:8080",
			"images.packages": "hello", "images.tools_dir": "/opt/tools",
		}, &configv1.Config{
			Listen: "unix:/run/x.sock", StateDir: "/state", DrainTimeout: durationpb.New(90 * time.Second),
			OnStop: configv1.OnStop_ON_STOP_TERMINATE,
			Log:    &configv1.Log{Level: configv1.Log_LEVEL_DEBUG, Format: configv1.Log_FORMAT_JSON},
			Limits: &configv1.Limits{MemoryBytes: 512 << 20, Pids: 99, CpuMillis: 1500, DiskBytes: 5 << 30, OpenFiles: 4096},
			Output: &configv1.Output{DefaultRetainedBytes: 2 << 20, MaxRetainedBytes: 3 << 20},
			Local: &configv1.Local{UidBase: 131072, UidCount: 7, CgroupParent: "/a.slice",
				ExtraPaths: []string{"/opt/a"}, BlankGuests: 9},
			Engine: "modal",
			Modal: &configv1.Modal{Enabled: true, App: "other", Environment: "test", Image: "alpine:3", Dockerfile: []string{"RUN true"},
				Regions: []string{"us-east"}, Runtime: "vm", VolumeVersion: 1, Lifetime: durationpb.New(2 * time.Hour), MaxSandboxes: 9,
				MaxCreatesPerMinute: 10, OpenNetwork: true, OutboundCidrs: []string{"192.0.2.0/24"}, Secrets: []string{"theirs"},
				IdleTimeout: durationpb.New(0), ExitSnapshots: true},
			Tls: &configv1.Tls{CertFile: "/t/cert", KeyFile: "/t/key", ClientCaFile: "/t/ca", ClientAuth: configv1.Tls_CLIENT_AUTH_REQUIRE},
			Auth: &configv1.Auth{
				Methods: []configv1.Auth_Method{configv1.Auth_METHOD_CERTIFICATE},
				Oidc: &configv1.Oidc{Issuer: "https://issuer.example", Audience: "us", RoleClaim: "groups", Users: []string{"*"},
					Operators: []string{"ops"}, Admins: []string{"root:admin"}, Leeway: durationpb.New(5 * time.Second), Algorithms: []string{"ES256"}},
				Certificates: &configv1.Certificates{Users: []string{"spiffe://example.org/ci"}, Operators: []string{"CN=ops"}, Admins: []string{"CN=root"}},
				Quotas:       &configv1.Quotas{RunningExecutions: 3, Sessions: 2, StoredBytes: 5 << 30},
			},
			Network: &configv1.Network{DefaultMode: configv1.Network_MODE_EGRESS, DefaultAllow: []string{"a.example"},
				MaxMode: configv1.Network_MODE_HOST, DeniedCidrs: []string{"10.0.0.0/8"}, Nameserver: "192.0.2.53:5353"},
			Admission: &configv1.Admission{MaxRunning: 5, MaxQueued: 6, MaxQueueWait: durationpb.New(7 * time.Second), MaxSandboxes: 8},
			Pool:      &configv1.Pool{Size: 3, MaxAge: durationpb.New(time.Hour)},
			Retention: &configv1.Retention{MaxAge: durationpb.New(0), MaxTotalBytes: 1 << 30, MinFreeBytes: 1<<20 + 1},
			Sessions:  &configv1.Sessions{AuthorName: "Ann", AuthorEmail: "ann@x", Model: "openai/gpt-x"},
			Broker:    &configv1.Broker{Secrets: []string{"github=env:GITHUB_TOKEN"}, PrivateUpstreams: []string{"10.0.0.1:443"}},
			Images: &configv1.Images{DebianMirror: "http://mirror.example/d", NpmRegistry: "https://npm.example",
				Allow: []string{"10.0.0.1:8080"}, Packages: []string{"hello"}, ToolsDir: "/opt/tools"},
		}
}

// company is what a field needs beside it to be good, and another good value where there
// is no default.
func company(name string) (env []string, other string) {
	const cert, key, authorities = "EXECUTORD_TLS_CERT_FILE=/c", "EXECUTORD_TLS_KEY_FILE=/k", "EXECUTORD_TLS_CLIENT_CA_FILE=/a"
	switch name {
	case "tls.cert_file":
		return []string{key}, ""
	case "tls.key_file":
		return []string{cert}, ""
	case "tls.client_ca_file":
		return []string{cert, key}, ""
	case "tls.client_auth":
		return []string{cert, key, authorities}, ""
	case "auth.methods":
		return []string{cert, key, authorities}, "api_key"
	case "auth.oidc.issuer":
		return nil, "http://127.0.0.1:1/x"
	case "auth.oidc.algorithms":
		return nil, "RS512"
	case "auth.quotas.running_executions", "auth.quotas.sessions", "auth.quotas.stored_bytes":
		return []string{"EXECUTORD_AUTH_METHODS=api_key"}, ""
	case "modal.outbound_cidrs":
		return []string{"EXECUTORD_MODAL_OPEN_NETWORK=true"}, ""
	case "images.allow", "images.packages":
		return nil, "other"
	}
	return nil, ""
}

// Every field can be set by every layer, and a higher one wins.
func TestPrecedence(t *testing.T) {
	texts, want := full()
	base := load(t, asRoot())
	for _, f := range fields() {
		t.Run(f.name, func(t *testing.T) {
			text, other := texts[f.name], f.get(base)
			if text == "" {
				t.Fatal("full does not have this field")
			}
			set := func(text string) map[string]func(Input) Input {
				return map[string]func(Input) Input{
					"file": func(in Input) Input { return in.withFile(t, yamlFor(f, text)) },
					"env":  func(in Input) Input { return in.withEnv(f.variable() + "=" + text) },
					"flag": func(in Input) Input { in.Args = append(in.Args, "--"+f.flag()+"="+text); return in },
				}
			}
			expected := f.get(want)
			with, instead := company(f.name)
			root := func(args ...string) Input { return asRoot(args...).withEnv(with...) }
			if f.name == "output.max_retained_bytes" { // the default of the other does not fit
				texts := set(text)
				for name, layer := range texts {
					in := layer(asRoot().withEnv("EXECUTORD_OUTPUT_DEFAULT_RETAINED_BYTES=1MiB"))
					if got := f.get(load(t, in)); !slices.Equal(got, expected) {
						t.Errorf("set by %s it is %v, want %v", name, got, expected)
					}
				}
				return
			}
			switch f.name { // two that go together
			case "network.default_mode":
				with = append(with, "EXECUTORD_NETWORK_DEFAULT_ALLOW=b.example")
			case "network.default_allow":
				with = append(with, "EXECUTORD_NETWORK_DEFAULT_MODE=egress")
			}
			for name, layer := range set(text) {
				if got := f.get(load(t, layer(root()))); !slices.Equal(got, expected) {
					t.Errorf("set by %s it is %v, want %v", name, got, expected)
				}
			}
			if len(other) == 0 || other[0] == "" {
				other = []string{"/other"}
			}
			if instead != "" {
				other = []string{instead}
			}
			for _, pair := range [][2]string{{"file", "env"}, {"file", "flag"}, {"env", "flag"}} {
				low, high := set(other[0])[pair[0]], set(text)[pair[1]]
				if got := f.get(load(t, high(low(root())))); !slices.Equal(got, expected) {
					t.Errorf("set by %s and %s it is %v, want %v", pair[0], pair[1], got, expected)
				}
			}
		})
	}
}

// yamlFor sets one field in a file.
func yamlFor(f field, text string) string {
	if f.descriptor().IsList() {
		if strings.ContainsAny(text, "*:") {
			text = "'" + text + "'"
		}
		text = "[" + text + "]"
	}
	var yaml strings.Builder
	steps := strings.Split(f.name, ".")
	for depth, step := range steps[:len(steps)-1] {
		fmt.Fprintf(&yaml, "%s%s:\n", strings.Repeat("  ", depth), step)
	}
	fmt.Fprintf(&yaml, "%s%s: %s\n", strings.Repeat("  ", len(steps)-1), steps[len(steps)-1], text)
	return yaml.String()
}

func TestAllAtOnce(t *testing.T) {
	texts, want := full()
	var args, env []string
	for _, f := range fields() {
		args = append(args, "--"+f.flag(), texts[f.name])
		env = append(env, f.variable()+"="+texts[f.name])
	}
	args[slices.Index(args, "--reflection")] = "--reflection=false"
	args[slices.Index(args, "--local-enabled")] = "--local-enabled=false"
	args = slices.DeleteFunc(args, func(s string) bool { return s == "false" || s == "true" })
	printed, err := Print(want)
	if err != nil {
		t.Fatal(err)
	}
	for name, in := range map[string]Input{
		"file": asRoot().withFile(t, string(printed)), "env": asRoot().withEnv(env...), "flags": asRoot(args...),
	} {
		if diff := cmp.Diff(want, load(t, in), protocmp.Transform()); diff != "" {
			t.Errorf("%s: differs (-want +got):\n%s", name, diff)
		}
	}
}

func TestForms(t *testing.T) {
	dir := t.TempDir()
	relative := filepath.Join(dir, "f.yaml")
	if err := os.WriteFile(relative, []byte("limits: {pids: 77}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	user := func(env ...string) Input { return Input{UID: 1000, WorkingDirectory: "/work", Env: env} }
	tests := []struct {
		name  string
		in    Input
		field string
		want  string
	}{
		{"bytes", asRoot("--limits-memory-bytes=33554432"), "limits.memory_bytes", "32MiB"},
		{"odd bytes", asRoot("--limits-memory-bytes=33554433"), "limits.memory_bytes", "33554433"},
		{"KiB", asRoot("--limits-memory-bytes=32768KiB"), "limits.memory_bytes", "32MiB"},
		{"TiB", asRoot("--limits-memory-bytes=1TiB"), "limits.memory_bytes", "1TiB"},
		{"no memory limit", asRoot("--limits-memory-bytes=0"), "limits.memory_bytes", "0"},
		{"no limit of processes", asRoot("--limits-pids=0"), "limits.pids", "0"},
		{"size in a file", asRoot().withFile(t, "limits: {memory_bytes: 3GiB}"), "limits.memory_bytes", "3GiB"},
		{"quoted size in a file", asRoot().withFile(t, "limits: {memory_bytes: '3GiB'}"), "limits.memory_bytes", "3GiB"},
		{"no drain", asRoot("--drain-timeout=0"), "drain_timeout", "0s"},
		{"duration in a file", asRoot().withFile(t, "drain_timeout: 1h1m1.5s"), "drain_timeout", "1h1m1.5s"},
		{"bare boolean flag", asRoot("--reflection").withEnv("EXECUTORD_REFLECTION=false"), "reflection", "true"},
		{"quoted boolean", asRoot().withFile(t, "reflection: 'false'"), "reflection", "false"},
		{"flag with a space", asRoot("--on-stop", "terminate"), "on_stop", "terminate"},
		{"last flag wins", asRoot("--limits-pids=10", "--limits-pids=11"), "limits.pids", "11"},
		{"last variable wins", asRoot().withEnv("EXECUTORD_LIMITS_PIDS=10", "EXECUTORD_LIMITS_PIDS=11"), "limits.pids", "11"},
		{"value with an equals sign", asRoot().withEnv("EXECUTORD_STATE_DIR=/a=b"), "state_dir", "/a=b"},
		{"JSON", asRoot().withFile(t, `{"limits": {"pids": 12}}`), "limits.pids", "12"},
		{"CRLF", asRoot().withFile(t, "reflection: true\r\nlimits:\r\n  pids: 13\r\n"), "limits.pids", "13"},
		{"other line breaks", asRoot().withFile(t, "reflection: true\rlimits: {pids: 14}\u2028on_stop: keep"), "limits.pids", "14"},

		{"list by flags", asRoot("--local-extra-paths=/a", "--local-extra-paths=/b:c"), "local.extra_paths", "/a /b:c"},
		{"list by variable", asRoot().withEnv("EXECUTORD_LOCAL_EXTRA_PATHS=/a:/b"), "local.extra_paths", "/a /b"},
		{"list by file", asRoot().withFile(t, "local: {extra_paths: [/a, /b]}"), "local.extra_paths", "/a /b"},
		{"list is replaced", asRoot("--local-extra-paths=/c").withFile(t, "local: {extra_paths: [/a, /b]}"), "local.extra_paths", "/c"},
		{"list is emptied", asRoot().withEnv("EXECUTORD_LOCAL_EXTRA_PATHS=").withFile(t, "local: {extra_paths: [/a]}"), "local.extra_paths", ""},

		{"file by variable", asRoot().withEnv("EXECUTORD_CONFIG=" + relative), "limits.pids", "77"},
		{"file by flag wins", asRoot("--config", relative).withEnv("EXECUTORD_CONFIG=/nowhere"), "limits.pids", "77"},
		{"relative file", Input{Args: []string{"--config=f.yaml"}, WorkingDirectory: dir}, "limits.pids", "77"},

		{"state of root", asRoot().withEnv("HOME=/root", "XDG_STATE_HOME=/xdg"), "state_dir", "/var/lib/executord"},
		{"state of a user", user("HOME=/home/u"), "state_dir", "/home/u/.local/state/executord"},
		{"state by XDG", user("HOME=/home/u", "XDG_STATE_HOME=/xdg"), "state_dir", "/xdg/executord"},
		{"relative XDG is ignored", user("HOME=/home/u", "XDG_STATE_HOME=xdg"), "state_dir", "/home/u/.local/state/executord"},
		{"relative state", asRoot("--state-dir=../s/./x/"), "state_dir", "/s/x"},
		{"state below home", asRoot("--state-dir=~/x").withEnv("HOME=/root"), "state_dir", "/root/x"},

		{"list with another separator", asRoot().withEnv("EXECUTORD_AUTH_CERTIFICATES_USERS=spiffe://a/b,CN=x,"), "auth.certificates.users", "spiffe://a/b CN=x"},
		{"list of words by variable", asRoot().withEnv("EXECUTORD_AUTH_METHODS=api_key,oidc", "EXECUTORD_AUTH_OIDC_ISSUER=https://x", "EXECUTORD_AUTH_OIDC_AUDIENCE=y"), "auth.methods", "api_key oidc"},
		{"list of words by file", asRoot().withFile(t, "auth: {methods: [api_key]}"), "auth.methods", "api_key"},
		{"relative certificate", asRoot("--tls-cert-file=c.pem", "--tls-key-file=../k.pem"), "tls.cert_file", "/work/c.pem"},

		{"any address", guarded("--listen=0.0.0.0:7070"), "listen", "0.0.0.0:7070"},
		{"any address of IPv6", guarded("--listen=[::]:7070"), "listen", "[::]:7070"},
		{"no address", guarded("--listen=:7070"), "listen", ":7070"},
		{"a name", guarded("--listen=build.example.org:7070"), "listen", "build.example.org:7070"},
		{"TLS on loopback", asRoot("--tls-cert-file=/c", "--tls-key-file=/k"), "listen", "127.0.0.1:7070"},
		{"keys on loopback", asRoot("--auth-methods=api_key"), "auth.methods", "api_key"},
		{"issuer on loopback", asRoot("--auth-oidc-issuer=http://localhost:1/x"), "auth.oidc.issuer", "http://localhost:1/x"},

		{"IPv6", asRoot("--listen=[::1]:0"), "listen", "[::1]:0"},
		{"localhost", asRoot("--listen=localhost:65535"), "listen", "localhost:65535"},
		{"another loopback address", asRoot("--listen=127.9.9.9:1"), "listen", "127.9.9.9:1"},
		{"socket", asRoot("--listen=unix:/run/a b"), "listen", "unix:/run/a b"},
		{"socket as a URL", asRoot("--listen=unix:///run/a"), "listen", "unix:/run/a"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			config := load(t, test.in)
			for _, f := range fields() {
				if f.name != test.field {
					continue
				}
				if got := strings.Join(f.get(config), " "); got != test.want {
					t.Errorf("%s is %q, want %q", f.name, got, test.want)
				}
				return
			}
			t.Errorf("there is no field %q", test.field)
		})
	}
}

// Lists that are no paths stand between blanks in a variable: they have colons themselves.
func TestListsOfHosts(t *testing.T) {
	config := load(t, asRoot("--network-denied-cidrs=10.0.0.0/8", "--network-denied-cidrs=fd00::/8").withEnv(
		"EXECUTORD_NETWORK_DEFAULT_MODE=egress", "EXECUTORD_NETWORK_DEFAULT_ALLOW= a.example:443,80  [::1]:8080 "))
	n := config.GetNetwork()
	if !slices.Equal(n.GetDefaultAllow(), []string{"a.example:443,80", "[::1]:8080"}) || !slices.Equal(n.GetDeniedCidrs(), []string{"10.0.0.0/8", "fd00::/8"}) {
		t.Errorf("%v", n)
	}
	for text, want := range map[string]string{"": "", "192.0.2.53": "192.0.2.53:53", "::1": "[::1]:53", "[::1]:5353": "[::1]:5353", "127.0.0.1:1": "127.0.0.1:1"} {
		if got, err := Nameserver(text); err != nil || got != want {
			t.Errorf("nameserver %q: %q, %v", text, got, err)
		}
	}
}

// Each bad value is refused in every layer by an error that names the field, the
// layer and what is wrong.
func TestBadValues(t *testing.T) {
	const elsewhere = "can be reached from elsewhere, so tls.cert_file and tls.key_file, and auth.methods must be set too; or listen on 127.0.0.1:PORT"
	long := strings.Repeat("x", 513)
	tests := []struct{ field, text, want string }{
		{"listen", "0.0.0.0:7070", elsewhere},
		{"listen", ":7070", elsewhere},
		{"listen", "'[::]:7070'", elsewhere},
		{"listen", "192.168.1.5:7070", elsewhere},
		{"listen", "example.org:7070", elsewhere},
		{"listen", "'[::1%lo]:7070'", elsewhere},
		{"listen", "'[::ffff:10.0.0.1]:7070'", elsewhere},
		{"listen", "127.0.0.1", "neither HOST:PORT nor unix:/PATH"},
		{"listen", "''", "neither HOST:PORT nor unix:/PATH"},
		{"listen", "127.0.0.1:http", "not a number from 0 to 65535"},
		{"listen", "127.0.0.1:65536", "not a number from 0 to 65535"},
		{"listen", "'127.0.0.1:'", "not a number from 0 to 65535"},
		{"listen", "unix:run/x", "absolute path of at most 107 bytes"},
		{"listen", "unix:/", "absolute path of at most 107 bytes"},
		{"listen", "unix:@abstract", "absolute path of at most 107 bytes"},
		{"listen", "unix:/" + strings.Repeat("x", 107), "absolute path of at most 107 bytes"},
		{"listen", "tcp://127.0.0.1:7070", "neither HOST:PORT nor unix:/PATH"},
		{"state_dir", "''", "it is empty"},
		{"state_dir", "~/x", "needs HOME"},
		{"state_dir", "\"a\\x01\"", "control characters"},
		{"drain_timeout", "30", "not a duration such as 30s"},
		{"drain_timeout", "soon", "not a duration such as 30s"},
		{"drain_timeout", "-1s", "greater than or equal to 0s"},
		{"drain_timeout", "24h1ns", "less than or equal to 86400s"},
		{"on_stop", "kill", "none of keep, terminate"},
		{"on_stop", "unspecified", "none of keep, terminate"},
		{"on_stop", "KEEP", "none of keep, terminate"},
		{"on_stop", "1", "none of keep, terminate"},
		{"log.level", "trace", "none of debug, info, warn, error"},
		{"log.format", "xml", "none of text, json"},
		{"limits.memory_bytes", "2GB", "such as 512MiB or 2GiB"},
		{"limits.memory_bytes", "1.5GiB", "such as 512MiB or 2GiB"},
		{"limits.memory_bytes", "GiB", "such as 512MiB or 2GiB"},
		{"limits.memory_bytes", "''", "such as 512MiB or 2GiB"},
		{"limits.memory_bytes", "9223372036854775808", "does not fit into 64 bits"},
		{"limits.memory_bytes", "8388608TiB", "does not fit into 64 bits"},
		{"limits.memory_bytes", "-8388609TiB", "does not fit into 64 bits"},
		{"limits.memory_bytes", "16777215", "greater than or equal to 16777216"},
		{"limits.memory_bytes", "-1", "greater than or equal to 16777216"},
		{"limits.memory_bytes", "1025GiB", "less than or equal to 1099511627776"},
		{"limits.disk_bytes", "1MiB", "greater than or equal to 16777216"},
		{"limits.disk_bytes", "2048GiB", "less than or equal to 1099511627776"},
		{"limits.open_files", "15", "greater than or equal to 16"},
		{"limits.open_files", "1048577", "less than or equal to 1048576"},
		{"limits.pids", "7", "greater than or equal to 8"},
		{"limits.pids", "1000001", "less than or equal to 1000000"},
		{"limits.pids", "1KiB", "not a whole number"},
		{"limits.pids", "1e3", "not a whole number"},
		{"limits.pids", "0x10", "not a whole number"},
		{"limits.cpu_millis", "9", "greater than or equal to 10"},
		{"limits.cpu_millis", "1024001", "less than or equal to 1024000"},
		{"output.default_retained_bytes", "0", "greater than or equal to 1048576"},
		{"output.default_retained_bytes", "65GiB", "65GiB is more than output.max_retained_bytes, 64GiB"},
		{"output.max_retained_bytes", "1023KiB", "greater than or equal to 1048576"},
		{"output.max_retained_bytes", "2TiB", "less than or equal to 1099511627776"},
		{"reflection", "yes", "neither true nor false"},
		{"reflection", "1", "neither true nor false"},
		{"local.uid_base", "0", "greater than or equal to 65536"},
		{"local.uid_base", "100000", "must be a multiple of 65536"},
		{"local.uid_base", "65537", "must be a multiple of 65536"},
		{"local.uid_base", "-1", "not between 0 and 4294967295"},
		{"local.uid_base", "4294967296", "not between 0 and 4294967295"},
		{"local.uid_count", "0", "greater than or equal to 1"},
		{"local.uid_count", "65535", "less than or equal to 65534"},
		{"local.uid_count", "40000", "must end at 4294901760 or before"},
		{"local.blank_guests", "65", "less than or equal to 64"},
		{"local.blank_guests", "-1", "not between 0 and"},
		{"local.cgroup_parent", "a.slice", "not an absolute path"},
		{"local.cgroup_parent", "/a/../b", "not an absolute path"},
		{"local.cgroup_parent", "/" + strings.Repeat("a", 4096), "at most 4096 bytes"},
		{"local.extra_paths", "opt", "not an absolute path"},
		{"local.extra_paths", "/", "below /"},
		{"local.extra_paths", "/opt/", "not an absolute path"},
		{"tls.cert_file", "/c", "must be set together"},
		{"tls.key_file", "/k", "must be set together"},
		{"tls.client_ca_file", "/a", "set tls.cert_file and tls.key_file"},
		{"tls.client_ca_file", "/" + strings.Repeat("a", 4096), "at most 4096 bytes"},
		{"tls.client_auth", "require", "needs tls.client_ca_file"},
		{"tls.client_auth", "verify", "none of request, require"},
		{"auth.methods", "password", "none of api_key, oidc, certificate"},
		{"auth.methods", "oidc", "needs auth.oidc.issuer and auth.oidc.audience"},
		{"auth.methods", "certificate", "needs tls.client_ca_file"},
		{"auth.oidc.issuer", "'http://issuer.example'", "must be https"},
		{"auth.oidc.issuer", "issuer.example", "not the URL of an issuer"},
		{"auth.oidc.issuer", "'https://user:word@issuer.example'", "not the URL of an issuer"},
		{"auth.oidc.issuer", "'https://issuer.example?x'", "not the URL of an issuer"},
		{"auth.oidc.audience", strings.Repeat("x", 1025), "at most 1024 bytes"},
		{"auth.oidc.role_claim", strings.Repeat("x", 257), "at most 256 bytes"},
		{"auth.oidc.users", long, "at most 512 bytes"},
		{"auth.oidc.operators", long, "at most 512 bytes"},
		{"auth.oidc.admins", long, "at most 512 bytes"},
		{"auth.oidc.leeway", "5m1s", "less than or equal to 300s"},
		{"auth.oidc.algorithms", "none", "must be in list"},
		{"auth.oidc.algorithms", "HS256", "must be in list"},
		{"auth.certificates.users", long, "at most 512 bytes"},
		{"auth.certificates.operators", long, "at most 512 bytes"},
		{"auth.certificates.admins", long, "at most 512 bytes"},
		{"auth.quotas.running_executions", "5", "needs auth.methods"},
		{"auth.quotas.running_executions", "-1", "greater than or equal to 0"},
		{"auth.quotas.sessions", "5", "needs auth.methods"},
		{"auth.quotas.stored_bytes", "5GiB", "needs auth.methods"},
		{"network.default_mode", "internet", "none of none, egress, host"},
		{"network.default_mode", "host", "host is more than network.max_mode, egress"},
		{"network.default_allow", "a.example", "goes with network.default_mode egress"},
		{"network.max_mode", "all", "none of none, egress, host"},
		{"network.denied_cidrs", "10.0.0.1/8", "not a range of addresses"},
		{"network.denied_cidrs", "10.0.0.1", "not a range of addresses"},
		{"network.denied_cidrs", "a.example", "not a range of addresses"},
		{"network.nameserver", "dns.example", "neither IP nor IP:PORT"},
		{"network.nameserver", "192.0.2.53:0", "neither IP nor IP:PORT"},
		{"network.nameserver", "'[::1]'", "neither IP nor IP:PORT"},
		{"broker.secrets", "ghp_hunter2", "does not match"},
		{"broker.secrets", "github=vault:x", "does not match"},
		{"sessions.author_name", "A <a@x>", "does not match"},
		{"sessions.author_email", "a b", "does not match"},
		{"sessions.model", "mistral/x", "does not match"},
		{"broker.private_upstreams", "a.example:443", "does not match"},
		{"admission.max_running", "0", "greater than or equal to 1"},
		{"admission.max_running", "1000001", "less than or equal to 1000000"},
		{"admission.max_queued", "1000001", "less than or equal to 1000000"},
		{"admission.max_queued", "-1", "not between 0 and 4294967295"},
		{"admission.max_queue_wait", "0s", "greater than or equal to 0.001s"},
		{"admission.max_queue_wait", "61m", "less than or equal to 3600s"},
		{"admission.max_sandboxes", "0", "greater than or equal to 1"},
		{"admission.max_sandboxes", "1000001", "less than or equal to 1000000"},
		{"pool.size", "1001", "less than or equal to 1000"},
		{"pool.max_age", "999ms", "greater than or equal to 1s"},
		{"pool.max_age", "25h", "less than or equal to 86400s"},
		{"retention.max_age", "-1s", "greater than or equal to 0s"},
		{"retention.max_age", "7d", "not a duration such as 30s"},
		{"retention.max_age", "87600h1s", "less than or equal to 315360000s"},
		{"retention.max_total_bytes", "1", "greater than or equal to 1048576"},
		{"retention.max_total_bytes", "1025TiB", "less than or equal to 1125899906842624"},
		{"retention.min_free_bytes", "-1", "greater than or equal to 0"},
		{"retention.min_free_bytes", "2TiB", "less than or equal to 1099511627776"},
		{"engine", "docker", "must be in list"},
		{"engine", "''", "must be in list"},
		{"local.enabled", "yes", "neither true nor false"},
		{"modal.enabled", "yes", "neither true nor false"},
		{"modal.app", "''", "does not match regex"},
		{"modal.app", "a b", "does not match regex"},
		{"modal.environment", "a/b", "does not match regex"},
		{"modal.image", "''", "at least 1"},
		{"modal.dockerfile", "COPY a b", "commands that take files from here"},
		{"modal.dockerfile", "add a b", "commands that take files from here"},
		{"modal.dockerfile", "FROM scratch", "modal.image says what the image begins with"},
		{"modal.regions", "us east", "does not match regex"},
		{"modal.runtime", "runc", "must be in list"},
		{"modal.volume_version", "3", "less than or equal to 2"},
		{"modal.lifetime", "59s", "greater than or equal to 60s"},
		{"modal.lifetime", "25h", "less than or equal to 86400s"},
		{"modal.max_sandboxes", "0", "greater than or equal to 1"},
		{"modal.max_creates_per_minute", "0", "greater than or equal to 1"},
		{"modal.open_network", "1", "neither true nor false"},
		{"modal.outbound_cidrs", "192.0.2.0/24", "no effect without modal.open_network"},
		{"modal.secrets", "a b", "does not match regex"},
		{"modal.idle_timeout", "-1s", "greater than or equal to 0s"},
		{"modal.exit_snapshots", "on", "neither true nor false"},
		{"images.debian_mirror", "ftp://x.example", "does not match"},
		{"images.debian_mirror", "deb.example", "does not match"},
		{"images.npm_registry", "https://me:secret@x.example", "does not match"},
		{"images.allow", "a%b", "does not match"},
		{"images.packages", "Hello", "does not match"},
		{"images.tools_dir", "opt/tools", "is not an absolute path"},
	}
	tested := make(map[string]bool)
	for _, test := range tests {
		f := named(t, test.field)
		tested[f.name] = true
		t.Run(test.field+"="+test.text[:min(len(test.text), 30)], func(t *testing.T) {
			plain := strings.Trim(test.text, "'")
			if strings.HasPrefix(test.text, `"`) {
				plain = "a\x01"
			}
			file := asRoot().withFile(t, yamlFor(f, test.text))
			line := 1 + strings.Count(f.name, ".")
			for _, layer := range []struct {
				in     Input
				origin string
			}{
				{file, fmt.Sprintf("(from %s:%d)", file.Args[1], line)},
				{asRoot().withEnv(f.variable() + "=" + plain), "(from variable " + f.variable() + ")"},
				{asRoot("--" + f.flag() + "=" + plain), "(from flag --" + f.flag() + ")"},
			} {
				config, err := Load(layer.in)
				if err == nil {
					t.Errorf("%s: it is accepted: %v", layer.origin, config)
					continue
				}
				for _, want := range []string{f.name + ": ", test.want, layer.origin} {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("the error is %q, without %q", err, want)
					}
				}
			}
		})
	}
	for _, f := range fields() {
		if !tested[f.name] {
			t.Errorf("no bad value of %s is tested", f.name)
		}
	}
}

// Sandboxes that are ready cost money at Modal: they are there only if they are asked for.
func TestNoPoolAtModal(t *testing.T) {
	for _, test := range []struct {
		args []string
		want uint32
	}{
		{nil, 2},
		{[]string{"--modal-enabled"}, 2},
		{[]string{"--engine=modal"}, 0},
		{[]string{"--engine=modal", "--pool-size=2"}, 2},
		{[]string{"--engine=modal", "--pool-max-age=1m"}, 0},
	} {
		if got := load(t, asRoot(test.args...)).GetPool().GetSize(); got != test.want {
			t.Errorf("%v: pool of %d, want %d", test.args, got, test.want)
		}
	}
}

// Modal's credentials are never a part of the configuration, and so not of what is printed.
func TestNoCredentials(t *testing.T) {
	printed, err := Print(load(t, asRoot("--engine=modal").withEnv("MODAL_TOKEN_ID=ak-canary", "MODAL_TOKEN_SECRET=as-canary")))
	if err != nil || strings.Contains(string(printed), "canary") {
		t.Errorf("%v:\n%s", err, printed)
	}
	for _, f := range fields() {
		if strings.Contains(f.name, "token") {
			t.Errorf("there is a field %s", f.name)
		}
	}
}

// guarded is the input of a server that asks callers who they are, over TLS.
func guarded(args ...string) Input {
	return asRoot(append([]string{"--tls-cert-file=/c", "--tls-key-file=/k", "--auth-methods=api_key"}, args...)...)
}

// Who can be reached from elsewhere is told what is missing, and nothing else.
func TestListenElsewhere(t *testing.T) {
	const address = "--listen=0.0.0.0:7070"
	for name, test := range map[string]struct {
		args          []string
		want, without string
	}{
		"no TLS":             {[]string{address, "--auth-methods=api_key"}, "so tls.cert_file and tls.key_file must be set too", "auth.methods"},
		"nobody asked":       {[]string{address, "--tls-cert-file=/c", "--tls-key-file=/k"}, "so auth.methods must be set too", "tls.cert_file"},
		"half of TLS":        {[]string{address, "--auth-methods=api_key", "--tls-cert-file=/c"}, "so tls.cert_file and tls.key_file must be set too", "auth.methods"},
		"a CA asks nobody":   {[]string{address, "--tls-cert-file=/c", "--tls-key-file=/k", "--tls-client-ca-file=/a", "--tls-client-auth=require"}, "so auth.methods must be set too", "tls.cert_file"},
		"a zone of loopback": {[]string{"--listen=[::1%lo]:1", "--auth-methods=api_key"}, "so tls.cert_file and tls.key_file must be set too", "auth.methods"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(asRoot(test.args...))
			if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), test.without) {
				t.Errorf("the error is %v, want %q", err, test.want)
			}
		})
	}
}

func named(t *testing.T, name string) field {
	t.Helper()
	all := fields()
	i := slices.IndexFunc(all, func(f field) bool { return f.name == name })
	if i < 0 {
		t.Fatalf("there is no field %q", name)
	}
	return all[i]
}

func TestBadInput(t *testing.T) {
	long := asRoot().withFile(t, "#"+strings.Repeat("x", maxFile))
	many := asRoot()
	for n := range 65 {
		many.Args = append(many.Args, fmt.Sprintf("--local-extra-paths=/p%d", n))
	}
	file := func(content string) Input { return asRoot().withFile(t, content) }
	tests := []struct {
		name string
		in   Input
		want []string
	}{
		{"unknown field", file("limits:\n  memory: 5\n"), []string{"f.yaml:2", `unknown field in limits "memory"`, `nearest known one is "memory_bytes"`}},
		{"unknown field at the top", file("state_dir: /x\nlisen: x\n"), []string{"f.yaml:2", `unknown field "lisen"`, `nearest known one is "listen"`}},
		{"another spelling of a field", file("stateDir: /x\n"), []string{"f.yaml:1", `unknown field "stateDir"`, `"state_dir"`}},
		{"number of a field", file("1: 127.0.0.1:1\n"), []string{"f.yaml:1", `unknown field "1"`}},
		{"key that is a list", file("[listen]: x\n"), []string{"f.yaml:1", "unknown field"}},
		{"merge key", file("limits: &a {pids: 9}\noutput: {<<: *a}\n"), []string{"f.yaml:2", `unknown field in output "<<"`}},
		{"field set twice", file("limits:\n  pids: 9\n  pids: 10\n"), []string{"limits.pids: it is set already in line 2", "f.yaml:3"}},
		{"field without a value", file("listen:\n"), []string{"listen: it has no value", "f.yaml:1"}},
		{"group without fields", file("limits:\nlog: {}\n"), []string{"limits: it has no value", "f.yaml:1"}},
		{"group that is a value", file("limits: 5\n"), []string{"limits: it must hold fields", "f.yaml:1"}},
		{"value that is a list", file("limits:\n  pids: [5]\n"), []string{"limits.pids: it must be a single value", "f.yaml:2"}},
		{"value that is a group", file("drain_timeout: {seconds: 5}\n"), []string{"drain_timeout: it must be a single value"}},
		{"value that is an alias", file("limits: {pids: &a 9, cpu_millis: *a}\n"), []string{"limits.cpu_millis: it must be a single value"}},
		{"list that is a value", file("local: {extra_paths: /a}\n"), []string{"local.extra_paths: it must be a list"}},
		{"list in a list", file("local: {extra_paths: [[/a]]}\n"), []string{"local.extra_paths: it must be a single value"}},
		{"list with one twice", file("local: {extra_paths: [/a, /a]}\n"), []string{"local.extra_paths: ", "unique"}},
		{"list that is too long", many, []string{"local.extra_paths: ", "64"}},
		{"top that is a list", file("[listen]\n"), []string{"f.yaml:1"}},
		{"top that is a word", file("listen\n"), []string{"f.yaml:1"}},
		{"no YAML", file("limits: {\n"), []string{"f.yaml: yaml: line"}},
		{"tabs", file("limits:\n\tpids: 9\n"), []string{"f.yaml: yaml: line 2"}},
		{"two documents", file("reflection: true\n---\nreflection: false\n"), []string{"more than one YAML document"}},
		{"no UTF-8", file("listen: \xff\n"), []string{"f.yaml: not UTF-8"}},
		{"UTF-16", file("\xff\xfel\x00:\x00"), []string{"f.yaml: not UTF-8"}},
		{"long file", long, []string{"longer than 1048576 bytes"}},
		{"no file", asRoot("--config=/nowhere/f.yaml"), []string{"read configuration: ", "/nowhere/f.yaml"}},
		{"no file by variable", asRoot().withEnv("EXECUTORD_CONFIG=/nowhere/f.yaml"), []string{"/nowhere/f.yaml"}},
		{"directory", asRoot("--config=" + t.TempDir()), []string{"is a directory"}},

		{"unknown variable", asRoot().withEnv("EXECUTORD_LIMIT_PIDS=9"), []string{`unknown variable "EXECUTORD_LIMIT_PIDS"; the nearest known one is "EXECUTORD_LIMITS_PIDS"`}},
		{"variable in lower case", asRoot().withEnv("EXECUTORD_listen=x"), []string{`nearest known one is "EXECUTORD_LISTEN"`}},
		{"unknown variable of a file", asRoot().withEnv("EXECUTORD_CONFIG_FILE=x"), []string{`nearest known one is "EXECUTORD_CONFIG"`}},
		{"unknown flag", asRoot("--limit-pids=9"), []string{`unknown flag "limit-pids"; the nearest known one is "limits-pids"`}},
		{"flag with underscores", asRoot("--state_dir=/x"), []string{`nearest known one is "state-dir"`}},
		{"unknown short flag", asRoot("-l"), []string{`unknown flag "l"`}},
		{"flag without a value", asRoot("--listen"), []string{"listen"}},
		{"argument", asRoot("serve"), []string{`unknown argument "serve"`}},
		{"value after a bare boolean flag", asRoot("--reflection", "false"), []string{`unknown argument "false"`}},
		{"no state directory", Input{UID: 1000}, []string{"state_dir: there is no default without XDG_STATE_HOME and HOME"}},

		{"several errors at once", asRoot("--limits-pids=x").withEnv("EXECUTORD_ON_STOP=x", "EXECUTORD_X=1"), []string{"limits.pids: ", "on_stop: ", "EXECUTORD_X"}},
		{"several rules at once", asRoot("--limits-pids=1", "--drain-timeout=25h"), []string{"limits.pids: ", "drain_timeout: "}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			config, err := Load(test.in)
			if err == nil {
				t.Fatalf("it is accepted: %v", config)
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error is %q, without %q", err, want)
				}
			}
		})
	}
}

func TestHelp(t *testing.T) {
	if _, err := Load(asRoot("--help")); !errors.Is(err, pflag.ErrHelp) {
		t.Errorf("Load(--help) = %v, want pflag.ErrHelp", err)
	}
	usage := Usage()
	for _, f := range fields() {
		if !strings.Contains(usage, "--"+f.flag()) || !strings.Contains(usage, f.help().GetUsage()) {
			t.Errorf("the usage does not tell of --%s", f.flag())
		}
	}
	for _, want := range []string{"--config", "(default 2GiB)", "keep|terminate", "EXECUTORD_CONFIG"} {
		if !strings.Contains(usage, want) {
			t.Errorf("the usage is without %q:\n%s", want, usage)
		}
	}
}

// What a list has by default is gone when a layer names it.
func TestFileReplacesListOfLayerBelow(t *testing.T) {
	l := &loader{config: &configv1.Config{}, origins: make(map[string]string)}
	l.set(named(t, "local.extra_paths"), "default", "/below")
	l.readYAML("f.yaml", []byte("local: {extra_paths: [/a]}"))
	if got := l.config.GetLocal().GetExtraPaths(); len(l.errs) > 0 || !slices.Equal(got, []string{"/a"}) {
		t.Errorf("the list is %v (%v), want that of the file", got, l.errs)
	}
}

// Names are derived, so they must be told apart after derivation; and each field
// needs its help.
func TestFieldNames(t *testing.T) {
	variables := map[string]string{"EXECUTORD_CONFIG": "config"}
	flags := map[string]string{"config": "config", "help": "help"}
	for _, f := range fields() {
		if other, taken := variables[f.variable()]; taken {
			t.Errorf("%s and %s have the variable %s", f.name, other, f.variable())
		}
		if other, taken := flags[f.flag()]; taken {
			t.Errorf("%s and %s have the flag --%s", f.name, other, f.flag())
		}
		variables[f.variable()], flags[f.flag()] = f.name, f.name
		if f.help().GetUsage() == "" {
			t.Errorf("%s has no usage", f.name)
		}
	}
	got := slices.Sorted(maps.Keys(flags))
	want := []string{"admission-max-queue-wait", "admission-max-queued", "admission-max-running", "admission-max-sandboxes", "auth-certificates-admins", "auth-certificates-operators", "auth-certificates-users", "auth-methods",
		"auth-oidc-admins", "auth-oidc-algorithms", "auth-oidc-audience", "auth-oidc-issuer", "auth-oidc-leeway", "auth-oidc-operators",
		"auth-oidc-role-claim", "auth-oidc-users", "auth-quotas-running-executions", "auth-quotas-sessions", "auth-quotas-stored-bytes",
		"broker-private-upstreams", "broker-secrets", "config", "drain-timeout", "engine", "help", "images-allow", "images-debian-mirror", "images-npm-registry", "images-packages", "images-tools-dir", "limits-cpu-millis", "limits-disk-bytes", "limits-memory-bytes", "limits-open-files", "limits-pids", "listen",
		"local-blank-guests", "local-cgroup-parent", "local-enabled", "local-extra-paths", "local-uid-base", "local-uid-count", "log-format", "log-level",
		"modal-app", "modal-dockerfile", "modal-enabled", "modal-environment", "modal-exit-snapshots", "modal-idle-timeout", "modal-image", "modal-lifetime",
		"modal-max-creates-per-minute", "modal-max-sandboxes", "modal-open-network", "modal-outbound-cidrs", "modal-regions", "modal-runtime",
		"modal-secrets", "modal-volume-version",
		"network-default-allow", "network-default-mode", "network-denied-cidrs", "network-max-mode", "network-nameserver", "on-stop",
		"output-default-retained-bytes", "output-max-retained-bytes", "pool-max-age", "pool-size", "reflection",
		"retention-max-age", "retention-max-total-bytes", "retention-min-free-bytes",
		"sessions-author-email", "sessions-author-name", "sessions-model", "state-dir",
		"tls-cert-file", "tls-client-auth", "tls-client-ca-file", "tls-key-file"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("renaming a flag breaks people's scripts (-want +got):\n%s", diff)
	}
}

func TestPrint(t *testing.T) {
	config := load(t, asRoot("--local-extra-paths=/opt/a b", "--local-extra-paths=/opt/ü: #", "--drain-timeout=90s"))
	before := proto.CloneOf(config)
	got, err := Print(config)
	if err != nil {
		t.Fatal(err)
	}
	want := `listen: 127.0.0.1:7070
state_dir: /var/lib/executord
drain_timeout: 1m30s
on_stop: keep
log:
  level: info
  format: text
limits:
  memory_bytes: 2GiB
  pids: 1024
  cpu_millis: 0
  disk_bytes: 0
  open_files: 0
output:
  default_retained_bytes: 1GiB
  max_retained_bytes: 64GiB
reflection: true
local:
  uid_base: 1879048192
  uid_count: 4094
  cgroup_parent: ""
  extra_paths:
    - /opt/a b
    - '/opt/ü: #'
  blank_guests: 3
  enabled: true
tls:
  cert_file: ""
  key_file: ""
  client_ca_file: ""
  client_auth: request
auth:
  methods: []
  oidc:
    issuer: ""
    audience: ""
    role_claim: roles
    users: []
    operators: []
    admins: []
    leeway: 30s
    algorithms: []
  certificates:
    users: []
    operators: []
    admins: []
  quotas:
    running_executions: 0
    sessions: 0
    stored_bytes: 0
network:
  default_mode: none
  default_allow: []
  max_mode: egress
  denied_cidrs: []
  nameserver: ""
admission:
  max_running: 256
  max_queued: 1024
  max_queue_wait: 30s
  max_sandboxes: 4000
pool:
  size: 2
  max_age: 10m0s
retention:
  max_age: 168h0m0s
  max_total_bytes: 32GiB
  min_free_bytes: 64MiB
engine: local
modal:
  enabled: false
  app: harvest-agent-executor
  environment: ""
  image: debian:13-slim
  dockerfile: []
  regions: []
  runtime: ""
  volume_version: 2
  lifetime: 24h0m0s
  max_sandboxes: 100
  max_creates_per_minute: 60
  open_network: false
  outbound_cidrs: []
  secrets:
    - harvest-github
  idle_timeout: 1h0m0s
  exit_snapshots: false
broker:
  secrets: []
  private_upstreams: []
sessions:
  author_name: Developer
  author_email: dev@example.com
  model: anthropic/claude-sonnet-4-5
images:
  debian_mirror: http://deb.debian.org
  npm_registry: https://registry.npmjs.org
  allow: []
  packages: []
  tools_dir: ""
`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("differs (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(before, config, protocmp.Transform()); diff != "" {
		t.Errorf("printing changed the configuration (-before +after):\n%s", diff)
	}
	empty := &configv1.Config{}
	if _, err := Print(empty); err != nil || empty.Log != nil {
		t.Errorf("printing an empty configuration: %v, and it became %v", err, empty)
	}
}

func TestEditDistance(t *testing.T) {
	for _, test := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"abc", "abc", 0}, {"abc", "axc", 1}, {"abc", "ac", 1},
		{"ac", "abc", 1}, {"kitten", "sitting", 3}, {"flaw", "lawn", 2},
	} {
		if got := editDistance(test.a, test.b); got != test.want {
			t.Errorf("editDistance(%q, %q) = %d, want %d", test.a, test.b, got, test.want)
		}
	}
}
