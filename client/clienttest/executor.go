package clienttest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// execution is one execution with its log.
type execution struct {
	// stop asks the program to end, stopped is closed then, and cause says why.
	stop    context.CancelCauseFunc
	stopped <-chan struct{}
	cause   func() error
	env     map[string]string
	input   *input
	// name is guarded by the Server's mu; "" once it is deleted.
	name string

	mu      sync.Mutex
	record  *executorv1.Execution
	log     []*executorv1.Event
	offsets [2]int64
	cuts    map[uint64]bool // the streams that told these events are cut behind them
	changed chan struct{}   // closed at the next change
}

// cancelled and sessionEnded are causes that end a program.
type cancelled struct{ by string }

func (c cancelled) Error() string { return "cancelled by " + c.by }

type sessionEnded struct{}

func (sessionEnded) Error() string { return "session ended" }

// Put adds an execution with a log of its own, ended if the log is.
func (s *Server) Put(record *executorv1.Execution, log ...*executorv1.Event) {
	x := newExecution(record)
	for _, e := range log {
		x.log = append(x.log, e)
		if r := e.GetResult(); r != nil {
			x.record.State, x.record.Result = executorv1.Execution_STATE_ENDED, r
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.executions = append(s.executions, x)
}

func newExecution(record *executorv1.Execution) *execution {
	ctx, stop := context.WithCancelCause(context.Background())
	return &execution{
		stop: stop, stopped: ctx.Done(), cause: func() error { return context.Cause(ctx) },
		name: record.GetName(), cuts: make(map[uint64]bool), record: proto.CloneOf(record), changed: make(chan struct{}),
		input: &input{changed: make(chan struct{})},
	}
}

// start admits a command and runs it.
func (s *Server) start(parent string, command *executorv1.Command, limits *executorv1.Limits, policy *executorv1.OutputPolicy, labels map[string]string) (*execution, error) {
	statements, err := parse(command)
	if err != nil {
		return nil, err
	}
	stored := proto.CloneOf(command)
	for name := range stored.GetEnv() {
		stored.Env[name] = ""
	}
	if stored.GetTimeout() == nil {
		stored.Timeout = &durationpb.Duration{Seconds: 1800}
	}
	record := &executorv1.Execution{
		Command: stored, State: executorv1.Execution_STATE_RUNNING, Engine: "fake", Limits: limits,
		OutputPolicy: policy, Labels: labels, CreateTime: at(0), StartTime: at(20),
	}
	if parent != "" {
		owner, err := s.session(parent)
		if err != nil {
			return nil, err
		}
		if owner.record().GetState() != executorv1.Session_STATE_RUNNING {
			return nil, Error(codes.FailedPrecondition, "SESSION_NOT_RUNNING", nil, parent+" is not running")
		}
		record.Sandbox = owner.record().GetSandbox()
		parent += "/"
	}

	s.mu.Lock()
	id := len(s.executions) + 1
	record.Name = fmt.Sprintf("%sexecutions/x%d", parent, id)
	if record.GetSandbox() == "" {
		record.Sandbox = fmt.Sprintf("box-x%d", id)
	}
	x := newExecution(record)
	x.env = command.GetEnv()
	s.executions = append(s.executions, x)
	s.mu.Unlock()

	x.append(&executorv1.Event{Kind: &executorv1.Event_Started{Started: &executorv1.Started{Execution: record.GetName()}}})
	s.programs.Go(func() { run(x, statements) })
	return x, nil
}

func (s *Server) execution(name string) (*execution, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.executions {
		if name != "" && x.name == name {
			return x, nil
		}
	}
	return nil, Error(codes.NotFound, "EXECUTION_NOT_FOUND", nil, "there is no "+name)
}

// append adds an entry to the log.
func (x *execution) append(e *executorv1.Event) {
	x.mu.Lock()
	defer x.mu.Unlock()
	sequence := uint64(1)
	if n := len(x.log); n > 0 {
		sequence = x.log[n-1].GetCursor().GetSequence() + 1
	}
	if g := e.GetGap(); g != nil {
		sequence += g.GetMissingEvents() - 1
	}
	e.Cursor = &executorv1.Cursor{Epoch: Epoch, Sequence: sequence}
	e.EventTime = at(20 + int(sequence))
	if r := e.GetResult(); r != nil {
		complete(r, x.log)
		for i, t := range r.GetTotals() {
			t.Size = max(t.GetSize(), x.offsets[i]) // with what a gap dropped at the end
		}
		if r.GetTimes().GetStarted() == nil {
			x.record.StartTime = nil
		}
		x.record.State, x.record.Result, x.record.EndTime = executorv1.Execution_STATE_ENDED, r, r.GetTimes().GetEnded()
	}
	x.log = append(x.log, e)
	x.record.Cursor = e.GetCursor()
	close(x.changed)
	x.changed = make(chan struct{})
}

func (x *execution) write(stream executorv1.Stream, data []byte) {
	offset := &x.offsets[int(stream)-1]
	x.append(&executorv1.Event{Kind: &executorv1.Event_Output{Output: &executorv1.OutputChunk{Stream: stream, Offset: *offset, Data: data}}})
	*offset += int64(len(data))
}

func (x *execution) drop(events uint64) {
	x.offsets[0] += int64(events) * 10
	x.append(&executorv1.Event{Kind: &executorv1.Event_Gap{Gap: &executorv1.Gap{
		Reason: executorv1.Gap_REASON_RETENTION, MissingEvents: events,
		Resume: []*executorv1.StreamPosition{
			{Stream: executorv1.Stream_STREAM_STDOUT, Offset: x.offsets[0]}, {Stream: executorv1.Stream_STREAM_STDERR, Offset: x.offsets[1]},
		},
	}}})
}

// cut ends the streams that told everything so far, as soon as they have.
func (x *execution) cut() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.cuts[x.log[len(x.log)-1].GetCursor().GetSequence()] = true
	close(x.changed)
	x.changed = make(chan struct{})
}

// cutBehind says whether streams are cut behind an event.
func (x *execution) cutBehind(sequence uint64) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.cuts[sequence]
}

func (x *execution) finish(r *executorv1.Result) {
	x.append(&executorv1.Event{Kind: &executorv1.Event_Result{Result: r}})
}

// ending is the result of a program that was stopped.
func (x *execution) ending() *executorv1.Result {
	cause := x.cause()
	if c, ok := errors.AsType[cancelled](cause); ok {
		return &executorv1.Result{
			Reason: executorv1.Reason_REASON_CANCELLED, Outcome: executorv1.Outcome_OUTCOME_CANCELLED, Signal: 15,
			CancelledBy: c.by, ReapedProcesses: 1, TreeEmpty: true,
		}
	}
	reason := executorv1.Reason_REASON_SERVER_STOPPED
	if errors.Is(cause, sessionEnded{}) {
		reason = executorv1.Reason_REASON_SESSION_ENDED
	}
	return &executorv1.Result{Reason: reason, Outcome: executorv1.Outcome_OUTCOME_CANCELLED, TreeEmpty: true}
}

// snapshot is the record and the log as they are, and what closes when they change.
func (x *execution) snapshot() (*executorv1.Execution, []*executorv1.Event, <-chan struct{}) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return proto.CloneOf(x.record), x.log[:len(x.log):len(x.log)], x.changed
}

// wait returns the record when it has ended or ctx has.
func (x *execution) wait(ctx context.Context) *executorv1.Execution {
	for {
		record, _, changed := x.snapshot()
		if record.GetState() == executorv1.Execution_STATE_ENDED {
			return record
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return record
		}
	}
}

// follow tells the log, honestly or as the next script has it.
func (s *Server) follow(ctx context.Context, x *execution, after *executorv1.Cursor, send func(*executorv1.Event) error) error {
	if script := s.script(); script != nil {
		_, log, _ := x.snapshot()
		return script(&Play{
			After: after, Log: log, Done: ctx.Done(),
			Send: func(events ...*executorv1.Event) error {
				for _, e := range events {
					if err := send(e); err != nil {
						return err
					}
				}
				return nil
			},
			Restart: func() error {
				s.programs.Go(func() { _ = s.Restart() })
				<-ctx.Done()
				return errClosed
			},
		})
	}
	told := after.GetSequence()
	for {
		_, log, changed := x.snapshot()
		if n := len(log); n > 0 && told > log[n-1].GetCursor().GetSequence() {
			return Error(codes.OutOfRange, "CURSOR_IN_FUTURE", nil, "the log is not that far")
		}
		for _, e := range log {
			if e.GetCursor().GetSequence() <= told {
				continue
			}
			if told > after.GetSequence() && x.cutBehind(told) {
				return status.Error(codes.Unavailable, "connection reset by peer")
			}
			if err := send(e); err != nil {
				return err
			}
			told = e.GetCursor().GetSequence()
			if e.GetResult() != nil {
				return nil
			}
		}
		if told > after.GetSequence() && x.cutBehind(told) {
			return status.Error(codes.Unavailable, "connection reset by peer")
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (s *Server) script() Script {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.scripts) == 0 {
		return nil
	}
	next := s.scripts[0]
	s.scripts = s.scripts[1:]
	return next
}

// Execute implements ExecutorService.
func (s *Server) Execute(r *executorv1.ExecuteRequest, stream executorv1.ExecutorService_ExecuteServer) error {
	x, err := once(s, r, func() (*execution, error) {
		return s.start(r.GetParent(), r.GetCommand(), r.GetLimits(), r.GetOutputPolicy(), r.GetLabels())
	})
	if err != nil {
		return err
	}
	return s.follow(stream.Context(), x, nil, func(e *executorv1.Event) error {
		return stream.Send(&executorv1.ExecuteResponse{Event: e})
	})
}

// WatchExecution implements ExecutorService.
func (s *Server) WatchExecution(r *executorv1.WatchExecutionRequest, stream executorv1.ExecutorService_WatchExecutionServer) error {
	x, err := s.execution(r.GetName())
	if err != nil {
		return err
	}
	return s.follow(stream.Context(), x, r.GetAfter(), func(e *executorv1.Event) error {
		return stream.Send(&executorv1.WatchExecutionResponse{Event: e})
	})
}

// StartExecution implements ExecutorService.
func (s *Server) StartExecution(_ context.Context, r *executorv1.StartExecutionRequest) (*executorv1.StartExecutionResponse, error) {
	x, err := once(s, r, func() (*execution, error) {
		return s.start(r.GetParent(), r.GetCommand(), r.GetLimits(), r.GetOutputPolicy(), r.GetLabels())
	})
	if err != nil {
		return nil, err
	}
	record, _, _ := x.snapshot()
	return &executorv1.StartExecutionResponse{Execution: record}, nil
}

// ReadOutput implements ExecutorService.
func (s *Server) ReadOutput(r *executorv1.ReadOutputRequest, stream executorv1.ExecutorService_ReadOutputServer) error {
	x, err := s.execution(r.GetName())
	if err != nil {
		return err
	}
	_, log, _ := x.snapshot()
	offset, left := r.GetOffset(), r.GetLimit()
	for _, e := range log {
		c := e.GetOutput()
		if c.GetStream() != r.GetStream() || c.GetOffset()+int64(len(c.GetData())) <= offset {
			continue
		}
		if c.GetOffset() > offset {
			return Error(codes.OutOfRange, "OUTPUT_DROPPED", map[string]string{"first_offset": fmt.Sprint(c.GetOffset())},
				fmt.Sprintf("byte %d is no longer kept", offset))
		}
		data := c.GetData()[offset-c.GetOffset():]
		if r.GetLimit() > 0 {
			data = data[:min(left, int64(len(data)))]
			left -= int64(len(data))
		}
		if err := stream.Send(&executorv1.ReadOutputResponse{Offset: offset, Data: data}); err != nil {
			return err
		}
		if offset += int64(len(data)); r.GetLimit() > 0 && left == 0 {
			return nil
		}
	}
	return nil
}

// WaitExecution implements ExecutorService.
func (s *Server) WaitExecution(ctx context.Context, r *executorv1.WaitExecutionRequest) (*executorv1.WaitExecutionResponse, error) {
	x, err := s.execution(r.GetName())
	if err != nil {
		return nil, err
	}
	if r.GetTimeout() != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, r.GetTimeout().AsDuration())
		defer cancel()
	}
	return &executorv1.WaitExecutionResponse{Execution: x.wait(ctx)}, nil
}

// GetExecution implements ExecutorService.
func (s *Server) GetExecution(_ context.Context, r *executorv1.GetExecutionRequest) (*executorv1.GetExecutionResponse, error) {
	x, err := s.execution(r.GetName())
	if err != nil {
		return nil, err
	}
	record, _, _ := x.snapshot()
	return &executorv1.GetExecutionResponse{Execution: record}, nil
}

// ListExecutions implements ExecutorService, in pages of at most 2.
func (s *Server) ListExecutions(_ context.Context, r *executorv1.ListExecutionsRequest) (*executorv1.ListExecutionsResponse, error) {
	s.mu.Lock()
	var all []*execution
	for _, x := range s.executions {
		if x.name != "" {
			all = append(all, x)
		}
	}
	s.mu.Unlock()
	var records []*executorv1.Execution
	for i := len(all) - 1; i >= 0; i-- {
		record, _, _ := all[i].snapshot()
		in, _, _ := strings.Cut(record.GetName(), "/executions/")
		if r.GetParent() == "" || in == r.GetParent() || r.GetParent() == "sessions/-" && strings.HasPrefix(in, "sessions/") {
			records = append(records, record)
		}
	}
	page, next := cut(records, r.GetPageToken(), r.GetPageSize())
	return &executorv1.ListExecutionsResponse{Executions: page, NextPageToken: next}, nil
}

// cut takes a page of at most 2, so that every client has to turn pages.
func cut[T any](all []T, token string, size int32) (page []T, next string) {
	if size <= 0 || size > 2 {
		size = 2
	}
	var from int
	_, _ = fmt.Sscanf(token, "p%d", &from)
	all = all[min(from, len(all)):]
	if len(all) <= int(size) {
		return all, ""
	}
	return all[:size], fmt.Sprintf("p%d", from+int(size))
}

// CancelExecution implements ExecutorService.
func (s *Server) CancelExecution(ctx context.Context, r *executorv1.CancelExecutionRequest) (*executorv1.CancelExecutionResponse, error) {
	x, err := s.execution(r.GetName())
	if err != nil {
		return nil, err
	}
	x.stop(cancelled{r.GetRequester()})
	return &executorv1.CancelExecutionResponse{Execution: x.wait(ctx)}, nil
}

// DeleteExecution implements ExecutorService.
func (s *Server) DeleteExecution(_ context.Context, r *executorv1.DeleteExecutionRequest) (*executorv1.DeleteExecutionResponse, error) {
	return once(s, r, func() (*executorv1.DeleteExecutionResponse, error) {
		x, err := s.execution(r.GetName())
		if err != nil {
			return nil, err
		}
		record, _, _ := x.snapshot()
		if record.GetState() != executorv1.Execution_STATE_ENDED {
			return nil, Error(codes.FailedPrecondition, "EXECUTION_NOT_ENDED", nil, r.GetName()+" has not ended")
		}
		s.mu.Lock()
		x.name = "" // its number stays taken
		s.mu.Unlock()
		return &executorv1.DeleteExecutionResponse{}, nil
	})
}
