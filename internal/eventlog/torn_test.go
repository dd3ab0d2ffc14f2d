package eventlog

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestTornTail cuts a log at every byte of its last segment.
func TestTornTail(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 2 << 10})
	for len(l.segments) < 3 || l.active().end < 1500 {
		n := l.Sequence() + 1
		e := Entry{Kind: KindOutput, Stream: Stream(1 + n%2), Data: entryOf(n).Data}
		e.Data = e.Data[:min(len(e.Data), 150)]
		if err := l.Append(timeOf(n), e); err != nil {
			t.Fatal(err)
		}
	}
	ends := map[int64]tally{} // what the log adds up to if it ends there
	c := cursor{log: l, reuse: true}
	s := l.active()
	if err := c.open(place{segment: s, mark: s.marks[0], end: s.end, last: s.last}); err != nil {
		t.Fatal(err)
	}
	defer c.close()
	sum := s.start
	for ends[segmentHeaderSize] = sum; ; ends[c.position] = sum {
		r, err := c.next()
		if err != nil {
			break
		}
		sum.sequence, sum.time = r.sequence, r.time
		st := &sum.streams[r.stream.index()]
		st.size, st.crc = st.size+int64(len(r.data)), checksum(st.crc, r.data)
	}
	if sum != l.tail || len(ends) < 5 {
		t.Fatalf("%+v, %d records", sum, len(ends)-1)
	}

	whole := readFile(t, s.path)
	before := l.segments[len(l.segments)-2].path
	wholeBefore := readFile(t, before)
	dir := t.TempDir()
	pathBefore, path := filepath.Join(dir, filepath.Base(before)), filepath.Join(dir, filepath.Base(s.path))
	for cut := range int64(len(whole) + 1) {
		rests := []string{"\x00\x00\x00\x00", string(make([]byte, 100)), "garbage that is longer than a record's header"}
		for _, rest := range []string{"", rests[cut%3]} {
			if cut <= segmentHeaderSize+1 { // the last round has appended to it
				if err := os.WriteFile(pathBefore, wholeBefore, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(path, append(whole[:cut:cut], rest...), 0o600); err != nil {
				t.Fatal(err)
			}
			torn, err := Open(Config{Dir: dir, SegmentBytes: 2 << 10})
			if err != nil {
				t.Fatal(err)
			}
			end := cut
			for end > 0 && ends[end] == (tally{}) {
				end--
			}
			want := ends[end]
			if end == 0 { // not even the header is left: the log ends with the segment before
				want = s.start
			}
			if torn.tail != want || torn.Repaired() != cut-end+int64(len(rest)) || torn.Epoch() != l.Epoch() {
				t.Fatalf("cut at %d: %+v, repaired %d; want %+v, %d", cut, torn.tail, torn.Repaired(), want, cut-end+int64(len(rest)))
			}
			if err := torn.Append(time.Now(), Entry{Kind: 2, Data: []byte("goes on")}); err != nil {
				t.Fatal(err)
			}
			r := torn.NewReader(want.sequence)
			if rec, ok, err := r.TryNext(); !ok || err != nil || string(rec.Data) != "goes on" || rec.Sequence != want.sequence+1 {
				t.Fatalf("cut at %d: %+v %v %v", cut, rec, ok, err)
			}
			if err := errors.Join(r.Close(), torn.Close()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestInterruptedRotation: the last segment's header is torn, in every way.
func TestInterruptedRotation(t *testing.T) {
	for n := range segmentHeaderSize + 1 {
		l := newLog(t, Config{SegmentBytes: 8 << 10})
		fill(t, l, 20)
		header := encodeSegmentHeader(l.epoch, l.tail)
		if n == segmentHeaderSize {
			n, header[40] = len(header), header[40]^1
		}
		before := files(t, l.dir)
		path := filepath.Join(l.dir, segmentName(21))
		if err := os.WriteFile(path, header[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		l = reopen(t, l)
		if l.Repaired() != int64(n) || l.Sequence() != 20 || !cmp.Equal(before, files(t, l.dir)) {
			t.Errorf("%d bytes: repaired %d, sequence %d, files %v", n, l.Repaired(), l.Sequence(), files(t, l.dir))
		}
		fill(t, l, 20)
		if gaps := readAll(t, l, 0); gaps != nil {
			t.Errorf("gaps %+v", gaps)
		}
	}
}
