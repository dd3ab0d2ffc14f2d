package eventlog

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"time"
)

// checkRecent checks what must hold of what is kept in memory, whatever happened.
func checkRecent(t testing.TB, l *Log) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	r := &l.recent
	first, size := uint64(none), 0
	for i, e := range r.entries {
		first = r.entries[0].sequence
		size += e.size()
		if e.sequence != first+uint64(i) || e.next.sequence != e.sequence+1 {
			t.Fatalf("entry %d is record %d, the first is %d", i, e.sequence, first)
		}
		if cap(e.data) != len(e.data) {
			t.Fatalf("record %d can be appended to", e.sequence)
		}
	}
	if n := len(r.entries); n > 0 && r.entries[n-1].sequence != l.tail.sequence {
		t.Fatalf("the last entry is record %d of %d", r.entries[n-1].sequence, l.tail.sequence)
	}
	if r.first.Load() != first || r.size != size || size > recentBytes {
		t.Fatalf("first %d, want %d; %d bytes, want %d", r.first.Load(), first, r.size, size)
	}
	if r.caughtUp < 0 || r.caughtUp > r.followers {
		t.Fatalf("%d of %d caught up", r.caughtUp, r.followers)
	}
	if (r.followers == 0 || r.caughtUp == r.followers) && len(r.entries) > 0 {
		t.Fatalf("%d records are kept for nobody", len(r.entries))
	}
}

// state is how much is kept for how many.
func (l *Log) state() (entries, size, followers int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.recent.entries), l.recent.size, l.recent.followers
}

// fromMemory says whether the record that a reader returned last was recalled.
func (r *Reader) fromMemory() bool { return r.recalled.next.sequence == r.want }

// reading is a reader that checks what it gets.
type reading struct {
	*Reader
	x expected
	// recalled and read count the records from memory and from the file.
	recalled, read int
}

func newReading(t testing.TB, l *Log, after uint64) *reading {
	r := &reading{Reader: l.NewReader(after)}
	r.x.advance(after)
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// take reads at most n records and says how many there were.
func (r *reading) take(t testing.TB, n int) (taken int) {
	t.Helper()
	for ; taken < n; taken++ {
		rec, ok, err := r.TryNext()
		if !ok && (err == nil || errors.Is(err, io.EOF)) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		r.x.check(t, rec)
		if r.fromMemory() {
			r.Reader.recalled.check(t, r.Reader, r.x)
			r.recalled++
		} else {
			r.read++
		}
	}
	checkRecent(t, r.log)
	return taken
}

// check compares the place to go on from with what must be there.
func (x recalled) check(t testing.TB, r *Reader, want expected) {
	t.Helper()
	if x.next.offsets != [2]int64{want.streams[0].Size, want.streams[1].Size} {
		t.Fatalf("behind record %d the offsets are %v, want %+v", want.sequence, x.next.offsets, want.streams)
	}
	if r.cursor.file != nil || r.cursor.buffer != nil {
		t.Fatal("a reader that needs no file holds one")
	}
}

const all = 1 << 30

func TestFollowersNeedNoFile(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 100 << 10})
	fill(t, l, 50)
	a, b := newReading(t, l, 0), newReading(t, l, 20)
	a.take(t, all)
	b.take(t, all)
	if a.recalled+b.recalled != 0 {
		t.Error("records were kept that nobody followed")
	}
	for range 20 {
		fill(t, l, 7)
		for _, s := range l.segments {
			if err := os.Rename(s.path, s.path+".hidden"); err != nil {
				t.Fatal(err)
			}
		}
		first, _, err := a.TryNext()
		if err != nil {
			t.Fatal(err)
		}
		other, _, err := b.TryNext()
		if err != nil {
			t.Fatal(err)
		}
		if len(first.Data) > 0 && &first.Data[0] != &other.Data[0] {
			t.Error("the readers got different memory")
		}
		a.x.check(t, first)
		b.x.check(t, other)
		if n, m := a.take(t, all), b.take(t, all); n != 6 || m != 6 {
			t.Fatalf("got %d and %d of 6", n, m)
		}
		if a.read+b.read != 80 {
			t.Fatal("a file was read")
		}
		for _, s := range l.segments {
			if err := os.Rename(s.path+".hidden", s.path); err != nil {
				t.Fatal(err)
			}
		}
		if n, _, _ := l.state(); n != 0 {
			t.Fatalf("%d records are kept that everybody has", n)
		}
	}
	readAll(t, l, 0)
}

// TestFallBehind: from memory to the file and back, with segments in between.
func TestFallBehind(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 200 << 10})
	r := newReading(t, l, 0)
	random := randomFor(3)
	for range 300 {
		fill(t, l, 1+random.IntN(60))
		r.take(t, random.IntN(70))
	}
	r.take(t, all)
	if r.x.sequence != l.Sequence() || r.recalled < 100 || r.read < 100 {
		t.Errorf("at %d of %d, %d from memory, %d from files", r.x.sequence, l.Sequence(), r.recalled, r.read)
	}
}

// TestGoesOnBehindWhatItHas: who falls behind reads nothing again.
func TestGoesOnBehindWhatItHas(t *testing.T) {
	l := newLog(t, Config{})
	r := newReading(t, l, 0)
	r.take(t, all)
	fill(t, l, 8)
	if r.take(t, 3); r.recalled != 3 {
		t.Fatalf("%d from memory", r.recalled)
	}
	position := r.Reader.recalled.next.position
	l.mu.Lock()
	l.recent.abandon()
	l.mu.Unlock()
	if r.take(t, 1) != 1 || r.read != 1 {
		t.Fatal("the record did not come from the file")
	}
	if size := int64(recordHeaderSize + len(entryOf(4).Data)); r.cursor.position != position+size {
		t.Errorf("read up to %d, the record is at %d", r.cursor.position, position)
	}
}

// TestStandsStill: a reader that takes nothing costs little, and then nothing.
func TestStandsStill(t *testing.T) {
	l := newLog(t, Config{})
	r := newReading(t, l, 0)
	r.take(t, all)
	if _, _, followers := l.state(); followers != 1 {
		t.Fatalf("%d followers", followers)
	}
	most := 0
	for range 20 {
		if err := l.Append(time.Now(), chunks(8, MaxData)...); err != nil {
			t.Fatal(err)
		}
		checkRecent(t, l)
		_, size, _ := l.state()
		most = max(most, size)
	}
	if most < recentBytes/2 || most > recentBytes {
		t.Errorf("at most %d bytes were kept", most)
	}
	if n, _, followers := l.state(); n != 0 || followers != 0 || l.recent.entries != nil {
		t.Errorf("%d records are kept for %d followers", n, followers)
	}
	// With another one who keeps up, it stays within the bound.
	other := l.NewReader(l.Sequence())
	defer other.Close()
	for range 100 {
		if _, _, err := other.TryNext(); err != nil {
			t.Fatal(err)
		}
		if err := l.Append(time.Now(), chunks(1, MaxData)...); err != nil {
			t.Fatal(err)
		}
		checkRecent(t, l)
	}
	// And once it goes on, it gets everything.
	for n := range l.Sequence() {
		rec, ok, err := r.TryNext()
		if !ok || err != nil || rec.Gap != nil || rec.Sequence != n+1 {
			t.Fatal(rec, ok, err)
		}
	}
}

func TestKeptForNobody(t *testing.T) {
	l := newLog(t, Config{})
	a, b := newReading(t, l, 0), newReading(t, l, 0)
	a.take(t, all)
	b.take(t, all)
	fill(t, l, 10)
	a.take(t, all)
	if n, _, followers := l.state(); n != 10 || followers != 2 {
		t.Fatalf("%d records for %d", n, followers)
	}
	for range 2 { // the second time does nothing
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		if n, _, followers := l.state(); n != 0 || followers != 1 {
			t.Fatalf("%d records for %d", n, followers)
		}
	}
	fill(t, l, 10)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	checkRecent(t, l)
	if n, _, followers := l.state(); n != 0 || followers != 0 {
		t.Fatalf("%d records for %d", n, followers)
	}
	fill(t, l, 10)
	if n, _, _ := l.state(); n != 0 {
		t.Fatal("records are kept that nobody follows")
	}
	c := newReading(t, l, 0)
	c.take(t, all)
	fill(t, l, 10)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := l.state(); n != 0 {
		t.Fatal("a closed log keeps records")
	}
	if _, _, err := c.TryNext(); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
}

// TestSealedFromMemory: the last record comes like the others, and io.EOF behind it.
func TestSealedFromMemory(t *testing.T) {
	l := newLog(t, Config{})
	r := newReading(t, l, 0)
	r.take(t, all)
	fill(t, l, 5)
	if err := l.Seal(timeOf(6), entryOf(6)); err != nil {
		t.Fatal(err)
	}
	if r.take(t, all) != 6 || r.recalled != 6 {
		t.Errorf("%d records from memory", r.recalled)
	}
	if _, _, err := r.TryNext(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// TestNotWritten: what could not be written is not in memory either.
func TestNotWritten(t *testing.T) {
	l := newLog(t, Config{})
	fill(t, l, 3)
	r := newReading(t, l, 0)
	r.take(t, all)
	file := l.writer.file
	readOnly, err := os.Open(l.active().path)
	if err != nil {
		t.Fatal(err)
	}
	l.writer.file = readOnly
	if err := appendNext(l, 4); err == nil {
		t.Fatal("written to a file that is not open for writing")
	}
	checkRecent(t, l)
	if rec, ok, err := r.TryNext(); ok || err != nil {
		t.Fatalf("%+v %v", rec, err)
	}
	l.writer.file = file
	if err := readOnly.Close(); err != nil {
		t.Fatal(err)
	}
	fill(t, l, 4)
	if r.take(t, all) != 4 || r.recalled != 4 {
		t.Errorf("%d from memory", r.recalled)
	}
	if len(l.writer.recent) != 0 || cap(l.writer.recent) > 0 && l.writer.recent[:1][0].data != nil {
		t.Error("the writer holds on to records")
	}
}

// TestCallerKeepsItsMemory: Append's data is the caller's again when it returns.
func TestCallerKeepsItsMemory(t *testing.T) {
	l := newLog(t, Config{})
	r := l.NewReader(0)
	defer r.Close()
	if _, ok, err := r.TryNext(); ok || err != nil {
		t.Fatal(ok, err)
	}
	data := []byte("what was written")
	if err := l.Append(time.Now(), Entry{Kind: 2, Data: data}, Entry{Kind: 3}); err != nil {
		t.Fatal(err)
	}
	copy(data, "something else")
	rec, ok, err := r.TryNext()
	if !ok || err != nil || !r.fromMemory() || string(rec.Data) != "what was written" {
		t.Fatalf("%q %v %v", rec.Data, ok, err)
	}
	if rec, ok, err = r.TryNext(); !ok || err != nil || len(rec.Data) != 0 || rec.Kind != 3 {
		t.Fatal(rec, ok, err)
	}
}

// TestFollowersRace: many readers, some slower, some that leave, while the log grows.
func TestFollowersRace(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 1 << 20})
	const records = 2000
	var wg sync.WaitGroup
	defer wg.Wait()
	for n := range 16 {
		wg.Go(func() {
			after, pause := uint64(0), time.Duration(n%4)*time.Millisecond
			for after < records {
				r := l.NewReader(after)
				for range 1 + n*40 {
					rec, err := r.Next(context.Background())
					if err != nil {
						if !errors.Is(err, io.EOF) {
							t.Error(err)
						}
						break
					}
					if want := entryOf(rec.Sequence); rec.Gap != nil || rec.Sequence != after+1 || !bytes.Equal(rec.Data, want.Data) {
						t.Errorf("record %d after %d", rec.Sequence, after)
						after = records
						break
					}
					after = rec.Sequence
					if n%4 > 0 && after%100 == 0 {
						time.Sleep(pause)
					}
				}
				_ = r.Close()
			}
		})
	}
	for l.Sequence() < records-1 {
		fill(t, l, 1)
		checkRecent(t, l)
	}
	if err := l.Seal(timeOf(records), entryOf(records)); err != nil {
		t.Error(err)
	}
}
