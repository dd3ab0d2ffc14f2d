package broker

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/fault"
)

// upstream is a server, and the last request that it got.
func upstream(t *testing.T, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	return s
}

// The credential is what the route says, whatever the program shows by itself, and the
// rest is as it was.
func TestCredentials(t *testing.T) {
	var got *http.Request
	s := upstream(t, func(w http.ResponseWriter, r *http.Request) {
		got = r.Clone(context.Background())
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Set-Cookie", "session=hunter2")
		w.Header().Set("X-Echo", "it was "+r.Header.Get("Authorization"))
		fmt.Fprintf(w, "%s %d", r.URL.RequestURI(), len(body))
	})
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:"+token))
	route := func(name string, scheme Scheme, secretName string) Route {
		return Route{Name: name, Prefix: "/" + name + "/", Upstream: s.URL + "/base/", Secret: secretName, Scheme: scheme, User: "x-access-token", Header: "X-Api-Key"}
	}
	gh := Route{Name: "gh", Host: "api.github.localhost", Upstream: s.URL + "/", Secret: "github", Scheme: Bearer}
	oauth := route("oauth", Bearer, "github")
	oauth.Extra = map[string]string{"Anthropic-Beta": "oauth"}
	r := start(t, Config{Private: privateTo(t, s.URL)}, []Route{
		route("basic", Basic, "github"), route("bearer", Bearer, "github"), route("key", Header, "github"), route("open", "", ""), gh, oauth,
	}, withToken())
	for name, c := range map[string]struct {
		path, host           string
		authorization, apiIs string
		uri                  string
	}{
		"basic":       {"/basic/a/b?c=%2Fd", "", basic, "", "/base/a/b?c=%2Fd"},
		"bearer":      {"/bearer/a%2Fb", "", "Bearer " + token, "", "/base/a%2Fb"},
		"key":         {"/key/v1/messages", "", "", token, "/base/v1/messages"},
		"none":        {"/open/", "", "", "", "/base/"},
		"by its host": {"/repos/o/r", "api.github.localhost:80", "Bearer " + token, "", "/repos/o/r"},
		"extra":       {"/oauth/x", "", "Bearer " + token, "", "/base/x"},
	} {
		t.Run(name, func(t *testing.T) {
			header := http.Header{
				"Authorization": {"Bearer of-the-sandbox"}, "X-Api-Key": {"of-the-sandbox"}, "Cookie": {"a=b"},
				"Accept": {"text/x"}, "Anthropic-Beta": {"own"}, "Upgrade": {"websocket"},
			}
			if c.host != "" {
				header.Set("Host", c.host)
			}
			if name == "bearer" { // ours is not removed as one for this hop only
				header.Set("Connection", "Authorization, X-Api-Key")
			}
			resp, text := r.do(http.MethodPost, c.path, header, strings.NewReader("12345"))
			if resp.StatusCode != http.StatusOK || text != c.uri+" 5" {
				t.Errorf("%d %s", resp.StatusCode, text)
			}
			if a := got.Header.Get("Authorization"); a != c.authorization {
				t.Errorf("Authorization is %q", a)
			}
			if k := got.Header.Get("X-Api-Key"); k != c.apiIs {
				t.Errorf("X-Api-Key is %q", k)
			}
			if got.Host != strings.TrimPrefix(s.URL, "http://") || got.Header.Get("Accept") != "text/x" || got.Header.Get("Cookie") != "" || got.Header.Get("Upgrade") != "" {
				t.Errorf("%s %v", got.Host, got.Header)
			}
			want := "own"
			if name == "extra" {
				want = "own,oauth"
			}
			if beta := got.Header.Get("Anthropic-Beta"); beta != want {
				t.Errorf("Anthropic-Beta is %q", beta)
			}
			for name, values := range resp.Header {
				if name == "Set-Cookie" || strings.Contains(strings.Join(values, " "), "hunter2") || strings.Contains(strings.Join(values, " "), basic[6:]) {
					t.Errorf("%s: %q shows a credential", name, values)
				}
			}
		})
	}
	counts := r.gate.Counts()
	if c := counts["basic"]; c.Requests != 1 || c.SentBytes != 5 || c.ReceivedBytes == 0 || c.Refused != 0 || c.Failed != 0 {
		t.Errorf("%+v", c)
	}
}

func TestRefusals(t *testing.T) {
	reached := 0
	s := upstream(t, func(w http.ResponseWriter, r *http.Request) {
		reached++
		switch r.URL.Path {
		case "/bad/o/r.git/info/refs":
			http.Error(w, "no", http.StatusUnauthorized)
		case "/ok/here":
			http.Redirect(w, r, "/ok/there?x=1", http.StatusFound)
		case "/ok/away":
			http.Redirect(w, r, "https://elsewhere.example/x", http.StatusFound)
		}
	})
	git := Git("git.example", "github", false, "o/r", "o/other")
	git.Upstream = s.URL + "/bad/"
	own := &secrets{all: map[string]string{"github": token, "broken": "hunter2\nX: y"}}
	r := start(t, Config{Private: privateTo(t, s.URL)}, []Route{
		git, {Name: "ok", Prefix: "/ok/", Upstream: s.URL + "/ok/", Secret: "github", Scheme: Bearer},
		{Name: "gone", Prefix: "/gone/", Upstream: s.URL + "/", Secret: "inline", Scheme: Bearer},
		{Name: "broken", Prefix: "/broken/", Upstream: s.URL + "/", Secret: "broken", Scheme: Bearer},
	}, own)
	for name, c := range map[string]struct {
		method, path string
		status       int
		reason       string
		reaches      bool
	}{
		"no route":              {"GET", "/x/", 404, "NO_ROUTE", false},
		"dots":                  {"GET", "/ok/../gone/x", 400, "BAD_REQUEST", false},
		"encoded dots":          {"GET", "/ok/%2e%2e/x", 400, "BAD_REQUEST", false},
		"dots behind encoded /": {"GET", "/ok/a%2f..%2f../x", 400, "BAD_REQUEST", false},
		"double slash":          {"GET", "/ok//x", 400, "BAD_REQUEST", false},
		"backslash":             {"GET", "/ok/..%5cx", 400, "BAD_REQUEST", false},
		"clone":                 {"POST", "/git/git.example/o/r.git/git-upload-pack", 200, "", true},
		"clone without .git":    {"POST", "/git/git.example/o/other/git-upload-pack", 200, "", true},
		"another repository":    {"POST", "/git/git.example/p/r.git/git-upload-pack", 403, "NOT_ALLOWED", false},
		"push":                  {"POST", "/git/git.example/o/r.git/git-receive-pack", 403, "NOT_ALLOWED", false},
		"push, beginning":       {"GET", "/git/git.example/o/r.git/info/refs?service=git-receive-pack", 403, "NOT_ALLOWED", false},
		"two services":          {"GET", "/git/git.example/o/r.git/info/refs?service=git-upload-pack&service=git-receive-pack", 403, "NOT_ALLOWED", false},
		"the web site":          {"GET", "/git/git.example/o/r/settings", 403, "NOT_ALLOWED", false},
		"refused credential":    {"GET", "/git/git.example/o/r.git/info/refs?service=git-upload-pack", 403, "CREDENTIAL_REFUSED", true},
		"secret that is gone":   {"GET", "/gone/x", 502, "NO_CREDENTIAL", false},
		"secret with a line":    {"GET", "/broken/x", 502, "NO_CREDENTIAL", false},
		"within":                {"GET", "/ok/here", 302, "", true},
		"away":                  {"GET", "/ok/away", 302, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			reached = 0
			resp, text := r.do(c.method, c.path, nil, nil)
			if resp.StatusCode != c.status || resp.Header.Get("Executord-Refused") != c.reason || (reached > 0) != c.reaches {
				t.Errorf("%d %v, reached %d: %s", resp.StatusCode, resp.Header, reached, text)
			}
			want := map[string]string{"within": "/ok/there?x=1", "away": "https://elsewhere.example/x"}[name]
			if got := resp.Header.Get("Location"); got != want {
				t.Errorf("it leads to %q", got)
			}
		})
	}
	own.set("inline", "now-it-is-known") // rotation needs no new sandbox
	if status, text := r.get("/gone/x"); status != 200 {
		t.Errorf("%d %s", status, text)
	}
	if c := r.gate.Counts()["git:git.example"]; c.Requests != 3 || c.Refused != 5 || c.Failed != 1 {
		t.Errorf("%+v", c)
	}
}

// Requests and answers pass while they are made.
func TestStreaming(t *testing.T) {
	step := make(chan string)
	s := upstream(t, func(w http.ResponseWriter, r *http.Request) {
		line := make([]byte, 4)
		if r.ContentLength > 0 || r.Method == http.MethodPut {
			if _, err := io.ReadFull(r.Body, line); err != nil {
				t.Error(err)
			}
			step <- string(line)
			n, err := io.Copy(io.Discard, r.Body)
			fmt.Fprint(w, n, err)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		_ = http.NewResponseController(w).Flush()
		for text := range step {
			fmt.Fprintf(w, "data: %s\n\n", text)
			_ = http.NewResponseController(w).Flush()
		}
	})
	r := start(t, Config{Private: privateTo(t, s.URL)}, []Route{{Name: "m", Prefix: "/m/", Upstream: s.URL + "/"}}, withToken())
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport}
	resp, err := client.Get(r.url + "/m/events")
	if err == nil {
		events := bufio.NewReader(resp.Body)
		for _, text := range []string{"one", "two"} {
			step <- text
			if got, err := events.ReadString('\n'); err != nil || got != "data: "+text+"\n" {
				t.Errorf("%q, %v", got, err)
			}
			_, _ = events.ReadString('\n')
		}
		close(step)
		if _, err := io.ReadAll(events); err != nil {
			t.Error(err)
		}
		resp.Body.Close()
	} else {
		t.Fatal(err)
	}
	step = make(chan string)
	in, out := io.Pipe()
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodPut, r.url+"/m/pack", in)
	done := make(chan string, 1)
	go func() {
		resp, err := client.Do(req)
		if err != nil {
			done <- err.Error()
			return
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		done <- string(text)
	}()
	fmt.Fprint(out, "PACK")
	if got := <-step; got != "PACK" { // before the rest is there
		t.Error(got)
	}
	block := make([]byte, 1<<20)
	for range 64 {
		if _, err := out.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	out.Close()
	if got := <-done; got != "67108864 <nil>" {
		t.Error(got)
	}
	if c := r.gate.Counts()["m"]; c.SentBytes != 64<<20+4 {
		t.Errorf("%+v", c)
	}
}

// Upstreams that are not there, are cut off, have the wrong certificate or a private address.
func TestUnreachable(t *testing.T) {
	cut := upstream(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		fmt.Fprint(w, "half")
	})
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "secure") }))
	secure.Config.ErrorLog = nil
	defer secure.Close()
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	closed := "http://" + nobody.Addr().String()
	private := append(privateTo(t, cut.URL), privateTo(t, secure.URL)...)
	private = append(private, privateTo(t, closed)...)
	routes := []Route{
		{Name: "cut", Prefix: "/cut/", Upstream: cut.URL + "/"}, {Name: "tls", Prefix: "/tls/", Upstream: secure.URL + "/"},
		{Name: "closed", Prefix: "/closed/", Upstream: closed + "/", Secret: "github", Scheme: Bearer},
		{Name: "private", Prefix: "/private/", Upstream: "https://inside.example/"}, {Name: "meta", Prefix: "/meta/", Upstream: "https://169.254.169.254/"},
	}
	resolver := resolverFunc(func(host string) string { return "10.0.0.1" })
	r := start(t, Config{Private: private, Resolver: resolver}, routes, withToken())
	for path, want := range map[string]string{
		"/tls/": "certificate", "/closed/": "refused", "/private/": "10.0.0.1, which is a private address", "/meta/": "metadata service",
	} {
		if status, text := r.get(path); status != 502 || !strings.Contains(text, want) {
			t.Errorf("%s: %d %s", path, status, text)
		}
	}
	resp, err := http.Get(r.url + "/cut/")
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("half an answer looks whole: %q", text)
	}
	resp.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	pool := x509.NewCertPool()
	pool.AddCert(secure.Certificate())
	trusting := start(t, Config{Private: private, Roots: pool}, routes[:2], withToken())
	if status, text := trusting.get("/tls/"); status != 200 || text != "secure" {
		t.Errorf("%d %s", status, text)
	}
}

func TestCheckRoute(t *testing.T) {
	good := Route{Name: "a", Prefix: "/a/", Upstream: "https://a.example/", Secret: "s", Scheme: Bearer}
	for name, change := range map[string]func(*Route){
		"no name":              func(r *Route) { r.Name = "" },
		"prefix and host":      func(r *Route) { r.Host = "x" },
		"neither":              func(r *Route) { r.Prefix = "" },
		"prefix without slash": func(r *Route) { r.Prefix = "/a" },
		"prefix with dots":     func(r *Route) { r.Prefix = "/a/../" },
		"upstream with user":   func(r *Route) { r.Upstream = "https://u:hunter2@a.example/" },
		"upstream with query":  func(r *Route) { r.Upstream = "https://a.example/?hunter2" },
		"upstream, no slash":   func(r *Route) { r.Upstream = "https://a.example" },
		"another scheme":       func(r *Route) { r.Upstream = "ftp://a.example/" },
		"no TLS":               func(r *Route) { r.Upstream = "http://a.example/" },
		"no TLS, an address":   func(r *Route) { r.Upstream = "http://10.0.0.1/" },
		"no host":              func(r *Route) { r.Upstream = "https:///" },
		"strange host":         func(r *Route) { r.Upstream = "https://a_*.example/" },
		"secret, no scheme":    func(r *Route) { r.Scheme = "" },
		"scheme, no secret":    func(r *Route) { r.Secret = "" },
		"scheme":               func(r *Route) { r.Scheme = "x" },
		"header":               func(r *Route) { r.Scheme, r.Header = Header, "a b" },
		"extra":                func(r *Route) { r.Extra = map[string]string{"a": "b\nc"} },
	} {
		b, err := New(Config{Private: []egress.Rule{{Host: "127.0.0.0/8"}}})
		if err != nil {
			t.Fatal(err)
		}
		r := good
		if _, err := b.table([]Route{r}, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := b.table([]Route{r, {Name: "b", Prefix: "/a/", Upstream: r.Upstream}}, nil); fault.KindOf(err) != fault.Invalid {
			t.Errorf("two with one prefix: %v", err)
		}
		change(&r)
		if _, err := b.table([]Route{r}, nil); fault.ReasonOf(err) != "BROKER_ROUTE" || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := New(Config{Private: []egress.Rule{{Host: "a.example"}}}); err == nil {
		t.Error("a name can be private")
	}
	for _, r := range append(GitHubAPI("s"), Git("github.com", "s", true, "o/r"), Git("github.com", "", true), Model("https://api.anthropic.com/v1/", "s", "X-Api-Key"), Model("https://api.openai.com/v1", "s", ""), Model("https://own.example/v1", "", "")) {
		b, _ := New(Config{})
		if _, err := b.table([]Route{r}, nil); err != nil {
			t.Errorf("%s: %v", r.Name, err)
		}
	}
	if got := URL(Model("https://a.example/v1", "s", "")); got != "http://127.0.0.1:3129/model" {
		t.Error(got)
	}
}

type resolverFunc func(string) string
