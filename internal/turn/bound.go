package turn

import (
	"encoding/json"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/harvest-run/executord/internal/agent"
)

// What an agent tells is bounded before it is kept: an event fits into a message of the
// API whatever the agent says.
const (
	// maxDelta is the most text of one event; more becomes several. With it a message takes
	// the small ones of grpc-go's buffers.
	maxDelta = 24 << 10
	// maxWhole bounds the whole text of a part, maxLast that of a turn's last one.
	maxWhole = 1 << 20
	maxLast  = 512 << 10
	// maxOutput bounds what a tool gave.
	maxOutput = 256 << 10
	// maxObject bounds a JSON object: a tool's input, or the agent's facts about something.
	maxObject = 256 << 10
	// maxDepth bounds its nesting: a level takes three of a message, of which some clients
	// read a hundred.
	maxDepth = 24
	// maxPatch bounds the patch of one file, maxPatches those of a turn together.
	maxPatch   = 256 << 10
	maxPatches = 1 << 20
	// maxFiles is how many files a turn tells of at its end.
	maxFiles = 1000
	// maxNote bounds a text for people, maxName a name.
	maxNote = 4 << 10
	maxName = 512
	// maxList bounds lists: of todos, patterns, parts, tools.
	maxList = 256
	// maxQuestions bounds what is asked at once, maxOptions the choices of each.
	maxQuestions = 16
	maxOptions   = 32
)

// bounded makes of an event of an agent those that are kept.
func bounded(e agent.Event) []agent.Event {
	e.SubAgent = clip(e.SubAgent, maxName)
	switch {
	case e.Text != nil:
		return deltas(e, *e.Text, func(e *agent.Event, d *agent.Delta) { e.Text = d })
	case e.Reasoning != nil:
		return deltas(e, *e.Reasoning, func(e *agent.Event, d *agent.Delta) { e.Reasoning = d })
	case e.ToolOutput != nil:
		// As a part's.
		return deltas(e, agent.Delta{Part: e.ToolOutput.Call, Text: e.ToolOutput.Text}, func(e *agent.Event, d *agent.Delta) {
			e.ToolOutput = &agent.ToolOutput{Call: d.Part, Text: d.Text}
		})
	case e.PartEnded != nil:
		p := agent.PartEnded{Part: clip(e.PartEnded.Part, maxName)}
		if e.PartEnded.Text != nil {
			text := clip(*e.PartEnded.Text, maxWhole)
			p.Text = &text
		}
		e.PartEnded = &p
	case e.PartsDropped != nil:
		e.PartsDropped = &agent.PartsDropped{Parts: each(e.PartsDropped.Parts, func(s string) string { return clip(s, maxName) })}
	case e.ToolStarted != nil:
		t := *e.ToolStarted
		t.Call, t.Tool, t.Title, t.Input = clip(t.Call, maxName), clip(t.Tool, maxName), clip(t.Title, maxNote), object(t.Input)
		e.ToolStarted = &t
	case e.ToolEnded != nil:
		t := boundedTool(*e.ToolEnded)
		e.ToolEnded = &t
	case e.FileChanged != nil:
		f := boundedFile(*e.FileChanged, maxPatch)
		e.FileChanged = &f
	case e.Todos != nil:
		e.Todos = &agent.TodoList{Items: each(e.Todos.Items, func(i agent.TodoItem) agent.TodoItem {
			return agent.TodoItem{Text: clip(i.Text, maxNote), Status: clip(i.Status, maxName), Priority: clip(i.Priority, maxName)}
		})}
	case e.SubAgentStarted != nil:
		s := *e.SubAgentStarted
		s.ID, s.Call, s.Title = clip(s.ID, maxName), clip(s.Call, maxName), clip(s.Title, maxNote)
		e.SubAgentStarted = &s
	case e.SubAgentEnded != nil:
		s := *e.SubAgentEnded
		s.ID = clip(s.ID, maxName)
		e.SubAgentEnded = &s
	case e.Retry != nil:
		r := *e.Retry
		r.Message = clip(r.Message, maxNote)
		e.Retry = &r
	case e.Error != nil:
		e.Error = boundedError(e.Error)
	case e.Restarted != nil:
		e.Restarted = &agent.Restarted{Detail: clip(e.Restarted.Detail, maxNote)}
	}
	return []agent.Event{e}
}

// deltas cuts a text into events.
func deltas(e agent.Event, d agent.Delta, set func(*agent.Event, *agent.Delta)) []agent.Event {
	part, text := clip(d.Part, maxName), strings.ToValidUTF8(d.Text, "\uFFFD")
	var all []agent.Event
	for first := true; first || text != ""; first = false {
		piece := head(text, maxDelta)
		text = text[len(piece):]
		one := e
		set(&one, &agent.Delta{Part: part, Text: piece})
		all = append(all, one)
	}
	return all
}

func boundedTool(t agent.ToolEnded) agent.ToolEnded {
	t.Call, t.Tool, t.Title, t.Error = clip(t.Call, maxName), clip(t.Tool, maxName), clip(t.Title, maxNote), clip(t.Error, maxOutput)
	t.Output, t.Metadata = middle(t.Output, maxOutput), object(t.Metadata)
	return t
}

// boundedFile leaves a patch out that is larger than room: half of one is none.
func boundedFile(f agent.FileDiff, room int) agent.FileDiff {
	f.Path, f.Change = clip(f.Path, maxNote), agent.FileChange(clip(string(f.Change), maxName))
	if len(f.Patch) <= room {
		f.Patch = strings.ToValidUTF8(f.Patch, "\uFFFD")
	}
	if len(f.Patch) > room {
		f.Patch = ""
	}
	return f
}

func boundedError(e *agent.Error) *agent.Error {
	if e == nil {
		return nil
	}
	b := *e
	b.Name, b.Message = clip(b.Name, maxName), clip(b.Message, 4*maxNote)
	return &b
}

func boundedAsked(a agent.Asked) agent.Asked {
	a.ID, a.Call = clip(a.ID, maxName), clip(a.Call, maxName)
	if a.Permission != nil {
		p := *a.Permission
		p.Kind, p.Patterns, p.Metadata = clip(p.Kind, maxName), each(p.Patterns, func(s string) string { return clip(s, maxNote) }), object(p.Metadata)
		a.Permission = &p
	}
	if a.Question != nil {
		a.Question = &agent.Question{Items: a.Question.Items[:min(len(a.Question.Items), maxQuestions)]}
		a.Question.Items = each(a.Question.Items, func(i agent.QuestionItem) agent.QuestionItem {
			i.Header, i.Text = clip(i.Header, maxName), clip(i.Text, 2*maxNote)
			i.Options = i.Options[:min(len(i.Options), maxOptions)]
			i.Options = each(i.Options, func(o agent.Option) agent.Option {
				return agent.Option{Label: clip(o.Label, maxName), Description: clip(o.Description, maxNote/4)}
			})
			return i
		})
	}
	return a
}

// boundedResult also keeps it within one entry of a journal.
func boundedResult(r Result) *Result {
	r.Outcome = agent.OutcomeKind(clip(string(r.Outcome), maxName))
	r.Detail, r.CancelledBy, r.Text, r.Error = clip(r.Detail, maxNote), clip(r.CancelledBy, maxName), clip(r.Text, maxLast), boundedError(r.Error)
	room := maxPatches
	diffs := r.Diffs[:min(len(r.Diffs), maxFiles)]
	r.Diffs = nil
	for _, f := range diffs {
		f = boundedFile(f, room)
		room -= len(f.Patch)
		f.Path = clip(f.Path, maxName)
		r.Diffs = append(r.Diffs, f)
	}
	return &r
}

// boundedMessage keeps a message of a conversation below 3 MiB. What its tools told
// stands in the turn's journal.
func boundedMessage(m agent.Message) agent.Message {
	m.ID, m.Text = clip(m.ID, maxName), clip(m.Text, maxWhole)
	room := maxWhole
	m.Tools = each(m.Tools, func(t agent.ToolEnded) agent.ToolEnded {
		t = boundedTool(t)
		t.Output, t.Error, t.Metadata = middle(t.Output, min(room, maxOutput)), clip(t.Error, maxNote), nil
		room = max(room-len(t.Output), maxName)
		return t
	})
	return m
}

// each applies f to the first of a list.
func each[T any](list []T, f func(T) T) []T {
	if list == nil {
		return nil
	}
	some := make([]T, min(len(list), maxList))
	for i := range some {
		some[i] = f(list[i])
	}
	return some
}

// object keeps a JSON object that is one, and is not too large.
func object(raw json.RawMessage) json.RawMessage {
	if len(raw) == 0 {
		return nil
	}
	if len(raw) > maxObject {
		return json.RawMessage(fmt.Sprintf(`{"left_out":"%d bytes are more than are kept"}`, len(raw)))
	}
	var fields map[string]json.RawMessage
	if json.Unmarshal(raw, &fields) != nil || depth(raw) > maxDepth {
		return json.RawMessage(`{"left_out":"not a JSON object, or too deep"}`)
	}
	return raw
}

// depth is how deep valid JSON is nested.
func depth(raw []byte) int {
	deepest, level, quoted := 0, 0, false
	for i := 0; i < len(raw); i++ {
		switch c := raw[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{' || c == '[':
			level++
			deepest = max(deepest, level)
		case c == '}' || c == ']':
			level--
		}
	}
	return deepest
}

// middle cuts a text in its middle.
func middle(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= n {
		return s
	}
	note := fmt.Sprintf("\n… %d bytes left out …\n", len(s)-n)
	front := head(s, (n-len(note))/2)
	back := s[len(s)-(n-len(note))/2:]
	for len(back) > 0 && !utf8.RuneStart(back[0]) {
		back = back[1:]
	}
	return front + note + back
}

// clip makes valid UTF-8 of at most n bytes of a text that anybody can have written.
func clip(s string, n int) string {
	const more = "…"
	whole := len(s) <= n
	if !whole {
		s = s[:n] // before it is looked through: it can be very long
	}
	s = strings.ToValidUTF8(s, "\uFFFD")
	if whole && len(s) <= n {
		return s
	}
	return head(s, n-len(more)) + more
}

// head is the first n bytes at most, without a part of a character at the end.
func head(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
