package api_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/api"
	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/store"
	"github.com/harvest-run/executord/internal/turn"
	"github.com/harvest-run/executord/internal/turn/turntest"
)

// oneSession is a session s1 that everybody sees.
type oneSession struct{}

func (oneSession) Visible(_ context.Context, id string, _ caller.Caller) error {
	if id != "s1" {
		return fault.New(fault.NotFound, "SESSION_NOT_FOUND", "there is no session %q", id)
	}
	return nil
}

func (oneSession) Profile(context.Context, string, caller.Caller) (turn.Profile, error) {
	return turn.Profile{Policy: turn.Policy{Mode: turn.Ask}}, nil
}

func (oneSession) Note(string, turn.Note) {}

// liveTurns is a turn.Service as the api wants it.
type liveTurns struct{ *turn.Service }

func (l liveTurns) Watch(ctx context.Context, ref turn.Ref, after *journal.Cursor) (api.TurnWatcher, error) {
	w, err := l.Service.Watch(ctx, ref, after)
	if err != nil {
		return nil, err
	}
	return w, nil
}

// serving is an executord of turns alone, which can be stopped and started.
type serving struct {
	t     *testing.T
	store *store.Store
	agent *turntest.Agent
	dir   string

	mu       sync.Mutex
	listener *bufconn.Listener
	stop     func()
}

func (s *serving) start() {
	s.t.Helper()
	turns, err := turn.New(turn.Config{Store: s.store, Sessions: oneSession{}, Dir: s.dir})
	if err != nil {
		s.t.Fatal(err)
	}
	if err := turns.Recover(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	turns.Attach("s1", s.agent)
	keys, err := auth.OpenKeys(s.t.Context(), s.store, slog.New(slog.DiscardHandler))
	if err != nil {
		s.t.Fatal(err)
	}
	shutdown, end := context.WithCancelCause(context.Background())
	server, err := api.NewServer(shutdown, api.Config{Turns: liveTurns{turns}, Keys: keys, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		s.t.Fatal(err)
	}
	listener := bufconn.Listen(64 << 10)
	var work sync.WaitGroup
	work.Go(func() { _ = server.Serve(listener) })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listener = listener
	s.stop = func() {
		end(errors.New("stopping"))
		server.Stop()
		work.Wait()
		if err := turns.Close(); err != nil {
			s.t.Error(err)
		}
	}
}

func (s *serving) dial(ctx context.Context, _ string) (net.Conn, error) {
	s.mu.Lock()
	listener := s.listener
	s.mu.Unlock()
	return listener.DialContext(ctx)
}

// TestTurnOverRestarts: a client follows its turn, answers what is asked, and sees every
// event once, while executord is stopped and started again and again.
func TestTurnOverRestarts(t *testing.T) {
	st, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	var steps []turntest.Step
	want := ""
	for n := range 40 {
		text := strings.Repeat(string(rune('a'+n%26)), n+1)
		steps = append(steps, turntest.Text(20*time.Millisecond, text))
		want += text
	}
	steps = append(steps[:20], append([]turntest.Step{turntest.Permit("per_1")}, steps[20:]...)...)
	s := &serving{t: t, store: st, agent: &turntest.Agent{Scripts: []turntest.Script{{Steps: steps}}}, dir: filepath.Join(t.TempDir(), "turns")}
	s.start()
	t.Cleanup(func() {
		s.stop()
		s.agent.Wait()
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	c, err := client.Dial(client.Config{Address: "127.0.0.1:1", DialOptions: []grpc.DialOption{grpc.WithContextDialer(s.dial)}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	stream, err := c.Prompt(t.Context(), &executorv1.SendPromptRequest{Parent: "sessions/s1", Prompt: &executorv1.Prompt{Text: "go"}})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var got string
	texts, asked := 0, 0
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case e.GetText() != nil:
			got += e.GetText().GetText()
			if texts++; texts%9 == 0 {
				s.stop()
				s.start()
			}
		case e.GetInteractionRequested() != nil:
			asked++
			s.stop() // the answer waits for the next one
			s.start()
			i, err := c.ResolveInteraction(t.Context(), &executorv1.ResolveInteractionRequest{
				Name: e.GetInteractionRequested().GetName(), Resolution: &executorv1.Resolution{Decision: executorv1.Resolution_DECISION_ALLOW_ONCE},
			})
			if err != nil || i.GetState() != executorv1.Interaction_STATE_RESOLVED {
				t.Fatalf("%v, %v", i, err)
			}
		}
	}
	if got != want || asked != 1 || stream.Result().GetOutcome() != executorv1.TurnOutcome_TURN_OUTCOME_COMPLETED {
		t.Errorf("got %q\nwant %q, asked %d times, %v", got, want, asked, stream.Result())
	}
	if answers := turntest.Seen(s.agent, func(a *turntest.Agent) []agent.Answer { return a.Answers["per_1"] }); len(answers) != 1 {
		t.Errorf("answered %v", answers)
	}
	if one, err := c.WaitTurn(t.Context(), stream.Name()); err != nil || one.GetPrompt().GetText() != "go" {
		t.Errorf("%v, %v", one, err)
	}
}
