package eventlog

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

func TestReadStream(t *testing.T) {
	l := newLog(t, Config{SegmentBytes: 128 << 10})
	fill(t, l, 400)
	check := func(t *testing.T, l *Log) {
		for i, want := range streamsUpTo(l.Sequence()) {
			s, random := Stream(i+1), randomFor(uint64(i))
			offsets := []int64{0, 1, int64(len(want)) - 1}
			for range 100 {
				offsets = append(offsets, random.Int64N(int64(len(want))))
			}
			for _, segment := range l.segments {
				offsets = append(offsets, segment.start.streams[i].size)
			}
			for _, offset := range offsets {
				p := make([]byte, 1+random.IntN(200<<10))
				n, err := l.ReadStream(s, offset, p)
				if err != nil || n != min(len(p), len(want)-int(offset)) || !bytes.Equal(p[:n], want[offset:][:n]) {
					t.Fatalf("stream %d, %d bytes at %d: %d, %v", s, len(p), offset, n, err)
				}
			}
			for _, offset := range []int64{int64(len(want)), int64(len(want)) + 1, 1 << 62} {
				if n, err := l.ReadStream(s, offset, make([]byte, 5)); n != 0 || !errors.Is(err, io.EOF) {
					t.Errorf("stream %d at %d: %d, %v", s, offset, n, err)
				}
			}
			all, err := io.ReadAll(&streamReader{log: l, stream: s})
			if err != nil || !bytes.Equal(all, want) {
				t.Errorf("stream %d: read %d bytes of %d, %v", s, len(all), len(want), err)
			}
		}
	}
	t.Run("being written", func(t *testing.T) { check(t, l) })
	t.Run("reopened", func(t *testing.T) {
		l = reopen(t, l)
		check(t, l)
	})
	t.Run("refused", func(t *testing.T) {
		for _, s := range []Stream{0, 3, 255} {
			if _, err := l.ReadStream(s, 0, make([]byte, 1)); err == nil {
				t.Errorf("stream %d was read", s)
			}
		}
		if _, err := l.ReadStream(Stdout, -1, make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("a negative offset: %v", err)
		}
	})
	t.Run("nothing asked for", func(t *testing.T) {
		if n, err := l.ReadStream(Stdout, 0, nil); n != 0 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	})
	t.Run("no output", func(t *testing.T) {
		l := newLog(t, Config{})
		if n, err := l.ReadStream(Stdout, 0, make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("%d, %v", n, err)
		}
		if err := l.Append(timeOf(1), Entry{Kind: KindOutput, Stream: Stdout}, Entry{Kind: KindOutput, Stream: Stderr, Data: []byte("e")}); err != nil {
			t.Fatal(err)
		}
		if n, err := l.ReadStream(Stdout, 0, make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("after an empty record: %d, %v", n, err)
		}
	})
}

// streamReader reads a stream to its present end.
type streamReader struct {
	log    *Log
	stream Stream
	offset int64
}

func (r *streamReader) Read(p []byte) (int, error) {
	n, err := r.log.ReadStream(r.stream, r.offset, p)
	r.offset += int64(n)
	return n, err
}

// TestMarks: nobody reads a whole segment to find a place near its end.
func TestMarks(t *testing.T) {
	l := newLog(t, Config{})
	// Two streams, of which one is silent for long; small and large records.
	for l.size < 20<<20 {
		e := Entry{Kind: KindOutput, Stream: Stdout, Data: make([]byte, 20000+l.Sequence()%10000)}
		if l.Sequence()%300 == 0 {
			e.Stream = Stderr
		}
		if err := l.Append(timeOf(1), e, Entry{Kind: 2}); err != nil {
			t.Fatal(err)
		}
	}
	if len(l.segments) != 3 {
		t.Fatalf("%d segments", len(l.segments))
	}
	const most = markStep + MaxData + 2*recordHeaderSize
	check := func(t *testing.T, l *Log) {
		t.Helper()
		for _, s := range l.segments {
			if least, got := int((s.end-segmentHeaderSize)/most), len(s.marks); got < least || got > least+5 {
				t.Errorf("segment of %d bytes has %d marks", s.end, got)
			}
			for i, m := range s.marks[1:] {
				if before := s.marks[i]; m.position < before.position+markStep || m.position > before.position+most {
					t.Errorf("mark at %d follows one at %d", m.position, before.position)
				}
			}
		}
		for sequence := uint64(1); sequence <= l.Sequence(); sequence += 13 {
			p, err := l.locate(sequence)
			if err != nil || p.segment == nil {
				t.Fatal(p, err)
			}
			if walked := walk(t, l, p, func(r record) bool { return r.sequence == sequence }); walked > most {
				t.Errorf("walked over %d bytes to %d", walked, sequence)
			}
		}
		_, stderr := l.Totals()
		for _, s := range []Stream{Stdout, Stderr} {
			for offset := int64(0); offset < stderr.Size; offset += 1000 {
				p, err := l.locateOffset(s, offset)
				if err != nil || p.segment == nil {
					t.Fatal(p, err)
				}
				walked := walk(t, l, p, func(r record) bool {
					return r.stream == s && offset >= r.offset && offset < r.offset+int64(len(r.data))
				})
				if walked > most {
					t.Errorf("walked over %d bytes to %d of stream %d", walked, offset, s)
				}
			}
		}
	}
	check(t, l)
	l = reopen(t, l)
	last := l.active()
	for _, s := range l.segments {
		if (len(s.marks) > 1) != (s == last) {
			t.Errorf("after Open, there are %d marks in segment %d", len(s.marks), s.base)
		}
	}
	// Two readers make the marks of the first segment, ReadStream those of the second.
	one, two := l.NewReader(0), l.NewReader(0)
	for range l.segments[1].base {
		for _, r := range []*Reader{one, two} {
			if _, ok, err := r.TryNext(); !ok || err != nil {
				t.Fatal(ok, err)
			}
		}
	}
	if err := errors.Join(one.Close(), two.Close()); err != nil {
		t.Fatal(err)
	}
	if len(l.segments[0].marks) == 1 {
		t.Error("there are no marks where a reader walked")
	}
	for offset := l.segments[1].start.streams[0].size; offset < l.segments[2].start.streams[0].size; offset += 1 << 20 {
		if _, err := l.ReadStream(Stdout, offset, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.ReadStream(Stdout, l.segments[2].start.streams[0].size-1, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	check(t, l)
}

// walk says how many bytes lie between a place and the record that is looked for.
func walk(t *testing.T, l *Log, p place, found func(record) bool) int64 {
	t.Helper()
	c := cursor{log: &Log{}, reuse: true} // another Log, so that no marks are made
	if err := c.open(p); err != nil {
		t.Fatal(err)
	}
	defer c.close()
	c.marked = 1 << 62
	for {
		position := c.position
		r, err := c.next()
		if err != nil {
			t.Fatal(err)
		}
		if found(r) {
			return position - p.mark.position
		}
	}
}
