package eventlog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
)

// TestRandom does random things to a log and compares it with what it must contain.
func TestRandom(t *testing.T) {
	var recalled, read int
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			m, n := randomLog(t, rand.New(rand.NewPCG(seed, 1)))
			recalled, read = recalled+m, read+n
		})
	}
	if recalled < 1000 || read < 1000 {
		t.Errorf("%d records came from memory and %d from files: one way was hardly tried", recalled, read)
	}
}

// follower is a reader with what it must get next.
type follower struct {
	reader *Reader
	expected
}

// randomLog returns how many records readers got from memory and how many from files.
func randomLog(t *testing.T, random *rand.Rand) (recalled, read int) {
	cfg := Config{SegmentBytes: 1 << (10 + random.IntN(8))}
	if random.IntN(3) > 0 {
		cfg.RetainedBytes = cfg.SegmentBytes * int64(1+random.IntN(10))
	}
	l := newLog(t, cfg)
	epoch, retained := l.Epoch(), cfg.RetainedBytes > 0
	var streams [2][]byte
	sequence := uint64(0)
	var followers []*follower
	defer func() {
		for _, f := range followers {
			_ = f.reader.Close()
		}
	}()
	grown := func(n int) {
		for range n {
			sequence++
			if e := entryOf(sequence); e.Kind == KindOutput {
				streams[e.Stream-1] = append(streams[e.Stream-1], e.Data...)
			}
		}
	}
	for range 150 {
		switch random.IntN(8) {
		case 0, 1, 2: // append
			n := 1 + random.IntN(20)
			if err := appendNext(l, n); err != nil {
				t.Fatal(err)
			}
			grown(n)
		case 3: // a reader from anywhere
			after := random.Uint64N(sequence + 1)
			f := &follower{reader: l.NewReader(after)}
			f.advance(after)
			followers = append(followers, f)
		case 4, 5: // a reader reads, some of what is there or all
			if len(followers) == 0 {
				continue
			}
			f := followers[random.IntN(len(followers))]
			most := random.IntN(60)
			if random.IntN(2) == 0 {
				most = all
			}
			for range most {
				rec, ok, err := f.reader.TryNext()
				if err != nil {
					t.Fatal(err)
				}
				if !ok {
					if f.sequence != sequence {
						t.Fatalf("a reader ends at %d of %d", f.sequence, sequence)
					}
					break
				}
				f.check(t, rec)
				if f.reader.fromMemory() {
					recalled++
				} else {
					read++
				}
				if rec.Gap != nil && (!retained || rec.Gap.Reason != GapRetention) {
					t.Fatalf("gap %+v", rec.Gap)
				}
			}
		case 6: // bytes of a stream
			s := random.IntN(2)
			stdout, stderr := l.Totals()
			total := []Total{stdout, stderr}[s]
			offset := random.Int64N(total.Size + 1)
			p := make([]byte, random.IntN(100<<10)+1)
			n, err := l.ReadStream(Stream(s+1), offset, p)
			var dropped *DroppedError
			switch {
			case offset < total.Dropped:
				if !errors.As(err, &dropped) || dropped.First != total.Dropped {
					t.Fatalf("offset %d of %+v: %v", offset, total, err)
				}
			case offset == total.Size:
				if !errors.Is(err, io.EOF) {
					t.Fatalf("offset %d of %+v: %v", offset, total, err)
				}
			case err != nil || n != min(len(p), int(total.Size-offset)) || !bytes.Equal(p[:n], streams[s][offset:][:n]):
				t.Fatalf("offset %d of %+v: %d, %v", offset, total, n, err)
			}
		case 7: // the process ends in the middle of an Append, or not
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			n := 1 + random.IntN(5)
			var torn []byte
			before, ends := l.tail, []int{0}
			for i := range n {
				e := entryOf(sequence + 1 + uint64(i))
				r := record{sequence: sequence + 1 + uint64(i), time: 7, kind: e.Kind, stream: e.Stream, data: e.Data}
				if e.Kind == KindOutput {
					st := &before.streams[e.Stream.index()]
					r.offset, st.size = st.size, st.size+int64(len(e.Data))
				}
				torn = append(torn, encodeRecord(r)...)
				ends = append(ends, len(torn))
			}
			torn = torn[:random.IntN(len(torn)+1)]
			appendFile(t, l.active().path, torn)
			complete := 0
			for complete+1 < len(ends) && ends[complete+1] <= len(torn) {
				complete++
			}
			old := l
			l = openLog(t, cfg.in(l.dir))
			if l.Sequence() != sequence+uint64(complete) || l.Repaired() != int64(len(torn)-ends[complete]) {
				t.Fatalf("sequence %d, want %d + %d; repaired %d", l.Sequence(), sequence, complete, l.Repaired())
			}
			grown(complete)
			for _, f := range followers {
				if _, _, err := f.reader.TryNext(); !errors.Is(err, ErrClosed) {
					t.Fatalf("a reader of a closed log: %v", err)
				}
				f.reader = l.NewReader(f.sequence)
			}
			if n := openFiles(t, old.dir); n != 0 {
				t.Fatalf("%d files are open", n)
			}
		}
		checkRecent(t, l)
		if l.Sequence() != sequence || l.Epoch() != epoch {
			t.Fatalf("sequence %d, want %d; epoch %s, want %s", l.Sequence(), sequence, l.Epoch(), epoch)
		}
	}
	new(expected).checkTotals(t, l)
	if gaps := readAll(t, l, 0); len(gaps) > 1 || len(gaps) > 0 && !retained {
		t.Errorf("gaps %+v", gaps)
	}
	return recalled, read
}

func (cfg Config) in(dir string) Config {
	cfg.Dir = dir
	return cfg
}
