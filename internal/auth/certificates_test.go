package auth

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/auth/authtest"
	"github.com/harvest-run/executord/internal/fault"
)

func serverFiles(t *testing.T, ca *authtest.CA) CertificatesConfig {
	t.Helper()
	cert, key := ca.Issue(authtest.Leaf{CommonName: "first", Server: true})
	return CertificatesConfig{CertFile: cert, KeyFile: key}
}

func openCertificates(t *testing.T, cfg CertificatesConfig) (*Certificates, *log) {
	t.Helper()
	l := &log{}
	cfg.Logger = l.logger()
	c, err := OpenCertificates(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c, l
}

// soon has the next handshake look at the files.
func (c *Certificates) soon() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.looked = time.Time{}
}

// shown connects and returns the name of the server's certificate, and how the
// handshake of each side ended.
func shown(t *testing.T, c *Certificates, client *tls.Config) (name string, clientErr, serverErr error) {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	server := tls.Server(b, c.ServerConfig())
	var serving sync.WaitGroup
	serving.Go(func() {
		if serverErr = server.HandshakeContext(t.Context()); serverErr == nil {
			_, serverErr = server.Write([]byte("x"))
		} else {
			b.Close()
		}
	})
	conn := tls.Client(a, client)
	clientErr = conn.HandshakeContext(t.Context())
	if clientErr == nil {
		name = conn.ConnectionState().PeerCertificates[0].Subject.CommonName
		_, clientErr = conn.Read(make([]byte, 1)) // with TLS 1.3 a refusal comes here
	}
	a.Close()
	serving.Wait()
	return name, clientErr, serverErr
}

func TestCertificatesAreReadAgain(t *testing.T) {
	ca := authtest.NewCA(t, "ca")
	cfg := serverFiles(t, ca)
	c, l := openCertificates(t, cfg)
	client := &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"}
	expect := func(want string) {
		t.Helper()
		if name, err, serverErr := shown(t, c, client); name != want || err != nil || serverErr != nil {
			t.Errorf("%q, %v, %v; want %q", name, err, serverErr, want)
		}
	}
	expect("first")
	ca.Reissue(authtest.Leaf{CommonName: "second", Server: true}, cfg.CertFile, cfg.KeyFile)
	c.soon()
	expect("second")
	// A certificate whose key has not come yet.
	oldKey, err := os.ReadFile(cfg.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	ca.Reissue(authtest.Leaf{CommonName: "third", Server: true}, cfg.CertFile, cfg.KeyFile)
	newKey, err := os.ReadFile(cfg.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	for label, bad := range map[string][]byte{"half": oldKey, "empty": nil, "no PEM": []byte("x")} {
		if err := os.WriteFile(cfg.KeyFile, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			c.soon()
			expect("second")
		}
		if n := strings.Count(l.String(), "those before stay in use"); n == 0 || n > 3 {
			t.Errorf("%s: it was logged %d times: %s", label, n, l)
		}
	}
	if err := os.Remove(cfg.KeyFile); err != nil {
		t.Fatal(err)
	}
	c.soon()
	expect("second")
	if err := os.WriteFile(cfg.KeyFile, newKey, 0o600); err != nil {
		t.Fatal(err)
	}
	c.soon()
	expect("third")
	ca.Reissue(authtest.Leaf{CommonName: "expired", Server: true, NotAfter: time.Now().Add(-time.Minute)}, cfg.CertFile, cfg.KeyFile)
	c.soon()
	expect("third")
	if strings.Contains(l.String(), "PRIVATE KEY") || strings.Contains(l.String(), strings.Split(string(newKey), "\n")[1]) {
		t.Error("the log has a key")
	}
}

// However many clients connect, the files are looked at about once a second.
func TestLookIsRare(t *testing.T) {
	ca := authtest.NewCA(t, "ca")
	cfg := serverFiles(t, ca)
	c, _ := openCertificates(t, cfg)
	ca.Reissue(authtest.Leaf{CommonName: "second", Server: true}, cfg.CertFile, cfg.KeyFile)
	c.mu.Lock()
	c.looked = time.Now().Add(time.Hour) // no look is due
	c.mu.Unlock()
	for range 5 {
		if name, _, _ := shown(t, c, &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"}); name != "first" {
			t.Errorf("it is %q: the files were looked at", name)
		}
	}
}

func TestBadCertificatesAtTheStart(t *testing.T) {
	ca := authtest.NewCA(t, "ca")
	good := serverFiles(t, ca)
	other := serverFiles(t, ca)
	expiredCert, expiredKey := ca.Issue(authtest.Leaf{Server: true, NotAfter: time.Now().Add(-time.Minute)})
	for label, test := range map[string]struct {
		cfg  CertificatesConfig
		want string
	}{
		"no file":        {CertificatesConfig{CertFile: "/nowhere/c", KeyFile: good.KeyFile}, "/nowhere/c"},
		"no key":         {CertificatesConfig{CertFile: good.CertFile, KeyFile: "/nowhere/k"}, "/nowhere/k"},
		"another's key":  {CertificatesConfig{CertFile: good.CertFile, KeyFile: other.KeyFile}, "private key does not match"},
		"expired":        {CertificatesConfig{CertFile: expiredCert, KeyFile: expiredKey}, "expired at"},
		"no authorities": {CertificatesConfig{CertFile: good.CertFile, KeyFile: good.KeyFile, ClientCAFile: "/nowhere/a"}, "/nowhere/a"},
		"a key for them": {CertificatesConfig{CertFile: good.CertFile, KeyFile: good.KeyFile, ClientCAFile: good.KeyFile}, "there is no certificate in"},
	} {
		if _, err := OpenCertificates(test.cfg); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", label, err, test.want)
		}
	}
}

func TestOldTLSIsRefused(t *testing.T) {
	ca := authtest.NewCA(t, "ca")
	c, _ := openCertificates(t, serverFiles(t, ca))
	_, err, _ := shown(t, c, &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost", MaxVersion: tls.VersionTLS12})
	if err == nil || !strings.Contains(err.Error(), "version") {
		t.Errorf("TLS 1.2: %v", err)
	}
}

func TestRequiredClientCertificate(t *testing.T) {
	ca, stranger := authtest.NewCA(t, "ca"), authtest.NewCA(t, "stranger")
	cfg := serverFiles(t, ca)
	cfg.ClientCAFile, cfg.Require = ca.File, true
	c, _ := openCertificates(t, cfg)
	for label, test := range map[string]struct {
		ca   *authtest.CA
		leaf authtest.Leaf
		good bool
	}{
		"good":     {ca, authtest.Leaf{CommonName: "ann"}, true},
		"none":     {nil, authtest.Leaf{}, false},
		"wrong CA": {stranger, authtest.Leaf{CommonName: "ann"}, false},
		"expired":  {ca, authtest.Leaf{CommonName: "ann", NotAfter: time.Now().Add(-time.Minute)}, false},
		"a server": {ca, authtest.Leaf{CommonName: "ann", Server: true}, false},
	} {
		t.Run(label, func(t *testing.T) {
			client := &tls.Config{RootCAs: ca.Pool(), ServerName: "localhost"}
			if test.ca != nil {
				client.GetClientCertificate = always(t, test.ca, test.leaf)
			}
			if _, err, serverErr := shown(t, c, client); (err == nil && serverErr == nil) != test.good {
				t.Errorf("%v, %v", err, serverErr)
			}
		})
	}
}

// always shows a certificate, also one that the server does not want.
func always(t *testing.T, ca *authtest.CA, leaf authtest.Leaf) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(ca.Issue(leaf))
	if err != nil {
		t.Fatal(err)
	}
	return func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
}

func leafOf(t *testing.T, ca *authtest.CA, leaf authtest.Leaf) *x509.Certificate {
	t.Helper()
	file, _ := ca.Issue(leaf)
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(content)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestClientCertificates(t *testing.T) {
	ca, stranger := authtest.NewCA(t, "ca"), authtest.NewCA(t, "stranger")
	cfg := serverFiles(t, ca)
	cfg.ClientCAFile = ca.File
	c, _ := openCertificates(t, cfg)
	roles := Roles{Users: []string{"*"}, Operators: []string{"CN=ops", "spiffe://x/ops"}, Admins: []string{"CN=root"}}
	for label, test := range map[string]struct {
		ca     *authtest.CA
		leaf   authtest.Leaf
		want   Principal
		reason string
	}{
		"common name":         {ca, authtest.Leaf{CommonName: "ann"}, Principal{Name: "cert:CN=ann", Role: User}, ""},
		"operator":            {ca, authtest.Leaf{CommonName: "ops"}, Principal{Name: "cert:CN=ops", Role: Operator}, ""},
		"admin":               {ca, authtest.Leaf{CommonName: "root"}, Principal{Name: "cert:CN=root", Role: Admin}, ""},
		"URI before the name": {ca, authtest.Leaf{CommonName: "root", URI: "spiffe://x/ops"}, Principal{Name: "cert:spiffe://x/ops", Role: Operator}, ""},
		// A common name that looks like a URI is not that URI.
		"a URI as a name": {ca, authtest.Leaf{CommonName: "spiffe://x/ops"}, Principal{Name: "cert:CN=spiffe://x/ops", Role: User}, ""},
		"wrong CA":        {stranger, authtest.Leaf{CommonName: "root"}, Principal{}, "CERTIFICATE_INVALID"},
		"expired":         {ca, authtest.Leaf{CommonName: "ann", NotAfter: time.Now().Add(-time.Minute)}, Principal{}, "CERTIFICATE_EXPIRED"},
		"of the future":   {ca, authtest.Leaf{CommonName: "ann", NotBefore: time.Now().Add(time.Minute)}, Principal{}, "CERTIFICATE_INVALID"},
		"a server":        {ca, authtest.Leaf{CommonName: "ann", Server: true}, Principal{}, "CERTIFICATE_INVALID"},
		"nameless":        {ca, authtest.Leaf{}, Principal{}, "CERTIFICATE_INVALID"},
		"a line":          {ca, authtest.Leaf{CommonName: "a\nb"}, Principal{}, "CERTIFICATE_INVALID"},
	} {
		t.Run(label, func(t *testing.T) {
			got, err := c.Check([]*x509.Certificate{leafOf(t, test.ca, test.leaf)}).principal(roles)
			if fault.ReasonOf(err) != test.reason || (err != nil && fault.KindOf(err) != fault.Unauthenticated) {
				t.Fatalf("%v, want %q", err, test.reason)
			}
			if test.reason == "" && *got != test.want {
				t.Errorf("%+v, want %+v", *got, test.want)
			}
		})
	}
	for label, none := range map[string]*Client{"none shown": c.Check(nil), "no TLS": nil} {
		if got, err := none.principal(roles); got != nil || err != nil {
			t.Errorf("%s: %v, %v", label, got, err)
		}
	}
	// Where none is asked for, one that is shown all the same says nothing.
	unasked, _ := openCertificates(t, serverFiles(t, ca))
	if got, err := unasked.Check([]*x509.Certificate{leafOf(t, ca, authtest.Leaf{CommonName: "root"})}).principal(roles); got != nil || err != nil {
		t.Errorf("unasked: %v, %v", got, err)
	}
}

// A certificate that expires on an open connection stops being good.
func TestCertificateExpiresOnAConnection(t *testing.T) {
	ca := authtest.NewCA(t, "ca")
	cfg := serverFiles(t, ca)
	cfg.ClientCAFile = ca.File
	c, _ := openCertificates(t, cfg)
	leaf := leafOf(t, ca, authtest.Leaf{CommonName: "ann"})
	client := c.Check([]*x509.Certificate{leaf})
	if p, err := client.principal(Roles{}); err != nil || p == nil || p.Role != 0 {
		t.Fatalf("%v, %v", p, err)
	}
	leaf.NotAfter = time.Now().Add(-time.Second)
	if _, err := client.principal(Roles{}); fault.ReasonOf(err) != "CERTIFICATE_EXPIRED" {
		t.Errorf("%v", err)
	}
}
