package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
)

func TestMainRun(t *testing.T) {
	type run = func(ctx context.Context, group *Group) error
	tests := []struct {
		name    string
		run     run
		signals []os.Signal
		code    int
		stderr  string
	}{
		{name: "success", run: func(context.Context, *Group) error { return nil }},
		{name: "error", run: func(context.Context, *Group) error { return errFirst }, code: 1, stderr: "prog: first\n"},
		{name: "error of a routine", code: 1, stderr: "prog: second\n",
			run: func(_ context.Context, group *Group) error {
				group.Go(func(context.Context) error { return errSecond })
				return nil
			}},
		{name: "graceful stop", signals: []os.Signal{syscall.SIGTERM},
			run: func(ctx context.Context, _ *Group) error { return untilEnded(func(c error) error { return c })(ctx) }},
		{name: "error while stopping", signals: []os.Signal{syscall.SIGINT}, code: 1, stderr: "prog: close store: first\n",
			run: func(ctx context.Context, _ *Group) error {
				<-ctx.Done()
				return fmt.Errorf("close store: %w", errFirst)
			}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				signals := make(chan os.Signal, len(test.signals))
				for _, s := range test.signals {
					signals <- s
				}
				var stderr strings.Builder
				code := Main{Name: "prog", Signals: signals, Stderr: &stderr}.Run(t.Context(), test.run)
				if code != test.code || stderr.String() != test.stderr {
					t.Errorf("Run() = %d with %q, want %d with %q", code, stderr.String(), test.code, test.stderr)
				}
			})
		})
	}
}

func TestMainCauseNamesTheSignal(t *testing.T) {
	for s, want := range map[os.Signal]string{syscall.SIGTERM: "stopped by SIGTERM", syscall.SIGINT: "stopped by SIGINT", foreign{}: "stopped by foreign"} {
		signals := make(chan os.Signal, 1)
		signals <- s
		var cause error
		Main{Name: "prog", Signals: signals, Stderr: io.Discard}.Run(t.Context(), func(ctx context.Context, _ *Group) error {
			<-ctx.Done()
			cause = context.Cause(ctx)
			return nil
		})
		if !errors.Is(cause, ErrSignalled) || cause.Error() != want {
			t.Errorf("the cause is %v, want %q", cause, want)
		}
	}
}

// foreign is a signal of no system we know.
type foreign struct{}

func (foreign) String() string { return "foreign" }
func (foreign) Signal()        {}

func TestMainSecondSignal(t *testing.T) {
	for s, want := range map[os.Signal]int{syscall.SIGINT: 130, syscall.SIGTERM: 143, foreign{}: 128} {
		synctest.Test(t, func(t *testing.T) {
			signals := make(chan os.Signal)
			release := make(chan struct{})
			var (
				wait   sync.WaitGroup
				code   int
				stderr strings.Builder
			)
			wait.Go(func() {
				code = Main{Name: "prog", Signals: signals, Stderr: &stderr}.Run(t.Context(), func(context.Context, *Group) error {
					<-release // deaf to its context
					return nil
				})
			})
			signals <- syscall.SIGTERM
			synctest.Wait()
			signals <- s
			wait.Wait() // a deadlock here if Run waited for the routine
			close(release)
			if code != want || !strings.HasSuffix(stderr.String(), "again, leaving at once\n") {
				t.Errorf("Run() = %d with %q after a second %v, want %d", code, stderr.String(), s, want)
			}
		})
	}
}

const childVariable = "LIFECYCLE_TEST_CHILD"

// child is the program of TestRunMain.
func child() int {
	return RunMain(context.Background(), "child", func(ctx context.Context, _ *Group) error {
		fmt.Println("ready")
		<-ctx.Done()
		fmt.Println(context.Cause(ctx))
		if os.Getenv(childVariable) == "deaf" {
			select {}
		}
		return nil
	})
}

// TestRunMain sends real signals to a real process.
func TestRunMain(t *testing.T) {
	t.Run("one signal", func(t *testing.T) {
		cmd, out := startChild(t, "graceful")
		expectLine(t, out, "ready\n")
		cmd.Process.Signal(syscall.SIGTERM)
		expectLine(t, out, "stopped by SIGTERM\n")
		if err := cmd.Wait(); err != nil {
			t.Errorf("the child ended with %v, want success", err)
		}
	})
	t.Run("two signals", func(t *testing.T) {
		cmd, out := startChild(t, "deaf")
		expectLine(t, out, "ready\n")
		cmd.Process.Signal(syscall.SIGTERM)
		expectLine(t, out, "stopped by SIGTERM\n")
		cmd.Process.Signal(syscall.SIGINT)
		cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 130 {
			t.Errorf("the child ended with %v, want exit status 130", cmd.ProcessState)
		}
	})
}

func startChild(t *testing.T, mode string) (*exec.Cmd, io.Reader) {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childVariable+"="+mode)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, out
}

func expectLine(t *testing.T, r io.Reader, want string) {
	t.Helper()
	line := make([]byte, len(want))
	if _, err := io.ReadFull(r, line); err != nil || string(line) != want {
		t.Fatalf("the child said %q (%v), want %q", line, err, want)
	}
}
