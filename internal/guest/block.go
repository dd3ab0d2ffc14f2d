package guest

import "sync/atomic"

const (
	// pipeBuffer is the size of one buffer of a pipe, which a packet may fill.
	pipeBuffer = 4 << 10
	// smallestBlock is enough for nearly all commands there are.
	smallestBlock = 2 * pipeBuffer
	// largestBlock takes what a fast writer has in its pipe.
	largestBlock = 128 << 10
)

// block is memory for output. Several may hold it; the last to release it gives it
// back. Its bytes are written once, by one source, before they are told to others.
type block struct {
	bytes []byte
	stock *stock
	refs  atomic.Int32
}

// stock keeps a few of the largest blocks for the next use, so that a flood of output
// does not make the collector run all the time.
type stock struct{ blocks chan *block }

func newStock(n int) *stock { return &stock{make(chan *block, n)} }

// get returns a block of size bytes, held once.
func (s *stock) get(size int) *block {
	var b *block
	if size == largestBlock {
		select {
		case b = <-s.blocks:
		default:
		}
	}
	if b == nil {
		b = &block{bytes: make([]byte, size), stock: s}
	}
	b.refs.Store(1)
	return b
}

// empty lets the blocks go.
func (s *stock) empty() {
	for {
		select {
		case <-s.blocks:
		default:
			return
		}
	}
}

func (b *block) hold() { b.refs.Add(1) }

func (b *block) release() {
	if b.refs.Add(-1) == 0 && len(b.bytes) == largestBlock {
		select {
		case b.stock.blocks <- b:
		default:
		}
	}
}
