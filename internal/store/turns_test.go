package store

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/turn"
)

func newTurn(session string, n int) turn.Turn {
	return turn.Turn{
		ID: fmt.Sprintf("%s-t%03d", session, n), Session: session, Number: n, Owner: "ann", State: turn.Queued,
		Prompt: turn.Prompt{Text: "hello"}, CreateTime: someTime,
	}
}

func insertTurns(t *testing.T, s *Store, all ...turn.Turn) {
	t.Helper()
	for _, one := range all {
		if err := s.InsertTurn(t.Context(), idempotency.Key{}, one); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTurnRoundTrip(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	want := newTurn("s1", 1)
	want.Prompt = turn.Prompt{
		Text: "ü\x00" + strings.Repeat("€", 5000), Author: "Ann", Model: agent.Model{Provider: "p", Model: "m", BaseURL: "u"},
		Attachments: []turn.Attachment{{Filename: "a", MediaType: "image/png", Data: []byte{0, 1}}, {MediaType: "a/b"}},
	}
	insertTurns(t, s, want)
	asked := want.Prompt
	check := func() {
		t.Helper()
		got, err := s.GetTurn(t.Context(), want.ID)
		if err != nil {
			t.Fatal(err)
		}
		shown := want
		shown.Prompt.Attachments = []turn.Attachment{{Filename: "a", MediaType: "image/png"}, {MediaType: "a/b"}}
		if diff := cmp.Diff(shown, got); diff != "" {
			t.Errorf("differs (-want +got):\n%s", diff)
		}
		prompt, err := s.GetPrompt(t.Context(), want.ID)
		if diff := cmp.Diff(asked, prompt); diff != "" || err != nil {
			t.Errorf("differs (-want +got):\n%s%v", diff, err)
		}
	}
	check()
	want.State, want.StartTime, want.Model = turn.Running, someTime.Add(1), agent.Model{Provider: "q"}
	if err := s.UpdateTurn(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	check()
	want.State, want.EndTime = turn.Ended, someTime.Add(2)
	want.Result = &turn.Result{
		Outcome: agent.Failed, Detail: "d", Error: &agent.Error{Name: "n"}, Text: strings.Repeat("x", 9000), CancelledBy: "c",
		Usage: agent.Usage{CostMicros: 7, InputTokens: 1}, Diffs: []agent.FileDiff{{Path: "a", Change: agent.FileAdded, Patch: "+x", Additions: 1}},
	}
	if err := s.UpdateTurn(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	check()
	closeStore(t, s)
	s = open(t, dir)
	check()
	page, err := s.ListTurns(t.Context(), turn.Query{Session: "s1", Limit: 5})
	if err != nil || len(page) != 1 {
		t.Fatalf("%v, %v", page, err)
	}
	if r := page[0].Result; len(r.Text) != 2048 || r.Diffs[0].Patch != "" || r.Diffs[0].Path != "a" || r.Usage.CostMicros != 7 || !strings.HasPrefix(want.Prompt.Text, page[0].Prompt.Text) || len([]rune(page[0].Prompt.Text)) > 2048 {
		t.Errorf("%d bytes of text, %+v", len(page[0].Prompt.Text), r)
	}
}

func TestTurnFaults(t *testing.T) {
	s := open(t, t.TempDir())
	insertTurns(t, s, newTurn("s1", 1))
	wantFault(t, s.InsertTurn(t.Context(), idempotency.Key{}, newTurn("s1", 1)), fault.AlreadyExists, "TURN_EXISTS")
	same := newTurn("s1", 1)
	same.ID = "other"
	wantFault(t, s.InsertTurn(t.Context(), idempotency.Key{}, same), fault.AlreadyExists, "TURN_EXISTS") // two of one number
	wantFault(t, s.UpdateTurn(t.Context(), newTurn("s9", 1)), fault.NotFound, "TURN_NOT_FOUND")
	_, err := s.GetTurn(t.Context(), "none")
	wantFault(t, err, fault.NotFound, "TURN_NOT_FOUND")
	if home, err := s.TurnSession(t.Context(), "s1-t001"); err != nil || home != "s1" {
		t.Errorf("%q, %v", home, err)
	}
	_, err = s.TurnSession(t.Context(), "none")
	wantFault(t, err, fault.NotFound, "TURN_NOT_FOUND")
	_, err = s.GetPrompt(t.Context(), "none")
	wantFault(t, err, fault.NotFound, "TURN_NOT_FOUND")
	if _, err := s.ListTurns(t.Context(), turn.Query{}); err == nil {
		t.Error("a page without a limit")
	}
}

func TestTurnStateNeverGoesBack(t *testing.T) {
	s := open(t, t.TempDir())
	n := 0
	for _, from := range []turn.State{turn.Queued, turn.Running, turn.Ended} {
		for _, to := range []turn.State{turn.Queued, turn.Running, turn.Ended} {
			n++
			one := newTurn("s1", n)
			insertTurns(t, s, one)
			one.State = from
			if err := s.UpdateTurn(t.Context(), one); err != nil {
				t.Fatal(err)
			}
			one.State = to
			err := s.UpdateTurn(t.Context(), one)
			if to < from || from == turn.Ended {
				wantFault(t, err, fault.FailedPrecondition, "TURN_ENDED")
			} else if err != nil {
				t.Error(err)
			}
		}
	}
}

func TestTurnOnce(t *testing.T) {
	s := open(t, t.TempDir())
	key := idempotency.Key{Owner: "ann", ID: "r1", Method: "SendPrompt", Fingerprint: "f"}
	first := newTurn("s1", 1)
	first.Prompt.Attachments = []turn.Attachment{{MediaType: "a/b", Data: []byte{1}}}
	if err := s.InsertTurn(t.Context(), key, first); err != nil {
		t.Fatal(err)
	}
	found, err := s.FindRequest(t.Context(), "ann", "r1")
	if err != nil || found.Resource != first.ID {
		t.Errorf("%+v, %v", found, err)
	}
	second := newTurn("s1", 2)
	wantFault(t, s.InsertTurn(t.Context(), key, second), fault.AlreadyExists, "REQUEST_ID_REUSED")
	_, err = s.GetTurn(t.Context(), second.ID)
	wantFault(t, err, fault.NotFound, "TURN_NOT_FOUND")
}

func TestTurnListsAndTotals(t *testing.T) {
	s := open(t, t.TempDir())
	for n := 1; n <= 4; n++ {
		insertTurns(t, s, newTurn("s1", n), newTurn("s2", n))
	}
	for n := 1; n <= 3; n++ {
		one := newTurn("s1", n)
		one.State, one.StartTime = turn.Running, someTime
		if n < 3 {
			one.State, one.EndTime = turn.Ended, someTime.Add(time.Duration(n))
			one.Result = &turn.Result{Outcome: agent.Completed, Usage: agent.Usage{InputTokens: 1, OutputTokens: 2, ReasoningTokens: 3, CacheReadTokens: 4, CacheWriteTokens: 5, CostMicros: int64(6 * n)}}
		}
		if err := s.UpdateTurn(t.Context(), one); err != nil {
			t.Fatal(err)
		}
	}
	totals, err := s.Totals(t.Context(), "s1")
	want := turn.Totals{Last: 4, Begun: 3, LastEnd: someTime.Add(2), Usage: agent.Usage{InputTokens: 2, OutputTokens: 4, ReasoningTokens: 6, CacheReadTokens: 8, CacheWriteTokens: 10, CostMicros: 18}}
	if diff := cmp.Diff(want, totals); diff != "" || err != nil {
		t.Errorf("%s%v", diff, err)
	}
	if totals, err = s.Totals(t.Context(), "none"); err != nil || totals != (turn.Totals{}) {
		t.Errorf("%+v, %v", totals, err)
	}
	ids := func(all []turn.Turn) (ids []string) {
		for _, one := range all {
			ids = append(ids, one.ID)
		}
		return ids
	}
	page, err := s.ListTurns(t.Context(), turn.Query{Session: "s1", Before: 4, Limit: 2})
	if got := ids(page); err != nil || !slices.Equal(got, []string{"s1-t003", "s1-t002"}) {
		t.Errorf("%v, %v", got, err)
	}
	unfinished, err := s.UnfinishedTurns(t.Context())
	if got := ids(unfinished); err != nil || !slices.Equal(got, []string{"s1-t003", "s1-t004", "s2-t001", "s2-t002", "s2-t003", "s2-t004"}) {
		t.Errorf("%v, %v", got, err)
	}
}

func TestInteractions(t *testing.T) {
	s := open(t, t.TempDir())
	one := func(n int) turn.Interaction {
		return turn.Interaction{
			ID: fmt.Sprint("i", n), Session: "s1", Turn: "t1", SubAgent: "x", State: turn.Pending, CreateTime: someTime, ExpireTime: someTime.Add(1),
			Asked: agent.Asked{ID: "per", Permission: &agent.Permission{Kind: "bash", Metadata: []byte(`{"a":1}`)}},
		}
	}
	for n := range 3 {
		for range 2 { // the second is the same, repeated
			if err := s.InsertInteraction(t.Context(), one(n)); err != nil {
				t.Fatal(err)
			}
		}
	}
	got, err := s.GetInteraction(t.Context(), "i1")
	if diff := cmp.Diff(one(1), got); diff != "" || err != nil {
		t.Errorf("%s%v", diff, err)
	}
	_, err = s.GetInteraction(t.Context(), "none")
	wantFault(t, err, fault.NotFound, "INTERACTION_NOT_FOUND")

	resolved := one(1)
	resolved.State, resolved.ResolvedBy, resolved.ResolveTime, resolved.Answer = turn.Resolved, "ann", someTime.Add(2), &agent.Answer{Decision: agent.AllowOnce}
	key := idempotency.Key{Owner: "ann", ID: "r1", Method: "ResolveInteraction", Fingerprint: "f"}
	if err := s.ResolveInteraction(t.Context(), key, resolved); err != nil {
		t.Fatal(err)
	}
	// Once, and a refusal records no request.
	other := key
	other.ID = "r2"
	for _, key := range []idempotency.Key{{}, other} {
		wantFault(t, s.ResolveInteraction(t.Context(), key, resolved), fault.FailedPrecondition, "INTERACTION_NOT_PENDING")
	}
	_, err = s.FindRequest(t.Context(), "ann", "r2")
	wantFault(t, err, fault.NotFound, "REQUEST_NOT_FOUND")
	none := one(9)
	wantFault(t, s.ResolveInteraction(t.Context(), idempotency.Key{}, none), fault.NotFound, "INTERACTION_NOT_FOUND")
	wantFault(t, s.ResolveInteraction(t.Context(), key, one(2)), fault.AlreadyExists, "REQUEST_ID_REUSED")
	if got, err := s.GetInteraction(t.Context(), "i1"); err != nil || !cmp.Equal(got, resolved) {
		t.Errorf("%+v, %v", got, err)
	}
	list := func(q turn.InteractionQuery) (ids []string) {
		q.Session = "s1"
		page, err := s.ListInteractions(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range page {
			ids = append(ids, i.ID)
		}
		return ids
	}
	if got := list(turn.InteractionQuery{Limit: 9}); !slices.Equal(got, []string{"i2", "i1", "i0"}) {
		t.Errorf("%v", got)
	}
	if got := list(turn.InteractionQuery{Limit: 9, Pending: true}); !slices.Equal(got, []string{"i2", "i0"}) {
		t.Errorf("%v", got)
	}
	if got := list(turn.InteractionQuery{Limit: 1, Before: "i2"}); !slices.Equal(got, []string{"i1"}) {
		t.Errorf("%v", got)
	}
	all, err := s.InteractionsOf(t.Context(), "t1")
	if err != nil || len(all) != 3 || all[0].ID != "i0" {
		t.Errorf("%v, %v", all, err)
	}
	if _, err := s.ListInteractions(t.Context(), turn.InteractionQuery{}); err == nil {
		t.Error("a page without a limit")
	}
}

// TestDeleteTurns: what was said in a session goes as a whole, and nothing else does.
func TestDeleteTurns(t *testing.T) {
	s := open(t, t.TempDir())
	for _, id := range []string{"s1", "s2", "s3"} {
		record := newSession(id)
		if id != "s3" {
			record.State, record.EndTime = session.Terminated, someTime
		}
		if err := s.InsertSession(t.Context(), record); err != nil {
			t.Fatal(err)
		}
		one := newTurn(id, 1)
		one.Prompt.Attachments = []turn.Attachment{{MediaType: "a/b", Data: []byte{1}}}
		insertTurns(t, s, one)
		if err := s.InsertInteraction(t.Context(), turn.Interaction{ID: "i" + id, Session: id, Turn: one.ID, State: turn.Pending}); err != nil {
			t.Fatal(err)
		}
	}
	find := func(before time.Time) string {
		ids, err := s.SessionsWithTurns(t.Context(), before, 9)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(ids, " ")
	}
	if got := find(someTime); got != "" {
		t.Errorf("%s", got)
	}
	if got := find(someTime.Add(1)); got != "s1 s2" {
		t.Errorf("%s", got)
	}
	ids, err := s.DeleteTurns(t.Context(), "s1")
	if err != nil || !slices.Equal(ids, []string{"s1-t001"}) {
		t.Errorf("%v, %v", ids, err)
	}
	if got := find(someTime.Add(1)); got != "s2" {
		t.Errorf("%s", got)
	}
	_, err = s.GetTurn(t.Context(), "s1-t001")
	wantFault(t, err, fault.NotFound, "TURN_NOT_FOUND")
	_, err = s.GetInteraction(t.Context(), "is1")
	wantFault(t, err, fault.NotFound, "INTERACTION_NOT_FOUND")
	var left int
	if err := s.reader.QueryRowContext(t.Context(), "SELECT COUNT(*) FROM turn_attachments").Scan(&left); err != nil || left != 2 {
		t.Errorf("%d attachments, %v", left, err)
	}
}
