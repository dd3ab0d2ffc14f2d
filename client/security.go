package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// TLS says how the connection is encrypted: with TLS 1.3. Its zero value trusts the
// authorities of the system and shows no certificate.
type TLS struct {
	// CAFile is a PEM file with the authorities that the server's certificate may be of.
	CAFile string
	// RootCAs are such authorities; not with CAFile.
	RootCAs *x509.CertPool
	// CertFile and KeyFile are PEM files with the client's certificate and its key. They
	// are read for each connection, so that they can be replaced.
	CertFile, KeyFile string
	// ServerName is the name in the server's certificate; the host of the address if
	// empty.
	ServerName string
}

// transport makes what encrypts the connection, and tries everything that can be wrong
// with the files.
func (t *TLS) transport() (credentials.TransportCredentials, error) {
	if t == nil {
		return insecure.NewCredentials(), nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: t.RootCAs, ServerName: t.ServerName}
	if t.CAFile != "" {
		if t.RootCAs != nil {
			return nil, errors.New("TLS: CAFile and RootCAs are both given")
		}
		pem, err := os.ReadFile(t.CAFile)
		if err != nil {
			return nil, fmt.Errorf("TLS: read the authorities: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("TLS: there is no certificate in %q", t.CAFile)
		}
	}
	if (t.CertFile == "") != (t.KeyFile == "") {
		return nil, errors.New("TLS: a certificate needs its key, and a key its certificate")
	}
	if t.CertFile != "" {
		read := func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
			if err != nil {
				return nil, fmt.Errorf("TLS: read the client's certificate: %w", err)
			}
			return &pair, nil
		}
		if _, err := read(); err != nil {
			return nil, err
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return read() }
	}
	return credentials.NewTLS(config), nil
}

// bearer sends a credential with each call.
type bearer struct {
	token func(ctx context.Context) (string, error)
	// encrypted says that the connection must be.
	encrypted bool
}

// newBearer makes what a Config wants to be sent; nil if that is nothing. It refuses to
// send a credential where others could read it on its way.
func newBearer(cfg Config, target string) (*bearer, error) {
	b := &bearer{token: cfg.Token, encrypted: cfg.TLS != nil}
	switch {
	case cfg.APIKey != "" && cfg.Token != nil:
		return nil, errors.New("both an API key and a token are given")
	case cfg.APIKey != "":
		if err := sendable(cfg.APIKey); err != nil {
			return nil, err
		}
		b.token = func(context.Context) (string, error) { return cfg.APIKey, nil }
	case cfg.Token == nil:
		return nil, nil
	}
	if !b.encrypted && !isLocal(target) {
		return nil, fmt.Errorf("address %q: credentials are not sent unencrypted to another host; use TLS", cfg.Address)
	}
	return b, nil
}

// sendable refuses what cannot be in a header, without telling it.
func sendable(credential string) error {
	if credential == "" || strings.ContainsFunc(credential, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return errors.New("the API key or token is empty or has characters that none has")
	}
	return nil
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b *bearer) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	token, err := b.token(ctx)
	if err != nil {
		return nil, err
	}
	if err := sendable(token); err != nil {
		return nil, err
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (b *bearer) RequireTransportSecurity() bool { return b.encrypted }

// isLocal says that what is sent to a target does not leave this host.
func isLocal(target string) bool {
	if strings.HasPrefix(target, "unix:") {
		return true
	}
	host, _, err := net.SplitHostPort(strings.TrimPrefix(target, "dns:///"))
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback() && ip.Zone() == ""
}
