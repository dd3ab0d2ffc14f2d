package guestclient

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"sync"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

// pipe is one open connection: requests go out under a lock, one goroutine hands
// the answers to whoever waits for them.
type pipe struct {
	conn   net.Conn
	pool   *sync.Pool
	reader sync.WaitGroup

	write sync.Mutex

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan<- answer
	lost    error
	gone    chan struct{} // closed with lost
}

// answer is a response and its payload.
type answer struct {
	response *guestv1.Response
	payload  *payload
}

func (a answer) release() { a.payload.release() }

func newPipe(conn net.Conn, pool *sync.Pool) *pipe {
	p := &pipe{conn: conn, pool: pool, waiting: make(map[uint64]chan<- answer), gone: make(chan struct{})}
	p.reader.Go(p.read)
	return p
}

func (p *pipe) isLost() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lost != nil
}

// close ends the pipe; everybody who waits gets cause.
func (p *pipe) close(cause error) {
	p.lose(cause)
	p.reader.Wait()
}

func (p *pipe) lose(cause error) {
	p.mu.Lock()
	if p.lost == nil {
		p.lost = cause
		close(p.gone)
	}
	p.mu.Unlock()
	p.conn.Close()
}

// ask sends a request and waits for its answer.
func (p *pipe) ask(ctx context.Context, r *guestv1.Request) (answer, error) {
	c := make(chan answer, 1)
	p.mu.Lock()
	if p.lost != nil {
		p.mu.Unlock()
		return answer{}, p.lost
	}
	p.next++
	id := p.next
	p.waiting[id] = c
	p.mu.Unlock()

	r.Id = id
	p.write.Lock()
	err := wire.Write(p.conn, r)
	p.write.Unlock()
	if err != nil {
		err = fmt.Errorf("ask the guest: %w", err)
		p.lose(err)
		return answer{}, err
	}
	select {
	case a := <-c:
		return a, nil
	case <-p.gone:
	case <-ctx.Done():
	}
	p.mu.Lock()
	delete(p.waiting, id)
	lost := p.lost
	p.mu.Unlock()
	select {
	case a := <-c: // it came at the last moment
		return a, nil
	default:
	}
	if ctx.Err() != nil {
		return answer{}, context.Cause(ctx)
	}
	return answer{}, lost
}

// read hands out answers until the pipe ends.
func (p *pipe) read() {
	buffered := bufio.NewReaderSize(p.conn, 16<<10)
	r := &wire.Reader{R: buffered}
	for {
		resp := new(guestv1.Response)
		n, err := r.Read(resp)
		if err != nil {
			p.lose(fmt.Errorf("the pipe to the guest ended: %w", err))
			return
		}
		a := answer{response: resp, payload: newPayload(n, p.pool)}
		if _, err := io.ReadFull(buffered, a.payload.bytes()); err != nil {
			a.release()
			p.lose(fmt.Errorf("the pipe to the guest ended: %w", err))
			return
		}
		p.mu.Lock()
		c, ok := p.waiting[resp.GetId()]
		delete(p.waiting, resp.GetId())
		p.mu.Unlock()
		if ok {
			c <- a
		} else {
			a.release() // nobody waits any more
		}
	}
}

// payload is memory for the payload of one answer.
type payload struct {
	data []byte
	home *sync.Pool // nil for a small one, which is left to the collector
}

// Payloads between these sizes come from a pool: under a flood of output the
// collector would otherwise run all the time.
const (
	pooledFrom = 16 << 10
	pooledSize = 256 << 10
)

func newPayload(n int, pool *sync.Pool) *payload {
	switch {
	case n == 0:
		return nil
	case n < pooledFrom || n > pooledSize:
		return &payload{data: make([]byte, n)}
	}
	p, ok := pool.Get().(*payload)
	if !ok {
		p = &payload{data: make([]byte, pooledSize), home: pool}
	}
	p.data = p.data[:n]
	return p
}

func (p *payload) bytes() []byte {
	if p == nil {
		return nil
	}
	return p.data
}

func (p *payload) release() {
	if p != nil && p.home != nil {
		p.home.Put(p)
	}
}
