package base_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/agent/opencode/config"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestclient"
)

// TestImage is about one sandbox of the image: what is in it, and that it works there.
func TestImage(t *testing.T) {
	h := newHouse(t, cache(t))
	sb, client, proxy := h.start(t)

	t.Run("files", func(t *testing.T) {
		got := run(t, client, `readlink /root/.config/opencode; stat -c '%a %n' /app/*; ls -A /app/node_modules | wc -l; ls -A /app`)
		for _, want := range []string{"/app\n", "444 /app/AGENTS.md", "444 /app/opencode.json", "444 /app/memory-seed.json", "\n0\n", ".gitignore"} {
			if !strings.Contains(got, want) {
				t.Errorf("without %q:\n%s", want, got)
			}
		}
	})
	t.Run("programs", func(t *testing.T) {
		got := run(t, client, `opencode --version; node --version; pnpm --version; corepack --version; fd --version; rg --version | sed -n 1p; rm -rf /root/.cache`)
		for _, want := range []string{config.Version + "\n", "v22.", "fdfind", "ripgrep"} {
			if !strings.Contains(got, want) {
				t.Errorf("without %q:\n%s", want, got)
			}
		}
	})
	t.Run("servers", func(t *testing.T) { testServers(t, client) })
	t.Run("memory", func(t *testing.T) { testMemory(t, client) })
	t.Run("browsers", func(t *testing.T) { testBrowsers(t, client) })
	t.Run("OpenCode", func(t *testing.T) { testOpenCode(t, sb, client, proxy) })
}

// servers are the MCP servers of the image's own configuration, by their name.
func servers(t *testing.T) map[string]struct {
	Command     []string          `json:"command"`
	Environment map[string]string `json:"environment"`
} {
	t.Helper()
	files, err := config.Options{}.Files()
	if err != nil {
		t.Fatal(err)
	}
	var settings struct {
		MCP map[string]struct {
			Command     []string          `json:"command"`
			Environment map[string]string `json:"environment"`
		} `json:"mcp"`
	}
	for _, f := range files {
		if strings.HasSuffix(f.Path, "opencode.json") {
			if err := json.Unmarshal(f.Data, &settings); err != nil {
				t.Fatal(err)
			}
		}
	}
	return settings.MCP
}

// session talks to an MCP server in the sandbox: it sends the requests one after the
// other, waiting for each answer, and returns the results.
func session(t *testing.T, client *guestclient.Client, name string, calls ...string) []json.RawMessage {
	t.Helper()
	s := servers(t)[name]
	requests := append([]string{
		`{"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"test","version":"1"}}}`,
	}, calls...)
	// A small client in the sandbox: MCP servers end with their input, so it has to stay open
	// until the last answer has come.
	const script = `
const {spawn} = require('child_process');
const [command, env, requests] = process.argv.slice(1).map(JSON.parse);
const p = spawn(command[0], command.slice(1), {env: {...process.env, ...env}, stdio: ['pipe', 'pipe', 'inherit']});
const send = m => p.stdin.write(JSON.stringify({jsonrpc: '2.0', ...m}) + '\n');
let next = 0;
const ask = () => {
  if (next === requests.length) { p.stdin.end(); return; }
  if (next === 1) send({method: 'notifications/initialized'});
  send({id: next, ...requests[next]});
};
let buffer = '';
p.stdout.on('data', d => {
  buffer += d;
  for (let i; (i = buffer.indexOf('\n')) >= 0; buffer = buffer.slice(i + 1)) {
    const m = JSON.parse(buffer.slice(0, i));
    if (m.id !== next || m.method) continue;
    if (m.error) { console.error(JSON.stringify(m.error)); process.exit(1); }
    console.log(JSON.stringify(m.result));
    next++;
    ask();
  }
});
p.on('exit', () => process.exit(next === requests.length ? 0 : 1));
ask();
`
	encode := func(v any) string {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	raw := make([]json.RawMessage, len(requests))
	for i, r := range requests {
		raw[i] = json.RawMessage(r)
	}
	env := s.Environment
	if env == nil {
		env = map[string]string{}
	}
	out, err := client.Run(t.Context(), guestclient.Command{
		Args: []string{config.Node, "-e", script, encode(s.Command), encode(env), encode(raw)}, Timeout: 2 * time.Minute, Dir: config.Workspace, Limit: 8 << 20,
	})
	if err != nil || out.Code() != 0 {
		t.Fatalf("%s: %v, exit %d\n%s\n%s", name, err, out.Code(), out.Stdout, out.Stderr)
	}
	var results []json.RawMessage
	lines := bufio.NewScanner(strings.NewReader(string(out.Stdout)))
	lines.Buffer(nil, 8<<20)
	for lines.Scan() {
		results = append(results, json.RawMessage(lines.Text()))
	}
	if len(results) != len(requests) {
		t.Fatalf("%s: %d answers to %d requests", name, len(results), len(requests))
	}
	return results
}

// testServers: each starts from the image's files and names its tools.
func testServers(t *testing.T, client *guestclient.Client) {
	want := map[string]string{"memory": "create_entities", "filesystem": "read_text_file", "playwright": "browser_navigate", "devtools": "new_page"}
	all := servers(t)
	if len(all) != len(want) {
		t.Errorf("%d servers are configured", len(all))
	}
	for name, tool := range want {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			results := session(t, client, name, `{"method":"tools/list"}`)
			if !strings.Contains(string(results[1]), `"name":"`+tool+`"`) {
				t.Errorf("no tool %s: %.300s", tool, results[1])
			}
			t.Logf("initialize and tools/list in the sandbox took %s", since(start))
		})
	}
}

func callTool(name, arguments string) string {
	return fmt.Sprintf(`{"method":"tools/call","params":{"name":%q,"arguments":%s}}`, name, arguments)
}

// testMemory: what is remembered is in the file that the volume keeps.
func testMemory(t *testing.T, client *guestclient.Client) {
	session(t, client, "memory", callTool("create_entities", `{"entities":[{"name":"probe","entityType":"test","observations":["it rains"]}]}`))
	if got := run(t, client, "cat "+config.MemoryFile); !strings.Contains(got, `"it rains"`) {
		t.Errorf("%s", got)
	}
	results := session(t, client, "memory", callTool("search_nodes", `{"query":"rains"}`))
	if !strings.Contains(string(results[1]), "probe") {
		t.Errorf("%s", results[1])
	}
}

// background runs a command until the test ends.
func background(t *testing.T, client *guestclient.Client, id string, env map[string]string, args ...string) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		out, err := client.Run(ctx, guestclient.Command{ID: id, Dir: config.Workspace, Env: env, Args: args})
		if ctx.Err() == nil {
			t.Errorf("%s ended: %v, %v, %s", id, err, out.Exit, out.Stderr)
		}
	})
	t.Cleanup(func() { stop(); running.Wait() })
}

// testBrowsers: both servers open a page that a server in the sandbox serves.
func testBrowsers(t *testing.T, client *guestclient.Client) {
	background(t, client, "site", nil, "/bin/sh", "-c", "mkdir -p /tmp/site && cd /tmp/site && "+
		"echo '<title>A page</title><h1>Hello from the sandbox</h1>' >index.html && exec python3 -m http.server --bind 127.0.0.1 8123")
	run(t, client, `for i in $(seq 100); do curl -fs -m 1 http://127.0.0.1:8123/ >/dev/null && exit 0; sleep 0.1; done; exit 1`)
	for name, call := range map[string]string{
		"playwright": callTool("browser_navigate", `{"url":"http://127.0.0.1:8123/"}`),
		"devtools":   callTool("new_page", `{"url":"http://127.0.0.1:8123/"}`),
	} {
		t.Run(name, func(t *testing.T) {
			snapshot := callTool("browser_snapshot", `{}`)
			if name == "devtools" {
				snapshot = callTool("take_snapshot", `{"pageId":2}`)
			}
			start := time.Now()
			results := session(t, client, name, call, snapshot)
			if !strings.Contains(string(results[1])+string(results[2]), "Hello from the sandbox") {
				t.Errorf("%.600s\n%.600s", results[1], results[2])
			}
			t.Logf("a page in Chromium took %s", since(start))
		})
	}
}

// testOpenCode: the server finds the configuration, connects what is there, is not held up
// by what is not, and reaches for nothing outside.
func testOpenCode(t *testing.T, sb engine.Sandbox, client *guestclient.Client, proxy *egress.Proxy) {
	// Who goes out does so by the proxy, which counts, or asks for a name where nobody
	// answers, or tries an address to which no way leads: the kernel counts those.
	const attempts = `awk '/^Ip:/ {if (n++) print $13} /^Udp:/ {if (u++) print $3}' /proc/net/snmp`
	before := run(t, client, attempts)
	broken := `{"mcp":{"missing":{"type":"local","command":["/nowhere/x"]},"failing":{"type":"local","command":["false"]},"mute":{"type":"local","command":["sleep","600"],"timeout":2000}}}`
	env := map[string]string{"OPENCODE_SERVER_PASSWORD": "secret", "OPENCODE_CONFIG_CONTENT": broken}
	for _, variable := range proxy.Environment([]string{ // as internal/agent/opencode starts it
		"OPENCODE_CONFIG=" + config.Dir + "/opencode.json", "OPENCODE_DISABLE_PROJECT_CONFIG=1", "OPENCODE_DISABLE_MODELS_FETCH=1",
		"OPENCODE_DISABLE_AUTOUPDATE=1", "OPENCODE_DISABLE_DEFAULT_PLUGINS=1", "OPENCODE_DISABLE_LSP_DOWNLOAD=1",
	}) {
		name, value, _ := strings.Cut(variable, "=")
		env[name] = value
	}
	start := time.Now()
	background(t, client, "opencode", env, config.OpenCode, "serve", "--port", "8080", "--hostname", "127.0.0.1")
	ask := func(path string, timeout time.Duration) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return guestclient.Connect(ctx, sb, 8080) }}
		defer transport.CloseIdleConnections()
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:8080"+path, nil)
		if err != nil {
			return "", err
		}
		r.SetBasicAuth("opencode", "secret")
		resp, err := (&http.Client{Transport: transport}).Do(r)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	// A request at the very start can be left without an answer for ever: ask again.
	for deadline := time.Now().Add(time.Minute); ; {
		if body, err := ask("/global/health", 500*time.Millisecond); err == nil && strings.Contains(body, config.Version) {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("OpenCode is not up: %s, %v", body, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Logf("OpenCode is up after %s", since(start))
	start = time.Now()
	text, err := ask("/mcp", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("MCP servers are up after %s", since(start))
	var states map[string]struct{ Status string }
	if err := json.Unmarshal([]byte(text), &states); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	for name, want := range map[string]string{
		"memory": "connected", "filesystem": "connected", "playwright": "connected", "devtools": "connected",
		"missing": "failed", "failing": "failed", "mute": "failed",
	} {
		if states[name].Status != want {
			t.Errorf("%s is %q, want %s: %s", name, states[name].Status, want, text)
		}
	}
	time.Sleep(2 * time.Second) // for what is done in the background
	if counts := proxy.Counts(); counts.Connections+counts.Refused > 0 {
		t.Errorf("something went to the proxy: %+v", counts)
	}
	if after := run(t, client, attempts); after != before {
		t.Errorf("something looked for a way out: %q before, %q after", before, after)
	}
	settings, err := ask("/config", time.Minute)
	if err != nil || !strings.Contains(settings, `"share":"disabled"`) || !strings.Contains(settings, `"disabled_providers":["opencode"]`) {
		t.Errorf("%v: %s", err, settings)
	}
	// Nothing was installed or written beside what the image has.
	if got := run(t, client, "ls -A /app/node_modules | wc -l; ls -A /app | wc -l; find /app -newer /app/AGENTS.md -type f | wc -l"); got != "0\n7\n0\n" {
		t.Errorf("/app changed: %q\n%s", got, run(t, client, "ls -la /app"))
	}
}
