package client_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// behind is the part of a log behind a cursor.
func behind(log []*executorv1.Event, after *executorv1.Cursor) []*executorv1.Event {
	for i, e := range log {
		if e.GetCursor().GetSequence() > after.GetSequence() {
			return log[i:]
		}
	}
	return nil
}

// cuts are the ways in which a connection breaks.
func cuts() map[string]clienttest.Script {
	answer := func(err error) clienttest.Script {
		return func(*clienttest.Play) error { return err }
	}
	return map[string]clienttest.Script{
		"unavailable":     answer(status.Error(codes.Unavailable, "connection reset by peer")),
		"draining":        answer(clienttest.Error(codes.Unavailable, "SERVER_DRAINING", nil, "stopping")),
		"without result":  answer(nil),
		"reset":           answer(status.Error(codes.Internal, "stream terminated by RST_STREAM")),
		"slow consumer":   answer(clienttest.Error(codes.ResourceExhausted, "SLOW_CONSUMER", nil, "asleep")),
		"proxy gave up":   answer(status.Error(codes.DeadlineExceeded, "upstream timeout")),
		"server restarts": func(p *clienttest.Play) error { return p.Restart() },
	}
}

func TestStreamCutAtEachEvent(t *testing.T) {
	t.Parallel()
	for how, cut := range cuts() {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			s := clienttest.Start(t)
			log := sample()
			s.Put(ended(), log...)
			c := dial(t, client.Config{Address: s.Address()})
			for n := range len(log) {
				s.Play(func(p *clienttest.Play) error {
					if err := p.Send(p.Log[:n]...); err != nil {
						return err
					}
					return cut(p)
				})
				stream, err := c.Watch(bounded(t), name, nil)
				if err != nil {
					t.Fatal(err)
				}
				got, err := drain(stream)
				if err != nil {
					t.Fatalf("cut after %d events: %v", n, err)
				}
				wantEvents(t, got, log)
				if !stream.Whole() || stream.Result() == nil || stream.Cursor().GetSequence() != 7 {
					t.Errorf("cut after %d events: whole %v, result %v, cursor %v", n, stream.Whole(), stream.Result(), stream.Cursor())
				}
			}
		})
	}
}

func TestStreamResumesFromCursor(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	log := sample()
	s.Put(ended(), log...)
	c := dial(t, client.Config{Address: s.Address(), HeartbeatInterval: 20 * time.Second})
	// A new connection for every single event.
	for range log {
		s.Play(func(p *clienttest.Play) error {
			if err := p.Send(behind(p.Log, p.After)[0]); err != nil {
				return err
			}
			return status.Error(codes.Unavailable, "reset")
		})
	}
	stream, err := c.Watch(bounded(t), name, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := drain(stream)
	if err != nil {
		t.Fatal(err)
	}
	wantEvents(t, got, log)
	calls := s.Calls("WatchExecution")
	if len(calls) != len(log) {
		t.Fatalf("%d calls for %d events", len(calls), len(log))
	}
	for i, call := range calls {
		r := call.(*executorv1.WatchExecutionRequest)
		if r.GetAfter().GetSequence() != uint64(i) || (i > 0 && r.GetAfter().GetEpoch() != clienttest.Epoch) {
			t.Errorf("call %d is after %v", i, r.GetAfter())
		}
		if r.GetHeartbeatInterval().AsDuration() != 20*time.Second {
			t.Errorf("call %d has heartbeat interval %v", i, r.GetHeartbeatInterval())
		}
	}
}

func TestStreamFromEachCursor(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	log := sample()
	s.Put(ended(), log...)
	c := dial(t, client.Config{Address: s.Address()})
	for n := range uint64(len(log)) {
		stream, err := c.Watch(bounded(t), name, cursor(n))
		if err != nil {
			t.Fatal(err)
		}
		if got := stream.Cursor(); got.GetSequence() != n {
			t.Errorf("cursor %v before the first event, want %d", got, n)
		}
		got, err := drain(stream)
		if err != nil {
			t.Fatalf("after %d: %v", n, err)
		}
		wantEvents(t, got, log[n:])
		if stream.Whole() != (n == 0) {
			t.Errorf("after %d: whole is %v", n, stream.Whole())
		}
	}
}

func TestStreamIsHonestAboutAnswers(t *testing.T) {
	t.Parallel()
	log := sample()
	without := func(i int) []*executorv1.Event {
		return append(append([]*executorv1.Event(nil), log[:i]...), log[i+1:]...)
	}
	wrong := func(change func(*executorv1.Result)) []*executorv1.Event {
		r := proto.CloneOf(log[6])
		change(r.GetResult())
		return append(append([]*executorv1.Event(nil), log[:6]...), r)
	}
	twice := func() (all []*executorv1.Event) {
		for _, e := range log {
			all = append(all, e, e)
		}
		return all
	}
	tests := []struct {
		name string
		log  []*executorv1.Event
		// told is how many events Recv returns.
		told int
		err  error
		// ends: the result came.
		ends bool
	}{
		{name: "whole", log: log, told: 7, ends: true},
		{name: "each event twice", log: twice(), told: 7, ends: true},
		{name: "all again", log: append(append([]*executorv1.Event(nil), log[:5]...), log...), told: 7, ends: true},
		{name: "no started", log: without(0), told: 0, err: client.ErrHole},
		{name: "hole at 2", log: without(1), told: 1, err: client.ErrHole},
		{name: "hole at 3", log: without(2), told: 2, err: client.ErrHole},
		{name: "hole at 4", log: without(3), told: 3, err: client.ErrHole},
		{name: "hole at 6", log: without(5), told: 5, err: client.ErrHole, ends: true},
		{name: "hole in the bytes", log: []*executorv1.Event{log[0], chunk(2, stdout, 1, "ello ")}, told: 1, err: client.ErrHole},
		{name: "bytes again", log: append(append([]*executorv1.Event(nil), log[:2]...), chunk(3, stdout, 3, "lo ")), told: 2, err: client.ErrHole},
		{
			name: "another epoch unsaid", told: 1, err: client.ErrHole,
			log: []*executorv1.Event{log[0], {Cursor: &executorv1.Cursor{Epoch: "e2", Sequence: 2}, Kind: log[1].GetKind()}},
		},
		{name: "wrong crc", log: wrong(func(r *executorv1.Result) { r.GetTotals()[0].Crc32C++ }), told: 6, err: client.ErrIncomplete, ends: true},
		{name: "wrong size", log: wrong(func(r *executorv1.Result) { r.GetTotals()[1].Size++ }), told: 6, err: client.ErrIncomplete, ends: true},
		{name: "no totals", log: wrong(func(r *executorv1.Result) { r.Totals = nil }), told: 6, err: client.ErrIncomplete, ends: true},
		{name: "no cursor", log: []*executorv1.Event{log[0], {Kind: log[1].GetKind()}}, told: 1, err: client.ErrProtocol},
		{name: "empty message", log: []*executorv1.Event{log[0], nil}, told: 1, err: client.ErrProtocol},
		{name: "heartbeat beyond", log: []*executorv1.Event{log[0], heartbeat(3)}, told: 1, err: client.ErrHole},
		{
			name: "kinds of a later version", told: 2, ends: true,
			log: []*executorv1.Event{log[0], {Cursor: cursor(2)}, {Cursor: cursor(2)}, result(3)},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := clienttest.Start(t)
			s.Put(ended(), log...)
			c := dial(t, client.Config{Address: s.Address()})
			s.Play(func(p *clienttest.Play) error { return p.Send(test.log...) })
			stream, err := c.Watch(bounded(t), name, nil)
			if err != nil {
				t.Fatal(err)
			}
			got, err := drain(stream)
			if !errors.Is(err, test.err) {
				t.Errorf("error %v, want %v", err, test.err)
			}
			if len(got) != test.told {
				t.Errorf("%d events, want %d", len(got), test.told)
			}
			if ends := stream.Result() != nil; ends != test.ends {
				t.Errorf("result is there: %v, want %v", ends, test.ends)
			}
			if whole := stream.Whole(); whole && test.err != nil && test.ends {
				t.Error("an incomplete stream calls itself whole")
			}
			_, again := stream.Recv()
			if test.err == nil && !errors.Is(again, io.EOF) || test.err != nil && !errors.Is(again, test.err) {
				t.Errorf("the next Recv returned %v", again)
			}
			if n := len(s.Calls("WatchExecution")); n != 1 {
				t.Errorf("%d calls: an error of the log must not be tried again", n)
			}
		})
	}
}

func TestStreamTellsGaps(t *testing.T) {
	t.Parallel()
	const dropped, damaged, renewed = executorv1.Gap_REASON_RETENTION, executorv1.Gap_REASON_DAMAGED, executorv1.Gap_REASON_EPOCH_CHANGED
	other := func(events ...*executorv1.Event) []*executorv1.Event {
		for _, e := range events {
			e.Cursor.Epoch = "e2"
		}
		return events
	}
	log := sample()
	tests := []struct {
		name  string
		log   []*executorv1.Event
		whole bool
	}{
		{name: "first", log: append([]*executorv1.Event{gap(4, dropped, 4, 9, 8)}, log[4:]...)},
		{name: "in the middle", log: append([]*executorv1.Event{log[0], log[1], gap(4, dropped, 2, 9, 8)}, log[4:]...)},
		{name: "without positions", log: append([]*executorv1.Event{log[0], log[1], gap(4, damaged, 2)}, log[4:]...)},
		{name: "with the cursor of the last told", log: append([]*executorv1.Event{log[0], log[1], gap(2, damaged, 2, 9, 8)}, log[4:]...)},
		{name: "of an unknown number", log: append([]*executorv1.Event{log[0], log[1], gap(2, damaged, 0, 9, 8)}, log[4:]...)},
		{name: "of no output", whole: true, log: []*executorv1.Event{
			log[0], log[1], log[2], log[3], log[4], log[5], gap(9, damaged, 3, 12, 10), result(10, log...),
		}},
		{name: "epoch changed", log: append([]*executorv1.Event{log[0], log[1]}, other(
			gap(0, renewed, 0), started(1), chunk(2, stdout, 6, "world\n"), chunk(3, stderr, 0, "warning\n\x00\xff"), result(4, log...))...)},
		{name: "epoch changed, told from the old one", log: append([]*executorv1.Event{log[0], log[1], gap(2, renewed, 0, 6, 0)}, other(
			started(1), chunk(2, stdout, 6, "world\n"), chunk(3, stderr, 0, "warning\n\x00\xff"), result(4, log...))...)},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := clienttest.Start(t)
			s.Put(ended(), test.log...)
			c := dial(t, client.Config{Address: s.Address()})
			s.Play(func(p *clienttest.Play) error { return p.Send(p.Log...) })
			stream, err := c.Watch(bounded(t), name, nil)
			if err != nil {
				t.Fatal(err)
			}
			got, err := drain(stream)
			if err != nil {
				t.Fatal(err)
			}
			wantEvents(t, got, test.log)
			if stream.Whole() != test.whole {
				t.Errorf("whole is %v, want %v", stream.Whole(), test.whole)
			}
		})
	}
}

func TestStreamRidesOutAStorm(t *testing.T) {
	t.Parallel()
	s := clienttest.Start(t)
	log := sample()
	s.Put(ended(), log...)
	var told []client.Outage
	c := dial(t, client.Config{Address: s.Address(), OnOutage: func(o client.Outage) { told = append(told, o) }})
	s.Hook(func(method string, nth int) error {
		if method == "WatchExecution" && nth%4 != 0 {
			return status.Error(codes.Unavailable, "storm")
		}
		return nil
	})
	s.Play(func(p *clienttest.Play) error { // the fourth call
		if err := p.Send(p.Log[:3]...); err != nil {
			return err
		}
		return status.Error(codes.Unavailable, "storm")
	})
	stream, err := c.Watch(bounded(t), name, nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := drain(stream)
	if err != nil {
		t.Fatal(err)
	}
	wantEvents(t, got, log)
	var attempts []int
	for _, o := range told {
		attempts = append(attempts, o.Attempt)
		if o.Execution != name || o.Err == nil || o.Wait <= 0 {
			t.Errorf("outage %+v", o)
		}
	}
	// Three failures, then events, which end the outage; the cut and three more.
	if want := []int{1, 2, 3, 1, 2, 3, 4}; fmt.Sprint(attempts) != fmt.Sprint(want) {
		t.Errorf("attempts %v, want %v", attempts, want)
	}
}

func TestStreamStopsAtTheServersWord(t *testing.T) {
	t.Parallel()
	tests := map[string]error{
		"not found":    clienttest.Error(codes.NotFound, "EXECUTION_NOT_FOUND", nil, "deleted"),
		"out of range": clienttest.Error(codes.OutOfRange, "CURSOR_IN_FUTURE", nil, "the log is shorter"),
		"internal":     clienttest.Error(codes.Internal, "LOG_UNREADABLE", nil, "the log cannot be read"),
		"no such call": status.Error(codes.Unimplemented, "unknown method"),
	}
	for what, answer := range tests {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			s := clienttest.Start(t)
			s.Put(ended(), sample()...)
			c := dial(t, client.Config{Address: s.Address()})
			s.Play(func(p *clienttest.Play) error { return p.Send(p.Log[:3]...) }) // ends without a result
			s.Hook(func(_ string, nth int) error {
				if nth == 2 {
					return answer
				}
				return nil
			})
			stream, err := c.Watch(bounded(t), name, nil)
			if err != nil {
				t.Fatal(err)
			}
			got, err := drain(stream)
			if len(got) != 3 || err == nil {
				t.Fatalf("%d events, error %v", len(got), err)
			}
			if client.Reason(err) != client.Reason(answer) || client.NotFound(err) != client.NotFound(answer) ||
				client.Unimplemented(err) != client.Unimplemented(answer) {
				t.Errorf("error %v", err)
			}
			if n := len(s.Calls("WatchExecution")); n != 2 {
				t.Errorf("%d calls", n)
			}
		})
	}
}

func TestStreamHeartbeats(t *testing.T) {
	t.Parallel()
	for _, wanted := range []bool{false, true} {
		s := clienttest.Start(t)
		log := sample()
		s.Put(ended(), log...)
		c := dial(t, client.Config{Address: s.Address(), Heartbeats: wanted})
		s.Play(func(p *clienttest.Play) error {
			return p.Send(append([]*executorv1.Event{heartbeat(0), log[0], heartbeat(1), heartbeat(1)}, log[1:]...)...)
		})
		stream, err := c.Watch(bounded(t), name, nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := drain(stream)
		if err != nil {
			t.Fatal(err)
		}
		want := log
		if wanted {
			want = append([]*executorv1.Event{heartbeat(0), log[0], heartbeat(1), heartbeat(1)}, log[1:]...)
		}
		wantEvents(t, got, want)
	}
}

func TestStreamEndsWithItsContext(t *testing.T) {
	t.Parallel()
	enough := errors.New("enough")
	for what, leave := range map[string]func(*client.Stream, context.CancelCauseFunc) error{
		"context": func(_ *client.Stream, cancel context.CancelCauseFunc) error { cancel(enough); return enough },
		"close":   func(s *client.Stream, _ context.CancelCauseFunc) error { s.Close(); return client.ErrClosed },
	} {
		for _, when := range []string{"open", "between connections"} {
			t.Run(what+" "+when, func(t *testing.T) {
				t.Parallel()
				s := clienttest.Start(t)
				waits := make(chan struct{}, 100)
				c := dial(t, client.Config{Address: s.Address(), OnOutage: func(client.Outage) { waits <- struct{}{} }})
				ctx, cancel := context.WithCancelCause(bounded(t))
				defer cancel(nil)
				stream, err := c.Execute(ctx, execute("out hello;await"))
				if err != nil {
					t.Fatal(err)
				}
				for range 2 {
					if _, err := stream.Recv(); err != nil {
						t.Fatal(err)
					}
				}
				var reader sync.WaitGroup
				var got error
				reader.Go(func() { _, got = stream.Recv() })
				if when != "open" {
					s.Stop()
					<-waits
				}
				want := leave(stream, cancel)
				reader.Wait()
				if !errors.Is(got, want) {
					t.Errorf("Recv returned %v, want %v", got, want)
				}
				if stream.Name() != name || stream.Cursor().GetSequence() != 2 {
					t.Errorf("name %q, cursor %v", stream.Name(), stream.Cursor())
				}
			})
		}
	}
}

func TestExecute(t *testing.T) {
	t.Parallel()
	t.Run("follows to the end", func(t *testing.T) {
		t.Parallel()
		s := clienttest.Start(t)
		c := dial(t, client.Config{Address: s.Address(), HeartbeatInterval: 7 * time.Second})
		request := execute("out hello;err oops;cut;out again;exit 3")
		stream, err := c.Execute(bounded(t), request)
		if err != nil {
			t.Fatal(err)
		}
		if stream.Name() != name || stream.Cursor() != nil {
			t.Errorf("name %q, cursor %v before the first Recv", stream.Name(), stream.Cursor())
		}
		got, err := drain(stream)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 5 || got[0].GetStarted().GetExecution() != name || stream.Result().GetExitCode() != 3 || !stream.Whole() {
			t.Errorf("events %v", got)
		}
		if request.GetHeartbeatInterval() != nil || request.GetRequestId() != "" {
			t.Error("the caller's request was changed")
		}
		if r := s.Calls("Execute")[0].(*executorv1.ExecuteRequest); r.GetHeartbeatInterval().AsDuration() != 7*time.Second {
			t.Errorf("heartbeat interval %v", r.GetHeartbeatInterval())
		}
	})
	t.Run("refused", func(t *testing.T) {
		t.Parallel()
		s := clienttest.Start(t)
		c := dial(t, client.Config{Address: s.Address()})
		_, err := c.Execute(bounded(t), execute("refuse INVALID_ARGUMENT ARGS_TOO_LARGE command.args at most 65536 bytes"))
		if client.Reason(err) != "ARGS_TOO_LARGE" || errors.Is(err, client.ErrUnconfirmed) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("draining", func(t *testing.T) {
		t.Parallel()
		s := clienttest.Start(t)
		c := dial(t, client.Config{Address: s.Address()})
		_, err := c.Execute(bounded(t), execute("refuse UNAVAILABLE SERVER_DRAINING - the server is stopping"))
		if !client.Unavailable(err) || errors.Is(err, client.ErrUnconfirmed) || len(s.Calls("Execute")) != 1 {
			t.Errorf("error %v after %d calls", err, len(s.Calls("Execute")))
		}
	})
	t.Run("no server", func(t *testing.T) {
		t.Parallel()
		s := clienttest.Start(t)
		c := dial(t, client.Config{Address: s.Address()})
		s.Stop()
		_, err := c.Execute(bounded(t), execute("exit 0"))
		if !client.Unavailable(err) || client.Reason(err) != "" || errors.Is(err, client.ErrUnconfirmed) {
			t.Errorf("error %v", err)
		}
	})
	for how, cut := range cuts() {
		t.Run("no answer: "+how, func(t *testing.T) {
			t.Parallel()
			s := clienttest.Start(t)
			c := dial(t, client.Config{Address: s.Address()})
			s.Play(cut, cut)
			stream, err := c.Execute(bounded(t), execute("out a; exit 3"))
			if how == "draining" { // the server's word that it started nothing
				if client.Reason(err) != "SERVER_DRAINING" || len(s.Calls("Execute")) != 1 {
					t.Errorf("error %v after %d calls", err, len(s.Calls("Execute")))
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := drain(stream); err != nil || stream.Result().GetExitCode() != 3 || !stream.Whole() {
				t.Errorf("result %v, error %v", stream.Result(), err)
			}
			calls := s.Calls("Execute")
			first := calls[0].(*executorv1.ExecuteRequest)
			if len(calls) != 3 || len(first.GetRequestId()) < 20 || !proto.Equal(first, calls[2]) {
				t.Errorf("calls %v", calls)
			}
			all, err := c.Executor().ListExecutions(bounded(t), &executorv1.ListExecutionsRequest{})
			if err != nil || len(all.GetExecutions()) != 1 {
				t.Errorf("%d executions were started, %v", len(all.GetExecutions()), err)
			}
		})
	}
	t.Run("the caller's request_id", func(t *testing.T) {
		t.Parallel()
		s := clienttest.Start(t)
		c := dial(t, client.Config{Address: s.Address()})
		request := execute("exit 0")
		request.RequestId = "mine"
		for range 2 {
			stream, err := c.Execute(bounded(t), request)
			if err != nil || stream.Name() != "executions/x1" {
				t.Fatalf("%v, %v", stream, err)
			}
			if _, err := drain(stream); err != nil {
				t.Error(err)
			}
		}
		request.Labels = map[string]string{"other": "parameters"}
		if _, err := c.Execute(bounded(t), request); client.Reason(err) != "REQUEST_ID_REUSED" || errors.Is(err, client.ErrUnconfirmed) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("refused after no answer", func(t *testing.T) {
		t.Parallel()
		s := clienttest.Start(t)
		c := dial(t, client.Config{Address: s.Address()})
		s.Hook(func(method string, nth int) error {
			if method == "Execute" && nth == 1 {
				return status.Error(codes.Unavailable, "reset")
			}
			return nil
		})
		_, err := c.Execute(bounded(t), execute("refuse NOT_FOUND SESSION_NOT_FOUND parent there is none"))
		if !client.NotFound(err) || errors.Is(err, client.ErrUnconfirmed) || len(s.Calls("Execute")) != 2 {
			t.Errorf("error %v after %d calls", err, len(s.Calls("Execute")))
		}
	})
	t.Run("the server does not come back", func(t *testing.T) {
		t.Parallel()
		s := clienttest.Start(t)
		c := dial(t, client.Config{Address: s.Address(), MaxOutage: 300 * time.Millisecond})
		s.Hook(func(method string, _ int) error {
			if method == "Execute" {
				return status.Error(codes.Unavailable, "reset")
			}
			return nil
		})
		_, err := c.Execute(bounded(t), execute("exit 0"))
		if !errors.Is(err, client.ErrUnconfirmed) || !errors.Is(err, client.ErrOutage) || len(s.Calls("Execute")) < 2 {
			t.Errorf("error %v after %d calls", err, len(s.Calls("Execute")))
		}
	})
	t.Run("no patience", func(t *testing.T) {
		t.Parallel()
		s := clienttest.Start(t)
		c := dial(t, client.Config{Address: s.Address(), MaxOutage: -1})
		s.Play(func(*clienttest.Play) error { return nil })
		if _, err := c.Execute(bounded(t), execute("exit 0")); !errors.Is(err, client.ErrUnconfirmed) || len(s.Calls("Execute")) != 1 {
			t.Errorf("error %v", err)
		}
	})
	t.Run("context ends first", func(t *testing.T) {
		t.Parallel()
		s := clienttest.Start(t)
		c := dial(t, client.Config{Address: s.Address()})
		enough := errors.New("enough")
		ctx, cancel := context.WithCancelCause(bounded(t))
		s.Play(func(p *clienttest.Play) error {
			cancel(enough)
			<-p.Done
			return nil
		})
		if _, err := c.Execute(ctx, execute("exit 0")); !errors.Is(err, client.ErrUnconfirmed) || !errors.Is(err, enough) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("nonsense first", func(t *testing.T) {
		t.Parallel()
		s := clienttest.Start(t)
		c := dial(t, client.Config{Address: s.Address()})
		s.Play(func(p *clienttest.Play) error { return p.Send(chunk(1, stdout, 0, "x")) })
		if _, err := c.Execute(bounded(t), execute("exit 0")); !errors.Is(err, client.ErrProtocol) {
			t.Errorf("error %v", err)
		}
		s.Play(func(p *clienttest.Play) error { return p.Send(heartbeat(0), chunk(2, stdout, 0, "x")) })
		if _, err := c.Execute(bounded(t), execute("exit 0")); !errors.Is(err, client.ErrHole) {
			t.Errorf("error %v", err)
		}
	})
}

func TestWatchNeedsAName(t *testing.T) {
	c := dial(t, client.Config{})
	if _, err := c.Watch(t.Context(), "", nil); err == nil {
		t.Error("no error")
	}
}

// TestStreamSurvivesAnything plays random faults at a longer log. Whatever happens,
// the events come once, in order and whole.
func TestStreamSurvivesAnything(t *testing.T) {
	t.Parallel()
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(seed, 1))
			log := []*executorv1.Event{started(1)}
			var offsets [2]int64
			for i := range 60 {
				which := random.IntN(2)
				data := make([]byte, random.IntN(200))
				for j := range data {
					data[j] = byte(random.Uint32())
				}
				log = append(log, chunk(uint64(i+2), executorv1.Stream(which+1), offsets[which], string(data)))
				offsets[which] += int64(len(data))
			}
			log = append(log, result(62, log...))

			s := clienttest.Start(t)
			s.Put(ended(), log...)
			c := dial(t, client.Config{Address: s.Address()})
			for range 12 {
				repeat, n, kind := random.IntN(3), random.IntN(12), random.IntN(4)
				s.Play(func(p *clienttest.Play) error {
					rest := behind(p.Log, p.After)
					// Some servers repeat what was told already.
					if told := len(p.Log) - len(rest); repeat > 0 && told > 0 {
						rest = p.Log[told-min(told, repeat):]
					}
					if err := p.Send(rest[:min(n, len(rest))]...); err != nil {
						return err
					}
					switch kind {
					case 0:
						return nil
					case 1:
						return p.Restart()
					case 2:
						return status.Error(codes.Internal, "unexpected EOF")
					default:
						return status.Error(codes.Unavailable, "reset")
					}
				})
			}
			stream, err := c.Watch(bounded(t), name, nil)
			if err != nil {
				t.Fatal(err)
			}
			got, err := drain(stream)
			if err != nil {
				t.Fatal(err)
			}
			wantEvents(t, got, log)
			if !stream.Whole() {
				t.Error("not whole")
			}
		})
	}
}
