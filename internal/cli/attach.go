package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func (a *app) executionsAttach() *cobra.Command {
	after := value[*executorv1.Cursor]{kind: "epoch/sequence", parse: parseCursor}
	var takeOver bool
	cmd := formats(&cobra.Command{
		Use:   "attach NAME",
		Short: "Connect this terminal, or stdin, to a running execution",
		Long: `Connect this terminal, or stdin, to an execution that was started with -i or -t, and
follow it to its end. With a terminal on both sides keys go to the program as they
are; at the start of a line ~. leaves and ~~ stands for ~. Otherwise stdin is
forwarded, and Ctrl-C leaves. What it wrote so far comes out first.

One client is attached at a time; --take-over ends the other's attachment.`,
		Args: exactly("NAME"),
	}, "raw", "jsonl")
	cmd.Flags().Var(&after, "after", "begin behind this cursor of an event")
	cmd.Flags().BoolVar(&takeOver, "take-over", false, "end the attachment of another client")
	cmd.RunE = ownFailures(a.onExecution(func(ctx context.Context, c *client.Client, name string) error {
		// As in watch.
		answer, err := c.Executor().GetExecution(ctx, &executorv1.GetExecutionRequest{Name: name})
		if err != nil {
			return fmt.Errorf("attach to %s: %w", name, err)
		}
		command := answer.GetExecution().GetCommand()
		f := follower{
			app: a, client: c, timeout: command.GetTimeout().AsDuration(),
			console: &console{app: a, stdin: true, terminal: command.GetTerminal() != nil},
		}
		return f.attach(ctx, func(ctx context.Context) (*client.Attachment, error) {
			return c.Attach(ctx, name, client.AttachOptions{After: after.v, TakeOver: takeOver})
		})
	}))
	return cmd
}

func (a *app) executionsSignal() *cobra.Command {
	scope := value[executorv1.SignalScope]{kind: "scope", parse: parseScope}
	cmd := &cobra.Command{
		Use:   "signal NAME SIGNAL",
		Short: "Send a signal, such as INT or 10, to a running execution",
		Long: `Send a signal, by its name or number on Linux, to a running execution: to the program
itself (process), to the process group in the foreground of its terminal or without
one its own (group), or to every process that comes from it (tree). To end it for
certain see cancel.`,
		Example: `  executorctl executions signal 01jd HUP
  executorctl executions signal 01jd USR1 --scope tree`,
		Args: exactly("NAME", "SIGNAL"),
	}
	cmd.Flags().Var(&scope, "scope", "who gets it: process, group or tree (default process)")
	completeWith(cmd, "scope", "process", "group", "tree")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, args []string) error {
		name, err := executionName(args[0])
		if err != nil {
			return err
		}
		number, err := parseSignal(args[1])
		if err != nil {
			return err
		}
		return c.Signal(ctx, &executorv1.SignalExecutionRequest{Name: name, Signal: number, Scope: scope.v})
	})
	return cmd
}

// parseSignal reads a signal's number, or its name with or without SIG.
func parseSignal(text string) (int32, error) {
	const most = 64
	if n, err := strconv.ParseInt(text, 10, 32); err == nil && n >= 1 && n <= most {
		return int32(n), nil
	}
	name := strings.ToUpper(text)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n > 0 {
		return int32(n), nil
	}
	return 0, usagef("signal %q: must be a name such as TERM, or a number from 1 to %d", text, most)
}

func parseScope(text string) (executorv1.SignalScope, error) {
	if n, ok := executorv1.SignalScope_value["SIGNAL_SCOPE_"+strings.ToUpper(text)]; ok && n > 0 {
		return executorv1.SignalScope(n), nil
	}
	return 0, fmt.Errorf("must be process, group or tree")
}
