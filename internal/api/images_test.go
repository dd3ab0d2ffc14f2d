package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/image"
	"github.com/harvest-run/executord/internal/journal"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
)

// fakeImages keeps builds in memory and their logs in real journals, which tests write.
type fakeImages struct {
	journals *journal.Set

	mu       sync.Mutex
	builds   []image.Build
	requests []image.Request
	deleted  []string
	keys     []idempotency.Key
	err      error
}

func newFakeImages(t *testing.T) *fakeImages {
	t.Helper()
	set, err := journal.NewSet(journal.Config{Dir: t.TempDir(), What: "build"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { set.Close() })
	return &fakeImages{journals: set}
}

// add makes a build and returns what adds events to its log.
func (f *fakeImages) add(t *testing.T, b image.Build) func(image.Event) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.builds = append(f.builds, b)
	j, err := f.journals.Create(b.ID)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.Close)
	return func(e image.Event) {
		t.Helper()
		data, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		add := j.Append
		if e.Result != nil {
			add = j.End
		}
		if _, err := add(time.Now(), data); err != nil {
			t.Fatal(err)
		}
	}
}

func (f *fakeImages) Build(_ context.Context, r image.Request) (image.Build, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, r)
	if f.err != nil {
		return image.Build{}, f.err
	}
	for _, b := range f.builds {
		if b.Image == r.Name {
			return b, nil
		}
	}
	return image.Build{}, fault.New(fault.NotFound, "IMAGE_NOT_FOUND", "none")
}

func (f *fakeImages) GetBuild(_ context.Context, id string) (image.Build, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return image.Build{}, f.err
	}
	for _, b := range f.builds {
		if b.ID == id {
			return b, nil
		}
	}
	return image.Build{}, fault.New(fault.NotFound, "BUILD_NOT_FOUND", "none")
}

func (f *fakeImages) Watch(_ context.Context, build string, after *journal.Cursor) (BuildWatcher, error) {
	w, err := f.journals.Watch(build, after)
	if err != nil {
		return nil, err
	}
	return &image.Watcher{Watcher: w}, nil
}

func (f *fakeImages) Get(_ context.Context, engine, name string) (image.Image, error) {
	all, err := f.List(context.Background())
	if err != nil {
		return image.Image{}, err
	}
	for _, i := range all {
		if i.Name == name && (engine == "" || engine == i.Engine) {
			return i, nil
		}
	}
	return image.Image{}, fault.New(fault.NotFound, "IMAGE_NOT_FOUND", "none")
}

func (f *fakeImages) List(context.Context) ([]image.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []image.Image
	for _, b := range f.builds {
		i := image.Image{Name: b.Image, Engine: b.Engine, Latest: b}
		if b.State == image.Ready {
			i.Ready, i.Current = &b, true
		}
		all = append(all, i)
	}
	return all, f.err
}

func (f *fakeImages) Delete(_ context.Context, engine, name string, key idempotency.Key) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.deleted, f.keys = append(f.deleted, engine+"/"+name), append(f.keys, key)
	return f.err
}

func TestBuildImage(t *testing.T) {
	b := newBench(t)
	client := executorv1.NewImageServiceClient(b.dial())
	at := time.Date(2026, 11, 25, 1, 2, 3, 0, time.UTC)
	build := image.Build{ID: "b1", Image: "base", Engine: "local", Recipe: "abc", State: image.Building, CreateTime: at}
	tell := b.images.add(t, build)
	tell(image.Event{Started: &image.Started{Build: "b1", Image: "base", Engine: "local", Steps: []string{"one"}}})
	stream, err := client.BuildImage(t.Context(), &executorv1.BuildImageRequest{
		Name: "images/base", Engine: "local", Rebuild: true, RequestId: "r", HeartbeatInterval: durationpb.New(time.Second),
	})
	if err != nil {
		t.Fatal(err)
	}
	next := func() *executorv1.BuildEvent {
		t.Helper()
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return m.GetEvent()
	}
	first := next()
	if s := first.GetStarted(); s.GetBuild() != "images/base/builds/b1" || s.GetEngine() != "local" || !slices.Equal(s.GetSteps(), []string{"one"}) || first.GetCursor().GetSequence() != 1 {
		t.Errorf("%v", first)
	}
	// Nothing is said for an interval.
	if e := next(); e.GetHeartbeat() == nil || e.GetCursor().GetSequence() != 1 || e.GetHeartbeat().GetLastEventTime() == nil {
		t.Errorf("%v is no heartbeat", e)
	}
	code := int32(3)
	tell(image.Event{Step: &image.StepBegun{Index: 0, Name: "one"}})
	tell(image.Event{Output: &image.Output{Stderr: true, Data: []byte("x\xff")}})
	tell(image.Event{StepEnded: &image.StepEnded{Index: 0, Duration: time.Minute}})
	build.State, build.EndTime = image.Failed, at.Add(time.Hour)
	build.Failure = &image.Failure{Step: "one", ExitCode: &code, Output: "o\xff", Detail: "d"}
	tell(image.Event{Result: &build})
	if e := next(); e.GetStepStarted().GetName() != "one" {
		t.Errorf("%v", e)
	}
	output := next()
	if o := output.GetOutput(); o.GetStream() != executorv1.Stream_STREAM_STDERR || string(o.GetData()) != "x\xff" {
		t.Errorf("%v", output)
	}
	if e := next(); e.GetStepEnded().GetDuration().AsDuration() != time.Minute {
		t.Errorf("%v", e)
	}
	result := next().GetResult()
	if result.GetState() != executorv1.Build_STATE_FAILED || result.GetFailure().GetExitCode() != 3 || result.GetFailure().GetOutput() != "o\uFFFD" || result.GetRecipe() != "abc" {
		t.Errorf("%v", result)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("behind the result: %v", err)
	}
	r := b.images.requests[0]
	if r.Name != "base" || r.Engine != "local" || !r.Rebuild || r.Key.ID != "r" || r.Key.Method != "BuildImage" {
		t.Errorf("%+v", r)
	}

	// From a cursor, and from one of another log.
	watch := func(after *executorv1.Cursor) []*executorv1.BuildEvent {
		t.Helper()
		stream, err := client.WatchBuild(t.Context(), &executorv1.WatchBuildRequest{Name: "images/base/builds/b1", After: after})
		if err != nil {
			t.Fatal(err)
		}
		var all []*executorv1.BuildEvent
		for {
			m, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return all
			}
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, m.GetEvent())
		}
	}
	if rest := watch(output.GetCursor()); len(rest) != 2 || rest[0].GetStepEnded() == nil {
		t.Errorf("%v", rest)
	}
	if all := watch(&executorv1.Cursor{Epoch: "other", Sequence: 9}); len(all) != 6 || all[0].GetGap().GetReason() != executorv1.Gap_REASON_EPOCH_CHANGED {
		t.Errorf("%v", all)
	}
	for _, name := range []string{"images/base/builds/b2", "images/other/builds/b1"} {
		stream, err := client.WatchBuild(t.Context(), &executorv1.WatchBuildRequest{Name: name})
		if err == nil {
			_, err = stream.Recv()
		}
		wantError(t, err, codes.NotFound, "BUILD_NOT_FOUND")
	}
}

func TestImages(t *testing.T) {
	b := newBench(t)
	client := executorv1.NewImageServiceClient(b.dial())
	for _, id := range []string{"a/local", "a/modal", "b/local"} {
		name, engine, _ := strings.Cut(id, "/")
		b.images.add(t, image.Build{ID: name + engine, Image: name, Engine: engine, State: image.Ready, SizeBytes: 5, Ref: "secret-ref"})
	}
	got, err := client.GetImage(t.Context(), &executorv1.GetImageRequest{Name: "images/a", Engine: "modal"})
	if i := got.GetImage(); err != nil || i.GetName() != "images/a" || i.GetEngine() != "modal" || !i.GetCurrent() || i.GetReadyBuild().GetSizeBytes() != 5 {
		t.Errorf("%v, %v", got, err)
	}
	_, err = client.GetImage(t.Context(), &executorv1.GetImageRequest{Name: "images/c"})
	wantError(t, err, codes.NotFound, "IMAGE_NOT_FOUND")
	var names []string
	for token := ""; ; {
		page, err := client.ListImages(t.Context(), &executorv1.ListImagesRequest{PageSize: 2, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range page.GetImages() {
			names = append(names, i.GetName()+"@"+i.GetEngine())
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	if want := []string{"images/a@local", "images/a@modal", "images/b@local"}; !slices.Equal(names, want) {
		t.Errorf("%v", names)
	}
	if _, err := client.DeleteImage(t.Context(), &executorv1.DeleteImageRequest{Name: "images/a", Engine: "modal", RequestId: "r"}); err != nil {
		t.Error(err)
	}
	if !slices.Equal(b.images.deleted, []string{"modal/a"}) || b.images.keys[0].ID != "r" {
		t.Errorf("%v, %v", b.images.deleted, b.images.keys)
	}
}
