package opencode

import (
	"fmt"
	"slices"
	"strings"

	"github.com/harvest-run/executord/internal/agent"
)

// outcome decides how a turn ended from its messages.
func (t *turn) outcome(own []stored, e end) agent.Outcome {
	x := t.translation
	var last *stored
	var out agent.Outcome
	var broken *failure // of the very last, also if it was to make the history shorter
	for i, m := range own {
		if m.Info.Role != "assistant" {
			continue
		}
		broken = m.Info.Error
		if m.Info.Summary.Is {
			continue
		}
		last = &own[i]
		if text := spoken(m, x); text != "" {
			out.Text = text
		}
	}
	fail := func(err agent.Error) agent.Outcome {
		out.Kind, out.Error, out.Detail = agent.Failed, &err, err.Message
		return out
	}
	complete := last != nil && last.Info.Time.Completed > 0
	switch {
	case e.restarted && !(complete && last.Info.Finish != "" && last.Info.Finish != "tool-calls"):
		return fail(agent.Error{Name: "AgentDied", Message: fmt.Sprintf("the agent died (%s) and was started again; what it was doing is lost", e.how), Retryable: true})
	case last == nil && t.aborted.Load():
		out.Kind, out.Detail = agent.Aborted, "aborted before the agent began"
	case last == nil:
		if n := len(x.errors); n > 0 {
			return fail(x.errors[0])
		}
		text := "the agent gave no answer"
		if e.refused != nil {
			text = e.refused.Error()
		}
		return fail(agent.Error{Name: "UnknownError", Message: text})
	case broken != nil && broken.Name == "MessageAbortedError",
		broken == nil && last.Info.Finish == "" && (complete || t.aborted.Load()) && e.refused == nil:
		out.Kind, out.Detail = agent.Aborted, "aborted"
	case broken != nil:
		return fail(broken.plain())
	case e.refused != nil && len(x.errors) > 0:
		return fail(x.errors[0])
	case e.refused != nil:
		return fail(agent.Error{Name: "UnknownError", Message: e.refused.Error()})
	case last.Info.Finish == "":
		return fail(agent.Error{Name: "UnknownError", Message: "the agent stopped and did not say why", Retryable: true})
	case last.Info.Finish == "length":
		out.Kind, out.Detail = agent.Truncated, "the model's answer reached its greatest length"
	case refused(*last) != "":
		out.Kind, out.Detail = agent.Rejected, refused(*last)
	default:
		out.Kind = agent.Completed
	}
	return out
}

// spoken is the text of a message, without what was void.
func spoken(m stored, x *translation) string {
	var b strings.Builder
	for _, p := range m.Parts {
		if seen := x.parts[p.ID]; p.Type == "text" && !(seen != nil && seen.dropped) {
			b.WriteString(p.Text)
		}
	}
	return b.String()
}

// refused is what the last tool says if the turn ended because a person said no.
func refused(m stored) string {
	if m.Info.Finish != "tool-calls" {
		return ""
	}
	for _, p := range slices.Backward(m.Parts) {
		text := p.State.Error
		if p.Type == "tool" && (strings.Contains(text, "rejected permission") || strings.Contains(text, "dismissed this question")) {
			return text
		}
	}
	return ""
}
