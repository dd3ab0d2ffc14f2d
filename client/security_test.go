package client_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/auth/authtest"
)

// Credentials go where others cannot read them, and nowhere else.
func TestCredentialsAreNotSentInTheClear(t *testing.T) {
	token := func(context.Context) (string, error) { return "t", nil }
	encrypted := &client.TLS{}
	for name, test := range map[string]struct {
		cfg client.Config
		err string
	}{
		"another host":                 {client.Config{Address: "example.org:7070", APIKey: "exk_secret"}, "not sent unencrypted"},
		"another host, a token":        {client.Config{Address: "10.0.0.5:7070", Token: token}, "not sent unencrypted"},
		"like loopback":                {client.Config{Address: "127.0.0.1.example.org:7070", APIKey: "exk_secret"}, "not sent unencrypted"},
		"like localhost":               {client.Config{Address: "localhost.example.org:7070", APIKey: "exk_secret"}, "not sent unencrypted"},
		"any address":                  {client.Config{Address: "0.0.0.0:7070", APIKey: "exk_secret"}, "not sent unencrypted"},
		"another host, encrypted":      {client.Config{Address: "example.org:7070", APIKey: "exk_secret", TLS: encrypted}, ""},
		"another host, no credentials": {client.Config{Address: "example.org:7070"}, ""},
		"loopback":                     {client.Config{Address: "127.0.0.1:7070", APIKey: "exk_secret"}, ""},
		"loopback of IPv6":             {client.Config{Address: "[::1]:7070", Token: token}, ""},
		"localhost":                    {client.Config{Address: "localhost:7070", APIKey: "exk_secret"}, ""},
		"a socket":                     {client.Config{Address: "unix:/run/x", APIKey: "exk_secret"}, ""},
		"both":                         {client.Config{APIKey: "exk_secret", Token: token}, "both an API key and a token"},
		"a line in a key":              {client.Config{APIKey: "exk_secret\nx"}, "has characters that none has"},
		"a letter of no ASCII":         {client.Config{APIKey: "exk_secreté"}, "has characters that none has"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := client.Dial(test.cfg)
			if err == nil {
				c.Close()
			}
			if (err == nil) != (test.err == "") || err != nil && (!strings.Contains(err.Error(), test.err) || strings.Contains(err.Error(), "secret")) {
				t.Errorf("%v, want %q", err, test.err)
			}
		})
	}
}

func TestCredentialsAreShown(t *testing.T) {
	s := clienttest.Start(t)
	s.Want("Bearer exk_1")
	next, failure := "exk_1", error(nil)
	token := func(context.Context) (string, error) { return next, failure }
	for name, cfg := range map[string]client.Config{"a key": {APIKey: "exk_1"}, "a token": {Token: token}} {
		cfg.Address = s.Address()
		c, err := client.Dial(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if who, err := c.Auth().GetCaller(t.Context(), &executorv1.GetCallerRequest{}); err != nil || who.GetPrincipal() != "key:ann" {
			t.Errorf("%s: %v, %v", name, who, err)
		}
		result, err := c.Run(t.Context(), &executorv1.ExecuteRequest{Command: &executorv1.Command{Args: []string{"out x"}}}, io.Discard, io.Discard)
		if err != nil || result.GetReason() != executorv1.Reason_REASON_EXITED {
			t.Errorf("%s: a stream: %v, %v", name, result, err)
		}
	}
	c, err := client.Dial(client.Config{Address: s.Address(), Token: token})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	next = "exk_2"
	s.Want("Bearer exk_2")
	if _, err := c.Auth().GetCaller(t.Context(), &executorv1.GetCallerRequest{}); err != nil || s.Shown() != "Bearer exk_2" {
		t.Errorf("a token that changed: %v", err)
	}
	next = "exk_1"
	_, err = c.Auth().GetCaller(t.Context(), &executorv1.GetCallerRequest{})
	if !client.Unauthenticated(err) || client.Reason(err) != "KEY_INVALID" {
		t.Errorf("%v", err)
	}
	for _, bad := range []string{"", "a b", "a\n"} {
		next = bad
		if _, err := c.Auth().GetCaller(t.Context(), &executorv1.GetCallerRequest{}); !client.Unauthenticated(err) {
			t.Errorf("token %q: %v", bad, err)
		}
	}
	failure = errors.New("no token today")
	if _, err := c.Auth().GetCaller(t.Context(), &executorv1.GetCallerRequest{}); !client.Unauthenticated(err) || !strings.Contains(err.Error(), "no token today") {
		t.Errorf("%v", err)
	}
	// A stream that is refused is not tried for ever.
	stream, err := c.Watch(t.Context(), "executions/x1", nil)
	if err == nil {
		defer stream.Close()
		_, err = stream.Recv()
	}
	if !client.Unauthenticated(err) {
		t.Errorf("a stream: %v", err)
	}
}

func TestTLS(t *testing.T) {
	ca, stranger := authtest.NewCA(t, "ca"), authtest.NewCA(t, "stranger")
	serverCert, serverKey := ca.Issue(authtest.Leaf{CommonName: "server", Server: true})
	pair, err := tls.LoadX509KeyPair(serverCert, serverKey)
	if err != nil {
		t.Fatal(err)
	}
	s := clienttest.New()
	s.SetTransport(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{pair}, ClientCAs: ca.Pool(), ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13,
	}))
	if err := s.Listen("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	cert, key := ca.Issue(authtest.Leaf{CommonName: "ann"})
	badCert, badKey := stranger.Issue(authtest.Leaf{CommonName: "ann"})
	for name, test := range map[string]struct {
		tls  *client.TLS
		good bool
	}{
		"file":           {&client.TLS{CAFile: ca.File, CertFile: cert, KeyFile: key}, true},
		"pool":           {&client.TLS{RootCAs: ca.Pool(), CertFile: cert, KeyFile: key}, true},
		"name":           {&client.TLS{CAFile: ca.File, CertFile: cert, KeyFile: key, ServerName: "localhost"}, true},
		"another name":   {&client.TLS{CAFile: ca.File, CertFile: cert, KeyFile: key, ServerName: "example.org"}, false},
		"wrong CA":       {&client.TLS{CAFile: stranger.File, CertFile: cert, KeyFile: key}, false},
		"CAs of system":  {&client.TLS{CertFile: cert, KeyFile: key}, false},
		"no certificate": {&client.TLS{CAFile: ca.File}, false},
		"a stranger's":   {&client.TLS{CAFile: ca.File, CertFile: badCert, KeyFile: badKey}, false},
		"no TLS":         {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := client.Dial(client.Config{Address: s.Address(), TLS: test.tls, MaxOutage: -1})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, err = c.Auth().GetCaller(t.Context(), &executorv1.GetCallerRequest{})
			if (err == nil) != test.good || err != nil && status.Code(err) != codes.Unavailable {
				t.Errorf("%v", err)
			}
		})
	}
	// The client's certificate is read for each connection.
	c, err := client.Dial(client.Config{Address: s.Address(), TLS: &client.TLS{CAFile: ca.File, CertFile: cert, KeyFile: key}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	stranger.Reissue(authtest.Leaf{CommonName: "ann"}, cert, key)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if _, err := c.Auth().CreateApiKey(ctx, &executorv1.CreateApiKeyRequest{DisplayName: "x"}); status.Code(err) != codes.Unavailable {
		t.Errorf("a certificate that was replaced by a bad one: %v", err)
	}
}

func TestBadTLSFiles(t *testing.T) {
	ca := authtest.NewCA(t, "ca")
	cert, key := ca.Issue(authtest.Leaf{})
	_, other := ca.Issue(authtest.Leaf{})
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		tls client.TLS
		err string
	}{
		"no such CA":     {client.TLS{CAFile: "/nowhere/ca"}, "/nowhere/ca"},
		"an empty CA":    {client.TLS{CAFile: empty}, "no certificate in"},
		"two kinds":      {client.TLS{CAFile: ca.File, RootCAs: x509.NewCertPool()}, "both given"},
		"no key":         {client.TLS{CertFile: cert}, "a certificate needs its key"},
		"no certificate": {client.TLS{KeyFile: key}, "a certificate needs its key"},
		"another's key":  {client.TLS{CertFile: cert, KeyFile: other}, "does not match"},
		"no such key":    {client.TLS{CertFile: cert, KeyFile: "/nowhere/key"}, "/nowhere/key"},
	} {
		if _, err := client.Dial(client.Config{TLS: &test.tls}); err == nil || !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %v, want %q", name, err, test.err)
		}
	}
}
