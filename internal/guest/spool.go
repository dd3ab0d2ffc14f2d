package guest

import (
	"errors"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

// chunkBytes is what one chunk costs beside its bytes. It counts against the limit,
// or a program that writes single bytes to either stream in turn would make the
// guest hold many times its limit.
const chunkBytes = 48

// spool keeps what a command wrote until executord has it: the bytes of both
// streams in the order in which they were read, addressed by one position. It is
// bounded: when it is full the readers of the pipes wait, and so, by the pipe, does
// the program. It bridges the time while executord is away, it is not the log.
type spool struct {
	limit int64

	mu      sync.Mutex
	chunks  []chunk // from start on
	start   int64   // position of the first byte kept
	end     int64   // position behind the last byte
	exit    *guestv1.Exit
	firstAt time.Time // when the first byte came
	lastAt  time.Time // when the last byte came
	given   int64     // bytes that were given up unread
	closed  bool      // what comes is given up
	waiting int       // sources that wait for room
	more    wakeup    // something was added, or the end
	room    wakeup    // something was given up
}

// chunk is a run of bytes of one stream, from the offset from to the offset to of a
// block, which it holds.
type chunk struct {
	stream   guestv1.Stream
	block    *block
	from, to int32
}

func (c chunk) size() int64 { return int64(c.to - c.from) }

// wakeup wakes all who wait for the next time that something happens. Its spool's
// lock guards it.
type wakeup struct{ next chan struct{} }

func (w *wakeup) wait() <-chan struct{} {
	if w.next == nil {
		w.next = make(chan struct{})
	}
	return w.next
}

func (w *wakeup) wake() {
	if w.next != nil {
		close(w.next)
		w.next = nil
	}
}

// errPosition refuses a position that is not between what was given up and the end.
var errPosition = errors.New("is not in the spool")

func newSpool(limit int64) *spool { return &spool{limit: limit} }

// used is how much of the limit is taken.
func (s *spool) used() int64 { return s.end - s.start + int64(len(s.chunks))*chunkBytes }

// source is where the bytes of one stream come into a spool. It is for one
// goroutine. What it reads goes from the pipe straight into the block in which it is
// kept: the blocks of the two streams are apart, so that neither waits for the other.
type source struct {
	spool  *spool
	stream guestv1.Stream
	stock  *stock
	block  *block // where the next bytes go, held by the source; nil at first
	used   int
	size   int // of the next block
}

func newSource(s *spool, stream guestv1.Stream, stock *stock) *source {
	return &source{spool: s, stream: stream, stock: stock, size: smallestBlock}
}

// space waits until the spool has room and returns memory for the next bytes. It is
// never less than a whole pipe buffer: of a pipe in packet mode a shorter read would
// lose the rest of the packet.
func (w *source) space() []byte {
	room := w.spool.awaitRoom()
	if w.block == nil || len(w.block.bytes)-w.used < pipeBuffer {
		if w.block != nil {
			w.block.release()
		}
		w.block, w.used = w.stock.get(w.size), 0
	}
	free := w.block.bytes[w.used:]
	return free[:min(int64(len(free)), max(room, pipeBuffer))]
}

// commit adds the first n bytes of what space returned.
func (w *source) commit(n int) {
	if n == 0 {
		return
	}
	// The next block is large for a source that fills what it gets, and small for one
	// that trickles: a block is held as long as one byte of it is.
	if w.used+n == len(w.block.bytes) {
		w.size = min(w.size*4, largestBlock)
	} else if n < pipeBuffer {
		w.size = smallestBlock
	}
	w.spool.add(chunk{w.stream, w.block, int32(w.used), int32(w.used + n)})
	w.used += n
}

// close gives up the source's own block.
func (w *source) close() {
	if w.block != nil {
		w.block.release()
		w.block = nil
	}
}

// awaitRoom waits while the spool is full and returns how much goes in.
func (s *spool) awaitRoom() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.used() >= s.limit {
		s.waiting++
		room := s.room.wait()
		s.mu.Unlock()
		<-room
		s.mu.Lock()
		s.waiting--
	}
	return s.limit - s.used()
}

// add puts a chunk behind the others.
func (s *spool) add(c chunk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lastAt = time.Now()
	if s.end == 0 {
		s.firstAt = s.lastAt
	}
	s.end += c.size()
	if s.closed {
		s.given += c.size()
		s.start = s.end
		return
	}
	// What follows in the same block lengthens the chunk, so that a trickle of small
	// writes makes no more chunks than a flood.
	if n := len(s.chunks); n > 0 && s.chunks[n-1].block == c.block && s.chunks[n-1].to == c.from {
		s.chunks[n-1].to = c.to
	} else {
		c.block.hold()
		s.chunks = append(s.chunks, c)
	}
	s.more.wake()
}

// finish records the end; after it nothing is added.
func (s *spool) finish(exit *guestv1.Exit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exit = exit
	s.more.wake()
}

// finished says whether the end is recorded.
func (s *spool) finished() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exit != nil
}

// firstOutput is when the first byte came; false if none did.
func (s *spool) firstOutput() (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.firstAt, s.end > 0
}

// written is how many bytes came in so far.
func (s *spool) written() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end
}

// lastOutput is when the last byte came; false if none did.
func (s *spool) lastOutput() (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lastAt, s.end > 0
}

// full says whether a source waits for room.
func (s *spool) full() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting > 0
}

// discardFrom gives up what is there from position on and all that comes. What lies
// before position has been read.
func (s *spool) discardFrom(position int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	s.given = s.end - min(max(position, s.start), s.end)
	s.giveUp(s.end)
	s.more.wake()
}

// discarding says whether what comes is given up.
func (s *spool) discarding() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// givenUp is how much was given up unread because executord said so.
func (s *spool) givenUp() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return uint64(s.given)
}

// blocked returns a channel that is closed when something is given up, if a source
// waits for that and fewer than bytes came in so far; else nil.
func (s *spool) blocked(bytes int64) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting == 0 || s.end >= bytes {
		return nil
	}
	return s.room.wait()
}

// piece is a part of the spool that is being sent: it holds its block.
type piece struct {
	stream guestv1.Stream
	block  *block
	data   []byte
}

// read gives up everything before position and returns at most limit bytes from it
// on, and the exit if they reach the end of all output. With nothing there it
// returns the channel that is closed when there may be something. The caller
// releases the pieces' blocks.
func (s *spool) read(position, limit int64) (pieces []piece, exit *guestv1.Exit, wait <-chan struct{}, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		position = s.end
	}
	if position < s.start || position > s.end {
		return nil, nil, nil, errPosition
	}
	if position > s.start {
		s.giveUp(position)
	}
	for _, c := range s.chunks {
		if limit == 0 || len(pieces) == wire.MaxChunks {
			break
		}
		n := min(c.size(), limit)
		c.block.hold()
		to := int64(c.from) + n
		pieces = append(pieces, piece{c.stream, c.block, c.block.bytes[c.from:to:to]})
		limit -= n
		position += n
	}
	if position == s.end && s.exit != nil {
		exit = s.exit
	}
	if len(pieces) == 0 && exit == nil {
		wait = s.more.wait()
	}
	return pieces, exit, wait, nil
}

// giveUp forgets what lies before position.
func (s *spool) giveUp(position int64) {
	n := position - s.start
	gone := 0
	for n > 0 {
		c := &s.chunks[gone]
		if c.size() > n {
			c.from += int32(n)
			break
		}
		n -= c.size()
		c.block.release()
		c.block = nil
		gone++
	}
	s.chunks = s.chunks[gone:]
	if len(s.chunks) == 0 {
		s.chunks = nil
	}
	s.start = position
	s.room.wake()
}

// discard gives everything up.
func (s *spool) discard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.giveUp(s.end)
}
