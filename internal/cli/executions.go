package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// pageSize is how many resources are asked for at a time.
const pageSize = 200

func (a *app) executionsCommand() *cobra.Command {
	return group("executions", "List, follow and end executions", []string{"execution"},
		a.executionsList(), a.executionsGet(), a.executionsWatch(), a.executionsAttach(), a.executionsCancel(), a.executionsSignal(),
		a.executionsOutput(), a.executionsWait(), a.executionsDelete())
}

// executionColumns is the table of executions.
func executionColumns() columns[*executorv1.Execution] {
	return columns[*executorv1.Execution]{
		header: []string{"NAME", "STATE", "REASON", "EXIT", "CREATED", "DURATION", "COMMAND"},
		row: func(e *executorv1.Execution) []string {
			var exit, span string
			if r := e.GetResult(); r != nil {
				if r.ExitCode != nil {
					exit = strconv.Itoa(int(r.GetExitCode()))
				}
				if d := ran(r); d > 0 {
					span = d.Round(time.Millisecond).String()
				}
			}
			return []string{
				e.GetName(), strings.ToLower(enumName(e.GetState(), "STATE")), enumName(e.GetResult().GetReason(), "REASON"), exit,
				formatTime(e.GetCreateTime()), span, commandLine(e.GetCommand()),
			}
		},
	}
}

// commandLine is a command in short.
func commandLine(c *executorv1.Command) string {
	var text string
	if code := c.GetCode(); code != nil {
		text = strings.ToLower(enumName(code.GetLanguage(), "LANGUAGE")) + ": " + strings.Join(strings.Fields(code.GetSource()), " ")
	} else {
		words := make([]string, len(c.GetArgs()))
		for i, arg := range c.GetArgs() {
			if words[i] = arg; arg == "" || strings.ContainsAny(arg, " \t\n\"'") {
				words[i] = strconv.Quote(arg)
			}
		}
		text = strings.Join(words, " ")
	}
	const most = 50
	if runes := []rune(text); len(runes) > most {
		text = string(runes[:most-1]) + "…"
	}
	return text
}

func (a *app) executionsList() *cobra.Command {
	var session string
	var limit int
	var choice listFlags
	cmd := formats(&cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List executions, the newest first",
		Long:    "List executions, the newest first.\n\n" + filterHelp("state, reason"),
		Example: `  executorctl executions list --state running --label user=ada
  executorctl executions list --filter 'reason = OOM_KILLED AND end_time > "2026-11-25T00:00:00Z"'`,
		Args: none,
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.Flags().StringVar(&session, "session", "", `only those of this session; "-" for those of all sessions`)
	cmd.Flags().IntVar(&limit, "limit", 100, "the most to list; 0 for all")
	choice.bind(cmd, "starting", "running", "stopping", "ended")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, _ []string) error {
		filter, err := choice.filter()
		if err != nil {
			return err
		}
		parent := ""
		if session != "" {
			if parent, err = sessionName(session); err != nil {
				return err
			}
		}
		all, more, err := pages(limit, func(size int32, token string) ([]*executorv1.Execution, string, error) {
			answer, err := c.Executor().ListExecutions(ctx, &executorv1.ListExecutionsRequest{
				Parent: parent, PageSize: size, PageToken: token, Filter: filter, OrderBy: choice.orderBy,
			})
			return answer.GetExecutions(), answer.GetNextPageToken(), err
		})
		if err != nil {
			return fmt.Errorf("list executions: %w", err)
		}
		if more && !cmd.Flags().Changed("limit") {
			defer a.say("%s", choice.leftOut())
		}
		return printAll(a, all, executionColumns())
	})
	return cmd
}

// pages turns pages until there are enough; limit 0 is never enough. more says
// whether something was left out.
func pages[T any](limit int, get func(size int32, token string) ([]T, string, error)) (all []T, more bool, err error) {
	if limit < 0 {
		return nil, false, usagef("--limit %d: must not be negative", limit)
	}
	token := ""
	for {
		size := pageSize
		if limit > 0 {
			size = min(size, limit-len(all))
		}
		page, next, err := get(int32(size), token)
		if err != nil {
			return nil, false, err
		}
		all = append(all, page...)
		if limit > 0 && len(all) >= limit {
			return all[:limit], next != "" || len(all) > limit, nil
		}
		if next == "" {
			return all, false, nil
		}
		token = next
	}
}

func (a *app) executionsGet() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use:   "get NAME",
		Short: "Show an execution",
		Args:  exactly("NAME"),
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.RunE = a.onExecution(func(ctx context.Context, c *client.Client, name string) error {
		answer, err := c.Executor().GetExecution(ctx, &executorv1.GetExecutionRequest{Name: name})
		if err != nil {
			return fmt.Errorf("get %s: %w", name, err)
		}
		return printOne(a, answer.GetExecution(), executionColumns())
	})
	return cmd
}

func (a *app) executionsWatch() *cobra.Command {
	after := value[*executorv1.Cursor]{kind: "epoch/sequence", parse: parseCursor}
	longest := value[time.Duration]{kind: "duration", parse: parseDuration}
	var again bool
	var speed float64
	cmd := formats(&cobra.Command{
		Use:   "watch NAME",
		Short: "Follow an execution to its end, or tell one that has ended",
		Long: `Follow an execution to its end, or tell one that has ended: what it wrote comes out
as with run, and its exit code is that of executorctl. Ctrl-C leaves; the execution
goes on. With --replay it is told at the pace at which it happened; -o asciicast makes a
recording for asciinema and its players.`,
		Args: exactly("NAME"),
	}, "raw", "jsonl", "asciicast")
	cmd.Flags().Var(&after, "after", "begin behind this cursor of an event")
	cmd.Flags().BoolVar(&again, "replay", false, "tell what has been at the pace at which it happened")
	cmd.Flags().Float64Var(&speed, "speed", 1, "how many times faster --replay goes, 0.01 to 1000")
	cmd.Flags().Var(&longest, "max-pause", "the longest pause of --replay (default as long as it was)")
	cmd.RunE = ownFailures(a.onExecution(func(ctx context.Context, c *client.Client, name string) error {
		var pace *replay
		switch {
		case !(speed >= 0.01 && speed <= 1000): // NaN is neither
			return usagef("--speed %v: must be 0.01 to 1000", speed)
		case again:
			pace = &replay{speed: speed, longest: longest.v}
		case cmd.Flags().Changed("speed") || longest.given:
			return usagef("--speed and --max-pause are of use with --replay only")
		}
		// A stream waits for a server that is away. Asking first tells at once when
		// there is none, or no such execution.
		answer, err := c.Executor().GetExecution(ctx, &executorv1.GetExecutionRequest{Name: name})
		if err != nil {
			return fmt.Errorf("watch %s: %w", name, err)
		}
		command := answer.GetExecution().GetCommand()
		f := follower{app: a, client: c, timeout: command.GetTimeout().AsDuration(), pace: pace, title: commandLine(command)}
		return f.follow(ctx, func(ctx context.Context) (*client.Stream, error) { return c.Watch(ctx, name, after.v) })
	}))
	return cmd
}

func (a *app) executionsCancel() *cobra.Command {
	grace := value[time.Duration]{kind: "duration", parse: parseDuration}
	cmd := formats(&cobra.Command{
		Use:   "cancel NAME",
		Short: "End an execution and wait until its processes are gone",
		Args:  exactly("NAME"),
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.Flags().Var(&grace, "grace", "time between TERM and KILL (default the execution's own); 0 kills at once")
	cmd.RunE = a.onExecution(func(ctx context.Context, c *client.Client, name string) error {
		r := &executorv1.CancelExecutionRequest{Name: name, Requester: a.who("executorctl")}
		if grace.given {
			r.GracePeriod = durationpb.New(grace.v)
		}
		e, err := c.Cancel(ctx, r)
		if err != nil {
			return err
		}
		return printOne(a, e, executionColumns())
	})
	return cmd
}

func (a *app) executionsOutput() *cobra.Command {
	var name string
	var offset, limit int64
	cmd := &cobra.Command{
		Use:   "output NAME",
		Short: "Print what an execution wrote to one stream so far, from any byte",
		Args:  exactly("NAME"),
	}
	cmd.Flags().StringVar(&name, "stream", "stdout", "stdout or stderr")
	cmd.Flags().Int64Var(&offset, "offset", 0, "the first byte")
	cmd.Flags().Int64Var(&limit, "limit", 0, "the most bytes; 0 for all")
	completeWith(cmd, "stream", "stdout", "stderr")
	cmd.RunE = a.onExecution(func(ctx context.Context, c *client.Client, execution string) error {
		stream, ok := map[string]executorv1.Stream{
			"stdout": executorv1.Stream_STREAM_STDOUT, "stderr": executorv1.Stream_STREAM_STDERR,
		}[name]
		switch {
		case !ok:
			return usagef("--stream %q: must be stdout or stderr", name)
		case offset < 0 || limit < 0:
			return usagef("--offset and --limit must not be negative")
		}
		output, err := c.Executor().ReadOutput(ctx, &executorv1.ReadOutputRequest{Name: execution, Stream: stream, Offset: offset, Limit: limit})
		if err != nil {
			return fmt.Errorf("read output of %s: %w", execution, err)
		}
		next := offset
		for {
			piece, err := output.Recv()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				err = fmt.Errorf("read output of %s: %w", execution, err)
				if next > offset {
					err = hinted{err, fmt.Sprintf("go on with --offset %d", next)}
				}
				return err
			}
			if piece.GetOffset() != next {
				return fmt.Errorf("read output of %s: byte %d follows on %d", execution, piece.GetOffset(), next)
			}
			if _, err := a.stdout.Write(piece.GetData()); err != nil {
				return fmt.Errorf("write stdout: %w", err)
			}
			next += int64(len(piece.GetData()))
		}
	})
	return cmd
}

func (a *app) executionsWait() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use:   "wait NAME",
		Short: "Wait until an execution has ended, and exit as it did",
		Args:  exactly("NAME"),
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.RunE = ownFailures(a.onExecution(func(ctx context.Context, c *client.Client, name string) error {
		// As in watch: a server that is away from the start is an error at once.
		if _, err := c.Executor().GetExecution(ctx, &executorv1.GetExecutionRequest{Name: name}); err != nil {
			return fmt.Errorf("wait for %s: %w", name, err)
		}
		e, err := c.Wait(ctx, name)
		if err != nil {
			return err
		}
		if err := printOne(a, e, executionColumns()); err != nil {
			return err
		}
		if text := ending(e.GetResult(), e.GetCommand().GetTimeout().AsDuration()); text != "" {
			a.say("%s", text)
		}
		if code := exitCode(e.GetResult()); code != 0 {
			return exitStatus(code)
		}
		return nil
	}))
	return cmd
}

func (a *app) executionsDelete() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "delete NAME...",
		Aliases: []string{"rm"},
		Short:   "Delete ended executions with their logs, and print their names",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("delete needs at least one NAME")
			}
			return nil
		},
	}
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, args []string) error {
		var names []string
		for _, arg := range args {
			name, err := executionName(arg)
			if err != nil {
				return err
			}
			names = append(names, name)
		}
		// One that cannot be deleted does not keep the others.
		var failed error
		for _, name := range names {
			if err := c.Delete(ctx, &executorv1.DeleteExecutionRequest{Name: name}); err != nil {
				if failed != nil {
					a.say("%s", client.Message(failed))
				}
				failed = err
				continue
			}
			if err := a.line([]byte(name)); err != nil {
				return err
			}
		}
		return failed
	})
	return cmd
}

// onExecution makes a command's function of one about a named execution.
func (a *app) onExecution(do func(ctx context.Context, c *client.Client, name string) error) func(*cobra.Command, []string) error {
	return a.call(func(ctx context.Context, c *client.Client, args []string) error {
		name, err := executionName(args[0])
		if err != nil {
			return err
		}
		return do(ctx, c, name)
	})
}

// exactly demands an argument for each of the names.
func exactly(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return usagef("%s needs %s and nothing else", cmd.CommandPath(), strings.Join(names, " "))
		}
		return nil
	}
}

// none demands that there are no arguments.
func none(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("%s takes no arguments", cmd.CommandPath())
	}
	return nil
}
