package api

import (
	"context"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
	"github.com/harvest-run/executord/internal/turn"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

// shows sends an authorization header with each call.
type shows string

func (s shows) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": string(s)}, nil
}

func (shows) RequireTransportSecurity() bool { return false }

// guarded is a bench whose callers need an API key.
func guarded(t *testing.T, change ...func(*Config)) *bench {
	t.Helper()
	b := newBench(t, append([]func(*Config){func(c *Config) {
		c.Auth = &auth.Authenticator{Keys: c.Keys.(*auth.Keys)}
	}}, change...)...)
	b.executions.parents = b.sessions
	return b
}

// key makes an API key.
func (b *bench) key(t *testing.T, name string, role auth.Role) (auth.Key, string) {
	t.Helper()
	key, text, err := b.keys.Create(t.Context(), auth.NewKey{Name: name, Role: role})
	if err != nil {
		t.Fatal(err)
	}
	return key, text
}

// as connects as the owner of a new key.
func (b *bench) as(t *testing.T, name string, role auth.Role) *grpc.ClientConn {
	t.Helper()
	_, text := b.key(t, name, role)
	return b.dial(grpc.WithPerRPCCredentials(shows("Bearer " + text)))
}

// leastRole is who may call an RPC, written out here: changing it is a decision.
func leastRole(method protoreflect.MethodDescriptor) auth.Role {
	switch method.Name() {
	case "CreateApiKey", "ListApiKeys", "RevokeApiKey":
		return auth.Admin
	case "BuildImage", "DeleteImage":
		return auth.Operator
	}
	switch method.Parent().Name() {
	case "ExecutorService", "SessionService", "ImageService", "AdminService", "AuthService":
		return auth.User
	}
	return 0
}

// leastScope is what an RPC reaches.
func leastScope(method protoreflect.MethodDescriptor) executorv1.Access_Scope {
	switch method.Parent().Name() {
	case "ImageService", "AdminService", "AuthService":
		return executorv1.Access_SCOPE_SERVER
	}
	return executorv1.Access_SCOPE_OWN
}

// TestEveryRPCHasARule walks what the server serves: an RPC without a rule, or with
// another one than is written here, fails.
func TestEveryRPCHasARule(t *testing.T) {
	all, err := rules()
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t)
	seen := make(map[string]bool)
	for service, info := range b.server.grpc.GetServiceInfo() {
		for _, method := range info.Methods {
			name := "/" + service + "/" + method.Name
			if _, ok := all[name]; !ok {
				t.Errorf("%s has no rule", name)
			}
			seen[name] = true
		}
	}
	for name := range all {
		if !seen[name] {
			t.Errorf("there is a rule for %s, and no such RPC", name)
		}
	}
	for _, method := range methods() {
		rule := all["/"+string(method.Parent().FullName())+"/"+string(method.Name())]
		if rule.open || rule.role == 0 || rule.role != leastRole(method) || rule.scope != leastScope(method) {
			t.Errorf("%s: %+v", method.FullName(), rule)
		}
		if access, ok := proto.GetExtension(method.Options(), executorv1.E_Access).(*executorv1.Access); !ok || access.GetRole() == 0 {
			t.Errorf("%s does not say in its proto who may call it", method.FullName())
		}
	}
	stranger := map[string]grpc.ServiceInfo{"harvest.executor.v1.NewService": {Methods: []grpc.MethodInfo{{Name: "Do"}}}}
	if err := checkRules(all, stranger); err == nil || !strings.Contains(err.Error(), "/harvest.executor.v1.NewService/Do has no access rule") {
		t.Errorf("%v", err)
	}
	if _, _, err := (&guard{rules: all}).admit(t.Context(), "/x/y"); err == nil {
		t.Error("what has no rule can be called")
	}
}

// TestRolesOfEveryRPC calls everything as everybody: who may not is told so, and nothing
// of the request has been looked at by then.
func TestRolesOfEveryRPC(t *testing.T) {
	b := guarded(t)
	conns := map[string]*grpc.ClientConn{"nobody": b.dial(), "a liar": b.dial(grpc.WithPerRPCCredentials(shows("Bearer exk_x")))}
	roles := map[string]auth.Role{"user": auth.User, "operator": auth.Operator, "admin": auth.Admin}
	for name, role := range roles {
		conns[name] = b.as(t, name, role)
	}
	for _, method := range methods() {
		for name, conn := range conns {
			t.Run(string(method.Name())+" as "+name, func(t *testing.T) {
				err := call(t.Context(), conn, method, dynamicpb.NewMessage(method.Input()))
				switch {
				case name == "nobody":
					wantError(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
				case name == "a liar":
					wantError(t, err, codes.Unauthenticated, "KEY_INVALID")
				case roles[name] < leastRole(method):
					d := wantError(t, err, codes.PermissionDenied, "ROLE_REQUIRED")
					if d.info.GetMetadata()["role"] != leastRole(method).String() {
						t.Errorf("%v", d.info)
					}
				default:
					if code := status.Code(err); code == codes.Unauthenticated || code == codes.PermissionDenied || code == codes.Internal {
						t.Errorf("%v", err)
					}
				}
			})
		}
	}
}

// Malformed requests of strangers are not looked at either.
func TestStrangersLearnNothing(t *testing.T) {
	b := guarded(t)
	b.executions.add(execution.Execution{ID: "e1", Owner: "key:ann"})
	conn := b.dial(grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})))
	for _, method := range methods() {
		wantError(t, call(t.Context(), conn, method, []byte{0x0a, 0x7f, 'x'}), codes.Unauthenticated, "CREDENTIALS_MISSING")
	}
}

// about makes a request about a thing, for any RPC.
func about(method protoreflect.MethodDescriptor, execution, session string) *dynamicpb.Message {
	request := dynamicpb.NewMessage(method.Input())
	fields := method.Input().Fields()
	set := func(name protoreflect.Name, value protoreflect.Value) {
		if fd := fields.ByName(name); fd != nil {
			request.Set(fd, value)
		}
	}
	set("parent", protoreflect.ValueOfString("sessions/"+session))
	name := "sessions/" + session + "/executions/" + execution
	switch kind := string(method.Name()); {
	case method.Parent().Name() != "SessionService":
	case strings.HasSuffix(kind, "Turn"):
		name = "sessions/" + session + "/turns/" + strings.Replace(execution, "e", "t", 1)
	case strings.HasSuffix(kind, "Interaction"):
		name = "sessions/" + session + "/interactions/" + strings.Replace(execution, "e", "i", 1)
	default:
		name = "sessions/" + session
	}
	set("name", protoreflect.ValueOfString(name))
	if fd := fields.ByName("command"); fd != nil {
		command := request.Mutable(fd).Message()
		command.Mutable(fd.Message().Fields().ByName("args")).List().Append(protoreflect.ValueOfString("true"))
	}
	if fd := fields.ByName("stream"); fd != nil {
		request.Set(fd, protoreflect.ValueOfEnum(1))
	}
	set("signal", protoreflect.ValueOfInt32(9))
	if fd := fields.ByName("prompt"); fd != nil {
		prompt := request.Mutable(fd).Message()
		prompt.Set(fd.Message().Fields().ByName("text"), protoreflect.ValueOfString("x"))
	}
	if fd := fields.ByName("resolution"); fd != nil {
		resolution := request.Mutable(fd).Message()
		resolution.Set(fd.Message().Fields().ByName("decision"), protoreflect.ValueOfEnum(1))
	}
	if fd := fields.ByName("start"); fd != nil { // of an attachment
		start := request.Mutable(fd).Message()
		start.Set(fd.Message().Fields().ByName("name"), protoreflect.ValueOfString(name))
	}
	return request
}

// TestNotYours calls every RPC that names something with another's: the answer is that
// for something that there never was, to the byte but for the name.
func TestNotYours(t *testing.T) {
	b := guarded(t)
	b.sessions.put(session.Session{ID: "s1", Owner: "key:ann", State: session.Running})
	b.executions.add(execution.Execution{ID: "e1", Session: "s1", Owner: "key:ann", State: execution.Running}).start()
	b.turns.add(turn.Turn{ID: "t1", Session: "s1", Owner: "key:ann", State: turn.Running}).append(turn.Event{Started: &turn.Started{}})
	b.turns.interactions = []turn.Interaction{{ID: "i1", Session: "s1", Turn: "t1", State: turn.Pending}}
	bob, ops := b.as(t, "bob", auth.User), b.as(t, "ops", auth.Operator)
	tried := 0
	for _, method := range methods() {
		fields := method.Input().Fields()
		if (fields.ByName("name") == nil && fields.ByName("parent") == nil && fields.ByName("start") == nil) || leastScope(method) == executorv1.Access_SCOPE_SERVER {
			continue
		}
		tried++
		t.Run(string(method.Name()), func(t *testing.T) {
			foreign := call(t.Context(), bob, method, about(method, "e1", "s1"))
			unknown := call(t.Context(), bob, method, about(method, "e0", "s0"))
			if strings.HasPrefix(string(method.Name()), "List") && status.Code(foreign) == codes.OK {
				// A listing says only what there is for the caller.
				if foreign != nil || unknown != nil {
					t.Errorf("%v, %v", foreign, unknown)
				}
				return
			}
			if status.Code(foreign) != codes.NotFound {
				t.Fatalf("%v", foreign)
			}
			text := func(err error) string {
				return strings.NewReplacer("e0", "e1", "s0", "s1", "t0", "t1", "i0", "i1").Replace(status.Convert(err).Proto().String())
			}
			plain := func(s string) string { return strings.Join(strings.Fields(s), " ") }
			if plain(text(foreign)) != plain(text(unknown)) {
				t.Errorf("%s\nbut for one that never was\n%s", text(foreign), text(unknown))
			}
		})
	}
	if len(b.turns.requests)+len(b.turns.answers) > 0 {
		t.Error("a stranger was let through")
	}
	if tried < 22 {
		t.Errorf("only %d RPCs were tried", tried)
	}
	if e, err := b.executions.Get(t.Context(), execution.Ref{Session: "s1", ID: "e1", Caller: auth.Local().Caller()}); err != nil || e.State != execution.Running {
		t.Errorf("a stranger changed it: %v, %v", e, err)
	}
	// What an operator asks for is there.
	got, err := executorv1.NewExecutorServiceClient(ops).GetExecution(t.Context(), &executorv1.GetExecutionRequest{Name: "sessions/s1/executions/e1"})
	if err != nil || got.GetExecution().GetOwner() != "key:ann" {
		t.Errorf("%v, %v", got, err)
	}
	if s, err := executorv1.NewSessionServiceClient(ops).GetSession(t.Context(), &executorv1.GetSessionRequest{Name: "sessions/s1"}); err != nil || s.GetSession().GetOwner() != "key:ann" {
		t.Errorf("%v, %v", s, err)
	}
}

func TestOwnerAndLists(t *testing.T) {
	b := guarded(t)
	ann, bob := executorv1.NewExecutorServiceClient(b.as(t, "ann", auth.User)), executorv1.NewExecutorServiceClient(b.as(t, "bob", auth.User))
	ops := executorv1.NewExecutorServiceClient(b.as(t, "ops", auth.Operator))
	started, err := ann.StartExecution(t.Context(), &executorv1.StartExecutionRequest{Command: &executorv1.Command{Args: []string{"true"}}})
	if err != nil || started.GetExecution().GetOwner() != "key:ann" {
		t.Fatalf("%v, %v", started, err)
	}
	for _, id := range []string{"a1", "a2", "a3"} {
		b.executions.add(execution.Execution{ID: id, Owner: "key:ann"})
		b.executions.add(execution.Execution{ID: "b" + id, Owner: "key:bob"})
	}
	for name, test := range map[string]struct {
		client executorv1.ExecutorServiceClient
		want   int
	}{"ann": {ann, 4}, "bob": {bob, 3}, "ops": {ops, 7}} {
		list, err := test.client.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{})
		if err != nil || len(list.GetExecutions()) != test.want {
			t.Errorf("%s sees %d (%v), want %d", name, len(list.GetExecutions()), err, test.want)
		}
	}
	// A page token is its caller's; a second key of the same owner goes on with it.
	first, err := ann.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{PageSize: 2})
	if err != nil || first.GetNextPageToken() == "" {
		t.Fatalf("%v, %v", first, err)
	}
	next := &executorv1.ListExecutionsRequest{PageSize: 2, PageToken: first.GetNextPageToken()}
	for name, other := range map[string]executorv1.ExecutorServiceClient{"bob": bob, "ops": ops} {
		_, err := other.ListExecutions(t.Context(), next)
		if d := wantError(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN"); !slices.Equal(d.fields(), []string{"page_token"}) {
			t.Errorf("%s: %v", name, d.bad)
		}
	}
	again := executorv1.NewExecutorServiceClient(b.as(t, "ann", auth.User))
	if page, err := again.ListExecutions(t.Context(), next); err != nil || len(page.GetExecutions()) != 2 {
		t.Errorf("%v, %v", page, err)
	}
}

// A request_id is its caller's: another's with the same is another request.
func TestRequestIDsAreTheirCallers(t *testing.T) {
	keys, err := newRequestKeys(nil)
	if err != nil {
		t.Fatal(err)
	}
	request := &executorv1.CreateSessionRequest{RequestId: "r1"}
	for _, principal := range []auth.Principal{{Name: "key:ann", Role: auth.User}, {Name: "key:bob", Role: auth.Admin}, auth.Local()} {
		key, err := keys.of(context.WithValue(t.Context(), principalKey{}, principal), request)
		if err != nil || key.Owner != principal.Name {
			t.Errorf("%+v, %v", key, err)
		}
	}
}

func TestCancelledByNamesTheCaller(t *testing.T) {
	b := guarded(t)
	b.executions.add(execution.Execution{ID: "e1", Owner: "key:ann"})
	ops := executorv1.NewExecutorServiceClient(b.as(t, "ops", auth.Operator))
	resp, err := ops.CancelExecution(t.Context(), &executorv1.CancelExecutionRequest{Name: "executions/e1", Requester: "key:ann at home"})
	if err != nil {
		t.Fatal(err)
	}
	if by := resp.GetExecution().GetResult().GetCancelledBy(); !strings.HasPrefix(by, "key:ops at ") || !strings.HasSuffix(by, " (key:ann at home)") {
		t.Errorf("cancelled by %q", by)
	}
	b.sessions.put(session.Session{ID: "s1", Owner: "key:ops", State: session.Running})
	ended, err := executorv1.NewSessionServiceClient(b.as(t, "ops", auth.User)).TerminateSession(t.Context(), &executorv1.TerminateSessionRequest{Name: "sessions/s1"})
	if err != nil || !strings.HasPrefix(ended.GetSession().GetDetail(), "by key:ops at ") {
		t.Errorf("%v, %v", ended, err)
	}
}

func TestAuthService(t *testing.T) {
	b := guarded(t)
	admin := executorv1.NewAuthServiceClient(b.as(t, "root", auth.Admin))
	made, err := admin.CreateApiKey(t.Context(), &executorv1.CreateApiKeyRequest{DisplayName: "ci", Role: executorv1.Role_ROLE_OPERATOR})
	if err != nil {
		t.Fatal(err)
	}
	key := made.GetApiKey()
	if key.GetDisplayName() != "ci" || key.GetRole() != executorv1.Role_ROLE_OPERATOR || key.GetPrincipal() != "key:ci" || key.GetCreateTime() == nil ||
		key.GetExpireTime() != nil || made.GetKey() == "" || !strings.Contains(made.GetKey(), strings.TrimPrefix(key.GetName(), "apiKeys/")) {
		t.Errorf("%v", made)
	}
	ci := executorv1.NewAuthServiceClient(b.dial(grpc.WithPerRPCCredentials(shows("Bearer " + made.GetKey()))))
	who, err := ci.GetCaller(t.Context(), &executorv1.GetCallerRequest{})
	if err != nil || who.GetPrincipal() != "key:ci" || who.GetRole() != executorv1.Role_ROLE_OPERATOR {
		t.Errorf("%v, %v", who, err)
	}
	list, err := admin.ListApiKeys(t.Context(), &executorv1.ListApiKeysRequest{PageSize: 1})
	if err != nil || len(list.GetApiKeys()) != 1 || list.GetApiKeys()[0].GetName() != key.GetName() || list.GetNextPageToken() == "" || list.GetApiKeys()[0].GetLastUseTime() == nil {
		t.Errorf("%v, %v", list, err)
	}
	if list, err = admin.ListApiKeys(t.Context(), &executorv1.ListApiKeysRequest{PageSize: 1, PageToken: list.GetNextPageToken()}); err != nil || len(list.GetApiKeys()) != 1 || list.GetNextPageToken() != "" {
		t.Errorf("%v, %v", list, err)
	}
	revoked, err := admin.RevokeApiKey(t.Context(), &executorv1.RevokeApiKeyRequest{Name: key.GetName()})
	if err != nil || revoked.GetApiKey().GetRevokeTime() == nil {
		t.Errorf("%v, %v", revoked, err)
	}
	_, err = ci.GetCaller(t.Context(), &executorv1.GetCallerRequest{})
	wantError(t, err, codes.Unauthenticated, "KEY_REVOKED")
	_, err = admin.RevokeApiKey(t.Context(), &executorv1.RevokeApiKeyRequest{Name: "apiKeys/none"})
	if d := wantError(t, err, codes.NotFound, "KEY_NOT_FOUND"); d.resource.GetResourceType() != "harvest.executor.v1.ApiKey" || d.resource.GetResourceName() != "apiKeys/none" {
		t.Errorf("%v", d.resource)
	}
	for page, want := range map[bool]int{false: 1, true: 2} {
		list, err := admin.ListApiKeys(t.Context(), &executorv1.ListApiKeysRequest{ShowEnded: page})
		if err != nil || len(list.GetApiKeys()) != want {
			t.Errorf("%v: %v, %v", page, list, err)
		}
	}
	if strings.Contains(b.logs.String(), made.GetKey()[20:]) {
		t.Error("the log has a key")
	}
}

// TestSecretsStayOut: whatever is shown and refused, no part of it is logged or told.
func TestSecretsStayOut(t *testing.T) {
	b := guarded(t)
	const canary = "canary4f8e1d"
	_, good := b.key(t, "ann", auth.User)
	for _, header := range []string{
		"Bearer " + canary, "Bearer exk_" + canary, "Basic " + canary, canary, "Bearer " + good + canary, "Bearer " + good[:len(good)-12] + canary,
		"Bearer eyJhbGciOiJub25lIn0." + canary + ".", "bearer " + canary + " " + canary,
	} {
		conn := b.dial(grpc.WithPerRPCCredentials(shows(header)))
		_, err := executorv1.NewAuthServiceClient(conn).GetCaller(t.Context(), &executorv1.GetCallerRequest{})
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("%v", err)
		}
		if text := status.Convert(err).Proto().String(); strings.Contains(text, canary) {
			t.Errorf("the answer has it: %s", text)
		}
	}
	conn := b.dial(grpc.WithPerRPCCredentials(shows("Bearer " + good)))
	if _, err := executorv1.NewAuthServiceClient(conn).GetCaller(t.Context(), &executorv1.GetCallerRequest{}); err != nil {
		t.Fatal(err)
	}
	logs := b.logs.String()
	if strings.Contains(logs, canary) || strings.Contains(logs, good[21:]) {
		t.Errorf("the log has a credential:\n%s", logs)
	}
	for _, want := range []string{"caller=key:ann", "callers refused", "reason=KEY_INVALID", "reason=CREDENTIALS_MALFORMED"} {
		if !strings.Contains(logs, want) {
			t.Errorf("the log is without %s:\n%s", want, logs)
		}
	}
}

// Somebody who guesses does not fill the log, and all guesses are counted.
func TestRefusalsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		logs := &syncBuffer{}
		r := &refusals{logger: textLogger(logs)}
		for range 1000 {
			r.note(t.Context(), fault.New(fault.Unauthenticated, "KEY_INVALID", "x"))
			time.Sleep(50 * time.Millisecond)
		}
		r.note(t.Context(), fault.New(fault.Unauthenticated, "TOKEN_EXPIRED", "x"))
		if lines := strings.Count(logs.String(), "callers refused"); lines < 5 || lines > 7 || !strings.Contains(logs.String(), "KEY_INVALID=200") {
			t.Errorf("%d lines:\n%s", lines, logs)
		}
	})
}

// A key that is revoked ends the streams and the waiting that were begun with it.
func TestRevocationEndsStreams(t *testing.T) {
	b := guarded(t)
	b.executions.add(execution.Execution{ID: "e1", Owner: "key:ann"}).start()
	key, text := b.key(t, "ann", auth.User)
	_, other := b.key(t, "ann", auth.User)
	open := func(text string) grpc.ServerStreamingClient[executorv1.WatchExecutionResponse] {
		conn := b.dial(grpc.WithPerRPCCredentials(shows("Bearer " + text)))
		stream, err := executorv1.NewExecutorServiceClient(conn).WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{Name: "executions/e1"})
		if err == nil {
			_, err = stream.Recv()
		}
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	stream, untouched := open(text), open(other)
	waiting := make(chan error, 1)
	conn := b.dial(grpc.WithPerRPCCredentials(shows("Bearer " + text)))
	began := make(chan struct{}, 1)
	b.executions.hook = func(_ context.Context, method string) error {
		if method == "Wait" {
			began <- struct{}{}
		}
		return nil
	}
	go func() {
		_, err := executorv1.NewExecutorServiceClient(conn).WaitExecution(t.Context(), &executorv1.WaitExecutionRequest{Name: "executions/e1"})
		waiting <- err
	}()
	<-began
	if _, err := b.keys.Revoke(t.Context(), key.ID); err != nil {
		t.Fatal(err)
	}
	_, err := stream.Recv()
	wantError(t, err, codes.Unauthenticated, "KEY_REVOKED")
	wantError(t, <-waiting, codes.Unauthenticated, "KEY_REVOKED")
	log, err := b.executions.log(execution.Ref{ID: "e1", Caller: auth.Local().Caller()})
	if err != nil {
		t.Fatal(err)
	}
	log.exit(0)
	for {
		if _, err := untouched.Recv(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("another key's stream: %v", err)
		}
	}
}

func TestHealthIsOpenAndReflectionIsNot(t *testing.T) {
	b := guarded(t)
	if _, err := healthpb.NewHealthClient(b.dial()).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("health: %v", err)
	}
	ask := func(conn *grpc.ClientConn) error {
		stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
		if err != nil {
			return err
		}
		request := &reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}
		if err := stream.Send(request); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		_, err = stream.Recv()
		return err
	}
	wantError(t, ask(b.dial()), codes.Unauthenticated, "CREDENTIALS_MISSING")
	if err := ask(b.as(t, "ann", auth.User)); err != nil {
		t.Errorf("reflection: %v", err)
	}
	if err := ask(newBench(t).dial()); err != nil {
		t.Errorf("reflection where nobody is asked: %v", err)
	}
}

func TestQuotaStatus(t *testing.T) {
	b := newBench(t)
	b.executions.hook = func(context.Context, string) error {
		return fault.Exceeded(fault.Quota{Subject: "key:ann", Name: "sessions", Limit: 2}, 5*time.Second, "too many")
	}
	_, err := b.executor.GetExecution(t.Context(), &executorv1.GetExecutionRequest{Name: "executions/e1"})
	d := wantError(t, err, codes.ResourceExhausted, "QUOTA_EXCEEDED")
	if v := d.quota.GetViolations(); len(v) != 1 || v[0].GetSubject() != "key:ann" || v[0].GetQuotaId() != "sessions" || v[0].GetQuotaValue() != 2 || v[0].GetDescription() != "too many" {
		t.Errorf("%v", d.quota)
	}
	if d.retry.GetRetryDelay().AsDuration() != 5*time.Second || !maps.Equal(d.info.GetMetadata(), map[string]string{"quota": "sessions", "limit": "2"}) {
		t.Errorf("%v, %v", d.retry, d.info)
	}
}
