package execution_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/admission"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/pool"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/fault"
)

// claims is the pool of an executord that can be killed.
type claims struct {
	mortal *mortal
	ready  string
}

func (c claims) Claim(spec engine.Spec) (engine.Sandbox, bool) {
	if c.ready == "" || spec.ID != "" {
		return nil, false
	}
	sb, err := c.mortal.Open(context.Background(), c.ready)
	return sb, err == nil && c.mortal.step("claim") == nil
}

// pooled gives a rig a pool that keeps two ready, and waits until they are.
func pooled(t *testing.T, r *rig) *pool.Pool {
	t.Helper()
	p := pool.New(pool.Config{Engine: r.engine, Size: 2})
	var group sync.WaitGroup
	group.Go(func() { _ = p.Run(context.Background()) })
	t.Cleanup(func() { p.Drain(); group.Wait() })
	synctest.Wait()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r.pool = p
	r.open()
	return p
}

func TestClaim(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(time.Minute, "x")}, Exit: enginefake.Exit(0)}))
		p := pooled(t, r)
		var inserted []execution.Execution
		r.memory.hook(func(op string, e execution.Execution) error {
			if op == "insert" {
				if slices.Contains(r.fake.Started(), e.ID) {
					t.Error("it was started before it was recorded")
				}
				inserted = append(inserted, e)
			}
			return nil
		}, nil)
		ready := r.fake.Made()
		ref := r.start(execution.Request{})
		synctest.Wait()
		e := r.get(ref)
		if e.Sandbox != ready[0] || inserted[0].Sandbox != ready[0] || !slices.Equal(r.fake.Held(ready[0]), []string{ref.ID}) {
			t.Errorf("it runs in %s, recorded was %s, ready were %v", e.Sandbox, inserted[0].Sandbox, ready)
		}
		end := r.wait(ref)
		inOrder(t, end.Result.Times)
		if end.Result.Times.SandboxReady.IsZero() || string(r.watch(ref, nil).output["stdout"]) != "x" {
			t.Errorf("%+v", end.Result)
		}
		synctest.Wait()
		if left, _ := r.fake.List(t.Context()); slices.Contains(left, ready[0]) || len(left) != 2 {
			t.Errorf("left: %v, was %s", left, ready[0])
		}

		// With limits of its own it gets a sandbox of its own, and in a session the session's.
		own := r.get(r.start(execution.Request{Limits: engine.Limits{PIDs: 5}}))
		if own.Sandbox != "e-"+own.ID || own.Limits.PIDs != 5 {
			t.Errorf("it runs in %s with %+v", own.Sandbox, own.Limits)
		}
		r.session("a")
		if in := r.get(r.start(execution.Request{Session: "a"})); in.Sandbox != "s-a" {
			t.Errorf("it runs in %s", in.Sandbox)
		}
		if s := p.Stats(); s.Hits != 1 || s.Misses != 0 {
			t.Errorf("%+v", s)
		}
		// When none is ready one is made.
		refs := []execution.Ref{r.start(execution.Request{}), r.start(execution.Request{}), r.start(execution.Request{})}
		if last := r.get(refs[2]); last.Sandbox != "e-"+last.ID {
			t.Errorf("it runs in %s", last.Sandbox)
		}
		for _, ref := range refs {
			if res := r.wait(ref).Result; res.Reason != execution.Exited {
				t.Errorf("%+v", res)
			}
		}
	})
}

// A sandbox that was claimed for an execution that did not come to be is ended, and the
// place is given back.
func TestClaimedInVain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, enginefake.Config{})
		r.admission = admission.New(admission.Config{MaxRunning: 1})
		p := pooled(t, r)
		r.memory.hook(func(op string, _ execution.Execution) error {
			if op == "insert" {
				return errors.New("the disk is on fire")
			}
			return nil
		}, nil)
		ready := r.fake.Made()
		for range 2 {
			if _, err := r.Start(t.Context(), execution.Request{Command: execution.Command{Args: []string{"x"}}}); err == nil || fault.KindOf(err) != fault.Internal {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if left, _ := r.fake.List(t.Context()); len(left) != 0 {
			t.Errorf("left: %v of %v", left, ready)
		}
		if s := r.admission.Stats(); s.Running != 0 || s.Sandboxes != 0 {
			t.Errorf("%+v", s)
		}
		r.memory.hook(nil, nil)
		r.run(execution.Request{})
		if p.Stats().Hits != 2 {
			t.Errorf("%+v", p.Stats())
		}
	})
}

// An executord that starts again finds what runs in a claimed sandbox by its record.
func TestClaimAndRestart(t *testing.T) {
	bubble(t, func(t *testing.T) {
		r := newRig(t, scripted(enginefake.Script{
			Steps: []enginefake.Step{enginefake.Stdout(time.Second, "early "), enginefake.Stdout(time.Minute, "late")}, Exit: enginefake.Exit(3),
		}))
		pooled(t, r)
		ref := r.start(execution.Request{})
		sandbox := r.get(ref).Sandbox
		time.Sleep(30 * time.Second)
		r.restart()
		e := r.wait(ref)
		if e.Sandbox != sandbox || sandbox == "e-"+ref.ID || *e.Result.ExitCode != 3 || string(r.watch(ref, nil).output["stdout"]) != "early late" {
			t.Errorf("%+v in %s", e.Result, e.Sandbox)
		}
	})
}

// TestClaimAndCrash kills executord around the claim and the record of it: the record
// names the claimed sandbox or nothing does, and nothing is left.
func TestClaimAndCrash(t *testing.T) {
	for point, reason := range map[string]execution.Reason{
		"claim": "", "before insert": "", "after insert": execution.StartFailed, "dial": execution.StartFailed,
		"before note": execution.Exited, "before terminate": execution.Exited, "after store the end": execution.Exited,
	} {
		t.Run(point, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				script := enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(10*time.Second, "text")}, Exit: enginefake.Exit(0)}
				w := &world{t: t, fake: enginefake.New(scripted(script)), store: newMemory(), dir: filepath.Join(t.TempDir(), "logs"), ready: "w-1"}
				t.Cleanup(w.fake.Shutdown)
				if _, err := w.fake.Create(t.Context(), engine.Spec{ID: "w-1"}); err != nil {
					t.Fatal(err)
				}
				w.crash(point, "", nil)
				w.ready = ""
				next := w.executord(nil)
				defer next.Close()
				if err := next.Recover(t.Context()); err != nil {
					t.Fatal(err)
				}
				r := &rig{Service: next.Service, t: t, engine: w.fake, fake: w.fake, store: w.store, memory: w.store, dir: w.dir, sessions: &sessions{running: map[string]engine.Sandbox{}}}
				if left := r.list(); reason == "" && len(left) != 0 {
					t.Errorf("not swept: %v", left)
				}
				all := w.store.all()
				if reason == "" {
					if entries, _ := os.ReadDir(w.dir); len(all) != 0 || len(entries) != 0 {
						t.Errorf("recorded %v, logs %v", all, entries)
					}
					return
				}
				e := r.wait(execution.Ref{ID: all[0].ID})
				if e.Sandbox != "w-1" || e.Result.Reason != reason {
					t.Errorf("%+v in %s", e.Result, e.Sandbox)
				}
				inOrder(t, e.Result.Times)
				synctest.Wait()
				if left := r.list(); len(left) != 0 {
					t.Errorf("left: %v", left)
				}
			})
		})
	}
}
