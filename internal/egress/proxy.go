package egress

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"sync"
	"sync/atomic"
	"time"

	"github.com/harvest-run/executord/internal/egress/outlet"
	"github.com/harvest-run/executord/internal/engine"
)

const (
	// idleTime ends a connection over which no byte has passed for so long.
	idleTime = outlet.IdleTime
	// headerTime bounds the arrival of a request's header, keepAlive the wait for
	// another request on the same connection.
	headerTime = 30 * time.Second
	keepAlive  = time.Minute
	// maxHeader bounds a request's header, in bytes.
	maxHeader = 64 << 10
	// maxIdleUpstream bounds the connections for plain HTTP that are kept for the next
	// request, and upstreamKept for how long.
	maxIdleUpstream = 16
	upstreamKept    = 30 * time.Second
)

// Proxy is what one sandbox reaches the network through. Methods of a nil Proxy, which
// stands for a sandbox without network, may be called.
type Proxy struct {
	gateway *Gateway
	sandbox string
	policy  Policy
	log     *slog.Logger
	counts  counts

	// Of a policy with the mode egress only.
	dialer    *Dialer
	listener  *outlet.Listener
	server    *http.Server
	plain     *httputil.ReverseProxy
	transport *http.Transport
	serving   sync.WaitGroup
	flows     flows
}

// counts are a Proxy's so far.
type counts struct {
	connections atomic.Int64
	refused     atomic.Int64
	first       atomic.Pointer[string]
}

// Counts tells what a sandbox did since this executord serves it.
type Counts struct {
	// Connections that were made, and requests that were refused.
	Connections, Refused int64
	// FirstRefused is HOST:PORT (REASON) of the first that was refused.
	FirstRefused string
}

// Counts are those so far.
func (p *Proxy) Counts() Counts {
	if p == nil {
		return Counts{}
	}
	c := Counts{Connections: p.counts.connections.Load(), Refused: p.counts.refused.Load()}
	if first := p.counts.first.Load(); first != nil {
		c.FirstRefused = *first
	}
	return c
}

// Policy is the one in force.
func (p *Proxy) Policy() Policy {
	if p == nil {
		return None()
	}
	return p.policy
}

// newProxy makes the Proxy of a sandbox. With the mode egress it serves what comes out
// of s until it is closed.
func newProxy(g *Gateway, sandbox string, policy Policy, s outlet.Source) *Proxy {
	p := &Proxy{gateway: g, sandbox: sandbox, policy: policy, log: g.cfg.Logger}
	if policy.Mode != engine.NetworkEgress {
		return p
	}
	p.dialer = NewDialer(g.cfg.dialing(policy.Rules))
	p.transport = &http.Transport{
		DialContext: p.dialPlain, DisableCompression: true, MaxIdleConns: maxIdleUpstream, IdleConnTimeout: upstreamKept,
		MaxResponseHeaderBytes: 1 << 20,
	}
	quiet := slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug) // what matters is logged with its sandbox
	p.plain = &httputil.ReverseProxy{
		Transport: p.transport, FlushInterval: -1, ErrorLog: quiet,
		Rewrite: func(r *httputil.ProxyRequest) {
			// ReverseProxy has removed what is for this hop only. What it thinks a proxy in
			// front of a server must mend is the server's affair.
			r.Out.URL.RawQuery = r.In.URL.RawQuery
			for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
				if values, ok := r.In.Header[name]; ok {
					r.Out.Header[name] = values
				}
			}
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) { fail(w, err) },
	}
	p.listener = outlet.Open(s, Port, g.connections)
	p.server = &http.Server{
		Handler: http.HandlerFunc(p.serve), ReadHeaderTimeout: headerTime, IdleTimeout: keepAlive,
		MaxHeaderBytes: maxHeader, ErrorLog: quiet, DisableGeneralOptionsHandler: true,
	}
	p.serving.Go(func() {
		if err := p.server.Serve(p.listener); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			p.log.Error("the egress proxy of a sandbox ended", "sandbox", sandbox, "error", err)
		}
	})
	return p
}

// close ends everything and waits for it.
func (p *Proxy) close() {
	if p.listener == nil {
		return
	}
	_ = p.listener.Close()
	_ = p.server.Close() // the connections that it would tell of are closed already
	p.flows.close()
	p.listener.Wait()
	p.serving.Wait()
	p.transport.CloseIdleConnections()
}

// serve does one request.
func (p *Proxy) serve(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodConnect {
		p.serveConnect(w, r)
		return
	}
	var t target
	var err error
	if r.URL.Scheme != "http" || r.URL.Host == "" {
		err = refuse(badTarget, "this is an HTTP proxy: it takes CONNECT, and requests with a whole http:// address")
	} else {
		t, err = parseTarget(r.URL.Host, 80)
	}
	if err == nil {
		err = p.dialer.rules.check(t)
	}
	if err != nil {
		p.refused(t, err, time.Now())
		fail(w, err)
		return
	}
	p.plain.ServeHTTP(w, r)
}

// dialPlain connects for the transport, which has made the address of the request's.
func (p *Proxy) dialPlain(ctx context.Context, _, address string) (net.Conn, error) {
	t, err := parseTarget(address, 80)
	if err != nil {
		return nil, err
	}
	up, err := p.dial(ctx, t)
	if err != nil {
		return nil, err
	}
	return up, nil
}

// dial connects to a target, and counts and logs what becomes of it.
func (p *Proxy) dial(ctx context.Context, t target) (*upstream, error) {
	begun := time.Now()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	u := &upstream{}
	if !p.flows.begin(u, func() { cancel(errClosed) }) {
		return nil, errClosed
	}
	conn, err := p.dialer.connect(ctx, t)
	if err == nil && !p.flows.connected(u, conn) {
		err = errClosed
	}
	if err != nil {
		p.flows.end(u)
		p.refused(t, err, begun)
		return nil, err
	}
	u.closed = func() {
		p.log.Info("egress", "sandbox", p.sandbox, "host", t.host(), "port", t.port, "address", conn.RemoteAddr().String(),
			"verdict", "allowed", "sent_bytes", u.sent.Load(), "received_bytes", u.received.Load(), "duration", time.Since(begun))
		p.flows.end(u)
	}
	u.extend()
	p.counts.connections.Add(1)
	return u, nil
}

// refused counts and logs a target that was not reached.
func (p *Proxy) refused(t target, err error, begun time.Time) {
	r, ok := errors.AsType[*refusal](err)
	if !ok {
		p.log.Info("egress", "sandbox", p.sandbox, "host", t.host(), "port", t.port,
			"verdict", "failed", "error", err, "duration", time.Since(begun))
		return
	}
	if p.counts.refused.Add(1) == 1 && r.reason != badTarget {
		first := Rule{Host: t.host(), Ports: []uint16{t.port}}.String() + " (" + r.reason + ")"
		p.counts.first.Store(&first)
	}
	host := ""
	if t.port != 0 {
		host = t.host()
	}
	p.log.Info("egress", "sandbox", p.sandbox, "host", host, "port", t.port, "verdict", "refused", "reason", r.reason)
}

// serveConnect makes a tunnel.
func (p *Proxy) serveConnect(w http.ResponseWriter, r *http.Request) {
	t, err := parseTarget(r.Host, 0)
	if err != nil {
		p.refused(t, err, time.Now())
		fail(w, err)
		return
	}
	up, err := p.dial(r.Context(), t)
	if err != nil {
		fail(w, err)
		return
	}
	defer func() { _ = up.Close() }() // what was sent has been sent
	client, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		fail(w, err)
		return
	}
	defer client.Close()
	if _, err := io.WriteString(client, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		return
	}
	tunnel(client, buffered.Reader, up)
}
