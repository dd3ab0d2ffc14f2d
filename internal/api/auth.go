package api

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	middleware "github.com/grpc-ecosystem/go-grpc-middleware/v2"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/caller"
	"github.com/harvest-run/executord/internal/fault"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
)

// rule says who may call an RPC.
type rule struct {
	// open lets everybody call it, without credentials.
	open bool
	// role is the least that may.
	role auth.Role
	// scope is the API's.
	scope executorv1.Access_Scope
}

// rules are those of all RPCs, by full method name. Those of this API stand in the
// protos, those of gRPC's own services here.
func rules() (map[string]rule, error) {
	all := map[string]rule{
		// Probes have no credentials, and the answer is one bit.
		healthpb.Health_Check_FullMethodName: {open: true},
		healthpb.Health_Watch_FullMethodName: {open: true},
		healthpb.Health_List_FullMethodName:  {open: true},
		// It tells what can be called, to those who may call something.
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      {role: auth.User},
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": {role: auth.User},
	}
	for _, service := range serviceDescriptors() {
		for i := range service.Methods().Len() {
			method := service.Methods().Get(i)
			name := fmt.Sprintf("/%s/%s", service.FullName(), method.Name())
			access, _ := proto.GetExtension(method.Options(), executorv1.E_Access).(*executorv1.Access)
			role := roleOf(access.GetRole())
			if role == 0 || access.GetScope() == executorv1.Access_SCOPE_UNSPECIFIED {
				return nil, fmt.Errorf("%s has no access rule: give it the option (harvest.executor.v1.access)", name)
			}
			all[name] = rule{role: role, scope: access.GetScope()}
		}
	}
	return all, nil
}

// checkRules returns an error if a server has an RPC without a rule.
func checkRules(all map[string]rule, services map[string]grpc.ServiceInfo) error {
	for service, info := range services {
		for _, method := range info.Methods {
			name := "/" + service + "/" + method.Name
			if _, ok := all[name]; !ok {
				return fmt.Errorf("%s has no access rule", name)
			}
		}
	}
	return nil
}

// guard lets those through who may call, and tells the handlers who they are.
type guard struct {
	auth     *auth.Authenticator // nil asks nobody
	rules    map[string]rule
	statuses *statuses
	refusals *refusals
}

func (g *guard) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, end, err := g.admit(ctx, info.FullMethod)
	if err != nil {
		return nil, g.statuses.of(ctx, err, "")
	}
	defer end()
	return next(ctx, req)
}

func (g *guard) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, end, err := g.admit(stream.Context(), info.FullMethod)
	if err != nil {
		return g.statuses.of(ctx, err, "")
	}
	defer end()
	admitted := middleware.WrapServerStream(stream)
	admitted.WrappedContext = ctx
	return next(srv, admitted)
}

// admit returns the context of a call that is allowed, which ends with the fault that
// its caller gets if the credentials are revoked meanwhile. end must be called when the
// call has ended.
func (g *guard) admit(ctx context.Context, method string) (_ context.Context, end func(), err error) {
	rule, ok := g.rules[method]
	switch {
	case !ok:
		return ctx, nil, fmt.Errorf("%s has no access rule", method)
	case rule.open:
		return ctx, func() {}, nil
	}
	principal, err := g.auth.Authenticate(ctx, shownIn(ctx))
	if err != nil {
		g.refusals.note(ctx, err)
		return ctx, nil, err
	}
	noteCaller(ctx, principal.Name)
	if principal.Role < rule.role {
		return ctx, nil, fault.New(fault.PermissionDenied, "ROLE_REQUIRED", "%s has the role %s, and this needs the role %s",
			principal.Name, principal.Role, rule.role).With("role", rule.role.String())
	}
	ctx = context.WithValue(ctx, principalKey{}, principal)
	if principal.Key == "" {
		return ctx, func() {}, nil // only keys are revoked
	}
	ctx, cancel := context.WithCancelCause(ctx)
	undo := g.auth.Revoked(principal, cancel)
	return ctx, func() {
		undo()
		cancel(context.Canceled)
	}, nil
}

// principalKey finds in a context who is calling.
type principalKey struct{}

// principalOf is who is calling. Under a context that the guard has not seen it is
// somebody without a name and a role.
func principalOf(ctx context.Context) auth.Principal {
	principal, _ := ctx.Value(principalKey{}).(auth.Principal)
	return principal
}

// callerOf is on whose behalf the domain is to act.
func callerOf(ctx context.Context) caller.Caller { return principalOf(ctx).Caller() }

// shownIn is what came with a call.
func shownIn(ctx context.Context) auth.Shown {
	shown := auth.Shown{Authorization: metadata.ValueFromIncomingContext(ctx, "authorization")}
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(connInfo); ok {
			shown.Client = info.client
		}
	}
	return shown
}

// refusalsEvery is how often callers that are refused are told of at most.
const refusalsEvery = 10 * time.Second

// refusals counts the callers that did not show who they are, and tells the log now and
// then: somebody who guesses must not fill it. It never sees a credential.
type refusals struct {
	logger *slog.Logger

	mu     sync.Mutex
	told   time.Time
	counts map[string]int
}

func (r *refusals) note(ctx context.Context, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.counts == nil {
		r.counts = make(map[string]int)
	}
	reason := fault.ReasonOf(err)
	r.counts[reason]++
	if time.Since(r.told) < refusalsEvery {
		return
	}
	r.told = time.Now()
	var counts []string
	for _, reason := range slices.Sorted(maps.Keys(r.counts)) {
		counts = append(counts, fmt.Sprintf("%s=%d", reason, r.counts[reason]))
	}
	clear(r.counts)
	r.logger.WarnContext(ctx, "callers refused", "counts", strings.Join(counts, " "), "last_reason", reason, "last_peer", address(ctx))
}

// roleOf reads a role of the API's, 0 for what is none.
func roleOf(r executorv1.Role) auth.Role {
	if r < executorv1.Role_ROLE_USER || r > executorv1.Role_ROLE_ADMIN {
		return 0
	}
	return auth.Role(r)
}

// roleProto is its inverse.
func roleProto(r auth.Role) executorv1.Role { return executorv1.Role(r) }
