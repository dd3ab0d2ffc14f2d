package eventlog

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestAppendRefuses(t *testing.T) {
	good := Entry{Kind: KindOutput, Stream: Stdout, Data: []byte("good")}
	for _, tt := range []struct {
		name string
		bad  Entry
	}{
		{"too much data", Entry{Kind: KindOutput, Stream: Stdout, Data: make([]byte, MaxData+1)}},
		{"too much data of another kind", Entry{Kind: 7, Data: make([]byte, MaxData+1)}},
		{"no kind", Entry{Stream: Stdout}},
		{"no stream", Entry{Kind: KindOutput}},
		{"unknown stream", Entry{Kind: KindOutput, Stream: 3}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLog(t, Config{})
			before := files(t, l.dir)
			if err := l.Append(time.Now(), good, tt.bad); err == nil {
				t.Error("Append took it")
			}
			if err := l.Seal(time.Now(), tt.bad); err == nil {
				t.Error("Seal took it")
			}
			if l.Sequence() != 0 || l.Sealed() || !cmp.Equal(before, files(t, l.dir)) {
				t.Errorf("sequence %d, sealed %v, files %v", l.Sequence(), l.Sealed(), files(t, l.dir))
			}
			if err := l.Append(time.Now(), good); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAppend(t *testing.T) {
	t.Run("nothing", func(t *testing.T) {
		l := newLog(t, Config{})
		if err := l.Append(time.Now()); err != nil || l.Sequence() != 0 {
			t.Errorf("sequence %d, %v", l.Sequence(), err)
		}
	})
	t.Run("more entries than one system call takes", func(t *testing.T) {
		l := newLog(t, Config{SegmentBytes: 1 << 10})
		if err := appendNext(l, 3*maxBuffers); err != nil {
			t.Fatal(err)
		}
		readAll(t, l, 0)
		if got := len(files(t, l.dir)); got != 1 {
			t.Errorf("%d segments, want 1", got)
		}
		if l.writer.buffers != nil || l.writer.headers != nil {
			t.Error("memory for a large Append is kept")
		}
		readAll(t, reopen(t, l), 0)
	})
	t.Run("the stream of another kind is not kept", func(t *testing.T) {
		l := newLog(t, Config{})
		if err := l.Append(time.Now(), Entry{Kind: 9, Stream: 77, Data: []byte("x")}); err != nil {
			t.Fatal(err)
		}
		l = reopen(t, l)
		rec, ok, err := l.NewReader(0).TryNext()
		if !ok || err != nil || rec.Kind != 9 || rec.Stream != 0 || rec.Offset != 0 || string(rec.Data) != "x" {
			t.Errorf("%+v %v %v", rec, ok, err)
		}
	})
	t.Run("data is not kept", func(t *testing.T) {
		l := newLog(t, Config{})
		data := []byte("before")
		if err := l.Append(time.Now(), Entry{Kind: 2, Data: data}); err != nil {
			t.Fatal(err)
		}
		for _, b := range l.writer.buffers[:cap(l.writer.buffers)] {
			if b.Base != nil {
				t.Error("a buffer is still pointed to")
			}
		}
		copy(data, "after!")
		if rec, _, err := l.NewReader(0).TryNext(); err != nil || string(rec.Data) != "before" {
			t.Errorf("%q %v", rec.Data, err)
		}
	})
	t.Run("time", func(t *testing.T) {
		l := newLog(t, Config{})
		now := time.Date(2026, 11, 23, 14, 15, 16, 171819, time.FixedZone("x", 3600))
		if err := l.Append(now, Entry{Kind: 2}); err != nil {
			t.Fatal(err)
		}
		rec, _, err := l.NewReader(0).TryNext()
		if err != nil || !rec.Time.Equal(now) || rec.Time.Location() != time.UTC || !l.LastTime().Equal(now) {
			t.Errorf("%v, %v, last time %v", rec.Time, err, l.LastTime())
		}
	})
	t.Run("from many at the same time", func(t *testing.T) {
		l := newLog(t, Config{SegmentBytes: 4 << 10})
		var wg sync.WaitGroup
		for n := range 8 {
			wg.Go(func() {
				for range 100 {
					if err := l.Append(time.Now(), Entry{Kind: Kind(2 + n)}, Entry{Kind: Kind(2 + n)}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		r := l.NewReader(0)
		defer r.Close()
		for sequence := uint64(1); sequence <= 1600; sequence += 2 {
			a, _, errA := r.TryNext()
			b, _, errB := r.TryNext()
			if a.Sequence != sequence || b.Sequence != sequence+1 || a.Kind != b.Kind {
				t.Fatalf("%+v %v, %+v %v", a, errA, b, errB)
			}
		}
	})
}

func TestAppendDoesNotAllocate(t *testing.T) {
	l := newLog(t, Config{})
	entries := []Entry{entryOf(1), entryOf(2), entryOf(3), entryOf(4), entryOf(5), entryOf(6)}
	now := time.Now()
	if n := testing.AllocsPerRun(200, func() {
		if err := l.Append(now, entries...); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestLeftoverOfFailedWrite is about a write that failed and could not be taken back:
// what it left must not pass for records when fewer bytes are written over it.
func TestLeftoverOfFailedWrite(t *testing.T) {
	l := newLog(t, Config{})
	entry := func(text string) Entry { return Entry{Kind: 2, Data: []byte(text)} }
	if err := l.Append(time.Now(), entry("first")); err != nil {
		t.Fatal(err)
	}
	// A file that cannot be written to stands for a disk that cannot.
	file := l.writer.file
	unwritable, err := os.Open(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	l.writer.file = unwritable
	for range 2 {
		if err := l.Append(time.Now(), entry("fail1"), entry("fail2")); err == nil {
			t.Fatal("append to an unwritable file")
		}
	}
	if err := errors.Join(unwritable.Close(), func() error { l.writer.file = file; return nil }()); err != nil {
		t.Fatal(err)
	}
	// What the failed Append would have left had it got as far as it can.
	var leftover []byte
	for i, text := range []string{"fail1", "fail2"} {
		leftover = append(leftover, encodeRecord(record{sequence: uint64(2 + i), kind: 2, data: []byte(text)})...)
	}
	if _, err := file.WriteAt(leftover, l.active().end); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(time.Now(), entry("right")); err != nil {
		t.Fatal(err)
	}
	l = reopen(t, l)
	r := l.NewReader(0)
	defer r.Close()
	for _, want := range []string{"first", "right"} {
		if rec, _, err := r.TryNext(); err != nil || string(rec.Data) != want {
			t.Errorf("%q %v, want %q", rec.Data, err, want)
		}
	}
	if l.Sequence() != 2 || l.Repaired() != 0 {
		t.Errorf("sequence %d, repaired %d", l.Sequence(), l.Repaired())
	}
}

// TestRotationFails is about a segment that cannot be begun.
func TestRotationFails(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 1 << 10})
	large := Entry{Kind: 2, Data: make([]byte, 800)}
	if err := l.Append(time.Now(), large); err != nil {
		t.Fatal(err)
	}
	obstacle := filepath.Join(l.dir, segmentName(2))
	if err := os.Mkdir(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(time.Now(), large); err == nil {
		t.Fatal("append without a segment")
	}
	if err := l.Append(time.Now(), Entry{Kind: 2}); err == nil {
		t.Fatal("the segment that was to be replaced was continued")
	}
	if l.Sequence() != 1 {
		t.Errorf("sequence %d", l.Sequence())
	}
	if err := os.Remove(obstacle); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(time.Now(), Entry{Kind: 2}); err != nil {
		t.Fatal(err)
	}
	want := map[string]int64{segmentName(1): 68 + 36 + 800, segmentName(2): 68 + 36}
	if got := files(t, l.dir); !cmp.Equal(got, want) {
		t.Errorf("files %v, want %v", got, want)
	}
}
