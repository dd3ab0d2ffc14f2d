package enginefake_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/fault"
)

func TestImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{})
		exists := func(ref engine.ImageRef, want bool) {
			t.Helper()
			if ok, err := e.Images().Exists(t.Context(), ref); ok != want || err != nil {
				t.Errorf("%s exists: %v, %v", ref, ok, err)
			}
		}
		if _, err := e.Create(t.Context(), engine.Spec{ID: "a", Image: "none"}); fault.ReasonOf(err) != "IMAGE_NOT_FOUND" || len(e.Made()) > 0 {
			t.Errorf("%v, made %v", err, e.Made())
		}
		sb := create(t, e, "a")
		kept, err := sb.Snapshot(t.Context(), engine.SnapshotRequest{})
		if err != nil {
			t.Fatal(err)
		}
		brief, err := sb.Snapshot(t.Context(), engine.SnapshotRequest{TTL: time.Hour})
		if err != nil || brief == kept {
			t.Fatalf("%s, %s, %v", kept, brief, err)
		}
		exists(kept, true)
		exists(brief, true)
		exists("other", false)
		time.Sleep(time.Hour)
		exists(kept, true)
		exists(brief, false)
		child, err := e.Create(t.Context(), engine.Spec{ID: "b", Image: kept, Labels: map[string]string{"x": "y"}})
		if err != nil {
			t.Fatal(err)
		}
		if spec := e.Spec("b"); spec.Image != kept || spec.Labels["x"] != "y" {
			t.Errorf("%+v", spec)
		}
		if err := errors.Join(e.Images().Delete(t.Context(), kept), e.Images().Delete(t.Context(), kept)); err != nil {
			t.Error(err)
		}
		exists(kept, false)
		if _, err := child.Snapshot(t.Context(), engine.SnapshotRequest{}); err != nil {
			t.Error(err)
		}
		if got := e.Snapshots(); len(got) != 3 || got[1].Request.TTL != time.Hour || got[2].Sandbox != "b" || got[2].Image != kept {
			t.Errorf("%+v", got)
		}
		e.Die("b")
		if _, err := child.Snapshot(t.Context(), engine.SnapshotRequest{}); err == nil {
			t.Error("a dead sandbox has files")
		}
	})
}

func TestVolumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{})
		mounts := []engine.VolumeMount{{Name: "memory", Path: "/memory"}}
		if _, err := e.Create(t.Context(), engine.Spec{ID: "a", Volumes: mounts}); fault.ReasonOf(err) != "VOLUME_NOT_FOUND" {
			t.Error(err)
		}
		if err := e.Volumes().Ensure(t.Context(), "memory"); err != nil {
			t.Error(err)
		}
		sb, err := e.Create(t.Context(), engine.Spec{ID: "a", Volumes: mounts})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(e.Volumes().Ensure(t.Context(), "memory"), e.Volumes().Ensure(t.Context(), "other"), sb.CommitVolumes(t.Context())); err != nil {
			t.Error(err)
		}
		if got := e.HeldVolumes(); len(got) != 2 || e.Commits("memory") != 1 || e.Commits("other") != 0 {
			t.Errorf("%v, %d, %d", got, e.Commits("memory"), e.Commits("other"))
		}
		if err := e.Volumes().Delete(t.Context(), "memory"); fault.ReasonOf(err) != "VOLUME_IN_USE" {
			t.Error(err)
		}
		if _, err := sb.Terminate(t.Context()); err != nil {
			t.Error(err)
		}
		if err := errors.Join(e.Volumes().Delete(t.Context(), "memory"), e.Volumes().Delete(t.Context(), "memory")); err != nil || len(e.HeldVolumes()) != 1 {
			t.Errorf("%v, %v", err, e.HeldVolumes())
		}
		if err := sb.CommitVolumes(t.Context()); err == nil {
			t.Error("a dead sandbox commits")
		}
		for what, err := range map[string]error{
			"a bad name":  e.Volumes().Ensure(t.Context(), "../x"),
			"a bad mount": e.CheckSpec(engine.Spec{Volumes: []engine.VolumeMount{{Name: "v", Path: "/proc"}}}),
		} {
			if fault.KindOf(err) != fault.Invalid || fault.ReasonOf(err) != "VOLUMES" {
				t.Errorf("%s: %v", what, err)
			}
		}
	})
}

func TestProvider(t *testing.T) {
	placed := engine.Spec{ID: "a", Placement: engine.Placement{GPU: "A100"}}
	secret := engine.Spec{ID: "a", Secrets: []string{"token"}}
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{})
		if err := e.CheckSpec(placed); fault.ReasonOf(err) != "PLACEMENT_NOT_AVAILABLE" {
			t.Error(err)
		}
		if _, err := e.Create(t.Context(), secret); fault.ReasonOf(err) != "SECRETS_NOT_AVAILABLE" || len(e.Made()) > 0 {
			t.Error(err)
		}
		if sb := create(t, e, "forever"); !sb.Deadline().IsZero() {
			t.Error(sb.Deadline())
		}
	})
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{Placement: true, Secrets: []string{"token"}, Lifetime: time.Hour})
		if err := errors.Join(e.CheckSpec(placed), e.CheckSpec(secret)); err != nil {
			t.Error(err)
		}
		for id, c := range map[string]struct{ asked, got time.Duration }{
			"unknown": {0, time.Hour}, "short": {time.Minute, time.Minute}, "long": {2 * time.Hour, time.Hour},
		} {
			sb, err := e.Create(t.Context(), engine.Spec{ID: id, Lifetime: c.asked})
			if err != nil {
				t.Fatal(err)
			}
			if got := time.Until(sb.Deadline()); got != c.got {
				t.Errorf("%s: lives %v", id, got)
			}
			if _, err := sb.Terminate(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestImageHooks(t *testing.T) {
	bad := errors.New("bad")
	refuse := func(context.Context, string) error { return bad }
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginefake.Config{Hooks: enginefake.Hooks{
			Snapshot: refuse, Commit: refuse, ImageExists: refuse, DeleteImage: refuse, EnsureVolume: refuse, DeleteVolume: refuse,
		}})
		e.AddImage("im")
		sb := create(t, e, "a")
		_, snapshot := sb.Snapshot(t.Context(), engine.SnapshotRequest{})
		_, exists := e.Images().Exists(t.Context(), "im")
		for what, err := range map[string]error{
			"snapshot": snapshot, "exists": exists, "commit": sb.CommitVolumes(t.Context()), "delete image": e.Images().Delete(t.Context(), "im"),
			"ensure": e.Volumes().Ensure(t.Context(), "v"), "delete volume": e.Volumes().Delete(t.Context(), "v"),
		} {
			if !errors.Is(err, bad) {
				t.Errorf("%s: %v", what, err)
			}
		}
		if len(e.Snapshots())+len(e.HeldVolumes()) > 0 {
			t.Errorf("%v, %v", e.Snapshots(), e.HeldVolumes())
		}
	})
}
