// Package cli is executorctl: it turns arguments into calls of package client and
// what comes back into text. Data goes to stdout, talk to stderr. It knows no gRPC
// and nothing of the server, and it touches nothing of its process that Main was
// not given, so that tests run whole commands in process. Each command group has a
// file of its own. The goroutines are those of a command that follows an execution
// and end with it.
package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/harvest-run/executord/client"
)

// Exit codes beside those of the remote programs.
const (
	exitFailure = 1   // a command that follows nothing failed
	exitUsage   = 2   // the command line was wrong
	exitTimeout = 124 // the remote program timed out
	exitOwn     = 125 // a command that passes on the remote exit code failed itself
	exitNoExec  = 126 // the remote program could not be executed
	exitAbsent  = 127 // the remote program was not found
	exitSignal  = 128 // plus n: signal n ended the remote program
	exitLeft    = 130 // cancelled, or left by Ctrl-C
	exitOOM     = 137 // the remote program ran out of memory
)

// Signals subscribes to signals: it returns the channel on which they come and what
// ends the subscription. What nobody subscribes to is to act in the system's own way:
// Ctrl-C ends a command.
type Signals func(wanted ...os.Signal) (<-chan os.Signal, func())

// Main runs executorctl with arguments (without the program's name) and an
// environment of K=V entries, and returns its exit code. signals may be nil. It
// returns soon after ctx ends.
func Main(ctx context.Context, args, env []string, stdin io.Reader, stdout, stderr io.Writer, signals Signals) int {
	if signals == nil {
		signals = func(...os.Signal) (<-chan os.Signal, func()) { return nil, func() {} }
	}
	a := &app{
		env: environment(env), stdin: stdin, stdout: stdout, stderr: &shared{w: stderr}, signals: signals,
	}
	root := a.root()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(a.stderr)
	cmd, err := root.ExecuteContextC(ctx)
	return a.exit(cmd, err)
}

// app is one run of executorctl.
type app struct {
	env     map[string]string
	stdin   io.Reader
	stdout  io.Writer
	stderr  io.Writer
	signals Signals
	// raw is set while the terminal does nothing by itself: a line has to be ended by
	// more than a newline.
	raw atomic.Bool

	address   string
	context   string
	security  security
	output    string
	maxOutage time.Duration
	// format is the output format that applies: output, or the command's default.
	format string
	// understood is set once the command line is, and a command runs.
	understood bool
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "executorctl",
		Short: "Run code in isolated sandboxes and follow its output",
		Long: `executorctl runs code in isolated sandboxes of an executord and follows its output.

Data goes to stdout, everything else to stderr. run, exec, watch and wait exit with
the exit code of the remote program:

  0-255  what the program exited with
  124    it timed out
  125    executorctl or executord failed, or the sandbox was lost
  126    it could not be executed
  127    it was not found
  128+n  signal n ended it
  130    it was cancelled, or left by Ctrl-C (0 if left by ~.)
  137    it ran out of memory

All other commands exit with 0, 1 for a failure. 2 is a wrong command line. Each flag
that all commands have may also be given in the environment, as EXECUTOR_ADDRESS,
EXECUTOR_OUTPUT, EXECUTOR_MAX_OUTAGE, EXECUTOR_TLS_CA and so on; EXECUTOR_API_KEY may
hold the API key itself.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return subcommandMissing(cmd, args)
			}
			return cmd.Help()
		},
	}
	flags := root.PersistentFlags()
	flags.StringVar(&a.address, "address", client.DefaultAddress, "where executord is: host:port or unix:PATH")
	flags.StringVarP(&a.output, "output", "o", "", "output format; which ones there are depends on the command")
	flags.DurationVar(&a.maxOutage, "max-outage", client.DefaultMaxOutage, "how long to go on trying when the connection is lost")
	flags.StringVar(&a.context, contextFlag, "", "name of the server, as executorctl context keeps it (default the one in use)")
	a.security.bind(flags)
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		a.understood = true
		return a.settle(cmd)
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usagef("%s", err) })
	root.AddCommand(
		a.runCommand(), a.execCommand(), a.executionsCommand(), a.sessionCommand(), a.promptCommand(), a.turnsCommand(), a.interactionsCommand(), a.shellCommand(), a.imageCommand(), a.adminCommand(), a.authCommand(), a.contextCommand(), a.doctorCommand(), a.versionCommand(),
	)
	return root
}

// settle takes the global flags that were not given from the environment and
// chooses the output format.
func (a *app) settle(cmd *cobra.Command) error {
	asked := cmd.Flags().Changed("output")
	var err error
	cmd.Root().PersistentFlags().VisitAll(func(f *pflag.Flag) {
		name := variable(f.Name)
		value := a.env[name]
		if f.Changed || value == "" || err != nil {
			return
		}
		if e := f.Value.Set(value); e != nil {
			err = usagef("%s=%q: %s", name, value, e)
		}
	})
	if err != nil {
		return err
	}
	var formats []string
	if list := cmd.Annotations[formatsKey]; list != "" {
		formats = strings.Split(list, ",")
		a.format = formats[0]
	}
	switch {
	case slices.Contains(formats, a.output):
		a.format = a.output
	case !asked:
		// The environment speaks to all commands, and not all know every format.
	case len(formats) == 0:
		return usagef("%s has no output formats", cmd.CommandPath())
	default:
		return usagef("output format %q: must be one of %s", a.output, strings.Join(formats, ", "))
	}
	return nil
}

// formatsKey annotates a command with its output formats, the default one first.
const formatsKey = "formats"

// formats says which output formats a command has, the default one first.
func formats(cmd *cobra.Command, names ...string) *cobra.Command {
	cmd.Annotations = map[string]string{formatsKey: strings.Join(names, ",")}
	if f := strings.Join(names, "|"); cmd.Long == "" {
		cmd.Long = cmd.Short + ".\n\nOutput formats: " + f + "."
	} else {
		cmd.Long += "\n\nOutput formats: " + f + "."
	}
	return cmd
}

// group is a command that only has subcommands.
func group(use, short string, aliases []string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Aliases: aliases, Args: cobra.ArbitraryArgs, RunE: subcommandMissing}
	cmd.AddCommand(commands...)
	return cmd
}

func subcommandMissing(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		text := fmt.Sprintf("unknown command %q for %s", args[0], cmd.CommandPath())
		cmd.SuggestionsMinimumDistance = 2
		if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
			text += "; is it " + strings.Join(like, " or ") + "?"
		}
		return usagef("%s", text)
	}
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			names = append(names, c.Name())
		}
	}
	return usagef("%s needs a command: %s", cmd.CommandPath(), strings.Join(names, ", "))
}

// call makes a command's function of one that needs the server.
func (a *app) call(do func(ctx context.Context, c *client.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		key, err := a.useContext(cmd)
		if err != nil {
			return err
		}
		cfg := client.Config{Address: a.address, MaxOutage: a.maxOutage, OnOutage: a.tellOutage}
		if err := a.security.apply(&cfg, cmd.Flags().Changed(keyFileFlag), key); err != nil {
			return err
		}
		c, err := client.Dial(cfg)
		if err != nil {
			return usagef("%s", err)
		}
		defer func() { _ = c.Close() }()
		return do(cmd.Context(), c, args)
	}
}

// tellOutage says that a connection is lost, once it does not come back at once.
func (a *app) tellOutage(o client.Outage) {
	if o.Attempt == 2 {
		a.say("no connection (%s); trying for up to %s", client.Message(o.Err), a.maxOutage)
	}
}

// say writes a line to stderr.
func (a *app) say(format string, args ...any) {
	end := "\n"
	if a.raw.Load() {
		end = "\r\n"
	}
	fmt.Fprint(a.stderr, "executorctl: "+printable(fmt.Sprintf(format, args...))+end)
}

// UserVar and HostVar are where Main's caller may say whose process this is, for
// where the environment itself does not.
const (
	UserVar = "EXECUTORCTL_USER"
	HostVar = "EXECUTORCTL_HOST"
)

// who names the caller for the records of the server.
func (a *app) who(doing string) string {
	first := func(names ...string) string {
		for _, name := range names {
			if v := a.env[name]; v != "" {
				return v
			}
		}
		return "unknown"
	}
	name := fmt.Sprintf("%.100s@%.100s %s", first("USER", "LOGNAME", UserVar), first(HostVar, "HOSTNAME"), doing)
	return strings.ToValidUTF8(name, "?")
}

// environment reads K=V entries; the last of a name wins.
func environment(entries []string) map[string]string {
	env := make(map[string]string, len(entries))
	for _, entry := range entries {
		if name, value, ok := strings.Cut(entry, "="); ok {
			env[name] = value
		}
	}
	return env
}

// shared is a writer for several goroutines: what a program writes and what
// executorctl has to say do not cut each other's lines in two.
type shared struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *shared) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(p)
}
