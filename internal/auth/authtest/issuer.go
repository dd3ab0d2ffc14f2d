package authtest

import (
	"crypto/ecdsa"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Issuer is an OpenID Connect issuer. It is asked over loopback or, where time is not the
// real one, as an http.RoundTripper.
type Issuer struct {
	tb  testing.TB
	url string

	mu    sync.Mutex
	keys  map[string]*ecdsa.PrivateKey
	kid   string
	down  bool
	asked map[string]int
}

// NewIssuer makes an issuer with one key, "k1", that is asked by RoundTrip only.
func NewIssuer(tb testing.TB) *Issuer {
	i := &Issuer{tb: tb, url: "https://issuer.example", keys: make(map[string]*ecdsa.PrivateKey), asked: make(map[string]int)}
	i.Rotate("k1", false)
	return i
}

// StartIssuer makes one that listens on loopback until the test ends.
func StartIssuer(tb testing.TB) *Issuer {
	i := NewIssuer(tb)
	server := httptest.NewServer(http.HandlerFunc(i.serve))
	tb.Cleanup(server.Close)
	i.url = server.URL
	return i
}

// RoundTrip implements http.RoundTripper.
func (i *Issuer) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	i.serve(w, r)
	return w.Result(), nil
}

// URL is the issuer's name.
func (i *Issuer) URL() string { return i.url }

// Rotate makes a key with which tokens are signed from now on; withdraw takes the others
// back.
func (i *Issuer) Rotate(kid string, withdraw bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if withdraw {
		clear(i.keys)
	}
	i.keys[kid], i.kid = newKey(i.tb), kid
}

// SetDown has every request answered with an error.
func (i *Issuer) SetDown(down bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.down = down
}

// Asked is how often a path was asked for.
func (i *Issuer) Asked(path string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.asked[path]
}

func (i *Issuer) serve(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.asked[r.URL.Path]++
	if i.down {
		http.Error(w, "down", http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		_ = json.NewEncoder(w).Encode(map[string]any{
			"issuer": i.url, "jwks_uri": i.url + "/keys", "authorization_endpoint": i.url + "/auth",
			"id_token_signing_alg_values_supported": []string{"ES256", "HS256", "none"},
		})
	case "/keys":
		var set jose.JSONWebKeySet
		for kid, key := range i.keys {
			set.Keys = append(set.Keys, jose.JSONWebKey{Key: key.Public(), KeyID: kid, Algorithm: "ES256", Use: "sig"})
		}
		_ = json.NewEncoder(w).Encode(set)
	default:
		http.NotFound(w, r)
	}
}

// Claims are good ones for an audience: for an hour from now, for subject "ann" with the
// roles given.
func (i *Issuer) Claims(audience string, roles ...string) map[string]any {
	now := time.Now()
	return map[string]any{
		"iss": i.URL(), "aud": audience, "sub": "ann", "roles": roles,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(time.Hour).Unix(),
	}
}

// Sign makes a token of claims.
func (i *Issuer) Sign(claims map[string]any) string {
	i.tb.Helper()
	i.mu.Lock()
	key, kid := i.keys[i.kid], i.kid
	i.mu.Unlock()
	return SignWith(i.tb, jose.ES256, key, kid, claims)
}

// SignWith makes a token that is signed in any way.
func SignWith(tb testing.TB, algorithm jose.SignatureAlgorithm, key any, kid string, claims map[string]any) string {
	tb.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: jose.JSONWebKey{Key: key, KeyID: kid}}, nil)
	if err != nil {
		tb.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		tb.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		tb.Fatal(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		tb.Fatal(err)
	}
	return token
}

// NewSigningKey makes a key that no issuer has.
func NewSigningKey(tb testing.TB) *ecdsa.PrivateKey { return newKey(tb) }
