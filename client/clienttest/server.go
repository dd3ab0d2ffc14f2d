// Package clienttest is a stand-in for executord, for tests of what uses package
// client. It speaks the real protocol over a loopback connection, keeps its logs
// through Restart as executord keeps its state directory, and runs nothing: the
// programs that it is asked to execute are lines of its own small language, see
// program. All its times and names are fixed, so that what a test prints is too.
//
// The Server owns the goroutines of its programs and of gRPC; Close, which Start
// arranges to be called, waits for them.
package clienttest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/protoadapt"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// Epoch is the epoch of every log.
const Epoch = "e1"

var errClosed = errors.New("the server is closed")

// Server is a stand-in for executord. Its methods may be called from any goroutine.
type Server struct {
	executorv1.UnimplementedExecutorServiceServer
	executorv1.UnimplementedSessionServiceServer
	executorv1.UnimplementedImageServiceServer
	executorv1.UnimplementedAdminServiceServer
	executorv1.UnimplementedAuthServiceServer

	address  string
	programs sync.WaitGroup
	requests requests

	mu         sync.Mutex
	grpc       *grpc.Server
	serving    *sync.WaitGroup
	executions []*execution // the oldest first
	sessions   []*session
	built      []string // images, by their resource names
	info       *executorv1.GetServerInfoResponse
	calls      map[string][]proto.Message
	hook, lose func(method string, nth int) error
	scripts    []Script
	agent      string
	keys       []*executorv1.ApiKey // the oldest first
	want       string
	shown      string
	transport  credentials.TransportCredentials
	closed     bool
}

// Script is what one stream does instead of telling its log honestly. The error it
// returns ends the stream, nil with status OK.
type Script func(p *Play) error

// Play is what a Script has to work with.
type Play struct {
	// After is the cursor that the client gave; nil in an Execute.
	After *executorv1.Cursor
	// Log is the execution's log as far as it is.
	Log []*executorv1.Event
	// Send sends events.
	Send func(events ...*executorv1.Event) error
	// Restart has the server restart, which ends the script's own stream, and returns
	// what the script is to return then.
	Restart func() error
	// Done is closed when the client went away.
	Done <-chan struct{}
}

// Start starts a Server on a free loopback port and closes it when the test ends.
func Start(tb testing.TB) *Server {
	tb.Helper()
	s := New()
	if err := s.Listen("127.0.0.1:0"); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(s.Close)
	return s
}

// New makes a Server that does not listen yet.
func New() *Server {
	return &Server{calls: make(map[string][]proto.Message), info: serverInfo()}
}

// Listen starts to serve on an address, host:port or unix:PATH.
func (s *Server) Listen(address string) error {
	network, at := "tcp", address
	if path, ok := cutUnix(address); ok {
		network, at = "unix", path
	}
	listener, err := listen(network, at)
	if err != nil {
		return fmt.Errorf("listen on %q: %w", address, err)
	}
	if network == "tcp" {
		address = listener.Addr().String()
	}
	s.Serve(listener, address)
	return nil
}

// Serve starts to serve on a listener of the caller's, which Stop closes.
func (s *Server) Serve(listener net.Listener, address string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.address = address
	options := []grpc.ServerOption{
		grpc.WaitForHandlers(true), grpc.UnaryInterceptor(s.unary), grpc.StreamInterceptor(s.stream),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	}
	if s.transport != nil {
		options = append(options, grpc.Creds(s.transport))
	}
	s.grpc = grpc.NewServer(options...)
	executorv1.RegisterExecutorServiceServer(s.grpc, s)
	executorv1.RegisterSessionServiceServer(s.grpc, s)
	executorv1.RegisterImageServiceServer(s.grpc, s)
	executorv1.RegisterAdminServiceServer(s.grpc, s)
	executorv1.RegisterAuthServiceServer(s.grpc, s)
	server, serving := s.grpc, new(sync.WaitGroup)
	serving.Go(func() { _ = server.Serve(listener) })
	s.serving = serving
}

// listen insists a little: right after a Stop the address may still be taken by a
// connection that the kernel has not cleared away.
func listen(network, at string) (listener net.Listener, err error) {
	for range 100 {
		if listener, err = net.Listen(network, at); err == nil {
			return listener, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, err
}

// Address is where it listens, in the form that client.Config takes.
func (s *Server) Address() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.address
}

// Stop cuts every connection and stops to listen, as the death of the process
// would. Programs go on, as they would in their sandboxes.
func (s *Server) Stop() {
	s.mu.Lock()
	server, serving := s.grpc, s.serving
	s.grpc = nil
	s.mu.Unlock()
	if server != nil {
		server.Stop()
		serving.Wait()
	}
}

// Restart stops and listens again on the same address. It waits for the handlers of
// the calls that are open, so a handler must not call it.
func (s *Server) Restart() error {
	s.Stop()
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return errClosed
	}
	return s.Listen(s.Address())
}

// Close stops, ends all programs and waits for them.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.Stop() // with its handlers, so that no program starts any more
	s.mu.Lock()
	for _, x := range s.executions {
		x.stop(errClosed)
	}
	s.mu.Unlock()
	s.programs.Wait()
	s.Stop() // a Restart that was under way has listened again
}

// Hook has f called before each call, with the method's name and the count of its
// calls from 1; an error answers the call. nil removes it.
func (s *Server) Hook(f func(method string, nth int) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hook = f
}

// Lose has f called behind each unary call that was carried out, with the method's name
// and the count of its calls from 1; an error is told in the place of the answer. nil
// removes it.
func (s *Server) Lose(f func(method string, nth int) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lose = f
}

// Play gives scripts to the streams (Execute, WatchExecution) that are opened next,
// one each. Later streams are honest.
func (s *Server) Play(scripts ...Script) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.scripts = append(s.scripts, scripts...)
}

// Calls are the requests of a method, such as "CancelExecution", in order.
func (s *Server) Calls(method string) []proto.Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]proto.Message(nil), s.calls[method]...)
}

// UserAgent is what the last caller calls itself.
func (s *Server) UserAgent() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.agent
}

// SetInfo changes what GetServerInfo answers.
func (s *Server) SetInfo(change func(*executorv1.GetServerInfoResponse)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s.info)
}

// enter notes a call and asks the hook.
func (s *Server) enter(ctx context.Context, method string, request proto.Message) error {
	s.mu.Lock()
	if values := metadata.ValueFromIncomingContext(ctx, "user-agent"); len(values) > 0 {
		s.agent = values[0]
	}
	s.calls[method] = append(s.calls[method], request)
	nth, hook := len(s.calls[method]), s.hook
	s.shown = ""
	if values := metadata.ValueFromIncomingContext(ctx, "authorization"); len(values) > 0 {
		s.shown = values[0]
	}
	refused := s.refuse(s.shown)
	s.mu.Unlock()
	if refused != nil {
		return refused
	}
	if hook != nil {
		return hook(method, nth)
	}
	return nil
}

func (s *Server) unary(ctx context.Context, request any, call *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	message, ok := request.(proto.Message)
	if !ok {
		return nil, status.Error(codes.Internal, "not a message")
	}
	name := method(call.FullMethod)
	if err := s.enter(ctx, name, message); err != nil {
		return nil, err
	}
	answer, err := handle(ctx, request)
	s.mu.Lock()
	nth, lose := len(s.calls[name]), s.lose
	s.mu.Unlock()
	if err == nil && lose != nil {
		err = lose(name, nth)
	}
	return answer, err
}

// stream does for streams what unary does: the request shows when the handler reads it.
func (s *Server) stream(srv any, stream grpc.ServerStream, call *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	return handle(srv, &watched{ServerStream: stream, enter: func(m proto.Message) error {
		return s.enter(stream.Context(), method(call.FullMethod), m)
	}})
}

type watched struct {
	grpc.ServerStream
	enter func(proto.Message) error
}

func (w *watched) RecvMsg(m any) error {
	if err := w.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	message, ok := m.(proto.Message)
	if !ok {
		return errors.New("not a message")
	}
	return w.enter(message)
}

// Field is a bad field of a request.
type Field struct{ Name, Description string }

// Error makes an error as executord makes them: with an ErrorInfo, if there is a
// reason, and a BadRequest, if there are fields.
func Error(code codes.Code, reason string, facts map[string]string, message string, fields ...Field) error {
	st := status.New(code, message)
	var details []protoadapt.MessageV1
	if reason != "" {
		details = append(details, &errdetails.ErrorInfo{Reason: reason, Domain: "executord.harvest.run", Metadata: facts})
	}
	if len(fields) > 0 {
		bad := &errdetails.BadRequest{}
		for _, f := range fields {
			bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{Field: f.Name, Description: f.Description})
		}
		details = append(details, bad)
	}
	with, err := st.WithDetails(details...)
	if err != nil {
		return st.Err()
	}
	return with.Err()
}

func method(full string) string {
	for i := len(full) - 1; i >= 0; i-- {
		if full[i] == '/' {
			return full[i+1:]
		}
	}
	return full
}

func cutUnix(address string) (string, bool) {
	const prefix = "unix:"
	if len(address) > len(prefix) && address[:len(prefix)] == prefix {
		return address[len(prefix):], true
	}
	return "", false
}
