package api

import (
	"context"
	"strconv"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/agent"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/turn"
	"google.golang.org/grpc"
)

// Turns keeps the prompts to the agents of sessions. turn.Service is meant.
type Turns interface {
	// Send queues a prompt; the turn is durable when Send returns. A repeat of the request
	// returns the first one's.
	Send(ctx context.Context, r turn.Request) (turn.Turn, error)
	// Get reads one.
	Get(ctx context.Context, ref turn.Ref) (turn.Turn, error)
	// Wait returns one when it has ended. When ctx ends first it returns it as it is, and
	// ctx's cause.
	Wait(ctx context.Context, ref turn.Ref) (turn.Turn, error)
	// List reads a page.
	List(ctx context.Context, q turn.Query) ([]turn.Turn, error)
	// Watch reads its journal behind after, from the start if that is nil.
	Watch(ctx context.Context, ref turn.Ref, after *journal.Cursor) (TurnWatcher, error)
	// Cancel ends one and returns it when it is over. When ctx ends first the ending goes on.
	Cancel(ctx context.Context, ref turn.Ref, c turn.Cancellation) (turn.Turn, error)
	// Messages reads what was said with the agent, behind the message with the id after.
	Messages(ctx context.Context, session string, by caller.Caller, after string, limit int) ([]agent.Message, error)
	// Running is the id of the turn of a session that runs; "" if none does.
	Running(session string) string
	// Usage is what the turns of a session have used so far.
	Usage(ctx context.Context, session string) (agent.Usage, error)
	// ListInteractions reads a page.
	ListInteractions(ctx context.Context, q turn.InteractionQuery) ([]turn.Interaction, error)
	// Resolve answers one.
	Resolve(ctx context.Context, ref turn.Ref, answer agent.Answer, by string, key idempotency.Key) (turn.Interaction, error)
}

// TurnWatcher reads the events of one turn. It is used by one goroutine.
type TurnWatcher interface {
	// Next is as that of Watcher.
	Next(ctx context.Context) (turn.Event, error)
	// Cursor is that of the last event told.
	Cursor() journal.Cursor
	// LastEventTime is when something was last added to the journal.
	LastEventTime() time.Time
	// Close releases it.
	Close()
}

// SendPrompt implements executorv1.SessionServiceServer.
func (s *sessionService) SendPrompt(req *executorv1.SendPromptRequest, stream grpc.ServerStreamingServer[executorv1.SendPromptResponse]) error {
	ctx := stream.Context()
	interval, err := heartbeatInterval(req.GetHeartbeatInterval())
	if err != nil {
		return err
	}
	request := turn.Request{Caller: callerOf(ctx), Prompt: promptOf(req.GetPrompt())}
	if request.Session, err = parseSessionParent(req.GetParent()); err != nil {
		return err
	}
	if request.Key, err = s.keys.of(ctx, req); err != nil {
		return err
	}
	made, err := s.turns.Send(ctx, request)
	if err != nil {
		return err
	}
	send := func(event *executorv1.TurnEvent) error {
		return stream.Send(&executorv1.SendPromptResponse{Event: event})
	}
	ref := turn.Ref{Session: made.Session, ID: made.ID, Caller: request.Caller}
	var watcher TurnWatcher
	_, err = greet(ctx, greeting[turn.Event]{
		watch: func(behind *turn.Event) (source[turn.Event], error) {
			var after *journal.Cursor
			if behind != nil {
				after = &behind.Cursor
			}
			var err error
			watcher, err = s.turns.Watch(ctx, ref, after)
			return watcher, err
		},
		first: func(event turn.Event) bool { return event.Started != nil },
		made: func(inPlaceOf turn.Event) turn.Event {
			return turn.Event{
				Cursor: journal.Cursor{Epoch: inPlaceOf.Cursor.Epoch, Sequence: 1}, Time: made.CreateTime,
				Started: &turn.Started{Session: made.Session, Turn: made.ID},
			}
		},
	}, func(event turn.Event) error { return send(turnEventProto(event)) })
	if err != nil {
		return err
	}
	return s.followTurn(ctx, watcher, interval, send)
}

// WatchTurn implements executorv1.SessionServiceServer.
func (s *sessionService) WatchTurn(req *executorv1.WatchTurnRequest, stream grpc.ServerStreamingServer[executorv1.WatchTurnResponse]) error {
	interval, err := heartbeatInterval(req.GetHeartbeatInterval())
	if err != nil {
		return err
	}
	ref, err := parseTurnName(stream.Context(), req.GetName())
	if err != nil {
		return err
	}
	watcher, err := s.turns.Watch(stream.Context(), ref, journalCursorOf(req.GetAfter()))
	if err != nil {
		return err
	}
	return s.followTurn(stream.Context(), watcher, interval, func(event *executorv1.TurnEvent) error {
		return stream.Send(&executorv1.WatchTurnResponse{Event: event})
	})
}

// followTurn sends the events that a watcher tells until the result, and closes it.
func (s *sessionService) followTurn(ctx context.Context, watcher TurnWatcher, interval time.Duration, send func(*executorv1.TurnEvent) error) error {
	return follow(ctx, s.senders, following[turn.Event, *executorv1.TurnEvent]{
		source: watcher, interval: interval, convert: turnEventProto, send: send,
		beat: func() *executorv1.TurnEvent { return turnHeartbeatProto(watcher.Cursor(), watcher.LastEventTime()) },
	})
}

// GetTurn implements executorv1.SessionServiceServer.
func (s *sessionService) GetTurn(ctx context.Context, req *executorv1.GetTurnRequest) (*executorv1.GetTurnResponse, error) {
	ref, err := parseTurnName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	timeout, err := duration("wait", req.GetWait())
	if err != nil {
		return nil, err
	}
	var found turn.Turn
	if timeout == 0 {
		found, err = s.turns.Get(ctx, ref)
	} else {
		wait, cancel := context.WithTimeoutCause(ctx, timeout, errWaited)
		defer cancel()
		if found, err = s.turns.Wait(wait, ref); waited(ctx, wait, err) {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	return &executorv1.GetTurnResponse{Turn: turnProto(found)}, nil
}

// ListTurns implements executorv1.SessionServiceServer.
func (s *sessionService) ListTurns(ctx context.Context, req *executorv1.ListTurnsRequest) (*executorv1.ListTurnsResponse, error) {
	size := pageSize(req.GetPageSize())
	query := turn.Query{Caller: callerOf(ctx), Limit: size + 1}
	list := listing(ctx, "ListTurns", req.GetParent(), "", false)
	before, err := s.tokens.decode(list, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	if before != "" {
		if query.Before, err = strconv.Atoi(before); err != nil {
			return nil, errPageToken()
		}
	}
	if query.Session, err = parseSessionParent(req.GetParent()); err != nil {
		return nil, err
	}
	found, err := s.turns.List(ctx, query)
	if err != nil {
		return nil, err
	}
	page := fitPage(found[:min(len(found), size)], turnProto)
	return &executorv1.ListTurnsResponse{
		Turns: page,
		NextPageToken: tokenBehind(found, len(page), func(last turn.Turn) string {
			return s.tokens.encode(list, strconv.Itoa(last.Number))
		}),
	}, nil
}

// CancelTurn implements executorv1.SessionServiceServer.
func (s *sessionService) CancelTurn(ctx context.Context, req *executorv1.CancelTurnRequest) (*executorv1.CancelTurnResponse, error) {
	ref, err := parseTurnName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	key, err := s.keys.of(ctx, req)
	if err != nil {
		return nil, err
	}
	ended, err := s.turns.Cancel(ctx, ref, turn.Cancellation{By: requester(ctx, req.GetRequester()), Key: key})
	if err != nil {
		return nil, err
	}
	return &executorv1.CancelTurnResponse{Turn: turnProto(ended)}, nil
}

// ListMessages implements executorv1.SessionServiceServer.
func (s *sessionService) ListMessages(ctx context.Context, req *executorv1.ListMessagesRequest) (*executorv1.ListMessagesResponse, error) {
	size := pageSize(req.GetPageSize())
	list := listing(ctx, "ListMessages", req.GetParent(), "", true)
	after, err := s.tokens.decode(list, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	session, err := parseSessionParent(req.GetParent())
	if err != nil {
		return nil, err
	}
	found, err := s.turns.Messages(ctx, session, callerOf(ctx), after, size+1)
	if err != nil {
		return nil, err
	}
	page := fitPage(found[:min(len(found), size)], func(m agent.Message) *executorv1.Message { return messageProto(session, m) })
	return &executorv1.ListMessagesResponse{
		Messages:      page,
		NextPageToken: tokenBehind(found, len(page), func(last agent.Message) string { return s.tokens.encode(list, last.ID) }),
	}, nil
}
