package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// build compiles the program as it is shipped.
func build(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "executor-guest")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return file
}

// TestProgram starts the program as nobody should.
func TestProgram(t *testing.T) {
	file := build(t)
	for name, c := range map[string]struct {
		args []string
		code int
		says string
	}{
		"no arguments":       {nil, 2, "usage: executor-guest init | fork"},
		"another argument":   {[]string{"serve"}, 2, "usage: executor-guest init | fork"},
		"too many arguments": {[]string{"init", "now"}, 2, "usage: executor-guest init | fork"},
		"without its socket": {[]string{"init"}, 1, "executor-guest: read setup"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command(file, c.args...)
			out, err := cmd.CombinedOutput()
			if err == nil || cmd.ProcessState.ExitCode() != c.code || !strings.Contains(string(out), c.says) {
				t.Errorf("%v, %q; want %d, %q", err, out, c.code, c.says)
			}
		})
	}
	t.Run("is small", func(t *testing.T) {
		info, err := os.Stat(file)
		if err != nil || info.Size() > 6<<20 {
			t.Errorf("%d bytes, %v", info.Size(), err)
		}
	})
}

// TestDependencies keeps the guest small: it is started for every sandbox.
func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	allowed := []string{
		"github.com/harvest-run/executord/cmd/executor-guest", "github.com/harvest-run/executord/internal/guest",
		"github.com/harvest-run/executord/gen/harvest/guest/", "google.golang.org/protobuf/", "golang.org/x/sys/unix", "github.com/hashicorp/yamux",
	}
	for pkg := range strings.FieldsSeq(string(out)) {
		ok := false
		for _, a := range allowed {
			ok = ok || strings.HasPrefix(pkg, a)
		}
		if !ok {
			t.Errorf("the guest depends on %s", pkg)
		}
	}
	std, err := exec.Command("go", "list", "-deps", ".").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	for _, heavy := range []string{"net/http", "crypto/tls", "os/exec", "text/template"} {
		if strings.Contains("\n"+string(std), "\n"+heavy+"\n") {
			t.Errorf("the guest depends on %s", heavy)
		}
	}
}
