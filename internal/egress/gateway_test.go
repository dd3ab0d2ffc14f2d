package egress

import (
	"context"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

func TestDecide(t *testing.T) {
	all := map[string][]engine.Network{"fake": {engine.NetworkNone, engine.NetworkEgress, engine.NetworkHost}, "other": {engine.NetworkNone}}
	some := egressTo("a.example")
	for name, c := range map[string]struct {
		cfg    Config
		asked  Policy
		want   engine.Network
		reason string
	}{
		"nothing said":             {Config{Max: engine.NetworkEgress, Engine: "fake", Capable: all}, Policy{}, engine.NetworkNone, ""},
		"none":                     {Config{Max: engine.NetworkEgress, Engine: "fake", Capable: all}, None(), engine.NetworkNone, ""},
		"egress":                   {Config{Max: engine.NetworkEgress, Engine: "fake", Capable: all}, some, engine.NetworkEgress, ""},
		"host":                     {Config{Max: engine.NetworkHost, Engine: "fake", Capable: all}, Policy{Mode: engine.NetworkHost}, engine.NetworkHost, ""},
		"another default":          {Config{Max: engine.NetworkEgress, Engine: "fake", Capable: all, Default: some}, Policy{}, engine.NetworkEgress, ""},
		"none against the default": {Config{Max: engine.NetworkEgress, Engine: "fake", Capable: all, Default: some}, None(), engine.NetworkNone, ""},
		"host, not allowed":        {Config{Max: engine.NetworkEgress, Engine: "fake", Capable: all}, Policy{Mode: engine.NetworkHost}, "", "NETWORK_NOT_ALLOWED"},
		"egress, not allowed":      {Config{Max: engine.NetworkNone, Engine: "fake", Capable: all}, some, "", "NETWORK_NOT_ALLOWED"},
		"nothing is allowed":       {Config{}, some, "", "NETWORK_NOT_ALLOWED"},
		"not of this engine":       {Config{Max: engine.NetworkHost, Capable: map[string][]engine.Network{"fake": all["fake"][:2]}}, Policy{Mode: engine.NetworkHost}, "", "NETWORK_NOT_AVAILABLE"},
		"not valid":                {Config{Max: engine.NetworkHost, Engine: "fake", Capable: all}, egressTo("A"), "", "NETWORK_RULE"},
	} {
		t.Run(name, func(t *testing.T) {
			g, err := New(c.cfg)
			if err != nil {
				t.Fatal(err)
			}
			got, err := g.Decide("fake", c.asked)
			if got.Mode != c.want || fault.ReasonOf(err) != c.reason {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
	if _, err := New(Config{Default: egressTo("A"), Max: engine.NetworkEgress, Engine: "fake", Capable: all}); err == nil {
		t.Error("a default that is not valid is accepted")
	}
	if _, err := New(Config{Default: some, Engine: "fake", Capable: all}); err == nil {
		t.Error("a default that is not allowed is accepted")
	}
	if _, err := New(Config{Default: some, Max: engine.NetworkEgress, Engine: "other", Capable: all}); fault.ReasonOf(err) != "NETWORK_NOT_AVAILABLE" {
		t.Errorf("a default that the default engine does not have: %v", err)
	}
	// Each engine has its own.
	g, err := New(Config{Max: engine.NetworkEgress, Engine: "fake", Capable: all})
	if err != nil {
		t.Fatal(err)
	}
	for on, want := range map[string]string{"fake": "", "other": "NETWORK_NOT_AVAILABLE", "unknown": "NETWORK_NOT_AVAILABLE"} {
		if _, err := g.Decide(on, some); fault.ReasonOf(err) != want {
			t.Errorf("egress on %s: %v", on, err)
		}
	}
}

// Without a Gateway there is no network, and nobody has to ask whether there is one.
func TestNoGateway(t *testing.T) {
	var g *Gateway
	if got, err := g.Decide("fake", Policy{}); err != nil || got.Mode != engine.NetworkNone {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := g.Decide("fake", egressTo("a.example")); fault.ReasonOf(err) != "NETWORK_NOT_ALLOWED" {
		t.Error(err)
	}
	p, err := g.Open(t.Context(), nil, None())
	if p != nil || err != nil || p.Policy().Mode != engine.NetworkNone || p.Counts() != (Counts{}) || g.Of("x") != nil {
		t.Errorf("%v, %v", p, err)
	}
	if env := p.Environment([]string{"A=b"}); !slices.Equal(env, []string{"A=b"}) {
		t.Errorf("%q", env)
	}
}

// box is a sandbox that nobody can dial.
type box struct{ done chan struct{} }

func (box) ID() string              { return "box" }
func (b box) Done() <-chan struct{} { return b.done }
func (box) Dial(context.Context) (net.Conn, error) {
	return nil, &net.OpError{Op: "dial", Err: net.ErrClosed}
}

// A Proxy lives as long as its sandbox, and no longer than the Gateway.
func TestLifeOfAProxy(t *testing.T) {
	cfg := Config{Max: engine.NetworkHost, Capable: map[string][]engine.Network{"fake": {engine.NetworkEgress, engine.NetworkHost}}}
	for _, policy := range []Policy{egressTo("a.example"), {Mode: engine.NetworkHost}} {
		g, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		sb := box{make(chan struct{})}
		first, err := g.Resume(sb, policy)
		if err != nil || first.Policy().Mode != policy.Mode || g.Of("box") != first {
			t.Errorf("%v, %v", first, err)
		}
		if again, err := g.Resume(sb, policy); again != first || err != nil {
			t.Errorf("a second one: %v, %v", again, err)
		}
		env := first.Environment([]string{"HTTPS_PROXY=mine"})
		if has := slices.Contains(env, "https_proxy=http://127.0.0.1:3128"); has != (policy.Mode == engine.NetworkEgress) || env[0] != "HTTPS_PROXY=mine" ||
			strings.Contains(strings.Join(env[1:], " "), " HTTPS_PROXY=") {
			t.Errorf("%q", env)
		}
		close(sb.done)
		g.work.Wait()
		if g.Of("box") != nil {
			t.Error("it is there after its sandbox has ended")
		}
		sb = box{make(chan struct{})}
		if _, err := g.Resume(sb, policy); err != nil {
			t.Error(err)
		}
		if err := g.Close(); err != nil {
			t.Error(err)
		}
		if _, err := g.Resume(sb, policy); err == nil {
			t.Error("a Gateway that is closed opens")
		}
	}
	g, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if p, err := g.Open(t.Context(), box{make(chan struct{})}, egressTo("a.example")); err == nil || g.Of("box") != nil {
		t.Errorf("a sandbox that cannot be reached: %v, %v", p, err)
	}
	_ = g.Close()
}
