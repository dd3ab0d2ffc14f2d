package auth

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"
)

// lookEvery is how often at most the files of certificates are looked at.
const lookEvery = time.Second

// CertificatesConfig says which files a server's certificates are in.
type CertificatesConfig struct {
	// CertFile has the certificate and its chain, KeyFile the key, both as PEM.
	CertFile, KeyFile string
	// ClientCAFile has the authorities, as PEM, whose certificates clients may show; ""
	// if clients are not asked for one.
	ClientCAFile string
	// Require refuses connections without a good client certificate.
	Require bool
	Logger  *slog.Logger
}

// Certificates are a server's certificates, read again when their files change. New
// connections get the new ones, the others go on as they are. A change that cannot be
// used is logged, and what was there before stays in use.
type Certificates struct {
	cfg CertificatesConfig

	mu      sync.Mutex
	looked  time.Time
	stamps  [3]stamp // of the files when they were last read
	present *tls.Config
	pool    *x509.CertPool
	told    string // the failure that was logged last
}

// stamp changes when a file does.
type stamp struct {
	dev, ino, size int64
	mtime, ctime   syscall.Timespec
}

// OpenCertificates reads the files for the first time.
func OpenCertificates(cfg CertificatesConfig) (*Certificates, error) {
	c := &Certificates{cfg: cfg, looked: time.Now()}
	stamps, err := c.look()
	if err == nil {
		err = c.read()
	}
	if err != nil {
		return nil, err
	}
	c.stamps = stamps
	return c, nil
}

// ServerConfig is for a listener. It stays good over all changes of the files.
func (c *Certificates) ServerConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) { return c.config(hello.Context()), nil },
	}
}

// config is the present configuration.
func (c *Certificates) config(ctx context.Context) *tls.Config {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refresh(ctx)
	return c.present
}

// refresh reads the files if they have changed, and looks whether they have at most
// every lookEvery.
func (c *Certificates) refresh(ctx context.Context) {
	if time.Since(c.looked) < lookEvery {
		return
	}
	c.looked = time.Now()
	stamps, err := c.look()
	if err == nil && stamps == c.stamps {
		return
	}
	if err == nil {
		err = c.read()
	}
	if err != nil {
		// The files are read again at each look: they may be in the middle of a change.
		if text := err.Error(); text != c.told {
			c.told = text
			c.cfg.Logger.ErrorContext(ctx, "read changed certificates; those before stay in use", "error", err)
		}
		return
	}
	// Looked at before they were read: a change in between shows at the next look.
	c.stamps, c.told = stamps, ""
	leaf := c.present.Certificates[0].Leaf
	c.cfg.Logger.InfoContext(ctx, "certificates were read again", "expires", leaf.NotAfter)
}

func (c *Certificates) look() ([3]stamp, error) {
	var stamps [3]stamp
	for i, file := range []string{c.cfg.CertFile, c.cfg.KeyFile, c.cfg.ClientCAFile} {
		if file == "" {
			continue
		}
		var st syscall.Stat_t
		if err := syscall.Stat(file, &st); err != nil {
			return stamps, fmt.Errorf("look at %q: %w", file, err)
		}
		stamps[i] = stamp{dev: int64(st.Dev), ino: int64(st.Ino), size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
	}
	return stamps, nil
}

// read reads all files and takes them over if all are good.
func (c *Certificates) read() error {
	pair, err := tls.LoadX509KeyPair(c.cfg.CertFile, c.cfg.KeyFile)
	if err != nil {
		return fmt.Errorf("read the certificate %q with the key %q: %w", c.cfg.CertFile, c.cfg.KeyFile, err)
	}
	if pair.Leaf == nil {
		if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
			return fmt.Errorf("read the certificate %q: %w", c.cfg.CertFile, err)
		}
	}
	if now := time.Now(); now.After(pair.Leaf.NotAfter) {
		return fmt.Errorf("the certificate %q expired at %v", c.cfg.CertFile, pair.Leaf.NotAfter)
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{pair},
		// A resumed connection would go on with a client certificate that was checked
		// against authorities that may have changed since.
		SessionTicketsDisabled: true,
	}
	var pool *x509.CertPool
	if c.cfg.ClientCAFile != "" {
		pem, err := os.ReadFile(c.cfg.ClientCAFile)
		if err != nil {
			return fmt.Errorf("read the authorities of clients: %w", err)
		}
		pool = x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return fmt.Errorf("read the authorities of clients: there is no certificate in %q", c.cfg.ClientCAFile)
		}
		config.ClientCAs = pool
		// One that is asked for and is not good is refused by Client, which can say why.
		config.ClientAuth = tls.RequestClientCert
		if c.cfg.Require {
			config.ClientAuth = tls.RequireAndVerifyClientCert
		}
	}
	c.present, c.pool = config, pool
	return nil
}

// Client is the certificate that a client showed on a connection, checked once.
type Client struct {
	// leaf is nil if none was shown.
	leaf *x509.Certificate
	err  error
}

// Check checks what a client showed when it connected.
func (c *Certificates) Check(shown []*x509.Certificate) *Client {
	if len(shown) == 0 {
		return &Client{}
	}
	c.mu.Lock()
	pool := c.pool
	c.mu.Unlock()
	if pool == nil {
		return &Client{} // it was not asked for
	}
	between := x509.NewCertPool()
	for _, one := range shown[1:] {
		between.AddCert(one)
	}
	_, err := shown[0].Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return &Client{leaf: shown[0], err: err}
}

// principal returns whom the certificate stands for, given the roles of names; nil if none
// was shown. Faults Unauthenticated: CERTIFICATE_INVALID, CERTIFICATE_EXPIRED.
func (c *Client) principal(roles Roles) (*Principal, error) {
	if c == nil || c.leaf == nil {
		return nil, nil
	}
	invalid, _ := errors.AsType[x509.CertificateInvalidError](c.err)
	switch {
	case time.Now().After(c.leaf.NotAfter), c.err != nil && invalid.Reason == x509.Expired && !time.Now().Before(c.leaf.NotBefore):
		// Also on a connection that was made before.
		return nil, refuse("CERTIFICATE_EXPIRED", "the client certificate has expired")
	case c.err != nil:
		return nil, refuse("CERTIFICATE_INVALID", "the client certificate is not of an authority that this server takes, or not for clients")
	}
	name := ""
	switch {
	case len(c.leaf.URIs) > 0:
		name = c.leaf.URIs[0].String()
	case c.leaf.Subject.CommonName != "":
		name = "CN=" + c.leaf.Subject.CommonName
	}
	if !isName(name) {
		return nil, refuse("CERTIFICATE_INVALID", "the client certificate has neither a URI nor a common name that can be a caller's")
	}
	return &Principal{Name: "cert:" + name, Role: roles.of(name)}, nil
}
