package auth

import (
	"context"
	"strings"
)

// Authenticator finds out who is calling in the ways that are configured.
type Authenticator struct {
	// Keys, if not nil, are the API keys that are taken, OIDC the tokens.
	Keys *Keys
	OIDC *OIDC
	// Certificates says that client certificates are taken, CertificateRoles what their
	// names may do.
	Certificates     bool
	CertificateRoles Roles
}

// Shown is what came with a request.
type Shown struct {
	// Authorization are the values of the header of this name.
	Authorization []string
	// Client is what the client showed when it connected; nil without TLS.
	Client *Client
}

// Anybody says that nobody is asked who they are.
func (a *Authenticator) Anybody() bool {
	return a == nil || a.Keys == nil && a.OIDC == nil && !a.Certificates
}

// Authenticate returns who is calling. A header counts before a certificate, and what is
// wrong with it is not made good by one. Faults: Unauthenticated, with one of the
// reasons that the AuthService lists; Unavailable (ISSUER_UNREACHABLE).
func (a *Authenticator) Authenticate(ctx context.Context, shown Shown) (Principal, error) {
	if a.Anybody() {
		return Local(), nil
	}
	if len(shown.Authorization) > 0 {
		credential, ok := bearer(shown.Authorization)
		switch {
		case !ok:
			return Principal{}, refuse("CREDENTIALS_MALFORMED", "the authorization header must be given once, as Bearer and an API key or token")
		case IsKey(credential) && a.Keys != nil:
			return a.Keys.Authenticate(credential)
		case IsKey(credential):
			return Principal{}, refuse("KEY_INVALID", "this server takes no API keys")
		case a.OIDC != nil:
			return a.OIDC.Authenticate(ctx, credential)
		case a.Keys != nil:
			return Principal{}, refuse("KEY_INVALID", "the API key is not one of this server's")
		default:
			return Principal{}, errToken()
		}
	}
	if a.Certificates {
		principal, err := shown.Client.principal(a.CertificateRoles)
		if err != nil {
			return Principal{}, err
		}
		if principal != nil {
			return *principal, nil
		}
	}
	return Principal{}, refuse("CREDENTIALS_MISSING", "the call has no credentials: "+a.wants())
}

// wants says what could be shown.
func (a *Authenticator) wants() string {
	var ways []string
	if a.Keys != nil {
		ways = append(ways, "an API key")
	}
	if a.OIDC != nil {
		ways = append(ways, "a token of the server's issuer")
	}
	if a.Certificates {
		ways = append(ways, "a client certificate")
	}
	return "give " + strings.Join(ways, " or ")
}

// Revoked has f called when what a principal showed is revoked; what it returns undoes
// that.
func (a *Authenticator) Revoked(p Principal, f func(error)) (undo func()) {
	if p.Key == "" || a == nil || a.Keys == nil {
		return func() {}
	}
	return a.Keys.Watch(p.Key, f)
}

// bearer is the credential in the values of an authorization header.
func bearer(values []string) (string, bool) {
	if len(values) != 1 {
		return "", false
	}
	scheme, credential, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "bearer") {
		return "", false
	}
	credential = strings.TrimLeft(credential, " ")
	return credential, credential != "" && !strings.ContainsAny(credential, " \t\r\n,")
}
