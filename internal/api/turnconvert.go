package api

import (
	"encoding/json"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/turn"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func promptOf(p *executorv1.Prompt) turn.Prompt {
	prompt := turn.Prompt{Text: p.GetText(), Author: p.GetAuthor(), Model: modelOf(p.GetModel())}
	for _, a := range p.GetAttachments() {
		prompt.Attachments = append(prompt.Attachments, turn.Attachment{Filename: a.GetFilename(), MediaType: a.GetMediaType(), Data: a.GetData()})
	}
	return prompt
}

func modelOf(m *executorv1.Model) agent.Model {
	return agent.Model{Provider: m.GetProvider(), Model: m.GetModel(), BaseURL: m.GetBaseUrl()}
}

// modelProto converts a model; the zero Model is an absent one.
func modelProto(m agent.Model) *executorv1.Model {
	if m == (agent.Model{}) {
		return nil
	}
	return &executorv1.Model{Provider: m.Provider, Model: m.Model, BaseUrl: m.BaseURL}
}

// journalCursorOf reads a cursor; nil, the start, for one that names no place.
func journalCursorOf(c *executorv1.Cursor) *journal.Cursor {
	if c.GetEpoch() == "" && c.GetSequence() == 0 {
		return nil
	}
	return &journal.Cursor{Epoch: c.GetEpoch(), Sequence: c.GetSequence()}
}

func journalCursorProto(c journal.Cursor) *executorv1.Cursor {
	return &executorv1.Cursor{Epoch: c.Epoch, Sequence: c.Sequence}
}

// journalGapProto converts a gap in a journal, which has no streams.
func journalGapProto(g *journal.Gap) *executorv1.Gap {
	return &executorv1.Gap{
		Reason: executorv1.Gap_Reason(executorv1.Gap_Reason_value["REASON_"+string(g.Reason)]), MissingEvents: g.MissingEvents,
	}
}

func turnProto(t turn.Turn) *executorv1.Turn {
	converted := &executorv1.Turn{
		Name:          turnName(t.Session, t.ID),
		State:         turnStateProto(t.State),
		Prompt:        &executorv1.Prompt{Text: t.Prompt.Text, Author: t.Prompt.Author, Model: modelProto(t.Prompt.Model)},
		Owner:         t.Owner,
		CreateTime:    timestamp(t.CreateTime),
		StartTime:     timestamp(t.StartTime),
		EndTime:       timestamp(t.EndTime),
		QueuePosition: int32(t.Before),
	}
	for _, a := range t.Prompt.Attachments {
		converted.Prompt.Attachments = append(converted.Prompt.Attachments, &executorv1.Attachment{Filename: a.Filename, MediaType: a.MediaType})
	}
	if t.Result != nil {
		converted.Result = turnResultProto(t.Result)
	}
	return converted
}

func turnStateProto(s turn.State) executorv1.Turn_State {
	return executorv1.Turn_State(executorv1.Turn_State_value["STATE_"+s.String()])
}

func turnOutcomeProto(o agent.OutcomeKind) executorv1.TurnOutcome {
	return executorv1.TurnOutcome(executorv1.TurnOutcome_value["TURN_OUTCOME_"+string(o)])
}

func turnResultProto(r *turn.Result) *executorv1.TurnResult {
	converted := &executorv1.TurnResult{
		Outcome: turnOutcomeProto(r.Outcome), Detail: text(r.Detail), Usage: agentUsageProto(r.Usage),
		Text: text(r.Text), CancelledBy: text(r.CancelledBy),
	}
	if r.Error != nil {
		converted.Error = agentErrorProto(r.Error)
	}
	for _, d := range r.Diffs {
		converted.Diffs = append(converted.Diffs, fileDiffProto(d))
	}
	return converted
}

func agentErrorProto(e *agent.Error) *executorv1.AgentError {
	return &executorv1.AgentError{Name: text(e.Name), Message: text(e.Message), StatusCode: e.StatusCode, Retryable: e.Retryable}
}

func agentUsageProto(u agent.Usage) *executorv1.AgentUsage {
	return &executorv1.AgentUsage{
		InputTokens: u.InputTokens, OutputTokens: u.OutputTokens, ReasoningTokens: u.ReasoningTokens,
		CacheReadTokens: u.CacheReadTokens, CacheWriteTokens: u.CacheWriteTokens, CostMicros: u.CostMicros,
	}
}

func fileDiffProto(d agent.FileDiff) *executorv1.FileDiff {
	return &executorv1.FileDiff{
		Path: text(d.Path), Change: executorv1.FileDiff_Change(executorv1.FileDiff_Change_value["CHANGE_"+string(d.Change)]),
		Patch: text(d.Patch), Additions: d.Additions, Deletions: d.Deletions,
	}
}

// turnEventProto makes a new message: grpc-go may read a message after Send has returned.
func turnEventProto(e turn.Event) *executorv1.TurnEvent {
	converted := &executorv1.TurnEvent{Cursor: journalCursorProto(e.Cursor), EventTime: timestamp(e.Time)}
	switch {
	case e.Gap != nil:
		converted.Kind = &executorv1.TurnEvent_Gap{Gap: journalGapProto(e.Gap)}
	case e.Started != nil:
		converted.Kind = &executorv1.TurnEvent_Started{Started: &executorv1.TurnStarted{
			Turn: turnName(e.Started.Session, e.Started.Turn), QueuePosition: int32(e.Started.Before),
		}}
	case e.Running != nil:
		converted.Kind = &executorv1.TurnEvent_Running{Running: &executorv1.TurnRunning{Model: modelProto(e.Running.Model)}}
	case e.Requested != nil:
		converted.SubAgent = text(e.Requested.SubAgent)
		converted.Kind = &executorv1.TurnEvent_InteractionRequested{InteractionRequested: interactionProto(*e.Requested)}
	case e.Resolved != nil:
		converted.SubAgent = text(e.Resolved.SubAgent)
		converted.Kind = &executorv1.TurnEvent_InteractionResolved{InteractionResolved: interactionProto(*e.Resolved)}
	case e.Result != nil:
		converted.Kind = &executorv1.TurnEvent_Result{Result: turnResultProto(e.Result)}
	case e.Agent != nil:
		agentEventProto(converted, *e.Agent)
	}
	return converted
}

// agentEventProto fills in what the agent told. It may hold anything. Of a kind that is
// not known only the place is told.
func agentEventProto(to *executorv1.TurnEvent, e agent.Event) {
	to.SubAgent = text(e.SubAgent)
	switch {
	case e.Text != nil:
		to.Kind = &executorv1.TurnEvent_Text{Text: deltaProto(e.Text)}
	case e.Reasoning != nil:
		to.Kind = &executorv1.TurnEvent_Reasoning{Reasoning: deltaProto(e.Reasoning)}
	case e.PartEnded != nil:
		ended := &executorv1.PartEnded{Part: text(e.PartEnded.Part)}
		if e.PartEnded.Text != nil {
			whole := text(*e.PartEnded.Text)
			ended.Text = &whole
		}
		to.Kind = &executorv1.TurnEvent_PartEnded{PartEnded: ended}
	case e.PartsDropped != nil:
		to.Kind = &executorv1.TurnEvent_PartsDropped{PartsDropped: &executorv1.PartsDropped{Parts: texts(e.PartsDropped.Parts)}}
	case e.ToolStarted != nil:
		t := e.ToolStarted
		to.Kind = &executorv1.TurnEvent_ToolStarted{ToolStarted: &executorv1.ToolStarted{
			Call: text(t.Call), Tool: text(t.Tool), Input: structProto(t.Input), Title: text(t.Title),
		}}
	case e.ToolOutput != nil:
		to.Kind = &executorv1.TurnEvent_ToolOutput{ToolOutput: &executorv1.ToolOutput{Call: text(e.ToolOutput.Call), Text: text(e.ToolOutput.Text)}}
	case e.ToolEnded != nil:
		to.Kind = &executorv1.TurnEvent_ToolEnded{ToolEnded: toolEndedProto(*e.ToolEnded)}
	case e.FileChanged != nil:
		to.Kind = &executorv1.TurnEvent_FileChanged{FileChanged: fileDiffProto(*e.FileChanged)}
	case e.Todos != nil:
		list := &executorv1.TodoList{}
		for _, i := range e.Todos.Items {
			list.Items = append(list.Items, &executorv1.TodoList_Item{Text: text(i.Text), Status: text(i.Status), Priority: text(i.Priority)})
		}
		to.Kind = &executorv1.TurnEvent_Todos{Todos: list}
	case e.SubAgentStarted != nil:
		s := e.SubAgentStarted
		to.Kind = &executorv1.TurnEvent_SubAgentStarted{SubAgentStarted: &executorv1.SubAgentStarted{Id: text(s.ID), Call: text(s.Call), Title: text(s.Title)}}
	case e.SubAgentEnded != nil:
		to.Kind = &executorv1.TurnEvent_SubAgentEnded{SubAgentEnded: &executorv1.SubAgentEnded{Id: text(e.SubAgentEnded.ID), Usage: agentUsageProto(e.SubAgentEnded.Usage)}}
	case e.Usage != nil:
		to.Kind = &executorv1.TurnEvent_Usage{Usage: agentUsageProto(*e.Usage)}
	case e.Retry != nil:
		to.Kind = &executorv1.TurnEvent_Retry{Retry: &executorv1.AgentRetry{Attempt: e.Retry.Attempt, Message: text(e.Retry.Message), NextTime: timestamp(e.Retry.Next)}}
	case e.Compaction != nil:
		to.Kind = &executorv1.TurnEvent_Compaction{Compaction: &executorv1.Compaction{Automatic: e.Compaction.Automatic}}
	case e.Error != nil:
		to.Kind = &executorv1.TurnEvent_Error{Error: agentErrorProto(e.Error)}
	case e.Restarted != nil:
		to.Kind = &executorv1.TurnEvent_AgentRestarted{AgentRestarted: &executorv1.AgentRestarted{Detail: text(e.Restarted.Detail)}}
	}
}

func deltaProto(d *agent.Delta) *executorv1.TextDelta {
	return &executorv1.TextDelta{Part: text(d.Part), Text: text(d.Text)}
}

func toolEndedProto(t agent.ToolEnded) *executorv1.ToolEnded {
	return &executorv1.ToolEnded{
		Call: text(t.Call), Output: text(t.Output), Error: text(t.Error), Title: text(t.Title), ExitCode: t.ExitCode, Metadata: structProto(t.Metadata),
	}
}

func turnHeartbeatProto(cursor journal.Cursor, last time.Time) *executorv1.TurnEvent {
	return &executorv1.TurnEvent{
		Cursor: journalCursorProto(cursor), EventTime: timestamppb.Now(),
		Kind: &executorv1.TurnEvent_Heartbeat{Heartbeat: &executorv1.Heartbeat{LastEventTime: timestamp(last)}},
	}
}

func messageProto(session string, m agent.Message) *executorv1.Message {
	converted := &executorv1.Message{
		Id: text(m.ID), Role: executorv1.Message_ROLE_ASSISTANT, Text: text(m.Text), CreateTime: timestamp(m.Time), Usage: agentUsageProto(m.Usage),
	}
	if m.FromUser {
		converted.Role = executorv1.Message_ROLE_USER
	}
	if m.Prompt != "" {
		converted.Turn = turnName(session, m.Prompt)
	}
	for _, t := range m.Tools {
		converted.Tools = append(converted.Tools, toolEndedProto(t))
	}
	return converted
}

// structProto converts a JSON object; nil for what is none.
func structProto(raw json.RawMessage) *structpb.Struct {
	var fields map[string]any
	// By way of encoding/json, which makes valid UTF-8 of its strings.
	if len(raw) == 0 || json.Unmarshal(raw, &fields) != nil {
		return nil
	}
	converted, err := structpb.NewStruct(fields)
	if err != nil {
		return nil
	}
	return converted
}

func texts(all []string) []string {
	var valid []string
	for _, s := range all {
		valid = append(valid, text(s))
	}
	return valid
}
