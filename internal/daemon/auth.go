package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"slices"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/store"
)

// callers is what decides who may call.
type callers struct {
	keys          *auth.Keys
	authenticator *auth.Authenticator
	certificates  *auth.Certificates // nil without TLS
}

// openCallers opens what the configuration asks for. API keys can be kept also while
// they are not taken, so that there are some when they are.
func (c Config) openCallers(ctx context.Context, d *Daemon, st *store.Store) (callers, error) {
	keys, err := auth.OpenKeys(ctx, st, c.Logger)
	if err != nil {
		return callers{}, err
	}
	who := callers{keys: keys, authenticator: newAuthenticator(c.Settings.GetAuth(), keys, c.Logger)}
	if oidc := who.authenticator.OIDC; oidc != nil {
		d.opened.add("connections to the issuer", func() error { oidc.Close(); return nil })
	}
	tls := c.Settings.GetTls()
	if tls.GetCertFile() == "" {
		return who, nil
	}
	who.certificates, err = auth.OpenCertificates(auth.CertificatesConfig{
		CertFile: tls.GetCertFile(), KeyFile: tls.GetKeyFile(), ClientCAFile: tls.GetClientCaFile(),
		Require: tls.GetClientAuth() == configv1.Tls_CLIENT_AUTH_REQUIRE, Logger: c.Logger,
	})
	if err != nil {
		return callers{}, fmt.Errorf("prepare TLS: %w", err)
	}
	return who, nil
}

func newAuthenticator(settings *configv1.Auth, keys *auth.Keys, logger *slog.Logger) *auth.Authenticator {
	a := &auth.Authenticator{}
	for _, method := range settings.GetMethods() {
		switch method {
		case configv1.Auth_METHOD_API_KEY:
			a.Keys = keys
		case configv1.Auth_METHOD_OIDC:
			oidc := settings.GetOidc()
			algorithms := oidc.GetAlgorithms()
			if len(algorithms) == 0 {
				algorithms = []string{"RS256", "ES256", "EdDSA"}
			}
			a.OIDC = auth.NewOIDC(auth.OIDCConfig{
				Issuer: oidc.GetIssuer(), Audience: oidc.GetAudience(), RoleClaim: oidc.GetRoleClaim(),
				Roles:  auth.Roles{Users: oidc.GetUsers(), Operators: oidc.GetOperators(), Admins: oidc.GetAdmins()},
				Leeway: oidc.GetLeeway().AsDuration(), Algorithms: slices.Clone(algorithms), Logger: logger,
			})
		case configv1.Auth_METHOD_CERTIFICATE:
			names := settings.GetCertificates()
			a.Certificates = true
			a.CertificateRoles = auth.Roles{Users: names.GetUsers(), Operators: names.GetOperators(), Admins: names.GetAdmins()}
		}
	}
	return a
}
