package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/harvest-run/executord/internal/fault"
)

const (
	// issuerTime bounds a request to the issuer.
	issuerTime = 10 * time.Second
	// issuerRetry lies between two attempts to reach an issuer that does not answer, and
	// between two readings of its keys because of tokens with an unknown key.
	issuerRetry = 5 * time.Second
	// issuerFresh is how long keys are used until they are read again, so that one that
	// the issuer has withdrawn stops being good.
	issuerFresh = 10 * time.Minute
	// maxToken bounds a token in bytes.
	maxToken = 16 << 10
)

// OIDCConfig says whose tokens are taken, and for what.
type OIDCConfig struct {
	// Issuer is the issuer's URL, exactly as in its tokens.
	Issuer string
	// Audience must be one of the token's.
	Audience string
	// RoleClaim is the claim with the roles, a string or a list of strings; a dot leads
	// into an object.
	RoleClaim string
	Roles     Roles
	// Leeway is by how much the issuer's clock may differ.
	Leeway time.Duration
	// Algorithms are those with which tokens may be signed.
	Algorithms []string
	Logger     *slog.Logger
	// Transport reaches the issuer; nil for http.DefaultTransport's like.
	Transport http.RoundTripper
}

// OIDC checks tokens of one OpenID Connect issuer. The issuer is asked when the first
// token comes, and again when its answer has got old or a token is signed with a key
// that is not known.
type OIDC struct {
	cfg    OIDCConfig
	client *http.Client
	frugal *frugal

	work sync.WaitGroup // the present question

	mu       sync.Mutex
	verifier *oidc.IDTokenVerifier // nil until the issuer has answered
	due      time.Time             // when to ask the issuer again
	asking   chan struct{}         // closed when the present question is answered; nil if there is none
}

// NewOIDC makes an OIDC. It does not ask the issuer yet.
func NewOIDC(cfg OIDCConfig) *OIDC {
	transport := cfg.Transport
	if transport == nil {
		transport = &http.Transport{Proxy: http.ProxyFromEnvironment, IdleConnTimeout: time.Minute, ForceAttemptHTTP2: true}
	}
	f := &frugal{next: transport, every: issuerRetry, answers: make(map[string]*answer)}
	return &OIDC{cfg: cfg, frugal: f, client: &http.Client{Transport: f, Timeout: issuerTime}}
}

// Close waits for the present question to the issuer, which takes no longer than
// issuerTime, and lets go of the connections to it.
func (o *OIDC) Close() {
	o.work.Wait()
	o.client.CloseIdleConnections()
}

// Authenticate returns whom a token stands for. Faults: Unauthenticated (TOKEN_INVALID,
// TOKEN_EXPIRED, TOKEN_NOT_YET_VALID), Unavailable (ISSUER_UNREACHABLE).
func (o *OIDC) Authenticate(ctx context.Context, token string) (Principal, error) {
	if len(token) > maxToken {
		return Principal{}, errToken()
	}
	verifier, err := o.current(ctx)
	if err != nil {
		return Principal{}, err
	}
	// Its errors may quote the token, and do not have what they were caused by in their
	// chain.
	verified, err := verifier.Verify(ctx, token)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return Principal{}, context.Cause(ctx)
	case o.frugal.failing():
		return Principal{}, errUnreachable()
	default:
		return Principal{}, errToken()
	}
	var claims struct {
		Expiry    *numericDate `json:"exp"`
		NotBefore *numericDate `json:"nbf"`
		IssuedAt  *numericDate `json:"iat"`
	}
	var all map[string]any
	if verified.Claims(&claims) != nil || verified.Claims(&all) != nil || claims.Expiry == nil {
		return Principal{}, errToken()
	}
	now := time.Now()
	switch {
	case !now.Add(-o.cfg.Leeway).Before(claims.Expiry.time()):
		return Principal{}, refuse("TOKEN_EXPIRED", "the token has expired")
	case claims.NotBefore != nil && now.Add(o.cfg.Leeway).Before(claims.NotBefore.time()),
		claims.IssuedAt != nil && now.Add(o.cfg.Leeway).Before(claims.IssuedAt.time()):
		return Principal{}, refuse("TOKEN_NOT_YET_VALID", "the token is not valid yet")
	}
	if !isName(verified.Subject) {
		return Principal{}, errToken()
	}
	return Principal{
		Name: "oidc:" + o.cfg.Issuer + "#" + verified.Subject,
		Role: o.cfg.Roles.of(values(all, o.cfg.RoleClaim)...),
	}, nil
}

func errToken() error { return refuse("TOKEN_INVALID", "the token is not one that this server takes") }

func errUnreachable() error {
	e := fault.New(fault.Unavailable, "ISSUER_UNREACHABLE", "the issuer of tokens cannot be asked, so the token cannot be checked")
	e.RetryAfter = issuerRetry
	return e
}

// current returns what verifies tokens, asking the issuer if that is due. While an issuer
// that answered before does not answer now, what it said then goes on being right.
func (o *OIDC) current(ctx context.Context) (*oidc.IDTokenVerifier, error) {
	for {
		o.mu.Lock()
		switch {
		case time.Now().Before(o.due) && o.verifier != nil:
			defer o.mu.Unlock()
			return o.verifier, nil
		case time.Now().Before(o.due):
			o.mu.Unlock()
			return nil, errUnreachable()
		case o.asking == nil:
			o.asking = make(chan struct{})
			// Beside this call, which may leave, or go on with what is known.
			o.work.Go(func() { o.ask(context.WithoutCancel(ctx)) })
		}
		asking, old := o.asking, o.verifier
		o.mu.Unlock()
		if old != nil {
			return old, nil
		}
		select {
		case <-asking:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// ask asks the issuer where its keys are.
func (o *OIDC) ask(ctx context.Context) {
	// go-oidc keeps this context for its later requests, which have the client's timeout.
	forever := oidc.ClientContext(ctx, o.client)
	provider, err := oidc.NewProvider(forever, o.cfg.Issuer)
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil {
		o.due = time.Now().Add(issuerRetry)
		o.cfg.Logger.WarnContext(ctx, "ask the issuer of tokens", "issuer", o.cfg.Issuer, "error", err)
	} else {
		o.due = time.Now().Add(issuerFresh)
		// go-oidc's checks of times have a leeway of their own; ours are in Authenticate. A
		// verifier of its own each time: it begins without keys.
		o.verifier = provider.VerifierContext(forever, &oidc.Config{
			ClientID: o.cfg.Audience, SupportedSigningAlgs: o.cfg.Algorithms, SkipExpiryCheck: true,
		})
	}
	close(o.asking)
	o.asking = nil
}

// numericDate is a time in a token: seconds, possibly with a fraction.
type numericDate float64

func (n numericDate) time() time.Time {
	seconds, fraction := math.Modf(float64(n))
	// What does not fit into a time is as far away as can be.
	seconds = min(max(seconds, 0), 1<<40)
	return time.Unix(int64(seconds), int64(fraction*1e9))
}

// UnmarshalJSON refuses what is no number: null would be no time at all.
func (n *numericDate) UnmarshalJSON(b []byte) error {
	var f float64
	if string(b) == "null" {
		return errors.New("null is no time")
	}
	if err := json.Unmarshal(b, &f); err != nil {
		return err
	}
	*n = numericDate(f)
	return nil
}

// values are the strings of a claim: one, or a list.
func values(claims map[string]any, path string) []string {
	var at any = claims
	for _, step := range strings.Split(path, ".") {
		object, ok := at.(map[string]any)
		if !ok {
			return nil
		}
		// A name with dots in it, as some issuers have, is one step.
		if whole, ok := object[path]; ok {
			at = whole
			break
		}
		at = object[step]
	}
	switch found := at.(type) {
	case string:
		return []string{found}
	case []any:
		var all []string
		for _, one := range found {
			if s, ok := one.(string); ok {
				all = append(all, s)
			}
		}
		return all
	}
	return nil
}

// frugal asks one URL only now and then and answers in between with what came: anybody
// can make up tokens with unknown keys, and each would have the keys read again.
type frugal struct {
	next  http.RoundTripper
	every time.Duration

	mu      sync.Mutex
	answers map[string]*answer
}

type answer struct {
	at     time.Time
	status int
	header http.Header
	body   []byte
	err    error
}

// maxAnswer bounds what an issuer may answer, in bytes.
const maxAnswer = 1 << 20

// RoundTrip implements http.RoundTripper.
func (f *frugal) RoundTrip(r *http.Request) (*http.Response, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := r.URL.String()
	a := f.answers[key]
	if a == nil || time.Since(a.at) >= f.every {
		a = f.ask(r)
		// An issuer has two URLs; one that says another one each time is not kept.
		if len(f.answers) >= 8 {
			clear(f.answers)
		}
		f.answers[key] = a
	}
	if a.err != nil {
		return nil, a.err
	}
	return a.response(r), nil
}

func (f *frugal) ask(r *http.Request) *answer {
	a := &answer{at: time.Now()}
	response, err := f.next.RoundTrip(r)
	if err != nil {
		a.err = err
		return a
	}
	defer response.Body.Close()
	if a.body, err = readAtMost(response.Body, maxAnswer); err != nil {
		a.err = err
		return a
	}
	a.status, a.header = response.StatusCode, response.Header
	if a.status/100 == 5 {
		a.err = fmt.Errorf("status %d", a.status)
	}
	return a
}

// failing says whether something that was asked for lately could not be had.
func (f *frugal) failing() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.answers {
		if a.err != nil && time.Since(a.at) < f.every {
			return true
		}
	}
	return false
}
