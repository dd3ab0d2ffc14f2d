package base_test

import (
	"testing"

	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local"
	"github.com/harvest-run/executord/internal/guestbinary/guestbuild"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// house is what sandboxes are made with.
type house struct {
	engine  engine.Engine
	network *egress.Gateway
}

// newHouse makes a local engine whose sandboxes also see a directory of the host.
func newHouse(t *testing.T, extra ...string) house {
	t.Helper()
	guest, err := guestbuild.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	e, err := local.New(t.Context(), local.Config{StateDir: t.TempDir(), Guest: guest, UIDBase: 1879048192, UIDCount: 64, ExtraPaths: extra})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	network, err := egress.New(egress.Config{Max: engine.NetworkEgress, Capable: []engine.Network{engine.NetworkEgress}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { network.Close() })
	return house{e, network}
}
