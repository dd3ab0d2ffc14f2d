// Package api is the gRPC face of executord: it checks requests against the
// protos, turns them into what the domain understands, and turns what the domain
// answers, its faults included, into responses, streams and statuses. It is the
// only server-side place that knows the public protos and gRPC codes. What it needs
// from the domain it declares as interfaces; engines and stores it never sees.
// The goroutines of a Server are those of grpc-go and one sender per stream; Stop
// waits for all of them.
package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/auth"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/stats"
)

// What a Server does that the Config does not change.
const (
	// maxConcurrentStreams bounds the RPCs of one connection.
	maxConcurrentStreams = 1000
	// maxHeaderBytes bounds the headers of one RPC.
	maxHeaderBytes = 64 << 10
	// handshakeTimeout is how long a connection may take to say hello.
	handshakeTimeout = 10 * time.Second
	// defaultSlowConsumerAfter is how long one message may wait for its reader.
	defaultSlowConsumerAfter = 60 * time.Second
)

// Config says what a Server serves.
type Config struct {
	Executions Executions
	Sessions   Sessions
	Turns      Turns
	Images     Images
	Info       Info
	Keys       Keys
	// Auth finds out who is calling; nil asks nobody, and everybody may do everything.
	Auth *auth.Authenticator
	// Certificates, if not nil, are those of the server: it speaks TLS.
	Certificates *auth.Certificates
	// Logger gets one line per RPC and every internal error; never payloads.
	Logger *slog.Logger
	// PageTokenKey signs page tokens. Tokens are good for all servers that have the
	// same key; one that is empty is replaced by a random one.
	PageTokenKey []byte
	// RequestIDKey makes the fingerprints of requests with a request_id. A repeat is only
	// known to a server with the same key; one that is empty is replaced by a random one.
	RequestIDKey []byte
	// Reflection offers grpc.reflection.
	Reflection bool
	// SlowConsumerAfter is how long one message of a stream may wait until its
	// client takes something, before the stream is ended; 0 is 60 s.
	SlowConsumerAfter time.Duration
	// Stats observes every RPC; nil if nobody wants to know.
	Stats stats.Handler
}

// Server serves the API on any number of listeners.
type Server struct {
	grpc    *grpc.Server
	health  *health.Server
	senders *senders
}

// NewServer makes a Server. When shutdown ends, every stream and every RPC that
// waits for something ends with UNAVAILABLE (SERVER_DRAINING). The error is a defect
// of the protos' rules.
func NewServer(shutdown context.Context, cfg Config) (*Server, error) {
	if cfg.SlowConsumerAfter <= 0 {
		cfg.SlowConsumerAfter = defaultSlowConsumerAfter
	}
	validator, err := newValidator()
	if err != nil {
		return nil, fmt.Errorf("compile the validation rules: %w", err)
	}
	tokens, err := newPageTokens(cfg.PageTokenKey)
	if err != nil {
		return nil, fmt.Errorf("make a key for page tokens: %w", err)
	}
	keys, err := newRequestKeys(cfg.RequestIDKey)
	if err != nil {
		return nil, fmt.Errorf("make a key for request ids: %w", err)
	}
	statuses := &statuses{logger: cfg.Logger}
	access := &accessLog{logger: cfg.Logger}
	gate := &gate{validator: validator, statuses: statuses}
	drain := &drain{follow: func(f func()) func() bool { return context.AfterFunc(shutdown, f) }}
	rules, err := rules()
	if err != nil {
		return nil, err
	}
	guard := &guard{auth: cfg.Auth, rules: rules, statuses: statuses, refusals: &refusals{logger: cfg.Logger}}
	onPanic := recovery.WithRecoveryHandlerContext(statuses.recovered)

	// Outermost first.
	options := []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(
			// Sees the final status, also that of a panic: must be first.
			access.unary,
			// Turns a panic of anything below into a status.
			recovery.UnaryServerInterceptor(onPanic),
			// Ends the context when the server stops: must be above what waits.
			drain.unary,
			// Refuses who may not call: must be above gate, so that nothing of a stranger's
			// request is looked at.
			guard.unary,
			// Turns faults into statuses; refuses bad requests: must be last, so that
			// the handler gets only good ones and everything above sees statuses.
			gate.unary,
		),
		// The same order for the same reasons.
		grpc.ChainStreamInterceptor(
			access.stream,
			recovery.StreamServerInterceptor(onPanic),
			drain.stream,
			guard.stream,
			gate.stream,
		),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{
			MinTime: 10 * time.Second, PermitWithoutStream: true,
		}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.MaxConcurrentStreams(maxConcurrentStreams),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.WaitForHandlers(true),
	}
	if cfg.Certificates != nil {
		options = append(options, grpc.Creds(newServerCredentials(cfg.Certificates)))
	}
	if cfg.Stats != nil {
		options = append(options, grpc.StatsHandler(cfg.Stats))
	}
	server := grpc.NewServer(options...)
	s := &Server{
		grpc: server, health: health.NewServer(),
		senders: &senders{patience: cfg.SlowConsumerAfter, statuses: statuses},
	}
	services := registrar{server}
	executorv1.RegisterExecutorServiceServer(services, &executorService{
		executions: cfg.Executions, tokens: tokens, keys: keys, senders: s.senders,
	})
	executorv1.RegisterSessionServiceServer(services, &sessionService{
		sessions: cfg.Sessions, turns: cfg.Turns, tokens: tokens, keys: keys, senders: s.senders,
	})
	executorv1.RegisterImageServiceServer(services, &imageService{images: cfg.Images, tokens: tokens, keys: keys, senders: s.senders})
	executorv1.RegisterAdminServiceServer(services, &adminService{info: cfg.Info})
	executorv1.RegisterAuthServiceServer(services, &authService{keys: cfg.Keys, tokens: tokens})
	healthpb.RegisterHealthServer(server, s.health)
	if cfg.Reflection {
		reflection.Register(server)
	}
	if err := checkRules(rules, server.GetServiceInfo()); err != nil {
		return nil, err
	}
	s.SetServing(true)
	return s, nil
}

// Serve serves a listener until the server stops; then it returns nil.
func (s *Server) Serve(l net.Listener) error {
	err := s.grpc.Serve(l)
	if errors.Is(err, grpc.ErrServerStopped) {
		// It was stopped before it came to serve.
		return nil
	}
	return err
}

// SetServing tells health checks whether new work is welcome.
func (s *Server) SetServing(serving bool) {
	status := healthpb.HealthCheckResponse_NOT_SERVING
	if serving {
		status = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", status)
	for _, name := range []string{
		executorv1.ExecutorService_ServiceDesc.ServiceName,
		executorv1.SessionService_ServiceDesc.ServiceName,
		executorv1.ImageService_ServiceDesc.ServiceName,
		executorv1.AdminService_ServiceDesc.ServiceName,
		executorv1.AuthService_ServiceDesc.ServiceName,
	} {
		s.health.SetServingStatus(name, status)
	}
}

// GracefulStop takes no new RPCs and returns when the last one has ended. Streams end
// by themselves, or because the shutdown context ends.
func (s *Server) GracefulStop() {
	s.grpc.GracefulStop()
	s.senders.wait()
}

// Stop cuts off what is left and waits for every goroutine. It also ends a
// GracefulStop.
func (s *Server) Stop() {
	s.grpc.Stop()
	s.senders.wait()
}
