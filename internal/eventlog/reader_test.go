package eventlog

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func TestReadAfter(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 100 << 10})
	fill(t, l, 100)
	for after := range uint64(101) {
		if gaps := readAll(t, l, after); gaps != nil {
			t.Fatalf("after %d: gaps %+v", after, gaps)
		}
	}
	l = reopen(t, l)
	for after := range uint64(101) {
		readAll(t, l, 100-after)
	}
}

// TestReadNotYet is about cursors behind the end, as far as they can be.
func TestReadNotYet(t *testing.T) {
	l := newLog(t, Config{})
	fill(t, l, 3)
	r, never := l.NewReader(5), l.NewReader(1<<64-1)
	for range 2 {
		if rec, ok, err := r.TryNext(); ok || err != nil {
			t.Fatalf("%+v %v", rec, err)
		}
		fill(t, l, 1)
	}
	fill(t, l, 1)
	if rec, ok, err := r.TryNext(); !ok || rec.Sequence != 6 {
		t.Errorf("%+v %v %v, want record 6", rec, ok, err)
	}
	if rec, ok, err := never.TryNext(); ok || err != nil {
		t.Errorf("%+v %v", rec, err)
	}
	if err := errors.Join(r.Close(), never.Close()); err != nil {
		t.Error(err)
	}
	if _, err := r.Next(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed reader: %v", err)
	}
}

func TestNextWaits(t *testing.T) {
	// next calls Next in a bubble in which act is called once Next waits for good.
	next := func(t *testing.T, act func(l *Log, cancel context.CancelCauseFunc)) (rec Record, err error) {
		synctest.Test(t, func(t *testing.T) {
			l := newLog(t, Config{})
			fill(t, l, 3)
			ctx, cancel := context.WithCancelCause(context.Background())
			defer cancel(nil)
			r := l.NewReader(3)
			defer r.Close()
			returned := false
			var wg sync.WaitGroup
			wg.Go(func() {
				rec, err = r.Next(ctx)
				returned = true
			})
			synctest.Wait()
			if returned {
				t.Errorf("Next did not wait: %+v %v", rec, err)
			}
			act(l, cancel)
			wg.Wait()
		})
		return rec, err
	}
	t.Run("Append", func(t *testing.T) {
		rec, err := next(t, func(l *Log, _ context.CancelCauseFunc) { fill(t, l, 1) })
		if err != nil || rec.Sequence != 4 {
			t.Errorf("%+v %v", rec, err)
		}
	})
	t.Run("Seal", func(t *testing.T) {
		rec, err := next(t, func(l *Log, _ context.CancelCauseFunc) {
			if err := l.Seal(time.Now(), entryOf(4)); err != nil {
				t.Error(err)
			}
		})
		if err != nil || rec.Sequence != 4 {
			t.Errorf("%+v %v", rec, err)
		}
	})
	t.Run("Close", func(t *testing.T) {
		_, err := next(t, func(l *Log, _ context.CancelCauseFunc) {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		})
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%v", err)
		}
	})
	t.Run("context", func(t *testing.T) {
		cause := errors.New("the client is gone")
		if _, err := next(t, func(_ *Log, cancel context.CancelCauseFunc) { cancel(cause) }); !errors.Is(err, cause) {
			t.Errorf("%v", err)
		}
	})
	t.Run("an ended context does not read", func(t *testing.T) {
		l := newLog(t, Config{})
		fill(t, l, 1)
		cause := errors.New("the client is gone")
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(cause)
		r := l.NewReader(0)
		if _, err := r.Next(ctx); !errors.Is(err, cause) {
			t.Errorf("%v", err)
		}
		if rec, err := r.Next(t.Context()); err != nil || rec.Sequence != 1 {
			t.Errorf("%+v %v", rec, err)
		}
		_ = r.Close()
	})
	t.Run("woken for what was not asked for", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := newLog(t, Config{})
			r := l.NewReader(2)
			defer r.Close()
			var rec Record
			var wg sync.WaitGroup
			wg.Go(func() {
				var err error
				if rec, err = r.Next(context.Background()); err != nil {
					t.Error(err)
				}
			})
			for range 3 {
				synctest.Wait() // returns only if Next waits
				if rec.Sequence != 0 {
					t.Errorf("%+v", rec)
				}
				fill(t, l, 1)
			}
			wg.Wait()
			if rec.Sequence != 3 {
				t.Errorf("%+v", rec)
			}
		})
	})
	t.Run("what is refused wakes nobody for nothing", func(t *testing.T) {
		rec, err := next(t, func(l *Log, _ context.CancelCauseFunc) {
			if err := l.Append(time.Now(), Entry{}); err == nil {
				t.Error("Append took it")
			}
			synctest.Wait()
			if l.wake == nil {
				t.Error("the reader does not wait any more")
			}
			fill(t, l, 1)
		})
		if err != nil || rec.Sequence != 4 {
			t.Errorf("%+v %v", rec, err)
		}
	})
}

// TestManyReaders: each gets everything, from where it began, while the log grows.
func TestManyReaders(t *testing.T) {
	const readers, records = 100, 600
	l := newLog(t, Config{SegmentBytes: 512 << 10})
	fill(t, l, 20)
	var wg sync.WaitGroup
	defer wg.Wait()
	for n := range readers {
		wg.Go(func() {
			after := uint64(n % 20)
			r := l.NewReader(after)
			defer r.Close()
			var x expected
			x.advance(after)
			for {
				rec, err := r.Next(t.Context())
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil || rec.Gap != nil {
					t.Errorf("%+v %v", rec.Gap, err)
					return
				}
				x.checkFrom(t, rec)
			}
			if x.sequence != records+1 {
				t.Errorf("reader %d ended at %d", n, x.sequence)
			}
		})
	}
	fill(t, l, records-20)
	if err := l.Seal(time.Now(), entryOf(records+1)); err != nil {
		t.Error(err)
	}
}

// checkFrom is check for other goroutines than the test's own.
func (x *expected) checkFrom(t *testing.T, rec Record) {
	want := entryOf(rec.Sequence)
	var offset int64
	if want.Kind == KindOutput {
		offset = x.streams[want.Stream-1].Size
	}
	if rec.Sequence != x.sequence+1 || rec.Kind != want.Kind || rec.Offset != offset || !bytes.Equal(rec.Data, want.Data) {
		t.Errorf("record %d is not what must follow %d", rec.Sequence, x.sequence)
	}
	x.advance(rec.Sequence)
}

// TestDataStays: gRPC holds on to a message after Send returned.
func TestDataStays(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 64 << 10})
	fill(t, l, 60)
	r := l.NewReader(0)
	defer r.Close()
	var records []Record
	for range 60 {
		rec, ok, err := r.TryNext()
		if !ok || err != nil {
			t.Fatal(ok, err)
		}
		records = append(records, rec)
	}
	for i, rec := range records {
		// Who appends to the data must not write over the next record's.
		_ = append(rec.Data, "overwritten"...)
		if i+1 < len(records) && !bytes.Equal(records[i+1].Data, entryOf(records[i+1].Sequence).Data) {
			t.Fatalf("record %d changed", records[i+1].Sequence)
		}
	}
	for _, rec := range records {
		if !bytes.Equal(rec.Data, entryOf(rec.Sequence).Data) {
			t.Fatalf("record %d changed", rec.Sequence)
		}
	}
}

// TestReaderMemory: many clients may stand still, many logs grow by a little.
func TestReaderMemory(t *testing.T) {
	l := newLog(t, Config{})
	r := l.NewReader(0)
	defer r.Close()
	for range 10 {
		if err := l.Append(time.Now(), Entry{Kind: 2, Data: []byte("a")}, Entry{Kind: 2, Data: []byte("b")}); err != nil {
			t.Fatal(err)
		}
		if _, ok, err := r.TryNext(); !ok || err != nil {
			t.Fatal(ok, err)
		}
		if got, most := cap(r.cursor.buffer), 2*(recordHeaderSize+1); got > most {
			t.Errorf("buffer of %d bytes for %d", got, most)
		}
		if _, ok, err := r.TryNext(); !ok || err != nil {
			t.Fatal(ok, err)
		}
		if r.cursor.buffer != nil {
			t.Error("a reader at the end holds a buffer")
		}
	}
	fill(t, l, 200)
	for range 200 {
		if _, ok, err := r.TryNext(); !ok || err != nil {
			t.Fatal(ok, err)
		}
		if got := cap(r.cursor.buffer); got > readAhead {
			t.Fatalf("buffer of %d bytes", got)
		}
	}
}

// TestReadErrorIsNotFinal: when there are no descriptors left, for example, the reader
// is told so and can go on later, without loss.
func TestReadErrorIsNotFinal(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 16 << 10})
	for len(l.segments) < 3 {
		fill(t, l, 1)
	}
	path, moved := l.segments[1].path, t.TempDir()+"/moved"
	if err := os.Rename(path, moved); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path, path); err != nil { // which cannot be opened
		t.Fatal(err)
	}
	r := l.NewReader(0)
	defer r.Close()
	var x expected
	for range l.segments[1].base - 1 {
		rec, ok, err := r.TryNext()
		if !ok || err != nil {
			t.Fatal(ok, err)
		}
		x.check(t, rec)
	}
	stream := Stdout
	if l.segments[1].start.streams[0].size == l.segments[2].start.streams[0].size {
		stream = Stderr // there is no other output in that segment
	}
	for range 3 {
		if rec, err := r.Next(t.Context()); !errors.Is(err, syscall.ELOOP) {
			t.Fatalf("%+v %v", rec, err)
		}
		if _, err := l.ReadStream(stream, l.segments[1].start.streams[stream.index()].size, make([]byte, 1)); !errors.Is(err, syscall.ELOOP) {
			t.Fatal(err)
		}
	}
	if _, err := Open(Config{Dir: l.dir}); !errors.Is(err, syscall.ELOOP) || errors.Is(err, ErrNoLog) {
		t.Fatal(err)
	}
	if err := os.Rename(moved, path); err != nil {
		t.Fatal(err)
	}
	for x.sequence < l.Sequence() {
		rec, ok, err := r.TryNext()
		if !ok || err != nil || rec.Gap != nil {
			t.Fatal(rec.Gap, ok, err)
		}
		x.check(t, rec)
	}
}
