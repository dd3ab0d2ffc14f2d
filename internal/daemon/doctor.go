package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/local"
	"github.com/harvest-run/executord/internal/engine/modal/modaldoctor"
	"github.com/spf13/cobra"
)

// essential are the capabilities without which code of strangers cannot be run as
// promised; executorctl doctor has the same. For the rest the engine has other ways,
// or refuses what needs them.
func essential() []string {
	return []string{"sandbox", "limit.memory", "limit.pids", "network.none", "language.python"}
}

// doctor says what the engines can do from this host, without a server. The exit code
// is 1 if something essential is missing.
func (p *program) doctor(cmd *cobra.Command, settings *configv1.Config) error {
	// A trial that is interrupted still clears up.
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var found []engine.Capability
	var missing []string
	for _, name := range engineNames(settings) {
		if name != localName {
			checked := checkModal(ctx, settings)
			missing = append(missing, lacking(checked, modaldoctor.Essential)...)
			found = append(found, checked...)
			continue
		}
		if settings.GetEngine() != localName {
			continue // who asks for another one wants to know of that
		}
		probed, err := probe(ctx, settings)
		if err != nil {
			p.code = exitFailed
			return err
		}
		missing = append(missing, lacking(probed, func(name string) bool { return slices.Contains(essential(), name) })...)
		found = append(found, probed...)
	}
	if err := writeCapabilities(cmd.OutOrStdout(), found); err != nil {
		p.code = exitFailed
		return fmt.Errorf("write what was found: %w", err)
	}
	if len(missing) > 0 {
		p.code = exitFailed
		return fmt.Errorf("essential and missing: %s", strings.Join(missing, ", "))
	}
	return nil
}

// lacking are the essential ones of what is not there.
func lacking(found []engine.Capability, essential func(name string) bool) []string {
	var missing []string
	for _, c := range found {
		if !c.Available && essential(c.Name) {
			missing = append(missing, c.Name)
		}
	}
	return missing
}

// probe tries the engine in a directory of its own below the state directory: on the
// same file system, and apart from an executord that may be using it.
func probe(ctx context.Context, settings *configv1.Config) (_ []engine.Capability, err error) {
	cfg, err := localConfig(settings, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	if err := makePrivate(settings.GetStateDir()); err != nil {
		return nil, err
	}
	if cfg.StateDir, err = os.MkdirTemp(settings.GetStateDir(), "doctor-"); err != nil {
		return nil, fmt.Errorf("make a directory to try sandboxes in: %w", err)
	}
	defer func() {
		if removed := os.RemoveAll(cfg.StateDir); removed != nil && err == nil {
			err = fmt.Errorf("remove the directory of the trial: %w", removed)
		}
	}()
	return local.Probe(ctx, cfg), nil
}

// writeCapabilities writes a line for each capability, and one for its remedy.
func writeCapabilities(w io.Writer, all []engine.Capability) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, c := range all {
		state := "ok"
		if !c.Available {
			state = "missing"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\n", state, c.Name, c.Detail)
		if !c.Available && c.Remedy != "" {
			fmt.Fprintf(table, "\t\tto get it: %s\n", c.Remedy)
		}
	}
	return table.Flush()
}
