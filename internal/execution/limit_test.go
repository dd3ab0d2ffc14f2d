package execution_test

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
)

const smallLog = 1 << 20

// flood is a program that writes pieces of 64 KiB to either stream in turn, and what
// that makes of each.
func flood(pieces int, every time.Duration, exit *guestv1.Exit) (enginefake.Script, map[string][]byte) {
	script, all := enginefake.Script{Exit: exit}, make(map[string][]byte)
	for i := range pieces {
		text := strings.Repeat(fmt.Sprintf("%07d\n", i), 8<<10)
		if i%2 == 0 {
			script.Steps = append(script.Steps, enginefake.Stdout(every, text))
			all["stdout"] = append(all["stdout"], text...)
		} else {
			script.Steps = append(script.Steps, enginefake.Stderr(every, text))
			all["stderr"] = append(all["stderr"], text...)
		}
	}
	return script, all
}

// checkKept checks what is promised of a program that was ended for its output: what was
// told is the beginning of what it wrote, up to the limit, and the rest is counted.
func checkKept(t *testing.T, got told, written map[string][]byte, total int64) {
	t.Helper()
	res := got.result
	var kept int64
	for _, stream := range []string{"stdout", "stderr"} {
		kept += int64(len(got.output[stream]))
		if !bytes.HasPrefix(written[stream], got.output[stream]) {
			t.Errorf("%s is not the beginning of what was written", stream)
		}
	}
	if len(got.gaps) != 0 || kept > smallLog || kept < smallLog-smallLog/50 {
		t.Errorf("%d bytes kept of %d that may be, gaps %v", kept, smallLog, got.gaps)
	}
	if res.Evidence["output_limit_bytes"] != strconv.Itoa(smallLog) {
		t.Errorf("%v", res.Evidence)
	}
	if discarded, err := strconv.ParseInt(res.Evidence["discarded_bytes"], 10, 64); err != nil || total >= 0 && discarded != total-kept {
		t.Errorf("%v discarded, %d kept of %d", res.Evidence["discarded_bytes"], kept, total)
	}
}

// TestOutputLimitKills ends a program at the limit and keeps everything up to it.
func TestOutputLimitKills(t *testing.T) {
	kill := execution.Request{RetainedBytes: smallLog, Policies: execution.Policies{OnLimit: execution.Kill}}
	kill.Command.GracePeriod = ptr(5 * time.Second)
	for name, test := range map[string]struct {
		every  time.Duration
		pieces int
		ignore bool // TERM
		exit   *guestv1.Exit
		total  int64 // what it wrote in all; -1 if that depends
		killed bool
		code   int32 // it exited with, -1 if it did not
	}{
		"a slow one":           {100 * time.Millisecond, 200, false, nil, -1, false, -1},
		"a fast one":           {0, 200, false, nil, -1, false, -1},
		"one that ignores it":  {time.Millisecond, 200, true, nil, 200 << 16, true, -1},
		"one that ends itself": {time.Millisecond, 17, true, enginefake.Exit(3), 17 << 16, false, 3},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				script, all := flood(test.pieces, test.every, test.exit)
				script.IgnoreTerm = test.ignore
				r := newRig(t, scripted(script))
				ref := r.start(kill)
				got := r.watch(ref, nil)
				res := got.result
				if res.Reason != execution.OutputLimit || res.Outcome() != execution.Crashed || !res.TreeEmpty || res.Killed != test.killed {
					t.Errorf("%+v", res)
				}
				if (res.ExitCode == nil) != (test.code < 0) || res.ExitCode != nil && *res.ExitCode != test.code {
					t.Errorf("%+v", res)
				}
				checkKept(t, got, all, test.total)
			})
		})
	}
}

// TestOutputWithinTheLimit is none of the policy's business.
func TestOutputWithinTheLimit(t *testing.T) {
	for _, policy := range []execution.OnLimit{execution.Kill, execution.Block} {
		bubble(t, func(t *testing.T) {
			script, all := flood(15, time.Millisecond, enginefake.Exit(0))
			r := newRig(t, scripted(script))
			got := r.watch(r.start(execution.Request{RetainedBytes: smallLog, Policies: execution.Policies{OnLimit: policy}}), nil)
			if got.result.Reason != execution.Exited || len(got.result.Evidence) != 0 || !bytes.Equal(got.output["stdout"], all["stdout"]) {
				t.Errorf("%+v", got.result)
			}
		})
	}
}

// TestOutputLimitOverARestart tells the truth when executord is away at the limit.
func TestOutputLimitOverARestart(t *testing.T) {
	for _, after := range []time.Duration{10 * time.Millisecond, 500 * time.Millisecond, 3 * time.Second} {
		bubble(t, func(t *testing.T) {
			script, all := flood(40, 20*time.Millisecond, nil)
			script.TermDelay = 10 * time.Second
			r := newRig(t, scripted(script))
			ref := r.start(execution.Request{
				RetainedBytes: smallLog, Policies: execution.Policies{OnLimit: execution.Kill},
				Command: execution.Command{GracePeriod: ptr(time.Minute)},
			})
			time.Sleep(after)
			r.restart()
			got := r.watch(ref, nil)
			if got.result.Reason != execution.OutputLimit {
				t.Errorf("%+v", got.result)
			}
			checkKept(t, got, all, 40<<16)
		})
	}
}

// reader reads a log at a pace, until it is told to stop; then it says where it was.
func readSlowly(t *testing.T, r *rig, ref execution.Ref, after *execution.Cursor, pause, d time.Duration, into map[string][]byte) (at execution.Cursor, ended bool) {
	t.Helper()
	w, err := r.Watch(t.Context(), ref, after)
	if err != nil {
		t.Error(err)
		return at, true
	}
	defer w.Close()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	for {
		e, err := w.Next(ctx)
		if err != nil {
			return w.Cursor(), false
		}
		if e.Gap != nil {
			t.Errorf("a gap at %v: %+v", e.Cursor, e.Gap)
		}
		if e.Output != nil {
			if e.Output.Offset != int64(len(into[e.Output.Stream])) {
				t.Errorf("offset %d after %d bytes", e.Output.Offset, len(into[e.Output.Stream]))
			}
			into[e.Output.Stream] = append(into[e.Output.Stream], e.Output.Data...)
		}
		if e.Result != nil {
			return w.Cursor(), true
		}
		time.Sleep(pause)
	}
}

// TestOutputBlocks lets a program wait for its slowest watcher, and nobody misses
// anything, also not one who comes and goes.
func TestOutputBlocks(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const pieces = 100
		script, all := flood(pieces, time.Millisecond, enginefake.Exit(0))
		r := newRig(t, scripted(script))
		ref := r.start(execution.Request{RetainedBytes: smallLog, Policies: execution.Policies{OnLimit: execution.Block}})
		// Nobody is there: it stands still when the log is full.
		time.Sleep(time.Minute)
		before := r.get(ref).Sequence
		time.Sleep(time.Minute)
		if e := r.get(ref); e.Sequence != before || e.State != execution.Running {
			t.Errorf("%d events, then %d: %+v", before, e.Sequence, e)
		}
		if stored := r.Stored(); stored.Bytes > smallLog {
			t.Errorf("the log takes %d bytes", stored.Bytes)
		}
		// Two read at their own paces; the slower one goes and comes back.
		var wg sync.WaitGroup
		slow, fast := make(map[string][]byte), make(map[string][]byte)
		wg.Go(func() {
			if _, ended := readSlowly(t, r, ref, nil, time.Millisecond, time.Hour, fast); !ended {
				t.Error("the faster one did not see the end")
			}
		})
		at, ended := readSlowly(t, r, ref, nil, 50*time.Millisecond, 4*time.Second, slow)
		if ended {
			t.Fatal("too early")
		}
		// It was the slowest: until it left, nothing was dropped that it had not read.
		if _, ended = readSlowly(t, r, ref, &at, 50*time.Millisecond, time.Hour, slow); !ended {
			t.Error("the slower one did not see the end")
		}
		wg.Wait()
		res := r.wait(ref).Result
		for _, stream := range []string{"stdout", "stderr"} {
			if !bytes.Equal(fast[stream], all[stream]) || !bytes.Equal(slow[stream], all[stream]) {
				t.Errorf("%s: %d and %d bytes of %d", stream, len(fast[stream]), len(slow[stream]), len(all[stream]))
			}
		}
		if res.Reason != execution.Exited || res.Totals[0].Dropped == 0 {
			t.Errorf("%+v", res)
		}
	})
}

// TestBlockedCommandEnds by its timeout, by a cancel and by itself, with all that it
// wrote, although nobody makes room.
func TestBlockedCommandEnds(t *testing.T) {
	for name, test := range map[string]struct {
		pieces int
		exit   *guestv1.Exit
		cancel bool
		want   execution.Reason
		ended  time.Duration
	}{
		"by its timeout": {100, nil, false, execution.TimedOut, 90 * time.Second},
		"by a cancel":    {100, nil, true, execution.Cancelled, 30 * time.Second},
		"by itself":      {24, enginefake.Exit(4), false, execution.Exited, 24 * time.Second},
	} {
		for _, restart := range []bool{false, true} {
			t.Run(fmt.Sprint(name, " ", restart), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					script, all := flood(test.pieces, time.Second, test.exit)
					r := newRig(t, scripted(script))
					begin := time.Now()
					ref := r.start(execution.Request{
						RetainedBytes: smallLog, Policies: execution.Policies{OnLimit: execution.Block},
						Command: execution.Command{Timeout: 90 * time.Second, IdleTimeout: 10 * time.Second},
					})
					time.Sleep(20 * time.Second)
					if restart {
						r.restart()
					}
					time.Sleep(10 * time.Second)
					if test.cancel {
						r.cancel(ref, time.Second)
					}
					e := r.wait(ref)
					if took := e.EndTime.Sub(begin); e.Result.Reason != test.want || took < test.ended || took > test.ended+time.Second {
						t.Errorf("%+v after %v, want %v", e.Result, took, test.ended)
					}
					got := r.watch(ref, nil)
					if n := len(got.output["stdout"]) + len(got.output["stderr"]); n < smallLog || len(got.gaps) > 0 {
						t.Errorf("%d bytes, gaps %v", n, got.gaps)
					}
					if !bytes.HasPrefix(all["stdout"], got.output["stdout"]) || test.exit != nil && len(got.output["stdout"]) != len(all["stdout"]) {
						t.Errorf("%d bytes of %d", len(got.output["stdout"]), len(all["stdout"]))
					}
				})
			})
		}
	}
}

// TestGuestThatIsNeverOver says that its command is over and goes on telling output: it
// does not get the disk.
func TestGuestThatIsNeverOver(t *testing.T) {
	bubble(t, func(t *testing.T) {
		script, _ := flood(400, time.Millisecond, nil)
		cfg := scripted(script)
		cfg.Hooks.Answer = func(_ string, q *guestv1.Request, a *enginefake.Answer) {
			if read := a.Response.GetRead(); read != nil {
				read.Over, read.Discarding = true, true
			}
		}
		r := newRig(t, cfg)
		got := r.watch(r.start(execution.Request{RetainedBytes: smallLog, Policies: execution.Policies{OnLimit: execution.Block}}), nil)
		if n := len(got.output["stdout"]) + len(got.output["stderr"]); n > smallLog+5<<20 {
			t.Errorf("%d bytes", n)
		}
		if got.result.Reason != execution.SandboxLost || !strings.Contains(got.result.Detail, "more output than") {
			t.Errorf("%+v", got.result)
		}
	})
}
