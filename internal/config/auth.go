package config

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
)

// resolveFiles makes the paths of certificates absolute.
func (l *loader) resolveFiles(in Input) {
	for _, f := range fields() {
		switch f.name {
		case "tls.cert_file", "tls.key_file", "tls.client_ca_file":
			if path := f.get(l.config)[0]; path != "" {
				l.check(f.name, f.set(l.config, []string{in.absolute(path)}))
			}
		}
	}
}

// checkTLS checks what belongs together.
func (l *loader) checkTLS() {
	t := l.config.GetTls()
	if (t.GetCertFile() == "") != (t.GetKeyFile() == "") {
		name := "tls.cert_file"
		if t.GetCertFile() == "" {
			name = "tls.key_file"
		}
		l.check(name, errors.New("tls.cert_file and tls.key_file must be set together"))
	}
	if t.GetClientCaFile() != "" && t.GetCertFile() == "" {
		l.check("tls.client_ca_file", errors.New("clients can only show a certificate if the server has one: set tls.cert_file and tls.key_file"))
	}
	if t.GetClientAuth() == configv1.Tls_CLIENT_AUTH_REQUIRE && t.GetClientCaFile() == "" {
		l.check("tls.client_auth", errors.New("require needs tls.client_ca_file"))
	}
}

// checkAuth checks that each method has what it needs.
func (l *loader) checkAuth() {
	a := l.config.GetAuth()
	if slices.Contains(a.GetMethods(), configv1.Auth_METHOD_OIDC) {
		if a.GetOidc().GetIssuer() == "" || a.GetOidc().GetAudience() == "" {
			l.check("auth.methods", errors.New("oidc needs auth.oidc.issuer and auth.oidc.audience"))
		}
	}
	if issuer := a.GetOidc().GetIssuer(); issuer != "" {
		l.check("auth.oidc.issuer", checkIssuer(issuer))
	}
	if slices.Contains(a.GetMethods(), configv1.Auth_METHOD_CERTIFICATE) && l.config.GetTls().GetClientCaFile() == "" {
		l.check("auth.methods", errors.New("certificate needs tls.client_ca_file"))
	}
	if len(a.GetMethods()) == 0 {
		q := a.GetQuotas()
		for _, bound := range []struct {
			name  string
			value int64
		}{
			{"running_executions", q.GetRunningExecutions()}, {"sessions", q.GetSessions()}, {"stored_bytes", q.GetStoredBytes()},
		} {
			if bound.value != 0 {
				l.check("auth.quotas."+bound.name, errors.New("it needs auth.methods: without them all callers are one"))
			}
		}
	}
}

// checkIssuer refuses an issuer whose keys could be changed on the way.
func checkIssuer(issuer string) error {
	u, err := url.Parse(issuer)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "" {
		return fmt.Errorf("%q is not the URL of an issuer, such as https://accounts.example.org", issuer)
	}
	if u.Scheme == "https" {
		return nil
	}
	ip, err := netip.ParseAddr(u.Hostname())
	if u.Scheme == "http" && (u.Hostname() == "localhost" || err == nil && ip.IsLoopback()) {
		return nil
	}
	return fmt.Errorf("%q must be https, or http on a loopback address", issuer)
}
