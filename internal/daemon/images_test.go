package daemon

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/harvest-run/executord/client"
	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/engine/engines"
)

// TestImages builds the base image over the API: the network is opened, the steps are run,
// the snapshot is kept, and nothing is left of the build.
func TestImages(t *testing.T) {
	cfg := settings(t)
	// Its guest makes the proxy's listener, to which nobody connects.
	fake := enginefake.New(enginefake.Config{Hooks: enginefake.Hooks{Answer: func(_ string, q *guestv1.Request, a *enginefake.Answer) {
		switch {
		case q.GetListen() != nil:
			a.Response = &guestv1.Response{Id: q.GetId(), Answer: &guestv1.Response_Listen{Listen: &guestv1.ListenResponse{Port: q.GetListen().GetPort()}}}
		case q.GetAccept() != nil:
			a.Drop = true
		}
	}}})
	t.Cleanup(fake.Shutdown)
	open := func(context.Context, *configv1.Config, *slog.Logger) (engines.Set, error) {
		return engines.Set{fake}, nil
	}
	complete := Config{Settings: cfg, OpenEngines: open, Logger: discard()}
	r := start(t, complete)
	c, err := client.Dial(client.Config{Address: cfg.GetListen()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var steps []string
	build, err := c.BuildImage(t.Context(), &executorv1.BuildImageRequest{Name: "images/base"}, func(e *executorv1.BuildEvent) error {
		if s := e.GetStepStarted(); s != nil {
			steps = append(steps, s.GetName())
		}
		return nil
	})
	if err != nil || build.GetState() != executorv1.Build_STATE_READY || len(steps) != 4 {
		t.Fatalf("%v after the steps %v, %v", build, steps, err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	// It is still there after a restart, and its log can be read.
	r = start(t, complete)
	image, err := c.Images().GetImage(t.Context(), &executorv1.GetImageRequest{Name: "images/base"})
	if err != nil || image.GetImage().GetReadyBuild().GetName() != build.GetName() || !image.GetImage().GetCurrent() {
		t.Errorf("%v, %v", image, err)
	}
	again, err := c.BuildImage(t.Context(), &executorv1.BuildImageRequest{Name: "images/base"}, nil)
	if err != nil || again.GetName() != build.GetName() {
		t.Errorf("%v, %v", again, err)
	}
	if err := c.DeleteImage(t.Context(), &executorv1.DeleteImageRequest{Name: "images/base"}); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(filepath.Join(cfg.GetStateDir(), "builds")); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
}

// The recipe is another when the host has other packages, and on another engine.
func TestBaseSource(t *testing.T) {
	status := filepath.Join(t.TempDir(), "status")
	s := &baseSource{status: status}
	hash := func(engine string) string {
		t.Helper()
		r, err := s.recipe(engine)
		if err != nil {
			t.Fatal(err)
		}
		return r.Hash()
	}
	without := hash("local") // a host without dpkg
	if err := os.WriteFile(status, []byte("Package: a\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	with := hash("local")
	if err := os.WriteFile(status, []byte("Package: b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if other := hash("local"); without == with || with == other {
		t.Error("the host's packages make no difference")
	}
	elsewhere := hash("modal")
	if err := os.Remove(status); err != nil {
		t.Fatal(err)
	}
	if hash("modal") != elsewhere || elsewhere == with {
		t.Error("an image of another engine depends on this host's packages")
	}
	bad := settings(t)
	bad.Images.Allow = []string{"1.2.3.4:0"}
	if _, err := (Config{Settings: bad}).baseConfig(); err == nil {
		t.Error("a rule that is none is taken")
	}
}
