package eventlog

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// TestDamage damages segments that are not the last one. Whatever it is, readers get
// what can be read and are told exactly what cannot.
func TestDamage(t *testing.T) {
	const segment = 16 << 10
	original := newLog(t, Config{SegmentBytes: segment})
	for len(original.segments) < 6 {
		fill(t, original, 1)
	}
	bases := []uint64{0}
	for _, s := range original.segments {
		bases = append(bases, s.base)
	}
	// The log has segments 1 to 6.
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, path func(n int) string)
		gaps   []int // segments in which, or with which, something is missing
		reason GapReason
	}{
		{"nothing", func(*testing.T, func(int) string) {}, nil, 0},
		{"data", func(t *testing.T, path func(int) string) {
			damage(t, path(3), int64(len(readFile(t, path(3)))-1))
		}, []int{3}, GapDamaged},
		{"the first record's CRC", func(t *testing.T, path func(int) string) {
			damage(t, path(3), segmentHeaderSize)
		}, []int{3}, GapDamaged},
		{"the first record's length", func(t *testing.T, path func(int) string) {
			damage(t, path(3), segmentHeaderSize+5)
		}, []int{3}, GapDamaged},
		{"the first segment", func(t *testing.T, path func(int) string) {
			damage(t, path(1), segmentHeaderSize+recordHeaderSize-1)
		}, []int{1}, GapDamaged},
		{"two segments", func(t *testing.T, path func(int) string) {
			damage(t, path(2), segmentHeaderSize)
			damage(t, path(3), segmentHeaderSize)
		}, []int{2, 3}, GapDamaged},
		{"a header", func(t *testing.T, path func(int) string) { damage(t, path(3), 30) }, []int{3}, GapDamaged},
		{"the first header", func(t *testing.T, path func(int) string) { damage(t, path(1), 0) }, []int{1}, GapDamaged},
		{"all headers but the last", func(t *testing.T, path func(int) string) {
			for n := 1; n < 6; n++ {
				damage(t, path(n), 66)
			}
		}, []int{1}, GapDamaged},
		{"half of a segment", func(t *testing.T, path func(int) string) {
			change(t, path(3), func(b []byte) []byte { return b[:len(b)/2] })
		}, []int{3}, GapDamaged},
		{"an emptied segment", func(t *testing.T, path func(int) string) {
			change(t, path(3), func(b []byte) []byte { return nil })
		}, []int{3}, GapDamaged},
		{"zeros", func(t *testing.T, path func(int) string) {
			change(t, path(3), func(b []byte) []byte { return make([]byte, len(b)) })
		}, []int{3}, GapDamaged},
		{"a segment that is missing", func(t *testing.T, path func(int) string) {
			if err := os.Remove(path(3)); err != nil {
				t.Fatal(err)
			}
		}, []int{3}, GapDamaged},
		{"the first segment is missing", func(t *testing.T, path func(int) string) {
			if err := os.Remove(path(1)); err != nil {
				t.Fatal(err)
			}
		}, []int{1}, GapRetention},
		{"another log's segment", func(t *testing.T, path func(int) string) {
			change(t, path(3), func(b []byte) []byte {
				_, start, _ := decodeSegmentHeader(b)
				return append(encodeSegmentHeader(epoch{1, 2, 3}, start), b[segmentHeaderSize:]...)
			})
		}, []int{3}, GapDamaged},
		{"a segment under another's name", func(t *testing.T, path func(int) string) {
			change(t, path(3), func([]byte) []byte { return readFile(t, path(4)) })
		}, []int{3}, GapDamaged},
		{"a header that contradicts the next", func(t *testing.T, path func(int) string) {
			change(t, path(3), func(b []byte) []byte {
				e, start, _ := decodeSegmentHeader(b)
				start.streams[1].size += 1 << 40
				return append(encodeSegmentHeader(e, start), b[segmentHeaderSize:]...)
			})
		}, []int{3}, GapDamaged},
		{"the first header that is left contradicts the next", func(t *testing.T, path func(int) string) {
			if err := os.Remove(path(1)); err != nil {
				t.Fatal(err)
			}
			change(t, path(2), func(b []byte) []byte {
				e, start, _ := decodeSegmentHeader(b)
				start.streams[0].size += 1 << 40
				return append(encodeSegmentHeader(e, start), b[segmentHeaderSize:]...)
			})
		}, []int{2}, GapRetention},
		{"a record twice", func(t *testing.T, path func(int) string) {
			change(t, path(3), func(b []byte) []byte {
				r, n, _ := decodeRecord(b[segmentHeaderSize:])
				r.sequence, r.offset = r.sequence-1, r.offset+int64(len(r.data))
				return append(b[:segmentHeaderSize+n:segmentHeaderSize+n], encodeRecord(r)...)
			})
		}, []int{3}, GapDamaged},
		{"a record at the wrong offset", func(t *testing.T, path func(int) string) {
			change(t, path(3), func(b []byte) []byte {
				for at := segmentHeaderSize; ; {
					r, n, err := decodeRecord(b[at:])
					if err != nil {
						t.Fatal(err)
					}
					if r.kind == KindOutput {
						r.offset++
						copy(b[at:], encodeRecord(r))
						return b
					}
					at += n
				}
			})
		}, []int{3}, GapDamaged},
		{"more behind the last record", func(t *testing.T, path func(int) string) {
			appendFile(t, path(3), readFile(t, path(4))[segmentHeaderSize:])
		}, nil, 0},
		{"rubbish behind the last record", func(t *testing.T, path func(int) string) {
			appendFile(t, path(3), []byte("rubbish"))
		}, nil, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := func(n int) string { return filepath.Join(dir, segmentName(bases[n])) }
			for n := 1; n <= 6; n++ {
				b := readFile(t, original.segments[n-1].path)
				if err := os.WriteFile(path(n), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			tt.damage(t, path)
			l := openLog(t, Config{Dir: dir, SegmentBytes: segment})
			if l.tail != original.tail {
				t.Fatalf("tail %+v, want %+v", l.tail, original.tail)
			}
			for i, s := range l.segments {
				if i > 0 && s.base <= l.segments[i-1].base {
					t.Errorf("segment %d follows %d", s.base, l.segments[i-1].base)
				}
				if filepath.Base(s.path) != segmentName(s.base) || files(t, dir)[segmentName(s.base)] != s.end {
					t.Errorf("segment %d: %s of %d bytes", s.base, s.path, s.end)
				}
			}
			if len(l.segments) != len(files(t, dir)) {
				t.Errorf("%d segments", len(l.segments))
			}
			checkDamaged := func() {
				t.Helper()
				stdout, stderr := l.Totals()
				if stdout.Dropped > stdout.Size || stderr.Dropped > stderr.Size {
					t.Errorf("totals %+v %+v", stdout, stderr)
				}
				gaps := readAll(t, l, 0)
				if len(gaps) != len(tt.gaps) {
					t.Fatalf("%d gaps, want %d", len(gaps), len(tt.gaps))
				}
				for i, rec := range gaps {
					next := tt.gaps[i] + 1
					if tt.name == "all headers but the last" {
						next = 6
					}
					if rec.Gap.Reason != tt.reason || rec.Sequence != bases[next]-1 {
						t.Errorf("%+v %+v, want it to end at %d", rec, rec.Gap, bases[next]-1)
					}
				}
				for after := range l.Sequence() {
					if gaps := readAll(t, l, after); len(gaps) > len(tt.gaps) {
						t.Fatalf("after %d: %d gaps", after, len(gaps))
					}
				}
				checkHoles(t, l, len(tt.gaps) > 0)
			}
			checkDamaged()
			fill(t, l, 5)
			checkDamaged()
			new(expected).checkTotals(t, l)
		})
	}
}

// checkHoles reads both streams and makes sure that all that is returned is right and
// that holes are told.
func checkHoles(t testing.TB, l *Log, wantHoles bool) {
	t.Helper()
	streams := streamsUpTo(l.Sequence())
	holes := 0
	for i, want := range streams {
		p := make([]byte, 5000)
		for offset := int64(0); offset < int64(len(want)); {
			n, err := l.ReadStream(Stream(i+1), offset, p)
			if string(p[:n]) != string(want[offset:offset+int64(n)]) {
				t.Fatalf("stream %d at %d: wrong bytes", i+1, offset)
			}
			offset += int64(n)
			var dropped *DroppedError
			switch {
			case errors.As(err, &dropped) && n == 0 && dropped.First > offset:
				holes++
				offset = dropped.First
			case err != nil || n == 0:
				t.Fatalf("stream %d at %d: %d, %v", i+1, offset, n, err)
			}
		}
	}
	if (holes > 0) != wantHoles {
		t.Errorf("%d holes, want some: %v", holes, wantHoles)
	}
}

// TestDamageAtRuntime damages the segment being written under readers.
func TestDamageAtRuntime(t *testing.T) {
	l := newLog(t, Config{})
	fill(t, l, 40)
	b := readFile(t, l.active().path)
	f, err := os.OpenFile(l.active().path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := l.active().end / 2
	if _, err := f.WriteAt([]byte{b[at] ^ 1}, at); err != nil {
		t.Fatal(err)
	}
	gaps := readAll(t, l, 0)
	if len(gaps) != 1 || gaps[0].Gap.Reason != GapDamaged || gaps[0].Sequence != 40 {
		t.Fatalf("gaps %+v", gaps)
	}
	checkHoles(t, l, true)
	// It goes on behind the damage, which is not met again.
	r := l.NewReader(40)
	defer r.Close()
	for n := range uint64(3) {
		fill(t, l, 1)
		for _, after := range []uint64{40, 40 + n} {
			if gaps := readAll(t, l, after); gaps != nil {
				t.Fatalf("gaps %+v", gaps)
			}
		}
		if gaps := readAll(t, l, 0); len(gaps) != 1 {
			t.Fatalf("gaps %+v", gaps)
		}
		if rec, ok, err := r.TryNext(); !ok || err != nil || rec.Sequence != 41+n {
			t.Fatalf("%+v %v %v", rec, ok, err)
		}
	}
	checkHoles(t, l, true)
	if err := l.Seal(timeOf(44), entryOf(44)); err != nil {
		t.Fatal(err)
	}
	readAll(t, l, 0)
	readAll(t, l, 42)
}

// TestBrokenSegmentsAreDropped: what nobody can read does not stay for ever.
func TestBrokenSegmentsAreDropped(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 8 << 10, RetainedBytes: 256 << 10})
	fill(t, l, 30)
	for _, s := range l.segments[:2] {
		damage(t, s.path, 3)
	}
	l = reopen(t, l)
	for range 20 {
		fill(t, l, 10)
		sum := int64(0)
		for _, size := range files(t, l.dir) {
			sum += size
		}
		if sum > 256<<10 || sum != l.size {
			t.Fatalf("%d bytes in files, %d counted", sum, l.size)
		}
	}
	readAll(t, l, 0)
}

func TestErrorsTell(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "no log")
	_, err := Open(Config{Dir: dir})
	if got, want := err.Error(), fmt.Sprintf("open event log %q: no event log", dir); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got, want := (&DroppedError{First: 7}).Error(), "output is gone up to offset 7"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
