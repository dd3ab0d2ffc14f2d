package daemon

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/config"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/guestbinary"
)

func TestCommands(t *testing.T) {
	state := t.TempDir()
	for name, test := range map[string]struct {
		args           []string
		env            []string
		code           int
		stdout, stderr string
	}{
		"nothing":            {args: nil, stdout: "Available Commands:"},
		"help":               {args: []string{"--help"}, stdout: "serve"},
		"version":            {args: []string{"version"}, stdout: "executord devel"},
		"version with more":  {args: []string{"version", "x"}, code: 2, stderr: "executord: unknown command \"x\""},
		"unknown command":    {args: []string{"sreve"}, code: 2, stderr: "executord: unknown command \"sreve\""},
		"help of serve":      {args: []string{"serve", "--help"}, stdout: "--drain-timeout"},
		"help for serve":     {args: []string{"help", "serve"}, stdout: "executord serve [flags]"},
		"unknown flag":       {args: []string{"serve", "--lisen=x"}, code: 2, stderr: "listen"},
		"bad value":          {args: []string{"serve", "--state-dir", state, "--listen", "0.0.0.0:1"}, code: 2, stderr: "auth.methods must be set too"},
		"bad variable":       {args: []string{"config", "print"}, env: []string{"EXECUTORD_STATE_DIR=" + state, "EXECUTORD_ON_STOP=explode"}, code: 2, stderr: "EXECUTORD_ON_STOP"},
		"config":             {args: []string{"config"}, stdout: "print"},
		"config print":       {args: []string{"config", "print", "--drain-timeout=5s"}, env: []string{"EXECUTORD_STATE_DIR=" + state}, stdout: "drain_timeout: 5s"},
		"config with more":   {args: []string{"config", "x"}, code: 2, stderr: "unknown command"},
		"argument for serve": {args: []string{"serve", "x"}, code: 2, stderr: "x"},
		"serve fails":        {args: []string{"serve", "--state-dir=/dev/null/x"}, code: 1, stderr: "executord: make state directory"},
		"doctor fails":       {args: []string{"doctor", "--state-dir=/dev/null/x"}, code: 1, stderr: "executord: "},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout bytes.Buffer
			stderr := &syncBuffer{}
			code := Main(t.Context(), test.args, test.env, strings.NewReader(""), &stdout, stderr)
			if code != test.code {
				t.Errorf("exit code %d, want %d", code, test.code)
			}
			if !strings.Contains(stdout.String(), test.stdout) || test.stdout == "" && stdout.Len() > 0 {
				t.Errorf("stdout is %q, want %q", stdout.String(), test.stdout)
			}
			if !strings.Contains(stderr.String(), test.stderr) || test.stderr == "" && stderr.String() != "" {
				t.Errorf("stderr is %q, want %q", stderr, test.stderr)
			}
		})
	}
}

// TestPrintedConfigIsRead gives what config print prints to --config.
func TestPrintedConfigIsRead(t *testing.T) {
	dir := t.TempDir()
	call := func(args ...string) string {
		t.Helper()
		var stdout bytes.Buffer
		stderr := &syncBuffer{}
		if code := Main(t.Context(), append([]string{"config", "print"}, args...), nil, nil, &stdout, stderr); code != 0 {
			t.Fatalf("exit code %d: %s", code, stderr)
		}
		return stdout.String()
	}
	printed := call("--state-dir="+dir, "--limits-memory-bytes=512MiB", "--on-stop=terminate", "--local-extra-paths=/opt/x")
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, []byte(printed), 0o600); err != nil {
		t.Fatal(err)
	}
	if again := call("--config=" + file); again != printed {
		t.Errorf("printed\n%s\nread back as\n%s", printed, again)
	}
}

// TestServe serves until a signal, as the program does.
func TestServe(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			stderr := &syncBuffer{}
			p := &program{stderr: stderr, openEngines: newFakeEngine().open}
			code := make(chan int, 1)
			goRun(t, func() {
				code <- p.run(context.Background(), []string{
					"serve", "--state-dir=" + filepath.Join(dir, "state"), "--listen=127.0.0.1:0", "--log-format=" + format,
				}, nil, &bytes.Buffer{})
			})
			ready := map[string]string{"text": "msg=ready address=127.0.0.1:", "json": `"msg":"ready","address":"127.0.0.1:`}[format]
			eventually(t, func() bool { return strings.Contains(stderr.String(), ready) })
			if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if got := <-code; got != 0 {
				t.Errorf("exit code %d:\n%s", got, stderr)
			}
			for _, want := range []string{"stopped by SIGTERM", "stopping", "stopped"} {
				if !strings.Contains(stderr.String(), want) {
					t.Errorf("the log lacks %q:\n%s", want, stderr)
				}
			}
		})
	}
}

// TestServeWithoutGuest is a build that `make build` did not prepare.
func TestServeWithoutGuest(t *testing.T) {
	if _, err := guestbinary.Bytes(); err == nil {
		t.Skip("this build has a guest")
	}
	stderr := &syncBuffer{}
	code := Main(t.Context(), []string{"serve", "--state-dir=" + filepath.Join(t.TempDir(), "state")}, nil, nil, &bytes.Buffer{}, stderr)
	if code != 1 || !strings.Contains(stderr.String(), "build it with `make build`") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

func TestLogLevels(t *testing.T) {
	for level, want := range map[configv1.Log_Level]string{
		configv1.Log_LEVEL_DEBUG: "dbg inf wrn err", configv1.Log_LEVEL_INFO: "inf wrn err",
		configv1.Log_LEVEL_WARN: "wrn err", configv1.Log_LEVEL_ERROR: "err",
	} {
		var out bytes.Buffer
		log := newLogger(&out, &configv1.Log{Level: level})
		log.Debug("dbg")
		log.Info("inf")
		log.Warn("wrn")
		log.Error("err")
		var got []string
		for _, word := range []string{"dbg", "inf", "wrn", "err"} {
			if strings.Contains(out.String(), word) {
				got = append(got, word)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%v logs %v, want %s", level, got, want)
		}
	}
}

func TestWriteCapabilities(t *testing.T) {
	var out bytes.Buffer
	err := writeCapabilities(&out, []engine.Capability{
		{Name: "sandbox", Available: true, Detail: "one was made and ended", Remedy: "never shown"},
		{Name: "limit.memory", Detail: "no control groups", Remedy: "run as root"},
		{Name: "x", Detail: "nothing can be done"},
	})
	want := "ok       sandbox       one was made and ended\n" +
		"missing  limit.memory  no control groups\n" +
		"                       to get it: run as root\n" +
		"missing  x             nothing can be done\n"
	if err != nil || out.String() != want {
		t.Errorf("%v\n%s\nwant\n%s", err, out.String(), want)
	}
	if err := writeCapabilities(brokenWriter{}, []engine.Capability{{Name: "x"}}); err == nil {
		t.Error("no error of a writer that is broken")
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

// TestLocalConfig checks that every setting of the engine reaches it.
func TestLocalConfig(t *testing.T) {
	if _, err := guestbinary.Bytes(); err != nil {
		t.Skip("this build has no guest; `make build` makes one")
	}
	loaded, err := config.Load(config.Input{WorkingDirectory: "/", Args: []string{
		"--state-dir=/s", "--limits-memory-bytes=64MiB", "--limits-pids=8", "--limits-cpu-millis=10",
		"--local-uid-base=131072", "--local-uid-count=2", "--local-cgroup-parent=/p", "--local-extra-paths=/opt/x", "--local-blank-guests=4",
	}})
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := localConfig(loaded, discard())
	if err != nil {
		t.Fatal(err)
	}
	if cfg.StateDir != "/s" || cfg.Defaults != (engine.Limits{MemoryBytes: 64 << 20, PIDs: 8, CPUMillis: 10}) ||
		cfg.UIDBase != 131072 || cfg.UIDCount != 2 || cfg.CgroupParent != "/p" || len(cfg.ExtraPaths) != 1 || cfg.Blank != 4 || len(cfg.Guest) == 0 || cfg.Logger == nil {
		t.Errorf("%+v", cfg)
	}
}

// TestDoctor tries this host, whatever it can do, and leaves nothing behind.
func TestDoctor(t *testing.T) {
	if _, err := guestbinary.Bytes(); err != nil {
		t.Skip("this build has no guest; `make build` makes one")
	}
	dir := filepath.Join(t.TempDir(), "state")
	var stdout bytes.Buffer
	stderr := &syncBuffer{}
	code := Main(t.Context(), []string{"doctor", "--state-dir=" + dir}, nil, nil, &stdout, stderr)
	told := make(map[string]string)
	for line := range strings.Lines(stdout.String()) {
		if words := strings.Fields(line); words[0] != "to" {
			told[words[1]] = words[0]
		}
	}
	missing := false
	for _, name := range essential() {
		if told["sandbox"] == "ok" && told[name] == "" {
			t.Errorf("nothing is said about %s", name)
		}
		missing = missing || told[name] == "missing"
	}
	if (code != 0) != missing || missing != strings.Contains(stderr.String(), "essential and missing: ") {
		t.Errorf("exit code %d\n%s%s", code, stdout.String(), stderr)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
