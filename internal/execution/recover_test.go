package execution_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/eventlog"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// TestLogLostAtRecovery goes on in a new log, whose epoch tells watchers, as far as the
// guest still has the output; where it has not, the end says that it is not known.
func TestLogLostAtRecovery(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, r *rig, ref execution.Ref){
		"missing": func(t *testing.T, r *rig, ref execution.Ref) {
			if err := os.RemoveAll(filepath.Join(r.dir, ref.ID)); err != nil {
				t.Fatal(err)
			}
		},
		"empty": func(t *testing.T, r *rig, ref execution.Ref) {
			for _, file := range segments(t, r, ref) {
				if err := os.Truncate(file, 0); err != nil {
					t.Fatal(err)
				}
			}
		},
		"beyond repair": func(t *testing.T, r *rig, ref execution.Ref) {
			for _, file := range segments(t, r, ref) {
				if err := os.WriteFile(file, []byte(strings.Repeat("?", 1000)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		},
	} {
		for _, given := range []string{"nothing was read", "something was read"} {
			for _, session := range []string{"", "a"} {
				t.Run(name+", "+given+" "+session, func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						script := enginefake.Script{
							Steps: []enginefake.Step{enginefake.Stdout(time.Minute, "late"), enginefake.Pause(time.Minute)}, Exit: enginefake.Exit(0),
						}
						if given == "something was read" {
							script.Steps = append([]enginefake.Step{enginefake.Stdout(0, "early ")}, script.Steps...)
						}
						r := newRig(t, scripted(script))
						if session != "" {
							r.session(session)
						}
						ref := r.start(execution.Request{Session: session})
						time.Sleep(30 * time.Second)
						before := r.get(ref)
						if err := r.Close(); err != nil {
							t.Fatal(err)
						}
						damage(t, r, ref)
						r.open()
						if err := r.Recover(t.Context()); err != nil {
							t.Fatal(err)
						}
						after := r.get(ref)
						if after.Epoch == before.Epoch || after.Epoch == "" {
							t.Errorf("epoch %q, was %q", after.Epoch, before.Epoch)
						}
						got := r.watch(ref, &execution.Cursor{Epoch: before.Epoch, Sequence: before.Sequence})
						if len(got.gaps) != 1 || got.gaps[0].Reason != execution.GapEpochChanged {
							t.Errorf("gaps: %+v", got.gaps)
						}
						e := r.wait(ref)
						if e.Epoch != after.Epoch {
							t.Errorf("the record has the epoch %q", e.Epoch)
						}
						if given == "nothing was read" {
							if e.Result.Reason != execution.Exited || string(got.output["stdout"]) != "late" {
								t.Errorf("%+v, %q", e.Result, got.output)
							}
						} else if e.Result.Reason != execution.SandboxLost || !e.Result.TreeEmpty {
							t.Errorf("%+v", e.Result)
						}
						r.watch(ref, nil)
						synctest.Wait()
						if left, _ := r.fake.List(t.Context()); len(left) != len(session) || len(r.fake.Held("s-a")) != 0 {
							t.Errorf("left: %v, held: %v", left, r.fake.Held("s-a"))
						}
						contains(t, r.log.String(), "has no log")
					})
				})
			}
		}
	}
}

// TestLogUnreadableAtRecovery throws nothing away for an error that may pass.
func TestLogUnreadableAtRecovery(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "x"), enginefake.Pause(time.Minute)}, Exit: enginefake.Exit(0)}))
		ref := r.start(execution.Request{})
		time.Sleep(time.Second)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(r.dir, ref.ID)
		if err := os.Rename(dir, dir+".aside"); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir, []byte("no directory"), 0o600); err != nil {
			t.Fatal(err)
		}
		r.open()
		if err := r.Recover(t.Context()); err == nil || !strings.Contains(err.Error(), "take up execution "+ref.ID) {
			t.Fatalf("%v", err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(dir+".aside", dir); err != nil {
			t.Fatal(err)
		}
		r.open()
		if err := r.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		if e := r.wait(ref); e.Result.Reason != execution.Exited {
			t.Errorf("%+v", e.Result)
		}
	})
}

// TestSegmentUnreadableAtRecovery does not take an error of the disk for a log that is
// gone.
func TestSegmentUnreadableAtRecovery(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "x"), enginefake.Pause(time.Minute)}, Exit: enginefake.Exit(0)}))
		ref := r.start(execution.Request{})
		time.Sleep(time.Second)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		file := segments(t, r, ref)[0]
		aside := filepath.Join(t.TempDir(), "aside")
		if err := errors.Join(os.Rename(file, aside), os.Mkdir(file, 0o700)); err != nil {
			t.Fatal(err)
		}
		r.open()
		if err := r.Recover(t.Context()); err == nil {
			t.Error("recovered from an error of the disk")
		}
		if r.Running() != 0 {
			t.Errorf("%d running", r.Running())
		}
		if err := errors.Join(r.Close(), os.Remove(file), os.Rename(aside, file)); err != nil {
			t.Fatal(err)
		}
		r.open()
		if err := r.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := r.watch(ref, nil); string(got.output["stdout"]) != "x" || got.result.Reason != execution.Exited {
			t.Errorf("%+v, %q", got.result, got.output)
		}
	})
}

// TestStoppingStaysStopping when an order comes before the command is found again.
func TestStoppingStaysStopping(t *testing.T) {
	bubble(t, func(t *testing.T) {
		var slow atomic.Bool
		r := newRig(t, enginefake.Config{
			Script: func(*guestv1.StartRequest) enginefake.Script { return enginefake.Script{IgnoreTerm: true} },
			Hooks: enginefake.Hooks{Open: func(ctx context.Context, _ string) error {
				if slow.Load() {
					return sleep(ctx, 5*time.Second)
				}
				return nil
			}},
		})
		ref := r.start(execution.Request{})
		time.Sleep(time.Second)
		slow.Store(true)
		r.restart()
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		grace := time.Minute
		e, err := r.Cancel(ctx, ref, execution.Cancellation{Grace: &grace, By: "me"})
		if !errors.Is(err, context.DeadlineExceeded) || e.State != execution.Stopping {
			t.Errorf("%v, state %d", err, e.State)
		}
		e = r.wait(ref)
		if took := time.Since(begin); took != 65*time.Second || e.Result.CancelledBy != "me" {
			t.Errorf("%+v after %v", e.Result, took)
		}
	})
}

// TestCrashWhileACommandIsGivenUp does not let the next executord say that nothing ran.
func TestCrashWhileACommandIsGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T) {
		reached, gone := make(chan struct{}), make(chan struct{})
		fake := enginefake.New(enginefake.Config{
			Script: func(*guestv1.StartRequest) enginefake.Script { return enginefake.Script{} },
			Hooks: enginefake.Hooks{Answer: func(_ string, q *guestv1.Request, a *enginefake.Answer) {
				switch {
				case q.GetRead() != nil:
					a.Response.Answer = &guestv1.Response_Error{Error: enginefake.Refusal(guestv1.Error_KIND_INTERNAL, "no idea")}
				case q.GetRelease() != nil && a.Response.GetError() == nil:
					// The tree is gone and the guest has forgotten it, and nobody was told.
					select {
					case <-reached:
					default:
						close(reached)
						<-gone
					}
				}
			}},
		})
		t.Cleanup(fake.Shutdown)
		w := &world{t: t, fake: fake, store: newMemory(), dir: filepath.Join(t.TempDir(), "logs")}
		if _, err := fake.Create(t.Context(), engine.Spec{ID: "s-a"}); err != nil {
			t.Fatal(err)
		}
		s := w.executord(nil)
		e, err := s.Start(t.Context(), execution.Request{Session: "a", Command: execution.Command{Args: []string{"x"}}})
		if err != nil {
			t.Fatal(err)
		}
		<-reached
		s.mortal.kill()
		w.freeze()
		close(gone)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		next := w.executord(nil)
		defer next.Close()
		if err := next.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		e, err = next.Wait(t.Context(), execution.Ref{Session: "a", ID: e.ID})
		if err != nil || e.Result.Reason != execution.SandboxLost {
			t.Errorf("%v, %+v", err, e.Result)
		}
	})
}

// TestTornLog is cut back to its last whole record and goes on.
func TestTornLog(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(lines(100)))
		ref := r.start(execution.Request{})
		time.Sleep(500 * time.Millisecond)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		files := segments(t, r, ref)
		f, err := os.OpenFile(files[len(files)-1], os.O_APPEND|os.O_WRONLY, 0)
		if err == nil {
			_, err = f.WriteString("half a record")
		}
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		r.open()
		if err := r.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := r.watch(ref, nil); len(got.events) < 100 || len(got.gaps) != 0 {
			t.Errorf("%d events, gaps %v", len(got.events), got.gaps)
		}
		contains(t, r.log.String(), "cut a torn end off")
	})
}

// TestSealedLogWithoutAResult ends with what is known: not much.
func TestSealedLogWithoutAResult(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "x")}, Exit: enginefake.Exit(0)}))
		r.memory.hook(func(op string, e execution.Execution) error {
			if op == "update" {
				return errDisk
			}
			return nil
		}, nil)
		ref := r.start(execution.Request{})
		if got := r.watch(ref, nil); got.result.Reason != execution.Exited {
			t.Fatalf("%+v", got.result)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r.memory.hook(nil, nil)
		// The store never had it, and now the log has lost it too.
		files := segments(t, r, ref)
		text, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		at := strings.Index(string(text), `"reason":"EXITED"`)
		if at < 0 {
			t.Fatalf("no result in %q", text)
		}
		text[at+10] = 'X'
		if err := os.WriteFile(files[0], text, 0o600); err != nil {
			t.Fatal(err)
		}
		r.open()
		if err := r.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		e := r.wait(ref)
		got := r.watch(ref, nil)
		if e.Result.Reason != got.result.Reason {
			t.Errorf("the log tells %+v, the store %+v", got.result, e.Result)
		}
		synctest.Wait()
		if left := r.list(); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// TestResultBeyondUnderstanding has a log that is whole, and ends with what nobody can
// read: the end is stored as unknown, and watchers get that one.
func TestResultBeyondUnderstanding(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{})
		const id = "01arz3ndektsv4rrffq69g5fav"
		log, err := eventlog.Create(eventlog.Config{Dir: filepath.Join(r.dir, id)})
		if err != nil {
			t.Fatal(err)
		}
		now := time.Now()
		err = errors.Join(
			log.Append(now, eventlog.Entry{Kind: eventlog.KindOutput + 1}, eventlog.Entry{Kind: eventlog.KindOutput + 77}),
			log.Seal(now, eventlog.Entry{Kind: eventlog.KindOutput + 2, Data: []byte("{")}), log.Close(),
		)
		if err != nil {
			t.Fatal(err)
		}
		e := execution.Execution{ID: id, Sandbox: "e-" + id, State: execution.Running, CreateTime: now, Epoch: log.Epoch()}
		if err := r.memory.InsertExecution(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		if err := r.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		ref := execution.Ref{ID: id}
		e = r.wait(ref)
		if e.Result.Reason != execution.SandboxLost || !strings.Contains(e.Result.Detail, "cannot be read") {
			t.Errorf("%+v", e.Result)
		}
		w, err := r.Watch(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		if first, err := w.Next(t.Context()); err != nil || first.Started == nil {
			t.Errorf("%+v, %v", first, err)
		}
		// Of the record of a kind that is not known, the place is told.
		if unknown, err := w.Next(t.Context()); err != nil || unknown.Cursor.Sequence != 2 || unknown.Output != nil || unknown.Result != nil {
			t.Errorf("%+v, %v", unknown, err)
		}
		last, err := w.Next(t.Context())
		if err != nil || last.Cursor.Sequence != 3 || cmp.Diff(e.Result, last.Result) != "" {
			t.Errorf("%+v, %v", last, err)
		}
		if _, err := w.Next(t.Context()); !errors.Is(err, io.EOF) {
			t.Error(err)
		}
	})
}

// TestManyEndInASession while executord is away: each is read out, and the guest is not
// told to forget one that another run has yet to ask for.
func TestManyEndInASession(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{
			Steps: []enginefake.Step{enginefake.Stdout(0, "early "), enginefake.Stdout(time.Minute, "late")}, Exit: enginefake.Exit(4),
		}))
		r.session("a")
		var refs []execution.Ref
		for range 20 {
			refs = append(refs, r.start(execution.Request{Session: "a"}))
		}
		time.Sleep(time.Second)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		r.open()
		if err := r.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, ref := range refs {
			got := r.watch(ref, nil)
			if got.result.Reason != execution.Exited || *got.result.ExitCode != 4 || string(got.output["stdout"]) != "early late" {
				t.Errorf("%+v, %q", got.result, got.output)
			}
		}
		synctest.Wait()
		if held := r.fake.Held("s-a"); len(held) != 0 {
			t.Errorf("the guest holds %v", held)
		}
	})
}

// TestGuestForgotTheCommand does not claim that nothing ran when something did.
func TestGuestForgotTheCommand(t *testing.T) {
	for _, script := range []enginefake.Script{{Steps: []enginefake.Step{enginefake.Stdout(0, "x")}}, {}} {
		guestForgot(t, script)
	}
}

func guestForgot(t *testing.T, script enginefake.Script) {
	bubble(t, func(t *testing.T) {
		var forgetful atomic.Bool
		r := newRig(t, enginefake.Config{
			Script: func(*guestv1.StartRequest) enginefake.Script { return script },
			Hooks: enginefake.Hooks{Answer: func(_ string, q *guestv1.Request, a *enginefake.Answer) {
				if info := a.Response.GetInfo(); info != nil && forgetful.Load() {
					info.Executions = nil
				}
			}},
		})
		ref := r.start(execution.Request{})
		time.Sleep(time.Second)
		forgetful.Store(true)
		r.restart()
		if e := r.wait(ref); e.Result.Reason != execution.SandboxLost || !e.Result.TreeEmpty {
			t.Errorf("%+v", e.Result)
		}
	})
}

// TestInterruptedRecovery is ordered to stop, and closed, while the engine does not
// say where the sandbox is. A command is not said to have ended while nobody knows: the
// order is carried out when the engine can be asked again.
func TestInterruptedRecovery(t *testing.T) {
	for _, closing := range []bool{false, true} {
		bubble(t, func(t *testing.T) {
			var broken atomic.Bool
			r := newRig(t, enginefake.Config{
				Script: func(*guestv1.StartRequest) enginefake.Script {
					return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(time.Hour/4, "x")}, Exit: enginefake.Exit(0)}
				},
				Hooks: enginefake.Hooks{Open: func(context.Context, string) error {
					if broken.Load() {
						return errors.New("engine on fire")
					}
					return nil
				}},
			})
			ref := r.start(execution.Request{})
			time.Sleep(time.Second)
			broken.Store(true)
			r.restart()
			time.Sleep(time.Second)
			if !closing {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
				defer cancel()
				e, err := r.Cancel(ctx, ref, execution.Cancellation{Grace: ptr(time.Duration(0)), By: "me"})
				if !errors.Is(err, context.DeadlineExceeded) || e.State != execution.Stopping {
					t.Errorf("%v, state %d", err, e.State)
				}
				broken.Store(false)
				if e := r.wait(ref); e.Result.Reason != execution.Cancelled || e.Result.CancelledBy != "me" || !e.Result.TreeEmpty {
					t.Errorf("%+v", e.Result)
				}
				return
			}
			begin := time.Now()
			if err := r.Close(); err != nil || time.Since(begin) > time.Second {
				t.Errorf("%v after %v", err, time.Since(begin))
			}
			broken.Store(false)
			r.open()
			if err := r.Recover(t.Context()); err != nil {
				t.Fatal(err)
			}
			if e := r.wait(ref); e.Result.Reason != execution.Exited {
				t.Errorf("%+v", e.Result)
			}
		})
	}
}

// TestStrays removes logs without a record, and nothing else.
func TestStrays(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Exit: enginefake.Exit(0)}))
		ref, other := r.start(execution.Request{}), r.start(execution.Request{})
		r.wait(ref)
		r.wait(other)
		synctest.Wait()
		if err := r.memory.DeleteExecution(t.Context(), other.ID); err != nil {
			t.Fatal(err)
		}
		kept := []string{"lost+found", ".hidden", "01arz3ndektsv4rrffq69g5fav.bak"}
		for _, name := range kept {
			if err := os.MkdirAll(filepath.Join(r.dir, name), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(r.dir, "01arz3ndektsv4rrffq69g5fav"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(r.dir, "01arz3ndektsv4rrffq69g5faw"), 0o700); err != nil {
			t.Fatal(err)
		}
		r.restart()
		entries, err := os.ReadDir(r.dir)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		want := ".hidden 01arz3ndektsv4rrffq69g5fav 01arz3ndektsv4rrffq69g5fav.bak lost+found"
		if got := strings.Join(names, " "); strings.ReplaceAll(got, ref.ID+" ", "") != want || !strings.Contains(got, ref.ID) {
			t.Errorf("left: %s", got)
		}
	})
}

func TestRecoverFails(t *testing.T) {
	for _, op := range []string{"unfinished", "get"} {
		bubble(t, func(t *testing.T) {
			r := newRig(t, scripted(enginefake.Script{Exit: enginefake.Exit(0)}))
			r.wait(r.start(execution.Request{}))
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			r.memory.hook(func(now string, _ execution.Execution) error {
				if now == op {
					return errDisk
				}
				return nil
			}, nil)
			r.open()
			if err := r.Recover(t.Context()); !errors.Is(err, errDisk) {
				t.Errorf("%s: %v", op, err)
			}
			r.memory.hook(nil, nil)
			if entries, _ := os.ReadDir(r.dir); len(entries) != 1 {
				t.Errorf("%d logs", len(entries))
			}
		})
	}
}

// TestEngineFailsAtRecovery waits for an engine in trouble, as long as that takes: only
// one that says so has lost a sandbox.
func TestEngineFailsAtRecovery(t *testing.T) {
	for name, test := range map[string]struct {
		broken time.Duration
		want   execution.Reason
	}{"for a while": {10 * time.Second, execution.Exited}, "for long": {time.Hour, execution.Exited}, "and has lost it": {10 * time.Minute, execution.SandboxLost}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var until atomic.Int64
				r := newRig(t, enginefake.Config{
					Script: func(*guestv1.StartRequest) enginefake.Script {
						return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(time.Minute, "x")}, Exit: enginefake.Exit(0)}
					},
					Hooks: enginefake.Hooks{Open: func(context.Context, string) error {
						if time.Now().UnixNano() < until.Load() {
							return fault.New(fault.Unavailable, "ENGINE", "try again")
						}
						return nil
					}},
				})
				ref := r.start(execution.Request{})
				time.Sleep(time.Second)
				begin := time.Now()
				until.Store(begin.Add(test.broken).UnixNano())
				r.restart()
				if took := time.Since(begin); took > time.Second {
					t.Errorf("the start took %v", took)
				}
				if test.want == execution.SandboxLost {
					r.fake.Die("e-" + ref.ID)
				}
				e := r.wait(ref)
				if e.Result.Reason != test.want || !e.Result.TreeEmpty || e.EndTime.After(begin.Add(test.broken+2*time.Minute)) {
					t.Errorf("%+v", e.Result)
				}
				if test.want == execution.SandboxLost {
					contains(t, e.Result.Detail, "not known")
				}
			})
		})
	}
}

// TestGuestSilentAtRecovery gives the guest its time, too.
func TestGuestSilentAtRecovery(t *testing.T) {
	for name, test := range map[string]struct {
		silent time.Duration
		want   execution.Reason
	}{"for a while": {15 * time.Second, execution.Exited}, "for good": {time.Hour, execution.SandboxLost}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				var until atomic.Int64
				r := newRig(t, enginefake.Config{
					Script: func(*guestv1.StartRequest) enginefake.Script {
						return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(2*time.Minute, "x")}, Exit: enginefake.Exit(0)}
					},
					Hooks: enginefake.Hooks{Answer: func(_ string, _ *guestv1.Request, a *enginefake.Answer) {
						a.Drop = time.Now().UnixNano() < until.Load()
					}},
				})
				ref := r.start(execution.Request{})
				time.Sleep(time.Second)
				until.Store(time.Now().Add(test.silent).UnixNano())
				r.restart()
				e := r.wait(ref)
				if e.Result.Reason != test.want || !e.Result.TreeEmpty {
					t.Errorf("%+v", e.Result)
				}
				synctest.Wait()
				if left, _ := r.fake.List(t.Context()); len(left) != 0 {
					t.Errorf("left: %v", left)
				}
			})
		})
	}
}

// TestOrdersMeetRecovery stops what has only just been taken up, in all ways.
func TestOrdersMeetRecovery(t *testing.T) {
	orders := map[string]struct {
		give func(r *rig, ref execution.Ref) error
		want execution.Reason
	}{
		"cancel": {func(r *rig, ref execution.Ref) error {
			_, err := r.Cancel(r.t.Context(), ref, execution.Cancellation{By: "me"})
			return err
		}, execution.Cancelled},
		"end of the session": {func(r *rig, ref execution.Ref) error {
			return r.EndSession(r.t.Context(), ref.Session)
		}, execution.SessionEnded},
		"stop of the server": {func(r *rig, _ execution.Ref) error { return r.StopAll(r.t.Context()) }, execution.ServerStopped},
	}
	for name, order := range orders {
		for _, session := range []string{"", "a"} {
			t.Run(name+" "+session, func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "x")}, TermDelay: time.Second}))
					if session != "" {
						r.session(session)
					}
					ref := r.start(execution.Request{Session: session})
					time.Sleep(time.Second)
					r.restart()
					if err := order.give(r, ref); err != nil {
						t.Fatal(err)
					}
					e := r.wait(ref)
					if e.Result.Reason != order.want || e.Result.Signal != 15 {
						t.Errorf("%+v", e.Result)
					}
					if got := r.watch(ref, nil); string(got.output["stdout"]) != "x" {
						t.Errorf("%q", got.output)
					}
				})
			})
		}
	}
}

// TestStoppingOverARestart goes on with a stop that the guest was told of before.
func TestStoppingOverARestart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{IgnoreTerm: true, Steps: []enginefake.Step{enginefake.Stdout(0, "x")}}))
		ref := r.start(execution.Request{})
		time.Sleep(time.Second)
		begin := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := r.Cancel(ctx, ref, execution.Cancellation{Grace: ptr(time.Minute), By: "me"}); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		r.restart()
		if e := r.get(ref); e.State != execution.Stopping {
			t.Errorf("state %d", e.State)
		}
		e := r.wait(ref)
		if took := time.Since(begin); took != time.Minute || e.Result.Reason != execution.Cancelled || e.Result.CancelledBy != "" || !e.Result.Killed {
			t.Errorf("%+v after %v", e.Result, took)
		}
		contains(t, e.Result.Detail, "who ordered it is not known")
	})
}

// TestBackstopAfterARestart gives the guest the whole time once more.
func TestBackstopAfterARestart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Immortal: true}))
		ref := r.start(execution.Request{Command: execution.Command{Args: []string{"x"}, Timeout: time.Minute}})
		time.Sleep(30 * time.Second)
		r.restart()
		begin := time.Now()
		e := r.wait(ref)
		if took := time.Since(begin); took < 80*time.Second || took > 81*time.Second || e.Result.Reason != execution.TimedOut || !e.Result.TreeEmpty {
			t.Errorf("%+v after %v", e.Result, took)
		}
	})
}
