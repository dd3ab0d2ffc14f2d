package execution_test

import (
	"encoding/json"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

func TestValidate(t *testing.T) {
	args := []string{"true"}
	source := func(c execution.Command) execution.Command {
		c.Language, c.Source = execution.Bash, ":"
		return c
	}
	many := make([]string, execution.MaxArgsBytes)
	tests := map[string]struct {
		command execution.Command
		reason  string // "" for none
		field   string
	}{
		"args":                    {execution.Command{Args: args}, "", ""},
		"python":                  {execution.Command{Language: execution.Python, Source: "1"}, "", ""},
		"bash":                    {execution.Command{Language: execution.Bash, Source: "1"}, "", ""},
		"node":                    {execution.Command{Language: execution.Node, Source: "1"}, "", ""},
		"everything":              {source(execution.Command{Env: map[string]string{"A": "", "B_1": "=x"}, WorkingDirectory: "/x y", Timeout: time.Millisecond, GracePeriod: ptr(time.Duration(0))}), "", ""},
		"nothing":                 {execution.Command{}, "COMMAND_EMPTY", "command.args"},
		"no program":              {execution.Command{Args: []string{"", "x"}}, "COMMAND_EMPTY", "command.args[0]"},
		"an empty argument":       {execution.Command{Args: []string{"x", ""}}, "", ""},
		"args and source":         {execution.Command{Args: args, Source: "1"}, "COMMAND_AMBIGUOUS", "command.args"},
		"args and language":       {execution.Command{Args: args, Language: execution.Python}, "COMMAND_AMBIGUOUS", "command.args"},
		"NUL in an argument":      {execution.Command{Args: []string{"a", "b\x00c"}}, "NUL_BYTE", "command.args[1]"},
		"args as large as can be": {execution.Command{Args: []string{strings.Repeat("a", execution.MaxArgsBytes-1)}}, "", ""},
		"args too large":          {execution.Command{Args: []string{strings.Repeat("a", execution.MaxArgsBytes/2), strings.Repeat("b", execution.MaxArgsBytes/2-1)}}, "ARGS_TOO_LARGE", "command.args"},
		"too many empty args":     {execution.Command{Args: append([]string{"x"}, many...)}, "ARGS_TOO_LARGE", "command.args"},
		"no language":             {execution.Command{Source: "1"}, "LANGUAGE_UNKNOWN", "command.code.language"},
		"unknown language":        {execution.Command{Language: "perl", Source: "1"}, "LANGUAGE_UNKNOWN", "command.code.language"},
		"no source":               {execution.Command{Language: execution.Node}, "SOURCE_SIZE", "command.code.source"},
		"source as large as can be": {
			execution.Command{Language: execution.Node, Source: strings.Repeat("a", execution.MaxSourceBytes)}, "", "",
		},
		"source too large": {
			execution.Command{Language: execution.Node, Source: strings.Repeat("a", execution.MaxSourceBytes+1)}, "SOURCE_SIZE", "command.code.source",
		},
		"NUL in a source":         {execution.Command{Language: execution.Bash, Source: "echo \x00"}, "", ""}, // it is a file
		"a variable without name": {source(execution.Command{Env: map[string]string{"": "x"}}), "ENV_NAME", `command.env[""]`},
		"= in a name":             {source(execution.Command{Env: map[string]string{"A=B": "x"}}), "ENV_NAME", `command.env["A=B"]`},
		"NUL in a name":           {source(execution.Command{Env: map[string]string{"A\x00": "x"}}), "ENV_NAME", `command.env["A\x00"]`},
		"NUL in a value":          {source(execution.Command{Env: map[string]string{"A": "x\x00"}}), "NUL_BYTE", `command.env["A"]`},
		"the first of bad names":  {source(execution.Command{Env: map[string]string{"A": "1", "C=": "2", "B=": "3"}}), "ENV_NAME", `command.env["B="]`},
		"env as large as can be":  {source(execution.Command{Env: map[string]string{"A": strings.Repeat("x", execution.MaxEnvBytes-3)}}), "", ""},
		"env too large":           {source(execution.Command{Env: map[string]string{"A": strings.Repeat("x", execution.MaxEnvBytes-2)}}), "ENV_TOO_LARGE", "command.env"},
		"relative directory":      {source(execution.Command{WorkingDirectory: "x/y"}), "WORKING_DIRECTORY", "command.working_directory"},
		"NUL in a directory":      {source(execution.Command{WorkingDirectory: "/x\x00"}), "NUL_BYTE", "command.working_directory"},
		"negative timeout":        {source(execution.Command{Timeout: -time.Millisecond}), "TIMEOUT", "command.timeout"},
		"timeout of a fraction":   {source(execution.Command{Timeout: 1500 * time.Microsecond}), "TIMEOUT", "command.timeout"},
		"longest timeout":         {source(execution.Command{Timeout: execution.MaxTimeout}), "", ""},
		"too long a timeout":      {source(execution.Command{Timeout: execution.MaxTimeout + time.Millisecond}), "TIMEOUT", "command.timeout"},
		"negative grace":          {source(execution.Command{GracePeriod: ptr(-time.Second)}), "GRACE_PERIOD", "command.grace_period"},
		"longest grace":           {source(execution.Command{GracePeriod: ptr(execution.MaxGracePeriod)}), "", ""},
		"too long a grace":        {source(execution.Command{GracePeriod: ptr(execution.MaxGracePeriod + 1)}), "GRACE_PERIOD", "command.grace_period"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := test.command.Validate()
			if test.reason == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantFault(t, err, fault.Invalid, test.reason)
			if fe, ok := errors.AsType[*fault.Error](err); !ok || len(fe.Fields) != 1 || fe.Fields[0].Path != test.field || fe.Fields[0].Description == "" {
				t.Errorf("%+v, want field %s", err, test.field)
			}
			if strings.Contains(err.Error(), "xxx") {
				t.Errorf("the value of a variable is in the error: %v", err)
			}
		})
	}
}

func TestStored(t *testing.T) {
	c := execution.Command{
		Language: execution.Python, Source: strings.Repeat("é", 3000),
		Env: map[string]string{"TOKEN": "secret", "EMPTY": ""}, WorkingDirectory: "/w", Timeout: time.Second,
	}
	s := c.Stored()
	if diff := cmp.Diff(map[string]string{"TOKEN": "", "EMPTY": ""}, s.Env); diff != "" {
		t.Error(diff)
	}
	if c.Env["TOKEN"] != "secret" {
		t.Error("the command itself was changed")
	}
	if len(s.Source) != 4096 || !utf8.ValidString(s.Source) || !strings.HasPrefix(c.Source, s.Source) {
		t.Errorf("%d bytes of source, valid: %v", len(s.Source), utf8.ValidString(s.Source))
	}
	odd := execution.Command{Source: "x" + strings.Repeat("é", 3000)}.Stored()
	if len(odd.Source) != 4095 || !utf8.ValidString(odd.Source) {
		t.Errorf("%d bytes where a character would be cut in two", len(odd.Source))
	}
	if broken := (execution.Command{Source: strings.Repeat("\x80", 5000)}).Stored(); len(broken.Source) > 4096 {
		t.Errorf("%d bytes of no UTF-8", len(broken.Source))
	}
	if plain := (execution.Command{Args: []string{"x"}}).Stored(); plain.Env != nil {
		t.Error("variables where there were none")
	}
}

// TestStartRequest sees what the guest is told.
func TestStartRequest(t *testing.T) {
	base := []string{
		"EXECUTOR_EXECUTION=", "HOME=/root", "LANG=C.UTF-8", "LOGNAME=root",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "SHELL=/bin/bash", "TERM=dumb", "USER=root",
	}
	tests := map[string]struct {
		command execution.Command
		want    *guestv1.StartRequest
	}{
		"args": {
			execution.Command{Args: []string{"ls", "-l", ""}},
			&guestv1.StartRequest{
				Args: []string{"ls", "-l", ""}, Env: base, WorkingDirectory: "/workspace", CreateWorkingDirectory: true,
				TimeoutMs: 1_800_000, GraceMs: 5000,
			},
		},
		"all of it": {
			execution.Command{
				Args: []string{"x"}, Env: map[string]string{"HOME": "/me", "A": "b=c", "EXECUTOR_EXECUTION": "other"},
				WorkingDirectory: "/me", Timeout: 1234 * time.Millisecond, GracePeriod: ptr(time.Duration(0)),
			},
			&guestv1.StartRequest{
				Args: []string{"x"}, WorkingDirectory: "/me", TimeoutMs: 1234, GraceMs: 0,
				Env: []string{"A=b=c", base[0], "HOME=/me", base[2], base[3], base[4], base[5], base[6], base[7]},
			},
		},
		"python": {
			execution.Command{Language: execution.Python, Source: "print(1)", WorkingDirectory: "/w"},
			&guestv1.StartRequest{
				Args: []string{"python3", "-u", ""}, SourceArgument: 2, SourceName: "main.py", Source: []byte("print(1)"),
				Env:              []string{base[0], base[1], base[2], base[3], base[4], "PYTHONPATH=/w", base[5], base[6], base[7]},
				WorkingDirectory: "/w", TimeoutMs: 1_800_000, GraceMs: 5000,
			},
		},
		"bash": {
			execution.Command{Language: execution.Bash, Source: "echo"},
			&guestv1.StartRequest{
				Args: []string{"bash", ""}, SourceArgument: 1, SourceName: "main.sh", Source: []byte("echo"), Env: base,
				WorkingDirectory: "/workspace", CreateWorkingDirectory: true, TimeoutMs: 1_800_000, GraceMs: 5000,
			},
		},
		"node": {
			execution.Command{Language: execution.Node, Source: "1"},
			&guestv1.StartRequest{
				Args: []string{"node", ""}, SourceArgument: 1, SourceName: "main.js", Source: []byte("1"), Env: base,
				WorkingDirectory: "/workspace", CreateWorkingDirectory: true, TimeoutMs: 1_800_000, GraceMs: 5000,
			},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var got *guestv1.StartRequest
				r := newRig(t, enginefake.Config{Script: func(q *guestv1.StartRequest) enginefake.Script {
					got = q
					return enginefake.Script{Exit: enginefake.Exit(0)}
				}})
				ref := r.start(execution.Request{Command: test.command})
				r.wait(ref)
				for i, v := range got.GetEnv() {
					if strings.HasPrefix(v, base[0]) {
						if v != base[0]+ref.ID {
							t.Errorf("%s", v)
						}
						got.Env[i] = base[0]
					}
				}
				if got.GetExecution() != ref.ID {
					t.Errorf("execution %q, want %q", got.GetExecution(), ref.ID)
				}
				got.Execution = ""
				if a, b := got.String(), test.want.String(); a != b {
					t.Errorf("the guest was told\n%s\nwant\n%s", a, b)
				}
			})
		})
	}
}

// TestSecretsStayOut looks for the value of a variable in all that is kept or logged.
func TestSecretsStayOut(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const secret = "hunter2-very-secret"
		var updates atomic.Int64
		r := newRig(t, enginefake.Config{
			Script: func(q *guestv1.StartRequest) enginefake.Script {
				return enginefake.Script{Refuse: enginefake.Refusal(guestv1.Error_KIND_NOT_EXECUTABLE, "no")}
			},
		})
		r.memory.hook(func(op string, e execution.Execution) error {
			text, err := json.Marshal(e)
			if err != nil || strings.Contains(string(text), secret) {
				t.Errorf("the store was given %s, %v", text, err)
			}
			if op == "update" && updates.Add(1) < 3 {
				return errDisk
			}
			return nil
		}, nil)
		ref := r.start(execution.Request{Command: execution.Command{Args: []string{"x"}, Env: map[string]string{"TOKEN": secret}}})
		e := r.wait(ref)
		if text, err := json.Marshal(e); err != nil || strings.Contains(string(text), secret) {
			t.Errorf("the record has %s, %v", text, err)
		}
		if strings.Contains(r.log.String(), secret) {
			t.Errorf("logged: %s", r.log)
		}
		if r.log.String() == "" {
			t.Error("nothing was logged: the store did not fail")
		}
	})
}
