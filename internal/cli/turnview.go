package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"

	"google.golang.org/protobuf/types/known/structpb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// turnView shows a turn to people as it comes: the agent's text on stdout, all else as
// talk beside it. On a terminal the line of a tool grows while it works.
type turnView struct {
	out, talk io.Writer
	// live says that both are one terminal.
	live  bool
	width int

	// open is what the last line is of that has not ended: the text of a part, a tool's call.
	open  string
	tools map[string]*toolLine
	todos string
}

// toolLine is a tool that works.
type toolLine struct {
	text  string
	lines int
	begin time.Time
}

// maxDiff bounds the lines of a diff that are shown.
const maxDiff = 40

func (v *turnView) event(e *executorv1.TurnEvent) error {
	sub := e.GetSubAgent() != ""
	switch k := e.GetKind().(type) {
	case *executorv1.TurnEvent_Started:
		if n := k.Started.GetQueuePosition(); n > 0 {
			v.say("queued behind %d", n)
		}
	case *executorv1.TurnEvent_Text:
		if !sub {
			return v.text(k.Text)
		}
	case *executorv1.TurnEvent_PartEnded:
		return v.partEnded(k.PartEnded, sub)
	case *executorv1.TurnEvent_PartsDropped:
		if !sub {
			v.say("the answer broke off; what was said since the last step is void")
		}
	case *executorv1.TurnEvent_ToolStarted:
		v.toolStarted(k.ToolStarted, sub, e.GetEventTime().AsTime())
	case *executorv1.TurnEvent_ToolOutput:
		v.toolOutput(k.ToolOutput)
	case *executorv1.TurnEvent_ToolEnded:
		v.toolEnded(k.ToolEnded, e.GetEventTime().AsTime())
	case *executorv1.TurnEvent_FileChanged:
		v.diff(k.FileChanged)
	case *executorv1.TurnEvent_Todos:
		v.todoList(k.Todos)
	case *executorv1.TurnEvent_InteractionRequested:
		v.asked(k.InteractionRequested)
	case *executorv1.TurnEvent_InteractionResolved:
		v.say("%s: %s", k.InteractionResolved.GetName(), strings.ToLower(enumName(k.InteractionResolved.GetState(), "STATE")))
	case *executorv1.TurnEvent_SubAgentStarted:
		v.say("sub-agent: %s", oneLine(k.SubAgentStarted.GetTitle()))
	case *executorv1.TurnEvent_Retry:
		v.say("the model failed (%s), attempt %d; again at %s", oneLine(k.Retry.GetMessage()), k.Retry.GetAttempt(), formatTime(k.Retry.GetNextTime()))
	case *executorv1.TurnEvent_Compaction:
		v.say("the agent shortens its history")
	case *executorv1.TurnEvent_AgentRestarted:
		v.say("the agent was started again: %s", oneLine(k.AgentRestarted.GetDetail()))
	case *executorv1.TurnEvent_Error:
		v.say("%s: %s", k.Error.GetName(), oneLine(k.Error.GetMessage()))
	case *executorv1.TurnEvent_Gap:
		v.say("%d events are missing here (%s)", k.Gap.GetMissingEvents(), strings.ToLower(enumName(k.Gap.GetReason(), "REASON")))
	case *executorv1.TurnEvent_Result:
		v.result(k.Result)
	}
	return nil
}

// say writes a line of talk.
func (v *turnView) say(format string, args ...any) {
	v.endLine()
	fmt.Fprintf(v.talk, format+"\n", args...)
}

// endLine ends the line that is open.
func (v *turnView) endLine() {
	switch {
	case v.open == "":
	case v.tools[v.open] != nil:
		fmt.Fprintln(v.talk)
	default:
		fmt.Fprintln(v.out)
	}
	v.open = ""
}

func (v *turnView) text(d *executorv1.TextDelta) error {
	text := speakable(d.GetText())
	if text == "" {
		return nil
	}
	part := "text " + d.GetPart()
	if v.open != part {
		v.endLine()
	}
	v.open = part
	_, err := io.WriteString(v.out, text)
	if strings.HasSuffix(text, "\n") {
		v.open = ""
	}
	return err
}

func (v *turnView) partEnded(p *executorv1.PartEnded, sub bool) error {
	if p.Text != nil && !sub { // what was told of it was not all
		v.say("the whole of it:")
		if err := v.text(&executorv1.TextDelta{Part: p.GetPart(), Text: p.GetText()}); err != nil {
			return err
		}
	}
	if v.open == "text "+p.GetPart() {
		v.endLine()
	}
	return nil
}

func (v *turnView) toolStarted(t *executorv1.ToolStarted, sub bool, at time.Time) {
	text := oneLine(t.GetTool())
	if sub {
		text = "  " + text
	}
	if about := about(t); about != "" {
		text += " " + about
	}
	if v.tools == nil {
		v.tools = make(map[string]*toolLine)
	}
	line := &toolLine{text: text, begin: at}
	v.endLine()
	v.tools[t.GetCall()] = line
	if v.live {
		v.open = t.GetCall()
		v.draw("· "+text, "")
	}
}

// about says in a few words what a tool is used for.
func about(t *executorv1.ToolStarted) string {
	if t.GetTitle() != "" {
		return oneLine(t.GetTitle())
	}
	fields := t.GetInput().GetFields()
	for _, name := range []string{"command", "filePath", "path", "pattern", "url", "query", "description"} {
		if text, ok := fields[name].GetKind().(*structpb.Value_StringValue); ok {
			return oneLine(text.StringValue)
		}
	}
	if len(fields) == 0 {
		return ""
	}
	text, err := json.Marshal(t.GetInput().AsMap())
	if err != nil {
		return ""
	}
	return oneLine(string(text))
}

func (v *turnView) toolOutput(o *executorv1.ToolOutput) {
	line := v.tools[o.GetCall()]
	if line == nil {
		return
	}
	line.lines += strings.Count(o.GetText(), "\n")
	if v.live && v.open == o.GetCall() {
		v.draw("· "+line.text, fmt.Sprintf(" (%d lines)", line.lines))
	}
}

func (v *turnView) toolEnded(t *executorv1.ToolEnded, at time.Time) {
	line := v.tools[t.GetCall()]
	if line == nil { // begun before the cursor
		line = &toolLine{text: oneLine(t.GetTitle()), begin: at}
	}
	mark, note := "✓ ", ""
	switch {
	case t.GetError() != "":
		mark, note = "✗ ", ": "+oneLine(t.GetError())
	case t.ExitCode != nil && t.GetExitCode() != 0:
		mark, note = "✗ ", fmt.Sprintf(" (exit code %d)", t.GetExitCode())
	}
	if took := at.Sub(line.begin).Round(100 * time.Millisecond); took >= time.Second {
		note += fmt.Sprintf(" %v", took)
	}
	if v.live && v.open == t.GetCall() {
		v.draw(mark+line.text, note)
		fmt.Fprintln(v.talk)
		v.open = ""
	} else {
		v.say("%s%s%s", mark, line.text, note)
	}
	delete(v.tools, t.GetCall())
}

// draw writes the open line anew.
func (v *turnView) draw(text, note string) {
	if room := v.width - 1 - len([]rune(note)); v.width > 0 && len([]rune(text)) > room {
		text = string([]rune(text)[:max(room-1, 0)]) + "…"
	}
	fmt.Fprintf(v.talk, "\r\x1b[K%s%s", text, note)
}

func (v *turnView) diff(f *executorv1.FileDiff) {
	v.say("%s +%d -%d", oneLine(f.GetPath()), f.GetAdditions(), f.GetDeletions())
	lines := strings.Split(strings.TrimSuffix(f.GetPatch(), "\n"), "\n")
	if f.GetPatch() == "" {
		return
	}
	for i, line := range lines {
		if i == maxDiff {
			fmt.Fprintf(v.talk, "  … %d more lines\n", len(lines)-maxDiff)
			break
		}
		line = speakable(line)
		if colour := map[byte]string{'+': "\x1b[32m", '-': "\x1b[31m"}[(line + " ")[0]]; v.live && colour != "" {
			line = colour + line + "\x1b[0m"
		}
		fmt.Fprintf(v.talk, "  %s\n", line)
	}
}

func (v *turnView) todoList(t *executorv1.TodoList) {
	var b strings.Builder
	for _, item := range t.GetItems() {
		mark := map[string]string{"completed": "x", "in_progress": "~", "cancelled": "-"}[item.GetStatus()]
		if mark == "" {
			mark = " "
		}
		fmt.Fprintf(&b, "  [%s] %s\n", mark, oneLine(item.GetText()))
	}
	if b.String() == v.todos {
		return
	}
	v.todos = b.String()
	v.say("todo:\n%s", strings.TrimSuffix(v.todos, "\n"))
}

func (v *turnView) asked(i *executorv1.Interaction) {
	until := ""
	if at := i.GetExpireTime(); at != nil {
		until = ", until " + formatTime(at)
	}
	if p := i.GetPermission(); p != nil {
		v.say("the agent asks for permission%s: %s %s", until, oneLine(p.GetPermission()), oneLine(strings.Join(p.GetPatterns(), " ")))
	}
	for _, q := range i.GetQuestion().GetItems() {
		var labels []string
		for _, o := range q.GetOptions() {
			labels = append(labels, oneLine(o.GetLabel()))
		}
		v.say("the agent asks%s: %s [%s]", until, oneLine(q.GetText()), strings.Join(labels, " | "))
	}
	fmt.Fprintf(v.talk, "hint: executorctl interactions resolve %s\n", i.GetName())
}

func (v *turnView) result(r *executorv1.TurnResult) {
	outcome := strings.ToLower(enumName(r.GetOutcome(), "TURN_OUTCOME"))
	if detail := oneLine(r.GetDetail()); detail != "" {
		outcome += ": " + detail
	} else if r.GetError() != nil {
		outcome += ": " + oneLine(r.GetError().GetMessage())
	}
	v.say("%s (%s)", outcome, formatUsage(r.GetUsage()))
}

// formatUsage tells what was used in a few words.
func formatUsage(u *executorv1.AgentUsage) string {
	return fmt.Sprintf("%d tokens in, %d out, $%.4f", u.GetInputTokens()+u.GetCacheReadTokens()+u.GetCacheWriteTokens(),
		u.GetOutputTokens()+u.GetReasoningTokens(), float64(u.GetCostMicros())/1e6)
}

// oneLine makes a short line without control characters of a text.
func oneLine(text string) string {
	const most = 160
	text = strings.Join(strings.Fields(speakable(text)), " ")
	if runes := []rune(text); len(runes) > most {
		text = string(runes[:most-1]) + "…"
	}
	return text
}

// speakable takes out what would do something to a terminal.
func speakable(text string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) || r == '\u00a0' {
			return r
		}
		return -1
	}, text)
}
