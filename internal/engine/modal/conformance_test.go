package modal

import (
	"testing"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginetest"
	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
)

func TestConformance(t *testing.T) {
	except := enginetest.Exceptions{}
	fake := fakeOf(t, modaltest.Config{})
	_ = fake
	owners := 0
	enginetest.Run(t, func(t *testing.T) enginetest.Place {
		owners++
		cfg := testConfig(t)
		cfg.Owner = "test-" + string(rune('a'+owners/26)) + string(rune('a'+owners%26))
		return enginetest.Place{
			Open:      func(t *testing.T) engine.Engine { return openEngine(t, cfg) },
			KillGuest: killGuest,
		}
	}, except)
}
