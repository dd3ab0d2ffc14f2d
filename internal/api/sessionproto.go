package api

import (
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/session"
	"google.golang.org/protobuf/types/known/durationpb"
)

func sessionProto(s session.Session) *executorv1.Session {
	d := s.Details
	converted := &executorv1.Session{
		Name:              sessionName(s.ID),
		State:             sessionStateProto(s.State),
		EndReason:         endReasonProto(s.Reason),
		Detail:            text(s.Detail),
		Engine:            s.Engine,
		Sandbox:           s.Sandbox,
		Limits:            limitsProto(s.Limits),
		Network:           networkProto(s.Network),
		Lifetime:          durationpb.New(s.Lifetime),
		CreateTime:        timestamp(s.CreateTime),
		ExpireTime:        timestamp(s.ExpireTime()),
		EndTime:           timestamp(s.EndTime),
		Labels:            s.Labels,
		Owner:             s.Owner,
		Generation:        int32(d.Generation),
		Image:             d.Image,
		SandboxExpireTime: timestamp(d.SandboxDeadline),
		Agent:             agentProto(d),
	}
	if s.State == session.Paused {
		converted.Sandbox = ""
	}
	for _, c := range d.Checkouts {
		converted.Repositories = append(converted.Repositories, &executorv1.Checkout{Url: text(c.URL), Path: text(c.Path), Branch: text(c.Branch), Commit: text(c.Commit)})
	}
	for _, w := range d.Saved {
		converted.SavedWork = append(converted.SavedWork, savedProto(w))
	}
	if d.IdleTimeout > 0 {
		converted.IdleTimeout = durationpb.New(d.IdleTimeout)
		converted.IdleAction = executorv1.IdleAction_IDLE_ACTION_TERMINATE
		if d.IdleAction == session.IdlePause {
			converted.IdleAction = executorv1.IdleAction_IDLE_ACTION_PAUSE
		}
	}
	if d.ForkedFrom != "" {
		converted.ForkedFrom = sessionName(d.ForkedFrom)
	}
	if d.Identity != (session.Identity{}) {
		converted.Identity = &executorv1.Identity{Name: d.Identity.Name, Email: d.Identity.Email}
	}
	return converted
}

func savedProto(w session.SavedWork) *executorv1.SavedWork {
	return &executorv1.SavedWork{
		Path: text(w.Path), Ref: text(w.Ref), Commit: text(w.Commit), Snapshot: string(w.Snapshot), Detail: text(w.Detail), SaveTime: timestamp(w.Time),
	}
}

// agentProto is nil where there is no agent.
func agentProto(d session.Details) *executorv1.AgentStatus {
	if d.Agent == nil {
		return nil
	}
	return agentStatusProto(session.AgentNote{Status: d.Status, Model: d.Agent.Model})
}

func agentStatusProto(n session.AgentNote) *executorv1.AgentStatus {
	converted := &executorv1.AgentStatus{
		State:   executorv1.AgentStatus_State(executorv1.AgentStatus_State_value["STATE_"+string(n.Status.State)]),
		Version: text(n.Status.Version), Detail: text(n.Status.Detail),
	}
	if n.Model != (session.Model{}) {
		converted.Model = &executorv1.Model{Provider: n.Model.Provider, Model: n.Model.Model, BaseUrl: n.Model.BaseURL}
	}
	for _, m := range n.Status.MCP {
		converted.McpServers = append(converted.McpServers, &executorv1.McpServer{
			Name: text(m.Name), Detail: text(m.Detail),
			State: executorv1.McpServer_State(executorv1.McpServer_State_value["STATE_"+m.State]),
		})
	}
	return converted
}

func sessionStateProto(s session.State) executorv1.Session_State {
	return executorv1.Session_State(executorv1.Session_State_value["STATE_"+s.String()])
}

// sessionEventProto converts an event of a session; id is the session's.
func sessionEventProto(id string, e session.Event) *executorv1.SessionEvent {
	out := &executorv1.SessionEvent{Cursor: journalCursorProto(e.Cursor), EventTime: timestamp(e.Time)}
	switch {
	case e.Gap != nil:
		out.Kind = &executorv1.SessionEvent_Gap{Gap: journalGapProto(e.Gap)}
	case e.Started != nil:
		out.Kind = &executorv1.SessionEvent_Started{Started: &executorv1.SessionStarted{Session: sessionName(e.Started.Session)}}
	case e.Step != nil:
		out.Kind = &executorv1.SessionEvent_Step{Step: stepProto(e.Step)}
	case e.Changed != nil:
		out.Kind = &executorv1.SessionEvent_Changed{Changed: sessionProto(*e.Changed)}
	case e.Warning != nil:
		out.Kind = &executorv1.SessionEvent_Warning{Warning: &executorv1.SessionWarning{
			Cause:      executorv1.SessionWarning_Cause(executorv1.SessionWarning_Cause_value["CAUSE_"+e.Warning.Cause]),
			ExpireTime: timestamp(e.Warning.Expire),
		}}
	case e.Turn != nil:
		out.Kind = &executorv1.SessionEvent_Turn{Turn: &executorv1.TurnSummary{
			Turn:    turnName(id, e.Turn.ID),
			State:   executorv1.Turn_State(executorv1.Turn_State_value["STATE_"+e.Turn.State]),
			Outcome: executorv1.TurnOutcome(executorv1.TurnOutcome_value["TURN_OUTCOME_"+e.Turn.Outcome]),
			Usage:   &executorv1.AgentUsage{CostMicros: e.Turn.CostMicros},
		}}
	case e.Execution != nil:
		out.Kind = &executorv1.SessionEvent_Execution{Execution: &executorv1.ExecutionSummary{
			Execution: executionName(execution.Ref{Session: id, ID: e.Execution.ID}), Ended: e.Execution.Ended,
			Reason: executorv1.Reason(executorv1.Reason_value["REASON_"+e.Execution.Reason]),
		}}
	case e.Asked != nil:
		asked := &executorv1.Interaction{Name: interactionName(id, e.Asked.ID)}
		if e.Asked.Pending {
			asked.State = executorv1.Interaction_STATE_PENDING
			out.Kind = &executorv1.SessionEvent_InteractionRequested{InteractionRequested: asked}
		} else {
			out.Kind = &executorv1.SessionEvent_InteractionResolved{InteractionResolved: asked}
		}
	case e.Saved != nil:
		out.Kind = &executorv1.SessionEvent_Saved{Saved: savedProto(*e.Saved)}
	case e.Replaced != nil:
		out.Kind = &executorv1.SessionEvent_SandboxReplaced{SandboxReplaced: &executorv1.SandboxReplaced{
			Sandbox: e.Replaced.Sandbox, Generation: int32(e.Replaced.Generation), Detail: text(e.Replaced.Detail),
		}}
	case e.Agent != nil:
		out.Kind = &executorv1.SessionEvent_Agent{Agent: agentStatusProto(*e.Agent)}
	case e.Ended != nil:
		out.Kind = &executorv1.SessionEvent_Ended{Ended: sessionProto(*e.Ended)}
	}
	return out
}

func stepProto(s *session.Step) *executorv1.SessionStep {
	out := &executorv1.SessionStep{
		Kind:    executorv1.SessionStep_Kind(executorv1.SessionStep_Kind_value["KIND_"+string(s.Kind)]),
		State:   executorv1.SessionStep_State(executorv1.SessionStep_State_value["STATE_"+string(s.State)]),
		Subject: text(s.Subject), Text: text(s.Text),
	}
	if s.Percent != nil {
		percent := int32(*s.Percent)
		out.Percent = &percent
	}
	return out
}
