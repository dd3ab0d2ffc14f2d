package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/journal"
)

// Watcher reads the events of one build. It is for one goroutine.
type Watcher struct {
	*journal.Watcher
}

// Watch reads the journal of a build behind after, from the start if that is nil.
// Faults: NotFound (BUILD_NOT_FOUND, LOG_NOT_FOUND), OutOfRange.
func (s *Service) Watch(ctx context.Context, build string, after *journal.Cursor) (*Watcher, error) {
	if _, err := s.GetBuild(ctx, build); err != nil {
		return nil, err
	}
	w, err := s.journals.Watch(build, after)
	if err != nil {
		return nil, err
	}
	return &Watcher{w}, nil
}

// Next waits for the next event. It returns io.EOF behind the result, and the cause of
// ctx when that ends; then it can be called again.
func (w *Watcher) Next(ctx context.Context) (Event, error) {
	entry, err := w.Watcher.Next(ctx)
	if err != nil {
		return Event{}, err
	}
	var e Event
	if entry.Gap == nil {
		if err := json.Unmarshal(entry.Data, &e); err != nil {
			return Event{}, fmt.Errorf("decode an event of a build: %w", err)
		}
	}
	e.Cursor, e.Time, e.Gap = entry.Cursor, entry.Time, entry.Gap
	return e, nil
}

// Ensure returns a build of an image that can be used now, and makes one first if there is
// none by the recipe in force: then it tells progress, unless that is nil, what the build
// does. If that fails and there is one by an earlier recipe, it is that. All who ask meanwhile wait for the same build, which goes on when their contexts
// end. A build that fails is a fault FailedPrecondition (IMAGE_BUILD_FAILED), which says
// which step failed; the next call tries again.
func (s *Service) Ensure(ctx context.Context, engineName, name string, progress func(Event)) (Build, error) {
	e, recipe, err := s.recipe(engineName, name)
	if err != nil {
		return Build{}, err
	}
	ready, err := s.usable(ctx, e, recipe)
	if err != nil || ready != nil {
		return deref(ready), err
	}
	b, err := s.Build(ctx, Request{Name: name, Engine: e.Name()})
	if err != nil {
		return Build{}, err
	}
	if b.State == Building {
		if b, err = s.follow(ctx, b.ID, progress); err != nil {
			return Build{}, err
		}
	}
	if b.State == Ready {
		return b, nil
	}
	// What was good until now is better than nothing: the recipe may only have become newer,
	// or the registries be out of reach.
	older, err := s.anyReady(ctx, e, name)
	if err != nil {
		return Build{}, err
	}
	if older == nil {
		return Build{}, buildFailed(b)
	}
	s.log.WarnContext(ctx, "an image could not be built anew, the older one is used", "image", name, "build", b.ID, "used", older.ID)
	return *older, nil
}

// anyReady returns the newest build that the engine still has, whatever it was made by; nil
// if there is none.
func (s *Service) anyReady(ctx context.Context, e engine.Engine, name string) (*Build, error) {
	return s.newest(ctx, e, name, func(Build) bool { return true })
}

// follow tells what a build does until its end, and returns it as it ended.
func (s *Service) follow(ctx context.Context, build string, progress func(Event)) (Build, error) {
	w, err := s.Watch(ctx, build, nil)
	if err != nil {
		return Build{}, err
	}
	defer w.Close()
	for {
		e, err := w.Next(ctx)
		switch {
		case errors.Is(err, io.EOF):
			return s.GetBuild(ctx, build) // the result lies in a gap
		case errors.Is(err, journal.ErrClosed):
			return Build{}, errClosed
		case err != nil:
			return Build{}, err
		}
		if progress != nil {
			progress(e)
		}
		if e.Result != nil {
			return *e.Result, nil
		}
	}
}

func buildFailed(b Build) error {
	f := b.Failure
	if f == nil {
		f = &Failure{}
	}
	err := fault.New(fault.FailedPrecondition, "IMAGE_BUILD_FAILED", "image %s could not be built: %s", b.Image, f.Detail).
		With("build", b.ID).With("time", b.EndTime.UTC().Format(time.RFC3339))
	if f.Step != "" {
		err = err.With("step", f.Step)
	}
	return err
}
