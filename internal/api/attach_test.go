package api

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/execution"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

const attachedName = "executions/e1"

func attachStart(change ...func(*executorv1.AttachStart)) *executorv1.AttachExecutionRequest {
	s := &executorv1.AttachStart{Name: attachedName}
	for _, f := range change {
		f(s)
	}
	return &executorv1.AttachExecutionRequest{Message: &executorv1.AttachExecutionRequest_Start{Start: s}}
}

func attachInput(offset int64, data string) *executorv1.AttachExecutionRequest {
	in := &executorv1.AttachInput{Data: []byte(data)}
	if offset >= 0 {
		in.Offset = &offset
	}
	return &executorv1.AttachExecutionRequest{Message: &executorv1.AttachExecutionRequest_Input{Input: in}}
}

func attachClose() *executorv1.AttachExecutionRequest {
	return &executorv1.AttachExecutionRequest{Message: &executorv1.AttachExecutionRequest_CloseInput{CloseInput: &executorv1.AttachCloseInput{}}}
}

func attachResize(rows, columns int32) *executorv1.AttachExecutionRequest {
	return &executorv1.AttachExecutionRequest{Message: &executorv1.AttachExecutionRequest_Resize{Resize: &executorv1.TerminalSize{Rows: rows, Columns: columns}}}
}

// attachedClient is a client of AttachExecution.
type attachedClient struct {
	grpc.BidiStreamingClient[executorv1.AttachExecutionRequest, executorv1.AttachExecutionResponse]
	t *testing.T
	// events are those that came so far, state is the last that came.
	events []*executorv1.Event
	state  *executorv1.InputState
}

func (b *bench) attach(t *testing.T, messages ...*executorv1.AttachExecutionRequest) *attachedClient {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	stream, err := b.executor.AttachExecution(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c := &attachedClient{BidiStreamingClient: stream, t: t}
	c.say(messages...)
	return c
}

func (c *attachedClient) say(messages ...*executorv1.AttachExecutionRequest) {
	c.t.Helper()
	for _, m := range messages {
		if err := c.Send(m); err != nil && !errors.Is(err, io.EOF) {
			c.t.Fatal(err)
		}
	}
}

func (c *attachedClient) next() error {
	m, err := c.Recv()
	if err != nil {
		return err
	}
	if e := m.GetEvent(); e != nil {
		c.events = append(c.events, e)
	}
	if s := m.GetInput(); s != nil {
		c.state = s
	}
	return nil
}

// until reads until something holds.
func (c *attachedClient) until(what string, holds func() bool) {
	c.t.Helper()
	for !holds() {
		if err := c.next(); err != nil {
			c.t.Fatalf("%v, before %s", err, what)
		}
	}
}

func (c *attachedClient) untilState(want *executorv1.InputState) {
	c.t.Helper()
	c.until("the state "+want.String(), func() bool { return proto.Equal(c.state, want) })
}

// end reads to the end.
func (c *attachedClient) end() error {
	for {
		if err := c.next(); err != nil {
			return err
		}
	}
}

func TestAttach(t *testing.T) {
	b := newBench(t)
	log := b.executions.add(execution.Execution{ID: "e1", State: execution.Running})
	log.start()
	c := b.attach(t, attachStart())
	c.untilState(&executorv1.InputState{})
	c.say(attachInput(-1, "hello "), attachInput(6, "world"), attachInput(0, "hello world"), attachResize(50, 132), attachInput(-1, "!"))
	c.untilState(&executorv1.InputState{CommittedOffset: 12})
	log.output("stdout", "seen")
	c.until("output", func() bool { return len(c.events) == 2 })
	c.say(attachClose())
	c.untilState(&executorv1.InputState{CommittedOffset: 12, Closed: true})
	c.say(attachInput(-1, "too late"), attachResize(1, 2))
	log.output("stderr", "more")
	log.exit(3)
	if err := c.end(); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if got, closed := log.written(); got != "hello world!" || !closed {
		t.Errorf("written %q, closed %v", got, closed)
	}
	if n := len(c.events); n != 4 || c.events[0].GetStarted() == nil || c.events[3].GetResult().GetExitCode() != 3 {
		t.Errorf("events %v", c.events)
	}
	if b.executions.attached(log.ref) || b.executions.openWatchers() != 0 {
		t.Error("something is left of it")
	}
	b.executions.mu.Lock()
	defer b.executions.mu.Unlock()
	if !slices.Contains(b.executions.sizes, execution.TerminalSize{Rows: 50, Columns: 132}) {
		t.Errorf("sizes %v", b.executions.sizes)
	}
}

func TestAttachFromACursor(t *testing.T) {
	b := newBench(t)
	log := b.executions.add(execution.Execution{ID: "e1", State: execution.Running})
	log.start()
	log.output("stdout", "old")
	log.output("stdout", "new")
	c := b.attach(t, attachStart(func(s *executorv1.AttachStart) {
		s.After = &executorv1.Cursor{Epoch: "e1", Sequence: 2}
		s.HeartbeatInterval = durationpb.New(time.Second)
	}))
	c.until("a heartbeat", func() bool { return len(c.events) > 0 && c.events[len(c.events)-1].GetHeartbeat() != nil })
	if string(c.events[0].GetOutput().GetData()) != "new" {
		t.Errorf("events %v", c.events)
	}
	// The end of the client's messages closes nothing.
	if err := c.CloseSend(); err != nil {
		t.Fatal(err)
	}
	log.exit(0)
	if err := c.end(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if _, closed := log.written(); closed {
		t.Error("the input was closed")
	}
	// One that has ended is told.
	c = b.attach(t, attachStart())
	if err := c.end(); !errors.Is(err, io.EOF) || len(c.events) != 4 {
		t.Errorf("%v, %v", err, c.events)
	}
}

func TestAttachTakesOver(t *testing.T) {
	b := newBench(t)
	log := b.executions.add(execution.Execution{ID: "e1", State: execution.Running})
	log.start()
	named := func(writer string, takeOver bool) *executorv1.AttachExecutionRequest {
		return attachStart(func(s *executorv1.AttachStart) { s.Writer, s.TakeOver = writer, takeOver })
	}
	first := b.attach(t, named("a", false))
	first.untilState(&executorv1.InputState{})
	d := wantError(t, b.attach(t, named("b", false)).end(), codes.FailedPrecondition, "WRITER_ATTACHED")
	if d.precondition.GetViolations()[0].GetSubject() != attachedName {
		t.Errorf("%v", d.precondition)
	}
	second := b.attach(t, named("b", true))
	second.untilState(&executorv1.InputState{})
	wantError(t, first.end(), codes.FailedPrecondition, "WRITER_TAKEN_OVER")
	again := b.attach(t, named("b", false), attachInput(0, "x"))
	again.untilState(&executorv1.InputState{CommittedOffset: 1})
	wantError(t, second.end(), codes.FailedPrecondition, "WRITER_TAKEN_OVER")
	log.exit(0)
	if err := again.end(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// Keys that are pressed one by one at a program that does not read: they are joined, so
// that neither their number nor what waits for room stands in the way of a size.
func TestAttachJoinsKeys(t *testing.T) {
	b := newBench(t)
	log := b.executions.add(execution.Execution{ID: "e1", State: execution.Running})
	log.makeRoom(10)
	log.start()
	c := b.attach(t, attachStart())
	const keys = 5000
	for i := range int64(keys) {
		c.say(attachInput(i, string(rune('a'+i%26))))
	}
	c.say(attachResize(7, 8))
	for waiting := true; waiting; time.Sleep(time.Millisecond) {
		b.executions.mu.Lock()
		waiting = len(b.executions.sizes) == 0
		b.executions.mu.Unlock()
	}
	log.makeRoom(keys + 1)
	c.untilState(&executorv1.InputState{CommittedOffset: keys})
	got, _ := log.written()
	for i := range got {
		if got[i] != byte('a'+i%26) {
			t.Fatalf("byte %d is %q", i, got[i])
		}
	}
	log.exit(0)
	if err := c.end(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

func TestJoin(t *testing.T) {
	at := func(n int64) *int64 { return &n }
	for name, c := range map[string]struct {
		before, piece execution.Input
		want          string // "" if they are not joined
	}{
		"follows":          {execution.Input{Offset: at(5), Data: []byte("ab")}, execution.Input{Offset: at(7), Data: []byte("c")}, "abc"},
		"without offsets":  {execution.Input{Data: []byte("ab")}, execution.Input{Data: []byte("c")}, "abc"},
		"the end":          {execution.Input{Offset: at(0), Data: []byte("ab")}, execution.Input{Offset: at(2), Close: true}, "ab"},
		"a hole":           {execution.Input{Offset: at(5), Data: []byte("ab")}, execution.Input{Offset: at(8), Data: []byte("c")}, ""},
		"a repeat":         {execution.Input{Offset: at(5), Data: []byte("ab")}, execution.Input{Offset: at(6), Data: []byte("b")}, ""},
		"one with, one no": {execution.Input{Offset: at(5), Data: []byte("ab")}, execution.Input{Data: []byte("c")}, ""},
		"behind the end":   {execution.Input{Data: []byte("ab"), Close: true}, execution.Input{Data: []byte("c")}, ""},
		"too much":         {execution.Input{Data: make([]byte, execution.MaxInputBytes)}, execution.Input{Data: []byte("c")}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			before := c.before
			joined := join(&before, c.piece)
			if joined != (c.want != "") || joined && (string(before.Data) != c.want || before.Close != c.piece.Close) {
				t.Errorf("%v: %q", joined, before.Data)
			}
		})
	}
}

// Input that has no room keeps neither sizes nor events from coming through.
func TestAttachWithoutRoom(t *testing.T) {
	b := newBench(t)
	log := b.executions.add(execution.Execution{ID: "e1", State: execution.Running})
	log.makeRoom(10)
	log.start()
	c := b.attach(t, attachStart(), attachInput(0, strings.Repeat("x", 30)), attachInput(30, "rest"), attachResize(7, 8))
	c.untilState(&executorv1.InputState{CommittedOffset: 10})
	for {
		b.executions.mu.Lock()
		n := len(b.executions.sizes)
		b.executions.mu.Unlock()
		if n > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	log.makeRoom(100)
	c.untilState(&executorv1.InputState{CommittedOffset: 34})
	log.makeRoom(40)
	c.say(attachInput(34, strings.Repeat("y", 30)))
	log.output("stdout", "out")
	c.until("output", func() bool { return c.events[len(c.events)-1].GetOutput() != nil })
	log.exit(0)
	if err := c.end(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

func TestAttachRefused(t *testing.T) {
	b := newBench(t)
	log := b.executions.add(execution.Execution{ID: "e1", State: execution.Running})
	log.start()
	big := strings.Repeat("x", 31745)
	for name, c := range map[string]struct {
		messages []*executorv1.AttachExecutionRequest
		code     codes.Code
		reason   string
	}{
		"nothing":               {nil, codes.InvalidArgument, "INVALID_FIELD"},
		"an empty message":      {[]*executorv1.AttachExecutionRequest{{}}, codes.InvalidArgument, "INVALID_FIELD"},
		"input first":           {[]*executorv1.AttachExecutionRequest{attachInput(0, "x")}, codes.InvalidArgument, "INVALID_FIELD"},
		"start twice":           {[]*executorv1.AttachExecutionRequest{attachStart(), attachStart()}, codes.InvalidArgument, "INVALID_FIELD"},
		"no name":               {[]*executorv1.AttachExecutionRequest{attachStart(func(s *executorv1.AttachStart) { s.Name = "" })}, codes.InvalidArgument, "INVALID_FIELD"},
		"a bad writer":          {[]*executorv1.AttachExecutionRequest{attachStart(func(s *executorv1.AttachStart) { s.Writer = "a b" })}, codes.InvalidArgument, "INVALID_FIELD"},
		"a long writer":         {[]*executorv1.AttachExecutionRequest{attachStart(func(s *executorv1.AttachStart) { s.Writer = strings.Repeat("a", 65) })}, codes.InvalidArgument, "INVALID_FIELD"},
		"a short heartbeat":     {[]*executorv1.AttachExecutionRequest{attachStart(func(s *executorv1.AttachStart) { s.HeartbeatInterval = durationpb.New(1) })}, codes.InvalidArgument, "INVALID_FIELD"},
		"unknown":               {[]*executorv1.AttachExecutionRequest{attachStart(func(s *executorv1.AttachStart) { s.Name = "executions/none" })}, codes.NotFound, "EXECUTION_NOT_FOUND"},
		"the future":            {[]*executorv1.AttachExecutionRequest{attachStart(func(s *executorv1.AttachStart) { s.After = &executorv1.Cursor{Epoch: "e1", Sequence: 99} })}, codes.OutOfRange, "CURSOR_IN_FUTURE"},
		"no input":              {[]*executorv1.AttachExecutionRequest{attachStart(), attachInput(0, "")}, codes.InvalidArgument, "INVALID_FIELD"},
		"much input":            {[]*executorv1.AttachExecutionRequest{attachStart(), attachInput(0, big)}, codes.InvalidArgument, "INVALID_FIELD"},
		"a negative offset":     {[]*executorv1.AttachExecutionRequest{attachStart(), {Message: &executorv1.AttachExecutionRequest_Input{Input: &executorv1.AttachInput{Offset: proto.Int64(-1), Data: []byte("x")}}}}, codes.InvalidArgument, "INVALID_FIELD"},
		"an offset ahead":       {[]*executorv1.AttachExecutionRequest{attachStart(), attachInput(7, "x")}, codes.OutOfRange, "INPUT_OFFSET"},
		"a terminal of no rows": {[]*executorv1.AttachExecutionRequest{attachStart(), attachResize(0, 80)}, codes.InvalidArgument, "INVALID_FIELD"},
		"a huge terminal":       {[]*executorv1.AttachExecutionRequest{attachStart(), attachResize(24, 65536)}, codes.InvalidArgument, "INVALID_FIELD"},
	} {
		t.Run(name, func(t *testing.T) {
			client := b.attach(t, c.messages...)
			if c.messages == nil {
				_ = client.CloseSend()
			}
			wantError(t, client.end(), c.code, c.reason)
			for b.executions.attached(log.ref) {
				time.Sleep(time.Millisecond)
			}
		})
	}
	if b.executions.attached(log.ref) || b.executions.openWatchers() != 0 {
		t.Error("something is left of one that was refused")
	}
}

// A client that goes leaves the input to others, and a stop tells it so.
func TestAttachEnds(t *testing.T) {
	b := newBench(t)
	log := b.executions.add(execution.Execution{ID: "e1", State: execution.Running})
	log.start()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := b.executor.AttachExecution(ctx)
	if err != nil {
		t.Fatal(err)
	}
	gone := &attachedClient{BidiStreamingClient: stream, t: t}
	gone.say(attachStart())
	gone.untilState(&executorv1.InputState{})
	cancel()
	if err := gone.end(); status.Code(err) != codes.Canceled {
		t.Error(err)
	}
	for b.executions.attached(log.ref) {
		time.Sleep(time.Millisecond)
	}
	c := b.attach(t, attachStart())
	c.untilState(&executorv1.InputState{})
	b.shutdown(nil)
	wantError(t, c.end(), codes.Unavailable, "SERVER_DRAINING")
}

func TestAttachSurvivesAPanic(t *testing.T) {
	b := newBench(t)
	b.executions.add(execution.Execution{ID: "e1", State: execution.Running}).start()
	b.executions.hook = func(_ context.Context, method string) error {
		if method == "Resize" {
			panic("a defect")
		}
		return nil
	}
	c := b.attach(t, attachStart(), attachResize(1, 1))
	wantError(t, c.end(), codes.Internal, "PANIC")
}

func TestWriteInput(t *testing.T) {
	b := newBench(t)
	log := b.executions.add(execution.Execution{ID: "e1", State: execution.Running})
	log.start()
	write := func(r *executorv1.WriteInputRequest) (*executorv1.WriteInputResponse, error) {
		r.Name = attachedName
		return b.executor.WriteInput(t.Context(), r)
	}
	for _, c := range []struct {
		request *executorv1.WriteInputRequest
		want    *executorv1.WriteInputResponse
	}{
		{&executorv1.WriteInputRequest{Offset: proto.Int64(0), Data: []byte("abc\x00\xff")}, &executorv1.WriteInputResponse{CommittedOffset: 5}},
		{&executorv1.WriteInputRequest{Offset: proto.Int64(0), Data: []byte("abc")}, &executorv1.WriteInputResponse{CommittedOffset: 5}},
		{&executorv1.WriteInputRequest{}, &executorv1.WriteInputResponse{CommittedOffset: 5}},
		{&executorv1.WriteInputRequest{Data: []byte("d"), Close: true}, &executorv1.WriteInputResponse{CommittedOffset: 6, Closed: true}},
	} {
		if got, err := write(c.request); err != nil || !proto.Equal(got, c.want) {
			t.Errorf("%v: %v, %v", c.request, got, err)
		}
	}
	_, err := write(&executorv1.WriteInputRequest{Data: []byte("x")})
	wantError(t, err, codes.FailedPrecondition, "STDIN_CLOSED")
	_, err = write(&executorv1.WriteInputRequest{Offset: proto.Int64(7)})
	if d := wantError(t, err, codes.OutOfRange, "INPUT_OFFSET"); d.info.GetMetadata()["committed_offset"] != "6" {
		t.Errorf("%v", d.info)
	}
	for _, bad := range []*executorv1.WriteInputRequest{{Offset: proto.Int64(-1)}, {Data: make([]byte, 31745)}} {
		_, err := write(bad)
		wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
	}
	log.exit(0)
	_, err = write(&executorv1.WriteInputRequest{})
	wantError(t, err, codes.FailedPrecondition, "EXECUTION_ENDED")
}

func TestSignalExecution(t *testing.T) {
	b := newBench(t)
	b.executions.add(execution.Execution{ID: "e1", State: execution.Running}).start()
	for n, scope := range []executorv1.SignalScope{0, 1, 2, 3} {
		if _, err := b.executor.SignalExecution(t.Context(), &executorv1.SignalExecutionRequest{Name: attachedName, Signal: int32(n + 1), Scope: scope}); err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"1 0", "2 0", "3 1", "4 2"}; !slices.Equal(b.executions.signals, want) {
		t.Errorf("signals %q", b.executions.signals)
	}
	for _, bad := range []*executorv1.SignalExecutionRequest{{Signal: 0}, {Signal: 65}, {Signal: -1}, {Signal: 1, Scope: 4}} {
		bad.Name = attachedName
		_, err := b.executor.SignalExecution(t.Context(), bad)
		wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
	}
}

func TestInteractiveCommand(t *testing.T) {
	b := newBench(t)
	resp, err := b.executor.StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: &executorv1.Command{
		Args: []string{"sh"}, Stdin: true, Terminal: &executorv1.TerminalSize{Rows: 24, Columns: 80},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if c := b.executions.lastRequest(t).Command; !c.Stdin || *c.Terminal != (execution.TerminalSize{Rows: 24, Columns: 80}) {
		t.Errorf("%+v", c)
	}
	if c := resp.GetExecution().GetCommand(); !c.GetStdin() || c.GetTerminal().GetRows() != 24 || c.GetTerminal().GetColumns() != 80 {
		t.Errorf("%v", c)
	}
	for _, bad := range []*executorv1.TerminalSize{{}, {Rows: 1}, {Rows: 65536, Columns: 1}, {Rows: 1, Columns: -1}} {
		_, err := b.executor.StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: &executorv1.Command{Args: []string{"sh"}, Terminal: bad}})
		if d := wantError(t, err, codes.InvalidArgument, "INVALID_FIELD"); !strings.HasPrefix(d.fields()[0], "command.terminal.") {
			t.Errorf("%v", d.fields())
		}
	}
}
