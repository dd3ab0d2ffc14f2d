package turn

import (
	"slices"
	"time"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/fault"
)

// Interaction is a permission or an answer that an agent asks for. Its JSON form is in
// the journal of its turn.
type Interaction struct {
	// ID is unique and sorts by time of creation.
	ID       string `json:"id"`
	Session  string `json:"session"`
	Turn     string `json:"turn"`
	SubAgent string `json:"sub_agent,omitempty"`
	// Asked is what is asked, with the agent's own name of it.
	Asked      agent.Asked      `json:"asked"`
	State      InteractionState `json:"state"`
	CreateTime time.Time        `json:"create_time"`
	// ExpireTime is when the default answer is given; zero where nobody was asked.
	ExpireTime time.Time `json:"expire_time,omitzero"`
	// ResolveTime, ResolvedBy and Answer are set when it is no longer Pending; Answer is nil
	// if none was given.
	ResolveTime time.Time     `json:"resolve_time,omitzero"`
	ResolvedBy  string        `json:"resolved_by,omitempty"`
	Answer      *agent.Answer `json:"answer,omitempty"`
}

// InteractionState is where an interaction is. The names are those of the API, and they
// are stored.
type InteractionState string

// The states. All others follow on Pending, once.
const (
	// Pending: it waits.
	Pending InteractionState = "PENDING"
	// Resolved: somebody, or the policy, resolved it.
	Resolved InteractionState = "RESOLVED"
	// Expired: its deadline came, and the default answer was given.
	Expired InteractionState = "EXPIRED"
	// Void: the agent does not wait any more.
	Void InteractionState = "VOID"
)

const (
	// maxAnswer bounds what is said in one answer, maxLabels how many labels it has.
	maxAnswer = 64 << 10
	maxLabels = 64
	// maxMessage bounds what the agent is told with a refusal.
	maxMessage = 4 << 10
)

// check returns a fault Invalid if an answer does not fit what is asked.
func (i Interaction) check(a agent.Answer) error {
	if len(a.Message) > maxMessage {
		return fault.InvalidField("RESOLUTION", "resolution.message", "has %d bytes; %d are the most", len(a.Message), maxMessage)
	}
	if a.Message != "" && a.Decision != agent.Reject {
		return fault.InvalidField("RESOLUTION", "resolution.message", "is for a REJECT only")
	}
	if i.Asked.Question == nil {
		if a.Decision == "" {
			return fault.InvalidField("RESOLUTION", "resolution.decision", "must be set: a permission is asked for")
		}
		if len(a.Labels) > 0 {
			return fault.InvalidField("RESOLUTION", "resolution.answers", "must not be set: a permission is asked for")
		}
		return nil
	}
	if a.Decision == agent.Reject && len(a.Labels) == 0 {
		return nil
	}
	if a.Decision != "" {
		return fault.InvalidField("RESOLUTION", "resolution.decision", "must be REJECT alone, or answers must be set: a question is asked")
	}
	items := i.Asked.Question.Items
	if len(a.Labels) != len(items) {
		return fault.InvalidField("RESOLUTION", "resolution.answers", "has %d answers to %d questions", len(a.Labels), len(items))
	}
	size := 0
	for n, item := range items {
		labels := a.Labels[n]
		if len(labels) == 0 || len(labels) > maxLabels || len(labels) > 1 && !item.Multiple {
			return fault.InvalidField("RESOLUTION", "resolution.answers", "question %d takes another number of answers than %d", n+1, len(labels))
		}
		for _, label := range labels {
			if size += len(label); size > maxAnswer {
				return fault.InvalidField("RESOLUTION", "resolution.answers", "are longer than %d bytes together", maxAnswer)
			}
			offered := slices.ContainsFunc(item.Options, func(o agent.Option) bool { return o.Label == label })
			if !offered && (!item.Custom || label == "") {
				return fault.InvalidField("RESOLUTION", "resolution.answers", "question %d has no such choice, and takes no answer of one's own", n+1)
			}
		}
	}
	return nil
}

// byDefault is the answer that is given at the deadline.
func (i Interaction) byDefault(p Policy) agent.Answer {
	if p.Allow && i.Asked.Question == nil {
		return agent.Answer{Decision: agent.AllowOnce}
	}
	return agent.Answer{Decision: agent.Reject, Message: "nobody answered in time"}
}

// byPolicy is the answer where nobody is asked; false where somebody is.
func (i Interaction) byPolicy(p Policy) (agent.Answer, bool) {
	switch {
	case p.Mode == Ask:
		return agent.Answer{}, false
	case p.Mode == Deny:
		return agent.Answer{Decision: agent.Reject, Message: "the session's policy refuses it"}, true
	case i.Asked.Question != nil:
		return agent.Answer{Decision: agent.Reject, Message: "nobody is there to be asked: decide for yourself"}, true
	default:
		return agent.Answer{Decision: agent.AllowOnce}, true
	}
}

func notPending(i Interaction) error {
	how := map[InteractionState]string{
		Resolved: "was resolved by " + i.ResolvedBy, Expired: "was not answered in time", Void: "is not waited for any more",
	}[i.State]
	return fault.New(fault.FailedPrecondition, "INTERACTION_NOT_PENDING", "interaction %q %s", i.ID, how).With("state", string(i.State))
}
