package modaltest

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	pb "github.com/modal-labs/modal-client/go/proto/modal_proto"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Fault is something that goes wrong with calls.
type Fault struct {
	// RPC is which calls it hits: "CP.SandboxCreateV2", "TCR.TaskExecStart", "CP.*",
	// "TCR.*" or "*".
	RPC string
	// After is how many calls are spared first.
	After int
	// Count is how many calls are hit. Zero: one. Negative: all, until Repair.
	Count int
	// Delay is waited before the call is looked at.
	Delay time.Duration
	// Code is what the call is answered with; OK: as usual, after Delay.
	Code codes.Code
	// Message comes with Code.
	Message string
	// Lost lets the call be done; only its answer is replaced by Code. Of a stream the
	// answer is its end.
	Lost bool
	// RetryAfter makes it the server's throttling: the SDK tries again after so long,
	// without end, and does not count that as one of its attempts.
	RetryAfter time.Duration
	// Messages ends a stream from the server by Code when so many messages were sent.
	// Zero: none are. It is for streams only.
	Messages int
	// Hang never answers: until the client gives up.
	Hang bool
}

func (f Fault) hits(name string) bool {
	prefix, all := strings.CutSuffix(f.RPC, "*")
	return f.RPC == name || all && strings.HasPrefix(name, prefix)
}

func (f Fault) err() error {
	if f.Code == codes.OK {
		return nil
	}
	message := f.Message
	if message == "" {
		message = "fault of the fake"
	}
	st := status.New(f.Code, message)
	if f.RetryAfter > 0 {
		policy := pb.RPCRetryPolicy_builder{RetryAfterSecs: float32(f.RetryAfter.Seconds())}.Build()
		if with, err := st.WithDetails(policy); err == nil {
			st = with
		}
	}
	return st.Err()
}

type faults struct {
	mu   sync.Mutex
	list []*Fault
}

// take finds the fault that hits a call, and counts it.
func (f *faults) take(name string) *Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, fault := range f.list {
		if !fault.hits(name) {
			continue
		}
		if fault.After > 0 {
			fault.After--
			continue
		}
		hit := *fault
		if fault.Count == 1 {
			f.list = slices.Delete(f.list, i, i+1)
		} else if fault.Count > 1 {
			fault.Count--
		}
		return &hit
	}
	return nil
}

// Inject orders a fault. Of several that fit a call the one that was ordered first hits it.
func (f *Fake) Inject(fault Fault) {
	if fault.Count == 0 {
		fault.Count = 1
	}
	f.faults.mu.Lock()
	defer f.faults.mu.Unlock()
	f.faults.list = append(f.faults.list, &fault)
}

// Repair takes back all faults that Inject ordered.
func (f *Fake) Repair() {
	f.faults.mu.Lock()
	defer f.faults.mu.Unlock()
	f.faults.list = nil
}

// calls counts calls.
type calls struct {
	mu     sync.Mutex
	counts map[string]int
	names  []string
}

// remembered is how many names of calls are kept in order.
const remembered = 10_000

func (c *calls) add(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.counts == nil {
		c.counts = make(map[string]int)
	}
	c.counts[name]++
	if len(c.names) < remembered {
		c.names = append(c.names, name)
	}
}

// Counts is how often each RPC was called since the last ResetCounts: by names such as
// "CP.SandboxCreateV2" and "TCR.TaskExecStart", with repetitions and with calls that a
// fault hit.
func (f *Fake) Counts() map[string]int {
	f.calls.mu.Lock()
	defer f.calls.mu.Unlock()
	return maps.Clone(f.calls.counts)
}

// Calls are the names of the calls since the last ResetCounts, in the order in which they
// came; the first 10000.
func (f *Fake) Calls() []string {
	f.calls.mu.Lock()
	defer f.calls.mu.Unlock()
	return slices.Clone(f.calls.names)
}

// ResetCounts forgets all calls.
func (f *Fake) ResetCounts() {
	f.calls.mu.Lock()
	defer f.calls.mu.Unlock()
	f.calls.counts, f.calls.names = nil, nil
}

// shortName is the name of a call as tests write it.
func shortName(method string) string {
	service, name, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	if strings.HasSuffix(service, ".TaskCommandRouter") {
		return "TCR." + name
	}
	return "CP." + name
}

// before does what a fault does before a call; done says that the call is over.
func (f *Fault) before(ctx context.Context) (done bool, err error) {
	if f.Delay > 0 || f.Hang {
		var after <-chan time.Time
		if !f.Hang {
			after = time.After(f.Delay)
		}
		select {
		case <-after:
		case <-ctx.Done():
			return true, status.FromContextError(ctx.Err()).Err()
		}
	}
	return f.Code != codes.OK && !f.Lost, f.err()
}

// authorized says whether a call to the control plane has the credentials it needs.
func (f *Fake) authorized(ctx context.Context, name string) error {
	if !strings.HasPrefix(name, "CP.") {
		return nil // the router looks by itself, as its tokens are for one task
	}
	if first(ctx, "x-modal-token-id") != f.cfg.TokenID || first(ctx, "x-modal-token-secret") != f.cfg.TokenSecret {
		return status.Error(codes.Unauthenticated, "token id or secret is not valid")
	}
	token := first(ctx, "x-modal-auth-token")
	if name == "CP.AuthTokenGet" || token == "" { // streams have none
		return nil
	}
	if err := f.check(token, ""); err != nil {
		return status.Error(codes.Unauthenticated, "auth token is not valid")
	}
	return nil
}

func (f *Fake) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	name := shortName(info.FullMethod)
	f.calls.add(name)
	fault := f.faults.take(name)
	if fault != nil {
		if done, err := fault.before(ctx); done {
			return nil, err
		}
	}
	if err := f.authorized(ctx, name); err != nil {
		return nil, err
	}
	answer, err := handler(ctx, request)
	if fault != nil && fault.Lost {
		return nil, fault.err()
	}
	return answer, err
}

func (f *Fake) stream(server any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	name := shortName(info.FullMethod)
	f.calls.add(name)
	fault := f.faults.take(name)
	if fault != nil {
		if fault.Messages > 0 {
			return handler(server, &cutStream{ServerStream: ss, left: fault.Messages, err: fault.err()})
		}
		if done, err := fault.before(ss.Context()); done {
			return err
		}
	}
	if err := f.authorized(ss.Context(), name); err != nil {
		return err
	}
	err := handler(server, ss)
	if fault != nil && fault.Lost {
		return fault.err()
	}
	return err
}

// cutStream is a stream that breaks after so many messages, in either direction.
type cutStream struct {
	grpc.ServerStream
	left int
	err  error
}

// SendMsg sends, or breaks the stream.
func (c *cutStream) SendMsg(m any) error {
	if c.left == 0 {
		return c.err
	}
	c.left--
	return c.ServerStream.SendMsg(m)
}

// RecvMsg receives. Of streams from the client the first message is who it is about.
func (c *cutStream) RecvMsg(m any) error {
	return c.ServerStream.RecvMsg(m)
}
