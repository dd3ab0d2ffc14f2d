package local

import (
	"testing"

	"github.com/harvest-run/executord/internal/engine"
)

// Programs have the kernel's timers, whatever the guest has for itself.
func TestTimersOfProgramsAreOnTime(t *testing.T) {
	sb := sandboxFor(t, newEngine(t), engine.Spec{ID: "timers"})
	out, err := runPython(t.Context(), sb, "slack", `import ctypes; print(ctypes.CDLL(None).prctl(30, 0, 0, 0, 0))`)
	if err != nil || out.stdout != "50000\n" {
		t.Errorf("%v, %v: want a slack of 50000 ns", out, err)
	}
}
