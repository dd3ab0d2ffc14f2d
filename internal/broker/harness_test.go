package broker

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/secret"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const token = "ghp_hunter2hunter2hunter2"

// lines is a log that tests read.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// rig is a Gate and somebody who uses it.
type rig struct {
	t      *testing.T
	broker *Broker
	gate   *Gate
	url    string
	log    *lines
}

// secrets that a test changes.
type secrets struct {
	mu  sync.Mutex
	all map[string]string
}

func (s *secrets) set(name, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all[name] = text
}

func (s *secrets) Lookup(name string) (secret.Value, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	bag, err := secret.NewBag(nil, s.all)
	if err != nil {
		return secret.Value{}, err
	}
	return bag.Lookup(name)
}

func withToken() *secrets { return &secrets{all: map[string]string{"github": token}} }

// privateTo names a server on loopback.
func privateTo(t *testing.T, server string) []egress.Rule {
	t.Helper()
	rule, err := egress.ParseRule(strings.TrimPrefix(strings.TrimPrefix(server, "http://"), "https://"))
	if err != nil {
		t.Fatal(err)
	}
	return []egress.Rule{rule}
}

// start makes a rig whose connections come from a listener of the host.
func start(t *testing.T, cfg Config, routes []Route, s Secrets) *rig {
	t.Helper()
	r := &rig{t: t, log: &lines{}}
	cfg.Logger = slog.New(slog.NewTextHandler(r.log, nil))
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	table, err := b.table(routes, s)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	r.broker, r.gate, r.url = b, newGate(b, "box"), "http://"+l.Addr().String()
	r.gate.table.Store(table)
	r.gate.serveOn(Port, func(ctx context.Context) (net.Conn, error) {
		for {
			_ = l.SetDeadline(time.Now().Add(50 * time.Millisecond))
			conn, err := l.AcceptTCP()
			if err == nil {
				return conn, nil
			}
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
		}
	})
	t.Cleanup(func() {
		r.gate.close()
		l.Close()
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if len(b.connections) > 0 {
			t.Errorf("%d places are still taken", len(b.connections))
		}
		if strings.Contains(r.log.String(), "hunter2") {
			t.Errorf("the log shows a credential:\n%s", r.log)
		}
	})
	return r
}

// reply is what came back.
type reply struct {
	StatusCode int
	Header     http.Header
}

// do sends a request, whose Host is that of the address unless a header says so.
func (r *rig) do(method, path string, header http.Header, body io.Reader) (reply, string) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, r.url+path, body)
	if err != nil {
		r.t.Fatal(err)
	}
	for name, values := range header {
		req.Header[name] = values
	}
	req.Host = header.Get("Host")
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	if strings.Contains(string(text), "hunter2") {
		r.t.Errorf("the answer shows a credential: %s", text)
	}
	return reply{resp.StatusCode, resp.Header}, string(text)
}

func (r *rig) get(path string) (int, string) {
	r.t.Helper()
	resp, text := r.do(http.MethodGet, path, nil, nil)
	return resp.StatusCode, text
}

func (f resolverFunc) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	return []netip.Addr{netip.MustParseAddr(f(host))}, nil
}
