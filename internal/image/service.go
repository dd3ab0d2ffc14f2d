package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/journal"
)

const (
	// keptReady are the usable builds of an image that are kept: who was given the one
	// before may still be about to make a sandbox of it.
	keptReady = 2
	// keptFailed are the failed builds of an image that are kept, to be looked into.
	keptFailed = 5
	// firstRetry and lastRetry bound the wait between attempts to record an end.
	firstRetry = 50 * time.Millisecond
	lastRetry  = 30 * time.Second
)

// errClosed ends the builds of a Service that is closed.
var errClosed error = &fault.Error{
	Kind: fault.Unavailable, Reason: "SERVER_STOPPING", Message: "executord is stopping", RetryAfter: time.Second,
}

// Config says what a Service works with.
type Config struct {
	// Engines make images, the default one first.
	Engines []engine.Engine
	Network Network
	Store   Store
	// Recipes are by the names of the images that can be built. They are asked anew for
	// each use, because what an image is made from can change.
	Recipes map[string]func(engine string) (Recipe, error)
	// Dir holds the journals.
	Dir string
	// CheckRoom returns a fault while the disk has no room for new work; nil tries all
	// the same.
	CheckRoom func() error
	Logger    *slog.Logger
}

// Service keeps images.
type Service struct {
	cfg      Config
	log      *slog.Logger
	journals *journal.Set
	requests idempotency.Requests
	// building has one token for each build that may run at a time: they take the whole
	// machine.
	building chan struct{}

	mu      sync.Mutex
	closed  bool
	running map[string]run // by engine and name
	work    sync.WaitGroup
}

// run is a build that goes on.
type run struct {
	build  Build
	cancel context.CancelCauseFunc
}

// Request asks for a build.
type Request struct {
	// Name of the image; Engine "" is the default one.
	Name   string
	Engine string
	// Rebuild makes it anew also when there is one by the same recipe.
	Rebuild bool
	// Key is the name of the request, with which it can be repeated.
	Key idempotency.Key
}

// New makes a Service. Recover must be called before it is used.
func New(cfg Config) (*Service, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	journals, err := journal.NewSet(journal.Config{Dir: cfg.Dir, What: "build"})
	if err != nil {
		return nil, err
	}
	return &Service{
		cfg: cfg, log: cfg.Logger, journals: journals, running: make(map[string]run),
		requests: idempotency.Requests{Store: cfg.Store}, building: make(chan struct{}, 1),
	}, nil
}

// Recover ends, in the records, the builds that an executord before this one did not
// finish. Their sandboxes are ended as strays. Call it once, before anything else.
func (s *Service) Recover(ctx context.Context) error {
	all, err := s.cfg.Store.ListBuilds(ctx, "", "")
	if err != nil {
		return err
	}
	known := make(map[string]bool, len(all))
	for _, b := range all {
		known[b.ID] = true
	}
	if err := s.journals.Strays(func(id string) (bool, error) { return known[id], nil }); err != nil {
		return err
	}
	for _, b := range all {
		if b.State != Building {
			continue
		}
		b.State, b.EndTime = Failed, time.Now()
		b.Failure = &Failure{Detail: "executord was stopped while it was being built"}
		if err := s.seal(b); err != nil {
			return fmt.Errorf("end the journal of build %s: %w", b.ID, err)
		}
		if err := s.cfg.Store.UpdateBuild(ctx, b); err != nil {
			return err
		}
	}
	return nil
}

// seal ends a journal that was left without an end.
func (s *Service) seal(b Build) error {
	j, err := s.journals.Open(b.ID)
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	if err != nil {
		return err
	}
	defer j.Close()
	if j.Ended() {
		return nil
	}
	return s.tell(j, Event{Result: &b})
}

// tell adds an event to a journal.
func (s *Service) tell(j *journal.Journal, e Event) error {
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode an event of a build: %w", err)
	}
	if e.Result != nil {
		_, err = j.End(time.Now(), data)
	} else {
		_, err = j.Append(time.Now(), data)
	}
	return err
}

// Build begins to make an image, unless it is being made or is there, and returns the
// build that makes or made it. The repeat of an earlier request returns that one's. Faults:
// NotFound (IMAGE_NOT_FOUND, ENGINE_NOT_FOUND), Exhausted (DISK_FULL), Unavailable.
func (s *Service) Build(ctx context.Context, r Request) (Build, error) {
	earlier, done, err := s.requests.Begin(ctx, r.Key)
	if err != nil {
		return Build{}, err
	}
	defer done()
	if earlier != "" {
		return s.GetBuild(ctx, earlier)
	}
	e, recipe, err := s.recipe(r.Engine, r.Name)
	if err != nil {
		return Build{}, err
	}
	if !r.Rebuild {
		ready, err := s.usable(ctx, e, recipe)
		if err != nil || ready != nil {
			if err == nil {
				err = s.note(ctx, r.Key, ready.ID)
			}
			return deref(ready), err
		}
	}
	b, joined, err := s.begin(ctx, e, recipe, r.Key)
	if err == nil && joined {
		err = s.note(ctx, r.Key, b.ID)
	}
	return b, err
}

// note remembers a request that made nothing of its own.
func (s *Service) note(ctx context.Context, key idempotency.Key, build string) error {
	if err := s.requests.Note(ctx, key, build); err != nil {
		return err
	}
	return s.requests.Sync(ctx, key)
}

func deref(b *Build) Build {
	if b == nil {
		return Build{}
	}
	return *b
}

// recipe finds an engine and what makes an image on it.
func (s *Service) recipe(engineName, name string) (engine.Engine, Recipe, error) {
	e, err := s.engine(engineName)
	if err != nil {
		return nil, Recipe{}, err
	}
	find, ok := s.cfg.Recipes[name]
	if !ok {
		return nil, Recipe{}, noImage(name)
	}
	recipe, err := find(e.Name())
	if err != nil {
		return nil, Recipe{}, fmt.Errorf("find out how to make image %s: %w", name, err)
	}
	if err := recipe.check(); err != nil {
		return nil, Recipe{}, err
	}
	return e, recipe, nil
}

func (s *Service) engine(name string) (engine.Engine, error) {
	for _, e := range s.cfg.Engines {
		if name == "" || e.Name() == name {
			return e, nil
		}
	}
	return nil, fault.New(fault.NotFound, "ENGINE_NOT_FOUND", "there is no engine %q", name)
}

// usable returns the newest build by a recipe that the engine still has; nil if there is
// none.
func (s *Service) usable(ctx context.Context, e engine.Engine, recipe Recipe) (*Build, error) {
	hash := recipe.Hash()
	return s.newest(ctx, e, recipe.Name, func(b Build) bool { return b.Recipe == hash })
}

// newest returns the newest build that fits and that the engine still has; nil if there
// is none.
func (s *Service) newest(ctx context.Context, e engine.Engine, name string, fits func(Build) bool) (*Build, error) {
	all, err := s.cfg.Store.ListBuilds(ctx, e.Name(), name)
	if err != nil {
		return nil, err
	}
	for _, b := range all {
		if b.State != Ready || !fits(b) {
			continue
		}
		there, err := e.Images().Exists(ctx, b.Ref)
		if err != nil {
			return nil, fmt.Errorf("look for image %s: %w", name, err)
		}
		if there {
			return &b, nil
		}
	}
	return nil, nil
}

// begin starts a build, or joins the one of the same image that runs.
func (s *Service) begin(ctx context.Context, e engine.Engine, recipe Recipe, key idempotency.Key) (_ Build, joined bool, err error) {
	place := e.Name() + "/" + recipe.Name
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return Build{}, false, errClosed
	}
	if other, ok := s.running[place]; ok {
		return other.build, true, nil
	}
	if check := s.cfg.CheckRoom; check != nil {
		if err := check(); err != nil {
			return Build{}, false, err
		}
	}
	now := time.Now()
	id := strings.ToLower(ulid.MustNew(ulid.Timestamp(now), ulid.DefaultEntropy()).String())
	b := Build{ID: id, Image: recipe.Name, Engine: e.Name(), Recipe: recipe.Hash(), Sandbox: "b-" + id, State: Building, CreateTime: now}
	j, err := s.journals.Create(id)
	if err != nil {
		return Build{}, false, err
	}
	names := make([]string, len(recipe.Steps))
	for i, step := range recipe.Steps {
		names[i] = step.Name
	}
	err = s.tell(j, Event{Started: &Started{Build: id, Image: recipe.Name, Engine: e.Name(), Steps: names}})
	if err == nil {
		err = s.cfg.Store.InsertBuild(ctx, key, b)
	}
	if err != nil {
		j.Close()
		return Build{}, false, errors.Join(fmt.Errorf("record build %s: %w", id, err), s.journals.Remove(id))
	}
	// It outlives who asked for it: others may wait for it too.
	running, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	s.running[place] = run{b, cancel}
	s.work.Go(func() {
		defer cancel(nil)
		defer j.Close()
		s.carryOut(running, e, recipe, b, j, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.running, place)
		})
	})
	return b, false, nil
}

// carryOut does a build, records its end, and calls leave before anybody can see that.
func (s *Service) carryOut(ctx context.Context, e engine.Engine, recipe Recipe, b Build, j *journal.Journal, leave func()) {
	s.log.InfoContext(ctx, "an image is being built", "image", b.Image, "engine", b.Engine, "build", b.ID)
	ref, size, err := s.oneAtATime(ctx, e, recipe, b, j)
	b.EndTime = time.Now()
	if err != nil {
		b.State, b.Failure = Failed, failureOf(ctx, err)
		s.log.ErrorContext(ctx, "an image could not be built", "image", b.Image, "engine", b.Engine, "build", b.ID, "error", b.Failure.Detail)
	} else {
		b.State, b.Ref, b.SizeBytes = Ready, ref, size
		s.log.InfoContext(ctx, "an image was built", "image", b.Image, "engine", b.Engine, "build", b.ID, "duration", b.EndTime.Sub(b.CreateTime), "bytes", size)
	}
	// The record before the journal's end: who sees the result can use the image.
	recorded := s.persist(ctx, func() error { return s.cfg.Store.UpdateBuild(context.WithoutCancel(ctx), b) })
	if recorded {
		s.prune(ctx, e, b)
	}
	leave()
	if err := s.tell(j, Event{Result: &b}); err != nil {
		s.log.ErrorContext(ctx, "end the journal of a build", "build", b.ID, "error", err)
	}
}

func (s *Service) oneAtATime(ctx context.Context, e engine.Engine, recipe Recipe, b Build, j *journal.Journal) (engine.ImageRef, int64, error) {
	select {
	case s.building <- struct{}{}:
	case <-ctx.Done():
		return "", 0, context.Cause(ctx)
	}
	defer func() { <-s.building }()
	return Builder{Engine: e, Network: s.cfg.Network}.Build(ctx, recipe, b.Sandbox, func(e Event) error { return s.tell(j, e) })
}

// failureOf says why a build failed.
func failureOf(ctx context.Context, err error) *Failure {
	if ctx.Err() != nil {
		return &Failure{Detail: "executord was stopped while it was being built"}
	}
	if step, ok := errors.AsType[*stepError](err); ok {
		return &step.failure
	}
	return &Failure{Detail: err.Error()}
}

// persist does what has to be done, until it works or the Service is closed: then
// Recover makes up for it.
func (s *Service) persist(ctx context.Context, do func() error) bool {
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		err := do()
		if err == nil {
			return true
		}
		s.log.ErrorContext(ctx, "record a build, trying again", "error", err)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return false
		}
	}
}

// prune removes builds of an image that nobody needs any more.
func (s *Service) prune(ctx context.Context, e engine.Engine, b Build) {
	ctx = context.WithoutCancel(ctx)
	all, err := s.cfg.Store.ListBuilds(ctx, b.Engine, b.Image)
	if err != nil {
		s.log.ErrorContext(ctx, "look for builds that nobody needs", "image", b.Image, "error", err)
		return
	}
	ready, failed := 0, 0
	for _, old := range all {
		switch old.State {
		case Ready:
			ready++
		case Failed:
			failed++
		}
		if old.State == Ready && ready > keptReady || old.State == Failed && failed > keptFailed {
			if err := s.remove(ctx, e, old); err != nil {
				s.log.ErrorContext(ctx, "remove a build that nobody needs, left for the next one", "build", old.ID, "error", err)
			}
		}
	}
}

// remove removes everything of a build that has ended: the image first, because it is
// found by the record.
func (s *Service) remove(ctx context.Context, e engine.Engine, b Build) error {
	if b.Ref != "" {
		if err := e.Images().Delete(ctx, b.Ref); err != nil {
			return fmt.Errorf("delete image %s: %w", b.Ref, err)
		}
	}
	if err := s.cfg.Store.DeleteBuild(ctx, b.ID); err != nil {
		return err
	}
	return s.journals.Remove(b.ID)
}

// Close ends the builds that run and waits for them.
func (s *Service) Close() error {
	s.mu.Lock()
	s.closed = true
	for _, r := range s.running {
		r.cancel(errClosed)
	}
	s.mu.Unlock()
	s.work.Wait()
	return s.journals.Close()
}

// Get reads an image. A fault NotFound (IMAGE_NOT_FOUND) if it was never built.
func (s *Service) Get(ctx context.Context, engineName, name string) (Image, error) {
	e, err := s.engine(engineName)
	if err != nil {
		return Image{}, err
	}
	all, err := s.cfg.Store.ListBuilds(ctx, e.Name(), name)
	if err != nil {
		return Image{}, err
	}
	if len(all) == 0 {
		return Image{}, noImage(name)
	}
	return s.imageOf(all), nil
}

// List reads all images on all engines, by name.
func (s *Service) List(ctx context.Context) ([]Image, error) {
	all, err := s.cfg.Store.ListBuilds(ctx, "", "")
	if err != nil {
		return nil, err
	}
	grouped := make(map[string][]Build)
	for _, b := range all {
		key := b.Image + "/" + b.Engine
		grouped[key] = append(grouped[key], b)
	}
	var images []Image
	for _, builds := range grouped {
		images = append(images, s.imageOf(builds))
	}
	slices.SortFunc(images, func(a, b Image) int {
		return strings.Compare(a.Name+"/"+a.Engine, b.Name+"/"+b.Engine)
	})
	return images, nil
}

// imageOf sums builds up, of which the newest is the first.
func (s *Service) imageOf(builds []Build) Image {
	img := Image{Name: builds[0].Image, Engine: builds[0].Engine, Latest: builds[0]}
	for _, b := range builds {
		if b.State == Ready {
			img.Ready = &b
			break
		}
	}
	if _, recipe, err := s.recipe(img.Engine, img.Name); err == nil && img.Ready != nil {
		img.Current = img.Ready.Recipe == recipe.Hash()
	}
	return img
}

// GetBuild reads a build. A fault NotFound (BUILD_NOT_FOUND) if there is none.
func (s *Service) GetBuild(ctx context.Context, id string) (Build, error) {
	return s.cfg.Store.GetBuild(ctx, id)
}

// Delete removes an image with all its builds. Faults: NotFound (IMAGE_NOT_FOUND),
// FailedPrecondition (IMAGE_BUILDING). Sandboxes made of it go on living.
func (s *Service) Delete(ctx context.Context, engineName, name string, key idempotency.Key) error {
	e, err := s.engine(engineName)
	if err != nil {
		return err
	}
	earlier, done, err := s.requests.Begin(ctx, key)
	if err != nil {
		return err
	}
	defer done()
	all, err := s.cfg.Store.ListBuilds(ctx, e.Name(), name)
	if err != nil {
		return err
	}
	if len(all) == 0 && earlier != "" {
		return nil // the repeat of the one that did it
	}
	if len(all) == 0 {
		return noImage(name)
	}
	s.mu.Lock()
	_, busy := s.running[e.Name()+"/"+name]
	s.mu.Unlock()
	if busy {
		return fault.New(fault.FailedPrecondition, "IMAGE_BUILDING", "image %q is being built; wait for the end of that", name)
	}
	if err := s.requests.Note(ctx, key, name); err != nil {
		return err
	}
	for _, b := range all {
		if err := s.remove(ctx, e, b); err != nil {
			return err
		}
	}
	return s.requests.Sync(ctx, key)
}
