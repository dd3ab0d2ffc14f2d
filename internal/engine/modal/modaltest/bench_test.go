package modaltest_test

import (
	"bytes"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/harvest-run/executord/internal/engine/modal/modaltest"
)

// BenchmarkWire measures what the SDK gives over the fake, at round trips as on this host,
// in a region, and over an ocean: a program that is started and waited for, output, and
// input in writes of 2 MiB and of 4 KiB.
func BenchmarkWire(b *testing.B) {
	f := startFor(b, modaltest.Config{})
	w := prepare(b, f)
	sb := w.create(b, nil)
	for _, far := range []time.Duration{0, 20 * time.Millisecond, 100 * time.Millisecond} {
		f.SetRoundTrip(far)
		b.Run(fmt.Sprintf("exec/%v", far), func(b *testing.B) {
			for b.Loop() {
				p, err := sb.Exec(b.Context(), []string{"true"}, nil)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := p.Wait(b.Context(), nil); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(fmt.Sprintf("output/%v", far), func(b *testing.B) {
			const size = 64 << 20
			b.SetBytes(size)
			for b.Loop() {
				p, err := sb.Exec(b.Context(), []string{"head", "-c", fmt.Sprint(size), "/dev/zero"}, nil)
				if err != nil {
					b.Fatal(err)
				}
				if n, err := io.Copy(io.Discard, p.Stdout); err != nil || n != size {
					b.Fatal(n, err)
				}
			}
		})
		for _, size := range []int{2 << 20, 4 << 10} {
			b.Run(fmt.Sprintf("input-%dKiB/%v", size>>10, far), func(b *testing.B) {
				p, err := sb.Exec(b.Context(), []string{"sh", "-c", "cat >/dev/null"}, nil)
				if err != nil {
					b.Fatal(err)
				}
				data := bytes.Repeat([]byte{'x'}, size)
				b.SetBytes(int64(size))
				for b.Loop() {
					if _, err := p.Stdin.Write(data); err != nil {
						b.Fatal(err)
					}
				}
				if err := p.Stdin.Close(); err != nil {
					b.Fatal(err)
				}
			})
		}
	}
}
