package api

import (
	"strings"
	"testing"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/session"
)

func TestExecutionNames(t *testing.T) {
	for name, want := range map[string]execution.Ref{
		"executions/e-1":             {ID: "e-1"},
		"sessions/s1/executions/e-1": {Session: "s1", ID: "e-1"},
	} {
		ref, err := parseExecutionName(t.Context(), name)
		if err != nil || ref != want {
			t.Errorf("%q is %v, %v", name, ref, err)
		}
		if back := executionName(ref); back != name {
			t.Errorf("%q comes back as %q", name, back)
		}
	}
	for _, name := range []string{
		"", "executions/", "executions", "executions/E", "executions/a/b", "/executions/a", "executions/a/",
		"sessions/a", "sessions//executions/a", "sessions/a/executions/", "sessions/a/b/executions/c",
		"sessions/a/sessions/b/executions/c", "executions/a\n", "executions/é", "executions/" + strings.Repeat("a", 64),
	} {
		if ref, err := parseExecutionName(t.Context(), name); fault.KindOf(err) != fault.Invalid || ref != (execution.Ref{}) {
			t.Errorf("%q is %v, %v", name, ref, err)
		}
	}
}

func TestSessionNames(t *testing.T) {
	if ref, err := parseSessionName(t.Context(), "sessions/s1"); err != nil || sessionName(ref.ID) != "sessions/s1" {
		t.Errorf("%v, %v", ref, err)
	}
	for _, name := range []string{"", "sessions", "sessions/", "sessions/a/", "sessions/A", "s1", "executions/a"} {
		if ref, err := parseSessionName(t.Context(), name); fault.KindOf(err) != fault.Invalid || ref != (session.Ref{}) {
			t.Errorf("%q is %v, %v", name, ref, err)
		}
		if name == "" {
			continue
		}
		if id, err := parseParent(name); fault.KindOf(err) != fault.Invalid || id != "" {
			t.Errorf("parent %q is %q, %v", name, id, err)
		}
	}
	if id, err := parseParent(""); err != nil || id != "" {
		t.Errorf("no parent is %q, %v", id, err)
	}
}

// FuzzExecutionName compares the parser with the rule in the proto.
func FuzzExecutionName(f *testing.F) {
	validator, err := newValidator()
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{"executions/a", "sessions/a/executions/b", "sessions/-/executions/-", "executions/a\n", "x"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		ref, err := parseExecutionName(t.Context(), name)
		if err == nil && executionName(ref) != name {
			t.Errorf("%q comes back as %q", name, executionName(ref))
		}
		ruled := validator.Validate(&executorv1.GetExecutionRequest{Name: name})
		if (ruled == nil) != (err == nil) {
			t.Errorf("%q: the rule says %v, the parser %v", name, ruled, err)
		}
	})
}
