package image_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/guestfiles"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/image"
)

// TestBuild tells what happens in order, keeps the image and leaves no sandbox; once it is
// there nothing is built again.
func TestBuild(t *testing.T) {
	r := newRig(t, enginefake.Config{}, func(text string) enginefake.Script { return says(text, 0) })
	recipe := steps("one", "two")
	recipe.Steps[1].Files = []guestfiles.File{{Path: "/a/b", Data: []byte("x")}}
	r.change(recipe)
	b, err := r.Build(t.Context(), image.Request{Name: "base"})
	if err != nil || b.State != image.Building || b.Engine != "fake" || b.Recipe != recipe.Hash() {
		t.Fatalf("%+v, %v", b, err)
	}
	ended := r.end(b)
	if ended.State != image.Ready || ended.SizeBytes != 4711 || ended.Ref != r.engine.HeldImages()[0] || ended.EndTime.IsZero() {
		t.Errorf("%+v", ended)
	}
	r.wantNothing()
	var told []string
	for _, e := range r.events(b.ID, nil) {
		switch {
		case e.Started != nil:
			told = append(told, "started "+strings.Join(e.Started.Steps, ","))
		case e.Step != nil:
			told = append(told, e.Step.Name)
		case e.Output != nil:
			told = append(told, string(e.Output.Data))
		case e.StepEnded != nil:
			told = append(told, "done")
		case e.Result != nil:
			told = append(told, e.Result.State.String())
		}
	}
	if got := strings.Join(told, " "); got != "started step a,step b step a one ! done step b two ! done READY" {
		t.Errorf("%s", got)
	}
	again, err := r.Build(t.Context(), image.Request{Name: "base"})
	if err != nil || again.ID != b.ID {
		t.Errorf("built again: %+v, %v", again, err)
	}
	img, err := r.Get(t.Context(), "", "base")
	if err != nil || img.Ready.ID != b.ID || img.Latest.ID != b.ID || !img.Current {
		t.Errorf("%+v, %v", img, err)
	}
	// Another recipe is another image, and so is one that somebody deleted behind our back.
	r.change(steps("three"))
	if img, err := r.Get(t.Context(), "fake", "base"); err != nil || img.Current {
		t.Errorf("%+v, %v", img, err)
	}
	for range 2 {
		next, err := r.Ensure(t.Context(), "fake", "base", nil)
		if err != nil || next.ID == b.ID || next.State != image.Ready {
			t.Fatalf("%+v, %v", next, err)
		}
		if err := r.engine.Images().Delete(t.Context(), next.Ref); err != nil {
			t.Fatal(err)
		}
		b = next
	}
}

// TestFailedStep says which step failed and why, and leaves nothing.
func TestFailedStep(t *testing.T) {
	long := strings.Repeat("x", 10_000) + "\n" + strings.Repeat("é", 100) + "\nthe cause\n"
	for name, test := range map[string]struct {
		script enginefake.Script
		want   func(f image.Failure) bool
		detail string
	}{
		"exit": {says(long, 7), func(f image.Failure) bool {
			return *f.ExitCode == 7 && strings.HasSuffix(f.Output, "the cause\n!") && len(f.Output) <= 4096 && !strings.Contains(f.Output, "?")
		}, "step 2 (step b): exited with 7"},
		"signal":  {enginefake.Script{Exit: enginefake.Signal(9)}, func(f image.Failure) bool { return f.ExitCode == nil && f.Signal == 9 }, "was ended by signal 9"},
		"no such": {enginefake.Script{Refuse: enginefake.Refusal(5, "no bash")}, func(f image.Failure) bool { return f.ExitCode == nil }, "no bash"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, enginefake.Config{}, func(text string) enginefake.Script {
				if text == "two" {
					return test.script
				}
				return says(text, 0)
			})
			_, err := r.Ensure(t.Context(), "", "base", nil)
			if fault.ReasonOf(err) != "IMAGE_BUILD_FAILED" || !strings.Contains(err.Error(), test.detail) {
				t.Errorf("%v", err)
			}
			img, err := r.Get(t.Context(), "", "base")
			if err != nil || img.Ready != nil || img.Latest.State != image.Failed {
				t.Fatalf("%+v, %v", img, err)
			}
			if f := img.Latest.Failure; f.Step != "step b" || !test.want(*f) {
				t.Errorf("%+v", f)
			}
			r.wantNothing()
			if held := r.engine.HeldImages(); len(held) > 0 {
				t.Errorf("images %v are left", held)
			}
		})
	}
}

// TestFailures besides the steps.
func TestFailures(t *testing.T) {
	refusal := errors.New("refused")
	var hooks enginefake.Hooks
	hooks.Snapshot = func(context.Context, string) error { return refusal }
	r := newRig(t, enginefake.Config{Hooks: hooks}, func(text string) enginefake.Script { return says(text, 0) })
	if _, err := r.Ensure(t.Context(), "", "base", nil); err == nil || !strings.Contains(err.Error(), "keep what the steps made: refused") {
		t.Errorf("%v", err)
	}
	r.wantNothing()
	for _, test := range []struct {
		request image.Request
		want    string
	}{
		{image.Request{Name: "other"}, "IMAGE_NOT_FOUND"},
		{image.Request{Name: "base", Engine: "modal"}, "ENGINE_NOT_FOUND"},
	} {
		if _, err := r.Build(t.Context(), test.request); fault.ReasonOf(err) != test.want {
			t.Errorf("%+v: %v", test.request, err)
		}
	}
	r.room = fault.New(fault.Exhausted, "DISK_FULL", "full")
	if _, err := r.Build(t.Context(), image.Request{Name: "base"}); fault.ReasonOf(err) != "DISK_FULL" {
		t.Errorf("%v", err)
	}
}

// TestOlderImageServes while a newer one cannot be made.
func TestOlderImageServes(t *testing.T) {
	r := newRig(t, enginefake.Config{}, func(text string) enginefake.Script {
		if text == "bad" {
			return says(text, 1)
		}
		return says(text, 0)
	})
	good, err := r.Ensure(t.Context(), "", "base", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.change(steps("bad"))
	if used, err := r.Ensure(t.Context(), "", "base", nil); err != nil || used.ID != good.ID {
		t.Errorf("%+v, %v", used, err)
	}
}

// TestTogether: all who ask at a time get one build, each with its progress, and none of
// them stops it by going away.
func TestTogether(t *testing.T) {
	release := make(chan struct{})
	var begun sync.Once
	started := make(chan struct{})
	hooks := enginefake.Hooks{Create: func(ctx context.Context, _ string) error {
		begun.Do(func() { close(started) })
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}}
	r := newRig(t, enginefake.Config{Hooks: hooks}, func(text string) enginefake.Script { return says(text, 0) })
	var all sync.WaitGroup
	var steps atomic.Int32
	ids := make([]string, 8)
	for i := range ids {
		all.Go(func() {
			b, err := r.Ensure(t.Context(), "", "base", func(e image.Event) {
				if e.Step != nil {
					steps.Add(1)
				}
			})
			if err != nil {
				t.Error(err)
			}
			ids[i] = b.ID
		})
	}
	<-started
	left, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	if _, err := r.Ensure(left, "", "base", nil); !errors.Is(err, gone) && !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if err := r.Delete(t.Context(), "", "base", idempotency.Key{}); fault.ReasonOf(err) != "IMAGE_BUILDING" {
		t.Errorf("delete: %v", err)
	}
	close(release)
	all.Wait()
	for _, id := range ids {
		if id != ids[0] {
			t.Errorf("builds %v", ids)
		}
	}
	if made := r.engine.Made(); len(made) != 1 {
		t.Errorf("sandboxes %v were made", made)
	}
	if n := steps.Load(); n%2 != 0 || n < 2 {
		t.Errorf("%d steps were told", n)
	}
}

// TestRequestID: a repeat makes nothing, also of what joined or found another's.
func TestRequestID(t *testing.T) {
	r := newRig(t, enginefake.Config{}, func(text string) enginefake.Script { return says(text, 0) })
	key := idempotency.Key{Owner: "me", ID: "r", Method: "BuildImage", Fingerprint: "f"}
	var ids []string
	for range 2 {
		b, err := r.Build(t.Context(), image.Request{Name: "base", Rebuild: true, Key: key})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, r.end(b).ID)
	}
	if ids[0] != ids[1] {
		t.Errorf("%v", ids)
	}
	key.Fingerprint = "g"
	if _, err := r.Build(t.Context(), image.Request{Name: "base", Key: key}); fault.ReasonOf(err) != "REQUEST_ID_REUSED" {
		t.Errorf("%v", err)
	}
	key = idempotency.Key{Owner: "me", ID: "found", Method: "BuildImage", Fingerprint: "f"}
	for range 2 {
		if b, err := r.Build(t.Context(), image.Request{Name: "base", Key: key}); err != nil || b.ID != ids[0] {
			t.Errorf("%+v, %v", b, err)
		}
	}
	del := idempotency.Key{Owner: "me", ID: "d", Method: "DeleteImage", Fingerprint: "f"}
	for range 2 {
		if err := r.Delete(t.Context(), "", "base", del); err != nil {
			t.Error(err)
		}
	}
	if err := r.Delete(t.Context(), "", "base", idempotency.Key{}); fault.ReasonOf(err) != "IMAGE_NOT_FOUND" {
		t.Errorf("%v", err)
	}
	if held := r.engine.HeldImages(); len(held) > 0 {
		t.Errorf("images %v are left", held)
	}
	if _, err := r.Watch(t.Context(), ids[0], nil); fault.ReasonOf(err) != "BUILD_NOT_FOUND" {
		t.Errorf("%v", err)
	}
}

// TestPrune keeps two usable builds and five failed ones.
func TestPrune(t *testing.T) {
	r := newRig(t, enginefake.Config{}, func(text string) enginefake.Script {
		if text == "bad" {
			return says(text, 1)
		}
		return says(text, 0)
	})
	build := func(text string, n int) {
		r.change(steps(text))
		for range n {
			b, err := r.Build(t.Context(), image.Request{Name: "base", Rebuild: true})
			if err != nil {
				t.Fatal(err)
			}
			r.end(b)
		}
	}
	build("good", 4)
	build("bad", 7)
	all, err := r.store.ListBuilds(t.Context(), "", "")
	if err != nil || len(all) != 7 || len(r.engine.HeldImages()) != 2 {
		t.Errorf("%d builds, images %v, %v", len(all), r.engine.HeldImages(), err)
	}
	if list, err := r.List(t.Context()); err != nil || len(list) != 1 || list[0].Ready == nil {
		t.Errorf("%+v, %v", list, err)
	}
}

// TestStop ends a build, with its sandbox; what was cut off without that is told as failed
// after the next start, to watchers as well.
func TestStop(t *testing.T) {
	r := newRig(t, enginefake.Config{}, func(string) enginefake.Script { return enginefake.Script{} }) // never ends
	b, err := r.Build(t.Context(), image.Request{Name: "base"})
	if err != nil {
		t.Fatal(err)
	}
	w, err := r.Watch(t.Context(), b.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	for { // until it runs
		e, err := w.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if e.Step != nil {
			break
		}
	}
	w.Close()
	r.close()
	r.wantNothing()
	r.open()
	if ended := r.end(b); ended.State != image.Failed || !strings.Contains(ended.Failure.Detail, "executord was stopped") {
		t.Errorf("%+v", ended)
	}
	r.close()
	// As a kill -9 leaves it: a record that says that it is being built, and no end in its
	// journal.
	r.open()
	cut, err := r.Build(t.Context(), image.Request{Name: "base"})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Recover(t.Context()); err != nil { // by the next executord
		t.Fatal(err)
	}
	if got, err := r.GetBuild(t.Context(), cut.ID); err != nil || got.State != image.Failed {
		t.Errorf("%+v, %v", got, err)
	}
	if ended := r.end(cut); ended.State != image.Failed {
		t.Errorf("%+v", ended)
	}
}

func TestBadRecipes(t *testing.T) {
	for name, recipe := range map[string]image.Recipe{
		"no steps":     {Name: "base"},
		"a name":       {Name: "Base", Steps: steps("x").Steps},
		"both":         {Name: "base", Steps: []image.Step{{Name: "a", Script: "x", Args: []string{"x"}}}},
		"nothing":      {Name: "base", Steps: []image.Step{{Name: "a"}}},
		"no step name": {Name: "base", Steps: []image.Step{{Script: "x"}}},
		"a path":       {Name: "base", Steps: []image.Step{{Name: "a", Files: []guestfiles.File{{Path: "/a/../b"}}}}},
		"relative":     {Name: "base", Steps: []image.Step{{Name: "a", Files: []guestfiles.File{{Path: "a"}}}}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, enginefake.Config{}, func(text string) enginefake.Script { return says(text, 0) })
			r.change(recipe)
			if b, err := r.Build(t.Context(), image.Request{Name: "base"}); err == nil {
				t.Errorf("%+v", b)
			}
		})
	}
}

// TestHash tells recipes apart by all that they say.
func TestHash(t *testing.T) {
	base := steps("one")
	seen := map[string]string{base.Hash(): "base"}
	for name, change := range map[string]func(*image.Recipe){
		"script": func(r *image.Recipe) { r.Steps[0].Script = "two" },
		"key":    func(r *image.Recipe) { r.Steps[0].Key = "k" },
		"env":    func(r *image.Recipe) { r.Steps[0].Env = []string{"A=b"} },
		"file":   func(r *image.Recipe) { r.Steps[0].Files = []guestfiles.File{{Path: "/a"}} },
		"data":   func(r *image.Recipe) { r.Steps[0].Files = []guestfiles.File{{Path: "/a", Data: []byte("x")}} },
		"from":   func(r *image.Recipe) { r.From = "x" },
		"more":   func(r *image.Recipe) { r.Steps = append(r.Steps, r.Steps[0]) },
	} {
		r := steps("one")
		change(&r)
		if other, taken := seen[r.Hash()]; taken {
			t.Errorf("%s is like %s", name, other)
		}
		seen[r.Hash()] = name
	}
	if again := steps("one"); again.Hash() != base.Hash() {
		t.Error("an equal recipe has another hash")
	}
}
