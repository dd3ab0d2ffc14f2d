package modal

import (
	"context"
	"crypto/rand"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginetest"
	sdk "github.com/modal-labs/modal-client/go"
)

// TestConformanceLive runs the suite on Modal itself, which costs money: `make test-modal`
// asks for it, with MODAL_TOKEN_ID and MODAL_TOKEN_SECRET set.
func TestConformanceLive(t *testing.T) {
	if os.Getenv("EXECUTORD_TEST_MODAL") == "" {
		t.Skip("runs on Modal itself: make test-modal")
	}
	if os.Getenv("MODAL_TOKEN_ID") == "" {
		t.Fatal("MODAL_TOKEN_ID is not set: make a token with `modal token new`, or at https://modal.com/settings/tokens")
	}
	except := exceptions()
	// These are of the fake.
	for _, name := range []string{"the processor limit holds"} {
		delete(except, name)
	}
	const app = "executord-test"
	enginetest.Run(t, func(t *testing.T) enginetest.Place {
		cfg := testConfig(t)
		cfg.App, cfg.ImageCommands, cfg.Lifetime = app, nil, 30*time.Minute
		cfg.Owner = "test-" + strings.ToLower(rand.Text()[:8])
		return enginetest.Place{
			Open:      func(t *testing.T) engine.Engine { return openEngine(t, cfg) },
			KillGuest: func(t *testing.T, id string) { killLiveGuest(t, app, nameOf(cfg.Owner, id)) },
		}
	}, except)
}

// killLiveGuest ends a guest by a program beside it, and waits until Modal tells the end.
func killLiveGuest(t *testing.T, app, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 2*time.Minute, errors.New("the guest does not end"))
	defer cancel()
	client, err := sdk.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	sb, err := client.Sandboxes.FromName(ctx, app, name, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer sb.Detach()
	if _, err := sb.Exec(ctx, []string{"pkill", "-KILL", "-f", "executor-guest.* daemon"}, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := sb.Wait(ctx, nil); err != nil {
		t.Fatal(err)
	}
}
