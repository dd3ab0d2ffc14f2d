package store

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/harvest-run/executord/internal/fault"
	"github.com/harvest-run/executord/internal/idempotency"
	"github.com/harvest-run/executord/internal/image"
)

func TestBuilds(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(t.Context(), Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { s.Close() }()
	at := time.Date(2026, 11, 25, 1, 2, 3, 4, time.UTC)
	build := func(id, engine, name string) image.Build {
		return image.Build{ID: id, Image: name, Engine: engine, Recipe: "abc", Sandbox: "b-" + id, State: image.Building, CreateTime: at}
	}
	key := idempotency.Key{Owner: "me", ID: "r", Method: "BuildImage", Fingerprint: "f"}
	one, two, other := build("01", "local", "base"), build("02", "local", "base"), build("03", "modal", "base")
	for i, b := range []image.Build{one, two, other} {
		k := idempotency.Key{}
		if i == 1 {
			k = key
		}
		if err := s.InsertBuild(t.Context(), k, b); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := s.FindRequest(t.Context(), "me", "r"); err != nil || r.Resource != "02" {
		t.Errorf("%v, %v", r, err)
	}
	if err := s.InsertBuild(t.Context(), key, build("04", "local", "base")); fault.ReasonOf(err) != "REQUEST_ID_REUSED" {
		t.Errorf("a name that is taken: %v", err)
	}
	if err := s.InsertBuild(t.Context(), idempotency.Key{}, one); fault.ReasonOf(err) != "BUILD_EXISTS" {
		t.Errorf("twice: %v", err)
	}
	code := int32(7)
	one.State, one.EndTime = image.Failed, at.Add(time.Minute)
	one.Failure = &image.Failure{Step: "s", ExitCode: &code, Output: "o", Detail: "d"}
	two.State, two.EndTime, two.Ref, two.SizeBytes = image.Ready, at.Add(time.Hour), "snap-1", 1<<40
	for _, b := range []image.Build{one, two} {
		if err := s.UpdateBuild(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	back := two
	back.State = image.Building
	if err := s.UpdateBuild(t.Context(), back); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a state that goes back: %v", err)
	}
	// As it is after a restart.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(t.Context(), Config{Dir: dir}); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		engine, name string
		want         []image.Build
	}{
		"all":         {"", "", []image.Build{other, two, one}},
		"of an image": {"local", "base", []image.Build{two, one}},
		"of another":  {"local", "x", nil},
		"of a name":   {"", "base", []image.Build{other, two, one}},
	} {
		got, err := s.ListBuilds(t.Context(), test.engine, test.name)
		if diff := cmp.Diff(test.want, got); err != nil || diff != "" {
			t.Errorf("%s: %v\n%s", name, err, diff)
		}
	}
	if got, err := s.GetBuild(t.Context(), "01"); err != nil || cmp.Diff(one, got) != "" {
		t.Errorf("%v, %v", got, err)
	}
	for range 2 {
		if err := s.DeleteBuild(t.Context(), "01"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.GetBuild(t.Context(), "01"); fault.ReasonOf(err) != "BUILD_NOT_FOUND" {
		t.Errorf("deleted: %v", err)
	}
}
