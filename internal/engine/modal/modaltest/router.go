package modaltest

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// router answers the SDK's calls to the workers: all of them, on the one port.
type router struct {
	pb.UnimplementedTaskCommandRouterServer
	fake *Fake
}

// chunk is how much output is sent at a time, bytes.
const chunk = 64 << 10

// task finds the running sandbox of a call, which must have the token for it.
func (r *router) task(ctx context.Context, id string) (*sandbox, error) {
	s, over, err := r.known(ctx, id)
	if err == nil && over {
		return nil, errTaskOver(id)
	}
	return s, err
}

// known is task, for one that is over too.
func (r *router) known(ctx context.Context, id string) (s *sandbox, over bool, err error) {
	f := r.fake
	token, _ := strings.CutPrefix(first(ctx, "authorization"), "Bearer ")
	if err := f.check(token, id); err != nil {
		return nil, false, status.Error(codes.Unauthenticated, err.Error())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s = f.tasks[id]
	switch {
	case s == nil || s.forgotten:
		return nil, false, status.Errorf(codes.NotFound, "task %s not found", id)
	case s.workerDead:
		if p, ok := peer.FromContext(ctx); ok {
			f.link.reset(p.Addr.String())
		}
		return nil, false, status.Error(codes.Unavailable, "the worker is gone")
	case s.ending:
		return s, true, nil
	case time.Now().Before(s.up):
		return nil, false, status.Errorf(codes.Unavailable, "task %s is not there yet", id)
	}
	return s, false, nil
}

// exec finds a program that was started in a task.
func (r *router) exec(ctx context.Context, task, id string) (*sandbox, *process, error) {
	s, err := r.task(ctx, task)
	if err != nil {
		return nil, nil, err
	}
	r.fake.mu.Lock()
	defer r.fake.mu.Unlock()
	p := s.processes[id]
	if p == nil {
		return nil, nil, status.Errorf(codes.NotFound, "exec %s not found", id)
	}
	return s, p, nil
}

// TaskExecStart starts a program; a repeated call finds it started.
func (r *router) TaskExecStart(ctx context.Context, q *pb.TaskExecStartRequest) (*pb.TaskExecStartResponse, error) {
	s, err := r.task(ctx, q.GetTaskId())
	if err != nil {
		return nil, err
	}
	if len(q.GetCommandArgs()) == 0 || q.GetExecId() == "" {
		return nil, status.Error(codes.InvalidArgument, "an exec needs an id and a command")
	}
	f := r.fake
	f.mu.Lock()
	env, err := f.environmentLocked(q.GetSecretSources())
	p, again := s.processes[q.GetExecId()]
	if !again && err == nil {
		s.processes[q.GetExecId()] = nil // being started: nobody else does
	}
	f.mu.Unlock()
	switch {
	case err != nil:
		return nil, err
	case again && p == nil:
		return nil, status.Error(codes.Unavailable, "the exec is being started")
	case again:
		return &pb.TaskExecStartResponse{}, nil
	}
	leave := f.occupy(s)
	p, err = s.box.start(program{
		id: q.GetExecId(), args: q.GetCommandArgs(), env: mergeEnv(s.env, env, pairs(q.GetEnv())), dir: s.dir(q.GetWorkdir()),
		terminal:       q.GetPtyInfo().GetEnabled(),
		noStdout:       q.GetStdoutConfig() == pb.TaskExecStdoutConfig_TASK_EXEC_STDOUT_CONFIG_DEVNULL,
		noStderr:       q.GetStderrConfig() == pb.TaskExecStderrConfig_TASK_EXEC_STDERR_CONFIG_DEVNULL,
		stderrAsStdout: q.GetStderrConfig() == pb.TaskExecStderrConfig_TASK_EXEC_STDERR_CONFIG_STDOUT,
		timeout:        time.Duration(q.GetTimeoutSecs()) * time.Second,
	})
	if err != nil {
		leave()
		f.mu.Lock()
		delete(s.processes, q.GetExecId())
		f.mu.Unlock()
		if errors.Is(err, errBoxGone) {
			return nil, errTaskOver(s.task)
		}
		return nil, status.Error(codes.Internal, err.Error())
	}
	f.mu.Lock()
	s.processes[q.GetExecId()] = p
	f.mu.Unlock()
	f.boxes.Go(func() {
		<-p.ended
		leave()
	})
	return &pb.TaskExecStartResponse{}, nil
}

// TaskExecStdioRead sends output from an offset on, to its end.
func (r *router) TaskExecStdioRead(q *pb.TaskExecStdioReadRequest, stream grpc.ServerStreamingServer[pb.TaskExecStdioReadResponse]) error {
	_, p, err := r.exec(stream.Context(), q.GetTaskId(), q.GetExecId())
	if err != nil {
		return err
	}
	from := p.stdout
	if q.GetFileDescriptor() == pb.TaskExecStdioFileDescriptor_TASK_EXEC_STDIO_FILE_DESCRIPTOR_STDERR {
		from = p.stderr
	}
	return send(stream.Context(), from, q.GetOffset(), func(data []byte, _ uint64) error {
		return stream.Send(pb.TaskExecStdioReadResponse_builder{Data: data}.Build())
	})
}

// send sends what is in a spool, from an offset on.
func send(ctx context.Context, from *spool, offset uint64, do func(data []byte, offset uint64) error) error {
	buf := make([]byte, chunk)
	for {
		n, err := from.read(ctx, int64(offset), buf)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case ctx.Err() != nil:
			return status.FromContextError(ctx.Err()).Err()
		case err != nil:
			return err
		}
		if err := do(buf[:n], offset); err != nil {
			return err
		}
		offset += uint64(n)
	}
}

// TaskExecWait holds the call until the program has ended.
func (r *router) TaskExecWait(ctx context.Context, q *pb.TaskExecWaitRequest) (*pb.TaskExecWaitResponse, error) {
	_, p, err := r.exec(ctx, q.GetTaskId(), q.GetExecId())
	if err != nil {
		return nil, err
	}
	select {
	case <-p.ended:
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	// What ends with its task is not what ended.
	if _, err := r.task(ctx, q.GetTaskId()); err != nil {
		return nil, err
	}
	if p.signal != 0 {
		signal := int32(p.signal)
		return pb.TaskExecWaitResponse_builder{Signal: &signal}.Build(), nil
	}
	code := int32(p.code)
	return pb.TaskExecWaitResponse_builder{Code: &code}.Build(), nil
}

// TaskExecPoll tells whether a program has ended.
func (r *router) TaskExecPoll(ctx context.Context, q *pb.TaskExecPollRequest) (*pb.TaskExecPollResponse, error) {
	_, p, err := r.exec(ctx, q.GetTaskId(), q.GetExecId())
	if err != nil {
		return nil, err
	}
	select {
	case <-p.ended:
	default:
		return &pb.TaskExecPollResponse{}, nil
	}
	if p.signal != 0 {
		signal := int32(p.signal)
		return pb.TaskExecPollResponse_builder{Signal: &signal}.Build(), nil
	}
	code := int32(p.code)
	return pb.TaskExecPollResponse_builder{Code: &code}.Build(), nil
}
