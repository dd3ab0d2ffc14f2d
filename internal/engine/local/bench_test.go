package local

import (
	"testing"

	"github.com/harvest-run/executord/internal/engine"
)

// From nothing to a sandbox that answers, and to nothing again.
func BenchmarkSandbox(b *testing.B) {
	e := openEngine(b, testConfig(b))
	defer e.Close()
	for b.Loop() {
		sb, err := e.Create(b.Context(), engine.Spec{ID: "bench"})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := sb.Terminate(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
