package opencode

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/harvest-run/executord/internal/agent"
)

// call takes a tool's part.
func (t *translation) call(th *thread, p part) {
	seen := t.part(p.ID, "tool")
	seen.tool, seen.thread = p.Tool, th.id
	t.calls[[2]string{p.MessageID, p.CallID}] = p.ID
	if seen.ended || seen.dropped {
		return
	}
	facts := p.State.facts()
	switch p.State.Status {
	case "pending":
		// Its input comes in a moment.
	case "running":
		t.begin(th, p, seen)
		t.flush(p.ID)
		t.delegate(th, p, facts)
		t.output(th, p.ID, seen, facts.Output)
	case "completed", "error":
		t.begin(th, p, seen)
		t.flush(p.ID)
		t.delegate(th, p, facts)
		t.end(th, p, seen, facts)
	}
}

func (t *translation) begin(th *thread, p part, seen *progress) {
	if seen.input {
		return
	}
	seen.input = true
	t.emit(th, agent.Event{ToolStarted: &agent.ToolStarted{Call: p.ID, Tool: p.Tool, Title: p.State.Title, Input: p.State.Input}})
}

// announce tells of a sub-agent that is not known yet.
func (t *translation) announce(th *thread) {
	if th.started {
		return
	}
	th.started = true
	t.emit(t.threads[th.parent], agent.Event{SubAgentStarted: &agent.SubAgentStarted{ID: th.id}})
}

// delegate tells of the sub-agent that a tool call works with.
func (t *translation) delegate(th *thread, p part, f facts) {
	if f.SessionID == "" || f.SessionID == th.id || f.SessionID == t.root {
		return
	}
	child := t.thread(f.SessionID)
	child.parent = th.id
	// It may have been asked before, and be through with that.
	if child.started && !child.ended {
		return
	}
	seen := t.part(p.ID, "tool")
	if seen.child == f.SessionID {
		return
	}
	seen.child = f.SessionID
	child.started, child.ended = true, false
	t.emit(th, agent.Event{SubAgentStarted: &agent.SubAgentStarted{ID: child.id, Call: p.ID, Title: p.State.Title}})
}

// output tells what a tool has written since it was told last; OpenCode tells the whole,
// or the end of it when it has grown long.
func (t *translation) output(th *thread, id string, seen *progress, whole string) {
	if whole == "" || whole == seen.tail {
		return
	}
	fresh, ok := strings.CutPrefix(whole, seen.tail)
	if !ok {
		// The last that was told, if it is still there, says where to go on.
		known := seen.tail[max(0, len(seen.tail)-1024):]
		at := strings.LastIndex(whole, known)
		if at < 0 {
			seen.tail = whole
			return
		}
		fresh = whole[at+len(known):]
	}
	seen.tail = whole
	if fresh != "" {
		t.emit(th, agent.Event{ToolOutput: &agent.ToolOutput{Call: id, Text: fresh}})
	}
}

func (t *translation) end(th *thread, p part, seen *progress, f facts) {
	seen.ended = true
	if child := t.threads[f.SessionID]; child != nil && child != th && child.id != t.root {
		t.unstash(child)
		t.through(th, child)
	}
	e := ended(p, f)
	t.emit(th, agent.Event{ToolEnded: &e})
	if p.State.Status == "completed" {
		t.changed(th, p, f)
	}
}

// unstash takes what is stored of a sub-agent.
func (t *translation) unstash(child *thread) {
	list := t.stash[child.id]
	delete(t.stash, child.id)
	t.take(list, child)
}

// ended is the end of a tool call.
func ended(p part, f facts) agent.ToolEnded {
	e := agent.ToolEnded{Call: p.ID, Tool: p.Tool, Output: p.State.Output, Error: p.State.Error, Title: p.State.Title, Metadata: p.State.Metadata}
	if f.Exit != nil && math.Abs(*f.Exit) < 1<<31 {
		code := int32(*f.Exit)
		e.ExitCode = &code
	}
	if p.State.Status == "error" && e.Error == "" {
		e.Error = "the tool failed"
	}
	return e
}

// through tells that a sub-agent is.
func (t *translation) through(parent, child *thread) {
	if !child.started || child.ended {
		return
	}
	child.ended = true
	t.emit(parent, agent.Event{SubAgentEnded: &agent.SubAgentEnded{ID: child.id, Usage: child.usage}})
}

// changed tells of the files that a tool call changed.
func (t *translation) changed(th *thread, p part, f facts) {
	var list []diff
	switch {
	case f.FileDiff != nil:
		d := *f.FileDiff
		if d.Status == "" {
			d.Status = "modified"
		}
		list = append(list, d)
	case len(f.Files) > 0:
		for _, c := range f.Files {
			list = append(list, diff{File: c.FilePath, Patch: c.Patch + c.Diff, Additions: c.Additions, Deletions: c.Deletions, Status: c.Type})
		}
	case p.Tool == "write" && f.Filepath != "":
		list = append(list, written(f, p.State.Input))
	}
	for _, d := range list {
		file := t.file(d)
		if file.Patch != "" {
			t.patches[file.Path] = "tool"
			t.told = append(t.told, file)
		}
		t.emit(th, agent.Event{FileChanged: &file})
	}
}

// written is the change by the write tool, which tells none. What was there before is not
// known; that change is told with the whole of the turn's.
func written(f facts, input json.RawMessage) diff {
	d := diff{File: f.Filepath, Status: "modified"}
	var in struct {
		Content string `json:"content"`
	}
	if f.Exists || json.Unmarshal(input, &in) != nil {
		return d
	}
	d.Status = "added"
	lines := slices.Collect(strings.Lines(in.Content))
	d.Additions = float64(len(lines))
	var b strings.Builder
	fmt.Fprintf(&b, "--- /dev/null\n+++ %s\n", f.Filepath)
	if len(lines) > 0 {
		fmt.Fprintf(&b, "@@ -0,0 +1,%d @@\n+%s", len(lines), strings.Join(lines, "+"))
		if !strings.HasSuffix(in.Content, "\n") {
			b.WriteString("\n\\ No newline at end of file\n")
		}
	}
	d.Patch = b.String()
	return d
}
