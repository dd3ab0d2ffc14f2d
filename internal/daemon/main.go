package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/config"
	"github.com/harvest-run/executord/internal/engine/engines"
	"github.com/harvest-run/executord/internal/lifecycle"
	"github.com/harvest-run/executord/internal/telemetry"
	"github.com/harvest-run/executord/internal/version"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// gcPercent lets the heap grow to three times of what is alive, some tens of MiB.
const gcPercent = 200

// Exit codes besides those of lifecycle.Main.
const (
	exitFailed = 1
	exitUsage  = 2
)

// Main is the program executord: it does what args, without the program's name, ask
// for and returns the exit code.
func Main(ctx context.Context, args, env []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return (&program{env: env, stderr: stderr}).run(ctx, args, stdin, stdout)
}

// run does what args ask for and returns the exit code.
func (p *program) run(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) int {
	root := p.commands()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(p.stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintf(p.stderr, "executord: %v\n", err)
		if p.code == 0 {
			return exitUsage
		}
	}
	return p.code
}

// program is one call of executord.
type program struct {
	env    []string
	stderr io.Writer
	// openEngines is Config's.
	openEngines func(ctx context.Context, settings *configv1.Config, logger *slog.Logger) (engines.Set, error)
	// code is the exit code of the command, once it has run.
	code int
}

func (p *program) commands() *cobra.Command {
	root := &cobra.Command{
		Use:           "executord",
		Short:         "Runs code in isolated sandboxes and streams what it says, without loss",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.DisableDefaultCmd = true
	settings := &cobra.Command{
		Use:   "config",
		Short: "Shows the configuration",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	settings.AddCommand(p.configured("print", "Prints the configuration in force, as a file for --config", p.printConfig))
	root.AddCommand(
		p.configured("serve", "Serves until SIGTERM or SIGINT; a second one ends it at once", p.serve),
		p.configured("doctor", "Says what sandboxes on this host can do, and what is missing", p.doctor),
		settings,
		p.keysCommand(),
		&cobra.Command{
			Use:   "version",
			Short: "Says which executord this is",
			Args:  cobra.NoArgs,
			Run: func(cmd *cobra.Command, _ []string) {
				fmt.Fprintf(cmd.OutOrStdout(), "executord %s (%s)\n", version.String(), version.Go())
			},
		},
	)
	return root
}

// configured makes a command that takes the configuration's flags. These are read by
// the config package and not by cobra, which would forget where a value came from.
func (p *program) configured(name, short string, run func(*cobra.Command, *configv1.Config) error) *cobra.Command {
	cmd := &cobra.Command{
		Use:                name + " [flags]",
		Short:              short,
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			settings, err := p.load(args)
			if errors.Is(err, pflag.ErrHelp) {
				return cmd.Help()
			}
			if err != nil {
				return err
			}
			return run(cmd, settings)
		},
	}
	cmd.SetHelpFunc(func(cmd *cobra.Command, _ []string) {
		fmt.Fprintf(cmd.OutOrStdout(), "%s\n\nUsage:\n  %s [flags]\n\nFlags, also as EXECUTORD_* variables and in a file:\n%s",
			short, cmd.CommandPath(), config.Usage())
	})
	return cmd
}

func (p *program) load(args []string) (*configv1.Config, error) {
	dir, err := os.Getwd()
	if err != nil {
		return nil, fmt.Errorf("find the working directory: %w", err)
	}
	return config.Load(config.Input{Args: args, Env: p.env, UID: os.Geteuid(), WorkingDirectory: dir})
}

func (p *program) printConfig(cmd *cobra.Command, settings *configv1.Config) error {
	text, err := config.Print(settings)
	if err != nil {
		p.code = exitFailed
		return err
	}
	if _, err := cmd.OutOrStdout().Write(text); err != nil {
		p.code = exitFailed
		return fmt.Errorf("write the configuration: %w", err)
	}
	return nil
}

// serve runs a Daemon. Its errors are told by lifecycle.Main.
func (p *program) serve(cmd *cobra.Command, settings *configv1.Config) error {
	// What is alive is small and what passes through is large: with Go's default the
	// collector runs for every few MiB of output. GOGC still wins if it is set.
	if !slices.ContainsFunc(p.env, func(v string) bool { return strings.HasPrefix(v, "GOGC=") }) {
		defer debug.SetGCPercent(debug.SetGCPercent(gcPercent))
	}
	letTimersBeLate(timerSlack)
	// Two places, so that a second signal is not lost while the first is handled.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	main := lifecycle.Main{Name: "executord", Signals: signals, Stderr: p.stderr}
	p.code = main.Run(cmd.Context(), func(ctx context.Context, _ *lifecycle.Group) error {
		d, err := Config{
			Settings: settings, Logger: newLogger(p.stderr, settings.GetLog()), OpenEngines: p.openEngines,
		}.Complete(ctx)
		if err != nil {
			return err
		}
		return d.Run(ctx)
	})
	return nil
}

// newLogger makes the logger that the configuration asks for.
func newLogger(w io.Writer, settings *configv1.Log) *slog.Logger {
	levels := map[configv1.Log_Level]slog.Level{
		configv1.Log_LEVEL_DEBUG: slog.LevelDebug,
		configv1.Log_LEVEL_INFO:  slog.LevelInfo,
		configv1.Log_LEVEL_WARN:  slog.LevelWarn,
		configv1.Log_LEVEL_ERROR: slog.LevelError,
	}
	options := &slog.HandlerOptions{Level: levels[settings.GetLevel()], ReplaceAttr: telemetry.NewRedactor().Attr}
	if settings.GetFormat() == configv1.Log_FORMAT_JSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}
