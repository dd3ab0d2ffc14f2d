package api

import (
	"context"
	"errors"
	"fmt"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/idempotency"
	"google.golang.org/grpc/peer"
)

// Executions runs commands. execution.Service is meant.
type Executions interface {
	// Start records a new one; it is durable when Start returns. A repeat of the request
	// returns the first one's.
	Start(ctx context.Context, r execution.Request) (execution.Execution, error)
	// Get reads one.
	Get(ctx context.Context, ref execution.Ref) (execution.Execution, error)
	// List reads a page. next is the id behind which to go on if looking for more would
	// have taken too long, "" otherwise.
	List(ctx context.Context, q execution.Query) (page []execution.Execution, next string, err error)
	// Wait returns one when it has ended. When ctx ends first it returns it as it is,
	// and ctx's cause.
	Wait(ctx context.Context, ref execution.Ref) (execution.Execution, error)
	// Watch reads its log behind after, from the start if that is nil.
	Watch(ctx context.Context, ref execution.Ref, after *execution.Cursor) (Watcher, error)
	// ReadOutput reads bytes of "stdout" or "stderr" as far as they exist now; io.EOF
	// at the end of them.
	ReadOutput(ctx context.Context, ref execution.Ref, stream string, offset int64, p []byte) (int, error)
	// Cancel ends one and returns it when its tree is gone. When ctx ends first the
	// ending goes on.
	Cancel(ctx context.Context, ref execution.Ref, c execution.Cancellation) (execution.Execution, error)
	// WriteInput writes to the input of one that runs, as far as there is room.
	WriteInput(ctx context.Context, ref execution.Ref, in execution.Input) (execution.InputState, error)
	// Signal sends a signal to processes of one that runs.
	Signal(ctx context.Context, ref execution.Ref, signal int32, scope execution.Scope, key idempotency.Key) error
	// Attach makes a writer the one that writes to its input.
	Attach(ctx context.Context, ref execution.Ref, writer string, takeOver bool) (Attachment, error)
	// Delete deletes an ended one.
	Delete(ctx context.Context, ref execution.Ref, key idempotency.Key) error
}

// Watcher reads the events of one execution. It is used by one goroutine.
type Watcher interface {
	// Next waits for the next event. It returns io.EOF after the result, and the cause
	// of ctx when that ends; then it can be called again.
	Next(ctx context.Context) (execution.Event, error)
	// Cursor is that of the last event told.
	Cursor() execution.Cursor
	// LastEventTime is when something was last added to the log.
	LastEventTime() time.Time
	// Close releases it.
	Close()
}

// Attachment is a writer's hold on the input of an execution. It may be used by several
// goroutines.
type Attachment interface {
	// Write writes a piece of input as far as there is room.
	Write(ctx context.Context, in execution.Input) (execution.InputState, error)
	// Resize changes the size of the terminal.
	Resize(ctx context.Context, size execution.TerminalSize) error
	// Lost is closed when another writer took over, Err then says so.
	Lost() <-chan struct{}
	Err() error
	// Close gives the input to others. It may be called again.
	Close()
}

// defaultWait is how long WaitExecution waits that says nothing else.
const defaultWait = 60 * time.Second

// errWaited is the cause when the time that a caller wants to wait has passed.
var errWaited = errors.New("the time to wait has passed")

// executorService implements the ExecutorService: its unary RPCs here, its streams in
// watch.go.
type executorService struct {
	executorv1.UnimplementedExecutorServiceServer
	executions Executions
	tokens     *pageTokens
	keys       *requestKeys
	senders    *senders
}

// StartExecution implements executorv1.ExecutorServiceServer.
func (s *executorService) StartExecution(ctx context.Context, req *executorv1.StartExecutionRequest) (*executorv1.StartExecutionResponse, error) {
	request, err := newRequest(ctx, req)
	if err != nil {
		return nil, err
	}
	request.Command.Trace = traceparent(ctx)
	if request.Key, err = s.keys.of(ctx, req); err != nil {
		return nil, err
	}
	e, err := s.executions.Start(ctx, request)
	if err != nil {
		return nil, err
	}
	return &executorv1.StartExecutionResponse{Execution: executionProto(e)}, nil
}

// WaitExecution implements executorv1.ExecutorServiceServer.
func (s *executorService) WaitExecution(ctx context.Context, req *executorv1.WaitExecutionRequest) (*executorv1.WaitExecutionResponse, error) {
	ref, err := parseExecutionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	timeout := defaultWait
	if req.GetTimeout() != nil {
		if timeout, err = duration("timeout", req.GetTimeout()); err != nil {
			return nil, err
		}
	}
	var e execution.Execution
	if timeout == 0 {
		e, err = s.executions.Get(ctx, ref)
	} else {
		wait, cancel := context.WithTimeoutCause(ctx, timeout, errWaited)
		defer cancel()
		if e, err = s.executions.Wait(wait, ref); waited(ctx, wait, err) {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	return &executorv1.WaitExecutionResponse{Execution: executionProto(e)}, nil
}

// waited says whether err means that the time to wait, wait's, has passed and that
// the call's, ctx's, has not.
func waited(ctx, wait context.Context, err error) bool {
	return err != nil && ctx.Err() == nil && wait.Err() != nil &&
		(errors.Is(err, errWaited) || errors.Is(err, context.DeadlineExceeded))
}

// GetExecution implements executorv1.ExecutorServiceServer.
func (s *executorService) GetExecution(ctx context.Context, req *executorv1.GetExecutionRequest) (*executorv1.GetExecutionResponse, error) {
	ref, err := parseExecutionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	mask, err := parseReadMask(req.GetReadMask(), (*executorv1.Execution)(nil))
	if err != nil {
		return nil, err
	}
	e, err := s.executions.Get(ctx, ref)
	if err != nil {
		return nil, err
	}
	answer := executionProto(e)
	mask.apply(answer)
	return &executorv1.GetExecutionResponse{Execution: answer}, nil
}

// ListExecutions implements executorv1.ExecutorServiceServer.
func (s *executorService) ListExecutions(ctx context.Context, req *executorv1.ListExecutionsRequest) (*executorv1.ListExecutionsResponse, error) {
	size := pageSize(req.GetPageSize())
	query := execution.Query{Caller: callerOf(ctx), Limit: size + 1}
	mask, err := parseReadMask(req.GetReadMask(), (*executorv1.Execution)(nil))
	if err != nil {
		return nil, err
	}
	if query.Filter, err = parseFilter(req.GetFilter(), executionFilters()); err != nil {
		return nil, err
	}
	if query.Ascending, err = parseOrder(req.GetOrderBy()); err != nil {
		return nil, err
	}
	list := listing(ctx, "ListExecutions", req.GetParent(), req.GetFilter(), query.Ascending)
	if query.Before, err = s.tokens.decode(list, req.GetPageToken()); err != nil {
		return nil, err
	}
	if req.GetParent() == anySession {
		query.InAnySession = true
	} else if query.Session, err = parseParent(req.GetParent()); err != nil {
		return nil, err
	}
	found, behind, err := s.executions.List(ctx, query)
	if err != nil {
		return nil, err
	}
	page, next := cutPage(found, size, func(last execution.Execution) string {
		return s.tokens.encode(list, last.ID)
	})
	if behind != "" {
		next = s.tokens.encode(list, behind)
	}
	resp := &executorv1.ListExecutionsResponse{
		Executions:    make([]*executorv1.Execution, len(page)),
		NextPageToken: next,
	}
	for i, e := range page {
		resp.Executions[i] = executionProto(e)
		mask.apply(resp.Executions[i])
	}
	return resp, nil
}

// CancelExecution implements executorv1.ExecutorServiceServer.
func (s *executorService) CancelExecution(ctx context.Context, req *executorv1.CancelExecutionRequest) (*executorv1.CancelExecutionResponse, error) {
	ref, err := parseExecutionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	cancellation := execution.Cancellation{By: requester(ctx, req.GetRequester())}
	if req.GetGracePeriod() != nil {
		grace, err := duration("grace_period", req.GetGracePeriod())
		if err != nil {
			return nil, err
		}
		cancellation.Grace = &grace
	}
	if cancellation.Key, err = s.keys.of(ctx, req); err != nil {
		return nil, err
	}
	e, err := s.executions.Cancel(ctx, ref, cancellation)
	if err != nil {
		return nil, err
	}
	return &executorv1.CancelExecutionResponse{Execution: executionProto(e)}, nil
}

// DeleteExecution implements executorv1.ExecutorServiceServer.
func (s *executorService) DeleteExecution(ctx context.Context, req *executorv1.DeleteExecutionRequest) (*executorv1.DeleteExecutionResponse, error) {
	ref, err := parseExecutionName(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	key, err := s.keys.of(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := s.executions.Delete(ctx, ref, key); err != nil {
		return nil, err
	}
	return &executorv1.DeleteExecutionResponse{}, nil
}

// requester says who asks: who the caller is, which nobody can make up, from which
// address, and in their own words. On a server that asks nobody who they are the words
// are all there is.
func requester(ctx context.Context, words string) string {
	principal := principalOf(ctx)
	if words == "" {
		words = "unnamed caller"
	}
	if principal == auth.Local() {
		return fmt.Sprintf("%s (%s)", words, address(ctx))
	}
	return fmt.Sprintf("%s at %s (%s)", principal.Name, address(ctx), words)
}

// address is where a call comes from.
func address(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "unknown address"
	}
	if text := p.Addr.String(); text != "" && text != "@" {
		return text
	}
	// The client's end of a unix socket has no name.
	return p.Addr.Network() + " socket"
}
