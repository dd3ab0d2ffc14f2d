package modaltest

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// tunnel leads from a port of loopback to one of a sandbox. It is plaintext, also where
// Modal's is not: the SDK only hands on where it is.
type tunnel struct {
	port        *pb.PortSpec
	listener    net.Listener
	mu          sync.Mutex
	closed      bool
	connections map[net.Conn]bool
}

// openTunnels opens the tunnels that a sandbox wants.
func (f *Fake) openTunnels(s *sandbox) error {
	for _, p := range s.definition.GetOpenPorts().GetPorts() {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		t := &tunnel{port: p, listener: l, connections: make(map[net.Conn]bool)}
		f.mu.Lock()
		s.tunnels = append(s.tunnels, t)
		f.mu.Unlock()
		f.boxes.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				f.boxes.Go(func() { f.carry(s, t, c) })
			}
		})
	}
	return nil
}

// carry carries one connection of a tunnel, which keeps the sandbox from being idle.
func (f *Fake) carry(s *sandbox, t *tunnel, c net.Conn) {
	defer c.Close()
	defer f.occupy(s)()
	to, err := s.box.dial(context.Background(), int(t.port.GetPort()))
	if err != nil {
		return // nobody listens there
	}
	defer to.Close()
	if !t.add(c, to) {
		return
	}
	defer t.forget(c, to)
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(c, to) // either end may break it
		closeWrite(c)
	})
	_, _ = io.Copy(to, c)
	closeWrite(to)
	back.Wait()
}

func closeWrite(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.CloseWrite() // closed already
	}
}

func (t *tunnel) add(cs ...net.Conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range cs {
		t.connections[c] = true
	}
	return !t.closed
}

func (t *tunnel) forget(cs ...net.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range cs {
		delete(t.connections, c)
	}
}

func (t *tunnel) close() {
	t.listener.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	for c := range t.connections {
		c.Close()
	}
}

// tunnelData says where the tunnels of a sandbox are. What is not encrypted is not known
// at the creation yet, as with Modal.
func (f *Fake) tunnelData(s *sandbox, all bool) []*pb.TunnelData {
	f.mu.Lock()
	defer f.mu.Unlock()
	var data []*pb.TunnelData
	for _, t := range s.tunnels {
		port := uint32(t.listener.Addr().(*net.TCPAddr).Port)
		d := pb.TunnelData_builder{Host: "127.0.0.1", Port: port, ContainerPort: t.port.GetPort()}
		if t.port.GetUnencrypted() {
			if !all {
				continue
			}
			host := "127.0.0.1"
			d.UnencryptedHost, d.UnencryptedPort = &host, &port
		}
		data = append(data, d.Build())
	}
	return data
}

// SandboxGetTunnelsV2 tells where the tunnels of a sandbox are.
func (c *controlPlane) SandboxGetTunnelsV2(_ context.Context, r *pb.SandboxGetTunnelsRequest) (*pb.SandboxGetTunnelsResponse, error) {
	s, err := c.fake.sandbox(r.GetSandboxId())
	if err != nil {
		return nil, err
	}
	return pb.SandboxGetTunnelsResponse_builder{Tunnels: c.fake.tunnelData(s, true)}.Build(), nil
}

// connectToken is the right to make HTTP requests to a port of a sandbox.
type connectToken struct {
	sandbox *sandbox
	port    int
}

// SandboxCreateConnectTokenV2 gives the right to make HTTP requests to a sandbox.
func (c *controlPlane) SandboxCreateConnectTokenV2(_ context.Context, r *pb.SandboxCreateConnectTokenRequest) (*pb.SandboxCreateConnectTokenResponse, error) {
	f := c.fake
	s, err := f.sandbox(r.GetSandboxId())
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.ending {
		return nil, status.Errorf(codes.FailedPrecondition, "sandbox %s has ended", s.id)
	}
	token := newID("ct")
	f.tokens[token] = connectToken{sandbox: s, port: int(r.GetPort())}
	return pb.SandboxCreateConnectTokenResponse_builder{Url: "http://" + f.web.Addr().String(), Token: token}.Build(), nil
}

// serveWeb serves what connect tokens are for.
func (f *Fake) serveWeb() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	f.web = l
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		t, ok := ctx.Value(connectToken{}).(connectToken)
		if !ok {
			return nil, errors.New("no token")
		}
		return t.sandbox.box.dial(ctx, t.port)
	}}
	proxy := &httputil.ReverseProxy{
		Transport: transport,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", "sandbox"
			r.Out.Header.Del("Authorization")
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, err.Error(), http.StatusBadGateway)
		},
	}
	f.webServer = &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		f.mu.Lock()
		t, ok := f.tokens[name]
		over := ok && t.sandbox.ending
		f.mu.Unlock()
		if !ok || over {
			http.Error(w, "connect token is not valid", http.StatusUnauthorized)
			return
		}
		proxy.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), connectToken{}, t)))
	})}
	f.owner.Go(func() { _ = f.webServer.Serve(l) }) // ends when it is closed
	return nil
}
