package daemon

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"time"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/modal"
	"github.com/harvest-run/executord/internal/engine/modal/modaldoctor"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestbinary"
)

const (
	// ownerFile has what tells this executord's sandboxes at Modal from those of another:
	// who loses it does not find them any more.
	ownerFile = "modal-owner.key"
	// modalTime is how long a start waits for Modal to answer, asking every modalRetry.
	modalTime  = time.Minute
	modalRetry = 2 * time.Second
)

// openModal makes the engine modal. One that does not answer is asked again for a while:
// executord may be started together with the network.
func openModal(ctx context.Context, settings *configv1.Config, logger *slog.Logger) (engine.Engine, error) {
	cfg, err := modalConfig(settings, logger)
	if err != nil {
		return nil, err
	}
	until := time.Now().Add(modalTime)
	for {
		made, err := modal.New(ctx, cfg)
		if err == nil {
			return made, nil
		}
		if fault.KindOf(err) != fault.Unavailable || time.Now().After(until) {
			return nil, fmt.Errorf("%w; executord doctor --engine modal says what is missing", err)
		}
		logger.WarnContext(ctx, "Modal does not answer, asking again", "error", err)
		select {
		case <-time.After(modalRetry):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func modalConfig(settings *configv1.Config, logger *slog.Logger) (modal.Config, error) {
	guest, err := guestbinary.Bytes()
	if err != nil {
		return modal.Config{}, err
	}
	key, err := readKey(settings.GetStateDir(), ownerFile)
	if err != nil {
		return modal.Config{}, err
	}
	m := settings.GetModal()
	cfg := modal.Config{
		Owner: "x" + hex.EncodeToString(key[:10]), Guest: guest,
		App: m.GetApp(), Environment: m.GetEnvironment(), Image: m.GetImage(), ImageCommands: modalCommands(m),
		Regions: m.GetRegions(), Runtime: m.GetRuntime(), Defaults: defaultLimits(settings),
		Lifetime: m.GetLifetime().AsDuration(), IdleTimeout: m.GetIdleTimeout().AsDuration(),
		OpenNetwork: m.GetOpenNetwork(), OutboundCIDRs: m.GetOutboundCidrs(),
		VolumeVersion: int(m.GetVolumeVersion()), ExitSnapshots: m.GetExitSnapshots(),
		MaxSandboxes: int(m.GetMaxSandboxes()), MaxCreatesPerMinute: int(m.GetMaxCreatesPerMinute()),
		Logger: logger,
	}
	if cfg.IdleTimeout == 0 {
		cfg.IdleTimeout = -1 // never; 0 would be the default
	}
	return cfg, nil
}

// modalCommands complete the image. Another image than the default one is taken as it is
// if nothing is said.
func modalCommands(m *configv1.Modal) []string {
	if len(m.GetDockerfile()) > 0 {
		return m.GetDockerfile()
	}
	if m.GetImage() == modal.DefaultImage {
		return modal.DefaultImageCommands()
	}
	return []string{}
}

// checkModal looks for what the engine modal needs.
func checkModal(ctx context.Context, settings *configv1.Config) []engine.Capability {
	m := settings.GetModal()
	return modaldoctor.Check(ctx, modaldoctor.Config{
		App: m.GetApp(), Environment: m.GetEnvironment(), Image: m.GetImage(), Commands: modalCommands(m), Secrets: m.GetSecrets(),
	})
}
