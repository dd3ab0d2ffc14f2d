package client_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

const turnName = "sessions/s1/turns/t1"

// turnServer has one turn with a log. Each call takes the next of its scripts; without one
// it tells the log from its cursor.
type turnServer struct {
	executorv1.UnimplementedSessionServiceServer
	log []*executorv1.TurnEvent

	mu      sync.Mutex
	scripts []func(tell func(...*executorv1.TurnEvent) error, after *executorv1.Cursor) error
	prompts []*executorv1.SendPromptRequest
	watches []*executorv1.WatchTurnRequest
	calls   []proto.Message
	// failures are what the next unary calls answer.
	failures []error
}

func (s *turnServer) play(tell func(...*executorv1.TurnEvent) error, after *executorv1.Cursor) error {
	s.mu.Lock()
	var script func(func(...*executorv1.TurnEvent) error, *executorv1.Cursor) error
	if len(s.scripts) > 0 {
		script, s.scripts = s.scripts[0], s.scripts[1:]
	}
	s.mu.Unlock()
	if script != nil {
		return script(tell, after)
	}
	return tell(s.log[after.GetSequence():]...)
}

func (s *turnServer) then(all ...func(tell func(...*executorv1.TurnEvent) error, after *executorv1.Cursor) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.scripts = append(s.scripts, all...)
}

func (s *turnServer) SendPrompt(r *executorv1.SendPromptRequest, stream grpc.ServerStreamingServer[executorv1.SendPromptResponse]) error {
	s.mu.Lock()
	s.prompts = append(s.prompts, r)
	s.mu.Unlock()
	return s.play(func(all ...*executorv1.TurnEvent) error {
		for _, e := range all {
			if err := stream.Send(&executorv1.SendPromptResponse{Event: e}); err != nil {
				return err
			}
		}
		return nil
	}, nil)
}

func (s *turnServer) WatchTurn(r *executorv1.WatchTurnRequest, stream grpc.ServerStreamingServer[executorv1.WatchTurnResponse]) error {
	s.mu.Lock()
	s.watches = append(s.watches, r)
	s.mu.Unlock()
	return s.play(func(all ...*executorv1.TurnEvent) error {
		for _, e := range all {
			if err := stream.Send(&executorv1.WatchTurnResponse{Event: e}); err != nil {
				return err
			}
		}
		return nil
	}, r.GetAfter())
}

func (s *turnServer) note(m proto.Message) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, m)
	if len(s.failures) == 0 {
		return nil
	}
	err := s.failures[0]
	s.failures = s.failures[1:]
	return err
}

func (s *turnServer) GetTurn(_ context.Context, r *executorv1.GetTurnRequest) (*executorv1.GetTurnResponse, error) {
	err := s.note(r)
	state := executorv1.Turn_STATE_ENDED
	if err == nil && len(s.calls) < 3 {
		state = executorv1.Turn_STATE_RUNNING
	}
	return &executorv1.GetTurnResponse{Turn: &executorv1.Turn{Name: r.GetName(), State: state}}, err
}

func (s *turnServer) CancelTurn(_ context.Context, r *executorv1.CancelTurnRequest) (*executorv1.CancelTurnResponse, error) {
	return &executorv1.CancelTurnResponse{Turn: &executorv1.Turn{Name: r.GetName()}}, s.note(r)
}

func (s *turnServer) ResolveInteraction(_ context.Context, r *executorv1.ResolveInteractionRequest) (*executorv1.ResolveInteractionResponse, error) {
	return &executorv1.ResolveInteractionResponse{Interaction: &executorv1.Interaction{Name: r.GetName()}}, s.note(r)
}

func (s *turnServer) WatchSession(r *executorv1.WatchSessionRequest, stream grpc.ServerStreamingServer[executorv1.WatchSessionResponse]) error {
	for n := r.GetAfter().GetSequence() + 1; n <= 3; n++ {
		e := &executorv1.SessionEvent{Cursor: &executorv1.Cursor{Epoch: "e", Sequence: n}, Kind: &executorv1.SessionEvent_Step{Step: &executorv1.SessionStep{}}}
		if n == 3 {
			e.Kind = &executorv1.SessionEvent_Ended{Ended: &executorv1.Session{}}
		}
		if err := stream.Send(&executorv1.WatchSessionResponse{Event: e}); err != nil {
			return err
		}
		if n == 1 {
			return status.Error(codes.Unavailable, "reset")
		}
	}
	return nil
}

func startTurns(t *testing.T) (*turnServer, *client.Client) {
	t.Helper()
	s := &turnServer{log: []*executorv1.TurnEvent{
		turnEvent(1, &executorv1.TurnEvent_Started{Started: &executorv1.TurnStarted{Turn: turnName}}),
		turnEvent(2, &executorv1.TurnEvent_Running{Running: &executorv1.TurnRunning{}}),
		turnEvent(3, &executorv1.TurnEvent_Text{Text: &executorv1.TextDelta{Text: "a"}}),
		turnEvent(4, &executorv1.TurnEvent_Result{Result: &executorv1.TurnResult{Outcome: executorv1.TurnOutcome_TURN_OUTCOME_COMPLETED}}),
	}}
	server := grpc.NewServer()
	executorv1.RegisterSessionServiceServer(server, s)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	t.Cleanup(func() {
		server.Stop()
		serving.Wait()
	})
	return s, dial(t, client.Config{Address: listener.Addr().String()})
}

func turnEvent(n uint64, kind any) *executorv1.TurnEvent {
	e := &executorv1.TurnEvent{Cursor: &executorv1.Cursor{Epoch: "e", Sequence: n}}
	switch k := kind.(type) {
	case *executorv1.TurnEvent_Started:
		e.Kind = k
	case *executorv1.TurnEvent_Running:
		e.Kind = k
	case *executorv1.TurnEvent_Text:
		e.Kind = k
	case *executorv1.TurnEvent_Result:
		e.Kind = k
	case *executorv1.TurnEvent_Gap:
		e.Kind = k
	case *executorv1.TurnEvent_Heartbeat:
		e.Kind = k
	}
	return e
}

// drainTurn reads a TurnStream to its end and returns the numbers of its events.
func drainTurn(s *client.TurnStream) (numbers []uint64, err error) {
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return numbers, nil
		}
		if err != nil {
			return numbers, err
		}
		numbers = append(numbers, e.GetCursor().GetSequence())
	}
}

func wantNumbers(t *testing.T, got []uint64, want ...uint64) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("got %v, want %v", got, want)
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Errorf("got %v, want %v", got, want)
		}
	}
}

// TestPromptCutAtEachEvent: wherever the connection breaks, every event is told once and
// nothing is asked twice.
func TestPromptCutAtEachEvent(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]error{
		"reset": status.Error(codes.Unavailable, "reset"), "draining": clienttest.Error(codes.Unavailable, "SERVER_DRAINING", nil, "stopping"),
		"slow": clienttest.Error(codes.ResourceExhausted, "SLOW_CONSUMER", nil, "asleep"), "without result": nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, c := startTurns(t)
			for n := range s.log {
				s.then(func(tell func(...*executorv1.TurnEvent) error, _ *executorv1.Cursor) error {
					if err := tell(s.log[:n]...); err != nil {
						return err
					}
					return cut
				})
				s.prompts = nil
				if n == 0 && name == "draining" {
					s.scripts = nil // that is a refusal
				}
				stream, err := c.Prompt(bounded(t), &executorv1.SendPromptRequest{Parent: "sessions/s1", Prompt: &executorv1.Prompt{Text: "x"}})
				if err != nil {
					t.Fatalf("cut after %d events: %v", n, err)
				}
				if stream.Name() != turnName {
					t.Errorf("name %s", stream.Name())
				}
				got, err := drainTurn(stream)
				if err != nil {
					t.Fatalf("cut after %d events: %v", n, err)
				}
				wantNumbers(t, got, 1, 2, 3, 4)
				if stream.Result().GetOutcome() != executorv1.TurnOutcome_TURN_OUTCOME_COMPLETED || stream.Cursor().GetSequence() != 4 {
					t.Errorf("result %v, cursor %v", stream.Result(), stream.Cursor())
				}
				s.mu.Lock()
				for _, p := range s.prompts {
					if p.GetRequestId() == "" || p.GetRequestId() != s.prompts[0].GetRequestId() {
						t.Errorf("asked as %q and %q", s.prompts[0].GetRequestId(), p.GetRequestId())
					}
				}
				s.mu.Unlock()
			}
		})
	}
}

func TestPromptIsRefused(t *testing.T) {
	t.Parallel()
	s, c := startTurns(t)
	s.then(func(func(...*executorv1.TurnEvent) error, *executorv1.Cursor) error {
		return clienttest.Error(codes.ResourceExhausted, "QUEUE_FULL", nil, "full")
	})
	_, err := c.Prompt(bounded(t), &executorv1.SendPromptRequest{Parent: "sessions/s1"})
	if client.Reason(err) != "QUEUE_FULL" || len(s.prompts) != 1 {
		t.Errorf("%v after %d", err, len(s.prompts))
	}
	// Whether it was asked is not known: ErrUnconfirmed when ctx ends.
	silent := func(tell func(...*executorv1.TurnEvent) error, _ *executorv1.Cursor) error {
		return status.Error(codes.Unavailable, "reset")
	}
	for range 100 {
		s.then(silent)
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), 300*time.Millisecond, errors.New("enough"))
	defer cancel()
	if _, err = c.Prompt(ctx, &executorv1.SendPromptRequest{Parent: "sessions/s1"}); !errors.Is(err, client.ErrUnconfirmed) {
		t.Errorf("%v", err)
	}
}

// TestTurnBooks: what a server leaves out or repeats is found, gaps are told.
func TestTurnBooks(t *testing.T) {
	t.Parallel()
	gap := func(n uint64, reason executorv1.Gap_Reason) *executorv1.TurnEvent {
		return turnEvent(n, &executorv1.TurnEvent_Gap{Gap: &executorv1.Gap{Reason: reason}})
	}
	beat := func(n uint64) *executorv1.TurnEvent {
		return turnEvent(n, &executorv1.TurnEvent_Heartbeat{Heartbeat: &executorv1.Heartbeat{}})
	}
	changed := gap(0, executorv1.Gap_REASON_EPOCH_CHANGED)
	changed.Cursor.Epoch = "f"
	other := turnEvent(1, &executorv1.TurnEvent_Text{})
	other.Cursor.Epoch = "f"
	s, c := startTurns(t)
	log := s.log
	unknown := turnEvent(3, nil)
	for name, test := range map[string]struct {
		told  []*executorv1.TurnEvent
		after *executorv1.Cursor
		want  []uint64
		err   error
	}{
		"repeats":        {[]*executorv1.TurnEvent{log[0], log[0], log[1], log[0], log[2], log[3]}, nil, []uint64{1, 2, 3, 4}, nil},
		"a hole":         {[]*executorv1.TurnEvent{log[0], log[2]}, nil, []uint64{1}, client.ErrHole},
		"a gap":          {[]*executorv1.TurnEvent{gap(3, executorv1.Gap_REASON_RETENTION), log[3]}, nil, []uint64{3, 4}, nil},
		"heartbeats":     {[]*executorv1.TurnEvent{beat(0), log[0], beat(1), log[1], log[2], log[3]}, nil, []uint64{1, 2, 3, 4}, nil},
		"a beat ahead":   {[]*executorv1.TurnEvent{log[0], beat(3)}, nil, []uint64{1}, client.ErrHole},
		"an epoch":       {[]*executorv1.TurnEvent{changed, other}, &executorv1.Cursor{Epoch: "e", Sequence: 9}, []uint64{0, 1}, client.ErrOutage},
		"unannounced":    {[]*executorv1.TurnEvent{log[0], other}, nil, []uint64{1}, client.ErrHole},
		"no number":      {[]*executorv1.TurnEvent{turnEvent(0, &executorv1.TurnEvent_Text{})}, nil, nil, client.ErrProtocol},
		"unknown is not": {[]*executorv1.TurnEvent{log[0], log[1], unknown, log[3]}, nil, []uint64{1, 2, 4}, nil},
		"nothing":        {[]*executorv1.TurnEvent{nil}, nil, nil, client.ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			s.then(func(tell func(...*executorv1.TurnEvent) error, _ *executorv1.Cursor) error { return tell(test.told...) })
			ctx, cancel := context.WithCancelCause(bounded(t))
			defer cancel(nil)
			stream, err := c.WatchTurn(ctx, turnName, test.after)
			if err != nil {
				t.Fatal(err)
			}
			if name == "an epoch" { // that log has no end here
				for range 2 {
					if _, err := stream.Recv(); err != nil {
						t.Fatal(err)
					}
				}
				if at := stream.Cursor(); at.GetEpoch() != "f" || at.GetSequence() != 1 {
					t.Errorf("cursor %v", at)
				}
				stream.Close()
				if _, err := stream.Recv(); !errors.Is(err, client.ErrClosed) {
					t.Errorf("%v", err)
				}
				return
			}
			got, err := drainTurn(stream)
			wantNumbers(t, got, test.want...)
			if !errors.Is(err, test.err) {
				t.Errorf("%v, want %v", err, test.err)
			}
		})
	}
}

func TestWatchTurnFromItsCursor(t *testing.T) {
	t.Parallel()
	s, c := startTurns(t)
	stream, err := c.WatchTurn(bounded(t), turnName, &executorv1.Cursor{Epoch: "e", Sequence: 2})
	if err != nil {
		t.Fatal(err)
	}
	got, err := drainTurn(stream)
	if err != nil || s.watches[0].GetAfter().GetSequence() != 2 {
		t.Errorf("%v, %v", err, s.watches)
	}
	wantNumbers(t, got, 3, 4)
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("behind the end: %v", err)
	}
	if _, err := c.WatchTurn(t.Context(), "", nil); err == nil {
		t.Error("a turn without a name")
	}
}

func TestTurnCalls(t *testing.T) {
	t.Parallel()
	s, c := startTurns(t)
	broken := status.Error(codes.Unavailable, "reset")
	s.failures = []error{broken}
	if one, err := c.WaitTurn(bounded(t), turnName); err != nil || one.GetState() != executorv1.Turn_STATE_ENDED || len(s.calls) != 3 {
		t.Errorf("%v, %v after %d", one, err, len(s.calls))
	}
	for name, call := range map[string]func() error{
		"cancel": func() error {
			_, err := c.CancelTurn(bounded(t), &executorv1.CancelTurnRequest{Name: turnName})
			return err
		},
		"resolve": func() error {
			_, err := c.ResolveInteraction(bounded(t), &executorv1.ResolveInteractionRequest{Name: "sessions/s1/interactions/i1"})
			return err
		},
	} {
		s.calls, s.failures = nil, []error{broken, broken}
		if err := call(); err != nil || len(s.calls) != 3 {
			t.Errorf("%s: %v after %d", name, err, len(s.calls))
		}
		ids := make(map[string]bool)
		for _, m := range s.calls {
			ids[m.(interface{ GetRequestId() string }).GetRequestId()] = true
		}
		if len(ids) != 1 || ids[""] {
			t.Errorf("%s: names %v", name, ids)
		}
		refused := clienttest.Error(codes.FailedPrecondition, "INTERACTION_NOT_PENDING", nil, "late")
		s.calls, s.failures = nil, []error{refused}
		if err := call(); client.Reason(err) != "INTERACTION_NOT_PENDING" || len(s.calls) != 1 {
			t.Errorf("%s: %v after %d", name, err, len(s.calls))
		}
	}
}

func TestWatchSessionResumes(t *testing.T) {
	t.Parallel()
	_, c := startTurns(t)
	stream, err := c.WatchSession(bounded(t), "sessions/s1", nil)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if n++; err != nil || e.GetCursor().GetSequence() != uint64(n) {
			t.Fatalf("%v, %v", e, err)
		}
	}
	if n != 3 || stream.Name() != "sessions/s1" || stream.Cursor().GetSequence() != 3 {
		t.Errorf("%d events, cursor %v", n, stream.Cursor())
	}
	stream.Close()
	if _, err := c.WatchSession(t.Context(), "", nil); err == nil {
		t.Error("a session without a name")
	}
}
