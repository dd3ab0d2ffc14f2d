package api

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/auth/authtest"
	"github.com/harvest-run/executord/internal/execution"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// encrypted is a bench that also listens on a loopback port, with TLS.
type encrypted struct {
	*bench
	ca                *authtest.CA
	certFile, keyFile string
	address           string
	logs              *syncBuffer
}

func newEncrypted(t *testing.T, require bool) *encrypted {
	t.Helper()
	ca := authtest.NewCA(t, "ca")
	e := &encrypted{ca: ca, logs: &syncBuffer{}}
	e.certFile, e.keyFile = ca.Issue(authtest.Leaf{CommonName: "first", Server: true})
	certificates, err := auth.OpenCertificates(auth.CertificatesConfig{
		CertFile: e.certFile, KeyFile: e.keyFile, ClientCAFile: ca.File, Require: require, Logger: textLogger(e.logs),
	})
	if err != nil {
		t.Fatal(err)
	}
	e.bench = guarded(t, func(c *Config) {
		c.Certificates = certificates
		c.Auth.Certificates, c.Auth.CertificateRoles = true, auth.Roles{Users: []string{"CN=ann"}, Admins: []string{"spiffe://x/root"}}
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.address = listener.Addr().String()
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := e.server.Serve(listener); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(func() {
		e.server.Stop()
		serving.Wait()
	})
	return e
}

// connect connects with TLS; ca, if not nil, issues the client's certificate.
func (e *encrypted) connect(t *testing.T, ca *authtest.CA, leaf authtest.Leaf, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	cfg := &tls.Config{RootCAs: e.ca.Pool(), ServerName: "localhost"}
	if ca != nil {
		pair, err := tls.LoadX509KeyPair(ca.Issue(leaf))
		if err != nil {
			t.Fatal(err)
		}
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	conn, err := grpc.NewClient(e.address, append([]grpc.DialOption{grpc.WithTransportCredentials(credentials.NewTLS(cfg))}, options...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func whoami(t *testing.T, conn *grpc.ClientConn) (*executorv1.GetCallerResponse, error) {
	t.Helper()
	return executorv1.NewAuthServiceClient(conn).GetCaller(t.Context(), &executorv1.GetCallerRequest{})
}

// A client whose certificate is not good is told why.
func TestClientCertificates(t *testing.T) {
	e := newEncrypted(t, false)
	stranger := authtest.NewCA(t, "stranger")
	_, key := e.key(t, "ci", auth.Operator)
	withKey := grpc.WithPerRPCCredentials(shows("Bearer " + key))
	for name, test := range map[string]struct {
		conn      *grpc.ClientConn
		principal string
		role      executorv1.Role
		code      codes.Code
		reason    string
	}{
		"user":                  {e.connect(t, e.ca, authtest.Leaf{CommonName: "ann"}), "cert:CN=ann", executorv1.Role_ROLE_USER, codes.OK, ""},
		"admin":                 {e.connect(t, e.ca, authtest.Leaf{CommonName: "x", URI: "spiffe://x/root"}), "cert:spiffe://x/root", executorv1.Role_ROLE_ADMIN, codes.OK, ""},
		"no certificate, a key": {e.connect(t, nil, authtest.Leaf{}, withKey), "key:ci", executorv1.Role_ROLE_OPERATOR, codes.OK, ""},
		"a key and a certificate": {e.connect(t, e.ca, authtest.Leaf{CommonName: "ann"}, withKey),
			"key:ci", executorv1.Role_ROLE_OPERATOR, codes.OK, ""},
		"no role":        {e.connect(t, e.ca, authtest.Leaf{CommonName: "eve"}), "", 0, codes.PermissionDenied, "ROLE_REQUIRED"},
		"no certificate": {e.connect(t, nil, authtest.Leaf{}), "", 0, codes.Unauthenticated, "CREDENTIALS_MISSING"},
		"wrong CA":       {e.connect(t, stranger, authtest.Leaf{CommonName: "ann"}), "", 0, codes.Unauthenticated, "CERTIFICATE_INVALID"},
		"expired":        {e.connect(t, e.ca, authtest.Leaf{CommonName: "ann", NotAfter: time.Now().Add(-time.Minute)}), "", 0, codes.Unauthenticated, "CERTIFICATE_EXPIRED"},
		"a server":       {e.connect(t, e.ca, authtest.Leaf{CommonName: "ann", Server: true}), "", 0, codes.Unauthenticated, "CERTIFICATE_INVALID"},
	} {
		t.Run(name, func(t *testing.T) {
			who, err := whoami(t, test.conn)
			if test.code != codes.OK {
				wantError(t, err, test.code, test.reason)
				return
			}
			if err != nil || who.GetPrincipal() != test.principal || who.GetRole() != test.role {
				t.Errorf("%v, %v", who, err)
			}
		})
	}
	plain, err := grpc.NewClient(e.address, grpc.WithTransportCredentials(insecure.NewCredentials()), withKey)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	if _, err := whoami(t, plain); status.Code(err) != codes.Unavailable {
		t.Errorf("without TLS: %v", err)
	}
}

func TestRequiredClientCertificates(t *testing.T) {
	e := newEncrypted(t, true)
	_, key := e.key(t, "ci", auth.Operator)
	withKey := grpc.WithPerRPCCredentials(shows("Bearer " + key))
	if who, err := whoami(t, e.connect(t, e.ca, authtest.Leaf{CommonName: "eve"}, withKey)); err != nil || who.GetPrincipal() != "key:ci" {
		t.Errorf("%v, %v", who, err)
	}
	for name, conn := range map[string]*grpc.ClientConn{
		"none": e.connect(t, nil, authtest.Leaf{}, withKey), "wrong CA": e.connect(t, authtest.NewCA(t, "stranger"), authtest.Leaf{CommonName: "ann"}, withKey),
	} {
		if _, err := whoami(t, conn); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Certificates are rotated, well and badly, while streams run and clients connect: no
// stream is dropped, no connection refused, and the new certificate comes into use.
func TestRotationUnderLoad(t *testing.T) {
	e := newEncrypted(t, false)
	log := e.executions.add(execution.Execution{ID: "e1", Owner: "cert:CN=ann"})
	log.start()
	const streams = 20
	var watching, connecting sync.WaitGroup
	var received atomic.Int64
	for range streams {
		conn := e.connect(t, e.ca, authtest.Leaf{CommonName: "ann"})
		stream, err := executorv1.NewExecutorServiceClient(conn).WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{Name: "executions/e1"})
		if err == nil {
			_, err = stream.Recv()
		}
		if err != nil {
			t.Fatal(err)
		}
		watching.Go(func() {
			sequence := uint64(1)
			for {
				resp, err := stream.Recv()
				if errors.Is(err, io.EOF) {
					return
				}
				if err != nil {
					t.Errorf("a stream was dropped: %v", err)
					return
				}
				received.Add(1)
				if sequence++; resp.GetEvent().GetCursor().GetSequence() != sequence {
					t.Errorf("event %d, want %d", resp.GetEvent().GetCursor().GetSequence(), sequence)
				}
			}
		})
	}
	done := make(chan struct{})
	var names sync.Map
	for range 2 {
		connecting.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				conn := e.connect(t, e.ca, authtest.Leaf{CommonName: "ann"})
				var p peer.Peer
				_, err := executorv1.NewAuthServiceClient(conn).GetCaller(t.Context(), &executorv1.GetCallerRequest{}, grpc.Peer(&p))
				if err != nil {
					t.Errorf("a connection was refused: %v", err)
				} else {
					names.Store(p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates[0].Subject.CommonName, true)
				}
				conn.Close()
				log.output("stdout", "x")
			}
		})
	}
	// The files are looked at once a second.
	rotations := []string{"second", "", "third"}
	for _, name := range rotations {
		time.Sleep(300 * time.Millisecond)
		if name == "" { // half of a rotation: the key has not come
			certFile, _ := e.ca.Issue(authtest.Leaf{CommonName: "never", Server: true})
			if err := copyFile(certFile, e.certFile); err != nil {
				t.Fatal(err)
			}
			waitUntil(t, func() bool { return strings.Contains(e.logs.String(), "those before stay in use") })
			continue
		}
		e.ca.Reissue(authtest.Leaf{CommonName: name, Server: true}, e.certFile, e.keyFile)
		waitUntil(t, func() bool { _, ok := names.Load(name); return ok })
	}
	close(done)
	connecting.Wait()
	log.exit(0)
	watching.Wait()
	if _, never := names.Load("never"); never {
		t.Error("a certificate without its key was used")
	}
	if received.Load() < streams {
		t.Errorf("only %d events", received.Load())
	}
}
