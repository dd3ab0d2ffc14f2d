package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/store"
	"github.com/spf13/cobra"
)

// keysCommand keeps API keys while no executord runs: the first one has to come from
// somewhere.
func (p *program) keysCommand() *cobra.Command {
	keys := &cobra.Command{
		Use:   "keys",
		Short: "Makes API keys while executord does not run",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	keys.AddCommand(p.createKey())
	return keys
}

func (p *program) createKey() *cobra.Command {
	var name, role, stateDir, file string
	var lifetime time.Duration
	cmd := &cobra.Command{
		Use:   "create",
		Short: "Makes an API key, the first of an admin's, and prints it this one time",
		Long: `Makes an API key and prints it. It is told only here: what is kept is a hash.

This works while no executord has the state directory; one that runs is asked by
executorctl auth keys create.`,
		Args: cobra.NoArgs,
	}
	flags := cmd.Flags()
	flags.StringVar(&name, "owner", "admin", "whose key it is; keys of one owner are one caller")
	flags.StringVar(&role, "role", "admin", "what its caller may do: user, operator or admin")
	flags.DurationVar(&lifetime, "lifetime", 0, "how long it is good; 0 for good")
	flags.StringVar(&stateDir, "state-dir", "", "state directory, as of serve")
	flags.StringVar(&file, "config", "", "YAML file with the configuration, as of serve")
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		var args []string
		if stateDir != "" {
			args = append(args, "--state-dir="+stateDir)
		}
		if file != "" {
			args = append(args, "--config="+file)
		}
		settings, err := p.load(args)
		if err != nil {
			return err
		}
		wanted, err := auth.ParseRole(role)
		if err != nil {
			return err
		}
		p.code = exitFailed
		if err := makePrivate(settings.GetStateDir()); err != nil {
			return err
		}
		st, err := store.Open(cmd.Context(), store.Config{Dir: settings.GetStateDir()})
		if errors.Is(err, store.ErrInUse) {
			return fmt.Errorf("%w; ask that one: executorctl auth keys create", err)
		}
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, st.Close()) }()
		all, err := auth.OpenKeys(cmd.Context(), st, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		key, text, err := all.Create(cmd.Context(), auth.NewKey{Name: name, Role: wanted, Lifetime: lifetime})
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintln(cmd.OutOrStdout(), text); err != nil {
			return fmt.Errorf("write the key: %w", err)
		}
		fmt.Fprintf(cmd.ErrOrStderr(), "executord: API key %s of %s, role %s, in %s; it is not told again\n",
			key.ID, key.Principal().Name, key.Role, settings.GetStateDir())
		p.code = 0
		return nil
	}
	return cmd
}
