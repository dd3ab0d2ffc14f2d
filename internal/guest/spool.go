package guest

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

// spool keeps what a command wrote until executord has it: the bytes of both
// streams in the order in which they were read, addressed by one position. It is
// bounded: when it is full the readers of the pipes wait, and so, by the pipe, does
// the program. It bridges the time while executord is away, it is not the log.
type spool struct {
	limit int64
	free  *buffers

	mu     sync.Mutex
	first  []chunk // from start on
	start  int64   // position of the first byte kept
	end    int64   // position behind the last byte
	exit   *guestv1.Exit
	firstT time.Time     // when the first byte came
	more   chan struct{} // closed and replaced when something was added
	room   chan struct{} // closed and replaced when something was given up
}

// chunk is a run of bytes of one stream: data of buf.
type chunk struct {
	stream guestv1.Stream
	buf    *buffer
	data   []byte
}

// errPosition refuses a position that is not between what was given up and the end.
var errPosition = errors.New("position is not in the spool")

func newSpool(limit int64, free *buffers) *spool {
	return &spool{limit: limit, free: free, more: make(chan struct{}), room: make(chan struct{})}
}

// append adds the first n bytes of b, which it takes over together with the
// caller's reference. It waits while the spool is full.
func (s *spool) append(stream guestv1.Stream, b *buffer, n int) {
	s.mu.Lock()
	for s.end-s.start >= s.limit {
		room := s.room
		s.mu.Unlock()
		<-room
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	if s.end == 0 {
		s.firstT = time.Now()
	}
	// A trickle of small writes is gathered in the buffer it began in, so that the
	// number of chunks does not grow with the number of writes.
	if last := len(s.first) - 1; last >= 0 && s.first[last].stream == stream && n <= cap(s.first[last].data)-len(s.first[last].data) && n <= 4<<10 {
		s.first[last].data = append(s.first[last].data, b.bytes[:n]...)
		b.release()
	} else {
		s.first = append(s.first, chunk{stream: stream, buf: b, data: b.bytes[:n]})
	}
	s.end += int64(n)
	close(s.more)
	s.more = make(chan struct{})
}

// finish records the end; after it nothing is added.
func (s *spool) finish(exit *guestv1.Exit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exit = exit
	close(s.more)
	s.more = make(chan struct{})
}

// firstOutput is when the first byte came; false if none did.
func (s *spool) firstOutput() (time.Time, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.firstT, s.end > 0
}

// piece is a part of the spool that is being sent: it holds its buffer.
type piece struct {
	stream guestv1.Stream
	buf    *buffer
	data   []byte
}

// read gives up everything before position and returns at most max bytes from it
// on, and the exit if they reach the end of all output. With nothing there it
// returns the channel that is closed when there may be something. The caller
// releases the pieces.
func (s *spool) read(position int64, max int) (pieces []piece, exit *guestv1.Exit, wait <-chan struct{}, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if position < s.start || position > s.end {
		return nil, nil, nil, errPosition
	}
	if position > s.start {
		s.giveUp(position)
	}
	for _, c := range s.first {
		if max == 0 {
			break
		}
		data := c.data[:min(len(c.data), max):min(len(c.data), max)]
		c.buf.hold()
		pieces = append(pieces, piece{stream: c.stream, buf: c.buf, data: data})
		max -= len(data)
		position += int64(len(data))
	}
	if position == s.end && s.exit != nil {
		exit = s.exit
	}
	if len(pieces) == 0 && exit == nil {
		wait = s.more
	}
	return pieces, exit, wait, nil
}

// giveUp forgets what lies before position.
func (s *spool) giveUp(position int64) {
	n := position - s.start
	for n > 0 {
		c := &s.first[0]
		if int64(len(c.data)) > n {
			c.data = c.data[n:]
			break
		}
		n -= int64(len(c.data))
		c.buf.release()
		s.first[0] = chunk{}
		s.first = s.first[1:]
	}
	if len(s.first) == 0 {
		s.first = nil
	}
	s.start = position
	close(s.room)
	s.room = make(chan struct{})
}

// discard gives everything up.
func (s *spool) discard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.giveUp(s.end)
}

// buffers is a bounded stock of large buffers, so that a flood of output does not
// make the collector run all the time. Its zero value is ready.
type buffers struct {
	stock chan *buffer
}

// buffer is a piece of memory that several may hold; the last to release it gives
// it back.
type buffer struct {
	bytes []byte
	home  *buffers
	refs  atomic.Int32
}

func newBuffers(n int) *buffers { return &buffers{stock: make(chan *buffer, n)} }

// get returns a buffer of size bytes, held once.
func (bs *buffers) get(size int) *buffer {
	if size >= largeBuffer {
		select {
		case b := <-bs.stock:
			b.refs.Store(1)
			return b
		default:
		}
	}
	b := &buffer{bytes: make([]byte, size), home: bs}
	b.refs.Store(1)
	return b
}

func (b *buffer) hold() { b.refs.Add(1) }

func (b *buffer) release() {
	if b.refs.Add(-1) == 0 && len(b.bytes) == largeBuffer {
		select {
		case b.home.stock <- b:
		default:
		}
	}
}
