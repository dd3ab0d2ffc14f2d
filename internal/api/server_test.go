package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/auth"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// call calls any RPC with any request and returns its error; the responses are read to
// the end.
func call(ctx context.Context, conn *grpc.ClientConn, method protoreflect.MethodDescriptor, request any) error {
	desc := &grpc.StreamDesc{ServerStreams: true, ClientStreams: method.IsStreamingClient()}
	name := fmt.Sprintf("/%s/%s", method.Parent().FullName(), method.Name())
	stream, err := conn.NewStream(ctx, desc, name)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(request); err != nil {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	for {
		err := stream.RecvMsg(dynamicpb.NewMessage(method.Output()))
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func methods() []protoreflect.MethodDescriptor {
	var all []protoreflect.MethodDescriptor
	for _, service := range serviceDescriptors() {
		for i := range service.Methods().Len() {
			all = append(all, service.Methods().Get(i))
		}
	}
	return all
}

// TestEveryRPC walks the descriptors: a new RPC that nobody implements, or whose
// requests nobody checks, fails here.
func TestEveryRPC(t *testing.T) {
	b := newBench(t)
	conn := b.dial()
	// These have no field that could be wrong.
	unchecked := map[string]bool{"GetServerInfo": true, "GetCaller": true}
	for _, method := range methods() {
		t.Run(string(method.Name()), func(t *testing.T) {
			// A name of the wrong form and an impossible page token are wrong everywhere.
			request := dynamicpb.NewMessage(method.Input())
			for field, value := range map[protoreflect.Name]protoreflect.Value{
				"name": protoreflect.ValueOfString("?"), "parent": protoreflect.ValueOfString("?"),
				"page_size": protoreflect.ValueOfInt32(-1),
			} {
				if fd := method.Input().Fields().ByName(field); fd != nil {
					request.Set(fd, value)
				}
			}
			if fd := method.Input().Fields().ByName("lifetime"); fd != nil {
				lifetime := dynamicpb.NewMessage(fd.Message())
				lifetime.Set(fd.Message().Fields().ByName("seconds"), protoreflect.ValueOfInt64(-1))
				request.Set(fd, protoreflect.ValueOfMessage(lifetime))
			}
			err := call(t.Context(), conn, method, request)
			if status.Code(err) == codes.Unimplemented {
				t.Fatalf("not implemented: %v", err)
			}
			if unchecked[string(method.Name())] {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			d := wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
			if len(d.fields()) == 0 {
				t.Error("no field violations")
			}
		})
	}
}

// TestEveryRPCPassesFaultsOn walks the descriptors with requests that are right and a
// domain that refuses.
func TestEveryRPCPassesFaultsOn(t *testing.T) {
	b := newBench(t)
	refusal := fault.New(fault.Exhausted, "DISK_FULL", "no room").With("free", "0")
	b.executions.hook = func(context.Context, string) error { return refusal }
	b.sessions.err = refusal
	b.turns.err = refusal
	b.info.err = refusal
	b.images.err = refusal
	key, _, err := b.keys.Create(t.Context(), auth.NewKey{Name: "ann", Role: auth.User})
	if err != nil {
		t.Fatal(err)
	}
	b.keyStore.err = refusal
	// These ask nobody.
	certain := map[protoreflect.Name]bool{"GetCaller": true, "ListApiKeys": true}
	command := &executorv1.Command{Args: []string{"true"}}
	const name, session = "executions/e1", "sessions/s1"
	requests := map[protoreflect.Name]any{
		"Execute":         &executorv1.ExecuteRequest{Command: command},
		"StartExecution":  &executorv1.StartExecutionRequest{Command: command},
		"WatchExecution":  &executorv1.WatchExecutionRequest{Name: name},
		"ReadOutput":      &executorv1.ReadOutputRequest{Name: name, Stream: executorv1.Stream_STREAM_STDERR},
		"WaitExecution":   &executorv1.WaitExecutionRequest{Name: name},
		"GetExecution":    &executorv1.GetExecutionRequest{Name: name},
		"ListExecutions":  &executorv1.ListExecutionsRequest{},
		"CancelExecution": &executorv1.CancelExecutionRequest{Name: name},
		"WriteInput":      &executorv1.WriteInputRequest{Name: name, Data: []byte("x")},
		"SignalExecution": &executorv1.SignalExecutionRequest{Name: name, Signal: 15},
		"AttachExecution": &executorv1.AttachExecutionRequest{Message: &executorv1.AttachExecutionRequest_Start{
			Start: &executorv1.AttachStart{Name: name},
		}},
		"DeleteExecution":  &executorv1.DeleteExecutionRequest{Name: name},
		"CreateSession":    &executorv1.CreateSessionRequest{},
		"GetSession":       &executorv1.GetSessionRequest{Name: session},
		"ListSessions":     &executorv1.ListSessionsRequest{},
		"TerminateSession": &executorv1.TerminateSessionRequest{Name: session},
		"SendPrompt":       &executorv1.SendPromptRequest{Parent: session, Prompt: &executorv1.Prompt{Text: "x"}},
		"WatchTurn":        &executorv1.WatchTurnRequest{Name: session + "/turns/t1"},
		"GetTurn":          &executorv1.GetTurnRequest{Name: session + "/turns/t1"},
		"ListTurns":        &executorv1.ListTurnsRequest{Parent: session},
		"CancelTurn":       &executorv1.CancelTurnRequest{Name: session + "/turns/t1"},
		"ListMessages":     &executorv1.ListMessagesRequest{Parent: session},
		"ListInteractions": &executorv1.ListInteractionsRequest{Parent: session},
		"ResolveInteraction": &executorv1.ResolveInteractionRequest{
			Name: session + "/interactions/i1", Resolution: &executorv1.Resolution{Decision: executorv1.Resolution_DECISION_REJECT},
		},
		"UpdateSession": &executorv1.UpdateSessionRequest{
			Session: &executorv1.Session{Name: session}, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels"}},
		},
		"WatchSession":  &executorv1.WatchSessionRequest{Name: session},
		"PauseSession":  &executorv1.PauseSessionRequest{Name: session},
		"ResumeSession": &executorv1.ResumeSessionRequest{Name: session},
		"ForkSession":   &executorv1.ForkSessionRequest{Name: session},
		"GetDiff":       &executorv1.GetDiffRequest{Name: session},
		"GetServerInfo": &executorv1.GetServerInfoRequest{},
		"CreateApiKey":  &executorv1.CreateApiKeyRequest{DisplayName: "ann", Role: executorv1.Role_ROLE_USER},
		"RevokeApiKey":  &executorv1.RevokeApiKeyRequest{Name: "apiKeys/" + key.ID},
		"BuildImage":    &executorv1.BuildImageRequest{Name: "images/base"},
		"WatchBuild":    &executorv1.WatchBuildRequest{Name: "images/base/builds/b1"},
		"GetImage":      &executorv1.GetImageRequest{Name: "images/base"},
		"ListImages":    &executorv1.ListImagesRequest{},
		"DeleteImage":   &executorv1.DeleteImageRequest{Name: "images/base"},
	}
	conn := b.dial()
	for _, method := range methods() {
		t.Run(string(method.Name()), func(t *testing.T) {
			request, ok := requests[method.Name()]
			if certain[method.Name()] {
				t.Skip("it answers from memory")
			}
			if !ok {
				t.Fatal("this test has no good request for it")
			}
			d := wantError(t, call(t.Context(), conn, method, request), codes.ResourceExhausted, "DISK_FULL")
			if d.info.GetMetadata()["free"] != "0" {
				t.Errorf("metadata is %v", d.info.GetMetadata())
			}
		})
	}
}

func TestMalformedRequest(t *testing.T) {
	b := newBench(t)
	conn := b.dial(grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})))
	for _, method := range methods() {
		if method.Name() == "GetServerInfo" || method.Name() == "GetCaller" {
			continue // Any bytes that are protobuf are good.
		}
		t.Run(string(method.Name()), func(t *testing.T) {
			for label, raw := range map[string][]byte{
				"invalid UTF-8": firstString(method.Input()),
				"truncated":     {0x0a, 0x7f, 'x'},
			} {
				if raw == nil {
					continue // It has no text.
				}
				err := call(t.Context(), conn, method, raw)
				wantError(t, err, codes.InvalidArgument, "MALFORMED_REQUEST")
				if !strings.Contains(err.Error(), "cannot be decoded") {
					t.Errorf("%s: %v", label, err)
				}
			}
		})
	}
}

// firstString encodes the string field that the message or the first message in it
// has, with bytes that are no UTF-8.
func firstString(message protoreflect.MessageDescriptor) []byte {
	bad := []byte{0xff, 0xfe}
	for i := range message.Fields().Len() {
		if fd := message.Fields().Get(i); fd.Kind() == protoreflect.StringKind {
			return append([]byte{byte(fd.Number()<<3 | 2), byte(len(bad))}, bad...)
		}
	}
	for i := range message.Fields().Len() {
		if fd := message.Fields().Get(i); fd.IsMap() {
			key := append([]byte{1<<3 | 2, byte(len(bad))}, bad...)
			return append([]byte{byte(fd.Number()<<3 | 2), byte(len(key))}, key...)
		}
	}
	for i := range message.Fields().Len() {
		if fd := message.Fields().Get(i); fd.Message() != nil && !fd.IsList() {
			if inner := firstString(fd.Message()); inner != nil {
				return append([]byte{byte(fd.Number()<<3 | 2), byte(len(inner))}, inner...)
			}
		}
	}
	return nil
}

// rawCodec sends bytes as they are and drops what comes.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return v.([]byte), nil }
func (rawCodec) Unmarshal([]byte, any) error   { return nil }
func (rawCodec) Name() string                  { return "proto" }

func TestPanic(t *testing.T) {
	b := newBench(t)
	b.executions.add(execution.Execution{ID: "e1"}).start()
	watching, err := b.executor.WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{Name: "executions/e1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watching.Recv(); err != nil {
		t.Fatal(err)
	}
	b.executions.hook = func(_ context.Context, method string) error { panic("secret of " + method) }
	incidents := make(map[string]bool)
	conn := b.dial()
	for method, request := range map[protoreflect.Name]any{
		"GetExecution":   &executorv1.GetExecutionRequest{Name: "executions/e1"},
		"WatchExecution": &executorv1.WatchExecutionRequest{Name: "executions/e1"},
		// This one panics in the sender.
		"ReadOutput": &executorv1.ReadOutputRequest{Name: "executions/e1", Stream: executorv1.Stream_STREAM_STDOUT},
	} {
		descriptor := serviceDescriptors()[0].Methods().ByName(method)
		err := call(t.Context(), conn, descriptor, request)
		d := wantError(t, err, codes.Internal, "PANIC")
		incident := d.info.GetMetadata()["incident"]
		if incident == "" || incidents[incident] {
			t.Fatalf("%s: incident is %q after %v", method, incident, incidents)
		}
		incidents[incident] = true
		if strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), ".go:") {
			t.Errorf("%s: the client sees %v", method, err)
		}
		logged := regexp.MustCompile(`incident=` + incident + ` .*secret of .*fakes_test\.go`)
		if !logged.MatchString(b.logs.String()) {
			t.Errorf("%s: the log lacks incident, panic or stack:\n%s", method, b.logs.String())
		}
	}
	// Others go on.
	b.executions.hook = nil
	l, err := b.executions.log(execution.Ref{ID: "e1"})
	if err != nil {
		t.Fatal(err)
	}
	l.output(stdout, "alive")
	if resp, err := watching.Recv(); err != nil || string(resp.GetEvent().GetOutput().GetData()) != "alive" {
		t.Fatalf("the other stream got %v, %v", resp, err)
	}
	if _, err := b.executor.GetExecution(t.Context(), &executorv1.GetExecutionRequest{Name: "executions/e1"}); err != nil {
		t.Fatal(err)
	}
}

func TestHealth(t *testing.T) {
	b := newBench(t)
	client := healthpb.NewHealthClient(b.dial())
	check := func(want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for _, service := range []string{"", "harvest.executor.v1.ExecutorService", "harvest.executor.v1.SessionService", "harvest.executor.v1.AdminService"} {
			resp, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
			if err != nil || resp.GetStatus() != want {
				t.Errorf("%q is %v, %v; want %v", service, resp.GetStatus(), err, want)
			}
		}
	}
	check(healthpb.HealthCheckResponse_SERVING)
	b.server.SetServing(false)
	check(healthpb.HealthCheckResponse_NOT_SERVING)
}

func TestReflection(t *testing.T) {
	for _, enabled := range []bool{true, false} {
		t.Run(fmt.Sprint(enabled), func(t *testing.T) {
			b := newBench(t, func(c *Config) { c.Reflection = enabled })
			stream, err := reflectionpb.NewServerReflectionClient(b.dial()).ServerReflectionInfo(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			request := &reflectionpb.ServerReflectionRequest{
				MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
			}
			if err := stream.Send(request); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			resp, err := stream.Recv()
			if !enabled {
				if status.Code(err) != codes.Unimplemented {
					t.Fatalf("%v, %v", resp, err)
				}
				return
			}
			if err != nil || !strings.Contains(resp.String(), "harvest.executor.v1.ExecutorService") {
				t.Fatalf("%v, %v", resp, err)
			}
			if err := stream.CloseSend(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestAccessLogHasNoPayload(t *testing.T) {
	b := newBench(t)
	_, err := b.executor.StartExecution(t.Context(), &executorv1.StartExecutionRequest{
		Command: &executorv1.Command{Args: []string{"canary-arg"}, Env: map[string]string{"TOKEN": "canary-env"}},
		Labels:  map[string]string{"label": "canary-label"},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.executor.StartExecution(t.Context(), &executorv1.StartExecutionRequest{
		Command: &executorv1.Command{Args: []string{"true"}, Env: map[string]string{"TOKEN": "canary-env\x00"}},
	})
	wantError(t, err, codes.InvalidArgument, "INVALID_FIELD")
	if strings.Contains(err.Error(), "canary") {
		t.Errorf("the error has the value: %v", err)
	}
	logs := b.logs.String()
	if strings.Contains(logs, "canary") {
		t.Errorf("the log has the payload:\n%s", logs)
	}
	for _, want := range []string{
		"method=/harvest.executor.v1.ExecutorService/StartExecution code=OK duration=",
		"code=InvalidArgument", "reason=INVALID_FIELD", "peer=bufconn",
	} {
		if !strings.Contains(logs, want) {
			t.Errorf("the log lacks %q:\n%s", want, logs)
		}
	}
}

// TestGracefulStop lets streams end by themselves.
func TestGracefulStop(t *testing.T) {
	b := newBench(t)
	l := b.executions.add(execution.Execution{ID: "e1"})
	l.start()
	stream, err := b.executor.WatchExecution(t.Context(), &executorv1.WatchExecutionRequest{Name: "executions/e1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	var stopping sync.WaitGroup
	stopping.Go(func() {
		defer close(stopped)
		b.server.GracefulStop()
	})
	t.Cleanup(stopping.Wait)
	select {
	case <-stopped:
		t.Fatal("stopped while a stream was open")
	case <-time.After(50 * time.Millisecond):
	}
	l.exit(0)
	if resp, err := stream.Recv(); err != nil || resp.GetEvent().GetResult() == nil {
		t.Fatalf("%v, %v", resp, err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	<-stopped
}

// TestKeepalive: a client that asks every 10 s whether the server lives is not taken for
// an attacker, with an idle stream and without any.
func TestKeepalive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.executions.add(execution.Execution{ID: "e1"}).start()
		conn := b.dial(grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true,
		}))
		// Without a stream.
		admin := executorv1.NewAdminServiceClient(conn)
		if _, err := admin.GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		if state := conn.GetState(); state != connectivity.Ready {
			t.Errorf("the connection is %v", state)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		stream, err := executorv1.NewExecutorServiceClient(conn).WatchExecution(ctx,
			&executorv1.WatchExecutionRequest{Name: "executions/e1", HeartbeatInterval: durationpb.New(5 * time.Minute)})
		if err != nil {
			t.Fatal(err)
		}
		for range 4 {
			if _, err := stream.Recv(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// TestStoppedBeforeItServes: a stop that comes very early is no error.
func TestStoppedBeforeItServes(t *testing.T) {
	b := newBench(t)
	b.server.Stop()
	if err := b.server.Serve(bufconn.Listen(1)); err != nil {
		t.Error(err)
	}
}

// TestMessageTooLarge is grpc-go's own refusal; the connection stays usable.
func TestMessageTooLarge(t *testing.T) {
	b := newBench(t)
	_, err := b.executor.StartExecution(t.Context(), &executorv1.StartExecutionRequest{
		Command: &executorv1.Command{Args: []string{strings.Repeat("x", 5<<20)}},
	})
	if status.Code(err) != codes.ResourceExhausted {
		t.Fatal(err)
	}
	if _, err := b.admin.GetServerInfo(t.Context(), &executorv1.GetServerInfoRequest{}); err != nil {
		t.Fatal(err)
	}
}
