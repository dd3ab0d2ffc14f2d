package enginefake_test

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestclient"
)

// newEngine makes an engine that is shut down at the end of the test.
func newEngine(t *testing.T, cfg enginefake.Config) *enginefake.Engine {
	t.Helper()
	e := enginefake.New(cfg)
	t.Cleanup(e.Shutdown)
	return e
}

func create(t *testing.T, e engine.Engine, id string) engine.Sandbox {
	t.Helper()
	sb, err := e.Create(t.Context(), engine.Spec{ID: id})
	if err != nil {
		t.Fatal(err)
	}
	return sb
}

// client speaks to the guest of a sandbox until the end of the test.
func client(t *testing.T, sb engine.Sandbox) *guestclient.Client {
	t.Helper()
	c := guestclient.New(sb)
	t.Cleanup(c.Close)
	return c
}

func list(t *testing.T, e engine.Engine) []string {
	t.Helper()
	ids, err := e.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

// TestEngine has what the waist promises.
func TestEngine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		defaults := engine.Limits{MemoryBytes: 7, PIDs: 8}
		e := newEngine(t, enginefake.Config{Limits: defaults})
		if e.Name() == "" || e.Isolation() == "" || len(e.Capabilities()) == 0 || e.DefaultLimits() != defaults || e.Close() != nil {
			t.Error("the facts of the engine")
		}
		if err := e.CheckLimits(engine.Limits{MemoryBytes: 1, PIDs: 1}); err != nil {
			t.Error(err)
		}
		if err := e.CheckLimits(engine.Limits{CPUMillis: 1}); fault.ReasonOf(err) != "LIMIT_NOT_ENFORCEABLE" {
			t.Error(err)
		}
		if _, err := e.Open(t.Context(), "a"); fault.KindOf(err) != fault.NotFound {
			t.Error(err)
		}
		a, err := e.Create(t.Context(), engine.Spec{ID: "a", Limits: engine.Limits{PIDs: 1}})
		if err != nil || a.ID() != "a" || a.Limits() != (engine.Limits{MemoryBytes: 7, PIDs: 1}) {
			t.Fatalf("%v, %v", a, err)
		}
		for what, again := range map[string]func() (engine.Sandbox, error){
			"create": func() (engine.Sandbox, error) { return e.Create(t.Context(), engine.Spec{ID: "a"}) },
			"open":   func() (engine.Sandbox, error) { return e.Open(t.Context(), "a") },
		} {
			if sb, err := again(); err != nil || sb != a {
				t.Errorf("%s again: %v, %v", what, sb, err)
			}
		}
		b := create(t, e, "b")
		if diff := cmp.Diff([]string{"a", "b"}, list(t, e)); diff != "" {
			t.Error(diff)
		}
		for range 2 {
			if remains, err := a.Terminate(t.Context()); err != nil || remains.Processes != 0 {
				t.Errorf("%v, %v", remains, err)
			}
		}
		select {
		case <-a.Done():
		default:
			t.Error("not done after Terminate")
		}
		if _, err := a.Dial(t.Context()); err == nil {
			t.Error("dialled a sandbox that has ended")
		}
		e.Die("b")
		<-b.Done()
		if diff := cmp.Diff([]string{"b"}, list(t, e)); diff != "" {
			t.Errorf("a dead sandbox leaves something: %s", diff)
		}
		if u, err := b.Usage(t.Context()); err != nil || u != (engine.Usage{}) {
			t.Errorf("%v, %v", u, err)
		}
		if _, err := e.Open(t.Context(), "b"); fault.KindOf(err) != fault.NotFound || len(list(t, e)) != 0 {
			t.Errorf("%v, %v", err, list(t, e))
		}
		if again := create(t, e, "b"); again == b {
			t.Error("a dead sandbox was adopted")
		}
		if diff := cmp.Diff([]string{"a", "b", "b"}, e.Made()); diff != "" {
			t.Error(diff)
		}
		e.Die("unknown")
	})
}

// read reads a command to its end.
func read(t *testing.T, c *guestclient.Client, id string) (output map[guestv1.Stream]string, exit *guestv1.Exit) {
	t.Helper()
	output = make(map[guestv1.Stream]string)
	for position := int64(0); ; {
		out, err := c.Read(t.Context(), id, position, 100<<10, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		for _, chunk := range out.Chunks {
			output[chunk.Stream] += string(chunk.Data)
			position += int64(len(chunk.Data))
		}
		exit := out.Exit
		out.Release()
		if exit != nil {
			return output, exit
		}
	}
}

// TestScripts does what the scripts say, at the times they say.
func TestScripts(t *testing.T) {
	tests := map[string]struct {
		script  enginefake.Script
		timeout time.Duration
		stop    []time.Duration // graces of orders, a second apart, from the first second on
		stdout  string
		stderr  string
		code    int32
		signal  int32
		cause   guestv1.StopCause
		killed  bool
		takes   time.Duration
	}{
		"nothing": {script: enginefake.Script{Exit: enginefake.Exit(0)}},
		"output": {
			script: enginefake.Script{
				Steps: []enginefake.Step{enginefake.Stdout(time.Second, "a"), enginefake.Pause(time.Second), enginefake.Stderr(0, "b"), enginefake.Stdout(time.Second, "c")},
				Exit:  enginefake.Exit(3),
			},
			stdout: "ac", stderr: "b", code: 3, takes: 3 * time.Second,
		},
		"more than there is room for": {
			script: enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, strings.Repeat("x", 3<<20))}, Exit: enginefake.Exit(0)},
			stdout: strings.Repeat("x", 3<<20),
		},
		"a signal": {script: enginefake.Script{Exit: enginefake.Signal(11)}, signal: 11},
		"timeout": {
			script: enginefake.Script{}, timeout: 5 * time.Second, signal: 15, cause: guestv1.StopCause_STOP_CAUSE_TIMEOUT, takes: 5 * time.Second,
		},
		"timeout and kill": {
			script: enginefake.Script{IgnoreTerm: true}, timeout: 5 * time.Second,
			signal: 9, cause: guestv1.StopCause_STOP_CAUSE_TIMEOUT, killed: true, takes: 7 * time.Second,
		},
		"stop": {
			script: enginefake.Script{TermDelay: time.Minute}, stop: []time.Duration{2 * time.Minute},
			signal: 15, cause: guestv1.StopCause_STOP_CAUSE_REQUESTED, takes: 61 * time.Second,
		},
		"stop and kill": {
			script: enginefake.Script{TermDelay: time.Minute}, stop: []time.Duration{30 * time.Second},
			signal: 9, cause: guestv1.StopCause_STOP_CAUSE_REQUESTED, killed: true, takes: 31 * time.Second,
		},
		"a shorter grace": {
			script: enginefake.Script{IgnoreTerm: true}, stop: []time.Duration{time.Hour, 10 * time.Second},
			signal: 9, cause: guestv1.StopCause_STOP_CAUSE_REQUESTED, killed: true, takes: 12 * time.Second,
		},
		"a longer grace": {
			script: enginefake.Script{IgnoreTerm: true}, stop: []time.Duration{10 * time.Second, time.Hour},
			signal: 9, cause: guestv1.StopCause_STOP_CAUSE_REQUESTED, killed: true, takes: 11 * time.Second,
		},
		"stop while it waits for room": {
			script: enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, strings.Repeat("x", 2<<20))}, Exit: enginefake.Exit(0)},
			stop:   []time.Duration{0}, stdout: strings.Repeat("x", 2<<20), code: 0, takes: 0,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newEngine(t, enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script { return test.script }})
				c := client(t, create(t, e, "a"))
				begin := time.Now()
				start := &guestv1.StartRequest{Execution: "x", Args: []string{"p"}, TimeoutMs: uint64(test.timeout.Milliseconds()), GraceMs: 2000}
				if _, err := c.Start(t.Context(), start); err != nil {
					t.Fatal(err)
				}
				var orders sync.WaitGroup
				orders.Go(func() {
					for _, grace := range test.stop {
						time.Sleep(time.Second)
						if err := c.Stop(t.Context(), "x", grace); err != nil {
							t.Error(err)
						}
					}
				})
				output, exit := read(t, c, "x")
				if took := time.Since(begin); took != test.takes {
					t.Errorf("it took %v, want %v", took, test.takes)
				}
				if output[guestv1.Stream_STREAM_STDOUT] != test.stdout || output[guestv1.Stream_STREAM_STDERR] != test.stderr {
					t.Errorf("%d bytes and %d", len(output[guestv1.Stream_STREAM_STDOUT]), len(output[guestv1.Stream_STREAM_STDERR]))
				}
				if exit.GetCode() != test.code || exit.GetSignal() != test.signal || exit.GetStopCause() != test.cause || exit.GetKilled() != test.killed || !exit.GetTreeEmpty() {
					t.Errorf("%v", exit)
				}
				if ran := time.Duration(exit.GetRunMicros()) * time.Microsecond; ran != test.takes {
					t.Errorf("it ran for %v", ran)
				}
				orders.Wait()
				if err := c.Stop(t.Context(), "x", 0); err != nil {
					t.Errorf("stop of one that has ended: %v", err)
				}
				for range 2 {
					if err := c.Release(t.Context(), "x"); err != nil {
						t.Error(err)
					}
				}
				if held := e.Held("a"); len(held) != 0 {
					t.Errorf("held: %v", held)
				}
			})
		})
	}
}

// TestProtocol refuses what a guest refuses, and repeats what it repeats.
func TestProtocol(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{Script: func(q *guestv1.StartRequest) enginefake.Script {
			if q.GetExecution() == "refused" {
				return enginefake.Script{StartDelay: time.Second, Refuse: enginefake.Refusal(guestv1.Error_KIND_EXHAUSTED, "no more")}
			}
			return enginefake.Script{StartDelay: time.Second, Steps: []enginefake.Step{enginefake.Stdout(0, "0123456789")}}
		}})
		c := client(t, create(t, e, "a"))
		kind := func(what string, err error, want guestv1.Error_Kind) {
			t.Helper()
			if got := guestclient.KindOf(err); got != want || err == nil {
				t.Errorf("%s: %v", what, err)
			}
		}
		_, err := c.Read(t.Context(), "x", 0, 10, 0)
		kind("read of nothing", err, guestv1.Error_KIND_NOT_FOUND)
		kind("stop of nothing", c.Stop(t.Context(), "x", 0), guestv1.Error_KIND_NOT_FOUND)
		_, err = c.Start(t.Context(), &guestv1.StartRequest{Execution: "refused"})
		kind("refused", err, guestv1.Error_KIND_EXHAUSTED)

		begin := time.Now()
		var starts sync.WaitGroup
		for range 3 {
			starts.Go(func() {
				if _, err := c.Start(t.Context(), &guestv1.StartRequest{Execution: "x"}); err != nil {
					t.Error(err)
				}
			})
		}
		starts.Wait()
		if time.Since(begin) != time.Second || !slices.Equal(e.Started(), []string{"x"}) {
			t.Errorf("started %v after %v", e.Started(), time.Since(begin))
		}
		kind("release of one that runs", c.Release(t.Context(), "x"), guestv1.Error_KIND_INVALID)
		info, err := c.Info(t.Context())
		if err != nil || !slices.Equal(info.GetExecutions(), []string{"x"}) {
			t.Errorf("%v, %v", info, err)
		}
		at := func(position int64, size int, want string) {
			t.Helper()
			out, err := c.Read(t.Context(), "x", position, size, time.Second)
			if err != nil {
				t.Error(err)
				return
			}
			defer out.Release()
			got := ""
			for _, chunk := range out.Chunks {
				got += string(chunk.Data)
			}
			if got != want || out.Exit != nil {
				t.Errorf("at %d: %q, %v", position, got, out.Exit)
			}
		}
		at(0, 4, "0123")
		at(0, 100, "0123456789")
		if e.Pending("a", "x") != 10 {
			t.Errorf("%d bytes pending", e.Pending("a", "x"))
		}
		at(4, 3, "456")
		_, err = c.Read(t.Context(), "x", 3, 10, 0)
		kind("read of what was given up", err, guestv1.Error_KIND_INVALID)
		_, err = c.Read(t.Context(), "x", 11, 10, 0)
		kind("read beyond the end", err, guestv1.Error_KIND_INVALID)
		begin = time.Now()
		at(10, 10, "")
		if time.Since(begin) != time.Second || e.Pending("a", "x") != 0 || e.Pending("a", "none") != 0 || e.Pending("none", "x") != 0 || e.Held("none") != nil {
			t.Errorf("waited for %v, %d bytes pending", time.Since(begin), e.Pending("a", "x"))
		}
	})
}

// TestHooks makes everything fail that can.
func TestHooks(t *testing.T) {
	bad := errors.New("out of order")
	refuse := func(context.Context, string) error { return bad }
	synctest.Test(t, func(t *testing.T) {
		var broken atomic.Bool
		fail := func(context.Context, string) error {
			if broken.Load() {
				return bad
			}
			return nil
		}
		e := newEngine(t, enginefake.Config{Hooks: enginefake.Hooks{
			Open: fail, Dial: fail, Terminate: fail, List: func(ctx context.Context) error { return fail(ctx, "") },
			Usage: func(context.Context, string) (engine.Usage, error) { return engine.Usage{OOMKills: 3}, nil },
		}})
		sb := create(t, e, "a")
		broken.Store(true)
		_, open := e.Open(t.Context(), "a")
		_, dial := sb.Dial(t.Context())
		_, terminate := sb.Terminate(t.Context())
		_, listed := e.List(t.Context())
		for what, err := range map[string]error{"open": open, "dial": dial, "terminate": terminate, "list": listed} {
			if !errors.Is(err, bad) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if u, err := sb.Usage(t.Context()); err != nil || u.OOMKills != 3 {
			t.Errorf("%v, %v", u, err)
		}
		broken.Store(false)
		if _, err := sb.Terminate(t.Context()); err != nil {
			t.Error(err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{Hooks: enginefake.Hooks{Create: refuse}})
		if _, err := e.Create(t.Context(), engine.Spec{ID: "a"}); !errors.Is(err, bad) || len(list(t, e)) != 0 {
			t.Errorf("%v, %v", err, list(t, e))
		}
	})
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{Hooks: enginefake.Hooks{Created: refuse}})
		if _, err := e.Create(t.Context(), engine.Spec{ID: "a"}); !errors.Is(err, bad) || len(list(t, e)) != 1 {
			t.Errorf("%v, %v", err, list(t, e))
		}
	})
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{})
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(bad)
		if _, err := e.Create(ctx, engine.Spec{ID: "a"}); !errors.Is(err, bad) || len(list(t, e)) != 0 {
			t.Errorf("%v, %v", err, list(t, e))
		}
	})
}

// TestAnswers are changed, dropped and cut.
func TestAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{
			Script: func(*guestv1.StartRequest) enginefake.Script {
				return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "hello")}, Exit: enginefake.Exit(0)}
			},
			Hooks: enginefake.Hooks{Answer: enginefake.CutEvery(2)},
		})
		c := client(t, create(t, e, "a"))
		if _, err := c.Start(t.Context(), &guestv1.StartRequest{Execution: "x"}); err != nil {
			t.Fatal(err)
		}
		output, exit := read(t, c, "x")
		if output[guestv1.Stream_STREAM_STDOUT] != "hello" || exit.GetCode() != 0 || len(e.Started()) != 1 {
			t.Errorf("%v, %v, started %v", output, exit, e.Started())
		}
	})
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{Hooks: enginefake.Hooks{Answer: func(sandbox string, q *guestv1.Request, a *enginefake.Answer) {
			if sandbox != "a" || q.GetInfo() == nil {
				t.Errorf("%s, %v", sandbox, q)
			}
			a.Drop = true
		}}})
		c := client(t, create(t, e, "a"))
		because := errors.New("no time")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, because)
		defer cancel()
		if _, err := c.Info(ctx); !errors.Is(err, because) {
			t.Error(err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{Hooks: enginefake.Hooks{Answer: func(_ string, _ *guestv1.Request, a *enginefake.Answer) {
			a.Response.GetInfo().Executions = []string{"made", "up"}
		}}})
		info, err := client(t, create(t, e, "a")).Info(t.Context())
		if err != nil || len(info.GetExecutions()) != 2 {
			t.Errorf("%v, %v", info, err)
		}
	})
}

// TestAsk drops requests before they are done.
func TestAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var deaf atomic.Bool
		deaf.Store(true)
		e := newEngine(t, enginefake.Config{Hooks: enginefake.Hooks{Ask: func(string, *guestv1.Request) bool { return !deaf.Load() }}})
		c := client(t, create(t, e, "a"))
		because := errors.New("no time")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, because)
		defer cancel()
		if _, err := c.Start(ctx, &guestv1.StartRequest{Execution: "x"}); !errors.Is(err, because) || len(e.Started()) != 0 {
			t.Errorf("%v, started %v", err, e.Started())
		}
		deaf.Store(false)
		if _, err := c.Start(t.Context(), &guestv1.StartRequest{Execution: "x"}); err != nil || len(e.Started()) != 1 {
			t.Errorf("%v, started %v", err, e.Started())
		}
	})
}

// TestImmortal is ended by nothing but its sandbox's end.
func TestImmortal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script {
			return enginefake.Script{Immortal: true}
		}})
		sb := create(t, e, "a")
		c := client(t, sb)
		if _, err := c.Start(t.Context(), &guestv1.StartRequest{Execution: "x", TimeoutMs: 10}); err != nil {
			t.Fatal(err)
		}
		if err := c.Stop(t.Context(), "x", 0); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Hour)
		if err := c.Release(t.Context(), "x"); guestclient.KindOf(err) != guestv1.Error_KIND_INVALID {
			t.Errorf("%v", err)
		}
		if remains, err := sb.Terminate(t.Context()); err != nil || remains.Processes != 1 {
			t.Errorf("%v, %v", remains, err)
		}
	})
}

// TestLies tells an exit as it stands.
func TestLies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lie := &guestv1.Exit{Status: &guestv1.Exit_Code{Code: 7}, RunMicros: 5, Reaped: 9}
		e := newEngine(t, enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script {
			return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(time.Minute, "x")}, Exit: lie, Lie: true}
		}})
		c := client(t, create(t, e, "a"))
		if _, err := c.Start(t.Context(), &guestv1.StartRequest{Execution: "x"}); err != nil {
			t.Fatal(err)
		}
		if _, exit := read(t, c, "x"); exit.String() != lie.String() {
			t.Errorf("%v", exit)
		}
	})
}

// TestDieUnderPipes ends everything that is under way.
func TestDieUnderPipes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script { return enginefake.Script{} }})
		sb := create(t, e, "a")
		conn, err := sb.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c := client(t, sb)
		if _, err := c.Start(t.Context(), &guestv1.StartRequest{Execution: "x"}); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := c.Read(t.Context(), "x", 0, 10, time.Minute); err == nil {
				t.Error("read from a dead sandbox")
			}
		})
		wg.Go(func() {
			if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, net.ErrClosed) {
				t.Errorf("%v", err)
			}
		})
		synctest.Wait()
		e.Die("a")
		wg.Wait()
		if remains, err := sb.Terminate(t.Context()); err != nil || remains.Processes != 1 {
			t.Errorf("%v, %v", remains, err)
		}
	})
}

// TestManyAtATime is for the race detector.
func TestManyAtATime(t *testing.T) {
	e := newEngine(t, enginefake.Config{Script: func(*guestv1.StartRequest) enginefake.Script {
		return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(time.Microsecond, "x")}, Exit: enginefake.Exit(0)}
	}})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			id := string(rune('a' + i%5))
			sb, err := e.Create(t.Context(), engine.Spec{ID: id})
			if err != nil {
				t.Error(err)
				return
			}
			c := guestclient.New(sb)
			defer c.Close()
			_, _ = c.Start(t.Context(), &guestv1.StartRequest{Execution: string(rune('a' + i))})
			_, _ = c.Info(t.Context())
			if i%2 == 0 {
				_, _ = sb.Terminate(t.Context())
			}
			_, _ = e.List(t.Context())
			e.Made()
			e.Started()
			e.Held(id)
		})
	}
	wg.Wait()
}
