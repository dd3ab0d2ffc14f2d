package local

import (
	"testing"
	"time"

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

// BenchmarkSnapshot copies what a sandbox wrote, while a process runs in it, and makes a
// sandbox from it.
func BenchmarkSnapshot(b *testing.B) {
	for name, script := range map[string]string{
		"empty":         "true",
		"1000files200M": "mkdir /workspace/d; cd /workspace/d; for i in $(seq 1000); do head -c 200k /dev/urandom > $i; done",
	} {
		b.Run(name, func(b *testing.B) {
			e := openEngine(b, testConfig(b))
			b.Cleanup(func() {
				if err := e.Close(); err != nil {
					b.Error(err)
				}
			})
			sb := sandboxFor(b, e, engine.Spec{ID: "bench"})
			does(b, sb, script)
			begin(b, sb, "echo; sleep 1000")
			var making time.Duration
			for b.Loop() {
				ref := mustSnapshot(b, sb)
				began := time.Now()
				child, err := e.Create(b.Context(), engine.Spec{ID: "bench-child", Image: ref})
				if err != nil {
					b.Fatal(err)
				}
				making += time.Since(began)
				if _, err := child.Terminate(b.Context()); err != nil {
					b.Fatal(err)
				}
				if err := e.Images().Delete(b.Context(), ref); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(making.Microseconds())/1000/float64(b.N), "ms/create")
		})
	}
}
