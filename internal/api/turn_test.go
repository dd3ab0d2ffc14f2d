package api

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/turn"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
)

// turnBench has a session s1.
func turnBench(t *testing.T) *bench {
	t.Helper()
	b := newBench(t)
	b.sessions.put(session.Session{ID: "s1", Owner: auth.Local().Name, State: session.Running})
	return b
}

// turnKinds names the events of a turn's stream until it ends.
func turnKinds(recv func() (*executorv1.TurnEvent, error)) ([]string, error) {
	var told []string
	for {
		event, err := recv()
		if errors.Is(err, io.EOF) {
			return told, nil
		}
		if err != nil {
			return told, err
		}
		told = append(told, turnKind(event))
	}
}

func turnKind(event *executorv1.TurnEvent) string {
	switch k := event.GetKind().(type) {
	case *executorv1.TurnEvent_Started:
		return "started " + k.Started.GetTurn()
	case *executorv1.TurnEvent_Text:
		return "text " + k.Text.GetText()
	case *executorv1.TurnEvent_Heartbeat:
		return fmt.Sprintf("heartbeat %d", event.GetCursor().GetSequence())
	case *executorv1.TurnEvent_Result:
		return fmt.Sprintf("result %v", k.Result.GetOutcome())
	default:
		return fmt.Sprintf("%T", k)
	}
}

func (b *bench) watchTurn(t *testing.T, req *executorv1.WatchTurnRequest) func() (*executorv1.TurnEvent, error) {
	t.Helper()
	stream, err := b.session.WatchTurn(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return func() (*executorv1.TurnEvent, error) {
		resp, err := stream.Recv()
		return resp.GetEvent(), err
	}
}

func sayText(s string) turn.Event {
	return turn.Event{Agent: &agent.Event{Text: &agent.Delta{Part: "p", Text: s}}}
}

// writeTurn fills a journal.
func writeTurn(one *fakeTurn) {
	one.append(turn.Event{Started: &turn.Started{Session: "s1", Turn: one.record.ID}}, turn.Event{Running: &turn.Began{}},
		sayText("a"), turn.Event{Gap: &journal.Gap{Reason: journal.GapDamaged}}, turn.Event{}, turn.Event{Result: &turn.Result{Outcome: agent.Completed}})
}

func TestSendPrompt(t *testing.T) {
	b := turnBench(t)
	b.turns.onSend = writeTurn
	request := &executorv1.SendPromptRequest{Parent: "sessions/s1", RequestId: "r1", Prompt: &executorv1.Prompt{
		Text: "hello", Author: "Ann", Model: &executorv1.Model{Provider: "p", Model: "m", BaseUrl: "http://x"},
		Attachments: []*executorv1.Attachment{{Filename: "a", MediaType: "image/png", Data: []byte{1}}},
	}}
	stream, err := b.session.SendPrompt(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	got, err := turnKinds(func() (*executorv1.TurnEvent, error) {
		resp, err := stream.Recv()
		return resp.GetEvent(), err
	})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, got, "started sessions/s1/turns/new", "*executorv1.TurnEvent_Running", "text a", "*executorv1.TurnEvent_Gap", "<nil>", "result TURN_OUTCOME_COMPLETED")
	r := b.turns.requests[0]
	if r.Session != "s1" || r.Caller.Owner != auth.Local().Name || r.Key.ID != "r1" || r.Key.Method != "SendPrompt" || r.Prompt.Text != "hello" || r.Prompt.Author != "Ann" ||
		r.Prompt.Model != (agent.Model{Provider: "p", Model: "m", BaseURL: "http://x"}) || len(r.Prompt.Attachments) != 1 || r.Prompt.Attachments[0].MediaType != "image/png" || string(r.Prompt.Attachments[0].Data) != "\x01" {
		t.Errorf("%+v", r)
	}
	eventually(t, func() bool { return b.turns.openWatchers() == 0 })
}

// TestSendPromptJoinsLate: the journal's beginning is no longer kept when a repeat comes.
func TestSendPromptJoinsLate(t *testing.T) {
	b := turnBench(t)
	b.turns.onSend = func(one *fakeTurn) {
		gap := turn.Event{Gap: &journal.Gap{Reason: journal.GapRetention, MissingEvents: 1}}
		one.append(gap, gap, sayText("late"), turn.Event{Result: &turn.Result{Outcome: agent.Completed}})
	}
	stream, err := b.session.SendPrompt(t.Context(), &executorv1.SendPromptRequest{Parent: "sessions/s1", Prompt: &executorv1.Prompt{Text: "x"}})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil || first.GetEvent().GetStarted().GetTurn() != "sessions/s1/turns/new" || first.GetEvent().GetCursor().GetEpoch() != "e1" || first.GetEvent().GetCursor().GetSequence() != 1 {
		t.Fatalf("%v, %v", first, err)
	}
	got, err := turnKinds(func() (*executorv1.TurnEvent, error) {
		resp, err := stream.Recv()
		return resp.GetEvent(), err
	})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, got, "*executorv1.TurnEvent_Gap", "text late", "result TURN_OUTCOME_COMPLETED")
	eventually(t, func() bool { return b.turns.openWatchers() == 0 })
}

func TestWatchTurn(t *testing.T) {
	b := turnBench(t)
	writeTurn(b.turns.add(turn.Turn{ID: "t1", Session: "s1"}))
	got, err := turnKinds(b.watchTurn(t, &executorv1.WatchTurnRequest{Name: "sessions/s1/turns/t1", After: &executorv1.Cursor{Epoch: "e1", Sequence: 2}}))
	if err != nil || len(got) != 4 || got[0] != "text a" {
		t.Errorf("%q, %v", got, err)
	}
	_, err = b.watchTurn(t, &executorv1.WatchTurnRequest{Name: "sessions/s1/turns/t2"})()
	wantError(t, err, codes.NotFound, "TURN_NOT_FOUND")
	b.turns.add(turn.Turn{ID: "t3", Session: "s1"}).append(turn.Event{Started: &turn.Started{Session: "s1", Turn: "t3"}})
	recv := b.watchTurn(t, &executorv1.WatchTurnRequest{Name: "sessions/s1/turns/t3"})
	if _, err := recv(); err != nil {
		t.Fatal(err)
	}
	b.shutdown(errors.New("stopping"))
	_, err = recv()
	wantError(t, err, codes.Unavailable, "SERVER_DRAINING")
}

func TestTurnHeartbeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := turnBench(t)
		one := b.turns.add(turn.Turn{ID: "t1", Session: "s1"})
		one.append(turn.Event{Started: &turn.Started{Session: "s1", Turn: "t1"}})
		go func() {
			time.Sleep(25 * time.Second)
			one.append(turn.Event{Result: &turn.Result{Outcome: agent.Completed}})
		}()
		got, err := turnKinds(b.watchTurn(t, &executorv1.WatchTurnRequest{Name: "sessions/s1/turns/t1", HeartbeatInterval: durationpb.New(10 * time.Second)}))
		if err != nil {
			t.Fatal(err)
		}
		equal(t, got, "started sessions/s1/turns/t1", "heartbeat 1", "heartbeat 1", "result TURN_OUTCOME_COMPLETED")
	})
}

func TestGetTurn(t *testing.T) {
	b := turnBench(t)
	one := b.turns.add(turn.Turn{ID: "t1", Session: "s1", State: turn.Running})
	get := func(wait *durationpb.Duration) *executorv1.Turn {
		t.Helper()
		resp, err := b.session.GetTurn(t.Context(), &executorv1.GetTurnRequest{Name: "sessions/s1/turns/t1", Wait: wait})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetTurn()
	}
	for _, wait := range []*durationpb.Duration{nil, durationpb.New(time.Millisecond)} {
		if got := get(wait); got.GetState() != executorv1.Turn_STATE_RUNNING || got.GetName() != "sessions/s1/turns/t1" {
			t.Errorf("%v", got)
		}
	}
	go func() {
		time.Sleep(20 * time.Millisecond)
		one.append(turn.Event{Result: &turn.Result{Outcome: agent.Failed}})
	}()
	if got := get(durationpb.New(time.Minute)); got.GetState() != executorv1.Turn_STATE_ENDED || got.GetResult().GetOutcome() != executorv1.TurnOutcome_TURN_OUTCOME_FAILED {
		t.Errorf("%v", got)
	}
	_, err := b.session.GetTurn(t.Context(), &executorv1.GetTurnRequest{Name: "sessions/s0/turns/t1"})
	if d := wantError(t, err, codes.NotFound, "SESSION_NOT_FOUND"); d.resource.GetResourceName() != "sessions/s0" || d.resource.GetResourceType() != "harvest.executor.v1.Session" {
		t.Errorf("%v", d.resource)
	}
	_, err = b.session.GetTurn(t.Context(), &executorv1.GetTurnRequest{Name: "sessions/s1/turns/t9"})
	if d := wantError(t, err, codes.NotFound, "TURN_NOT_FOUND"); d.resource.GetResourceName() != "sessions/s1/turns/t9" || d.resource.GetResourceType() != "harvest.executor.v1.Turn" {
		t.Errorf("%v", d.resource)
	}
}

func TestListTurns(t *testing.T) {
	b := turnBench(t)
	for n := range 5 {
		b.turns.add(turn.Turn{ID: fmt.Sprint("t", n), Session: "s1", Prompt: turn.Prompt{Text: strings.Repeat("x", n*600<<10)}})
	}
	// Pages of three, and of fewer where they are large: every one comes once.
	var got []string
	request := &executorv1.ListTurnsRequest{Parent: "sessions/s1", PageSize: 3}
	for pages := 0; ; pages++ {
		page, err := b.session.ListTurns(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range page.GetTurns() {
			got = append(got, one.GetName())
		}
		if request.PageToken = page.GetNextPageToken(); request.PageToken == "" {
			if pages != 2 {
				t.Errorf("%d pages", pages)
			}
			break
		}
	}
	equal(t, got, "sessions/s1/turns/t4", "sessions/s1/turns/t3", "sessions/s1/turns/t2", "sessions/s1/turns/t1", "sessions/s1/turns/t0")
	other, err := b.session.ListInteractions(t.Context(), &executorv1.ListInteractionsRequest{Parent: "sessions/s1", PageToken: "AAAA"})
	if d := wantError(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN"); !slices.Equal(d.fields(), []string{"page_token"}) {
		t.Errorf("%v, %v", other, d.bad)
	}
}

func TestCancelTurn(t *testing.T) {
	b := turnBench(t)
	b.turns.add(turn.Turn{ID: "t1", Session: "s1", State: turn.Running})
	resp, err := b.session.CancelTurn(t.Context(), &executorv1.CancelTurnRequest{Name: "sessions/s1/turns/t1", Requester: "ann", RequestId: "r1"})
	if err != nil || resp.GetTurn().GetState() != executorv1.Turn_STATE_ENDED || !strings.HasPrefix(resp.GetTurn().GetResult().GetCancelledBy(), "ann (") {
		t.Errorf("%v, %v", resp, err)
	}
	if got := keyNames(b.turns.keys); got != "r1 CancelTurn" {
		t.Errorf("keys %s", got)
	}
}

func TestInteractions(t *testing.T) {
	b := turnBench(t)
	asked := agent.Asked{ID: "per_1", Call: "c", Permission: &agent.Permission{Kind: "bash", Patterns: []string{"make"}, Metadata: []byte(`{"a":1}`)}}
	b.turns.interactions = []turn.Interaction{
		{ID: "i1", Session: "s1", Turn: "t1", State: turn.Void, Asked: asked}, {ID: "i2", Session: "s1", Turn: "t1", State: turn.Pending, Asked: asked},
		{ID: "i3", Session: "s1", Turn: "t1", State: turn.Pending, Asked: agent.Asked{Question: &agent.Question{Items: []agent.QuestionItem{{Text: "q"}}}}},
	}
	list := func(resolved bool, size int32) (names []string, next string) {
		resp, err := b.session.ListInteractions(t.Context(), &executorv1.ListInteractionsRequest{Parent: "sessions/s1", ShowResolved: resolved, PageSize: size})
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range resp.GetInteractions() {
			names = append(names, i.GetName())
		}
		return names, resp.GetNextPageToken()
	}
	got, next := list(true, 0)
	equal(t, got, "sessions/s1/interactions/i3", "sessions/s1/interactions/i2", "sessions/s1/interactions/i1")
	if next != "" {
		t.Error("there is another page")
	}
	got, _ = list(false, 0)
	equal(t, got, "sessions/s1/interactions/i3", "sessions/s1/interactions/i2")
	_, next = list(false, 1)
	rest, err := b.session.ListInteractions(t.Context(), &executorv1.ListInteractionsRequest{Parent: "sessions/s1", PageToken: next})
	if err != nil || len(rest.GetInteractions()) != 1 || rest.GetInteractions()[0].GetPermission().GetMetadata().GetFields()["a"].GetNumberValue() != 1 {
		t.Errorf("%v, %v", rest, err)
	}
	resolve := func(r *executorv1.Resolution) *executorv1.Interaction {
		t.Helper()
		resp, err := b.session.ResolveInteraction(t.Context(), &executorv1.ResolveInteractionRequest{Name: "sessions/s1/interactions/i2", Resolution: r, RequestId: "r1"})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetInteraction()
	}
	i := resolve(&executorv1.Resolution{Decision: executorv1.Resolution_DECISION_REJECT, Message: "no"})
	if i.GetState() != executorv1.Interaction_STATE_RESOLVED || i.GetResolution().GetDecision() != executorv1.Resolution_DECISION_REJECT || i.GetResolvedBy() == "" || i.GetTurn() != "sessions/s1/turns/t1" {
		t.Errorf("%v", i)
	}
	resolve(&executorv1.Resolution{Answers: []*executorv1.Answer{{Labels: []string{"a", "b"}}, {Labels: []string{"c"}}}})
	resolve(&executorv1.Resolution{Decision: executorv1.Resolution_DECISION_ALLOW_ONCE})
	resolve(&executorv1.Resolution{Decision: executorv1.Resolution_DECISION_ALLOW_ALWAYS})
	if got := fmt.Sprint(b.turns.answers); got != "[{REJECT [] no} { [[a b] [c]] } {ALLOW_ONCE [] } {ALLOW_ALWAYS [] }]" {
		t.Errorf("answers %s", got)
	}
	if got := keyNames(b.turns.keys[:1]); got != "r1 ResolveInteraction" {
		t.Errorf("keys %s", got)
	}
	_, err = b.session.ResolveInteraction(t.Context(), &executorv1.ResolveInteractionRequest{
		Name: "sessions/s1/interactions/i9", Resolution: &executorv1.Resolution{Decision: executorv1.Resolution_DECISION_REJECT},
	})
	if d := wantError(t, err, codes.NotFound, "INTERACTION_NOT_FOUND"); d.resource.GetResourceType() != "harvest.executor.v1.Interaction" {
		t.Errorf("%v", d.resource)
	}
}

func TestListMessages(t *testing.T) {
	b := turnBench(t)
	code := int32(3)
	b.turns.messages = []agent.Message{
		{ID: "m1", FromUser: true, Prompt: "t1", Text: "a"},
		{ID: "m2", Prompt: "t1", Text: "b", Tools: []agent.ToolEnded{{Call: "c", Output: "o", ExitCode: &code}}, Time: at(1), Usage: agent.Usage{CostMicros: 7}},
		{ID: "m3"},
	}
	first, err := b.session.ListMessages(t.Context(), &executorv1.ListMessagesRequest{Parent: "sessions/s1", PageSize: 2})
	if err != nil || len(first.GetMessages()) != 2 || first.GetNextPageToken() == "" {
		t.Fatalf("%v, %v", first, err)
	}
	if m := first.GetMessages()[0]; m.GetRole() != executorv1.Message_ROLE_USER || m.GetTurn() != "sessions/s1/turns/t1" {
		t.Errorf("%v", m)
	}
	if m := first.GetMessages()[1]; m.GetRole() != executorv1.Message_ROLE_ASSISTANT || m.GetTools()[0].GetExitCode() != 3 || m.GetUsage().GetCostMicros() != 7 || m.GetCreateTime() == nil {
		t.Errorf("%v", m)
	}
	rest, err := b.session.ListMessages(t.Context(), &executorv1.ListMessagesRequest{Parent: "sessions/s1", PageToken: first.GetNextPageToken()})
	if err != nil || len(rest.GetMessages()) != 1 || rest.GetMessages()[0].GetTurn() != "" || rest.GetNextPageToken() != "" {
		t.Errorf("%v, %v", rest, err)
	}
}

func TestBadTurnRequests(t *testing.T) {
	b := turnBench(t)
	send := func(change func(*executorv1.SendPromptRequest)) error {
		r := &executorv1.SendPromptRequest{Parent: "sessions/s1", Prompt: &executorv1.Prompt{Text: "x"}}
		change(r)
		stream, err := b.session.SendPrompt(t.Context(), r)
		if err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}
	attachment := func(a *executorv1.Attachment) func(*executorv1.SendPromptRequest) {
		return func(r *executorv1.SendPromptRequest) { r.Prompt.Attachments = []*executorv1.Attachment{a} }
	}
	for name, test := range map[string]struct {
		change func(*executorv1.SendPromptRequest)
		field  string
	}{
		"no parent":       {func(r *executorv1.SendPromptRequest) { r.Parent = "" }, "parent"},
		"any session":     {func(r *executorv1.SendPromptRequest) { r.Parent = "sessions/S" }, "parent"},
		"no prompt":       {func(r *executorv1.SendPromptRequest) { r.Prompt = nil }, "prompt"},
		"long text":       {func(r *executorv1.SendPromptRequest) { r.Prompt.Text = strings.Repeat("x", 1<<20+1) }, "prompt.text"},
		"long author":     {func(r *executorv1.SendPromptRequest) { r.Prompt.Author = strings.Repeat("x", 129) }, "prompt.author"},
		"bad model":       {func(r *executorv1.SendPromptRequest) { r.Prompt.Model = &executorv1.Model{Provider: "P"} }, "prompt.model.provider"},
		"no type":         {attachment(&executorv1.Attachment{}), "prompt.attachments[0].media_type"},
		"odd type":        {attachment(&executorv1.Attachment{MediaType: "image/png; x=\n"}), "prompt.attachments[0].media_type"},
		"large":           {attachment(&executorv1.Attachment{MediaType: "a/b", Data: make([]byte, 2<<20+1)}), "prompt.attachments[0].data"},
		"many":            {func(r *executorv1.SendPromptRequest) { r.Prompt.Attachments = make([]*executorv1.Attachment, 17) }, "prompt.attachments"},
		"short heartbeat": {func(r *executorv1.SendPromptRequest) { r.HeartbeatInterval = durationpb.New(time.Millisecond) }, "heartbeat_interval"},
	} {
		if d := wantError(t, send(test.change), codes.InvalidArgument, "INVALID_FIELD"); !slices.Contains(d.fields(), test.field) {
			t.Errorf("%s: fields %v", name, d.fields())
		}
	}
	_, err := b.session.ResolveInteraction(t.Context(), &executorv1.ResolveInteractionRequest{Name: "sessions/s1/interactions/i1"})
	if d := wantError(t, err, codes.InvalidArgument, "INVALID_FIELD"); !slices.Contains(d.fields(), "resolution") {
		t.Errorf("fields %v", d.fields())
	}
	if len(b.turns.requests) != 0 {
		t.Errorf("%d came through", len(b.turns.requests))
	}
}

func TestTurnNames(t *testing.T) {
	for name, want := range map[string]string{
		"sessions/a/turns/b": "a b", "sessions/a/turns/": "", "sessions//turns/b": "", "sessions/a/turns/b/": "", "turns/b": "", "sessions/a/executions/b": "", "sessions/a/turns/b/turns/c": "", "": "",
	} {
		ref, err := parseTurnName(t.Context(), name)
		if got := strings.TrimSpace(ref.Session + " " + ref.ID); got != want || (err == nil) != (want != "") {
			t.Errorf("%q is %q, %v", name, got, err)
		}
		if err == nil && turnName(ref.Session, ref.ID) != name {
			t.Errorf("%q becomes %q", name, turnName(ref.Session, ref.ID))
		}
	}
	if ref, err := parseInteractionName(t.Context(), interactionName("a", "b")); err != nil || ref.Session != "a" || ref.ID != "b" {
		t.Errorf("%v, %v", ref, err)
	}
}
