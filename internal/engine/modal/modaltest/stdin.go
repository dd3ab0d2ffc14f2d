package modaltest

import (
	"context"
	"errors"
	"io"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// inputError is the answer to input that was not taken.
func inputError(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err()).Err()
	case errors.Is(err, errInputClosed):
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	return status.Error(codes.InvalidArgument, err.Error())
}

// TaskExecStdinWrite writes to a program's standard input, from an offset on: what is
// repeated is not written again.
func (r *router) TaskExecStdinWrite(ctx context.Context, q *pb.TaskExecStdinWriteRequest) (*pb.TaskExecStdinWriteResponse, error) {
	s, p, err := r.exec(ctx, q.GetTaskId(), q.GetExecId())
	if err != nil {
		return nil, err
	}
	defer r.fake.occupy(s)()
	if err := p.write(ctx, int64(q.GetOffset()), q.GetData(), q.GetEof()); err != nil {
		return nil, inputError(ctx, err)
	}
	return &pb.TaskExecStdinWriteResponse{}, nil
}

// TaskExecStdinStatus tells how much of the input has come.
func (r *router) TaskExecStdinStatus(ctx context.Context, q *pb.TaskExecStdinStatusRequest) (*pb.TaskExecStdinStatusResponse, error) {
	_, p, err := r.exec(ctx, q.GetTaskId(), q.GetExecId())
	if err != nil {
		return nil, err
	}
	written, closed := p.input()
	return pb.TaskExecStdinStatusResponse_builder{NumBytesWritten: uint64(written), Closed: closed}.Build(), nil
}

// TaskExecStdinWriteStream writes to a program's standard input what comes on a stream.
// Only its explicit end closes the input.
func (r *router) TaskExecStdinWriteStream(stream grpc.ClientStreamingServer[pb.TaskExecStdinWriteStreamRequest, pb.TaskExecStdinWriteStreamResponse]) error {
	ctx := stream.Context()
	m, err := stream.Recv()
	if err != nil {
		return err
	}
	start := m.GetStart()
	s, p, err := r.exec(ctx, start.GetTaskId(), start.GetExecId())
	if err != nil {
		return err
	}
	defer r.fake.occupy(s)()
	for offset := int64(start.GetOffset()); ; {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return status.Error(codes.InvalidArgument, "the stream ended without an end of the input")
		}
		if err != nil {
			return err
		}
		if err := p.write(ctx, offset, m.GetData(), m.HasEnd()); err != nil {
			return inputError(ctx, err)
		}
		if m.HasEnd() {
			return stream.SendAndClose(&pb.TaskExecStdinWriteStreamResponse{})
		}
		offset += int64(len(m.GetData()))
	}
}

// SandboxStdinWriteV2 writes to the standard input of the sandbox's own program.
func (r *router) SandboxStdinWriteV2(ctx context.Context, q *pb.SandboxStdinWriteV2Request) (*pb.SandboxStdinWriteV2Response, error) {
	s, err := r.task(ctx, q.GetTaskId())
	if err != nil {
		return nil, err
	}
	r.fake.mu.Lock()
	p := s.entry
	r.fake.mu.Unlock()
	if p == nil {
		return nil, status.Error(codes.FailedPrecondition, "the sandbox has no program of its own")
	}
	defer r.fake.occupy(s)()
	if err := p.write(ctx, int64(q.GetOffset()), q.GetData(), q.GetEof()); err != nil {
		return nil, inputError(ctx, err)
	}
	return &pb.SandboxStdinWriteV2Response{}, nil
}

// SandboxStdioReadV2 sends the output of the sandbox's own program, from an offset on. It
// is there after the end too.
func (r *router) SandboxStdioReadV2(q *pb.SandboxStdioReadV2Request, stream grpc.ServerStreamingServer[pb.SandboxStdioReadV2Response]) error {
	s, _, err := r.known(stream.Context(), q.GetTaskId())
	if err != nil {
		return err
	}
	r.fake.mu.Lock()
	p := s.entry
	r.fake.mu.Unlock()
	if p == nil {
		select { // nothing comes before its end
		case <-s.over:
			return nil
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
	from := p.stdout
	if q.GetFileDescriptor() == pb.SandboxStdioFileDescriptor_SANDBOX_STDIO_FILE_DESCRIPTOR_STDERR {
		from = p.stderr
	}
	return send(stream.Context(), from, q.GetOffset(), func(data []byte, offset uint64) error {
		return stream.Send(pb.SandboxStdioReadV2Response_builder{Data: data, StartingOffset: offset}.Build())
	})
}

// SandboxWaitUntilReady waits until the sandbox's probe succeeds; one without is ready when
// it runs.
func (r *router) SandboxWaitUntilReady(ctx context.Context, q *pb.SandboxWaitUntilReadyTcrRequest) (*pb.SandboxWaitUntilReadyTcrResponse, error) {
	probe := (*pb.Probe)(nil)
	for {
		s, err := r.task(ctx, q.GetTaskId())
		if err != nil {
			return nil, err
		}
		probe = s.definition.GetReadinessProbe()
		ready, err := s.probe(ctx)
		if err != nil {
			return nil, internal(err)
		}
		if ready {
			return pb.SandboxWaitUntilReadyTcrResponse_builder{ReadyAt: seconds(r.fake.clock.now())}.Build(), nil
		}
		select {
		case <-time.After(time.Duration(max(probe.GetIntervalMs(), 10)) * time.Millisecond):
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}

// probe says whether a sandbox is ready.
func (s *sandbox) probe(ctx context.Context) (bool, error) {
	switch p := s.definition.GetReadinessProbe(); {
	case p.HasTcpPort():
		c, err := s.box.dial(ctx, int(p.GetTcpPort()))
		if err != nil {
			return false, nil // nobody listens yet
		}
		return true, c.Close()
	case p.HasExecCommand():
		q, err := s.box.start(program{
			id: newID("probe"), args: p.GetExecCommand().GetArgv(), env: s.env, dir: s.dir(""), noStdout: true, noStderr: true,
		})
		if err != nil {
			return false, err
		}
		defer q.discard()
		select {
		case <-q.ended:
			return q.code == 0 && q.signal == 0, nil
		case <-ctx.Done():
			return false, nil // the caller sees it
		}
	}
	return true, nil
}
