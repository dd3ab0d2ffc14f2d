package modal

import (
	"testing"

	"github.com/harvest-run/executord/internal/engine"
	"github.com/harvest-run/executord/internal/engine/enginetest"
	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
)

// exceptions are what a sandbox on Modal does not do, or what the fake of it cannot show.
func exceptions() enginetest.Exceptions {
	const memory = "Modal kills what goes over its limit of memory, and tells nobody that it did"
	const processor = "Modal limits processor time by itself, the fake does not"
	const noLimit = "Modal has no such limit, and one that is asked for is refused"
	return enginetest.Exceptions{
		"a sandbox is called by its id":                                    "Modal gives sandboxes names of its own, and does not let them change it",
		"the end of everything in a sandbox is not that of its guest":      "the first process of a sandbox may be Modal's own; then the guest is one of those that `kill -9 -1` ends, and the sandbox ends with it",
		"the memory limit kills, and says so":                              memory,
		"the process limit refuses forks, and says so":                     noLimit,
		"the processor limit holds":                                        processor,
		"the guest answers while everything is used up":                    noLimit,
		"the limit of disk holds, wherever is written":                     noLimit,
		"files without content meet the limit of disk":                     noLimit,
		"a full sandbox is told why nothing starts, and goes on with room": noLimit,
		"a sandbox with a limit of disk lives on with the next engine":     noLimit,
		"the end of a full sandbox is quick":                               noLimit,
		"a snapshot is of one moment, while processes write":               "Modal does not say that its snapshots are, and the fake's are not",
		"files of volumes give nobody's rights":                            "how volumes are mounted is Modal's affair",
		"a volume is shared by sandboxes that live":                        "a sandbox of Modal's sees what others committed to a volume when it starts, or when it reloads its volumes",
	}
}

func TestConformance(t *testing.T) {
	fakeOf(t, modaltest.Config{})
	owners := 0
	enginetest.Run(t, func(t *testing.T) enginetest.Place {
		owners++
		cfg := testConfig(t)
		cfg.Owner = "test-" + string(rune('a'+owners/26)) + string(rune('a'+owners%26))
		return enginetest.Place{
			Open:      func(t *testing.T) engine.Engine { return openEngine(t, cfg) },
			KillGuest: killGuest,
		}
	}, exceptions())
}
