package egress

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/harvest-run/executord/internal/engine"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tcpSource is the listener in a sandbox, without a sandbox.
type tcpSource struct{ *net.TCPListener }

func (s tcpSource) accept(ctx context.Context) (net.Conn, error) {
	for {
		_ = s.SetDeadline(time.Now().Add(50 * time.Millisecond))
		conn, err := s.AcceptTCP()
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if timeout, ok := errors.AsType[net.Error](err); !ok || !timeout.Timeout() {
			return nil, err
		}
	}
}

// names is a Resolver with answers one after another, the last for ever.
type names struct {
	mu      sync.Mutex
	answers map[string][][]string
	asked   []string
}

func (n *names) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	host = strings.TrimSuffix(host, ".")
	n.asked = append(n.asked, host)
	answers := n.answers[host]
	if len(answers) == 0 {
		return nil, &net.DNSError{Err: "no such host", Name: host, Server: "192.0.2.53:53", IsNotFound: true}
	}
	if len(answers) > 1 {
		n.answers[host] = answers[1:]
	}
	var addrs []netip.Addr
	for _, text := range answers[0] {
		addrs = append(addrs, netip.MustParseAddr(text))
	}
	return addrs, nil
}

func resolves(pairs ...string) *names {
	n := &names{answers: make(map[string][][]string)}
	for i := 0; i < len(pairs); i += 2 {
		n.answers[pairs[i]] = append(n.answers[pairs[i]], strings.Fields(pairs[i+1]))
	}
	return n
}

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

// rig is a Proxy and somebody who uses it.
type rig struct {
	t       *testing.T
	gateway *Gateway
	proxy   *Proxy
	address string
	log     *lines
	dialled *dialled
}

// dialled are the addresses that were dialled, which are not those that are connected to.
type dialled struct {
	mu  sync.Mutex
	all []string
}

func (d *dialled) String() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return strings.Join(d.all, " ")
}

// start makes a rig. resolver may be nil; to, if not "", is what everything that is
// dialled connects to in truth.
func start(t *testing.T, policy Policy, resolver Resolver, to string) *rig {
	t.Helper()
	r := &rig{t: t, log: &lines{}, dialled: &dialled{}}
	if resolver == nil {
		resolver = resolves()
	}
	dialer := net.Dialer{}
	gateway, err := New(Config{
		Max: engine.NetworkEgress, Engine: "fake", Capable: map[string][]engine.Network{"fake": {engine.NetworkEgress}}, Resolver: resolver,
		Logger: slog.New(slog.NewTextHandler(r.log, nil)),
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			r.dialled.mu.Lock()
			r.dialled.all = append(r.dialled.all, address)
			r.dialled.mu.Unlock()
			if to != "" {
				address = to
			}
			return dialer.DialContext(ctx, network, address)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	r.gateway, r.address = gateway, l.Addr().String()
	r.proxy = newProxy(gateway, "box", policy, tcpSource{l}.accept)
	t.Cleanup(func() {
		r.proxy.close()
		l.Close()
		if err := gateway.Close(); err != nil {
			t.Error(err)
		}
		if len(gateway.connections) > 0 {
			t.Errorf("%d places are still taken", len(gateway.connections))
		}
	})
	return r
}

// client is an HTTP client that uses the proxy.
func (r *rig) client() *http.Client {
	transport := &http.Transport{
		Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: r.address}), DisableKeepAlives: true,
	}
	r.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}

// get reads a page through the proxy.
func (r *rig) get(address string) (status int, body string, header http.Header) {
	r.t.Helper()
	resp, err := r.client().Get(address)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.StatusCode, string(text), resp.Header
}

// dial connects to the proxy itself.
func (r *rig) dial() *net.TCPConn {
	r.t.Helper()
	conn, err := net.Dial("tcp", r.address)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	return conn.(*net.TCPConn)
}

// connect asks for a tunnel. Its reader has what came behind the answer.
func (r *rig) connect(authority string) (*net.TCPConn, *bufio.Reader, int, string) {
	r.t.Helper()
	conn := r.dial()
	fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", authority, authority)
	reader := bufio.NewReader(conn)
	resp, err := http.ReadResponse(reader, &http.Request{Method: http.MethodConnect})
	if err != nil {
		r.t.Fatal(err)
	}
	if resp.StatusCode == http.StatusOK {
		return conn, reader, resp.StatusCode, ""
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	return conn, reader, resp.StatusCode, string(body)
}

// eventually waits for what takes milliseconds.
func (r *rig) eventually(what string, holds func() bool) {
	r.t.Helper()
	for range 3000 {
		if holds() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	r.t.Fatalf("it does not come: %s\nlog:\n%s", what, r.log)
}

// site is a web server on loopback, and its HOST:PORT.
func site(t *testing.T, handler http.HandlerFunc) (*httptest.Server, string) {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	return s, strings.TrimPrefix(s.URL, "http://")
}

// echo is a TCP server that sends back what it gets, and its end after the client's.
func echo(t *testing.T) string {
	t.Helper()
	return tcpServer(t, func(conn *net.TCPConn) {
		_, _ = io.Copy(conn, conn)
		_ = conn.CloseWrite()
	})
}

func tcpServer(t *testing.T, serve func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			conn, err := l.AcceptTCP()
			if err != nil {
				return
			}
			work.Go(func() {
				defer conn.Close()
				serve(conn)
			})
		}
	})
	t.Cleanup(func() { l.Close(); work.Wait() })
	return l.Addr().String()
}

func emptyReader() *bufio.Reader { return bufio.NewReader(strings.NewReader("")) }
