package opencode

import (
	"cmp"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/harvest-run/executord/internal/agent"
)

// take takes messages of a conversation as they are stored, the oldest first.
func (t *translation) take(list []stored, th *thread) {
	for _, m := range list {
		// A sub-agent can be asked again in a later turn: what it said before is of another.
		if th.id != t.root && m.Info.Time.Created < t.created {
			continue
		}
		t.head(th, &m.Info)
		if th.mine(m.Info.ID) {
			t.void(th, m)
		}
		for _, p := range m.Parts {
			p.MessageID = m.Info.ID
			t.update(th, p, true)
		}
	}
}

// void drops the parts of a message that are of attempts before its last.
func (t *translation) void(th *thread, m stored) {
	last := 0
	for i, p := range m.Parts {
		if p.Type == "step-start" {
			last = i
		}
	}
	var void []string
	for _, p := range m.Parts[:last] {
		if p.Type != "text" && p.Type != "reasoning" {
			continue
		}
		seen := t.part(p.ID, p.Type)
		if !seen.dropped && seen.n > 0 {
			void = append(void, p.ID)
		}
		seen.dropped = true
	}
	if len(void) > 0 {
		t.emit(th, agent.Event{PartsDropped: &agent.PartsDropped{Parts: void}})
	}
}

// following are the conversations of the turn, the agent's own first.
func (t *translation) following() []*thread {
	list := slices.Collect(maps.Values(t.threads))
	slices.SortFunc(list, func(a, b *thread) int { return strings.Compare(a.name, b.name) })
	return list
}

// absorb takes an event that was told before, so that it is not told again.
func (t *translation) absorb(e agent.Event) {
	th := t.thread(t.root)
	if e.SubAgent != "" {
		th = t.thread(e.SubAgent)
		th.started = true
	}
	switch {
	case e.Text != nil:
		t.absorbWords(th, "text", *e.Text)
	case e.Reasoning != nil:
		t.absorbWords(th, "reasoning", *e.Reasoning)
	case e.PartEnded != nil:
		t.part(e.PartEnded.Part, "text").ended = true
	case e.PartsDropped != nil:
		for _, id := range e.PartsDropped.Parts {
			t.part(id, "text").dropped = true
		}
		th.step = nil
	case e.ToolStarted != nil:
		p := t.part(e.ToolStarted.Call, "tool")
		p.tool, p.input, p.thread = e.ToolStarted.Tool, true, th.id
	case e.ToolOutput != nil:
		t.part(e.ToolOutput.Call, "tool").tail += e.ToolOutput.Text
	case e.ToolEnded != nil:
		t.part(e.ToolEnded.Call, "tool").ended = true
	case e.SubAgentStarted != nil:
		child := t.thread(e.SubAgentStarted.ID)
		child.parent, child.started, child.ended = th.id, true, false
		if call := e.SubAgentStarted.Call; call != "" {
			t.part(call, "tool").child = child.id
		}
	case e.SubAgentEnded != nil:
		t.thread(e.SubAgentEnded.ID).ended = true
	case e.Usage != nil:
		// They have no name of their own: so many of the conversation's steps were told.
		th.paid++
		th.step = nil
		th.usage, t.usage = th.usage.Add(*e.Usage), t.usage.Add(*e.Usage)
	case e.FileChanged != nil && e.FileChanged.Patch != "":
		t.patches[e.FileChanged.Path] = e.FileChanged.Patch
	case e.Error != nil:
		t.errors = append(t.errors, *e.Error)
	}
}

func (t *translation) absorbWords(th *thread, kind string, d agent.Delta) {
	p := t.part(d.Part, kind)
	p.kind, p.thread = kind, th.id
	p.n += len(d.Text)
	p.hash.WriteString(d.Text)
	if !slices.Contains(th.step, d.Part) {
		th.step = append(th.step, d.Part)
	}
}

// close ends what is open when the turn is over: of what has not ended, why.
func (t *translation) close(why string) {
	t.flush("")
	for _, id := range slices.Sorted(maps.Keys(t.asked)) {
		t.answered(id)
	}
	for _, id := range slices.Sorted(maps.Keys(t.parts)) {
		p := t.parts[id]
		th := t.owner(id)
		switch {
		case p.ended || p.dropped:
		case p.kind == "tool" && p.input:
			if child := t.threads[p.child]; child != nil {
				t.through(th, child)
			}
			p.ended = true
			t.emit(th, agent.Event{ToolEnded: &agent.ToolEnded{Call: id, Tool: p.tool, Error: why}})
		case p.kind != "tool" && p.n > 0:
			p.ended = true
			t.emit(th, agent.Event{PartEnded: &agent.PartEnded{Part: id}})
		}
	}
	for _, th := range t.following() {
		if th.id != t.root {
			t.through(t.thread(cmp.Or(th.parent, t.root)), th)
		}
	}
}

// owner is the conversation of a part.
func (t *translation) owner(id string) *thread {
	if th := t.threads[t.parts[id].thread]; th != nil {
		return th
	}
	return t.thread(t.root)
}

// elsewhere are changes that tools told of files which OpenCode does not watch: outside of
// the repository, or without one.
func (t *translation) elsewhere(known []agent.FileDiff) []agent.FileDiff {
	var list []agent.FileDiff
	for _, f := range t.told {
		if inside := t.dir != "/" && strings.HasPrefix(f.Path, strings.TrimSuffix(t.dir, "/")+"/"); inside {
			continue
		}
		if !slices.ContainsFunc(known, func(d agent.FileDiff) bool { return path.Clean(d.Path) == path.Clean(f.Path) }) {
			list = append(list, f)
		}
	}
	return list
}
