package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func (a *app) sessionCommand() *cobra.Command {
	return group("session", "Create, list and end sessions: sandboxes that stay, with repositories and an agent", []string{"sessions"},
		a.sessionCreate(), a.sessionList(), a.sessionGet(), a.sessionWatch(), a.sessionExtend(), a.sessionPause(), a.sessionResume(), a.sessionFork(),
		a.sessionDiff(), a.sessionTerminate())
}

// sessionColumns is the table of sessions.
func sessionColumns() columns[*executorv1.Session] {
	return columns[*executorv1.Session]{
		header: []string{"NAME", "STATE", "CREATED", "EXPIRES", "LIMITS", "ENDED"},
		row: func(s *executorv1.Session) []string {
			ended := enumName(s.GetEndReason(), "END_REASON")
			if ended != "" && s.GetDetail() != "" {
				ended += " (" + s.GetDetail() + ")"
			}
			return []string{
				s.GetName(), strings.ToLower(enumName(s.GetState(), "STATE")),
				formatTime(s.GetCreateTime()), formatTime(s.GetExpireTime()), formatLimits(s.GetLimits()), ended,
			}
		},
	}
}

func (a *app) sessionCreate() *cobra.Command {
	var limits limitFlags
	var network networkFlags
	var place placementFlags
	var labels []string
	var noWait bool
	var agent agentFlags
	lifetime := value[time.Duration]{kind: "duration", parse: parseDuration}
	cmd := formats(&cobra.Command{
		Use:   "create",
		Short: "Create a session, wait until its sandbox is ready and print its name",
		Args:  none,
	}, "name", "table", "json", "yaml", "jsonl")
	limits.bind(cmd)
	network.bind(cmd)
	place.bind(cmd)
	agent.bind(cmd, a.env)
	cmd.Flags().Var(&lifetime, "lifetime", "how long it may live (default 1h)")
	cmd.Flags().StringArrayVar(&labels, "label", nil, "label it, NAME=VALUE; may be repeated")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "do not wait until its sandbox is ready")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, _ []string) error {
		r := &executorv1.CreateSessionRequest{Limits: limits.limits(), Engine: place.engine, Placement: place.placement()}
		if lifetime.given {
			r.Lifetime = durationpb.New(lifetime.v)
		}
		var err error
		if r.Labels, err = parseLabels(labels); err != nil {
			return err
		}
		if r.Network, err = network.policy(); err != nil {
			return err
		}
		if err := agent.fill(r); err != nil {
			return err
		}
		s, err := c.CreateSession(ctx, r)
		if err == nil && !noWait {
			s, err = a.ready(ctx, c, s)
		}
		if err != nil {
			return err
		}
		return printOne(a, s, sessionColumns())
	})
	return cmd
}

// ready waits until a session has started or goes on.
func (a *app) ready(ctx context.Context, c *client.Client, s *executorv1.Session) (*executorv1.Session, error) {
	for s.GetState() == executorv1.Session_STATE_STARTING || s.GetState() == executorv1.Session_STATE_RESUMING {
		answer, err := c.Sessions().GetSession(ctx, &executorv1.GetSessionRequest{Name: s.GetName(), Wait: durationpb.New(time.Minute)})
		if err != nil {
			return nil, hinted{
				fmt.Errorf("wait for %s: %w", s.GetName(), err),
				fmt.Sprintf("it exists; executorctl session get %s", s.GetName()),
			}
		}
		s = answer.GetSession()
	}
	if reason := enumName(s.GetEndReason(), "END_REASON"); reason != "" {
		return nil, fmt.Errorf("%s did not start: %s (%s)", s.GetName(), s.GetDetail(), reason)
	}
	return s, nil
}

func (a *app) sessionList() *cobra.Command {
	var all bool
	var limit int
	var choice listFlags
	cmd := formats(&cobra.Command{
		Use:   "list",
		Short: "List sessions, the newest first",
		Long:  "List sessions, the newest first.\n\n" + filterHelp("state, end_reason"),
		Example: `  executorctl session list --label user=ada
  executorctl session list --state terminated --filter 'end_reason = EXPIRED'`,
		Aliases: []string{"ls"},
		Args:    none,
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.Flags().BoolVar(&all, "all", false, "also those that have ended")
	cmd.Flags().IntVar(&limit, "limit", 100, "the most to list; 0 for all")
	choice.bind(cmd, "starting", "running", "pausing", "paused", "resuming", "terminating", "terminated")
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, _ []string) error {
		filter, err := choice.filter()
		if err != nil {
			return err
		}
		// Who asks for those that have ended means them.
		all := all || strings.EqualFold(choice.state, "terminated")
		sessions, more, err := pages(limit, func(size int32, token string) ([]*executorv1.Session, string, error) {
			answer, err := c.Sessions().ListSessions(ctx, &executorv1.ListSessionsRequest{
				PageSize: size, PageToken: token, ShowTerminated: all, Filter: filter, OrderBy: choice.orderBy,
			})
			return answer.GetSessions(), answer.GetNextPageToken(), err
		})
		if err != nil {
			return fmt.Errorf("list sessions: %w", err)
		}
		if more && !cmd.Flags().Changed("limit") {
			defer a.say("%s", choice.leftOut())
		}
		return printAll(a, sessions, sessionColumns())
	})
	return cmd
}

func (a *app) sessionGet() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use:   "get SESSION",
		Short: "Show a session",
		Args:  exactly("SESSION"),
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.RunE = a.onSession(func(ctx context.Context, c *client.Client, name string) error {
		answer, err := c.Sessions().GetSession(ctx, &executorv1.GetSessionRequest{Name: name})
		if err != nil {
			return fmt.Errorf("get %s: %w", name, err)
		}
		return printOne(a, answer.GetSession(), sessionColumns())
	})
	return cmd
}

func (a *app) sessionTerminate() *cobra.Command {
	cmd := formats(&cobra.Command{
		Use:   "terminate SESSION",
		Short: "End a session and everything in it, and wait until it is gone",
		Args:  exactly("SESSION"),
	}, "table", "json", "yaml", "jsonl", "name")
	cmd.RunE = a.onSession(func(ctx context.Context, c *client.Client, name string) error {
		s, err := c.TerminateSession(ctx, &executorv1.TerminateSessionRequest{Name: name, Requester: a.who("executorctl")})
		if err != nil {
			return err
		}
		return printOne(a, s, sessionColumns())
	})
	return cmd
}

// onSession makes a command's function of one about a named session.
func (a *app) onSession(do func(ctx context.Context, c *client.Client, name string) error) func(*cobra.Command, []string) error {
	return a.call(func(ctx context.Context, c *client.Client, args []string) error {
		name, err := sessionName(args[0])
		if err != nil {
			return err
		}
		return do(ctx, c, name)
	})
}
