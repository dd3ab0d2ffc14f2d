package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func (a *app) promptCommand() *cobra.Command {
	var model, baseURL, author string
	var attach []string
	var detach bool
	cmd := formats(&cobra.Command{
		Use:   "prompt SESSION (TEXT | -)",
		Short: "Ask the agent of a session and follow what it does",
		Long: `Ask the agent of a session and follow what it does to the end of the turn: its text
goes to stdout, what it uses and changes beside that to stderr. "-" reads the text from
stdin. Prompts of a session are worked on one after another.

Ctrl-C cancels the turn; a second one leaves it, and it goes on. The exit code is 0 for a
turn that was completed, 130 for one that was aborted, 1 for any other end.`,
		Example: `  executorctl prompt 01jd 'Fix the failing test and commit it'
  executorctl prompt 01jd - < task.md
  executorctl prompt 01jd --detach -o name 'Write the release notes'`,
		Args: exactly("SESSION", "TEXT"),
	}, "raw", "jsonl", "name")
	cmd.Flags().StringVar(&model, "model", "", "the model that answers, PROVIDER/MODEL (default the session's)")
	cmd.Flags().StringVar(&baseURL, "model-url", "", "where the model's provider is reached")
	cmd.Flags().StringVar(&author, "author", "", "who wrote it (default the user)")
	cmd.Flags().StringArrayVar(&attach, "attach", nil, "send this file with it; may be repeated")
	cmd.Flags().BoolVar(&detach, "detach", false, "print the turn's name and do not follow it")
	cmd.RunE = ownFailures(a.call(func(ctx context.Context, c *client.Client, args []string) error {
		session, err := sessionName(args[0])
		if err != nil {
			return err
		}
		r := &executorv1.SendPromptRequest{Parent: session, Prompt: &executorv1.Prompt{Text: args[1], Author: author}}
		if args[1] == "-" {
			text, err := io.ReadAll(io.LimitReader(a.stdin, maxPrompt+1))
			if err != nil {
				return fmt.Errorf("read stdin: %w", err)
			}
			r.Prompt.Text = string(text)
		}
		if len(r.GetPrompt().GetText()) > maxPrompt {
			return usagef("the prompt has more than %d bytes", maxPrompt)
		}
		if r.Prompt.Model, err = parseModel(model, baseURL); err != nil {
			return err
		}
		for _, path := range attach {
			file, err := attachment(path)
			if err != nil {
				return err
			}
			r.Prompt.Attachments = append(r.Prompt.Attachments, file)
		}
		return a.followTurn(ctx, c, detach, func(ctx context.Context) (*client.TurnStream, error) { return c.Prompt(ctx, r) })
	}))
	return cmd
}

// maxPrompt is the most bytes of a prompt's text.
const maxPrompt = 1 << 20

// attachment reads a file that goes with a prompt.
func attachment(path string) (*executorv1.Attachment, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("--attach: %w", err)
	}
	kind := mime.TypeByExtension(filepath.Ext(path))
	if kind == "" {
		kind = http.DetectContentType(data)
	}
	kind, _, _ = strings.Cut(kind, ";")
	return &executorv1.Attachment{Filename: filepath.Base(path), MediaType: kind, Data: data}, nil
}

// followTurn follows a turn to its end. The first Ctrl-C cancels it, the second leaves it.
func (a *app) followTurn(ctx context.Context, c *client.Client, detach bool, open func(context.Context) (*client.TurnStream, error)) error {
	ctx, leave := context.WithCancelCause(ctx)
	interrupts, unsubscribe := a.signals(os.Interrupt)
	defer unsubscribe()
	var background sync.WaitGroup
	defer background.Wait()
	defer leave(nil)
	s, err := open(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	if detach {
		_, err := fmt.Fprintln(a.stdout, s.Name())
		return err
	}
	background.Go(func() {
		select {
		case <-interrupts:
		case <-ctx.Done():
			return
		}
		a.say("cancelling; ctrl-c again leaves it")
		background.Go(func() {
			if _, err := c.CancelTurn(ctx, &executorv1.CancelTurnRequest{Name: s.Name(), Requester: a.who("executorctl")}); err != nil && ctx.Err() == nil {
				a.say("%s", client.Message(err))
			}
		})
		select {
		case <-interrupts:
			leave(errLeft)
		case <-ctx.Done():
		}
	})
	err = a.tellTurn(s)
	if errors.Is(err, errLeft) || errors.Is(context.Cause(ctx), errLeft) {
		a.say("left %s, which goes on", s.Name())
		fmt.Fprintf(a.stderr, "hint: executorctl turns watch %s --after %s\n", s.Name(), formatCursor(s.Cursor()))
		return exitStatus(exitLeft)
	}
	return err
}

// tellTurn passes the events of a turn on until its result.
func (a *app) tellTurn(s *client.TurnStream) error {
	view := a.turnView()
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return turnStatus(s.Result())
		}
		if err != nil {
			return err
		}
		switch a.format {
		case "jsonl":
			text, err := protoJSON(e)
			if err == nil {
				err = a.line(text)
			}
			if err != nil {
				return err
			}
		case "name":
			if e.GetStarted() != nil {
				if _, err := fmt.Fprintln(a.stdout, e.GetStarted().GetTurn()); err != nil {
					return err
				}
			}
		default:
			if err := view.event(e); err != nil {
				return err
			}
		}
	}
}

// turnView is for this terminal, if it is one.
func (a *app) turnView() *turnView {
	v := &turnView{out: a.stdout, talk: a.stderr}
	if file, ok := a.stdout.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		if width, _, err := term.GetSize(int(file.Fd())); err == nil {
			v.live, v.width = true, width
		}
	}
	return v
}

// turnStatus is the exit code of a turn's end; nil for 0.
func turnStatus(r *executorv1.TurnResult) error {
	switch r.GetOutcome() {
	case executorv1.TurnOutcome_TURN_OUTCOME_COMPLETED:
		return nil
	case executorv1.TurnOutcome_TURN_OUTCOME_ABORTED:
		return exitStatus(exitLeft)
	default:
		return exitStatus(exitFailure)
	}
}

func (a *app) shellCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "shell SESSION",
		Short: "Open a shell in a session's sandbox on this terminal",
		Long:  "Open a shell in a session's sandbox on this terminal, as exec -it SESSION -- bash does.",
		Args:  exactly("SESSION"),
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		exec := a.execCommand()
		exec.SetContext(cmd.Context())
		if err := exec.ParseFlags([]string{"-i", "-t", args[0], "--", "bash", "-l"}); err != nil {
			return err
		}
		return exec.RunE(exec, exec.Flags().Args())
	}
	return cmd
}
