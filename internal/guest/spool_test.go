package guest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

const (
	stdout = guestv1.Stream_STREAM_STDOUT
	stderr = guestv1.Stream_STREAM_STDERR
)

// put writes data into a spool as a pump would.
func put(w *source, data []byte) {
	for len(data) > 0 {
		n := copy(w.space(), data)
		w.commit(n)
		data = data[n:]
	}
}

// mark is a byte with its stream.
type mark struct {
	stream guestv1.Stream
	value  byte
}

// marksOf spreads pieces out and releases them.
func marksOf(pieces []piece) []mark {
	var all []mark
	for _, p := range pieces {
		for _, b := range p.data {
			all = append(all, mark{p.stream, b})
		}
		p.block.release()
	}
	return all
}

func equal(a, b []mark) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

// TestSpoolAgainstModel does random things to a spool and to a plain list of bytes.
func TestSpoolAgainstModel(t *testing.T) {
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 0))
		stock := newStock(2)
		s := newSpool(64 << 10)
		sources := []*source{newSource(s, stdout, stock), newSource(s, stderr, stock)}
		var model []mark
		start := 0
		for range 300 {
			switch r.IntN(4) {
			case 0, 1: // something is written, if there is room
				if s.used() >= s.limit {
					continue
				}
				w := sources[r.IntN(2)]
				space := w.space()
				if len(space) < pipeBuffer {
					t.Fatalf("seed %d: space of %d bytes", seed, len(space))
				}
				n := r.IntN(1 + min(len(space), 1<<r.IntN(18)))
				for i := range n {
					space[i] = byte(r.Uint32())
					model = append(model, mark{w.stream, space[i]})
				}
				w.commit(n)
			case 2: // a read that is allowed
				position := start + r.IntN(len(model)-start+1)
				limit := 1 + r.IntN(1<<r.IntN(18))
				pieces, exit, wait, err := s.read(int64(position), int64(limit))
				if err != nil || exit != nil || (wait != nil) != (len(pieces) == 0) {
					t.Fatalf("seed %d: read at %d of %d to %d: %v, %v", seed, position, start, len(model), exit, err)
				}
				start = position
				got := marksOf(pieces)
				want := model[position:min(position+limit, len(model))]
				if len(pieces) == wire.MaxChunks {
					want = want[:len(got)]
				}
				if !equal(got, want) {
					t.Fatalf("seed %d: read %d at %d: %d bytes that are not the %d written", seed, limit, position, len(got), len(want))
				}
			case 3: // a read that is not
				position := int64(len(model) + 1 + r.IntN(100))
				if start > 0 && r.IntN(2) == 0 {
					position = int64(r.IntN(start))
				}
				if pieces, _, _, err := s.read(position, 10); !errors.Is(err, errPosition) || pieces != nil {
					t.Fatalf("seed %d: read at %d of %d to %d: %v", seed, position, start, len(model), err)
				}
			}
		}
		exit := &guestv1.Exit{}
		s.finish(exit)
		for start < len(model) {
			pieces, end, _, err := s.read(int64(start), 5000)
			if got := marksOf(pieces); err != nil || !equal(got, model[start:start+len(got)]) || (end != nil) != (start+len(got) == len(model)) {
				t.Fatalf("seed %d: the rest at %d: %d bytes, %v, %v", seed, start, len(got), end, err)
			} else {
				start += len(got)
			}
		}
		for range 2 {
			if pieces, end, _, err := s.read(int64(start), 1); len(pieces) > 0 || end != exit || err != nil {
				t.Fatalf("seed %d: the end: %v, %v", seed, end, err)
			}
		}
	}
}

// TestSpoolHoldsLittle fills spools in ways that differ in what they cost to keep.
func TestSpoolHoldsLittle(t *testing.T) {
	for name, sizes := range map[string][2]int{
		"single bytes in turn":   {1, 1},
		"one stream in bytes":    {1, 0},
		"half blocks":            {pipeBuffer + 1, 0},
		"packets in turn":        {pipeBuffer, pipeBuffer},
		"a flood and a trickle":  {largestBlock, 1},
		"floods":                 {largestBlock, largestBlock},
		"just over half a block": {largestBlock/2 + 1, 3},
	} {
		t.Run(name, func(t *testing.T) {
			stock := newStock(stockBlocks)
			s := newSpool(spoolBytes)
			sources := []*source{newSource(s, stdout, stock), newSource(s, stderr, stock)}
			for s.used() < s.limit {
				for i, w := range sources {
					if s.used() < s.limit && sizes[i] > 0 {
						w.commit(min(sizes[i], len(w.space())))
					}
				}
			}
			held := make(map[*block]bool)
			for _, c := range s.chunks {
				held[c.block] = true
			}
			for _, w := range sources {
				held[w.block] = true
			}
			total := cap(s.chunks) * chunkBytes / 2 // the size of a chunk on any machine
			for b := range held {
				if b != nil {
					total += len(b.bytes)
				}
			}
			if bound := 5 * spoolBytes / 2; total > bound {
				t.Errorf("%d bytes are held for %d of output in %d chunks", total, s.end, len(s.chunks))
			}
			if s.end > spoolBytes+2*largestBlock {
				t.Errorf("%d bytes of output went in", s.end)
			}
		})
	}
}

// TestSpoolConcurrently writes both streams while pieces are being read, as they are
// while they are being sent; the race detector looks on.
func TestSpoolConcurrently(t *testing.T) {
	const size = 2 << 20
	stock := newStock(stockBlocks)
	s := newSpool(200 << 10)
	var writers, readers sync.WaitGroup
	for i, stream := range []guestv1.Stream{stdout, stderr} {
		writers.Go(func() {
			w := newSource(s, stream, stock)
			defer w.close()
			r := rand.New(rand.NewPCG(1, uint64(i)))
			for data := randomBytes(i, size); len(data) > 0; {
				n := copy(w.space(), data[:min(len(data), 1+r.IntN(1<<r.IntN(18)))])
				w.commit(n)
				data = data[n:]
			}
		})
	}
	readers.Go(func() {
		writers.Wait()
		s.finish(&guestv1.Exit{})
	})
	var got [2][]byte
	position := int64(0)
	for r := rand.New(rand.NewPCG(2, 2)); ; {
		pieces, exit, wait, err := s.read(position, 1+int64(r.IntN(300<<10)))
		if err != nil {
			t.Fatal(err)
		}
		if wait != nil {
			<-wait
			continue
		}
		again, _, _, err := s.read(position, 1<<20) // a repeat over another pipe
		if err != nil {
			t.Fatal(err)
		}
		var first, second [2][]byte
		for _, p := range pieces {
			first[p.stream-1] = append(first[p.stream-1], p.data...)
			position += int64(len(p.data))
			p.block.release()
		}
		for _, p := range again {
			second[p.stream-1] = append(second[p.stream-1], p.data...)
			p.block.release()
		}
		for i := range got {
			got[i] = append(got[i], first[i]...)
			if n := min(len(first[i]), len(second[i])); !bytes.Equal(first[i][:n], second[i][:n]) {
				t.Fatal("a repeated read differs")
			}
		}
		if exit != nil {
			break
		}
	}
	readers.Wait()
	for i := range got {
		if !bytes.Equal(got[i], randomBytes(i, size)) {
			t.Errorf("stream %d: %d bytes that are not those written", i+1, len(got[i]))
		}
	}
}

func TestSpoolWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSpool(10 << 10)
		w := newSource(s, stdout, newStock(1))
		_, _, more, err := s.read(0, 10)
		if err != nil || more == nil {
			t.Fatalf("an empty spool: %v, %v", more, err)
		}
		put(w, make([]byte, 9<<10))
		<-more
		if s.blocked(1<<20) != nil {
			t.Error("nobody waits for room, and somebody is said to")
		}
		begun := time.Now()
		var writer sync.WaitGroup
		writer.Go(func() {
			put(w, make([]byte, 64<<10))
			w.close()
			s.finish(&guestv1.Exit{})
		})
		synctest.Wait()
		if s.blocked(1<<20) == nil || s.blocked(1) != nil {
			t.Error("a source waits for room, and it is not told, or told beyond the bound")
		}
		if n := s.written(); n < 10<<10 || n > 10<<10+pipeBuffer {
			t.Errorf("%d bytes went into a spool of 10 KiB", n)
		}
		total := int64(9<<10 + 64<<10)
		for position, room := int64(0), s.blocked(1<<20); ; {
			time.Sleep(time.Second) // a slow reader
			pieces, exit, wait, err := s.read(position, 4<<10)
			if err != nil || wait != nil {
				t.Fatal(wait, err)
			}
			position += int64(len(marksOf(pieces)))
			if exit != nil {
				if position != total {
					t.Errorf("the end at %d of %d", position, total)
				}
				break
			}
			if position > 8<<10 {
				<-room // closed by the first read that gave something up
			}
			synctest.Wait()
		}
		writer.Wait()
		if took := time.Since(begun); took < 18*time.Second {
			t.Errorf("the writer did not wait for the reader: %v", took)
		}
		if at, ok := s.firstOutput(); !ok || !at.Equal(begun) {
			t.Errorf("first output at %v, %v", at, ok)
		}
	})
}

func TestSpoolDiscard(t *testing.T) {
	stock := newStock(4)
	s := newSpool(spoolBytes)
	w := newSource(s, stdout, stock)
	put(w, make([]byte, 600<<10))
	w.close()
	pieces, _, _, err := s.read(0, 600<<10)
	if err != nil {
		t.Fatal(err)
	}
	s.finish(&guestv1.Exit{})
	s.discard()
	if len(stock.blocks) != 0 {
		t.Error("blocks that are being sent were given back")
	}
	if n := len(marksOf(pieces)); n != 600<<10 {
		t.Errorf("%d bytes", n)
	}
	if len(stock.blocks) != 4 {
		t.Errorf("%d blocks were kept of a flood, want 4", len(stock.blocks))
	}
	b := stock.get(largestBlock)
	if len(stock.blocks) != 3 || b.refs.Load() != 1 {
		t.Error("a block of the stock was not used")
	}
	b.release()
	stock.empty()
	if len(stock.blocks) != 0 {
		t.Error("the stock is not empty")
	}
	if _, _, _, err := s.read(0, 1); !errors.Is(err, errPosition) {
		t.Errorf("what was discarded can be read: %v", err)
	}
}

// TestBlockSizes follows the blocks of a source that trickles, floods and trickles.
func TestBlockSizes(t *testing.T) {
	s := newSpool(64 << 20)
	w := newSource(s, stdout, newStock(1))
	sizes := func(n, times int) (last int) {
		for range times {
			put(w, make([]byte, n))
		}
		return len(w.block.bytes)
	}
	if got := sizes(10, 2000); got != smallestBlock {
		t.Errorf("a trickle is put into blocks of %d", got)
	}
	if got := sizes(largestBlock, 4); got != largestBlock {
		t.Errorf("a flood is put into blocks of %d", got)
	}
	if got := sizes(10, largestBlock/10); got != smallestBlock {
		t.Errorf("a trickle after a flood is put into blocks of %d", got)
	}
}
