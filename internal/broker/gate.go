package broker

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/egress/outlet"
	"github.com/harvest-run/executord/internal/secret"
)

const (
	// headerTime bounds the arrival of a request's header, keepAlive the wait for
	// another request on the same connection.
	headerTime = 30 * time.Second
	keepAlive  = time.Minute
	// maxHeader bounds a request's header, in bytes.
	maxHeader = 64 << 10
	// maxIdleUpstream bounds the connections to upstreams that are kept for the next
	// request, and upstreamKept for how long.
	maxIdleUpstream = 16
	upstreamKept    = 30 * time.Second
)

// Gate is what one sandbox reaches upstreams through.
type Gate struct {
	broker    *Broker
	sandbox   string
	log       *slog.Logger
	table     atomic.Pointer[table]
	proxy     *httputil.ReverseProxy
	transport *http.Transport
	server    *http.Server
	serving   sync.WaitGroup

	mu        sync.Mutex
	closed    bool
	listeners map[uint16]*outlet.Listener
	requests  sync.WaitGroup
	counts    map[string]*counts
}

type counts struct{ requests, refused, failed, sent, received atomic.Int64 }

// Counts tells what was done with a route since this executord serves the sandbox.
type Counts struct {
	// Requests that were passed on, that the route does not allow, and that the
	// upstream or the credential made fail: not answered, or with 401, 403 or 5xx.
	Requests, Refused, Failed int64
	// SentBytes and ReceivedBytes are those of bodies, to and from the upstream.
	SentBytes, ReceivedBytes int64
}

// Address is HOST:PORT of the broker inside every sandbox.
func Address() string { return (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: Port}).String() }

// URL is the address, in the sandbox, of a route's prefix, without a slash at its end.
func URL(r Route) string {
	if r.Host != "" {
		return "http://" + r.Host
	}
	return "http://" + Address() + strings.TrimSuffix(r.Prefix, "/")
}

func newGate(b *Broker, sandbox string) *Gate {
	g := &Gate{
		broker: b, sandbox: sandbox, log: b.cfg.Logger.With("sandbox", sandbox),
		listeners: make(map[uint16]*outlet.Listener), counts: make(map[string]*counts),
	}
	g.transport = &http.Transport{
		DialContext: g.dial, DisableCompression: true, MaxIdleConns: maxIdleUpstream, IdleConnTimeout: upstreamKept,
		TLSHandshakeTimeout: headerTime, MaxResponseHeaderBytes: 1 << 20, ExpectContinueTimeout: time.Second,
		TLSClientConfig: &tls.Config{RootCAs: b.cfg.Roots, MinVersion: tls.VersionTLS12},
	}
	quiet := slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug) // what matters is logged with its sandbox
	g.proxy = &httputil.ReverseProxy{
		Transport: g.transport, FlushInterval: -1, ErrorLog: quiet, Rewrite: rewrite, ModifyResponse: modify,
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			p := passingOf(r.Context())
			p.failed(w, http.StatusBadGateway, "UPSTREAM_UNREACHABLE", "it could not reach "+p.route.upstream.Host+": "+p.clean(err.Error()))
		},
	}
	g.server = &http.Server{
		Handler: http.HandlerFunc(g.serve), ReadHeaderTimeout: headerTime, IdleTimeout: keepAlive, MaxHeaderBytes: maxHeader,
		ErrorLog: quiet, DisableGeneralOptionsHandler: true,
	}
	return g
}

// serveOn takes what comes out of a source, once for each port.
func (g *Gate) serveOn(port uint16, source outlet.Source) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed || g.listeners[port] != nil {
		return
	}
	l := outlet.Open(source, port, g.broker.connections)
	g.listeners[port] = l
	g.serving.Go(func() {
		if err := g.server.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			g.log.Error("the broker of a sandbox ended", "error", err)
		}
	})
}

// close ends everything and waits for it.
func (g *Gate) close() {
	g.mu.Lock()
	g.closed = true
	all := g.listeners
	g.mu.Unlock()
	for _, l := range all {
		_ = l.Close()
	}
	_ = g.server.Close() // ends the contexts of requests too
	g.requests.Wait()
	for _, l := range all {
		l.Wait()
	}
	g.serving.Wait()
	g.transport.CloseIdleConnections()
}

// Counts are those of each route so far, by name.
func (g *Gate) Counts() map[string]Counts {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make(map[string]Counts, len(g.counts))
	for name, c := range g.counts {
		all[name] = Counts{c.requests.Load(), c.refused.Load(), c.failed.Load(), c.sent.Load(), c.received.Load()}
	}
	return all
}

// begin notes a request; nil if none may begin any more.
func (g *Gate) begin(route string) *counts {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil
	}
	g.requests.Add(1)
	c := g.counts[route]
	if c == nil {
		c = &counts{}
		g.counts[route] = c
	}
	return c
}

// dial connects to an upstream by the rules that are in force.
func (g *Gate) dial(ctx context.Context, network, address string) (net.Conn, error) {
	cfg := g.broker.cfg
	d := egress.NewDialer(egress.Dialing{Rules: g.table.Load().rules, Denied: cfg.Denied, Resolver: cfg.Resolver, Dial: cfg.Dial})
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return &upstreamConn{Conn: conn}, nil
}

// upstreamConn ends when nothing passes for too long.
type upstreamConn struct {
	net.Conn
	extended atomic.Int64 // when the deadline was last set, in nanoseconds
}

func (c *upstreamConn) extend() {
	now := time.Now()
	if last := c.extended.Load(); now.UnixNano()-last > int64(time.Second) {
		c.extended.Store(now.UnixNano())
		_ = c.SetDeadline(now.Add(outlet.IdleTime)) // fails only for a closed connection
	}
}

// Read implements net.Conn.
func (c *upstreamConn) Read(p []byte) (int, error) {
	c.extend()
	return c.Conn.Read(p)
}

// Write implements net.Conn.
func (c *upstreamConn) Write(p []byte) (int, error) {
	c.extend()
	return c.Conn.Write(p)
}

// passing is a request on its way.
type passing struct {
	route  *route
	rest   string
	value  secret.Value
	has    bool // value is one
	status int
	counts *counts
	// sent and received are this request's.
	sent, received atomic.Int64
}

type passingKey struct{}

func passingOf(ctx context.Context) *passing { return ctx.Value(passingKey{}).(*passing) }

// serve does one request.
func (g *Gate) serve(w http.ResponseWriter, r *http.Request) {
	begun := time.Now()
	t := g.table.Load()
	path := r.URL.EscapedPath()
	found, rest := t.find(r.Host, path)
	name := ""
	if found != nil {
		name = found.Name
	}
	c := g.begin(name)
	if c == nil {
		answer(w, http.StatusServiceUnavailable, "STOPPING", "it is stopping")
		return
	}
	defer g.requests.Done()
	p := &passing{route: found, rest: rest, counts: c}
	defer func() {
		g.log.Info("broker", "route", name, "method", known(r.Method), "status", p.status, "sent_bytes", p.sent.Load(),
			"received_bytes", p.received.Load(), "duration", time.Since(begun))
	}()
	switch {
	case r.URL.Scheme != "" || r.Method == http.MethodConnect:
		p.refused(w, http.StatusBadRequest, "BAD_REQUEST", "this is the broker, and no proxy: ask for paths here")
	case dirty(path):
		p.refused(w, http.StatusBadRequest, "BAD_REQUEST", "the path has empty, dot or encoded segments")
	case found == nil:
		p.refused(w, http.StatusNotFound, "NO_ROUTE", "nothing is routed from there")
	case !found.allows(r.Method, rest, r.URL.RawQuery):
		p.refused(w, http.StatusForbidden, "NOT_ALLOWED", "route "+name+" does not allow this "+known(r.Method))
	default:
		if found.Secret != "" {
			v, err := t.secrets.Lookup(found.Secret)
			header, text := found.header(v)
			if err == nil && !httpguts.ValidHeaderFieldValue(text) {
				err = errors.New("secret " + found.Secret + " cannot stand in a header: " + header)
			}
			if err != nil {
				p.failed(w, http.StatusBadGateway, "NO_CREDENTIAL", "it has no credential for "+name+": "+err.Error())
				return
			}
			p.value, p.has = v, true
		}
		c.requests.Add(1)
		r.Header.Del("Upgrade") // what comes after it could not be looked at
		r.Body = &countedBody{r.Body, [2]*atomic.Int64{&c.sent, &p.sent}}
		g.proxy.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), passingKey{}, p)))
	}
}

// known keeps what anybody can have written out of logs.
func known(method string) string {
	if len(method) > 16 || !httpguts.ValidHeaderFieldName(method) {
		return "?"
	}
	return method
}

// rewrite makes the request to the upstream. ReverseProxy has removed what is for this
// hop only.
func rewrite(r *httputil.ProxyRequest) {
	p := passingOf(r.In.Context())
	up := p.route.upstream
	target := *up
	escaped := up.EscapedPath() + p.rest
	if path, err := url.PathUnescape(escaped); err == nil {
		target.Path, target.RawPath = path, escaped
	}
	target.RawQuery = r.In.URL.RawQuery
	r.Out.URL, r.Out.Host = &target, up.Host
	// What a program in the sandbox shows by itself is not for the upstream: it could be
	// a credential of somebody else, by which data would leave.
	for _, name := range []string{"Authorization", "X-Api-Key", "Api-Key", "X-Goog-Api-Key", "Private-Token", "Cookie"} {
		r.Out.Header.Del(name)
	}
	for name, text := range p.route.Extra {
		if own := r.Out.Header.Get(name); own != "" {
			text = own + "," + text
		}
		r.Out.Header.Set(name, text)
	}
	if p.has {
		name, text := p.route.header(p.value)
		r.Out.Header.Set(name, text)
	}
}

// modify looks at the answer of an upstream.
func modify(resp *http.Response) error {
	p := passingOf(resp.Request.Context())
	p.status = resp.StatusCode
	if resp.StatusCode == http.StatusUnauthorized || resp.StatusCode == http.StatusForbidden || resp.StatusCode >= 500 {
		p.counts.failed.Add(1)
	}
	resp.Header.Del("Set-Cookie") // it would be a credential too
	for name, values := range resp.Header {
		for i, text := range values {
			values[i] = p.clean(text)
		}
		resp.Header[name] = values
	}
	p.relocate(resp)
	if p.route.Git && resp.StatusCode == http.StatusUnauthorized {
		// git would ask somebody for a password, in vain.
		_ = resp.Body.Close()
		text := "asks for a credential and this executord has none for it"
		if p.has {
			text = "refused the credential (secret " + p.route.Secret + ")"
		}
		text = "executord: " + p.route.upstream.Host + " " + text + "\n"
		resp.StatusCode, resp.Status = http.StatusForbidden, ""
		resp.Header = http.Header{"Content-Type": {"text/plain; charset=utf-8"}, "Executord-Refused": {"CREDENTIAL_REFUSED"}}
		resp.Body, resp.ContentLength = io.NopCloser(strings.NewReader(text)), int64(len(text))
		return nil
	}
	resp.Body = &countedBody{resp.Body, [2]*atomic.Int64{&p.counts.received, &p.received}}
	return nil
}

// relocate keeps a redirection within the upstream on the way through the broker. One to
// elsewhere is the client's to follow, and it has no credentials.
func (p *passing) relocate(resp *http.Response) {
	text := resp.Header.Get("Location")
	if text == "" {
		return
	}
	to, err := resp.Request.URL.Parse(text)
	if err != nil {
		return
	}
	up := p.route.upstream
	rest, below := strings.CutPrefix(to.EscapedPath(), up.EscapedPath())
	if to.Scheme != up.Scheme || to.Host != up.Host || !below || p.route.Prefix == "" {
		return
	}
	location := p.route.Prefix + rest
	if to.RawQuery != "" {
		location += "?" + to.RawQuery
	}
	resp.Header.Set("Location", location)
}

// clean takes the credential out of a text of an upstream.
func (p *passing) clean(text string) string {
	if !p.has {
		return text
	}
	_, shown := p.route.header(p.value)
	_, encoded, _ := strings.Cut(shown, " ")
	for _, known := range []string{shown, encoded, p.value.Reveal()} {
		if known != "" {
			text = strings.ReplaceAll(text, known, "[redacted]")
		}
	}
	return text
}

func (p *passing) refused(w http.ResponseWriter, status int, reason, text string) {
	p.counts.refused.Add(1)
	p.status = status
	answer(w, status, reason, text)
}

func (p *passing) failed(w http.ResponseWriter, status int, reason, text string) {
	p.counts.failed.Add(1)
	p.status = status
	answer(w, status, reason, text)
}

// answer is what a client is told that reaches nothing.
func answer(w http.ResponseWriter, status int, reason, text string) {
	header := w.Header()
	header.Set("Content-Type", "text/plain; charset=utf-8")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Executord-Refused", reason)
	w.WriteHeader(status)
	_, _ = io.WriteString(w, "executord did not pass this on ("+reason+"): "+text+".\n") // a client that does not read it has left
}

// countedBody counts what is read of a body.
type countedBody struct {
	io.ReadCloser
	counts [2]*atomic.Int64
}

// Read implements io.Reader.
func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	for _, c := range b.counts {
		c.Add(int64(n))
	}
	return n, err
}
