package cli

import (
	"context"
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func (a *app) turnsCommand() *cobra.Command {
	return group("turns", "List, follow and cancel the turns of a session's agent", []string{"turn"},
		a.turnsList(), a.turnsGet(), a.turnsWatch(), a.turnsCancel())
}

func turnColumns() columns[*executorv1.Turn] {
	return columns[*executorv1.Turn]{
		header: []string{"NAME", "STATE", "CREATED", "PROMPT", "OUTCOME", "USED"},
		row: func(t *executorv1.Turn) []string {
			used := ""
			if t.GetResult() != nil {
				used = formatUsage(t.GetResult().GetUsage())
			}
			prompt := []rune(oneLine(t.GetPrompt().GetText()))
			return []string{
				t.GetName(), strings.ToLower(enumName(t.GetState(), "STATE")), formatTime(t.GetCreateTime()),
				string(prompt[:min(len(prompt), 40)]), strings.ToLower(enumName(t.GetResult().GetOutcome(), "TURN_OUTCOME")), used,
			}
		},
	}
}

func (a *app) turnsList() *cobra.Command {
	var limit int
	cmd := formats(&cobra.Command{
		Use: "list SESSION", Aliases: []string{"ls"}, Short: "List the turns of a session, the newest first", Args: exactly("SESSION"),
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.Flags().IntVar(&limit, "limit", 100, "the most to list; 0 for all")
	cmd.RunE = a.onSession(func(ctx context.Context, c *client.Client, session string) error {
		turns, more, err := pages(limit, func(size int32, token string) ([]*executorv1.Turn, string, error) {
			answer, err := c.Sessions().ListTurns(ctx, &executorv1.ListTurnsRequest{Parent: session, PageSize: size, PageToken: token})
			return answer.GetTurns(), answer.GetNextPageToken(), err
		})
		if err != nil {
			return fmt.Errorf("list the turns of %s: %w", session, err)
		}
		if more && !cmd.Flags().Changed("limit") {
			defer a.say("there are more; --limit 0 lists all")
		}
		return printAll(a, turns, turnColumns())
	})
	return cmd
}

func (a *app) turnsGet() *cobra.Command {
	cmd := formats(&cobra.Command{Use: "get TURN", Short: "Show a turn", Args: exactly("TURN")}, "table", "json", "yaml", "jsonl", "name")
	cmd.RunE = a.onTurn(func(ctx context.Context, c *client.Client, name string) error {
		answer, err := c.Sessions().GetTurn(ctx, &executorv1.GetTurnRequest{Name: name})
		if err != nil {
			return fmt.Errorf("get %s: %w", name, err)
		}
		return printOne(a, answer.GetTurn(), turnColumns())
	})
	return cmd
}

func (a *app) turnsWatch() *cobra.Command {
	after := value[*executorv1.Cursor]{kind: "epoch/sequence", parse: parseCursor}
	cmd := formats(&cobra.Command{
		Use:   "watch TURN",
		Short: "Follow a turn to its end, or tell one that is over, as prompt does",
		Args:  exactly("TURN"),
	}, "raw", "jsonl")
	cmd.Flags().Var(&after, "after", "begin behind this cursor of an event")
	cmd.RunE = ownFailures(a.onTurn(func(ctx context.Context, c *client.Client, name string) error {
		if _, err := c.Sessions().GetTurn(ctx, &executorv1.GetTurnRequest{Name: name}); err != nil {
			return fmt.Errorf("watch %s: %w", name, err)
		}
		s, err := c.WatchTurn(ctx, name, after.v)
		if err != nil {
			return err
		}
		defer s.Close()
		return a.tellTurn(s)
	}))
	return cmd
}

func (a *app) turnsCancel() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use: "cancel TURN", Short: "End a turn and wait until nothing of it runs", Args: exactly("TURN"),
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.RunE = a.onTurn(func(ctx context.Context, c *client.Client, name string) error {
		t, err := c.CancelTurn(ctx, &executorv1.CancelTurnRequest{Name: name, Requester: a.who("executorctl")})
		if err != nil {
			return err
		}
		return printOne(a, t, turnColumns())
	})
	return cmd
}

// onTurn makes a command's function of one about a named turn.
func (a *app) onTurn(do func(ctx context.Context, c *client.Client, name string) error) func(*cobra.Command, []string) error {
	return a.call(func(ctx context.Context, c *client.Client, args []string) error {
		if !regexp.MustCompile(`^sessions/[a-z0-9-]{1,63}/turns/[a-z0-9-]{1,63}$`).MatchString(args[0]) {
			return usagef("turn %q: must be sessions/ID/turns/ID", args[0])
		}
		return do(ctx, c, args[0])
	})
}

func (a *app) interactionsCommand() *cobra.Command {
	return group("interactions", "List and answer what the agent of a session asks", []string{"interaction"},
		a.interactionsList(), a.interactionsResolve())
}

func interactionColumns() columns[*executorv1.Interaction] {
	return columns[*executorv1.Interaction]{
		header: []string{"NAME", "STATE", "ASKED", "UNTIL", "WHAT"},
		row: func(i *executorv1.Interaction) []string {
			what := oneLine(i.GetPermission().GetPermission() + " " + strings.Join(i.GetPermission().GetPatterns(), " "))
			for _, q := range i.GetQuestion().GetItems() {
				what = oneLine(what + " " + q.GetText())
			}
			return []string{
				i.GetName(), strings.ToLower(enumName(i.GetState(), "STATE")), formatTime(i.GetCreateTime()), formatTime(i.GetExpireTime()), what,
			}
		},
	}
}

func (a *app) interactionsList() *cobra.Command {
	var all bool
	cmd := formats(&cobra.Command{
		Use: "list SESSION", Aliases: []string{"ls"}, Short: "List what the agent of a session waits for", Args: exactly("SESSION"),
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.Flags().BoolVar(&all, "all", false, "also what was answered")
	cmd.RunE = a.onSession(func(ctx context.Context, c *client.Client, session string) error {
		found, _, err := pages(0, func(size int32, token string) ([]*executorv1.Interaction, string, error) {
			answer, err := c.Sessions().ListInteractions(ctx, &executorv1.ListInteractionsRequest{Parent: session, ShowResolved: all, PageSize: size, PageToken: token})
			return answer.GetInteractions(), answer.GetNextPageToken(), err
		})
		if err != nil {
			return fmt.Errorf("list the interactions of %s: %w", session, err)
		}
		return printAll(a, found, interactionColumns())
	})
	return cmd
}

func (a *app) interactionsResolve() *cobra.Command {
	var allow, always, reject bool
	var answers []string
	var message string
	cmd := formats(&cobra.Command{
		Use:   "resolve INTERACTION (--allow | --always | --reject | --answer LABEL...)",
		Short: "Answer what the agent of a session asks",
		Example: `  executorctl interactions resolve sessions/01jd/interactions/01je --allow
  executorctl interactions resolve sessions/01jd/interactions/01je --reject --message 'not on a Friday'
  executorctl interactions resolve sessions/01jd/interactions/01je --answer Postgres`,
		Args: exactly("INTERACTION"),
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.Flags().BoolVar(&allow, "allow", false, "it may be done this once")
	cmd.Flags().BoolVar(&always, "always", false, "it, and what is like it, may be done for as long as the session lives")
	cmd.Flags().BoolVar(&reject, "reject", false, "it may not be done; or the question is dismissed")
	cmd.Flags().StringArrayVar(&answers, "answer", nil, "the answer to the next question: a label or a text; several labels are separated by commas; may be repeated")
	cmd.Flags().StringVar(&message, "message", "", "with --reject: what the agent is told")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, args []string) error {
		if !regexp.MustCompile(`^sessions/[a-z0-9-]{1,63}/interactions/[a-z0-9-]{1,63}$`).MatchString(args[0]) {
			return usagef("interaction %q: must be sessions/ID/interactions/ID", args[0])
		}
		r, err := resolution(allow, always, reject, message, answers)
		if err != nil {
			return err
		}
		i, err := c.ResolveInteraction(ctx, &executorv1.ResolveInteractionRequest{Name: args[0], Resolution: r})
		if err != nil {
			return err
		}
		return printOne(a, i, interactionColumns())
	})
	return cmd
}

// resolution is the answer that the flags give: exactly one.
func resolution(allow, always, reject bool, message string, answers []string) (*executorv1.Resolution, error) {
	r := &executorv1.Resolution{Message: message}
	given := 0
	for _, one := range []struct {
		given    bool
		decision executorv1.Resolution_Decision
	}{
		{allow, executorv1.Resolution_DECISION_ALLOW_ONCE}, {always, executorv1.Resolution_DECISION_ALLOW_ALWAYS}, {reject, executorv1.Resolution_DECISION_REJECT},
	} {
		if one.given {
			given++
			r.Decision = one.decision
		}
	}
	for _, text := range answers {
		r.Answers = append(r.Answers, &executorv1.Answer{Labels: strings.Split(text, ",")})
	}
	if len(answers) > 0 {
		given++
	}
	switch {
	case given != 1:
		return nil, usagef("give one of --allow, --always, --reject and --answer")
	case message != "" && !reject:
		return nil, usagef("--message goes with --reject")
	}
	return r, nil
}
