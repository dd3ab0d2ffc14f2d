package e2e

import (
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/harvest-run/executord/client"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// once runs executord to its end.
func (d *daemon) once(args ...string) (output string, code int) {
	d.t.Helper()
	cmd := exec.Command(filepath.Join(binaries, "executord"), args...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + d.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: d.user}
	out, _ := cmd.CombinedOutput()
	return string(out), cmd.ProcessState.ExitCode()
}

// Bad input is refused with the field's name, before anything exists.
func TestBadInputNamesTheField(t *testing.T) {
	d := start(t)
	c := d.dial()
	with := func(change func(*executorv1.Command)) *executorv1.ExecuteRequest {
		command := argv("true")
		change(command)
		return &executorv1.ExecuteRequest{Command: command}
	}
	for name, r := range map[string]struct {
		request *executorv1.ExecuteRequest
		field   string
	}{
		"no command":                 {&executorv1.ExecuteRequest{}, "command"},
		"empty command":              {&executorv1.ExecuteRequest{Command: &executorv1.Command{}}, "command.args"},
		"empty program":              {&executorv1.ExecuteRequest{Command: argv("")}, "command.args[0]"},
		"both":                       {with(func(c *executorv1.Command) { c.Code = python("1").GetCode() }), "command.args"},
		"NUL in args":                {&executorv1.ExecuteRequest{Command: argv("echo", "a\x00b")}, "command.args[1]"},
		"NUL in env":                 {with(func(c *executorv1.Command) { c.Env = map[string]string{"A": "\x00"} }), `command.env["A"]`},
		"env name with =":            {with(func(c *executorv1.Command) { c.Env = map[string]string{"A=B": "c"} }), `command.env["A=B"]`},
		"empty env name":             {with(func(c *executorv1.Command) { c.Env = map[string]string{"": "c"} }), `command.env[""]`},
		"relative directory":         {with(func(c *executorv1.Command) { c.WorkingDirectory = "a/b" }), "command.working_directory"},
		"NUL in directory":           {with(func(c *executorv1.Command) { c.WorkingDirectory = "/a\x00" }), "command.working_directory"},
		"args over the limit":        {&executorv1.ExecuteRequest{Command: argv("echo", strings.Repeat("x", 65536))}, "command.args"},
		"negative timeout":           {with(func(c *executorv1.Command) { c.Timeout = durationpb.New(-time.Second) }), "command.timeout"},
		"timeout of zero":            {with(func(c *executorv1.Command) { c.Timeout = durationpb.New(0) }), "command.timeout"},
		"negative grace":             {with(func(c *executorv1.Command) { c.GracePeriod = durationpb.New(-1) }), "command.grace_period"},
		"unknown language":           {&executorv1.ExecuteRequest{Command: &executorv1.Command{Code: &executorv1.Code{Language: 99, Source: "x"}}}, "command.code.language"},
		"no language":                {&executorv1.ExecuteRequest{Command: &executorv1.Command{Code: &executorv1.Code{Source: "x"}}}, "command.code.language"},
		"no source":                  {&executorv1.ExecuteRequest{Command: &executorv1.Command{Code: &executorv1.Code{Language: 1}}}, "command.code.source"},
		"memory limit of one byte":   {&executorv1.ExecuteRequest{Command: argv("true"), Limits: &executorv1.Limits{MemoryBytes: 1}}, "limits.memory_bytes"},
		"bad parent":                 {&executorv1.ExecuteRequest{Command: argv("true"), Parent: "../x"}, "parent"},
		"bad label":                  {&executorv1.ExecuteRequest{Command: argv("true"), Labels: map[string]string{"a b": ""}}, `labels["a b"]`},
		"retained more than allowed": {&executorv1.ExecuteRequest{Command: argv("true"), OutputPolicy: &executorv1.OutputPolicy{RetainedBytes: math.MaxInt32 * 500}}, "output_policy.retained_bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := c.Execute(t.Context(), r.request)
			if err == nil {
				s.Close()
				t.Fatal("was accepted")
			}
			if status.Code(err) != codes.InvalidArgument || client.Reason(err) == "" {
				t.Errorf("%v (%q)", err, client.Reason(err))
			}
			var fields []string
			for _, v := range client.Violations(err) {
				fields = append(fields, v.Field)
				if v.Description == "" {
					t.Errorf("%s: no description", v.Field)
				}
			}
			if len(fields) == 0 || fields[0] != r.field {
				t.Errorf("names %q, want %q: %v", fields, r.field, err)
			}
		})
	}
	list, err := c.Executor().ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{})
	if err != nil || len(list.GetExecutions()) != 0 {
		t.Errorf("bad input left %d executions, %v", len(list.GetExecutions()), err)
	}
}

func TestStartFailedSaysWhy(t *testing.T) {
	d := start(t)
	c := d.dial()
	for name, r := range map[string]struct {
		command *executorv1.Command
		kind    string
		detail  string
	}{
		"not found":                {argv("no-such-program"), "not_found", "no-such-program"},
		"not found by path":        {argv("/no/such"), "not_found", "/no/such"},
		"not executable":           {argv("/etc/passwd"), "not_executable", "not executable"},
		"a directory":              {argv("/usr"), "not_executable", "directory"},
		"no working directory":     {&executorv1.Command{Args: []string{"true"}, WorkingDirectory: "/no/such"}, "no_working_directory", "/no/such"},
		"directory that is a file": {&executorv1.Command{Args: []string{"true"}, WorkingDirectory: "/etc/passwd"}, "no_working_directory", "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			k := execute(t, c, &executorv1.ExecuteRequest{Command: r.command})
			k.wants(t, executorv1.Reason_REASON_START_FAILED)
			if k.result.GetEvidence()["kind"] != r.kind || !strings.Contains(k.result.GetDetail(), r.detail) || k.result.ExitCode != nil {
				t.Errorf("%v", k.result)
			}
		})
	}
}

// A secret that is passed to a program, and one in executord's own environment, are
// nowhere on disk or in a log; the daemon's is not in a sandbox either.
func TestSecretsAreNotKept(t *testing.T) {
	d := start(t, "--log-level", "debug")
	c := d.dial()
	const secret = "canary-9c1f77-value"
	command := bash(`[ -n "$TOKEN" ] && echo has it; tr '\0' '\n' < /proc/self/environ | grep -c DAEMON_CANARY; cat /proc/1/environ 2>&1`)
	command.Env = map[string]string{"TOKEN": secret}
	k := execute(t, c, &executorv1.ExecuteRequest{Command: command})
	if !strings.HasPrefix(k.stdout(), "has it\n0\n") || strings.Contains(k.stdout(), "daemon-secret") {
		t.Errorf("stdout %q", k.stdout())
	}
	command.Args, command.Code = []string{"no-such-program"}, nil
	execute(t, c, &executorv1.ExecuteRequest{Command: command})
	command.WorkingDirectory = "relative"
	_, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: command})
	if err == nil || strings.Contains(fmt.Sprint(err, client.Metadata(err), client.Violations(err)), secret) {
		t.Errorf("error %v", err)
	}
	list, err := c.Executor().ListExecutions(t.Context(), &executorv1.ListExecutionsRequest{})
	if err != nil || len(list.GetExecutions()) != 2 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, e := range list.GetExecutions() {
		if v, ok := e.GetCommand().GetEnv()["TOKEN"]; !ok || v != "" {
			t.Errorf("the record shows env %v", e.GetCommand().GetEnv())
		}
	}
	searched := 0
	err = filepath.WalkDir(d.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		text, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(text), secret) {
			t.Errorf("%s has the secret", path)
		}
		searched++
		return nil
	})
	if err != nil || searched < 4 {
		t.Errorf("searched %d files, %v", searched, err)
	}
}

// As an ordinary user what works works, and what cannot be enforced is refused.
func TestOrdinaryUser(t *testing.T) {
	needRoot(t)
	d := startAs(t, &syscall.Credential{Uid: 65534, Gid: 65534})
	c := d.dial()
	k := execute(t, c, &executorv1.ExecuteRequest{Command: emit("user", 200, 0, 4)})
	k.check(t, "user", 200, 4)
	_, err := c.Execute(t.Context(), &executorv1.ExecuteRequest{Command: argv("true"), Limits: &executorv1.Limits{MemoryBytes: 64 << 20}})
	if status.Code(err) != codes.FailedPrecondition || client.Reason(err) != "LIMIT_NOT_ENFORCEABLE" || client.Metadata(err)["field"] != "limits.memory_bytes" {
		t.Errorf("a limit that cannot be enforced: %v %v", err, client.Metadata(err))
	}
	for name, source := range trees() {
		t.Run(name, func(t *testing.T) {
			command := bash(source)
			command.Timeout, command.GracePeriod = durationpb.New(700*time.Millisecond), durationpb.New(200*time.Millisecond)
			k := execute(t, c, &executorv1.ExecuteRequest{Command: command})
			k.wants(t, executorv1.Reason_REASON_TIMED_OUT)
		})
	}
	k = execute(t, c, &executorv1.ExecuteRequest{Command: bash("id -u; ls /root /home; touch /usr/bin/x 2>&1; ls /work 2>&1; cat /etc/shadow 2>&1")})
	if !strings.HasPrefix(k.stdout(), "0\n") || strings.Contains(k.stdout(), "root:$") {
		t.Errorf("stdout %s", k.stdout())
	}
	d.kill()
	d.up()
	k = execute(t, c, &executorv1.ExecuteRequest{Command: argv("echo", "again")})
	if k.stdout() != "again\n" {
		t.Errorf("after a restart: %q", k.stdout())
	}
}
