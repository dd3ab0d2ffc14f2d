package local

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
	"golang.org/x/sys/unix"
)

func TestProbe(t *testing.T) {
	cfg := testConfig(t)
	e := engineOver(t, cfg)
	sb := sandboxFor(t, e, engine.Spec{ID: "working"})
	before, err := os.ReadDir(cfg.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]engine.Capability)
	for _, c := range Probe(t.Context(), cfg) {
		t.Logf("%-16s %-5v %s; %s", c.Name, c.Available, c.Detail, c.Remedy)
		got[c.Name] = c
	}
	root := os.Geteuid() == 0
	for name, want := range map[string]bool{
		"sandbox": true, "limit.memory": root, "limit.pids": root, "limit.cpu": root, "kill.cgroup": root, "ids.own-range": root,
		"network.none": true, "language.python": true, "language.bash": true,
	} {
		c, ok := got[name]
		if !ok || c.Available != want || c.Detail == "" || (c.Remedy == "") != want {
			t.Errorf("%s: %+v, want available %v", name, c, want)
		}
	}
	// An executord that works there notices nothing.
	after, err := os.ReadDir(cfg.StateDir)
	if err != nil || len(after) != len(before) {
		t.Errorf("the state directory has %v, %v, before %v", after, err, before)
	}
	if out, err := runPython(t.Context(), sb, "alive", `print("alive")`); err != nil || out.stdout != "alive\n" {
		t.Errorf("a sandbox that was there: %v, %v", out, err)
	}
	sandboxFor(t, e, engine.Spec{ID: "another"})
}

// A probe that is cut off leaves a sandbox, which the next one ends.
func TestProbeAfterOneThatWasCutOff(t *testing.T) {
	cfg := freshConfig(t)
	inside := cfg
	inside.StateDir = filepath.Join(cfg.StateDir, "probe")
	noteKey(t, inside)
	guest, _ := abandon(t, inside, "trial-"+(&Engine{cfg: inside}).key())
	if got := Probe(t.Context(), cfg); !got[0].Available {
		t.Errorf("%+v", got[0])
	}
	if alive(guest) {
		t.Error("the guest of the first lives on")
	}
	if entries, err := os.ReadDir(cfg.StateDir); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestProbeWhereNothingWorks(t *testing.T) {
	cfg := freshConfig(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"no guest": func(c *Config) { c.Guest = nil }, "a guest that is none": func(c *Config) { c.Guest = []byte("x") },
		"no directory": func(c *Config) { c.StateDir = filepath.Join(file, "x") }, "a file": func(c *Config) { c.StateDir = file },
		"a file in the way": func(c *Config) {
			c.StateDir = t.TempDir()
			if err := os.WriteFile(filepath.Join(c.StateDir, "probe"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		bad := cfg
		change(&bad)
		got := Probe(t.Context(), bad)
		if len(got) == 0 || got[0].Name != "sandbox" || got[0].Available || got[0].Detail == "" {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if entries, err := os.ReadDir(cfg.StateDir); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestRemedy(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		root bool
		says string
	}{
		"no id-mapped mounts":         {fmt.Errorf("x: %w", &shiftError{unix.EINVAL}), true, "id-mapped mounts"},
		"user namespaces not allowed": {fmt.Errorf("x: %w", syscall.EPERM), false, "unprivileged user namespaces"},
		"in a container":              {fmt.Errorf("x: %w", syscall.EPERM), true, "privileged"},
		"no access":                   {fmt.Errorf("x: %w", syscall.EACCES), false, "--state-dir"},
		"overlay on overlay":          {errors.New(`overlay at "/": mount (...): invalid argument`), true, "not itself an overlay"},
		"unknown":                     {errors.New("something"), true, ""},
	} {
		if got := remedy(c.err, c.root); (c.says == "") != (got == "") || !strings.Contains(got, c.says) {
			t.Errorf("%s: %q, want that it says %q", name, got, c.says)
		}
	}
}

func TestFindProgramsWhereSandboxesSeeThem(t *testing.T) {
	e := newEngine(t)
	if path, ok := e.find([]string{"no-such-program", "bash"}); !ok || filepath.Base(path) != "bash" {
		t.Errorf("bash: %q, %v", path, ok)
	}
	if path, ok := e.find([]string{"no-such-program"}); ok {
		t.Errorf("found at %q", path)
	}
	if os.Geteuid() != 0 {
		return
	}
	// A link to what no sandbox sees is no program there.
	home := filepath.Join(t.TempDir(), "tool")
	if err := os.WriteFile(home, trueProgram(t), 0o755); err != nil {
		t.Fatal(err)
	}
	link := "/usr/local/bin/executord-test-" + e.key()
	if err := os.Symlink(home, link); err != nil {
		t.Skipf("cannot write to /usr/local/bin: %v", err)
	}
	defer os.Remove(link)
	if path, ok := e.find([]string{filepath.Base(link)}); ok {
		t.Errorf("a link to %s counts as %q", home, path)
	}
}
