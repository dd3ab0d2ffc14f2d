package auth

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/harvest-run/executord/internal/auth/authtest"
	"github.com/harvest-run/executord/internal/fault"
)

// log is a log that is read while it is written.
type log struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *log) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func newTestOIDC(t *testing.T, issuer *authtest.Issuer, l *log) *OIDC {
	o := NewOIDC(OIDCConfig{
		Issuer: issuer.URL(), Audience: "executord", RoleClaim: "roles", Leeway: 30 * time.Second,
		Roles:      Roles{Users: []string{"dev"}, Operators: []string{"ops"}, Admins: []string{"root"}},
		Algorithms: []string{"RS256", "ES256"}, Logger: l.logger(), Transport: issuer,
	})
	t.Cleanup(o.Close)
	return o
}

func unsigned(t *testing.T, claims map[string]any) string {
	t.Helper()
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	encode := base64.RawURLEncoding.EncodeToString
	return encode([]byte(`{"alg":"none","typ":"JWT"}`)) + "." + encode(payload) + "."
}

func TestTokens(t *testing.T) {
	with := func(claims map[string]any, changes ...any) map[string]any {
		for i := 0; i < len(changes); i += 2 {
			if changes[i+1] == nil {
				delete(claims, changes[i].(string))
			} else {
				claims[changes[i].(string)] = changes[i+1]
			}
		}
		return claims
	}
	now := func(d time.Duration) int64 { return time.Now().Add(d).Unix() }
	const name = "oidc:https://issuer.example#ann"
	for label, test := range map[string]struct {
		token  func(t *testing.T, i *authtest.Issuer) string
		reason string
		role   Role
	}{
		"good":     {func(_ *testing.T, i *authtest.Issuer) string { return i.Sign(i.Claims("executord", "dev")) }, "", User},
		"operator": {func(_ *testing.T, i *authtest.Issuer) string { return i.Sign(i.Claims("executord", "dev", "ops")) }, "", Operator},
		"admin":    {func(_ *testing.T, i *authtest.Issuer) string { return i.Sign(i.Claims("executord", "root", "x")) }, "", Admin},
		"no role":  {func(_ *testing.T, i *authtest.Issuer) string { return i.Sign(i.Claims("executord", "other")) }, "", 0},
		"role, a text": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord"), "roles", "ops"))
		}, "", Operator},
		"roles, no one": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord"), "roles", nil))
		}, "", 0},
		"roles, a number": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord"), "roles", 7))
		}, "", 0},
		"one of several audiences": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("", "dev"), "aud", []string{"x", "executord"}))
		}, "", User},
		"wrong audience": {func(_ *testing.T, i *authtest.Issuer) string { return i.Sign(i.Claims("executor", "dev")) }, "TOKEN_INVALID", 0},
		"no audience":    {func(_ *testing.T, i *authtest.Issuer) string { return i.Sign(with(i.Claims(""), "aud", nil)) }, "TOKEN_INVALID", 0},
		"wrong issuer": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord"), "iss", "https://other.example"))
		}, "TOKEN_INVALID", 0},
		"alg none": {func(t *testing.T, i *authtest.Issuer) string { return unsigned(t, i.Claims("executord", "root")) }, "TOKEN_INVALID", 0},
		"HMAC": {func(t *testing.T, i *authtest.Issuer) string {
			return authtest.SignWith(t, jose.HS256, bytes.Repeat([]byte("k"), 32), "k1", i.Claims("executord", "root"))
		}, "TOKEN_INVALID", 0},
		"another's key of the same name": {func(t *testing.T, i *authtest.Issuer) string {
			return authtest.SignWith(t, jose.ES256, authtest.NewSigningKey(t), "k1", i.Claims("executord", "root"))
		}, "TOKEN_INVALID", 0},
		"another's key": {func(t *testing.T, i *authtest.Issuer) string {
			return authtest.SignWith(t, jose.ES256, authtest.NewSigningKey(t), "k9", i.Claims("executord", "root"))
		}, "TOKEN_INVALID", 0},
		"changed": {func(_ *testing.T, i *authtest.Issuer) string {
			parts := strings.Split(i.Sign(i.Claims("executord", "dev")), ".")
			payload, _ := json.Marshal(i.Claims("executord", "root"))
			return parts[0] + "." + base64.RawURLEncoding.EncodeToString(payload) + "." + parts[2]
		}, "TOKEN_INVALID", 0},
		"expired": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord", "dev"), "exp", now(-31*time.Second)))
		}, "TOKEN_EXPIRED", 0},
		"expired, by a skew": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord", "dev"), "exp", now(-29*time.Second)))
		}, "", User},
		"no expiry": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord", "dev"), "exp", nil))
		}, "TOKEN_INVALID", 0},
		"expiry, a text": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord", "dev"), "exp", "later"))
		}, "TOKEN_INVALID", 0},
		"endless": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord", "dev"), "exp", 1e300))
		}, "", User},
		"future": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord", "dev"), "nbf", now(31*time.Second)))
		}, "TOKEN_NOT_YET_VALID", 0},
		"future, by a skew": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord", "dev"), "nbf", now(29*time.Second)))
		}, "", User},
		"issued in a future": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord", "dev"), "iat", now(time.Hour)))
		}, "TOKEN_NOT_YET_VALID", 0},
		"no subject": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord", "dev"), "sub", nil))
		}, "TOKEN_INVALID", 0},
		"subject of signs": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord", "dev"), "sub", "a\nb"))
		}, "TOKEN_INVALID", 0},
		"no token": {func(*testing.T, *authtest.Issuer) string { return "x" }, "TOKEN_INVALID", 0},
		"dots":     {func(*testing.T, *authtest.Issuer) string { return "..." }, "TOKEN_INVALID", 0},
		"long": {func(_ *testing.T, i *authtest.Issuer) string {
			return i.Sign(with(i.Claims("executord", "dev"), "x", strings.Repeat("x", 20<<10)))
		}, "TOKEN_INVALID", 0},
	} {
		t.Run(label, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				issuer, l := authtest.NewIssuer(t), &log{}
				o := newTestOIDC(t, issuer, l)
				token := test.token(t, issuer)
				got, err := o.Authenticate(t.Context(), token)
				if fault.ReasonOf(err) != test.reason {
					t.Fatalf("the error is %v, want %q", err, test.reason)
				}
				if test.reason == "" && got != (Principal{Name: name, Role: test.role}) {
					t.Errorf("it is %+v", got)
				}
				if err != nil {
					if fault.KindOf(err) != fault.Unauthenticated || got != (Principal{}) {
						t.Errorf("%+v, %v", got, err)
					}
					// Of a token not even a part gets out.
					for _, part := range strings.Split(token, ".") {
						if len(part) > 8 && strings.Contains(err.Error()+l.String(), part) {
							t.Errorf("it tells of the token: %v\n%s", err, l)
						}
					}
				}
			})
		})
	}
}

// Keys roll over: a new one is found when a token has it, one that was withdrawn stops
// being good, and made-up key names do not have the issuer asked each time.
func TestKeyRollover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		issuer, l := authtest.NewIssuer(t), &log{}
		o := newTestOIDC(t, issuer, l)
		try := func(token string) string {
			t.Helper()
			_, err := o.Authenticate(t.Context(), token)
			return fault.ReasonOf(err)
		}
		claims := issuer.Claims("executord", "dev")
		claims["exp"] = time.Now().Add(24 * time.Hour).Unix()
		first := issuer.Sign(claims)
		if reason := try(first); reason != "" {
			t.Fatal(reason)
		}
		time.Sleep(issuerRetry)
		issuer.Rotate("k2", false)
		second := issuer.Sign(claims)
		if reason := try(second); reason != "" {
			t.Errorf("a new key: %s", reason)
		}
		if reason := try(first); reason != "" {
			t.Errorf("the key before: %s", reason)
		}
		before := issuer.Asked("/keys")
		for range 100 {
			if reason := try(authtest.SignWith(t, jose.ES256, authtest.NewSigningKey(t), "made-up", claims)); reason != "TOKEN_INVALID" {
				t.Fatalf("a made-up key: %s", reason)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if asked := issuer.Asked("/keys") - before; asked > 3 {
			t.Errorf("100 made-up keys within 10 s had the issuer asked %d times", asked)
		}
		issuer.Rotate("k3", true)
		time.Sleep(issuerFresh + issuerRetry)
		third := issuer.Sign(claims)
		if reason := try(third); reason != "" {
			t.Errorf("the third key: %s", reason)
		}
		if reason := try(second); reason != "TOKEN_INVALID" {
			t.Errorf("a key that was withdrawn: %q", reason)
		}
	})
}

// An issuer that is away makes tokens unverifiable, which is no fault of theirs; what it
// said before goes on being right.
func TestIssuerAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		issuer, l := authtest.NewIssuer(t), &log{}
		issuer.SetDown(true)
		o := newTestOIDC(t, issuer, l)
		claims := issuer.Claims("executord", "dev")
		claims["exp"] = time.Now().Add(24 * time.Hour).Unix()
		token := issuer.Sign(claims)
		for range 20 {
			_, err := o.Authenticate(t.Context(), token)
			if e, ok := errors.AsType[*fault.Error](err); !ok || e.Reason != "ISSUER_UNREACHABLE" || e.Kind != fault.Unavailable || e.RetryAfter <= 0 {
				t.Fatalf("%v", err)
			}
		}
		if asked := issuer.Asked("/.well-known/openid-configuration"); asked != 1 {
			t.Errorf("20 calls at once had it asked %d times", asked)
		}
		issuer.SetDown(false)
		time.Sleep(issuerRetry)
		if _, err := o.Authenticate(t.Context(), token); err != nil {
			t.Fatalf("it is back: %v", err)
		}
		issuer.SetDown(true)
		time.Sleep(issuerFresh)
		if _, err := o.Authenticate(t.Context(), token); err != nil {
			t.Errorf("it was there before: %v", err)
		}
		time.Sleep(issuerRetry)
		issuer.Rotate("k2", false)
		if _, err := o.Authenticate(t.Context(), issuer.Sign(claims)); fault.ReasonOf(err) != "ISSUER_UNREACHABLE" {
			t.Errorf("a new key that cannot be read: %v", err)
		}
	})
}

type hanging struct{}

func (hanging) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, context.Cause(r.Context())
}

// An issuer that hangs does not hang a caller who left, nor the others for ever.
func TestIssuerHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		issuer, l := authtest.NewIssuer(t), &log{}
		o := newTestOIDC(t, issuer, l)
		o.frugal.next = hanging{}
		gone := errors.New("gone")
		var calls sync.WaitGroup
		start := time.Now()
		for n := range 3 {
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Duration(n+1)*time.Minute, gone)
			calls.Go(func() {
				defer cancel()
				if _, err := o.Authenticate(ctx, issuer.Sign(issuer.Claims("executord"))); fault.ReasonOf(err) != "ISSUER_UNREACHABLE" {
					t.Errorf("%v", err)
				}
			})
		}
		calls.Wait()
		if took := time.Since(start); took > issuerTime+time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

func TestClaimValues(t *testing.T) {
	claims := map[string]any{
		"roles": []any{"a", 7, "b"}, "role": "c", "realm": map[string]any{"roles": []any{"d"}, "x": 1}, "https://x.example/roles": "e", "null": nil,
	}
	for path, want := range map[string]string{
		"roles": "a b", "role": "c", "realm.roles": "d", "https://x.example/roles": "e",
		"realm": "", "realm.x": "", "realm.roles.x": "", "none": "", "none.x": "", "null": "", "": "", ".": "",
	} {
		if got := strings.Join(values(claims, path), " "); got != want {
			t.Errorf("%q has %q, want %q", path, got, want)
		}
	}
}
