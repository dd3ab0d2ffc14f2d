package turn_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/store"
	"github.com/harvest-run/executord/internal/turn"
	"github.com/harvest-run/executord/internal/turn/turntest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bubble runs a test with a clock of its own.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

var ann = caller.Caller{Owner: "ann"}

// home has one session, s1, which is ann's.
type home struct {
	mu      sync.Mutex
	profile turn.Profile
	refusal error
	notes   []turn.Note
}

func (h *home) Visible(_ context.Context, id string, by caller.Caller) error {
	if id != "s1" || !by.Sees("ann") {
		return fault.New(fault.NotFound, "SESSION_NOT_FOUND", "there is no session %q", id)
	}
	return nil
}

func (h *home) Profile(ctx context.Context, id string, by caller.Caller) (turn.Profile, error) {
	if err := h.Visible(ctx, id, by); err != nil {
		return turn.Profile{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.profile, h.refusal
}

func (h *home) Note(_ string, n turn.Note) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.notes = append(h.notes, n)
}

func (h *home) set(change func(*home)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change(h)
}

// summary is what the session was told.
func (h *home) summary() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []string
	for _, n := range h.notes {
		if n.Turn != nil {
			all = append(all, fmt.Sprint(n.Turn.State))
		} else {
			all = append(all, string(n.Interaction.State))
		}
	}
	return strings.Join(all, " ")
}

// world is what survives executords.
type world struct {
	t     *testing.T
	store *store.Store
	home  *home
	agent *turntest.Agent
	dir   string
}

func newWorld(t *testing.T, scripts ...turntest.Script) *world {
	t.Helper()
	s, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, store: s, home: &home{}, agent: &turntest.Agent{Scripts: scripts}, dir: filepath.Join(t.TempDir(), "turns")}
	w.home.profile.Model = agent.Model{Provider: "p", Model: "m"}
	t.Cleanup(func() {
		w.agent.Wait()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// executord makes a Service; keep changes what its store does.
func (w *world) executord(change ...func(*turn.Config)) *turn.Service {
	w.t.Helper()
	cfg := turn.Config{Store: w.store, Sessions: w.home, Dir: w.dir, Logger: slog.New(slog.NewTextHandler(w.t.Output(), nil))}
	for _, f := range change {
		f(&cfg)
	}
	s, err := turn.New(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := s.Recover(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	return s
}

// started is an executord with the agent attached, until the test ends.
func (w *world) started(change ...func(*turn.Config)) *turn.Service {
	w.t.Helper()
	s := w.executord(change...)
	w.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			w.t.Error(err)
		}
	})
	s.Attach("s1", w.agent)
	return s
}

// freeze copies the journals as they are, for the executord that comes next: the one that
// was killed can still write into the old ones until it is closed.
func (w *world) freeze() {
	next := filepath.Join(w.t.TempDir(), "turns")
	if err := os.CopyFS(next, os.DirFS(w.dir)); err != nil {
		w.t.Error(err)
	}
	w.dir = next
}

func send(t *testing.T, s *turn.Service, text string) turn.Ref {
	t.Helper()
	one, err := s.Send(t.Context(), turn.Request{Caller: ann, Session: "s1", Prompt: turn.Prompt{Text: text}})
	if err != nil {
		t.Fatal(err)
	}
	return turn.Ref{Session: "s1", ID: one.ID, Caller: ann}
}

// wait returns a turn when it has ended.
func wait(t *testing.T, s *turn.Service, ref turn.Ref) turn.Turn {
	t.Helper()
	one, err := s.Wait(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	return one
}

// log tells all events of a turn until its end, or what there is of one that goes on.
func log(t *testing.T, s *turn.Service, ref turn.Ref, after *journal.Cursor) []string {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("there is no more"))
	defer cancel()
	w, err := s.Watch(ctx, ref, after)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	var all []string
	for n := w.Cursor().Sequence + 1; ; n++ {
		e, err := w.Next(ctx)
		if errors.Is(err, io.EOF) {
			return all
		}
		if ctx.Err() != nil {
			return append(all, "…")
		}
		if err != nil {
			t.Fatal(err)
		}
		if e.Gap != nil {
			n = e.Cursor.Sequence
		}
		if e.Cursor.Sequence != n {
			t.Errorf("event %d follows on %d", e.Cursor.Sequence, n-1)
		}
		all = append(all, tell(e))
	}
}

// tell is an event in a few words.
func tell(e turn.Event) string {
	switch {
	case e.Gap != nil:
		return "gap " + string(e.Gap.Reason)
	case e.Started != nil:
		return "started"
	case e.Running != nil:
		return "running " + e.Running.Model.Model
	case e.Requested != nil:
		return "requested " + e.Requested.Asked.ID + " " + string(e.Requested.State)
	case e.Resolved != nil:
		return "resolved " + e.Resolved.Asked.ID + " " + string(e.Resolved.State)
	case e.Result != nil:
		return "result " + string(e.Result.Outcome)
	case e.Agent == nil:
		return "unknown"
	case e.Agent.Text != nil:
		return e.Agent.Text.Text
	case e.Agent.Usage != nil:
		return fmt.Sprint("cost ", e.Agent.Usage.CostMicros)
	default:
		return "agent"
	}
}

func equal(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func wantFault(t *testing.T, err error, kind fault.Kind, reason string) {
	t.Helper()
	if fault.KindOf(err) != kind || fault.ReasonOf(err) != reason {
		t.Errorf("error %v is of kind %d and reason %q, want kind %d and %q", err, fault.KindOf(err), fault.ReasonOf(err), kind, reason)
	}
}

// open are the interactions that wait.
func open(t *testing.T, s *turn.Service) []turn.Interaction {
	t.Helper()
	all, err := s.ListInteractions(t.Context(), turn.InteractionQuery{Caller: ann, Session: "s1", Pending: true, Limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// refOf names an interaction.
func refOf(i turn.Interaction) turn.Ref { return turn.Ref{Session: i.Session, ID: i.ID, Caller: ann} }

func named(id string) idempotency.Key {
	return idempotency.Key{Owner: "ann", ID: id, Method: "M", Fingerprint: "f"}
}
