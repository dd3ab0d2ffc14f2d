package local

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
)

func TestNewRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	links := t.TempDir()
	for name, c := range map[string]struct {
		change func(*Config)
		says   string
		root   bool
	}{
		"no guest":                             {func(c *Config) { c.Guest = nil }, "no executor-guest", false},
		"a guest that is none":                 {func(c *Config) { c.Guest = []byte("not a program") }, "start the process that forks guests", false},
		"a guest that does not speak":          {func(c *Config) { c.Guest = trueProgram(t) }, "the process that forks guests has ended", false},
		"a state directory below a file":       {func(c *Config) { c.StateDir = filepath.Join(file, "state") }, "make the engine's directory", false},
		"a state directory that sandboxes see": {func(c *Config) { c.ExtraPaths = []string{filepath.Dir(c.StateDir)} }, "which sandboxes see", false},
		"the state directory is to be seen":    {func(c *Config) { c.ExtraPaths = []string{c.StateDir} }, "which sandboxes see", false},
		"it is to be seen by another name": {func(c *Config) {
			link := filepath.Join(links, "link")
			if err := os.Symlink(c.StateDir, link); err != nil {
				t.Fatal(err)
			}
			c.ExtraPaths = []string{link}
		}, "which sandboxes see", false},
		"an extra path that is not there": {func(c *Config) { c.ExtraPaths = []string{"/no/such"} }, "/no/such", false},
		"user ids from 0 on":              {func(c *Config) { c.UIDBase = 0 }, "ranges of user ids", true},
		"no user ids":                     {func(c *Config) { c.UIDCount = 0 }, "ranges of user ids", true},
	} {
		t.Run(name, func(t *testing.T) {
			if c.root {
				needRoot(t)
			}
			cfg := freshConfig(t)
			c.change(&cfg)
			e, err := New(t.Context(), cfg)
			if err == nil {
				e.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want that it says %q", err, c.says)
			}
		})
	}
}

// trueProgram is a program that does nothing.
func trueProgram(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile("/usr/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestNewGivesUpWithItsContext(t *testing.T) {
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if e, err := New(ctx, testConfig(t)); !errors.Is(err, cause) {
		t.Errorf("%v, %v, want the context's cause", e, err)
	}
}

// Two executords on one host do not take each other's ids, groups or sandboxes.
func TestTwoEngines(t *testing.T) {
	a, b := newEngine(t), newEngine(t)
	inA := sandboxFor(t, a, engine.Spec{ID: "same"})
	inB := sandboxFor(t, b, engine.Spec{ID: "same"})
	if _, err := runPython(t.Context(), inA, "mark", `open("/tmp/mark", "w")`); err != nil {
		t.Fatal(err)
	}
	out, err := runPython(t.Context(), inB, "look", `import os; print(os.path.exists("/tmp/mark"))`)
	if err != nil || out.stdout != "False\n" {
		t.Errorf("%v, %v", out, err)
	}
	if _, err := inA.Terminate(t.Context()); err != nil {
		t.Error(err)
	}
	if out, err := runPython(t.Context(), inB, "alive", `print("alive")`); err != nil || out.stdout != "alive\n" {
		t.Errorf("%v, %v", out, err)
	}
}

func TestKeyTellsStateDirectoriesApart(t *testing.T) {
	key := func(dir string) string { return (&Engine{cfg: Config{StateDir: dir}}).key() }
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if key("state") != key(filepath.Join(wd, "state")) || key("/a/b/") != key("/a/b") {
		t.Error("one directory has two keys")
	}
	if key("/a") == key("/b") || key("/a/b") == key("/a") {
		t.Error("two directories have one key")
	}
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{
		"a": true, "0": true, "-": true, "abc-123": true, strings.Repeat("z", 63): true,
		"": false, ".": false, "..": false, "a.b": false, "A": false, "a/b": false, "a b": false, "ä": false, "\x00": false, strings.Repeat("z", 64): false,
	} {
		if got := validID(id); got != want {
			t.Errorf("%q: %v", id, got)
		}
	}
}
