package api

import (
	"errors"
	"io"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/session"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// TestCreateSessionWithAgent hands everything on that a session can be made with.
func TestCreateSessionWithAgent(t *testing.T) {
	b := newBench(t)
	_, err := b.session.CreateSession(t.Context(), &executorv1.CreateSessionRequest{
		Repositories: []*executorv1.Repository{{Url: "o/n", Branch: "b", Depth: 3, Directory: "d"}},
		Identity:     &executorv1.Identity{Name: "Ann", Email: "ann@x"},
		Agent: &executorv1.AgentSpec{
			Kind: executorv1.AgentSpec_KIND_OPENCODE, Model: &executorv1.Model{Provider: "p", Model: "m"},
			Interactions: &executorv1.InteractionPolicy{Mode: executorv1.InteractionPolicy_MODE_ASK, Timeout: durationpb.New(time.Minute), DefaultAnswer: executorv1.InteractionPolicy_ANSWER_ALLOW},
			Limit:        &executorv1.SpendLimit{CostMicros: 5, Turns: 6, TurnTimeout: durationpb.New(time.Hour)}, Instructions: "be kind",
		},
		Credentials: &executorv1.Credentials{Values: map[string]string{"A": "a"}, Secrets: map[string]string{"B": "b"}, OpencodeAuth: "{}"},
		IdleTimeout: durationpb.New(time.Hour), IdleAction: executorv1.IdleAction_IDLE_ACTION_PAUSE, Image: "base",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := session.Request{
		Repositories: []session.Repository{{URL: "o/n", Branch: "b", Depth: 3, Directory: "d"}}, Identity: session.Identity{Name: "Ann", Email: "ann@x"},
		Agent: &session.AgentSpec{
			Kind: "opencode", Model: session.Model{Provider: "p", Model: "m"}, Interactions: session.InteractionPolicy{Mode: "ASK", Timeout: time.Minute, Allow: true},
			Limit: session.SpendLimit{CostMicros: 5, Turns: 6, TurnTimeout: time.Hour}, Instructions: "be kind",
		},
		Values: map[string]string{"A": "a"}, Secrets: map[string]string{"B": "b"}, Auth: "{}",
		IdleTimeout: time.Hour, IdleAction: session.IdlePause, Image: "base",
	}
	if diff := cmp.Diff(want, b.sessions.requests[0]); diff != "" {
		t.Error(diff)
	}
	_, err = b.session.CreateSession(t.Context(), &executorv1.CreateSessionRequest{
		Credentials: &executorv1.Credentials{Values: map[string]string{"A": "a"}, Secrets: map[string]string{"A": "b"}},
	})
	wantError(t, err, codes.InvalidArgument, "CREDENTIALS")
}

// TestChangeSession hands each change and its key on.
func TestChangeSession(t *testing.T) {
	b := newBench(t)
	b.sessions.put(session.Session{ID: "s1", State: session.Running})
	const name = "sessions/s1"
	later := time.Unix(5000, 0)
	_, err := b.session.UpdateSession(t.Context(), &executorv1.UpdateSessionRequest{
		Session:    &executorv1.Session{Name: name, Labels: map[string]string{"a": "b"}, ExpireTime: timestamppb.New(later), IdleTimeout: durationpb.New(time.Hour), IdleAction: executorv1.IdleAction_IDLE_ACTION_PAUSE},
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels", "expire_time", "idle_timeout", "idle_action"}}, RequestId: "u",
		Credentials: &executorv1.Credentials{Values: map[string]string{"K": "v"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	u := b.sessions.updates[0]
	if (*u.Labels)["a"] != "b" || !u.ExpireTime.Equal(later) || *u.IdleTimeout != time.Hour || *u.IdleAction != session.IdlePause || u.Values["K"] != "v" {
		t.Errorf("%+v", u)
	}
	paused, err := b.session.PauseSession(t.Context(), &executorv1.PauseSessionRequest{Name: name, RequestId: "p"})
	if err != nil || paused.GetSession().GetState() != executorv1.Session_STATE_PAUSED {
		t.Errorf("%v, %v", paused, err)
	}
	resumed, err := b.session.ResumeSession(t.Context(), &executorv1.ResumeSessionRequest{Name: name, RequestId: "r"})
	if err != nil || resumed.GetSession().GetState() != executorv1.Session_STATE_RESUMING {
		t.Errorf("%v, %v", resumed, err)
	}
	forked, err := b.session.ForkSession(t.Context(), &executorv1.ForkSessionRequest{Name: name, RequestId: "f"})
	if err != nil || forked.GetSession().GetForkedFrom() != name {
		t.Errorf("%v, %v", forked, err)
	}
	var ids []string
	for _, key := range b.sessions.keys {
		ids = append(ids, key.Method+" "+key.ID)
		if key.Fingerprint == "" || key == (idempotency.Key{}) {
			t.Errorf("%+v", key)
		}
	}
	if diff := cmp.Diff([]string{"UpdateSession u", "PauseSession p", "ResumeSession r", "ForkSession f"}, ids); diff != "" {
		t.Error(diff)
	}
	diff, err := b.session.GetDiff(t.Context(), &executorv1.GetDiffRequest{Name: name})
	if r := diff.GetRepositories(); err != nil || len(r) != 1 || r[0].GetUnpushedCommits() != 2 || r[0].GetFiles()[0].GetPatch() != "+x" {
		t.Errorf("%v, %v", diff, err)
	}
}

func TestUpdateSessionRefuses(t *testing.T) {
	b := newBench(t)
	b.sessions.put(session.Session{ID: "s1", State: session.Running})
	reasons := map[string]string{
		"nothing": "UPDATE_MASK", "a state": "UPDATE_MASK", "no expiry": "EXPIRE_TIME", "secrets": "CREDENTIALS", "too short idle": "IDLE_TIMEOUT",
	}
	for what, r := range map[string]*executorv1.UpdateSessionRequest{
		"nothing":        {},
		"a state":        {UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"state"}}},
		"no expiry":      {UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"expire_time"}}},
		"secrets":        {Credentials: &executorv1.Credentials{Secrets: map[string]string{"A": "a"}}},
		"too short idle": {Session: &executorv1.Session{IdleTimeout: durationpb.New(time.Second)}, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"idle_timeout"}}},
	} {
		t.Run(what, func(t *testing.T) {
			if r.Session == nil {
				r.Session = &executorv1.Session{}
			}
			r.Session.Name = "sessions/s1"
			_, err := b.session.UpdateSession(t.Context(), r)
			wantError(t, err, codes.InvalidArgument, reasons[what])
		})
	}
}

// TestWatchSession converts every kind of event, goes on from a cursor, and ends behind the
// end.
func TestWatchSession(t *testing.T) {
	b := newBench(t)
	record := session.Session{ID: "s1", State: session.Running, Details: session.Details{
		Agent: &session.AgentSpec{Kind: "opencode"}, Checkouts: []session.Checkout{{Path: "/workspace/a"}}, Status: session.AgentStatus{State: session.AgentReady},
	}}
	percent := 50
	b.sessions.put(record)
	b.sessions.events = []session.Event{
		{Started: &session.Started{Session: "s1"}},
		{Step: &session.Step{Kind: session.StepClone, State: session.StepProgress, Subject: "a", Text: "Receiving", Percent: &percent}},
		{Changed: &record},
		{Warning: &session.Warning{Cause: "IDLE", Expire: time.Unix(7, 0)}},
		{Turn: &session.TurnNote{ID: "t", State: session.TurnEnded, Outcome: "COMPLETED", CostMicros: 3}},
		{Execution: &session.RunNote{ID: "e", Ended: true, Reason: "EXITED"}},
		{Asked: &session.AskedNote{ID: "i", Pending: true}},
		{Asked: &session.AskedNote{ID: "i"}},
		{Saved: &session.SavedWork{Path: "/workspace/a", Ref: "refs/heads/wip/s1", Snapshot: "img"}},
		{Replaced: &session.Replaced{Sandbox: "s-2", Generation: 2}},
		{Agent: &session.AgentNote{Status: session.AgentStatus{State: session.AgentFailed, MCP: []session.MCPServer{{Name: "memory", State: "NO_KEY"}}}, Model: session.Model{Provider: "p"}}},
		{Gap: &journal.Gap{Reason: journal.GapDamaged, MissingEvents: 3}},
		{}, // of a later executord
		{Ended: &session.Session{ID: "s1", State: session.Terminated, Reason: session.Idle}},
	}
	read := func(after *executorv1.Cursor) []*executorv1.SessionEvent {
		t.Helper()
		stream, err := b.session.WatchSession(t.Context(), &executorv1.WatchSessionRequest{Name: "sessions/s1", After: after})
		if err != nil {
			t.Fatal(err)
		}
		var all []*executorv1.SessionEvent
		for {
			resp, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return all
			}
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, resp.GetEvent())
		}
	}
	all := read(nil)
	if len(all) != len(b.sessions.events) {
		t.Fatalf("%d events", len(all))
	}
	for i, e := range all {
		if e.GetCursor().GetSequence() != uint64(i+1) || (e.GetKind() == nil) != (i == 12) {
			t.Errorf("event %d: %v", i, e)
		}
	}
	switch {
	case all[1].GetStep().GetKind() != executorv1.SessionStep_KIND_CLONE || all[1].GetStep().GetState() != executorv1.SessionStep_STATE_PROGRESS || all[1].GetStep().GetPercent() != 50,
		all[2].GetChanged().GetAgent().GetState() != executorv1.AgentStatus_STATE_READY || all[2].GetChanged().GetRepositories()[0].GetPath() != "/workspace/a",
		all[3].GetWarning().GetCause() != executorv1.SessionWarning_CAUSE_IDLE,
		all[4].GetTurn().GetTurn() != "sessions/s1/turns/t" || all[4].GetTurn().GetOutcome() != executorv1.TurnOutcome_TURN_OUTCOME_COMPLETED || all[4].GetTurn().GetUsage().GetCostMicros() != 3,
		all[5].GetExecution().GetExecution() != "sessions/s1/executions/e" || all[5].GetExecution().GetReason() != executorv1.Reason_REASON_EXITED,
		all[6].GetInteractionRequested().GetName() != "sessions/s1/interactions/i", all[7].GetInteractionResolved() == nil,
		all[8].GetSaved().GetSnapshot() != "img", all[9].GetSandboxReplaced().GetGeneration() != 2,
		all[10].GetAgent().GetMcpServers()[0].GetState() != executorv1.McpServer_STATE_NO_KEY || all[10].GetAgent().GetModel().GetProvider() != "p",
		all[11].GetGap().GetReason() != executorv1.Gap_REASON_DAMAGED, all[13].GetEnded().GetEndReason() != executorv1.Session_END_REASON_IDLE:
		t.Errorf("%v", all)
	}
	if rest := read(all[10].GetCursor()); len(rest) != 3 {
		t.Errorf("%d events behind a cursor", len(rest))
	}
}
