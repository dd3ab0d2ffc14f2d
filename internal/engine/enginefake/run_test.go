package enginefake_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/guestclient"
)

// Runs are tested here, where there is a guest that does as it is told.
func run(t *testing.T, cfg enginefake.Config, f func(t *testing.T, e *enginefake.Engine, c *guestclient.Client)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, cfg)
		f(t, e, client(t, create(t, e, "a")))
		if held := e.Held("a"); len(held) > 0 {
			t.Errorf("the guest still holds %v", held)
		}
	})
}

func script(s enginefake.Script) enginefake.Config {
	return enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script { return s }}
}

func TestRun(t *testing.T) {
	var asked *guestv1.StartRequest
	cfg := enginefake.Config{Script: func(r *guestv1.StartRequest) enginefake.Script {
		asked = r
		return enginefake.Script{Exit: enginefake.Exit(3), Steps: []enginefake.Step{
			enginefake.Stdout(0, "out"), enginefake.Stderr(time.Second, "err"), enginefake.Cat(), enginefake.Stdout(2*time.Minute, "put"),
		}}
	}}
	run(t, cfg, func(t *testing.T, _ *enginefake.Engine, c *guestclient.Client) {
		input := strings.Repeat("x", 300_000)
		out, err := c.Run(t.Context(), guestclient.Command{
			ID: "step-1", Args: []string{"prog", "arg"}, Env: map[string]string{"A": "1", "HOME": "/h"}, Dir: "/d", Input: []byte(input), Timeout: time.Hour,
		})
		if err != nil || out.Code() != 3 || string(out.Stdout) != "out"+input+"put" || string(out.Stderr) != "err" || out.Truncated {
			t.Errorf("%v, code %d, %d bytes, %q", err, out.Code(), len(out.Stdout), out.Stderr)
		}
		want := "A=1 EXECUTOR_EXECUTION=run-step-1 HOME=/h LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
		if got := strings.Join(asked.GetEnv(), " "); got != want || asked.GetExecution() != "run-step-1" || asked.GetWorkingDirectory() != "/d" ||
			asked.GetTimeoutMs() != 3_600_000 || strings.Join(asked.GetArgs(), " ") != "prog arg" {
			t.Errorf("asked for %v", asked)
		}
	})
}

func TestRunLimit(t *testing.T) {
	var steps []enginefake.Step
	for _, text := range []string{"first ", "second ", "third "} {
		steps = append(steps, enginefake.Stdout(time.Millisecond, text), enginefake.Stderr(time.Millisecond, text))
	}
	for limit, want := range map[int]struct {
		stdout, stderr string
		truncated      bool
	}{
		8:  {"first se", "d third ", true},
		19: {"first second third ", "first second third ", false},
		18: {"first second third", "irst second third ", true},
		1:  {"f", " ", true},
		0:  {"first second third ", "first second third ", false},
	} {
		run(t, script(enginefake.Script{Steps: steps, Exit: enginefake.Exit(0)}), func(t *testing.T, _ *enginefake.Engine, c *guestclient.Client) {
			out, err := c.Run(t.Context(), guestclient.Command{Args: []string{"x"}, Limit: limit})
			if err != nil || string(out.Stdout) != want.stdout || string(out.Stderr) != want.stderr || out.Truncated != want.truncated {
				t.Errorf("limit %d: %q, %q, truncated %v, %v", limit, out.Stdout, out.Stderr, out.Truncated, err)
			}
		})
	}
}

// A program that does not read its input is no failure of the run.
func TestRunUnreadInput(t *testing.T) {
	for name, s := range map[string]enginefake.Script{
		"ends":   {Steps: []enginefake.Step{enginefake.Stdout(time.Second, "x")}, Exit: enginefake.Exit(0)},
		"closes": {Steps: []enginefake.Step{enginefake.Shut(time.Second), enginefake.Stdout(time.Minute, "x")}, Exit: enginefake.Exit(0)},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, script(s), func(t *testing.T, _ *enginefake.Engine, c *guestclient.Client) {
				out, err := c.Run(t.Context(), guestclient.Command{Args: []string{"x"}, Input: make([]byte, 1<<20)})
				if err != nil || string(out.Stdout) != "x" {
					t.Errorf("%q, %v", out.Stdout, err)
				}
			})
		})
	}
}

func TestRunTimeout(t *testing.T) {
	run(t, script(enginefake.Script{IgnoreTerm: true}), func(t *testing.T, _ *enginefake.Engine, c *guestclient.Client) {
		began := time.Now()
		out, err := c.Run(t.Context(), guestclient.Command{Args: []string{"x"}, Timeout: time.Minute})
		if err != nil || out.Exit.GetStopCause() != guestv1.StopCause_STOP_CAUSE_TIMEOUT || out.Code() != 128+9 || time.Since(began) > 2*time.Minute {
			t.Errorf("%v, %v after %v", out.Exit, err, time.Since(began))
		}
	})
}

// Whoever stops waiting leaves nothing running.
func TestRunGivenUp(t *testing.T) {
	bad := errors.New("bad")
	endless := script(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(time.Second, "x")}})
	run(t, endless, func(t *testing.T, _ *enginefake.Engine, c *guestclient.Client) {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Minute, func() { cancel(bad) })
		if _, err := c.Run(ctx, guestclient.Command{Args: []string{"x"}, Input: make([]byte, 1<<20)}); !errors.Is(err, bad) {
			t.Error(err)
		}
	})
	run(t, endless, func(t *testing.T, _ *enginefake.Engine, c *guestclient.Client) {
		_, err := c.RunStream(t.Context(), guestclient.Command{Args: []string{"x"}}, func(guestv1.Stream, []byte) error { return bad })
		if !errors.Is(err, bad) {
			t.Error(err)
		}
	})
	run(t, script(enginefake.Script{Refuse: enginefake.Refusal(guestv1.Error_KIND_NO_SUCH_PROGRAM, "no x")}), func(t *testing.T, _ *enginefake.Engine, c *guestclient.Client) {
		if _, err := c.Run(t.Context(), guestclient.Command{Args: []string{"x"}}); guestclient.KindOf(err) != guestv1.Error_KIND_NO_SUCH_PROGRAM {
			t.Error(err)
		}
	})
}

// What a run of the same name left is ended first.
func TestRunAgain(t *testing.T) {
	runs := 0
	cfg := enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script {
		if runs++; runs == 1 {
			return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "of the first")}}
		}
		return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "of the second")}, Exit: enginefake.Exit(0)}
	}}
	run(t, cfg, func(t *testing.T, e *enginefake.Engine, c *guestclient.Client) {
		// As an executord that was killed leaves it, with part of its output read.
		if _, err := c.Start(t.Context(), &guestv1.StartRequest{Execution: "run-x", Args: []string{"x"}, WorkingDirectory: "/"}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		out, err := c.Read(t.Context(), "run-x", 5, 100, 0)
		if err != nil {
			t.Fatal(err)
		}
		out.Release()
		again, err := c.Run(t.Context(), guestclient.Command{ID: "x", Args: []string{"x"}})
		if err != nil || string(again.Stdout) != "of the second" || len(e.Started()) != 2 {
			t.Errorf("%q, %v, started %v", again.Stdout, err, e.Started())
		}
	})
}

// Pipes that are lost are not seen.
func TestRunOverLostPipes(t *testing.T) {
	cfg := script(enginefake.Script{Steps: []enginefake.Step{enginefake.Cat()}, Exit: enginefake.Exit(0)})
	cfg.Hooks.Answer = enginefake.CutEvery(9)
	run(t, cfg, func(t *testing.T, _ *enginefake.Engine, c *guestclient.Client) {
		input := strings.Repeat("0123456789", 100_000)
		out, err := c.Run(t.Context(), guestclient.Command{ID: "x", Args: []string{"x"}, Input: []byte(input), Limit: 2_000_000})
		if err != nil || string(out.Stdout) != input {
			t.Errorf("%d bytes, %v", len(out.Stdout), err)
		}
	})
}
