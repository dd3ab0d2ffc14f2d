package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func (a *app) sessionWatch() *cobra.Command {
	after := value[*executorv1.Cursor]{kind: "epoch/sequence", parse: parseCursor}
	cmd := formats(&cobra.Command{
		Use:   "watch SESSION",
		Short: "Follow how a session starts, what runs in it and how it ends",
		Args:  exactly("SESSION"),
	}, "raw", "jsonl")
	cmd.Flags().Var(&after, "after", "begin behind this cursor of an event")
	cmd.RunE = a.onSession(func(ctx context.Context, c *client.Client, name string) error {
		if _, err := c.Sessions().GetSession(ctx, &executorv1.GetSessionRequest{Name: name}); err != nil {
			return fmt.Errorf("watch %s: %w", name, err)
		}
		s, err := c.WatchSession(ctx, name, after.v)
		if err != nil {
			return err
		}
		defer s.Close()
		for {
			e, err := s.Recv()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			text := []byte(sessionLine(e))
			if a.format == "jsonl" {
				if text, err = protoJSON(e); err != nil {
					return err
				}
			}
			if len(text) == 0 {
				continue
			}
			if err := a.line(text); err != nil {
				return err
			}
		}
	})
	return cmd
}

// sessionLine tells an event of a session; "" for one that says nothing to people.
func sessionLine(e *executorv1.SessionEvent) string {
	line := func(format string, args ...any) string {
		return formatTime(e.GetEventTime()) + "  " + strings.TrimRight(fmt.Sprintf(format, args...), " :")
	}
	lower := func(v fmt.Stringer, prefix string) string {
		return strings.ToLower(strings.ReplaceAll(enumName(v, prefix), "_", " "))
	}
	switch k := e.GetKind().(type) {
	case *executorv1.SessionEvent_Started:
		return line("%s", k.Started.GetSession())
	case *executorv1.SessionEvent_Step:
		s := k.Step
		text := oneLine(s.GetText())
		if s.Percent != nil {
			text += fmt.Sprintf(" %d%%", s.GetPercent())
		}
		if s.GetState() == executorv1.SessionStep_STATE_PROGRESS {
			return line("  %s %s: %s", lower(s.GetKind(), "KIND"), oneLine(s.GetSubject()), text)
		}
		return line("%s %s: %s %s", lower(s.GetKind(), "KIND"), oneLine(s.GetSubject()), lower(s.GetState(), "STATE"), text)
	case *executorv1.SessionEvent_Changed:
		return line("%s", lower(k.Changed.GetState(), "STATE"))
	case *executorv1.SessionEvent_Warning:
		return line("warning: %s at %s", lower(k.Warning.GetCause(), "CAUSE"), formatTime(k.Warning.GetExpireTime()))
	case *executorv1.SessionEvent_Turn:
		return line("%s %s %s", k.Turn.GetTurn(), lower(k.Turn.GetState(), "STATE"), lower(k.Turn.GetOutcome(), "TURN_OUTCOME"))
	case *executorv1.SessionEvent_Execution:
		return line("%s %s", k.Execution.GetExecution(), lower(k.Execution.GetReason(), "REASON"))
	case *executorv1.SessionEvent_InteractionRequested:
		return line("%s asked", k.InteractionRequested.GetName())
	case *executorv1.SessionEvent_InteractionResolved:
		return line("%s answered", k.InteractionResolved.GetName())
	case *executorv1.SessionEvent_Saved:
		return line("saved %s %s %s %s", k.Saved.GetPath(), k.Saved.GetRef(), k.Saved.GetSnapshot(), oneLine(k.Saved.GetDetail()))
	case *executorv1.SessionEvent_SandboxReplaced:
		return line("goes on in sandbox %s", k.SandboxReplaced.GetSandbox())
	case *executorv1.SessionEvent_Agent:
		var servers []string
		for _, m := range k.Agent.GetMcpServers() {
			servers = append(servers, m.GetName()+" "+lower(m.GetState(), "STATE"))
		}
		return line("agent %s %s %s", lower(k.Agent.GetState(), "STATE"), k.Agent.GetVersion(), strings.Join(servers, ", "))
	case *executorv1.SessionEvent_Gap:
		return line("%d events are missing here (%s)", k.Gap.GetMissingEvents(), lower(k.Gap.GetReason(), "REASON"))
	case *executorv1.SessionEvent_Ended:
		return line("ended: %s %s", lower(k.Ended.GetEndReason(), "END_REASON"), oneLine(k.Ended.GetDetail()))
	}
	return ""
}
