package daemon

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	configv1 "github.com/harvest-run/executord/gen/harvest/config/v1"
	"github.com/harvest-run/executord/internal/engine/modal"
)

// TestEngineNames has the default engine first, and each once.
func TestEngineNames(t *testing.T) {
	for args, want := range map[string]string{
		"":                                      "[local]",
		"--modal-enabled":                       "[local modal]",
		"--engine=modal":                        "[modal local]",
		"--engine=modal --local-enabled=false":  "[modal]",
		"--local-enabled=false":                 "[local]",
		"--local-enabled=false --modal-enabled": "[local modal]",
	} {
		if got := fmt.Sprint(engineNames(settings(t, strings.Fields(args)...))); got != want {
			t.Errorf("%q: %s, want %s", args, got, want)
		}
	}
}

// TestModalConfig is what is configured, with an owner that stays.
func TestModalConfig(t *testing.T) {
	cfg := settings(t, "--modal-app=theirs", "--modal-idle-timeout=0", "--modal-regions=us-east", "--modal-max-sandboxes=3", "--limits-memory-bytes=1GiB")
	if err := makePrivate(cfg.GetStateDir()); err != nil {
		t.Fatal(err)
	}
	first, err := modalConfig(cfg, discard())
	if err != nil {
		t.Skip("executord was built without its guest: make build")
	}
	if first.App != "theirs" || first.IdleTimeout >= 0 || !slices.Equal(first.Regions, []string{"us-east"}) || first.MaxSandboxes != 3 || first.Defaults.MemoryBytes != 1<<30 {
		t.Errorf("%+v", first)
	}
	second, err := modalConfig(cfg, discard())
	if err != nil || first.Owner != second.Owner || len(first.Owner) != 21 {
		t.Errorf("the owner is %q and then %q, %v", first.Owner, second.Owner, err)
	}
	other, err := modalConfig(func() *configv1.Config {
		o := settings(t)
		if err := makePrivate(o.GetStateDir()); err != nil {
			t.Fatal(err)
		}
		return o
	}(), discard())
	if err != nil || other.Owner == first.Owner {
		t.Errorf("another executord has the owner %q, %v", other.Owner, err)
	}
}

// TestModalCommands completes the default image and leaves another as it is.
func TestModalCommands(t *testing.T) {
	for args, want := range map[string][]string{
		"":                       modal.DefaultImageCommands(),
		"--modal-image=alpine:3": {},
		"--modal-image=alpine:3|--modal-dockerfile=RUN apk add bash": {"RUN apk add bash"},
		"--modal-dockerfile=RUN true":                                {"RUN true"},
	} {
		var flags []string
		if args != "" {
			flags = strings.Split(args, "|")
		}
		if got := modalCommands(settings(t, flags...).GetModal()); !slices.Equal(got, want) || got == nil {
			t.Errorf("%q: %q, want %q", args, got, want)
		}
	}
}
