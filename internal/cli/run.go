package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// maxSource is the most bytes of code that the API takes.
const maxSource = 1 << 20

// commandFlags are those of run and exec.
type commandFlags struct {
	timeout  value[time.Duration]
	grace    value[time.Duration]
	retain   value[int64]
	policies policyFlags
	env      []string
	labels   []string
	workdir  string
	detach   bool
	stdin    bool
	tty      bool
}

func (f *commandFlags) bind(cmd *cobra.Command) {
	f.timeout = value[time.Duration]{kind: "duration", parse: parseDuration}
	f.grace = value[time.Duration]{kind: "duration", parse: parseDuration}
	f.retain = value[int64]{kind: "size", parse: parseSize}
	flags := cmd.Flags()
	flags.Var(&f.timeout, "timeout", "end the program after this time (default 30m)")
	flags.Var(&f.grace, "grace", "time between TERM and KILL when it is ended (default 5s)")
	flags.StringArrayVarP(&f.env, "env", "e", nil, "set a variable: K=V, or K to take its value from here; may be repeated")
	flags.StringVar(&f.workdir, "workdir", "", "directory in which it starts (default /workspace)")
	flags.Var(&f.retain, "retain", "how much of its output the server keeps, such as 64MiB")
	f.policies.bind(cmd)
	flags.StringArrayVar(&f.labels, "label", nil, "label it, NAME=VALUE; may be repeated")
	flags.BoolVarP(&f.stdin, "interactive", "i", false, "forward stdin to the program")
	flags.BoolVarP(&f.tty, "tty", "t", false, "run the program on a terminal; with -i, this one")
	flags.BoolVar(&f.detach, "detach", false, "print the execution's name and do not wait for its end")
}

// fill puts what the flags say into a request.
func (f *commandFlags) fill(r *executorv1.ExecuteRequest, env map[string]string) (err error) {
	if r.Command.Env, err = parseEnv(f.env, env); err != nil {
		return err
	}
	if r.Labels, err = parseLabels(f.labels); err != nil {
		return err
	}
	r.Command.WorkingDirectory = f.workdir
	r.Command.Stdin = f.stdin
	if f.timeout.given {
		r.Command.Timeout = durationpb.New(f.timeout.v)
	}
	if f.grace.given {
		r.Command.GracePeriod = durationpb.New(f.grace.v)
	}
	if f.retain.given {
		r.OutputPolicy = &executorv1.OutputPolicy{RetainedBytes: f.retain.v}
	}
	f.policies.fill(r)
	return nil
}

// limitFlags are those of everything that makes a sandbox.
type limitFlags struct {
	memory, pids, cpu, disk, openFiles value[int64]
}

func (f *limitFlags) bind(cmd *cobra.Command) {
	f.memory = value[int64]{kind: "size", parse: parseSize}
	f.pids = value[int64]{kind: "n", parse: parseCount}
	f.cpu = value[int64]{kind: "cores", parse: parseCores}
	f.disk = value[int64]{kind: "size", parse: parseSize}
	f.openFiles = value[int64]{kind: "n", parse: parseCount}
	flags := cmd.Flags()
	flags.Var(&f.memory, "limit-memory", "limit of the sandbox's memory, such as 512MiB")
	flags.Var(&f.pids, "limit-pids", "limit of the sandbox's processes and threads")
	flags.Var(&f.cpu, "limit-cpu", "limit of the sandbox's processor time, in cores, such as 0.5")
	flags.Var(&f.disk, "limit-disk", "limit of what the sandbox writes to disk, such as 1GiB")
	flags.Var(&f.openFiles, "limit-open-files", "limit of the open files of each process in the sandbox")
}

// limits are those that were given; nil if none.
func (f *limitFlags) limits() *executorv1.Limits {
	if !f.memory.given && !f.pids.given && !f.cpu.given && !f.disk.given && !f.openFiles.given {
		return nil
	}
	return &executorv1.Limits{
		MemoryBytes: f.memory.v, Pids: f.pids.v, CpuMillis: f.cpu.v, DiskBytes: f.disk.v, OpenFiles: f.openFiles.v,
	}
}

func (a *app) runCommand() *cobra.Command {
	var (
		flags    commandFlags
		limits   limitFlags
		network  networkFlags
		place    placementFlags
		language value[executorv1.Language]
		file     string
		session  string
	)
	cmd := formats(&cobra.Command{
		Use:   "run [flags] (CODE | --file FILE | - | -- ARGV...)",
		Short: "Run code or a program in a fresh sandbox and follow it to its end",
		Long: `Run code or a program in a fresh sandbox and follow it to its end.

CODE is Python, or what --lang says; "-" reads it from stdin. The language of a FILE
is known from its name (.py .sh .js .mjs .cjs). ARGV is run as it is: no shell looks
at it. What the program writes to stdout and stderr comes out as it comes, and its
exit code is that of executorctl.

Ctrl-C cancels the execution and shows its end; a second one leaves it. With -i and -t
on a terminal keys go to the program as they are, Ctrl-C included; at the start of a
line ~. leaves the execution, which goes on, and ~~ stands for ~.`,
		Example: `  executorctl run 'print("Hello from sandbox")'
  executorctl run --lang bash --timeout 30s 'make test'
  executorctl run --file build.js -e NODE_ENV=test --limit-memory 1GiB
  executorctl run -i -- wc -l < file
  executorctl run -it -- bash
  executorctl run -o json -- ls -l /`,
		Args: cobra.ArbitraryArgs,
	}, "raw", "json", "jsonl")
	language = value[executorv1.Language]{kind: "language", parse: parseLanguage}
	flags.bind(cmd)
	limits.bind(cmd)
	network.bind(cmd)
	place.bind(cmd)
	cmd.Flags().Var(&language, "lang", "language of the code: python, bash or node (default python)")
	cmd.Flags().StringVar(&file, "file", "", "run the code in this file")
	cmd.Flags().StringVar(&session, "session", "", "run in this session's sandbox, not in a fresh one")
	completeWith(cmd, "lang", "python", "bash", "node")
	cmd.RunE = ownFailures(func(cmd *cobra.Command, args []string) error {
		r := &executorv1.ExecuteRequest{Command: &executorv1.Command{}, Limits: limits.limits(), Engine: place.engine, Placement: place.placement()}
		if err := flags.fill(r, a.env); err != nil {
			return err
		}
		var err error
		if r.Network, err = network.policy(); err != nil {
			return err
		}
		if session != "" {
			if r.Network != nil {
				return usagef("--network, --allow and --session do not go together: a session's sandbox has its own network")
			}
			if r.Engine != "" || r.Placement != nil {
				return usagef("--engine, --gpu, --region, --runtime and --session do not go together: a session's sandbox is where it is")
			}
			if r.Limits != nil {
				return usagef("--limit-… and --session do not go together: a session's sandbox has its own limits")
			}
			if r.Parent, err = sessionName(session); err != nil {
				return err
			}
		}
		if flags.stdin && cmd.ArgsLenAtDash() < 0 && (file == "-" || len(args) == 1 && args[0] == "-") {
			return usagef("-i and code from stdin do not go together: it can be read once")
		}
		if err := a.what(r.Command, cmd.ArgsLenAtDash(), args, file, language); err != nil {
			return err
		}
		return a.execute(r, flags)(cmd, args)
	})
	return cmd
}

func (a *app) execCommand() *cobra.Command {
	var flags commandFlags
	cmd := formats(&cobra.Command{
		Use:   "exec SESSION [flags] -- ARGV...",
		Short: "Run a program in a session's sandbox and follow it to its end",
		Long: `Run a program in a session's sandbox and follow it to its end, as run does in a
fresh one. For code in a session see run --session.`,
		Example: `  executorctl exec sessions/01jd -- npm test`,
		Args:    cobra.ArbitraryArgs,
	}, "raw", "json", "jsonl")
	flags.bind(cmd)
	cmd.RunE = ownFailures(func(cmd *cobra.Command, args []string) error {
		if cmd.ArgsLenAtDash() != 1 || len(args) < 2 {
			return usagef("exec needs a session, -- and a program with its arguments")
		}
		session, err := sessionName(args[0])
		if err != nil {
			return err
		}
		r := &executorv1.ExecuteRequest{Parent: session, Command: &executorv1.Command{Args: args[1:]}}
		if err := flags.fill(r, a.env); err != nil {
			return err
		}
		if err := validText(r.Command); err != nil {
			return err
		}
		return a.execute(r, flags)(cmd, args)
	})
	return cmd
}

// what puts what is to be run into the command: exactly one of CODE, a file, stdin
// and an argv. dash is the number of arguments before "--", -1 if there was none.
func (a *app) what(c *executorv1.Command, dash int, args []string, file string, language value[executorv1.Language]) error {
	const oneOf = "run needs one of CODE, --file FILE, - and -- ARGV"
	if !language.given {
		language.v = executorv1.Language_LANGUAGE_PYTHON
	}
	switch {
	case dash > 0, dash == 0 && file != "", dash < 0 && len(args) > 0 && file != "":
		return usagef(oneOf + ", not two")
	case dash == 0:
		if len(args) == 0 {
			return usagef("there is nothing after --")
		}
		if language.given {
			return usagef("--lang goes with code, not with -- ARGV")
		}
		c.Args = args
		return validText(c)
	case len(args) > 1:
		return usagef("%s; a program's arguments go behind --", oneOf)
	case len(args) == 0 && file == "":
		return usagef(oneOf)
	}

	var source string
	var err error
	switch {
	case file != "" && file != "-":
		if guess, ok := languageOf(file); ok && !language.given {
			language.v = guess
		} else if !language.given {
			return usagef("the name of %q does not tell its language: give --lang", file)
		}
		source, err = readFile(file)
	case file == "-" || args[0] == "-":
		source, err = readSource("stdin", a.stdin)
	default:
		source = args[0]
	}
	if err != nil {
		return err
	}
	c.Code = &executorv1.Code{Language: language.v, Source: source}
	return validText(c)
}

func readFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("open the code: %w", err)
	}
	defer f.Close()
	return readSource(path, f)
}

// readSource reads code, and no more than there may be of it.
func readSource(name string, r io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxSource+1))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	if len(b) > maxSource {
		return "", fmt.Errorf("read %s: the code is longer than %d bytes", name, maxSource)
	}
	return string(b), nil
}

// validText refuses what the API could not carry: its strings are UTF-8.
func validText(c *executorv1.Command) error {
	if source := c.GetCode().GetSource(); !utf8.ValidString(source) {
		return usagef("the code is not valid UTF-8")
	}
	if c.GetCode() != nil && c.GetCode().GetSource() == "" {
		return usagef("the code is empty")
	}
	for i, arg := range c.GetArgs() {
		if !utf8.ValidString(arg) {
			return usagef("argument %d is not valid UTF-8", i+1)
		}
	}
	if !utf8.ValidString(c.GetWorkingDirectory()) {
		return usagef("--workdir is not valid UTF-8")
	}
	return nil
}

// execute starts what is asked for and follows it, or does not.
func (a *app) execute(r *executorv1.ExecuteRequest, flags commandFlags) func(*cobra.Command, []string) error {
	return a.call(func(ctx context.Context, c *client.Client, _ []string) error {
		if flags.tty {
			r.Command.Terminal = a.terminalSize()
		}
		if flags.detach {
			return a.startDetached(ctx, c, r)
		}
		f := follower{app: a, client: c, cancels: true, timeout: r.GetCommand().GetTimeout().AsDuration()}
		if flags.stdin || flags.tty {
			f.console = &console{app: a, stdin: flags.stdin, terminal: flags.tty}
			return f.attach(ctx, func(ctx context.Context) (*client.Attachment, error) { return c.Interact(ctx, r) })
		}
		return f.follow(ctx, func(ctx context.Context) (*client.Stream, error) { return c.Execute(ctx, r) })
	})
}

func (a *app) startDetached(ctx context.Context, c *client.Client, r *executorv1.ExecuteRequest) error {
	e, err := c.Start(ctx, &executorv1.StartExecutionRequest{
		Parent: r.GetParent(), Command: r.GetCommand(), Limits: r.GetLimits(), Network: r.GetNetwork(), OutputPolicy: r.GetOutputPolicy(), Labels: r.GetLabels(),
		DetachPolicy: r.GetDetachPolicy(), Engine: r.GetEngine(), Placement: r.GetPlacement(),
	})
	if err != nil {
		return err
	}
	if a.format == "raw" {
		return a.line([]byte(e.GetName()))
	}
	text, err := protoJSON(e)
	if err != nil {
		return err
	}
	if a.format == "jsonl" {
		return a.line(text)
	}
	return a.document(text)
}

// completeWith has the shell complete a flag with words.
func completeWith(cmd *cobra.Command, flag string, words ...string) {
	complete := func(_ *cobra.Command, _ []string, begin string) ([]string, cobra.ShellCompDirective) {
		var fit []string
		for _, w := range words {
			if strings.HasPrefix(w, begin) {
				fit = append(fit, w)
			}
		}
		return fit, cobra.ShellCompDirectiveNoFileComp
	}
	// It only fails for a flag that does not exist or is registered twice.
	if err := cmd.RegisterFlagCompletionFunc(flag, complete); err != nil {
		panic(err)
	}
}
