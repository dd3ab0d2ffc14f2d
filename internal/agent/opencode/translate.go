package opencode

import (
	"encoding/json"
	"hash/maphash"
	"math"
	"path"
	"slices"
	"strings"

	"github.com/harvest-run/executord/internal/agent"
)

// translation turns what OpenCode tells of one turn into our events. It remembers what it
// told, so that the same can come twice, by events and from what is stored, and is told
// once. It is used by one goroutine.
type translation struct {
	root   string // the conversation
	prompt string // the message that is the prompt
	tell   func(agent.Event) error
	err    error // the first of tell
	seed   maphash.Seed

	threads map[string]*thread
	parts   map[string]*progress
	// calls finds a tool's part by message and call.
	calls map[[2]string]string
	// asked are the requests that wait for an answer; held is told with the tool call that
	// it is about, which comes a moment later.
	asked map[string]string
	held  []agent.Event
	// created is when the prompt was stored, in milliseconds.
	created float64
	// dir is where paths that are relative start.
	dir string
	// patches are the net changes of files that were told; "tool" for one that a tool told.
	patches map[string]string
	todos   string
	// stash are the stored messages of sub-agents, to be told before their ends.
	stash map[string][]stored
	// final says that what is stored is all that there will be.
	final bool
	// told are the changes that tools told, in order.
	told   []agent.FileDiff
	errors []agent.Error
	usage  agent.Usage
}

// thread is a conversation of the turn: the agent's or a sub-agent's.
type thread struct {
	id string
	// name is "" for the agent's own.
	name    string
	parent  string
	started bool
	ended   bool
	usage   agent.Usage
	// heads are the messages that belong to the turn; false for prompts and summaries,
	// which are not told.
	heads map[string]bool
	// paid are steps whose use was told by an executord before this one.
	paid int
	// prompts are what its answers may answer.
	prompts map[string]bool
	// step are the parts that void if the model is asked again.
	step []string
	idle int
	done map[string]bool // messages that are complete
}

// progress is what was told of a part.
type progress struct {
	kind    string // text, reasoning or tool; "step" for what is told once
	thread  string
	n       int
	hash    maphash.Hash
	begun   bool // its start was seen on this connection: its pieces are whole
	ended   bool
	dropped bool
	// Of a tool: its name, whether its start was told, its sub-agent, and what was told of
	// its output or the end of that.
	tool  string
	input bool
	child string
	tail  string
}

func newTranslation(root, prompt, dir string, tell func(agent.Event) error) *translation {
	t := &translation{
		root: root, prompt: prompt, dir: dir, tell: tell, seed: maphash.MakeSeed(),
		threads: make(map[string]*thread), parts: make(map[string]*progress), calls: make(map[[2]string]string),
		asked: make(map[string]string), patches: make(map[string]string),
	}
	r := t.thread(root)
	r.started = true
	r.prompts[prompt] = true
	return t
}

func (t *translation) emit(th *thread, e agent.Event) {
	if th != nil {
		t.announce(th)
		e.SubAgent = th.name
	}
	if t.err == nil {
		t.err = t.tell(e)
	}
}

func (t *translation) thread(id string) *thread {
	th := t.threads[id]
	if th == nil {
		th = &thread{id: id, heads: make(map[string]bool), prompts: make(map[string]bool), done: make(map[string]bool)}
		if id != t.root {
			th.name = id
		}
		t.threads[id] = th
	}
	return th
}

// part returns what was told of a part.
func (t *translation) part(id, kind string) *progress {
	p := t.parts[id]
	if p == nil {
		p = &progress{kind: kind}
		p.hash.SetSeed(t.seed)
		t.parts[id] = p
	}
	return p
}

// event takes one of OpenCode's.
func (t *translation) event(e event) {
	th := t.threads[e.SessionID]
	if e.session != nil {
		if t.threads[e.session.ParentID] != nil {
			// Told with the tool call that made it, which follows.
			t.thread(e.session.ID).parent = e.session.ParentID
		}
		return
	}
	if th == nil {
		return
	}
	switch e.Type {
	case "message.updated":
		t.head(th, e.message)
	case "message.part.updated":
		if e.Part != nil {
			t.update(th, *e.Part, false)
		}
	case "message.part.delta":
		t.delta(th, e)
	case "session.status":
		t.status(th, e.Status)
	case "session.idle":
		th.idle++
	case "session.error":
		t.failed(th, e.Error)
	case "todo.updated":
		t.list(th, e.Todos)
	case "permission.asked", "question.asked":
		t.ask(th, e.request)
	case "permission.replied", "question.replied", "question.rejected":
		t.answered(e.RequestID)
	}
}

// head takes a message's head.
func (t *translation) head(th *thread, m *message) {
	if m == nil {
		return
	}
	if m.Role == "user" {
		if m.ID == t.prompt {
			t.created = max(t.created, m.Time.Created)
			t.diffs(m.Summary.Diffs)
		}
		// After its own prompt come those that OpenCode makes when it shortens the history.
		if th.id != t.root || m.Time.Created >= t.created && t.created > 0 {
			th.prompts[m.ID] = true
		}
		th.heads[m.ID] = false
		return
	}
	if !th.prompts[m.ParentID] {
		return
	}
	if m.Path.Root != "" && th.id == t.root {
		t.dir = m.Path.Root
	}
	th.heads[m.ID] = !m.Summary.Is
	if m.Time.Completed > 0 {
		th.done[m.ID] = true
	}
}

// mine says whether a part belongs to an answer of the turn.
func (th *thread) mine(message string) bool { return th.heads[message] }

func (t *translation) delta(th *thread, e event) {
	if !th.mine(e.MessageID) || e.Field != "text" || e.Delta == "" {
		return
	}
	p := t.parts[e.PartID]
	// Of a part whose start was missed pieces may be missing; it comes whole at its end.
	if p == nil || !p.begun || p.ended || p.dropped {
		return
	}
	t.append(th, e.PartID, p, e.Delta)
}

func (t *translation) append(th *thread, id string, p *progress, text string) {
	if text == "" {
		return
	}
	p.n += len(text)
	p.hash.WriteString(text)
	d := &agent.Delta{Part: id, Text: text}
	if p.kind == "reasoning" {
		t.emit(th, agent.Event{Reasoning: d})
	} else {
		t.emit(th, agent.Event{Text: d})
	}
}

// lose forgets that the parts that are open were seen from their start.
func (t *translation) lose() {
	for _, p := range t.parts {
		p.begun = false
	}
}

// update takes a part, from an event or from what is stored.
func (t *translation) update(th *thread, p part, stored bool) {
	if p.Type == "compaction" {
		if seen := t.part(p.ID, "step"); !seen.ended && th.prompts[p.MessageID] {
			seen.ended = true
			t.emit(th, agent.Event{Compaction: &agent.Compaction{Automatic: p.Auto}})
		}
		return
	}
	if p.Type == "step-finish" {
		// A summary is paid for too.
		if _, ok := th.heads[p.MessageID]; ok {
			t.finish(th, p)
		}
		return
	}
	if !th.mine(p.MessageID) {
		return
	}
	switch p.Type {
	case "step-start":
		th.step = nil
	case "text", "reasoning":
		t.words(th, p, stored)
	case "tool":
		t.call(th, p)
	}
}

func (t *translation) finish(th *thread, p part) {
	th.step = nil
	seen := t.part(p.ID, "step")
	if seen.ended {
		return
	}
	seen.ended = true
	if th.paid > 0 {
		th.paid--
		return
	}
	u := usage(p.Tokens, p.Cost)
	th.usage, t.usage = th.usage.Add(u), t.usage.Add(u)
	t.emit(th, agent.Event{Usage: &u})
}

func usage(n tokens, cost float64) agent.Usage {
	return agent.Usage{
		InputTokens: whole(n.Input), OutputTokens: whole(n.Output), ReasoningTokens: whole(n.Reasoning),
		CacheReadTokens: whole(n.Cache.Read), CacheWriteTokens: whole(n.Cache.Write), CostMicros: whole(cost * 1e6),
	}
}

// whole is a count that was told by something that is not trusted.
func whole(f float64) int64 {
	if !(f > 0) {
		return 0
	}
	return int64(math.Round(min(f, 1<<53)))
}

func (t *translation) words(th *thread, p part, stored bool) {
	seen := t.parts[p.ID]
	if seen == nil {
		seen = t.part(p.ID, p.Type)
		seen.begun, seen.thread = !stored, th.id
		th.step = append(th.step, p.ID)
	}
	if seen.ended || seen.dropped || p.Time.End == 0 && !t.final {
		return
	}
	// The end has the whole.
	if !stored || p.Text != "" {
		t.rest(th, p.ID, seen, p.Text)
	}
}

// rest tells what is missing of a part and ends it.
func (t *translation) rest(th *thread, id string, p *progress, text string) {
	p.ended = true
	ended := &agent.PartEnded{Part: id}
	if len(text) >= p.n && maphash.String(t.seed, text[:p.n]) == p.hash.Sum64() {
		t.append(th, id, p, text[p.n:])
	} else {
		ended.Text = &text
	}
	if p.n > 0 || ended.Text != nil {
		t.emit(th, agent.Event{PartEnded: ended})
	}
}

// status tells of retries.
func (t *translation) status(th *thread, s *status) {
	if s == nil || s.Type != "retry" {
		return
	}
	// What had come of the answer that broke off comes again.
	var void []string
	for _, id := range th.step {
		p := t.parts[id]
		if !p.dropped && p.n > 0 {
			void = append(void, id)
		}
		p.dropped = true
	}
	th.step = nil
	if len(void) > 0 {
		t.emit(th, agent.Event{PartsDropped: &agent.PartsDropped{Parts: void}})
	}
	t.emit(th, agent.Event{Retry: &agent.Retry{Attempt: int32(min(whole(s.Attempt), math.MaxInt32)), Message: s.Message, Next: instant(s.Next)}})
}

// failed tells of an error. OpenCode tells some twice, the second time with its stack.
func (t *translation) failed(th *thread, f *failure) {
	if f == nil || f.Name == "MessageAbortedError" {
		return
	}
	e := f.plain()
	if slices.ContainsFunc(t.errors, func(o agent.Error) bool { return o.Name == e.Name && strings.Contains(e.Message, o.Message) }) {
		return
	}
	t.errors = append(t.errors, e)
	t.emit(th, agent.Event{Error: &e})
}

func (f *failure) plain() agent.Error {
	text, _, _ := strings.Cut(f.Data.Message, "\n    at ")
	return agent.Error{Name: f.Name, Message: text, StatusCode: int32(min(whole(f.Data.StatusCode), 999)), Retryable: f.Data.IsRetryable}
}

func (t *translation) list(th *thread, todos []todo) {
	items := make([]agent.TodoItem, len(todos))
	for i, d := range todos {
		items[i] = agent.TodoItem{Text: d.Content, Status: d.Status, Priority: d.Priority}
	}
	now, _ := json.Marshal(items)
	if key := th.id + string(now); key != t.todos {
		t.todos = key
		t.emit(th, agent.Event{Todos: &agent.TodoList{Items: items}})
	}
}

func (t *translation) ask(th *thread, r request) {
	if r.ID == "" || t.asked[r.ID] != "" {
		return
	}
	t.asked[r.ID] = th.id
	a := &agent.Asked{ID: r.ID, Call: t.calls[[2]string{r.Tool.MessageID, r.Tool.CallID}]}
	if r.Questions != nil {
		a.Question = &agent.Question{}
		for _, q := range r.Questions {
			item := agent.QuestionItem{Header: q.Header, Text: q.Question, Multiple: q.Multiple, Custom: q.Custom == nil || *q.Custom}
			for _, o := range q.Options {
				item.Options = append(item.Options, agent.Option{Label: o.Label, Description: o.Description})
			}
			a.Question.Items = append(a.Question.Items, item)
		}
	} else {
		a.Permission = &agent.Permission{Kind: r.Permission, Patterns: r.Patterns, Metadata: r.Metadata}
	}
	t.announce(th)
	e := agent.Event{Asked: a, SubAgent: th.name}
	if p := t.parts[a.Call]; p != nil && !p.input && !p.ended {
		t.held = append(t.held, e)
		return
	}
	t.emit(nil, e)
}

// flush tells the requests that were held for this call; all of them if it is "".
func (t *translation) flush(call string) {
	t.held = slices.DeleteFunc(t.held, func(e agent.Event) bool {
		if call != "" && e.Asked.Call != call {
			return false
		}
		if t.asked[e.Asked.ID] != "" {
			t.emit(nil, e)
		}
		return true
	})
}

func (t *translation) answered(id string) {
	th := t.threads[t.asked[id]]
	if th == nil {
		return
	}
	t.flush("")
	delete(t.asked, id)
	t.emit(th, agent.Event{Answered: &agent.Answered{ID: id}})
}

// waiting takes all requests that wait, as they are listed: what is not among them any
// more was answered.
func (t *translation) waiting(list []pending) {
	open := make(map[string]bool)
	for _, p := range list {
		if th := t.threads[p.SessionID]; th != nil {
			open[p.ID] = true
			t.ask(th, p.request)
		}
	}
	for id := range t.asked {
		if !open[id] {
			t.answered(id)
		}
	}
}

// diffs takes what the turn has changed so far, on the whole.
func (t *translation) diffs(list []diff) {
	for _, d := range list {
		f := t.file(d)
		was, ok := t.patches[f.Path]
		if d.Patch == "" || ok && (was == "tool" || was == d.Patch) {
			continue
		}
		t.patches[f.Path] = d.Patch
		t.emit(t.threads[t.root], agent.Event{FileChanged: &f})
	}
}

func (t *translation) file(d diff) agent.FileDiff {
	f := agent.FileDiff{
		Path: d.File, Patch: d.Patch,
		Additions: int32(min(whole(d.Additions), math.MaxInt32)), Deletions: int32(min(whole(d.Deletions), math.MaxInt32)),
	}
	if !path.IsAbs(f.Path) {
		f.Path = path.Join(t.dir, f.Path)
	}
	switch d.Status {
	case "added", "add":
		f.Change = agent.FileAdded
	case "modified", "update":
		f.Change = agent.FileModified
	case "deleted", "delete":
		f.Change = agent.FileDeleted
	}
	return f
}
