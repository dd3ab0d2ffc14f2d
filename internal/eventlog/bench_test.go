package eventlog

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// chunks is what the pump appends when output comes fast.
func chunks(n, size int) []Entry {
	entries := make([]Entry, n)
	for i := range entries {
		entries[i] = Entry{Kind: KindOutput, Stream: Stdout, Data: randomBytes(randomFor(uint64(i)), size)}
	}
	return entries
}

func benchmarkLog(b *testing.B, cfg Config) *Log {
	b.Helper()
	cfg.Dir = b.TempDir()
	l, err := Create(cfg)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = l.Close() })
	return l
}

// reportCPU adds the processor time of an operation, which other work on the machine
// does not change much.
func reportCPU(b *testing.B) func() {
	used := func() time.Duration {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	return func() { b.ReportMetric(float64(used()-before)/float64(b.N), "cpu-ns/op") }
}

func BenchmarkAppend(b *testing.B) {
	for _, bm := range []struct {
		name     string
		batch    int
		size     int
		retained int64
	}{
		{"Batch8x31744", 8, MaxData, 64 << 20},
		{"Batch1x31744", 1, MaxData, 64 << 20},
		{"Batch1x100", 1, 100, 64 << 20},
		{"Batch64x100", 64, 100, 64 << 20},
	} {
		b.Run(bm.name, func(b *testing.B) {
			l := benchmarkLog(b, Config{RetainedBytes: bm.retained})
			entries, now := chunks(bm.batch, bm.size), time.Now()
			b.SetBytes(int64(bm.batch * bm.size))
			b.ReportAllocs()
			defer reportCPU(b)()
			for b.Loop() {
				if err := l.Append(now, entries...); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkAppendRead appends, and one reader reads everything at the same time. The
// garbage collector costs much in a process whose heap is nearly empty, because it then
// runs for every 4 MiB that are read. A daemon's heap is not.
func BenchmarkAppendRead(b *testing.B) {
	for _, bm := range []struct {
		name string
		heap int
	}{
		{"EmptyHeap", 0},
		{"Heap32MiB", 32 << 20},
	} {
		b.Run(bm.name, func(b *testing.B) {
			heap := make([]byte, bm.heap)
			appendRead(b)
			runtime.KeepAlive(heap)
		})
	}
}

func appendRead(b *testing.B) {
	const batch = 8
	l := benchmarkLog(b, Config{RetainedBytes: 64 << 20})
	entries, now := chunks(batch, MaxData), time.Now()
	b.SetBytes(batch * MaxData)
	b.ReportAllocs()
	defer reportCPU(b)()

	// The reader may be 32 MiB behind, so that there is never a Gap.
	ahead := make(chan struct{}, 32<<20/(batch*MaxData))
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		r := l.NewReader(0)
		defer r.Close()
		for n := 1; ; n++ {
			rec, err := r.Next(context.Background())
			if err != nil {
				return
			}
			if rec.Gap != nil {
				b.Errorf("gap %+v", rec.Gap)
			}
			if n%batch == 0 {
				<-ahead
			}
		}
	})
	for b.Loop() {
		ahead <- struct{}{}
		if err := l.Append(now, entries...); err != nil {
			b.Fatal(err)
		}
	}
	for len(ahead) > 0 {
		time.Sleep(time.Microsecond)
	}
	b.StopTimer()
	_ = l.Close()
}

// BenchmarkRead reads what is there from end to end.
func BenchmarkRead(b *testing.B) {
	l := benchmarkLog(b, Config{})
	entries := chunks(8, MaxData)
	for range 1000 {
		if err := l.Append(time.Now(), entries...); err != nil {
			b.Fatal(err)
		}
	}
	heap := make([]byte, 32<<20)
	b.SetBytes(8 * MaxData)
	b.ReportAllocs()
	defer reportCPU(b)()
	r := l.NewReader(0)
	for b.Loop() {
		for range 8 {
			if r.want > 8000 {
				_ = r.Close()
				r = l.NewReader(0)
			}
			if _, ok, err := r.TryNext(); !ok || err != nil {
				b.Fatal(ok, err)
			}
		}
	}
	_ = r.Close()
	runtime.KeepAlive(heap)
}

// BenchmarkSeek reads one record, somewhere in 64 MiB.
func BenchmarkSeek(b *testing.B) {
	l := benchmarkLog(b, Config{})
	entries := chunks(1000, 1000)
	for range 64 {
		if err := l.Append(time.Now(), entries...); err != nil {
			b.Fatal(err)
		}
	}
	random := randomFor(1)
	b.Run("Reader", func(b *testing.B) {
		for b.Loop() {
			r := l.NewReader(random.Uint64N(64000))
			if _, ok, err := r.TryNext(); !ok || err != nil {
				b.Fatal(ok, err)
			}
			_ = r.Close()
		}
	})
	b.Run("ReadStream", func(b *testing.B) {
		p := make([]byte, 100)
		for b.Loop() {
			if _, err := l.ReadStream(Stdout, random.Int64N(64000*1000), p); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkOpen opens a finished log of 40 MB and reads its last record.
func BenchmarkOpen(b *testing.B) {
	l := benchmarkLog(b, Config{})
	entries, now := chunks(8, MaxData), time.Now()
	for range 160 {
		if err := l.Append(now, entries...); err != nil {
			b.Fatal(err)
		}
	}
	if err := errors.Join(l.Seal(now, Entry{Kind: 2}), l.Close()); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		l, err := Open(Config{Dir: l.dir})
		if err != nil {
			b.Fatal(err)
		}
		r := l.NewReader(l.Sequence() - 1)
		if _, ok, err := r.TryNext(); !ok || err != nil {
			b.Fatal(ok, err)
		}
		if err := errors.Join(r.Close(), l.Close()); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFollow appends one small record and waits until so many readers have it.
func BenchmarkFollow(b *testing.B) {
	for _, readers := range []int{1, 100} {
		b.Run(fmt.Sprint(readers), func(b *testing.B) {
			l := benchmarkLog(b, Config{})
			var wg sync.WaitGroup
			defer wg.Wait()
			got := make(chan struct{}, readers)
			for range readers {
				wg.Go(func() {
					r := l.NewReader(0)
					defer r.Close()
					for {
						if _, err := r.Next(context.Background()); err != nil {
							return
						}
						got <- struct{}{}
					}
				})
			}
			now, e := time.Now(), Entry{Kind: 2, Data: make([]byte, 100)}
			for b.Loop() {
				if err := l.Append(now, e); err != nil {
					b.Fatal(err)
				}
				for range readers {
					<-got
				}
			}
			_ = l.Close()
		})
	}
}

// BenchmarkFanOut appends what the pump appends when output comes fast, and so many
// readers take all of it. The slowest may be 1 MiB behind.
func BenchmarkFanOut(b *testing.B) {
	for _, readers := range []int{1, 10, 100} {
		b.Run(fmt.Sprint(readers), func(b *testing.B) {
			heap := make([]byte, 32<<20)
			fanOut(b, readers)
			runtime.KeepAlive(heap)
		})
	}
}

func fanOut(b *testing.B, readers int) {
	const batch = 8
	l := benchmarkLog(b, Config{RetainedBytes: 64 << 20})
	entries, now := chunks(batch, MaxData), time.Now()
	b.SetBytes(batch * MaxData)
	b.ReportAllocs()
	var wg sync.WaitGroup
	defer wg.Wait()
	taken := make([]chan struct{}, readers) // by each reader, the batches that it has yet to take
	for i := range taken {
		taken[i] = make(chan struct{}, 4)
		wg.Go(func() {
			r := l.NewReader(0)
			defer r.Close()
			for n := 1; ; n++ {
				rec, err := r.Next(context.Background())
				if err != nil {
					return
				}
				if rec.Gap != nil {
					b.Errorf("gap %+v", rec.Gap)
				}
				if n%batch == 0 {
					<-taken[i]
				}
			}
		})
	}
	defer reportCPU(b)()
	for b.Loop() {
		for _, c := range taken {
			c <- struct{}{}
		}
		if err := l.Append(now, entries...); err != nil {
			b.Fatal(err)
		}
	}
	for _, c := range taken {
		for len(c) > 0 {
			time.Sleep(time.Microsecond)
		}
	}
	b.StopTimer()
	_ = l.Close()
}
