// Package client is the Go client of executord: the generated stubs on one
// connection, and on top of them what a stream needs to survive a bad day.
//
//	c, err := client.Dial(client.Config{Address: "127.0.0.1:7070"})
//	result, err := c.Run(ctx, request, os.Stdout, os.Stderr)
//
// Execute and Watch return a Stream. It reads the event log of one execution from a
// cursor to the result. When the connection breaks, or executord is restarted, it
// connects again and goes on behind the last event; it never tells an event twice,
// never leaves one out unsaid, and at the result it proves by length and CRC-32C
// that the output is whole.
//
// Execute, Start, Cancel, Delete, CreateSession and TerminateSession give their request
// a request_id if it has none, and repeat it when the connection broke before the
// answer: with it the server does nothing twice. Where that goes on for too long the
// error is ErrUnconfirmed.
//
// Errors of the server are gRPC statuses; Reason, Violations, Metadata and Message
// take them apart. The package starts no goroutine of its own beside gRPC's, and
// those end with Client.Close.
package client

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// DefaultMaxOutage is how long a Client without MaxOutage rides out a lost connection.
const DefaultMaxOutage = 60 * time.Second

// Config says where executord is and how patient to be. Its zero value is usable.
type Config struct {
	// Address is host:port or unix:PATH; DefaultAddress if empty.
	Address string
	// TLS encrypts the connection; nil does not, which belongs on a loopback or
	// unix-socket address only.
	TLS *TLS
	// APIKey shows the server who is calling; "" shows none.
	APIKey string
	// Token is asked before each call for an API key or bearer token, so that it can
	// change; not with APIKey. It may be called from several goroutines, and its error
	// ends the call as UNAUTHENTICATED. Credentials go over TLS, to a loopback address or
	// to a unix socket, and nowhere else.
	Token func(ctx context.Context) (string, error)
	// MaxOutage is how long a Stream, Wait, Cancel and what else changes something go on
	// trying when nothing can be had from the server, counted from the first failure; 0 for DefaultMaxOutage,
	// negative to give up at once. Any message that comes ends the outage.
	MaxOutage time.Duration
	// HeartbeatInterval is how long a stream may be silent before the server sends a
	// heartbeat: 1 s to 300 s; 0 for the server's default, 15 s. A stream that is
	// silent for three times as long (at least 5 s) counts as broken.
	HeartbeatInterval time.Duration
	// Heartbeats makes Stream.Recv return heartbeats too.
	Heartbeats bool
	// OnOutage, if not nil, is called before each wait for another attempt, by the
	// goroutine that waits.
	OnOutage func(Outage)
	// DialOptions are added behind the Client's own, for tests.
	DialOptions []grpc.DialOption
}

// Outage is one failed attempt to get on, as Config.OnOutage is told of it.
type Outage struct {
	// Execution is the name of what is followed, or to be changed; empty while it is not
	// known.
	Execution string
	// Attempt counts the failures of this outage, from 1.
	Attempt int
	// Err is the failure.
	Err error
	// Wait is the time until the next attempt.
	Wait time.Duration
}

// Client is a connection to executord. Its methods may be called from any goroutine.
type Client struct {
	conn     *grpc.ClientConn
	cfg      Config
	executor executorv1.ExecutorServiceClient
	sessions executorv1.SessionServiceClient
	images   executorv1.ImageServiceClient
	admin    executorv1.AdminServiceClient
	auth     executorv1.AuthServiceClient
}

// Dial makes a Client. It does not connect yet: a server that is not there shows at
// the first call, as UNAVAILABLE, and so does one whose certificate is not trusted. The
// error is about the Config and the files that it names.
func Dial(cfg Config) (*Client, error) {
	target, err := target(cfg.Address)
	if err != nil {
		return nil, err
	}
	if cfg.MaxOutage == 0 {
		cfg.MaxOutage = DefaultMaxOutage
	}
	services, err := serviceConfig()
	if err != nil {
		return nil, err
	}
	transport, err := cfg.TLS.transport()
	if err != nil {
		return nil, err
	}
	credential, err := newBearer(cfg, target)
	if err != nil {
		return nil, err
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithUserAgent("executor-go/" + Version()),
		grpc.WithDefaultServiceConfig(services),
		withCodec(),
		// The server allows a ping every 10 s; a dead link is noticed within 30 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 20 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true,
		}),
		// gRPC's own default waits up to 120 s between two attempts to connect; a
		// server that came back would be found long after MaxOutage.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
	}
	if credential != nil {
		options = append(options, grpc.WithPerRPCCredentials(credential))
	}
	conn, err := grpc.NewClient(target, append(options, cfg.DialOptions...)...)
	if err != nil {
		return nil, fmt.Errorf("dial %q: %w", cfg.Address, err)
	}
	return &Client{
		conn:     conn,
		cfg:      cfg,
		executor: executorv1.NewExecutorServiceClient(conn),
		sessions: executorv1.NewSessionServiceClient(conn),
		images:   executorv1.NewImageServiceClient(conn),
		admin:    executorv1.NewAdminServiceClient(conn),
		auth:     executorv1.NewAuthServiceClient(conn),
	}, nil
}

// Close ends the connection and with it every call and Stream that is open.
func (c *Client) Close() error { return c.conn.Close() }

// Executor is the generated stub of ExecutorService.
func (c *Client) Executor() executorv1.ExecutorServiceClient { return c.executor }

// Sessions is the generated stub of SessionService.
func (c *Client) Sessions() executorv1.SessionServiceClient { return c.sessions }

// Images is the generated stub of ImageService.
func (c *Client) Images() executorv1.ImageServiceClient { return c.images }

// Admin is the generated stub of AdminService.
func (c *Client) Admin() executorv1.AdminServiceClient { return c.admin }

// Auth is the generated stub of AuthService.
func (c *Client) Auth() executorv1.AuthServiceClient { return c.auth }

// Wait waits until an execution has ended and returns it. It asks again for as long
// as it runs, and rides out a lost connection as a Stream does (ErrOutage). When ctx
// ends first it returns context.Cause(ctx).
func (c *Client) Wait(ctx context.Context, name string) (*executorv1.Execution, error) {
	for {
		var answer *executorv1.WaitExecutionResponse
		err := c.persist(ctx, name, func() (err error) {
			answer, err = c.executor.WaitExecution(ctx, &executorv1.WaitExecutionRequest{Name: name})
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("wait for %s: %w", name, err)
		}
		if e := answer.GetExecution(); e.GetState() == executorv1.Execution_STATE_ENDED {
			return e, nil
		}
	}
}

// Cancel ends an execution and returns it when its process tree is gone. It rides
// out a lost connection as a Stream does (ErrOutage): a cancel may safely be
// repeated. When ctx ends first it returns context.Cause(ctx); the cancel may then
// have been heard or not.
func (c *Client) Cancel(ctx context.Context, request *executorv1.CancelExecutionRequest) (*executorv1.Execution, error) {
	request = identified(request)
	var answer *executorv1.CancelExecutionResponse
	err := c.persist(ctx, request.GetName(), func() (err error) {
		answer, err = c.executor.CancelExecution(ctx, request)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cancel %s: %w", request.GetName(), err)
	}
	return answer.GetExecution(), nil
}

// persist makes a call that is safe to repeat until it has an answer, the outage is
// over its limit or ctx ends.
func (c *Client) persist(ctx context.Context, name string, call func() error) error {
	lost := c.newOutage(name)
	for {
		err := call()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !resumable(err) {
			return err
		}
		if err := lost.wait(ctx, err); err != nil {
			return err
		}
	}
}

// serviceConfig has gRPC repeat what is unary and only reads, by its name in the
// AIPs: Get and List. Everything else has its own way to go on (Stream, Wait, Start and
// the like).
func serviceConfig() (string, error) {
	type method struct {
		Service string `json:"service"`
		Method  string `json:"method"`
	}
	var reads []method
	for _, service := range []grpc.ServiceDesc{
		executorv1.ExecutorService_ServiceDesc, executorv1.SessionService_ServiceDesc, executorv1.AdminService_ServiceDesc,
		executorv1.AuthService_ServiceDesc, executorv1.ImageService_ServiceDesc,
	} {
		for _, m := range service.Methods {
			if strings.HasPrefix(m.MethodName, "Get") || strings.HasPrefix(m.MethodName, "List") {
				reads = append(reads, method{service.ServiceName, m.MethodName})
			}
		}
	}
	b, err := json.Marshal(map[string]any{
		"methodConfig": []any{map[string]any{
			"name": reads,
			"retryPolicy": map[string]any{
				"maxAttempts": 4, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 2,
				"retryableStatusCodes": []string{"UNAVAILABLE"},
			},
		}},
	})
	if err != nil {
		return "", fmt.Errorf("write the service config: %w", err)
	}
	return string(b), nil
}
