package e2e

import (
	"encoding/json"
	"strings"
	"testing"
)

// executorctl against a real executord: output apart, the program's exit code, and
// what went wrong on stderr.
func TestCLI(t *testing.T) {
	d := start(t)
	for name, c := range map[string]struct {
		stdin          string
		args           []string
		stdout, stderr string // stderr contains
		code           int
	}{
		"python":           {args: []string{"run", `print("Hello from sandbox")`}, stdout: "Hello from sandbox\n"},
		"node":             {args: []string{"run", "--lang", "node", "console.log(6 * 7)"}, stdout: "42\n"},
		"bash from stdin":  {stdin: "echo $((6 * 7)) >&2; exit 3", args: []string{"run", "--lang", "bash", "-"}, stderr: "42\n", code: 3},
		"argv":             {args: []string{"run", "--", "printf", "%s|", "a b", "c"}, stdout: "a b|c|"},
		"environment":      {args: []string{"run", "-e", "A=b c", "--", "printenv", "A"}, stdout: "b c\n"},
		"exit code":        {args: []string{"run", "--", "sh", "-c", "exit 42"}, code: 42},
		"signal":           {args: []string{"run", "--", "sh", "-c", "kill -SEGV $$"}, stderr: "SIGSEGV", code: 139},
		"timeout":          {args: []string{"run", "--timeout", "300ms", "--grace", "100ms", "--", "sleep", "100"}, stderr: "timeout", code: 124},
		"not found":        {args: []string{"run", "--", "no-such-program"}, stderr: "no-such-program", code: 127},
		"not executable":   {args: []string{"run", "--", "/etc/passwd"}, stderr: "not executable", code: 126},
		"bad flag":         {args: []string{"run", "--no-such-flag", "x"}, stderr: "no-such-flag", code: 2},
		"unknown language": {args: []string{"run", "--lang", "cobol", "x"}, stderr: "cobol", code: 2},
	} {
		t.Run(name, func(t *testing.T) {
			stdout, stderr, code := d.ctlStdin(c.stdin, c.args...)
			if stdout != c.stdout || !strings.Contains(stderr, c.stderr) || code != c.code {
				t.Errorf("code %d, stdout %q, stderr %q; want %d, %q, …%q…", code, stdout, stderr, c.code, c.stdout, c.stderr)
			}
		})
	}
	t.Run("json", func(t *testing.T) {
		stdout, stderr, code := d.ctl("run", "-o", "json", "print(1)")
		var result struct {
			Outcome string `json:"outcome"`
			Stdout  string `json:"stdout"`
			Code    *int   `json:"exit_code"`
		}
		if err := json.Unmarshal([]byte(stdout), &result); err != nil || code != 0 || result.Outcome != "SUCCESS" || result.Stdout != "1\n" || result.Code == nil {
			t.Errorf("%v, code %d: %s%s", err, code, stdout, stderr)
		}
	})
	t.Run("session", func(t *testing.T) {
		out, stderr, code := d.ctl("session", "create", "-o", "name")
		name := strings.TrimSpace(out)
		if code != 0 || !strings.HasPrefix(name, "sessions/") {
			t.Fatalf("code %d: %q %s", code, out, stderr)
		}
		d.ctl("exec", name, "--", "sh", "-c", "echo kept > file")
		if out, stderr, code := d.ctl("exec", name, "--", "cat", "file"); out != "kept\n" || code != 0 {
			t.Errorf("code %d, %q, %s", code, out, stderr)
		}
		if _, stderr, code := d.ctl("session", "terminate", name); code != 0 {
			t.Errorf("code %d: %s", code, stderr)
		}
		if _, stderr, code := d.ctl("exec", name, "--", "true"); code != 125 || !strings.Contains(stderr, "has ended") {
			t.Errorf("in an ended session: code %d, %s", code, stderr)
		}
	})
	t.Run("doctor and info", func(t *testing.T) {
		if out, stderr, _ := d.ctl("doctor"); !strings.Contains(out, "network.none") || !strings.Contains(out, "limit.memory") {
			t.Errorf("doctor says %s%s", out, stderr)
		}
		if out, stderr, code := d.ctl("admin", "info"); code != 0 || !strings.Contains(out, "engine "+engineName()) {
			t.Errorf("code %d: %s%s", code, out, stderr)
		}
	})
}
