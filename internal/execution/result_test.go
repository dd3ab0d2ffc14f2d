package execution_test

import (
	"context"
	"errors"
	"math"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
)

// TestReasons has every way to end that needs nobody but the guest and the engine.
func TestReasons(t *testing.T) {
	type result struct {
		Reason   execution.Reason
		Outcome  execution.Outcome
		ExitCode *int32
		Signal   int32
		Detail   string
		Evidence map[string]string
		Reaped   int32
		Killed   bool
		Tree     bool
	}
	limits := engine.Limits{MemoryBytes: 64 << 20, PIDs: 10}
	oom := map[string]string{"oom_kills": "2", "memory_limit_bytes": "67108864"}
	tests := map[string]struct {
		script  enginefake.Script
		timeout time.Duration
		grace   *time.Duration
		usage   engine.Usage
		hooks   enginefake.Hooks
		want    result
	}{
		"exit 0": {
			script: enginefake.Script{Exit: enginefake.Exit(0)},
			want:   result{Reason: execution.Exited, Outcome: execution.Success, ExitCode: ptr[int32](0), Tree: true},
		},
		"exit 255 with processes left": {
			script: enginefake.Script{Lie: true, Exit: &guestv1.Exit{Status: &guestv1.Exit_Code{Code: 255}, Reaped: 3, TreeEmpty: true}},
			want:   result{Reason: execution.Exited, Outcome: execution.Failure, ExitCode: ptr[int32](255), Reaped: 3, Tree: true},
		},
		"a tree that was not seen empty": {
			script: enginefake.Script{Lie: true, Exit: &guestv1.Exit{Status: &guestv1.Exit_Code{Code: 0}, TreeEmpty: false}},
			want:   result{Reason: execution.Exited, Outcome: execution.Success, ExitCode: ptr[int32](0)},
		},
		"segmentation fault": {
			script: enginefake.Script{Lie: true, Exit: &guestv1.Exit{Status: &guestv1.Exit_Signal{Signal: 11}, CoreDumped: true, TreeEmpty: true}},
			want: result{
				Reason: execution.Signaled, Outcome: execution.Crashed, Signal: 11, Detail: "ended by SIGSEGV",
				Evidence: map[string]string{"core_dumped": "true"}, Tree: true,
			},
		},
		"a signal without a name": {
			script: enginefake.Script{Exit: enginefake.Signal(40)},
			want:   result{Reason: execution.Signaled, Outcome: execution.Crashed, Signal: 40, Detail: "ended by signal 40", Tree: true},
		},
		"timeout that TERM ends": {
			script: enginefake.Script{}, timeout: time.Second,
			want: result{Reason: execution.TimedOut, Outcome: execution.Timeout, Signal: 15, Detail: "ran longer than its timeout of 1s", Tree: true},
		},
		"timeout that KILL ends": {
			script: enginefake.Script{IgnoreTerm: true}, timeout: time.Second, grace: ptr(2 * time.Second),
			want: result{Reason: execution.TimedOut, Outcome: execution.Timeout, Signal: 9, Detail: "ran longer than its timeout of 1s", Killed: true, Tree: true},
		},
		"killed for memory": {
			script: enginefake.Script{Exit: enginefake.Signal(9)}, usage: engine.Usage{OOMKills: 2},
			want: result{
				Reason: execution.OOMKilled, Outcome: execution.Crashed, Signal: 9, Evidence: oom, Tree: true,
				Detail: "the kernel killed it: its sandbox used up its memory limit of 67108864 bytes",
			},
		},
		"a shell whose command was killed for memory": {
			script: enginefake.Script{Exit: enginefake.Exit(137)}, usage: engine.Usage{OOMKills: 2},
			want: result{
				Reason: execution.OOMKilled, Outcome: execution.Crashed, ExitCode: ptr[int32](137), Evidence: oom, Tree: true,
				Detail: "the kernel killed it: its sandbox used up its memory limit of 67108864 bytes",
			},
		},
		"a child killed for memory": {
			script: enginefake.Script{Exit: enginefake.Exit(1)}, usage: engine.Usage{OOMKills: 2},
			want: result{
				Reason: execution.Exited, Outcome: execution.Failure, ExitCode: ptr[int32](1), Evidence: oom, Tree: true,
				Detail: "the memory limit of its sandbox was reached and the kernel killed a process in it",
			},
		},
		"137 without the kernel": {
			script: enginefake.Script{Exit: enginefake.Exit(137)},
			want:   result{Reason: execution.Exited, Outcome: execution.Failure, ExitCode: ptr[int32](137), Tree: true},
		},
		"KILL without the kernel": {
			script: enginefake.Script{Exit: enginefake.Signal(9)},
			want:   result{Reason: execution.Signaled, Outcome: execution.Crashed, Signal: 9, Detail: "ended by SIGKILL", Tree: true},
		},
		"forks refused": {
			script: enginefake.Script{Exit: enginefake.Exit(2)}, usage: engine.Usage{PIDsRefused: 7},
			want: result{
				Reason: execution.Exited, Outcome: execution.Failure, ExitCode: ptr[int32](2), Tree: true,
				Evidence: map[string]string{"forks_refused": "7", "pids_limit": "10"},
			},
		},
		"no sandbox": {
			hooks: enginefake.Hooks{Create: func(context.Context, string) error { return errors.New("no more user ids") }},
			want: result{
				Reason: execution.StartFailed, Outcome: execution.Failure, Detail: "no more user ids", Tree: true,
				Evidence: map[string]string{"kind": "no_sandbox"},
			},
		},
		"no such program": {
			script: enginefake.Script{Refuse: enginefake.Refusal(guestv1.Error_KIND_NO_SUCH_PROGRAM, `"program": no such program in PATH`)},
			want: result{
				Reason: execution.StartFailed, Outcome: execution.Failure, Detail: `"program": no such program in PATH`, Tree: true,
				Evidence: map[string]string{"kind": "not_found"},
			},
		},
		"not executable": {
			script: enginefake.Script{Refuse: enginefake.Refusal(guestv1.Error_KIND_NOT_EXECUTABLE, "is a directory")},
			want: result{
				Reason: execution.StartFailed, Outcome: execution.Failure, Detail: "is a directory", Tree: true,
				Evidence: map[string]string{"kind": "not_executable"},
			},
		},
		"no more processes": {
			script: enginefake.Script{Refuse: enginefake.Refusal(guestv1.Error_KIND_EXHAUSTED, "fork: EAGAIN")},
			want: result{
				Reason: execution.StartFailed, Outcome: execution.Failure, Detail: "fork: EAGAIN", Tree: true,
				Evidence: map[string]string{"kind": "exhausted"},
			},
		},
		"refused": {
			script: enginefake.Script{Refuse: enginefake.Refusal(guestv1.Error_KIND_INTERNAL, "no runtime directory")},
			want: result{
				Reason: execution.StartFailed, Outcome: execution.Failure, Detail: "no runtime directory", Tree: true,
				Evidence: map[string]string{"kind": "refused"},
			},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				cfg := scripted(test.script)
				cfg.Hooks = test.hooks
				cfg.Hooks.Usage = func(context.Context, string) (engine.Usage, error) { return test.usage, nil }
				r := newRig(t, cfg)
				ref := r.start(execution.Request{
					Limits:  limits,
					Command: execution.Command{Args: []string{"program"}, Timeout: test.timeout, GracePeriod: test.grace},
				})
				res := r.watch(ref, nil).result
				got := result{
					res.Reason, res.Outcome(), res.ExitCode, res.Signal, res.Detail, res.Evidence, res.Reaped, res.Killed, res.TreeEmpty,
				}
				if diff := cmp.Diff(test.want, got); diff != "" {
					t.Errorf("the watcher was told (-want +got):\n%s", diff)
				}
				e := r.wait(ref)
				if diff := cmp.Diff(res, e.Result); diff != "" {
					t.Errorf("the record differs from what was told:\n%s", diff)
				}
				stored, _ := r.memory.stored(ref.ID)
				if diff := cmp.Diff(e, stored); diff != "" {
					t.Errorf("the store differs from what was told:\n%s", diff)
				}
				if r.restart(); len(r.list()) != 0 {
					t.Errorf("left behind: %v", r.list())
				}
			})
		})
	}
}

func TestOutcomes(t *testing.T) {
	zero, one := int32(0), int32(1)
	for want, results := range map[execution.Outcome][]execution.Result{
		execution.Success: {{Reason: execution.Exited, ExitCode: &zero}},
		execution.Failure: {
			{Reason: execution.Exited, ExitCode: &one}, {Reason: execution.Exited}, {Reason: execution.StartFailed},
		},
		execution.Timeout:        {{Reason: execution.TimedOut}},
		execution.Crashed:        {{Reason: execution.Signaled}, {Reason: execution.OOMKilled}, {Reason: execution.SandboxLost}, {}},
		execution.CancelledByAny: {{Reason: execution.Cancelled}, {Reason: execution.SessionEnded}, {Reason: execution.ServerStopped}},
	} {
		for _, r := range results {
			if got := r.Outcome(); got != want {
				t.Errorf("%s is %s, want %s", r.Reason, got, want)
			}
		}
	}
}

// TestMissingInterpreter sees every name of it tried and its package named.
func TestMissingInterpreter(t *testing.T) {
	tests := map[execution.Language]struct {
		tried []string
		pkg   string
	}{
		execution.Python: {[]string{"python3", "python"}, "python3"},
		execution.Bash:   {[]string{"bash"}, "bash"},
		execution.Node:   {[]string{"node", "nodejs"}, "nodejs"},
	}
	for language, test := range tests {
		t.Run(string(language), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var tried []string
				r := newRig(t, enginefake.Config{Script: func(q *guestv1.StartRequest) enginefake.Script {
					tried = append(tried, q.GetArgs()[0])
					return enginefake.Script{Refuse: enginefake.Refusal(guestv1.Error_KIND_NO_SUCH_PROGRAM, "no such program in PATH")}
				}})
				res := r.run(execution.Request{Command: execution.Command{Language: language, Source: "1"}})
				if diff := cmp.Diff(test.tried, tried); diff != "" {
					t.Errorf("programs tried: %s", diff)
				}
				want := map[string]string{"kind": "no_interpreter", "program": test.tried[0], "package": test.pkg}
				if diff := cmp.Diff(want, res.Evidence); diff != "" || res.Reason != execution.StartFailed {
					t.Errorf("%s, evidence: %s", res.Reason, diff)
				}
				contains(t, res.Detail, "apt-get install "+test.pkg)
			})
		})
	}
}

// TestSecondNameOfAnInterpreter takes the second where the first is missing.
func TestSecondNameOfAnInterpreter(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{Script: func(q *guestv1.StartRequest) enginefake.Script {
			if q.GetArgs()[0] == "node" {
				return enginefake.Script{Refuse: enginefake.Refusal(guestv1.Error_KIND_NO_SUCH_PROGRAM, "no such program")}
			}
			return enginefake.Script{Exit: enginefake.Exit(3)}
		}})
		res := r.run(execution.Request{Command: execution.Command{Language: execution.Node, Source: "1"}})
		if res.Reason != execution.Exited || *res.ExitCode != 3 {
			t.Errorf("%+v", res)
		}
	})
}

// TestMissingWorkingDirectory is not taken for a missing interpreter.
func TestMissingWorkingDirectory(t *testing.T) {
	for _, message := range []string{`working directory "/nope": no such file or directory`, "anything else"} {
		bubble(t, func(t *testing.T) {
			r := newRig(t, scripted(enginefake.Script{Refuse: enginefake.Refusal(guestv1.Error_KIND_NO_WORKING_DIRECTORY, message)}))
			res := r.run(execution.Request{Command: execution.Command{Language: execution.Python, Source: "1", WorkingDirectory: "/nope"}})
			if res.Reason != execution.StartFailed || res.Detail != message || res.Evidence["kind"] != "no_working_directory" {
				t.Errorf("%+v", res)
			}
		})
	}
}

// TestUnsendable is refused without losing anything.
func TestUnsendable(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{})
		r.session("a")
		res := r.run(execution.Request{Session: "a", Command: execution.Command{Args: []string{"echo", "\xff"}}})
		if res.Reason != execution.StartFailed || res.Evidence["kind"] != "refused" || len(r.list()) != 1 {
			t.Errorf("%+v, sandboxes %v", res, r.list())
		}
	})
}

// TestHostileExit has a guest tell what no program can do.
func TestHostileExit(t *testing.T) {
	huge := func(micros uint64) *guestv1.Exit {
		return &guestv1.Exit{
			Status: &guestv1.Exit_Code{Code: 0}, Reaped: math.MaxUint32, TreeEmpty: true, Killed: true, CoreDumped: true,
			FirstOutputMicros: &micros, RunMicros: micros, CpuUserMicros: micros, CpuSystemMicros: micros, MaxRssBytes: math.MaxUint64,
		}
	}
	code := func(n int32) *guestv1.Exit { return &guestv1.Exit{Status: &guestv1.Exit_Code{Code: n}} }
	signal := func(n int32) *guestv1.Exit { return &guestv1.Exit{Status: &guestv1.Exit_Signal{Signal: n}} }
	tests := map[string]struct {
		exit *guestv1.Exit
		want execution.Reason
	}{
		"huge numbers":        {huge(1 << 52), execution.Exited},
		"times that overflow": {huge(math.MaxUint64), execution.SandboxLost},
		"a negative code":     {code(-1), execution.SandboxLost},
		"the smallest code":   {code(math.MinInt32), execution.SandboxLost},
		"code 256":            {code(256), execution.SandboxLost},
		"signal 0":            {signal(0), execution.SandboxLost},
		"a negative signal":   {signal(-9), execution.SandboxLost},
		"signal 65":           {signal(65), execution.SandboxLost},
		"the greatest signal": {signal(math.MaxInt32), execution.SandboxLost},
		"a stop that nobody ordered": {
			&guestv1.Exit{Status: &guestv1.Exit_Code{Code: 0}, StopCause: guestv1.StopCause_STOP_CAUSE_REQUESTED}, execution.Exited,
		},
		"a stop cause that does not exist": {&guestv1.Exit{Status: &guestv1.Exit_Code{Code: 0}, StopCause: 77}, execution.SandboxLost},
		"no status":                        {&guestv1.Exit{}, execution.SandboxLost},
	}
	for name, test := range tests {
		for _, where := range []string{"", "shared"} {
			t.Run(name+" "+where, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					r := newRig(t, scripted(enginefake.Script{
						Steps: []enginefake.Step{enginefake.Stdout(time.Second, "out")}, Exit: test.exit, Lie: true,
					}))
					if where != "" {
						r.session(where)
					}
					ref := r.start(execution.Request{Session: where})
					res := r.watch(ref, nil).result
					if res.Reason != test.want {
						t.Fatalf("%+v", res)
					}
					if res.Reason == execution.SandboxLost {
						if res.ExitCode != nil || res.Signal != 0 {
							t.Errorf("an end was invented: %+v", res)
						}
						contains(t, res.Detail, "the guest told", "not known")
					}
					if res.Reaped < 0 || res.Usage.CPUUser < 0 || res.Usage.CPUSystem < 0 || res.Usage.PeakMemoryBytes < 0 {
						t.Errorf("overflow: %+v", res)
					}
					inOrder(t, res.Times)
					r.list()
				})
			})
		}
	}
}

// inOrder checks that no stage was reached before the one before.
func inOrder(t *testing.T, times execution.Times) {
	t.Helper()
	last := times.Queued
	for i, at := range []time.Time{times.SandboxReady, times.Started, times.FirstOutput, times.Ended} {
		if at.IsZero() {
			continue
		}
		if at.Before(last) {
			t.Errorf("stage %d was reached before the one before: %+v", i+1, times)
		}
		last = at
	}
	if times.Ended.IsZero() || times.Queued.IsZero() {
		t.Errorf("%+v", times)
	}
}

// TestLongDetail has texts of any size and any bytes end up in a result that fits.
func TestLongDetail(t *testing.T) {
	for name, text := range map[string]string{
		"control characters": strings.Repeat("\x01", 100<<10),
		"markup":             strings.Repeat("<&>", 40<<10),
		"broken UTF-8":       strings.Repeat("\xff", 40<<10),
		"long characters":    strings.Repeat("𝄞", 40<<10),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				r := newRig(t, enginefake.Config{Hooks: enginefake.Hooks{
					Create: func(context.Context, string) error { return errors.New(text) },
				}})
				ref := r.start(execution.Request{})
				res := r.wait(ref).Result
				if !utf8.ValidString(res.Detail) || len(res.Detail) > 3<<10 || name != "broken UTF-8" && len(res.Detail) < 2<<10 {
					t.Errorf("a detail of %d bytes, valid: %v", len(res.Detail), utf8.ValidString(res.Detail))
				}
				if told := r.watch(ref, nil).result; told.Detail != res.Detail {
					t.Error("the log has another detail than the record")
				}
			})
		})
	}
	t.Run("cause and requester", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			text := strings.Repeat("\x01", 100<<10)
			var r *rig
			r = newRig(t, enginefake.Config{
				Script: func(*guestv1.StartRequest) enginefake.Script { return enginefake.Script{} },
				Hooks: enginefake.Hooks{Answer: func(_ string, q *guestv1.Request, a *enginefake.Answer) {
					if q.GetStop() != nil {
						a.Response.Answer = &guestv1.Response_Error{Error: enginefake.Refusal(guestv1.Error_KIND_INTERNAL, text)}
					}
				}},
			})
			ref := r.start(execution.Request{})
			time.Sleep(time.Second)
			e, err := r.Cancel(t.Context(), ref, execution.Cancellation{By: text})
			if err != nil || e.Result.Reason != execution.Cancelled || len(e.Result.CancelledBy) > 256 || len(e.Result.Evidence["cause"]) > 256 {
				t.Errorf("%v, %+v", err, e.Result)
			}
		})
	})
}

// TestTimes checks the stages of an ordinary life.
func TestTimes(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{
			Script: func(*guestv1.StartRequest) enginefake.Script {
				return enginefake.Script{
					StartDelay: 2 * time.Second,
					Steps:      []enginefake.Step{enginefake.Stdout(6*time.Second, "x"), enginefake.Pause(8 * time.Second)}, Exit: enginefake.Exit(0),
				}
			},
			Hooks: enginefake.Hooks{Create: func(context.Context, string) error { time.Sleep(time.Second); return nil }},
		})
		begin := time.Now()
		e := r.wait(r.start(execution.Request{}))
		since := func(at time.Time) time.Duration { return at.Sub(begin) }
		got := []time.Duration{
			since(e.Result.Times.Queued), since(e.Result.Times.SandboxReady), since(e.Result.Times.Started), since(e.Result.Times.Ended),
		}
		// The fake's program begins when its start is asked for.
		if want := []time.Duration{0, time.Second, 3 * time.Second, 15 * time.Second}; !cmp.Equal(got, want) {
			t.Errorf("stages at %v, want %v", got, want)
		}
		inOrder(t, e.Result.Times)
		if !e.StartTime.Equal(e.Result.Times.Started) || !e.EndTime.Equal(e.Result.Times.Ended) || !e.CreateTime.Equal(e.Result.Times.Queued) {
			t.Errorf("the record says %v, %v, %v", e.CreateTime, e.StartTime, e.EndTime)
		}
	})
}

// TestMemoryKillsInASharedSandbox tells a kill to those in whose time it fell, and
// blames it only on the one that was killed.
func TestMemoryKillsInASharedSandbox(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var kills atomic.Int64
		kills.Store(5) // of an earlier time
		r := newRig(t, enginefake.Config{
			Script: func(q *guestv1.StartRequest) enginefake.Script {
				switch q.GetArgs()[0] {
				case "victim":
					return enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(10 * time.Second)}, Exit: enginefake.Signal(9)}
				case "bystander":
					return enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(9 * time.Second)}, Exit: enginefake.Exit(0)}
				default:
					return enginefake.Script{Exit: enginefake.Signal(9)}
				}
			},
			Hooks: enginefake.Hooks{Usage: func(context.Context, string) (engine.Usage, error) {
				return engine.Usage{OOMKills: kills.Load(), PIDsRefused: kills.Load()}, nil
			}},
		})
		r.session("a")
		command := func(name string) execution.Request {
			return execution.Request{Session: "a", Command: execution.Command{Args: []string{name}}}
		}
		if res := r.run(command("before")); res.Reason != execution.Signaled || res.Evidence != nil {
			t.Errorf("before: %+v", res)
		}
		victim, bystander := r.start(command("victim")), r.start(command("bystander"))
		time.Sleep(5 * time.Second)
		kills.Add(1)
		if res := r.wait(bystander).Result; res.Reason != execution.Exited || res.Evidence["oom_kills"] != "1" {
			t.Errorf("bystander: %+v", res)
		}
		res := r.wait(victim).Result
		if res.Reason != execution.OOMKilled || res.Evidence["oom_kills"] != "1" || res.Evidence["memory_limit_bytes"] != "268435456" || res.Evidence["forks_refused"] != "1" {
			t.Errorf("victim: %+v", res)
		}
		if res := r.run(command("after")); res.Reason != execution.Signaled || res.Evidence != nil {
			t.Errorf("after: %+v", res)
		}
	})
}

// TestNoAccounting has an engine that cannot say what was used: the result lacks
// figures and blames nothing on anybody.
func TestNoAccounting(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var broken atomic.Bool
		broken.Store(true)
		r := newRig(t, enginefake.Config{
			Script: func(*guestv1.StartRequest) enginefake.Script {
				return enginefake.Script{Steps: []enginefake.Step{enginefake.Pause(time.Second)}, Exit: enginefake.Signal(9)}
			},
			Hooks: enginefake.Hooks{Usage: func(context.Context, string) (engine.Usage, error) {
				if broken.Load() {
					return engine.Usage{OOMKills: 9}, errors.New("no such file")
				}
				return engine.Usage{OOMKills: 9}, nil
			}},
		})
		r.session("a")
		if res := r.run(execution.Request{}); res.Reason != execution.Signaled || res.Evidence != nil {
			t.Errorf("one-shot: %+v", res)
		}
		ref := r.start(execution.Request{Session: "a"})
		time.Sleep(time.Second / 2)
		broken.Store(false)
		if res := r.wait(ref).Result; res.Reason != execution.Signaled || res.Evidence != nil {
			t.Errorf("in a session: %+v", res)
		}
	})
}
