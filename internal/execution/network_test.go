package execution_test

import (
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// A command never runs in a sandbox that has not got the network it was promised: the
// guest of this one has no listeners.
func TestNetworkThatCannotBeHad(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{})
		gateway, err := egress.New(egress.Config{Max: engine.NetworkEgress, Engine: "fake", Capable: map[string][]engine.Network{"fake": {engine.NetworkEgress}}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = gateway.Close() })
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r.config = func(cfg *execution.Config) { cfg.Network = gateway }
		r.open()
		policy := egress.Policy{Mode: engine.NetworkEgress, Rules: []egress.Rule{{Host: "a.example"}}}
		command := execution.Command{Args: []string{"program"}}
		e, err := r.Start(t.Context(), execution.Request{Command: command, Network: policy})
		if err != nil || e.Network.Mode != engine.NetworkEgress {
			t.Fatalf("%+v, %v", e.Network, err)
		}
		e, err = r.Wait(t.Context(), execution.Ref{ID: e.ID})
		if err != nil || e.Result.Reason != execution.StartFailed || e.Result.Evidence["kind"] != "no_network" || !strings.Contains(e.Result.Detail, "proxy") {
			t.Errorf("%+v, %v", e.Result, err)
		}
		if started := r.fake.Started(); len(started) > 0 {
			t.Errorf("started: %q", started)
		}
		e, err = r.Start(t.Context(), execution.Request{Command: command})
		if err != nil {
			t.Fatal(err)
		}
		if e, err = r.Wait(t.Context(), execution.Ref{ID: e.ID}); err != nil || e.Result.Reason != execution.Exited || len(e.Result.Evidence) > 0 {
			t.Errorf("without network: %+v, %v", e.Result, err)
		}
		_, err = r.Start(t.Context(), execution.Request{Command: command, Network: egress.Policy{Mode: engine.NetworkHost}})
		if fault.KindOf(err) != fault.FailedPrecondition || fault.ReasonOf(err) != "NETWORK_NOT_ALLOWED" {
			t.Errorf("host: %v", err)
		}
		_, err = r.Start(t.Context(), execution.Request{Command: command, Session: "s", Network: egress.None()})
		if fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != "NETWORK_WITH_PARENT" {
			t.Errorf("with a session: %v", err)
		}
	})
}
