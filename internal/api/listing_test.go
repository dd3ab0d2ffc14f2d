package api

import (
	"slices"
	"strings"
	"testing"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// The names that a filter takes are those of the domain, without one too few.
func TestFilterNames(t *testing.T) {
	executions, sessions := executionFilters(), sessionFilters()
	for s := execution.Starting; s <= execution.Ended; s++ {
		if !slices.Contains(executions.Enums["state"], s.String()) {
			t.Errorf("executions cannot be %s", s)
		}
	}
	for s := session.Starting; s <= session.Terminated; s++ {
		if !slices.Contains(sessions.Enums["state"], s.String()) {
			t.Errorf("sessions cannot be %s", s)
		}
	}
	for _, name := range executions.Enums["state"] {
		if execution.StateOf(name) == 0 {
			t.Errorf("the domain has no state %s", name)
		}
	}
	for _, name := range sessions.Enums["state"] {
		if session.StateOf(name) == 0 {
			t.Errorf("the domain has no state %s of sessions", name)
		}
	}
	for _, name := range executions.Enums["reason"] {
		if reasonProto(execution.Reason(name)) == 0 {
			t.Errorf("the domain has no reason %s", name)
		}
	}
	for _, name := range sessions.Enums["end_reason"] {
		if endReasonProto(session.EndReason(name)) == 0 {
			t.Errorf("the domain has no reason %s of sessions", name)
		}
	}
}

func TestListFilter(t *testing.T) {
	b := newBench(t)
	if _, err := b.executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{
		Filter: `state = STATE_RUNNING AND labels.x != "y"`, OrderBy: "create_time  asc",
	}); err != nil {
		t.Fatal(err)
	}
	if q := b.executions.queries[0]; len(q.Filter.Terms) != 2 || q.Filter.Terms[0].Text != "RUNNING" || !q.Ascending {
		t.Errorf("%+v", q)
	}
	if _, err := b.session.ListSessions(t.Context(), &executorv1.ListSessionsRequest{
		Filter: "end_reason = EXPIRED", OrderBy: "create_time desc", ShowTerminated: true,
	}); err != nil {
		t.Fatal(err)
	}
	if q := b.sessions.queries[0]; len(q.Filter.Terms) != 1 || q.Ascending || !q.Terminated {
		t.Errorf("%+v", q)
	}
	for text, position := range map[string]string{
		"state = NONE": "9", "name = x": "1", strings.Repeat("(", 10_000): "2049", strings.Repeat("(", 2000): "1",
		"reason = EXPIRED": "10", "state = RUNNING OR state = ENDED": "17",
	} {
		_, err := b.executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{Filter: text})
		d := wantError(t, err, codes.InvalidArgument, "INVALID_FILTER")
		if len(d.fields()) != 1 || d.fields()[0] != "filter" || d.info.GetMetadata()["position"] != position {
			t.Errorf("%.40s: fields %v, metadata %v", text, d.fields(), d.info.GetMetadata())
		}
	}
	_, err := b.session.ListSessions(t.Context(), &executorv1.ListSessionsRequest{Filter: "reason = EXITED"})
	wantError(t, err, codes.InvalidArgument, "INVALID_FILTER")
	for _, order := range []string{"end_time", "create_time descending", "create_time, name", "name desc", strings.Repeat("x", 10_000)} {
		_, err := b.executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{OrderBy: order})
		if d := wantError(t, err, codes.InvalidArgument, "INVALID_ORDER"); len(d.fields()) != 1 || d.fields()[0] != "order_by" {
			t.Errorf("fields %v", d.fields())
		}
	}
}

// A page token is good for the listing that it was given for, and for no other.
func TestPageTokensBelongToTheirListing(t *testing.T) {
	b := newBench(t)
	for _, id := range []string{"e1", "e2", "e3"} {
		b.executions.add(execution.Execution{ID: id, Session: "s1"})
		b.sessions.put(session.Session{ID: id, State: session.Running})
	}
	base := &executorv1.ListExecutionsRequest{Parent: "sessions/s1", PageSize: 1, Filter: "labels.x != y"}
	first, err := b.executor.ListExecutions(t.Context(), base)
	if err != nil || first.GetNextPageToken() == "" {
		t.Fatalf("%v, %v", first, err)
	}
	base.PageToken = first.GetNextPageToken()
	base.OrderBy, base.PageSize = "create_time desc", 2 // which is the default, and may change
	base.ReadMask = &fieldmaskpb.FieldMask{Paths: []string{"name"}}
	if _, err := b.executor.ListExecutions(t.Context(), base); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*executorv1.ListExecutionsRequest){
		"another parent": func(r *executorv1.ListExecutionsRequest) { r.Parent = "" },
		"another filter": func(r *executorv1.ListExecutionsRequest) { r.Filter = "labels.x != z" },
		"no filter":      func(r *executorv1.ListExecutionsRequest) { r.Filter = "" },
		"another order":  func(r *executorv1.ListExecutionsRequest) { r.OrderBy = "create_time" },
		"forged":         func(r *executorv1.ListExecutionsRequest) { r.PageToken = "AAAA" + r.PageToken[4:] },
	} {
		r := proto.CloneOf(base)
		change(r)
		_, err := b.executor.ListExecutions(t.Context(), r)
		if d := wantError(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN"); len(d.fields()) != 1 || d.fields()[0] != "page_token" {
			t.Errorf("%s: fields %v", name, d.fields())
		}
	}
	page, err := b.session.ListSessions(t.Context(), &executorv1.ListSessionsRequest{PageSize: 1})
	if err != nil || page.GetNextPageToken() == "" {
		t.Fatalf("%v, %v", page, err)
	}
	for name, r := range map[string]*executorv1.ListSessionsRequest{
		"filter": {Filter: "state = RUNNING"}, "order": {OrderBy: "create_time"}, "scope": {ShowTerminated: true},
	} {
		r.PageToken = page.GetNextPageToken()
		_, err := b.session.ListSessions(t.Context(), r)
		if err == nil {
			t.Errorf("taken with another %s", name)
			continue
		}
		wantError(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN")
	}
	_, err = b.executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{PageSize: -1})
	if d := wantError(t, err, codes.InvalidArgument, "INVALID_FIELD"); d.fields()[0] != "page_size" {
		t.Errorf("fields %v", d.fields())
	}
	if _, err := b.executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{PageSize: 1e9}); err != nil {
		t.Error(err)
	}
}

func TestReadMask(t *testing.T) {
	code := int32(3)
	whole := executionProto(execution.Execution{
		ID: "e1", State: execution.Ended, Labels: map[string]string{"x": "y"}, CreateTime: time.Unix(1, 0), Epoch: "e",
		Command: execution.Command{Args: []string{"true"}, WorkingDirectory: "/w"},
		Result:  &execution.Result{Reason: execution.Exited, ExitCode: &code, Detail: "detail"},
	})
	for paths, want := range map[string]string{
		"name":                           `name: "executions/e1"`,
		"name state":                     `name: "executions/e1" state: STATE_ENDED`,
		"result.reason result.exit_code": `result { reason: REASON_EXITED exit_code: 3 }`,
		"command.args labels":            `command { args: "true" } labels { key: "x" value: "y" }`,
		"result.times":                   `result { times {} }`,
		"result.signal":                  `result {}`,
		"start_time":                     ``,
		"create_time.seconds":            `create_time { seconds: 1 }`,
	} {
		mask, err := parseReadMask(&fieldmaskpb.FieldMask{Paths: strings.Fields(paths)}, (*executorv1.Execution)(nil))
		if err != nil {
			t.Errorf("%s: %v", paths, err)
			continue
		}
		got, expected := proto.CloneOf(whole), &executorv1.Execution{}
		mask.apply(got)
		if err := prototext.Unmarshal([]byte(want), expected); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(got, expected) {
			t.Errorf("%s: got %v, want %v", paths, got, expected)
		}
	}
	for _, paths := range [][]string{nil, {"*"}, {"name", "*"}} {
		mask, err := parseReadMask(&fieldmaskpb.FieldMask{Paths: paths}, (*executorv1.Execution)(nil))
		got := proto.CloneOf(whole)
		mask.apply(got)
		if err != nil || !proto.Equal(got, whole) {
			t.Errorf("%v: %v, %v", paths, got, err)
		}
	}
	// The whole of a field wins over its parts, in any order.
	for _, paths := range [][]string{{"result", "result.reason"}, {"result.reason", "result"}} {
		mask, err := parseReadMask(&fieldmaskpb.FieldMask{Paths: paths}, (*executorv1.Execution)(nil))
		got := proto.CloneOf(whole)
		mask.apply(got)
		if err != nil || !proto.Equal(got, &executorv1.Execution{Result: whole.GetResult()}) {
			t.Errorf("%v: %v, %v", paths, got, err)
		}
	}
	for _, path := range []string{"", ".", "nothing", "result.nothing", "result.", "labels.x", "name.x", "result.totals.size", "command.code.language", "Name", "result.*", strings.Repeat("x", 10_000)} {
		_, err := parseReadMask(&fieldmaskpb.FieldMask{Paths: []string{"name", path}}, (*executorv1.Execution)(nil))
		if fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != "INVALID_READ_MASK" || !strings.Contains(err.Error(), head(path, 40)) {
			t.Errorf("%.40q: %v", path, err)
		}
	}
	if _, err := parseReadMask(&fieldmaskpb.FieldMask{Paths: make([]string, 1000)}, (*executorv1.Execution)(nil)); fault.ReasonOf(err) != "INVALID_READ_MASK" {
		t.Errorf("a thousand paths: %v", err)
	}
}

// TestReadMaskOfAllReads: the four methods heed it, and name it when it is wrong.
func TestReadMaskOfAllReads(t *testing.T) {
	b := newBench(t)
	b.executions.add(execution.Execution{ID: "e1", Engine: "local"})
	b.sessions.put(session.Session{ID: "s1", State: session.Running, Engine: "local"})
	ctx := t.Context()
	reads := map[string]func(*fieldmaskpb.FieldMask) (name, engine string, err error){
		"GetExecution": func(m *fieldmaskpb.FieldMask) (string, string, error) {
			r, err := b.executor.GetExecution(ctx, &executorv1.GetExecutionRequest{Name: "executions/e1", ReadMask: m})
			return r.GetExecution().GetName(), r.GetExecution().GetEngine(), err
		},
		"ListExecutions": func(m *fieldmaskpb.FieldMask) (string, string, error) {
			r, err := b.executor.ListExecutions(ctx, &executorv1.ListExecutionsRequest{ReadMask: m})
			if err != nil {
				return "", "", err
			}
			return r.GetExecutions()[0].GetName(), r.GetExecutions()[0].GetEngine(), err
		},
		"GetSession": func(m *fieldmaskpb.FieldMask) (string, string, error) {
			r, err := b.session.GetSession(ctx, &executorv1.GetSessionRequest{Name: "sessions/s1", ReadMask: m})
			return r.GetSession().GetName(), r.GetSession().GetEngine(), err
		},
		"ListSessions": func(m *fieldmaskpb.FieldMask) (string, string, error) {
			r, err := b.session.ListSessions(ctx, &executorv1.ListSessionsRequest{ReadMask: m})
			if err != nil {
				return "", "", err
			}
			return r.GetSessions()[0].GetName(), r.GetSessions()[0].GetEngine(), err
		},
	}
	for method, read := range reads {
		if name, engine, err := read(nil); name == "" || engine != "local" || err != nil {
			t.Errorf("%s without: %q, %q, %v", method, name, engine, err)
		}
		if name, engine, err := read(&fieldmaskpb.FieldMask{Paths: []string{"name"}}); name == "" || engine != "" || err != nil {
			t.Errorf("%s: %q, %q, %v", method, name, engine, err)
		}
		_, _, err := read(&fieldmaskpb.FieldMask{Paths: []string{"secret"}})
		if d := wantError(t, err, codes.InvalidArgument, "INVALID_READ_MASK"); d.fields()[0] != "read_mask" {
			t.Errorf("%s: fields %v", method, d.fields())
		}
	}
}

func FuzzReadMask(f *testing.F) {
	for _, path := range []string{"name", "result.reason", "*", "labels.x", "..", "command.code.source"} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		mask, err := parseReadMask(&fieldmaskpb.FieldMask{Paths: []string{path}}, (*executorv1.Execution)(nil))
		if err != nil {
			return
		}
		mask.apply(&executorv1.Execution{Name: "executions/e1", Result: &executorv1.Result{Detail: "x"}, Labels: map[string]string{"a": "b"}})
	})
}

// TestShortPages: a page for which looking took too long is told as it is, and the token
// goes on where that ended.
func TestShortPages(t *testing.T) {
	b := newBench(t)
	b.executions.short, b.sessions.short = 2, 2
	for _, id := range []string{"e1", "e2", "e3", "e4", "e5"} {
		b.executions.add(execution.Execution{ID: id})
		b.sessions.put(session.Session{ID: id, State: session.Running})
	}
	var executions, sessions []string
	for token := ""; ; {
		page, err := b.executor.ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{PageToken: token, Filter: "labels.x != y"})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page.GetExecutions() {
			executions = append(executions, e.GetName())
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	for token := ""; ; {
		page, err := b.session.ListSessions(t.Context(), &executorv1.ListSessionsRequest{PageToken: token, Filter: "labels.x != y"})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range page.GetSessions() {
			sessions = append(sessions, s.GetName())
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	if got := strings.Join(executions, " "); got != "executions/e5 executions/e4 executions/e3 executions/e2 executions/e1" {
		t.Errorf("executions %s", got)
	}
	if got := strings.Join(sessions, " "); got != "sessions/e5 sessions/e4 sessions/e3 sessions/e2 sessions/e1" {
		t.Errorf("sessions %s", got)
	}
}
