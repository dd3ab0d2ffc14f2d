package auth

import (
	"crypto/x509"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/harvest-run/executord/internal/auth/authtest"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/fault"
)

func TestAuthenticator(t *testing.T) {
	ca := authtest.NewCA(t, "ca")
	cfg := serverFiles(t, ca)
	cfg.ClientCAFile = ca.File
	c, _ := openCertificates(t, cfg)
	client := c.Check([]*x509.Certificate{leafOf(t, ca, authtest.Leaf{CommonName: "ann"})})
	synctest.Test(t, func(t *testing.T) {
		issuer := authtest.NewIssuer(t)
		k, _ := openTestKeys(t, &memory{})
		_, key := create(t, k, NewKey{Name: "ci", Role: Operator})
		o := newTestOIDC(t, issuer, &log{})
		token := issuer.Sign(issuer.Claims("executord", "dev"))
		all := &Authenticator{Keys: k, OIDC: o, Certificates: true, CertificateRoles: Roles{Users: []string{"*"}}}
		keys, oidc, certs := &Authenticator{Keys: k}, &Authenticator{OIDC: o}, &Authenticator{Certificates: true}
		header := func(values ...string) Shown { return Shown{Authorization: values} }
		for label, test := range map[string]struct {
			a            *Authenticator
			shown        Shown
			name, reason string
		}{
			"nobody is asked":             {&Authenticator{}, Shown{}, "local", ""},
			"nobody is asked, nil":        {nil, header("Bearer x"), "local", ""},
			"a key":                       {all, header("Bearer " + key), "key:ci", ""},
			"a key, in lower case":        {all, header("bearer   " + key), "key:ci", ""},
			"a token":                     {all, header("Bearer " + token), "oidc:https://issuer.example#ann", ""},
			"a certificate":               {all, Shown{Client: client}, "cert:CN=ann", ""},
			"a key before a certificate":  {all, Shown{Authorization: []string{"Bearer " + key}, Client: client}, "key:ci", ""},
			"a bad key and a certificate": {all, Shown{Authorization: []string{"Bearer exk_x"}, Client: client}, "", "KEY_INVALID"},
			"nothing":                     {all, Shown{}, "", "CREDENTIALS_MISSING"},
			"no certificate":              {certs, Shown{Client: &Client{}}, "", "CREDENTIALS_MISSING"},
			"a certificate not asked for": {keys, Shown{Client: client}, "", "CREDENTIALS_MISSING"},
			"twice":                       {all, header("Bearer "+key, "Bearer "+key), "", "CREDENTIALS_MALFORMED"},
			"another scheme":              {all, header("Basic " + key), "", "CREDENTIALS_MALFORMED"},
			"no scheme":                   {all, header(key), "", "CREDENTIALS_MALFORMED"},
			"empty":                       {all, header(""), "", "CREDENTIALS_MALFORMED"},
			"only a scheme":               {all, header("Bearer "), "", "CREDENTIALS_MALFORMED"},
			"two in one":                  {all, header("Bearer " + key + ", Bearer " + key), "", "CREDENTIALS_MALFORMED"},
			"a token where keys are":      {keys, header("Bearer " + token), "", "KEY_INVALID"},
			"a key where tokens are":      {oidc, header("Bearer " + key), "", "KEY_INVALID"},
			"a token where neither is":    {certs, header("Bearer " + token), "", "TOKEN_INVALID"},
			"a certificate without roles": {certs, Shown{Client: client}, "cert:CN=ann", ""},
		} {
			got, err := test.a.Authenticate(t.Context(), test.shown)
			if got.Name != test.name || fault.ReasonOf(err) != test.reason {
				t.Errorf("%s: %+v, %v; want %q, %q", label, got, err, test.name, test.reason)
			}
			if err != nil && (strings.Contains(err.Error(), key[4:]) || strings.Contains(err.Error(), token)) {
				t.Errorf("%s: it tells the credential: %v", label, err)
			}
		}
		if p, err := certs.Authenticate(t.Context(), Shown{Client: client}); err != nil || p.Role != 0 {
			t.Errorf("%v, %v", p, err)
		}
		told := 0
		principal, err := all.Authenticate(t.Context(), header("Bearer "+key))
		if err != nil {
			t.Fatal(err)
		}
		undo := all.Revoked(principal, func(error) { told++ })
		defer undo()
		(*Authenticator)(nil).Revoked(principal, func(error) { told++ })()
		all.Revoked(Local(), func(error) { told++ })()
		if _, err := k.Revoke(t.Context(), principal.Key); err != nil || told != 1 {
			t.Errorf("told %d times, %v", told, err)
		}
	})
}

func TestRoles(t *testing.T) {
	r := Roles{Users: []string{"*"}, Operators: []string{"ops", ""}, Admins: []string{"root"}}
	for value, want := range map[string]Role{"": User, "x": User, "ops": Operator, "root": Admin, "*": User, "Root": User} {
		if got := r.of(value); got != want {
			t.Errorf("%q is %v, want %v", value, got, want)
		}
	}
	if r.of() != User || r.of("x", "ops", "root") != Admin || (Roles{}).of("*", "x") != 0 || (Roles{Admins: []string{"*"}}).of() != Admin {
		t.Error("several values, or none")
	}
	for _, role := range []Role{User, Operator, Admin} {
		if back, err := ParseRole(role.String()); err != nil || back != role {
			t.Errorf("%v comes back as %v, %v", role, back, err)
		}
	}
	for _, bad := range []string{"", "none", "Admin", "root"} {
		if _, err := ParseRole(bad); fault.KindOf(err) != fault.Invalid {
			t.Errorf("%q: %v", bad, err)
		}
	}
	for role, want := range map[Role]caller.Caller{0: {Owner: "x"}, User: {Owner: "x"}, Operator: {Owner: "x", All: true}, Admin: {Owner: "x", All: true}} {
		if got := (Principal{Name: "x", Role: role}).Caller(); got != want {
			t.Errorf("%v: %+v", role, got)
		}
	}
}
