package engines

import (
	"errors"
	"testing"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/fault"
)

// named is an engine that has a name and does nothing.
type named struct {
	engine.Engine
	name string
}

func (n named) Name() string { return n.name }

func TestGet(t *testing.T) {
	set := Set{named{name: "local"}, named{name: "modal"}}
	for name, want := range map[string]string{"": "local", "local": "local", "modal": "modal"} {
		got, err := set.Get(name)
		if err != nil || got.Name() != want {
			t.Errorf("Get(%q) = %v, %v; want %s", name, got, err, want)
		}
		if set.IsDefault(name) != (want == "local") {
			t.Errorf("IsDefault(%q) = %v", name, set.IsDefault(name))
		}
	}
	_, err := set.Get("moon")
	told, ok := errors.AsType[*fault.Error](err)
	if !ok || told.Kind != fault.FailedPrecondition || told.Reason != "ENGINE_NOT_AVAILABLE" || told.Meta["available"] != "local, modal" || told.Meta["engine"] != "moon" {
		t.Errorf("Get of an unknown one: %+v", err)
	}
}
