package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/engine/local"
	"github.com/harvest-run/executord/internal/guestbinary"
)

// Names of engines in the configuration.
const (
	// localName is that of the engine whose sandboxes see the host's /usr.
	localName = "local"
	modalName = "modal"
)

// openEngines makes the engines that the configuration names, the default one first. On
// an error none stays open.
func openEngines(ctx context.Context, settings *configv1.Config, logger *slog.Logger) (_ engines.Set, err error) {
	var opened engines.Set
	defer func() {
		if err == nil {
			return
		}
		for _, e := range opened {
			err = errors.Join(err, e.Close())
		}
	}()
	for _, name := range engineNames(settings) {
		open := openLocal
		if name == modalName {
			open = openModal
		}
		e, err := open(ctx, settings, logger)
		if err != nil {
			return nil, fmt.Errorf("prepare the engine %s: %w", name, err)
		}
		opened = append(opened, e)
	}
	return opened, nil
}

// engineNames are the engines that the configuration names, the default one first.
func engineNames(settings *configv1.Config) []string {
	names := []string{settings.GetEngine()}
	if settings.GetLocal().GetEnabled() && names[0] != localName {
		names = append(names, localName)
	}
	if settings.GetModal().GetEnabled() && names[0] != modalName {
		names = append(names, modalName)
	}
	return names
}

// openLocal makes the local engine.
func openLocal(ctx context.Context, settings *configv1.Config, logger *slog.Logger) (engine.Engine, error) {
	cfg, err := localConfig(settings, logger)
	if err != nil {
		return nil, err
	}
	return local.New(ctx, cfg)
}

func localConfig(settings *configv1.Config, logger *slog.Logger) (local.Config, error) {
	guest, err := guestbinary.Bytes()
	if err != nil {
		return local.Config{}, err
	}
	return local.Config{
		StateDir:     settings.GetStateDir(),
		Guest:        guest,
		UIDBase:      settings.GetLocal().GetUidBase(),
		UIDCount:     settings.GetLocal().GetUidCount(),
		CgroupParent: settings.GetLocal().GetCgroupParent(),
		Defaults:     defaultLimits(settings),
		ExtraPaths:   hostPaths(settings),
		Blank:        int(settings.GetLocal().GetBlankGuests()),
		Logger:       logger,
	}, nil
}

// defaultLimits are those of a sandbox that is asked for without, on any engine.
func defaultLimits(settings *configv1.Config) engine.Limits {
	limits := settings.GetLimits()
	return engine.Limits{
		MemoryBytes: limits.GetMemoryBytes(), CPUMillis: limits.GetCpuMillis(), PIDs: limits.GetPids(),
		DiskBytes: limits.GetDiskBytes(), OpenFiles: limits.GetOpenFiles(),
	}
}
