package image_test

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/egress"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/image"
	"github.com/harvest-run/executord/internal/journal"
	"github.com/harvest-run/executord/internal/store"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// noNetwork opens nothing, and notes for which sandbox it was asked.
type noNetwork struct {
	mu    sync.Mutex
	asked []string
}

func (n *noNetwork) Open(_ context.Context, sb egress.Sandbox, _ egress.Policy) (*egress.Proxy, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, sb.ID())
	return nil, nil
}

// rig is a Service over an engine in memory and a real store.
type rig struct {
	t      *testing.T
	dir    string
	engine *enginefake.Engine
	store  *store.Store
	*image.Service

	mu     sync.Mutex
	recipe image.Recipe
	room   error
}

// steps makes a recipe of scripts.
func steps(scripts ...string) image.Recipe {
	r := image.Recipe{Name: "base", Network: egress.None()}
	for i, s := range scripts {
		r.Steps = append(r.Steps, image.Step{Name: "step " + string(rune('a'+i)), Script: s})
	}
	return r
}

// newRig has an engine whose commands do what script says of their text.
func newRig(t *testing.T, cfg enginefake.Config, script func(text string) enginefake.Script) *rig {
	t.Helper()
	cfg.Script = func(r *guestv1.StartRequest) enginefake.Script {
		text := strings.Join(r.GetArgs(), " ")
		switch {
		case strings.Contains(text, "date +%s"):
			return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "1.5\n")}, Exit: enginefake.Exit(0)}
		case strings.Contains(text, "newerct"):
			return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, "4711")}, Exit: enginefake.Exit(0)}
		case strings.HasPrefix(text, "tar "):
			return enginefake.Script{Exit: enginefake.Exit(0)}
		}
		return script(r.GetArgs()[len(r.GetArgs())-1])
	}
	r := &rig{t: t, dir: t.TempDir(), engine: enginefake.New(cfg), recipe: steps("one", "two")}
	t.Cleanup(r.engine.Shutdown)
	r.open()
	t.Cleanup(r.close)
	return r
}

func (r *rig) open() {
	r.t.Helper()
	var err error
	if r.store, err = store.Open(r.t.Context(), store.Config{Dir: r.dir}); err != nil {
		r.t.Fatal(err)
	}
	r.Service, err = image.New(image.Config{
		Engines: []engine.Engine{r.engine}, Network: &noNetwork{}, Store: r.store, Dir: filepath.Join(r.dir, "builds"),
		Recipes: map[string]func(string) (image.Recipe, error){"base": func(string) (image.Recipe, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.recipe, nil
		}},
		CheckRoom: func() error {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.room
		},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.Recover(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) close() {
	if r.Service == nil {
		return
	}
	if err := errors.Join(r.Service.Close(), r.store.Close()); err != nil {
		r.t.Error(err)
	}
	r.Service = nil
}

func (r *rig) change(recipe image.Recipe) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.recipe = recipe
}

// events reads a build's journal to its end.
func (r *rig) events(build string, after *journal.Cursor) []image.Event {
	r.t.Helper()
	w, err := r.Watch(r.t.Context(), build, after)
	if err != nil {
		r.t.Fatal(err)
	}
	defer w.Close()
	ctx, stop := context.WithTimeout(r.t.Context(), time.Minute)
	defer stop()
	var all []image.Event
	for {
		e, err := w.Next(ctx)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			r.t.Fatal(err)
		}
		all = append(all, e)
	}
}

// end waits for a build's end.
func (r *rig) end(b image.Build) image.Build {
	r.t.Helper()
	all := r.events(b.ID, nil)
	last := all[len(all)-1].Result
	if last == nil {
		r.t.Fatalf("the journal ends with %+v", all[len(all)-1])
	}
	return *last
}

// wantNothing checks that there is no sandbox.
func (r *rig) wantNothing() {
	r.t.Helper()
	if left, err := r.engine.List(r.t.Context()); err != nil || len(left) > 0 {
		r.t.Errorf("sandboxes %v are left (%v)", left, err)
	}
}

// says is a program that writes and exits.
func says(text string, code int32) enginefake.Script {
	return enginefake.Script{Steps: []enginefake.Step{enginefake.Stdout(0, text), enginefake.Stderr(0, "!")}, Exit: enginefake.Exit(code)}
}
