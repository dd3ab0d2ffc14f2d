package client_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/harvest-run/executord/client"
	"github.com/harvest-run/executord/client/clienttest"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

const (
	stdout = executorv1.Stream_STREAM_STDOUT
	stderr = executorv1.Stream_STREAM_STDERR
	name   = "executions/x1"
)

func cursor(sequence uint64) *executorv1.Cursor {
	return &executorv1.Cursor{Epoch: clienttest.Epoch, Sequence: sequence}
}

func started(sequence uint64) *executorv1.Event {
	return &executorv1.Event{Cursor: cursor(sequence), Kind: &executorv1.Event_Started{Started: &executorv1.Started{Execution: name}}}
}

func chunk(sequence uint64, stream executorv1.Stream, offset int64, data string) *executorv1.Event {
	return &executorv1.Event{Cursor: cursor(sequence), Kind: &executorv1.Event_Output{
		Output: &executorv1.OutputChunk{Stream: stream, Offset: offset, Data: []byte(data)},
	}}
}

func gap(sequence uint64, reason executorv1.Gap_Reason, missing uint64, resume ...int64) *executorv1.Event {
	g := &executorv1.Gap{Reason: reason, MissingEvents: missing}
	for i, offset := range resume {
		g.Resume = append(g.Resume, &executorv1.StreamPosition{Stream: executorv1.Stream(i + 1), Offset: offset})
	}
	return &executorv1.Event{Cursor: cursor(sequence), Kind: &executorv1.Event_Gap{Gap: g}}
}

func heartbeat(sequence uint64) *executorv1.Event {
	return &executorv1.Event{Cursor: cursor(sequence), Kind: &executorv1.Event_Heartbeat{Heartbeat: &executorv1.Heartbeat{}}}
}

// result ends a log: it counts what was written in it.
func result(sequence uint64, log ...*executorv1.Event) *executorv1.Event {
	return &executorv1.Event{Cursor: cursor(sequence), Kind: &executorv1.Event_Result{Result: &executorv1.Result{
		Reason: executorv1.Reason_REASON_EXITED, Outcome: executorv1.Outcome_OUTCOME_SUCCESS, ExitCode: proto.Int32(0),
		Totals: clienttest.Totals(log), TreeEmpty: true,
	}}}
}

// sample is a whole log of seven events.
func sample() []*executorv1.Event {
	log := []*executorv1.Event{
		started(1),
		chunk(2, stdout, 0, "hello "),
		chunk(3, stderr, 0, "warning\n"),
		chunk(4, stdout, 6, "wor"),
		chunk(5, stdout, 9, "ld\n"),
		chunk(6, stderr, 8, "\x00\xff"),
	}
	return append(log, result(7, log...))
}

func ended() *executorv1.Execution {
	return &executorv1.Execution{Name: name, State: executorv1.Execution_STATE_RUNNING}
}

// execute is a request that the stand-in can run.
func execute(program string) *executorv1.ExecuteRequest {
	return &executorv1.ExecuteRequest{Command: &executorv1.Command{Args: strings.Split(program, ";")}}
}

func dial(t *testing.T, cfg client.Config) *client.Client {
	t.Helper()
	c, err := client.Dial(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// bounded ends a test that hangs; nothing in a good run comes near it.
func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// drain reads a stream to its end.
func drain(s *client.Stream) ([]*executorv1.Event, error) {
	var got []*executorv1.Event
	for {
		e, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return got, err
		}
		got = append(got, e)
	}
}

func wantEvents(t *testing.T, got, want []*executorv1.Event) {
	t.Helper()
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}
