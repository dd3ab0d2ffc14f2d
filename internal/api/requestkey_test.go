package api

import (
	"strings"
	"testing"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/idempotency"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
)

func keyOf(t *testing.T, k *requestKeys, req namedRequest) idempotency.Key {
	t.Helper()
	key, err := k.of(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newKeys(t *testing.T, secret string) *requestKeys {
	t.Helper()
	k, err := newRequestKeys([]byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func fullRequest() *executorv1.ExecuteRequest {
	return &executorv1.ExecuteRequest{
		Parent: "sessions/s1",
		Command: &executorv1.Command{
			Args: []string{"a", "b"}, Env: map[string]string{"A": "1", "B": "2", "C": "3"},
			Timeout: durationpb.New(time.Second), WorkingDirectory: "/w",
		},
		Limits: &executorv1.Limits{Pids: 10}, OutputPolicy: &executorv1.OutputPolicy{RetainedBytes: 1 << 20},
		Labels: map[string]string{"x": "1", "y": "2"}, RequestId: "r1",
	}
}

func TestFingerprint(t *testing.T) {
	keys := newKeys(t, "secret")
	want := keyOf(t, keys, fullRequest())
	if want.ID != "r1" || want.Method != "Execute" || want.Owner != "" || len(want.Fingerprint) != 64 {
		t.Errorf("%+v", want)
	}
	for name, change := range map[string]func(*executorv1.ExecuteRequest){
		"nothing":               func(*executorv1.ExecuteRequest) {},
		"how it is shown":       func(r *executorv1.ExecuteRequest) { r.HeartbeatInterval = durationpb.New(time.Second) },
		"the order of its maps": func(r *executorv1.ExecuteRequest) { r.Labels = map[string]string{"y": "2", "x": "1"} },
	} {
		for range 20 { // maps are encoded in another order each time, unless one takes care
			r := fullRequest()
			change(r)
			if got := keyOf(t, keys, r); got != want {
				t.Fatalf("%s: %+v, want %+v", name, got, want)
			}
		}
	}
	r := fullRequest()
	keyOf(t, keys, r)
	if !proto.Equal(r, fullRequest()) {
		t.Error("the request was changed")
	}
	for name, change := range map[string]func(*executorv1.ExecuteRequest){
		"parent":      func(r *executorv1.ExecuteRequest) { r.Parent = "" },
		"args":        func(r *executorv1.ExecuteRequest) { r.Command.Args[1] = "c" },
		"env value":   func(r *executorv1.ExecuteRequest) { r.Command.Env["A"] = "2" },
		"env name":    func(r *executorv1.ExecuteRequest) { r.Command.Env = map[string]string{"A": "1", "B": "2", "D": "3"} },
		"timeout":     func(r *executorv1.ExecuteRequest) { r.Command.Timeout = durationpb.New(2 * time.Second) },
		"no timeout":  func(r *executorv1.ExecuteRequest) { r.Command.Timeout = nil },
		"limits":      func(r *executorv1.ExecuteRequest) { r.Limits.Pids++ },
		"policy":      func(r *executorv1.ExecuteRequest) { r.OutputPolicy = nil },
		"label":       func(r *executorv1.ExecuteRequest) { r.Labels["x"] = "2" },
		"a new field": func(r *executorv1.ExecuteRequest) { r.ProtoReflect().SetUnknown([]byte{0xf8, 0x07, 1}) },
	} {
		r := fullRequest()
		change(r)
		if got := keyOf(t, keys, r); got.Fingerprint == want.Fingerprint || got.ID != "r1" {
			t.Errorf("%s: the same fingerprint", name)
		}
	}
	if other := keyOf(t, newKeys(t, "other"), fullRequest()); other.Fingerprint == want.Fingerprint {
		t.Error("anybody can make the fingerprint")
	}
	if random := keyOf(t, newKeys(t, ""), fullRequest()); random == keyOf(t, newKeys(t, ""), fullRequest()) {
		t.Error("two servers without a key have the same one")
	}
	r.RequestId = ""
	if got := keyOf(t, keys, r); got != (idempotency.Key{}) {
		t.Errorf("without a request_id: %+v", got)
	}
}

// TestKeysOfAllMethods also keeps two methods with equal parameters apart.
func TestKeysOfAllMethods(t *testing.T) {
	keys := newKeys(t, "secret")
	for _, req := range []namedRequest{
		&executorv1.ExecuteRequest{RequestId: "r1"}, &executorv1.StartExecutionRequest{RequestId: "r1"},
		&executorv1.CancelExecutionRequest{RequestId: "r1"}, &executorv1.DeleteExecutionRequest{RequestId: "r1"},
		&executorv1.CreateSessionRequest{RequestId: "r1"}, &executorv1.TerminateSessionRequest{RequestId: "r1"},
		&executorv1.SignalExecutionRequest{RequestId: "r1"},
		&executorv1.SendPromptRequest{RequestId: "r1"}, &executorv1.CancelTurnRequest{RequestId: "r1"},
		&executorv1.ResolveInteractionRequest{RequestId: "r1"},
	} {
		method := keyOf(t, keys, req).Method
		if full := string(req.ProtoReflect().Descriptor().Name()); method+"Request" != full {
			t.Errorf("%s is of the method %s", full, method)
		}
	}
}

// TestMutationsCanBeRepeated: whatever changes something has a request_id. A new RPC that
// neither has one nor only reads fails here.
func TestMutationsCanBeRepeated(t *testing.T) {
	// A key is told once and not kept, so its making cannot be repeated; a revocation can
	// without more. What is written by WriteInput and AttachExecution is addressed by offset.
	exempt := map[protoreflect.Name]bool{"CreateApiKey": true, "RevokeApiKey": true, "WriteInput": true, "AttachExecution": true}
	for _, service := range serviceDescriptors() {
		for i := range service.Methods().Len() {
			method := service.Methods().Get(i)
			reads := exempt[method.Name()]
			for _, prefix := range []string{"Get", "List", "Watch", "Wait", "Read"} {
				reads = reads || strings.HasPrefix(string(method.Name()), prefix)
			}
			if named := method.Input().Fields().ByName("request_id") != nil; named == reads {
				t.Errorf("%s: request_id %t, only reads %t", method.FullName(), named, reads)
			}
		}
	}
}

// TestKeysReachTheDomain: each method hands its key on.
func TestKeysReachTheDomain(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	b.executions.onStart = func(l *fakeLog) { l.start(); l.exit(0) }
	command := &executorv1.Command{Args: []string{"true"}}
	stream, err := b.executor.Execute(ctx, &executorv1.ExecuteRequest{Command: command, RequestId: "r1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	name := "executions/new"
	for _, call := range []func() error{
		func() error {
			_, err := b.executor.StartExecution(ctx, &executorv1.StartExecutionRequest{Command: command, RequestId: "r2"})
			return err
		},
		func() error {
			_, err := b.executor.CancelExecution(ctx, &executorv1.CancelExecutionRequest{Name: name, RequestId: "r3"})
			return err
		},
		func() error {
			_, err := b.executor.DeleteExecution(ctx, &executorv1.DeleteExecutionRequest{Name: name, RequestId: "r4"})
			return err
		},
		func() error {
			_, err := b.session.CreateSession(ctx, &executorv1.CreateSessionRequest{RequestId: "r5"})
			return err
		},
		func() error {
			_, err := b.session.TerminateSession(ctx, &executorv1.TerminateSessionRequest{Name: "sessions/s1", RequestId: "r6"})
			return err
		},
	} {
		if err := call(); err != nil {
			t.Error(err)
		}
	}
	var got []string
	for _, key := range append(b.executions.keys, b.sessions.keys...) {
		got = append(got, key.ID+" "+key.Method)
	}
	want := "r1 Execute, r2 StartExecution, r3 CancelExecution, r4 DeleteExecution, r5 CreateSession, r6 TerminateSession"
	if strings.Join(got, ", ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

func TestBadRequestIDs(t *testing.T) {
	b := newBench(t)
	for _, id := range []string{"a b", "ü", "a/b", strings.Repeat("x", 65), "\n", "a\x00"} {
		_, err := b.executor.DeleteExecution(t.Context(), &executorv1.DeleteExecutionRequest{Name: "executions/e1", RequestId: id})
		if d := wantError(t, err, codes.InvalidArgument, "INVALID_FIELD"); len(d.fields()) != 1 || d.fields()[0] != "request_id" {
			t.Errorf("%q: fields %v", id, d.fields())
		}
	}
	b.executions.add(execution.Execution{ID: "e1"}).exit(0)
	if _, err := b.executor.DeleteExecution(t.Context(), &executorv1.DeleteExecutionRequest{
		Name: "executions/e1", RequestId: "AZaz09._-" + strings.Repeat("x", 55),
	}); err != nil {
		t.Error(err)
	}
}

// TestExecuteJoinsLate: the log's beginning is no longer kept when a repeat comes. It is
// told the name first all the same, then the gap.
func TestExecuteJoinsLate(t *testing.T) {
	b := newBench(t)
	b.executions.onStart = func(l *fakeLog) {
		l.append(execution.Event{Gap: &execution.Gap{Reason: execution.GapRetention, MissingEvents: 1}})
		l.append(execution.Event{Gap: &execution.Gap{Reason: execution.GapRetention, MissingEvents: 7}})
		l.exit(0)
	}
	stream, err := b.executor.Execute(t.Context(), &executorv1.ExecuteRequest{Command: &executorv1.Command{Args: []string{"true"}}, RequestId: "r1"})
	if err != nil {
		t.Fatal(err)
	}
	told, err := kinds(t, func() (*executorv1.Event, error) {
		m, err := stream.Recv()
		return m.GetEvent(), err
	})
	if got := strings.Join(told, ", "); err != nil || got != "started executions/new, gap, result REASON_EXITED" {
		t.Errorf("told %s, %v", got, err)
	}
	if n := b.executions.openWatchers(); n != 0 {
		t.Errorf("%d watchers are open", n)
	}
}
