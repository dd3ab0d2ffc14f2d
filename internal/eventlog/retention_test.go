package eventlog

import (
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"time"
)

func TestRetention(t *testing.T) {
	const retained, segment = 256 << 10, 32 << 10
	l := newLog(t, Config{RetainedBytes: retained, SegmentBytes: segment})
	early := l.NewReader(0)
	defer early.Close()
	inside := l.NewReader(0) // reads one record and then stands still
	defer inside.Close()
	var xEarly, xInside expected
	for l.Sequence() < 1500 {
		fill(t, l, 1)
		if l.size > retained {
			t.Fatalf("%d bytes, at most %d wanted", l.size, retained)
		}
		if l.Sequence()%20 == 0 {
			sum := int64(0)
			for _, size := range files(t, l.dir) {
				sum += size
			}
			if sum != l.size {
				t.Fatalf("%d bytes in files, %d counted", sum, l.size)
			}
		}
		if xInside.sequence == 0 {
			rec, _, err := inside.TryNext()
			if err != nil {
				t.Fatal(err)
			}
			xInside.check(t, rec)
		}
	}
	// Not more was dropped than had to be.
	if least := int64(retained - segment - MaxData - recordHeaderSize); l.size < least {
		t.Errorf("only %d bytes are kept", l.size)
	}

	first := l.segments[0]
	t.Run("a reader from before", func(t *testing.T) {
		rec, ok, err := early.TryNext()
		if !ok || err != nil || rec.Gap == nil {
			t.Fatalf("%+v %v %v", rec, ok, err)
		}
		if rec.Gap.Reason != GapRetention || rec.Sequence != first.base-1 || rec.Gap.MissingEvents != first.base-1 ||
			rec.Gap.Resume != first.start.sizes() || !rec.Time.IsZero() || rec.Data != nil {
			t.Errorf("%+v %+v, first kept is %d", rec, rec.Gap, first.base)
		}
		xEarly.check(t, rec)
		for xEarly.sequence < 1500 {
			rec, ok, err := early.TryNext()
			if !ok || err != nil || rec.Gap != nil {
				t.Fatalf("%+v %v %v", rec, ok, err)
			}
			xEarly.check(t, rec)
		}
	})
	t.Run("a reader from inside", func(t *testing.T) {
		gaps := 0
		for xInside.sequence < 1500 {
			rec, ok, err := inside.TryNext()
			if !ok || err != nil {
				t.Fatal(ok, err)
			}
			xInside.check(t, rec)
			if rec.Gap != nil {
				gaps++
			}
		}
		if gaps != 1 {
			t.Errorf("%d gaps, want 1", gaps)
		}
	})
	t.Run("cursors", func(t *testing.T) {
		for after := uint64(0); after <= 1500; after += 19 {
			gaps := readAll(t, l, after)
			if want := after+1 < first.base; (len(gaps) == 1) != want || len(gaps) > 1 {
				t.Errorf("after %d of %d: gaps %+v", after, first.base, gaps)
			}
		}
	})
	check := func(t *testing.T, l *Log) {
		x := new(expected)
		x.checkTotals(t, l)
		streams := streamsUpTo(l.Sequence())
		stdout, stderr := l.Totals()
		for i, total := range []Total{stdout, stderr} {
			if total.Dropped != first.start.streams[i].size || total.Dropped == 0 {
				t.Errorf("dropped %d, want %d", total.Dropped, first.start.streams[i].size)
			}
			for _, offset := range []int64{0, 1, total.Dropped - 1} {
				var dropped *DroppedError
				_, err := l.ReadStream(Stream(i+1), offset, make([]byte, 10))
				if !errors.As(err, &dropped) || dropped.First != total.Dropped {
					t.Errorf("offset %d: %v, want the first to be %d", offset, err, total.Dropped)
				}
			}
			kept := make([]byte, total.Size-total.Dropped)
			n, err := l.ReadStream(Stream(i+1), total.Dropped, kept)
			if err != nil || n != len(kept) || string(kept) != string(streams[i][total.Dropped:]) {
				t.Errorf("read %d of %d kept bytes, %v", n, len(kept), err)
			}
		}
	}
	t.Run("totals and streams", func(t *testing.T) { check(t, l) })
	t.Run("reopened", func(t *testing.T) {
		l := reopen(t, l)
		check(t, l)
		readAll(t, l, 0)
		readAll(t, l, 1400)
	})
}

// TestRetentionSmall: the segment being written is kept, however little is retained.
func TestRetentionSmall(t *testing.T) {
	l := newLog(t, Config{RetainedBytes: 1, SegmentBytes: 8 << 10})
	for range 200 {
		fill(t, l, 1)
		if len(l.segments) != 1 {
			t.Fatalf("%d segments", len(l.segments))
		}
	}
	readAll(t, l, 0)
	readAll(t, reopen(t, l), 0)
}

// TestRetentionWhenOpened: reading what is there must not drop any of it.
func TestRetentionWhenOpened(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 8 << 10})
	fill(t, l, 200)
	before := len(l.segments)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = openLog(t, Config{Dir: l.dir, RetainedBytes: 64 << 10, SegmentBytes: 8 << 10})
	if gaps := readAll(t, l, 0); gaps != nil || len(l.segments) != before {
		t.Errorf("gaps %+v, %d segments of %d", gaps, len(l.segments), before)
	}
	fill(t, l, 1)
	if l.size > 64<<10 || len(readAll(t, l, 0)) != 1 {
		t.Errorf("%d bytes", l.size)
	}
}

// TestSlowReader: a reader that is overtaken again and again is told so each time,
// and what it gets in between is right.
func TestSlowReader(t *testing.T) {
	l := newLog(t, Config{RetainedBytes: 128 << 10, SegmentBytes: 16 << 10})
	r := l.NewReader(0)
	defer r.Close()
	var x expected
	gaps := 0
	for round := range 40 {
		fill(t, l, 60)
		for range 1 + round%17 {
			rec, ok, err := r.TryNext()
			if !ok || err != nil {
				t.Fatal(ok, err)
			}
			x.check(t, rec)
			if rec.Gap != nil {
				gaps++
			}
		}
		l.writer.writeback.group.Wait() // it has the segment before for a moment
		if n := openFiles(t, l.dir); n > 2 {
			t.Fatalf("%d files are open", n)
		}
	}
	if gaps < 10 {
		t.Errorf("%d gaps", gaps)
	}
}

// TestSegmentCannotBeDeleted: the log goes on, and catches up when it can.
func TestSegmentCannotBeDeleted(t *testing.T) {
	l := newLog(t, Config{RetainedBytes: 32 << 10, SegmentBytes: 8 << 10})
	first := l.active().path
	fill(t, l, 3)
	// A directory with something in it cannot be removed as a file can.
	moved := t.TempDir() + "/moved"
	if err := os.Rename(first, moved); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(first+"/x", 0o700); err != nil {
		t.Fatal(err)
	}
	for range 100 {
		fill(t, l, 1)
		sum := int64(0)
		for _, s := range l.segments {
			sum += s.end
		}
		if sum != l.size {
			t.Fatalf("%d bytes are counted of %d", l.size, sum)
		}
	}
	if l.segments[0].path != first || l.segments[0].dropped {
		t.Error("it was forgotten")
	}
	if err := os.RemoveAll(first); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(moved, first); err != nil {
		t.Fatal(err)
	}
	fill(t, l, 1)
	if l.size > 32<<10 {
		t.Errorf("%d bytes are kept", l.size)
	}
	if len(readAll(t, l, 0)) != 1 {
		t.Error("want one gap")
	}
}

// TestRetentionRace: segments disappear between being found and being opened. That is
// retention, not damage.
func TestRetentionRace(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 300, RetainedBytes: 900})
	var wg sync.WaitGroup
	defer wg.Wait()
	for n := range 2 {
		wg.Go(func() {
			for {
				if _, err := l.ReadStream(Stdout, 0, make([]byte, 10)); err != nil &&
					!errors.As(err, new(*DroppedError)) && !errors.Is(err, io.EOF) {
					t.Errorf("ReadStream: %v", err)
				}
				_, stderr := l.Totals()
				p := make([]byte, 1)
				_, err := l.ReadStream(Stderr, stderr.Dropped, p)
				if dropped := new(DroppedError); errors.As(err, &dropped) {
					// It is not lost if it was only dropped in between.
					if _, now := l.Totals(); now.Dropped < dropped.First {
						t.Errorf("ReadStream from %d: %v, but only %d are dropped", stderr.Dropped, err, now.Dropped)
					}
				}
				r := l.NewReader(0)
				for range 1 + n*10 {
					rec, ok, err := r.TryNext()
					if err != nil || ok && rec.Gap != nil && rec.Gap.Reason != GapRetention {
						t.Errorf("%+v %v", rec.Gap, err)
					}
				}
				_ = r.Close()
				if l.Sealed() {
					return
				}
			}
		})
	}
	for n := range uint64(5000) {
		e := Entry{Kind: KindOutput, Stream: Stream(1 + n%2), Data: []byte("0123456789")}
		if err := l.Append(time.Now(), e); err != nil {
			t.Error(err)
		}
	}
	if err := l.Seal(time.Now(), Entry{Kind: 2}); err != nil {
		t.Error(err)
	}
}
