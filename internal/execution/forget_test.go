package execution_test

import (
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginefake"
	"github.com/harvest-run/executord/internal/execution"
	"github.com/harvest-run/executord/internal/guestclient"
)

// What an executord before this one left in a session is forgotten, but not what a part
// of this one runs there for its own ends and has yet to read.
func TestForgetsTheEndedOnly(t *testing.T) {
	bubble(t, func(t *testing.T) {
		fake := enginefake.New(enginefake.Config{})
		t.Cleanup(fake.Shutdown)
		w := &world{t: t, fake: fake, store: newMemory(), dir: filepath.Join(t.TempDir(), "logs")}
		sb, err := fake.Create(t.Context(), engine.Spec{ID: "s-a"})
		if err != nil {
			t.Fatal(err)
		}
		guest := guestclient.New(sb)
		defer guest.Close()
		for _, id := range []string{"left", "run-status"} {
			if _, err := guest.Start(t.Context(), &guestv1.StartRequest{Execution: id, Args: []string{"x"}, WorkingDirectory: "/"}); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		s := w.executord(nil)
		defer s.Close()
		e, err := s.Start(t.Context(), execution.Request{Session: "a", Command: execution.Command{Args: []string{"x"}}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Wait(t.Context(), execution.Ref{Session: "a", ID: e.ID}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if held := fake.Held("s-a"); slices.Contains(held, "left") || !slices.Contains(held, "run-status") {
			t.Errorf("the guest holds %v", held)
		}
	})
}
