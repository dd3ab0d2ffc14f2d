package api

import (
	"context"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/turn"
)

// ListInteractions implements executorv1.SessionServiceServer.
func (s *sessionService) ListInteractions(ctx context.Context, req *executorv1.ListInteractionsRequest) (*executorv1.ListInteractionsResponse, error) {
	scope := req.GetParent() + " pending"
	if req.GetShowResolved() {
		scope = req.GetParent() + " all"
	}
	size := pageSize(req.GetPageSize())
	query := turn.InteractionQuery{Caller: callerOf(ctx), Limit: size + 1, Pending: !req.GetShowResolved()}
	list := listing(ctx, "ListInteractions", scope, "", false)
	var err error
	if query.Before, err = s.tokens.decode(list, req.GetPageToken()); err != nil {
		return nil, err
	}
	if query.Session, err = parseSessionParent(req.GetParent()); err != nil {
		return nil, err
	}
	found, err := s.turns.ListInteractions(ctx, query)
	if err != nil {
		return nil, err
	}
	page := fitPage(found[:min(len(found), size)], interactionProto)
	return &executorv1.ListInteractionsResponse{
		Interactions:  page,
		NextPageToken: tokenBehind(found, len(page), func(last turn.Interaction) string { return s.tokens.encode(list, last.ID) }),
	}, nil
}

// ResolveInteraction implements executorv1.SessionServiceServer.
func (s *sessionService) ResolveInteraction(ctx context.Context, req *executorv1.ResolveInteractionRequest) (*executorv1.ResolveInteractionResponse, error) {
	ref, err := parseInteractionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	key, err := s.keys.of(ctx, req)
	if err != nil {
		return nil, err
	}
	resolved, err := s.turns.Resolve(ctx, ref, answerOf(req.GetResolution()), requester(ctx, ""), key)
	if err != nil {
		return nil, err
	}
	return &executorv1.ResolveInteractionResponse{Interaction: interactionProto(resolved)}, nil
}

// answerOf reads a resolution; whether it fits, the domain checks.
func answerOf(r *executorv1.Resolution) agent.Answer {
	answer := agent.Answer{Message: r.GetMessage()}
	switch r.GetDecision() {
	case executorv1.Resolution_DECISION_ALLOW_ONCE:
		answer.Decision = agent.AllowOnce
	case executorv1.Resolution_DECISION_ALLOW_ALWAYS:
		answer.Decision = agent.AllowAlways
	case executorv1.Resolution_DECISION_REJECT:
		answer.Decision = agent.Reject
	}
	for _, one := range r.GetAnswers() {
		answer.Labels = append(answer.Labels, one.GetLabels())
	}
	return answer
}

// interactionProto converts an interaction. What is asked the agent wrote, and may hold
// anything.
func interactionProto(i turn.Interaction) *executorv1.Interaction {
	converted := &executorv1.Interaction{
		Name:        interactionName(i.Session, i.ID),
		Turn:        turnName(i.Session, i.Turn),
		State:       executorv1.Interaction_State(executorv1.Interaction_State_value["STATE_"+string(i.State)]),
		CreateTime:  timestamp(i.CreateTime),
		ExpireTime:  timestamp(i.ExpireTime),
		ResolveTime: timestamp(i.ResolveTime),
		ResolvedBy:  text(i.ResolvedBy),
		SubAgent:    text(i.SubAgent),
	}
	switch {
	case i.Asked.Question != nil:
		question := &executorv1.Question{Call: text(i.Asked.Call)}
		for _, item := range i.Asked.Question.Items {
			question.Items = append(question.Items, questionProto(item))
		}
		converted.Request = &executorv1.Interaction_Question{Question: question}
	case i.Asked.Permission != nil:
		p := i.Asked.Permission
		converted.Request = &executorv1.Interaction_Permission{Permission: &executorv1.PermissionRequest{
			Permission: text(p.Kind), Patterns: texts(p.Patterns), Call: text(i.Asked.Call), Metadata: structProto(p.Metadata),
		}}
	}
	if a := i.Answer; a != nil {
		converted.Resolution = &executorv1.Resolution{
			Decision: executorv1.Resolution_Decision(executorv1.Resolution_Decision_value["DECISION_"+string(a.Decision)]),
			Message:  text(a.Message),
		}
		for _, labels := range a.Labels {
			converted.Resolution.Answers = append(converted.Resolution.Answers, &executorv1.Answer{Labels: texts(labels)})
		}
	}
	return converted
}

func questionProto(item agent.QuestionItem) *executorv1.Question_Item {
	converted := &executorv1.Question_Item{Header: text(item.Header), Text: text(item.Text), Multiple: item.Multiple, Custom: item.Custom}
	for _, o := range item.Options {
		converted.Options = append(converted.Options, &executorv1.Question_Option{Label: text(o.Label), Description: text(o.Description)})
	}
	return converted
}
