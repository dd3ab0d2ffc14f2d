package guestclient

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

// pipe is one open connection: requests go out one after another, one goroutine hands
// the answers to whoever waits for them.
type pipe struct {
	conn   net.Conn
	pool   *sync.Pool
	reader sync.WaitGroup
	// writing is held by whoever writes. It is a channel, so that a caller whose turn
	// does not come can go.
	writing chan struct{}

	mu   sync.Mutex
	next uint64
	// waiting has every request whose answer did not come yet; nil for one that nobody
	// waits for any more.
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
	// Where an engine would like to move its connections now and then: this one is dialled
	// again, and every request repeated.
	if m, ok := conn.(interface{ MayMove() }); ok {
		m.MayMove()
	}
	p := &pipe{
		conn: conn, pool: pool, writing: make(chan struct{}, 1),
		waiting: make(map[uint64]chan<- answer), gone: make(chan struct{}),
	}
	p.reader.Go(p.read)
	return p
}

// lostBy returns why the pipe was lost; nil if it was not.
func (p *pipe) lostBy() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lost
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
func (p *pipe) ask(ctx context.Context, r *guestv1.Request, payload []byte) (answer, error) {
	c, err := p.post(ctx, r, payload)
	if err != nil {
		return answer{}, err
	}
	return p.await(ctx, r.GetId(), c)
}

// post sends a request; its answer comes on the channel.
func (p *pipe) post(ctx context.Context, r *guestv1.Request, payload []byte) (<-chan answer, error) {
	c, err := p.postAll(ctx, []*guestv1.Request{r}, func(w io.Writer) error { return wire.Write(w, r, payload) })
	if err != nil {
		return nil, err
	}
	return c[0], nil
}

// postTogether sends two requests in one piece, so that the guest is woken once.
func (p *pipe) postTogether(ctx context.Context, first, second *guestv1.Request) (firstAnswer, secondAnswer <-chan answer, err error) {
	c, err := p.postAll(ctx, []*guestv1.Request{first, second}, func(w io.Writer) error {
		var frames bytes.Buffer
		if err := errors.Join(wire.Write(&frames, first), wire.Write(&frames, second)); err != nil {
			return err
		}
		_, err := w.Write(frames.Bytes())
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return c[0], c[1], nil
}

// postAll gives requests their ids and has them written.
func (p *pipe) postAll(ctx context.Context, requests []*guestv1.Request, write func(io.Writer) error) ([]chan answer, error) {
	answers := make([]chan answer, len(requests))
	p.mu.Lock()
	if p.lost != nil {
		defer p.mu.Unlock()
		return nil, p.lost
	}
	for i, r := range requests {
		answers[i] = make(chan answer, 1)
		p.next++
		r.Id = p.next
		p.waiting[r.Id] = answers[i]
	}
	p.mu.Unlock()
	if err := p.send(ctx, write); err != nil {
		for _, r := range requests {
			p.leave(r.Id, false)
		}
		return nil, err
	}
	return answers, nil
}

// await waits for the answer of a request that was posted.
func (p *pipe) await(ctx context.Context, id uint64, c <-chan answer) (answer, error) {
	select {
	case a := <-c:
		return a, nil
	case <-p.gone:
	case <-ctx.Done():
	}
	p.leave(id, true)
	select {
	case a := <-c: // it came at the last moment
		return a, nil
	default:
	}
	if ctx.Err() != nil {
		return answer{}, context.Cause(ctx)
	}
	return answer{}, p.lostBy()
}

// leave gives up waiting for the answer of a request, which will come if it was sent.
func (p *pipe) leave(id uint64, sent bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, ok := p.waiting[id]; !ok {
		return
	}
	if sent {
		p.waiting[id] = nil
	} else {
		delete(p.waiting, id)
	}
}

// send has requests written. If ctx ends while the guest does not take it, half of it may
// be on its way: the pipe is lost.
func (p *pipe) send(ctx context.Context, write func(io.Writer) error) error {
	select {
	case p.writing <- struct{}{}:
	case <-p.gone:
		return p.lostBy()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-p.writing }()
	stop := context.AfterFunc(ctx, func() {
		p.lose(fmt.Errorf("the guest did not take a request: %v", context.Cause(ctx))) //nolint:errorlint // one caller's cause is not another's
	})
	err := write(p.conn)
	stop()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, wire.ErrUnsendable):
		return err
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	err = fmt.Errorf("ask the guest: %w", err)
	p.lose(err)
	return err
}

// read hands out answers until the pipe ends.
func (p *pipe) read() {
	buffered := bufio.NewReaderSize(p.conn, 16<<10)
	r := &wire.Reader{R: buffered, Limit: wire.MaxAnswer}
	for {
		if err := p.readOne(r, buffered); err != nil {
			p.lose(fmt.Errorf("the pipe to the guest ended: %w", err))
			return
		}
	}
}

func (p *pipe) readOne(r *wire.Reader, buffered *bufio.Reader) error {
	resp := new(guestv1.Response)
	n, err := r.Read(resp)
	if err != nil {
		return err
	}
	p.mu.Lock()
	_, ok := p.waiting[resp.GetId()]
	p.mu.Unlock()
	if !ok {
		return fmt.Errorf("the guest answered request %d, which is not open", resp.GetId())
	}
	a := answer{response: resp, payload: newPayload(n, p.pool)}
	if _, err := io.ReadFull(buffered, a.payload.bytes()); err != nil {
		a.release()
		return noEOF(err)
	}
	p.mu.Lock()
	c := p.waiting[resp.GetId()] // given up meanwhile?
	delete(p.waiting, resp.GetId())
	p.mu.Unlock()
	if c == nil {
		a.release()
		return nil
	}
	c <- a
	return nil
}

// noEOF makes an end within a frame an error that is not taken for an end between two.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
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
