package cli

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func TestParseRepo(t *testing.T) {
	for text, want := range map[string][2]string{
		"o/n":                      {"o/n", ""},
		"o/n@main":                 {"o/n", "main"},
		"o/n@feature/x":            {"o/n", "feature/x"},
		"https://h/o/n@v1.2":       {"https://h/o/n", "v1.2"},
		"https://h:8443/o/n":       {"https://h:8443/o/n", ""},
		"https://h:8443/o/n@b":     {"https://h:8443/o/n", "b"},
		"git@github.com:o/n":       {"git@github.com:o/n", ""},
		"git@github.com:o/n@b":     {"git@github.com:o/n", "b"},
		"https://user@example/o/n": {"https://user@example/o/n", ""},
		"ssh://git@github.com/o/n": {"ssh://git@github.com/o/n", ""},
		"https://u@h/o/n@b":        {"https://u@h/o/n", "b"},
	} {
		if r := parseRepo(text, 3); r.GetUrl() != want[0] || r.GetBranch() != want[1] || r.GetDepth() != 3 {
			t.Errorf("%s: %v", text, r)
		}
	}
}

func TestParseAuthor(t *testing.T) {
	if id, err := parseAuthor("Ann Lee <ann@example.com>"); err != nil || id.GetName() != "Ann Lee" || id.GetEmail() != "ann@example.com" {
		t.Errorf("%v, %v", id, err)
	}
	for _, bad := range []string{"", "Ann", "Ann <>", "<a@b>", "Ann <a@b", "Ann <a@b> x"} {
		if id, err := parseAuthor(bad); err == nil {
			t.Errorf("%q is %v", bad, id)
		}
	}
}

func TestParseModel(t *testing.T) {
	if m, err := parseModel("p/a/b", "https://x"); err != nil || m.GetProvider() != "p" || m.GetModel() != "a/b" || m.GetBaseUrl() != "https://x" {
		t.Errorf("%v, %v", m, err)
	}
	if m, err := parseModel("", ""); m != nil || err != nil {
		t.Errorf("%v, %v", m, err)
	}
	for _, bad := range [][2]string{{"x", ""}, {"/x", ""}, {"x/", ""}, {"", "https://x"}} {
		if m, err := parseModel(bad[0], bad[1]); err == nil {
			t.Errorf("%q is %v", bad, m)
		}
	}
}

// TestAgentFlags: what is given as a credential never comes from an argument.
func TestAgentFlags(t *testing.T) {
	dir := t.TempDir()
	auth, notes := filepath.Join(dir, "auth.json"), filepath.Join(dir, "notes")
	for path, text := range map[string]string{auth: `{"x":1}`, notes: "be kind"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := agentFlags{
		env: map[string]string{"GITHUB_TOKEN": "hunter2"}, repos: []string{"o/n@b"}, secretEnv: []string{"GITHUB_TOKEN"}, secrets: []string{"A=b", "C"},
		auth: auth, agent: "opencode", model: "p/m", interactions: "ask", instructions: notes, maxCost: 1.5, maxTurns: 3, idlePause: true, author: "Ann <a@b>",
	}
	f.idle.v, f.idle.given = time.Hour, true
	r := &executorv1.CreateSessionRequest{}
	if err := f.fill(r); err != nil {
		t.Fatal(err)
	}
	c := r.GetCredentials()
	if c.GetValues()["GITHUB_TOKEN"] != "hunter2" || c.GetSecrets()["A"] != "b" || c.GetSecrets()["C"] != "C" || c.GetOpencodeAuth() != `{"x":1}` {
		t.Errorf("%v", c)
	}
	a := r.GetAgent()
	if a.GetModel().GetModel() != "m" || a.GetInteractions().GetMode() != executorv1.InteractionPolicy_MODE_ASK || a.GetInstructions() != "be kind" || a.GetLimit().GetCostMicros() != 1_500_000 || a.GetLimit().GetTurns() != 3 {
		t.Errorf("%v", a)
	}
	if r.GetIdleTimeout().AsDuration() != time.Hour || r.GetIdleAction() != executorv1.IdleAction_IDLE_ACTION_PAUSE || r.GetRepositories()[0].GetBranch() != "b" || r.GetIdentity().GetEmail() != "a@b" {
		t.Errorf("%v", r)
	}
	for what, bad := range map[string]agentFlags{
		"agent":       {agent: "claude"},
		"no agent":    {agent: "none", model: "p/m"},
		"permissions": {agent: "opencode", interactions: "maybe"},
		"variable":    {agent: "none", secretEnv: []string{"ABSENT"}},
		"file":        {agent: "none", auth: filepath.Join(dir, "absent")},
		"notes":       {agent: "opencode", instructions: filepath.Join(dir, "absent")},
	} {
		if err := bad.fill(&executorv1.CreateSessionRequest{}); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
}

func TestResolution(t *testing.T) {
	if r, err := resolution(false, false, true, "no", nil); err != nil || r.GetDecision() != executorv1.Resolution_DECISION_REJECT || r.GetMessage() != "no" {
		t.Errorf("%v, %v", r, err)
	}
	if r, err := resolution(false, false, false, "", []string{"a,b", "c"}); err != nil || len(r.GetAnswers()) != 2 || len(r.GetAnswers()[0].GetLabels()) != 2 {
		t.Errorf("%v, %v", r, err)
	}
	for _, bad := range []func() error{
		func() error { _, err := resolution(false, false, false, "", nil); return err },
		func() error { _, err := resolution(true, true, false, "", nil); return err },
		func() error { _, err := resolution(true, false, false, "", []string{"a"}); return err },
		func() error { _, err := resolution(true, false, false, "why", nil); return err },
	} {
		if bad() == nil {
			t.Error("no error")
		}
	}
}

func TestAttachment(t *testing.T) {
	dir := t.TempDir()
	for name, want := range map[string]string{"a.png": "image/png", "noext": "text/plain"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("hello"), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := attachment(path)
		if err != nil || f.GetMediaType() != want || f.GetFilename() != name || string(f.GetData()) != "hello" {
			t.Errorf("%v, %v", f, err)
		}
	}
	if _, err := attachment(filepath.Join(dir, "absent")); err == nil {
		t.Error("no error")
	}
}

func TestTurnStatus(t *testing.T) {
	for outcome, want := range map[executorv1.TurnOutcome]int{
		executorv1.TurnOutcome_TURN_OUTCOME_COMPLETED: 0, executorv1.TurnOutcome_TURN_OUTCOME_ABORTED: 130,
		executorv1.TurnOutcome_TURN_OUTCOME_FAILED: 1, executorv1.TurnOutcome_TURN_OUTCOME_LOST: 1,
	} {
		got := 0
		if s, ok := turnStatus(&executorv1.TurnResult{Outcome: outcome}).(exitStatus); ok {
			got = int(s)
		}
		if got != want {
			t.Errorf("%v is %d", outcome, got)
		}
	}
}

// TestSessionLine has a line for each kind of event, none of which can do anything to a
// terminal.
func TestSessionLine(t *testing.T) {
	bad := "x\x1b]0;evil\x07\ny"
	for want, e := range map[string]*executorv1.SessionEvent{
		"sessions/s": {Kind: &executorv1.SessionEvent_Started{Started: &executorv1.SessionStarted{Session: "sessions/s"}}},
		"  clone a: receiving objects 50%": {Kind: &executorv1.SessionEvent_Step{Step: &executorv1.SessionStep{
			Kind: executorv1.SessionStep_KIND_CLONE, State: executorv1.SessionStep_STATE_PROGRESS, Subject: "a", Text: "receiving objects", Percent: proto.Int32(50),
		}}},
		"clone a: failed x]0;evil y": {Kind: &executorv1.SessionEvent_Step{Step: &executorv1.SessionStep{
			Kind: executorv1.SessionStep_KIND_CLONE, State: executorv1.SessionStep_STATE_FAILED, Subject: "a", Text: bad,
		}}},
		"running": {Kind: &executorv1.SessionEvent_Changed{Changed: &executorv1.Session{State: executorv1.Session_STATE_RUNNING}}},
		"sessions/s/turns/t ended completed": {Kind: &executorv1.SessionEvent_Turn{Turn: &executorv1.TurnSummary{
			Turn: "sessions/s/turns/t", State: executorv1.Turn_STATE_ENDED, Outcome: executorv1.TurnOutcome_TURN_OUTCOME_COMPLETED,
		}}},
		"agent ready v memory connected": {Kind: &executorv1.SessionEvent_Agent{Agent: &executorv1.AgentStatus{
			State: executorv1.AgentStatus_STATE_READY, Version: "v", McpServers: []*executorv1.McpServer{{Name: "memory", State: executorv1.McpServer_STATE_CONNECTED}},
		}}},
		"ended: idle d": {Kind: &executorv1.SessionEvent_Ended{Ended: &executorv1.Session{EndReason: executorv1.Session_END_REASON_IDLE, Detail: "d"}}},
	} {
		e.EventTime = timestamppb.New(time.Unix(0, 0))
		got := sessionLine(e)
		_, text, _ := strings.Cut(got, "  ")
		if text != want {
			t.Errorf("%q, want %q", text, want)
		}
	}
	if got := sessionLine(&executorv1.SessionEvent{}); got != "" {
		t.Errorf("an unknown one: %q", got)
	}
}
