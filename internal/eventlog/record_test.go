package eventlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func encodeRecord(r record) []byte {
	b := append(appendHeader(nil, &r), r.data...)
	setCRC(b, checksum(0, b[4:]))
	return b
}

func TestChecksums(t *testing.T) {
	if got := checksum(0, []byte("123456789")); got != 0xe3069283 { // the check value of CRC-32C
		t.Errorf("%08x", got)
	}
	var c checksums
	for n := range 100 {
		random := randomFor(uint64(n))
		record, stream := random.Uint32(), random.Uint32()
		if n < 2 {
			record, stream = uint32(-n), 0
		}
		size := MaxData - max(0, random.IntN(4)-2)
		data := randomBytes(random, size)
		gotRecord, gotStream := c.update(record, stream, data)
		if gotRecord != checksum(record, data) || gotStream != checksum(stream, data) {
			t.Fatalf("%d bytes behind %08x and %08x: %08x and %08x", size, record, stream, gotRecord, gotStream)
		}
	}
}

func TestRecord(t *testing.T) {
	for _, want := range []record{
		{sequence: 1, kind: 2, data: []byte{}},
		{sequence: 1<<64 - 1, time: -1, kind: 255, flags: flagLast, data: []byte("x")},
		{sequence: 7, time: 1 << 60, offset: 1 << 61, kind: KindOutput, stream: Stdout, data: bytes.Repeat([]byte("0123456789abcdef"), MaxData/16)},
		{sequence: 7, kind: KindOutput, stream: Stderr, data: []byte("y")},
	} {
		b := encodeRecord(want)
		got, n, err := decodeRecord(append(b, "rest"...))
		if err != nil || n != len(b) || !cmp.Equal(got, want, cmp.AllowUnexported(record{})) {
			t.Errorf("%+v is read as %+v, %d bytes, %v", want, got, n, err)
		}
		if cap(got.data) != len(got.data) {
			t.Error("data reaches into what follows it")
		}
		for cut := range b {
			if _, _, err := decodeRecord(b[:cut]); !errors.Is(err, errShort) {
				t.Fatalf("%d of %d bytes: %v", cut, len(b), err)
			}
		}
	}
}

func TestRecordDamaged(t *testing.T) {
	good := record{sequence: 3, time: 4, offset: 5, kind: KindOutput, stream: Stderr, data: []byte("some data")}
	t.Run("any bit", func(t *testing.T) {
		b := encodeRecord(good)
		enough := append(b, make([]byte, MaxData)...)
		for bit := range 8 * len(b) {
			enough[bit/8] ^= 1 << (bit % 8)
			if _, _, err := decodeRecord(enough); !errors.Is(err, errDamaged) {
				t.Errorf("bit %d: %v", bit, err)
			}
			enough[bit/8] ^= 1 << (bit % 8)
		}
	})
	t.Run("zeros", func(t *testing.T) {
		if _, _, err := decodeRecord(make([]byte, 100)); !errors.Is(err, errDamaged) {
			t.Errorf("%v", err)
		}
	})
	for name, change := range map[string]func(*record){
		"no kind":                     func(r *record) { r.kind = 0 },
		"no stream":                   func(r *record) { r.stream = 0 },
		"unknown stream":              func(r *record) { r.stream = 3 },
		"unknown flags":               func(r *record) { r.flags = 2 },
		"stream of another kind":      func(r *record) { r.kind, r.offset = 2, 0 },
		"offset of another kind":      func(r *record) { r.kind, r.stream = 2, 0 },
		"more data than there may be": func(r *record) { r.data = make([]byte, MaxData+1) },
	} {
		r := good
		change(&r)
		if _, _, err := decodeRecord(encodeRecord(r)); !errors.Is(err, errDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSegmentHeader(t *testing.T) {
	e := epoch{1, 2, 3}
	want := tally{sequence: 41, time: 1 << 60, streams: [2]streamTally{{size: 1 << 40, crc: 77}, {size: 3, crc: 1<<32 - 1}}}
	b := encodeSegmentHeader(e, want)
	if len(b) != segmentHeaderSize {
		t.Fatalf("%d bytes", len(b))
	}
	gotEpoch, got, err := decodeSegmentHeader(b)
	if err != nil || gotEpoch != e || got != want {
		t.Errorf("%v %+v %v", gotEpoch, got, err)
	}
	for bit := range 8 * len(b) {
		b[bit/8] ^= 1 << (bit % 8)
		if _, _, err := decodeSegmentHeader(b); !errors.Is(err, errDamaged) {
			t.Errorf("bit %d: %v", bit, err)
		}
		b[bit/8] ^= 1 << (bit % 8)
	}
	for n := range b {
		if _, _, err := decodeSegmentHeader(b[:n]); !errors.Is(err, errDamaged) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	for name, bad := range map[string]tally{
		"sequence 0":                    {sequence: 1<<64 - 1},
		"a giant sequence":              {sequence: 1 << 63},
		"a negative size":               {streams: [2]streamTally{{size: -1}}},
		"bytes before the first record": {streams: [2]streamTally{{size: 1}}},
		"a size without end":            {streams: [2]streamTally{{}, {size: 1<<63 - 1}}},
	} {
		if _, _, err := decodeSegmentHeader(encodeSegmentHeader(e, bad)); !errors.Is(err, errDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// mend makes the CRCs of a segment right, so that a fuzzer gets behind them.
func mend(segment []byte) {
	if len(segment) < segmentHeaderSize {
		return
	}
	copy(segment, segmentMagic)
	binary.LittleEndian.PutUint32(segment[64:], checksum(0, segment[:64]))
	for b := segment[segmentHeaderSize:]; len(b) >= recordHeaderSize; {
		length := binary.LittleEndian.Uint32(b[4:]) % (MaxData + 1)
		length = min(length, uint32(len(b)-recordHeaderSize))
		binary.LittleEndian.PutUint32(b[4:], length)
		size := recordHeaderSize + int(length)
		binary.LittleEndian.PutUint32(b, checksum(0, b[4:size]))
		b = b[size:]
	}
}

func FuzzDecodeRecord(f *testing.F) {
	f.Add(encodeRecord(record{sequence: 1, kind: 2}), false)
	f.Add(encodeRecord(record{sequence: 1, time: 3, offset: 4, kind: KindOutput, stream: Stdout, flags: 1, data: []byte("abc")}), true)
	f.Fuzz(func(t *testing.T, b []byte, right bool) {
		if right {
			b = append(encodeSegmentHeader(epoch{}, tally{}), b...)
			mend(b)
			b = b[segmentHeaderSize:]
		}
		r, n, err := decodeRecord(b)
		if err != nil {
			if !errors.Is(err, errShort) && !errors.Is(err, errDamaged) {
				t.Errorf("%v", err)
			}
			return
		}
		if n > len(b) || !bytes.Equal(encodeRecord(r), b[:n]) {
			t.Errorf("%x is read as %+v", b, r)
		}
	})
}

// FuzzOpen opens a log of two segments with arbitrary content. Whatever it is, reading
// ends, nothing is invented, the log can be continued, and opening it again changes
// nothing.
func FuzzOpen(f *testing.F) {
	l := newLog(f, Config{SegmentBytes: 1 << 10})
	for n := uint64(1); len(l.segments) < 3 || l.tail.sequence < l.active().base; n++ {
		e := Entry{Kind: KindOutput, Stream: Stream(1 + n%2), Data: []byte("some output, which is longer than it must be")}
		if err := l.Append(timeOf(n), e, Entry{Kind: 2, Data: []byte("event")}); err != nil {
			f.Fatal(err)
		}
	}
	first, second := readFile(f, l.segments[0].path), readFile(f, l.segments[1].path)
	for _, right := range []bool{true, false} {
		f.Add(first, second, right)
		f.Add(first, []byte{}, right)
		f.Add(first[:len(first)/2], second, right)
		f.Add([]byte{}, second, right)
		f.Add(first, first, right)
		f.Add(append(first[:100:100], second...), second[:len(second)-9], right)
	}
	f.Fuzz(func(t *testing.T, first, second []byte, right bool) {
		dir := t.TempDir()
		first, second = bytes.Clone(first), bytes.Clone(second)
		written := 0
		for i, b := range [][]byte{first, second} {
			if right {
				mend(b)
			}
			base := uint64(1 + 20*i)
			if _, start, err := decodeSegmentHeader(b); err == nil {
				base = start.sequence + 1
			}
			if err := os.WriteFile(filepath.Join(dir, segmentName(base)), b, 0o600); err != nil {
				t.Fatal(err)
			}
			written += len(b)
		}
		l, err := Open(Config{Dir: dir})
		if errors.Is(err, ErrNoLog) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if n := readAny(t, l); n > written {
			t.Fatalf("read %d bytes of %d", n, written)
		}
		if !l.Sealed() {
			if err := l.Append(time.Now(), Entry{Kind: KindOutput, Stream: Stdout, Data: []byte("more")}, Entry{Kind: 3}); err != nil {
				t.Fatal(err)
			}
			if n := readAny(t, l); n > written+4 {
				t.Fatalf("read %d bytes of %d", n, written+4)
			}
		}
		tail, sealed := l.tail, l.sealed
		l = reopen(t, l)
		if l.tail != tail || l.Sealed() != sealed || l.Repaired() != 0 {
			t.Fatalf("reopened as %+v, %v, repaired %d; want %+v, %v", l.tail, l.Sealed(), l.Repaired(), tail, sealed)
		}
		readAny(t, l)
	})
}

// readAny reads a log of which nothing is known and returns how many bytes of data
// there were.
func readAny(t *testing.T, l *Log) (read int) {
	r := l.NewReader(0)
	defer r.Close()
	at, sizes := uint64(0), [2]int64{}
	for {
		rec, ok, err := r.TryNext()
		if errors.Is(err, io.EOF) && l.Sealed() || err == nil && !ok {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if gap := rec.Gap; gap != nil {
			if gap.MissingEvents == 0 || at+gap.MissingEvents != rec.Sequence {
				t.Fatalf("gap %+v from %d to %d", gap, at, rec.Sequence)
			}
			sizes = gap.Resume
		} else {
			if rec.Sequence != at+1 {
				t.Fatalf("%d follows %d", rec.Sequence, at)
			}
			// A header that contradicts the records before it is believed: its CRC is
			// right, and nobody but this test writes one.
			sizes = startSizes(l, rec.Sequence, sizes)
			if rec.Kind == KindOutput {
				if size := &sizes[rec.Stream-1]; rec.Offset != *size {
					t.Fatalf("record %d is at %d, want %d", rec.Sequence, rec.Offset, *size)
				}
				sizes[rec.Stream-1] += int64(len(rec.Data))
			}
			read += len(rec.Data)
		}
		at = rec.Sequence
	}
	stdout, stderr := l.Totals()
	sizes = startSizes(l, at+1, sizes)
	if at != l.Sequence() || sizes != [2]int64{stdout.Size, stderr.Size} {
		t.Fatalf("read to %d %v, want %d %d %d", at, sizes, l.Sequence(), stdout.Size, stderr.Size)
	}
	p := make([]byte, 50)
	for _, s := range []Stream{Stdout, Stderr} {
		for offset := int64(0); ; {
			n, err := l.ReadStream(s, offset, p)
			offset += int64(n)
			var dropped *DroppedError
			if errors.Is(err, io.EOF) {
				break
			}
			if errors.As(err, &dropped) && n == 0 && dropped.First > offset {
				offset = dropped.First
			} else if err != nil || n == 0 {
				t.Fatalf("stream %d at %d: %d, %v", s, offset, n, err)
			}
		}
	}
	return read
}

// startSizes is what a segment's header says, if one begins with that sequence.
func startSizes(l *Log, sequence uint64, otherwise [2]int64) [2]int64 {
	for _, s := range l.segments {
		if s.base == sequence && !s.broken {
			return s.start.sizes()
		}
	}
	return otherwise
}
