// Package guestclient is executord's side of the conversation with a guest: any
// number of requests at a time over one byte pipe, which is dialled when it is
// needed and again when it was lost. Every request is safe to repeat, so a lost pipe
// is not seen by the caller unless it stays lost. What a guest answers is checked
// before it is used: the guest runs beside code that nobody trusts.
package guestclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

// Dialer opens a byte pipe to a guest. An engine.Sandbox is one.
type Dialer interface {
	Dial(ctx context.Context) (net.Conn, error)
}

// Error is what a guest answered instead of doing what it was asked.
type Error struct {
	Kind    guestv1.Error_Kind
	Message string
}

// Error tells the guest's message.
func (e *Error) Error() string { return e.Message }

// KindOf returns the kind of the guest's Error in err's chain, KIND_UNSPECIFIED if
// the guest did not answer at all.
func KindOf(err error) guestv1.Error_Kind {
	if ge, ok := errors.AsType[*Error](err); ok {
		return ge.Kind
	}
	return guestv1.Error_KIND_UNSPECIFIED
}

// errClosed ends what is under way when the Client is closed.
var errClosed = errors.New("the connection to the guest was closed")

const (
	// attempts is how often a request is tried over fresh pipes.
	attempts = 4
	// firstPause lies between the first two attempts; it doubles.
	firstPause = 10 * time.Millisecond
)

// Client talks to one guest. Its methods may be called from any goroutine.
type Client struct {
	dialer   Dialer
	payloads sync.Pool

	mu      sync.Mutex
	pipe    *pipe
	dialing chan struct{} // not nil while somebody dials
	closed  bool
}

// New makes a Client; it dials when it is first used.
func New(d Dialer) *Client { return &Client{dialer: d} }

// Close ends what is under way and waits for it.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	p := c.pipe
	c.pipe = nil
	c.mu.Unlock()
	if p != nil {
		p.close(errClosed)
	}
}

// Start starts a command, or joins the one that has its id.
func (c *Client) Start(ctx context.Context, r *guestv1.StartRequest) (*guestv1.StartResponse, error) {
	a, err := c.call(ctx, &guestv1.Request{Call: &guestv1.Request_Start{Start: r}})
	if err != nil {
		return nil, err
	}
	defer a.release()
	if resp := a.response.GetStart(); resp != nil {
		return resp, nil
	}
	return nil, errWrongAnswer
}

// Stop begins the end of a command.
func (c *Client) Stop(ctx context.Context, execution string, grace time.Duration) error {
	r := &guestv1.StopRequest{Execution: execution, GraceMs: uint64(max(grace, 0).Milliseconds())}
	a, err := c.call(ctx, &guestv1.Request{Call: &guestv1.Request_Stop{Stop: r}})
	if err == nil {
		a.release()
	}
	return err
}

// Release makes the guest forget an ended command.
func (c *Client) Release(ctx context.Context, execution string) error {
	a, err := c.call(ctx, &guestv1.Request{Call: &guestv1.Request_Release{Release: &guestv1.ReleaseRequest{Execution: execution}}})
	if err == nil {
		a.release()
	}
	return err
}

// Info asks what the guest is and holds.
func (c *Client) Info(ctx context.Context) (*guestv1.InfoResponse, error) {
	a, err := c.call(ctx, &guestv1.Request{Call: &guestv1.Request_Info{Info: &guestv1.InfoRequest{}}})
	if err != nil {
		return nil, err
	}
	defer a.release()
	info := a.response.GetInfo()
	if info == nil {
		return nil, errWrongAnswer
	}
	if info.GetProtocol() != wire.Protocol {
		return nil, fmt.Errorf("the guest speaks protocol %d, this executord %d", info.GetProtocol(), wire.Protocol)
	}
	return info, nil
}

// Output is what a Read answered.
type Output struct {
	// Chunks in the order of arrival. Their data is valid until Release.
	Chunks []Chunk
	// Exit is set once everything was read.
	Exit *guestv1.Exit

	answer answer
}

// Chunk is a piece of one stream.
type Chunk struct {
	Stream guestv1.Stream
	Data   []byte
}

// Release gives the memory of the chunks back.
func (o *Output) Release() { o.answer.release() }

// Read reads output from a position on, waiting a while for something to tell.
func (c *Client) Read(ctx context.Context, execution string, position int64, maxBytes int, wait time.Duration) (*Output, error) {
	r := &guestv1.ReadRequest{
		Execution: execution, Position: uint64(position), MaxBytes: uint32(maxBytes), WaitMs: uint32(wait.Milliseconds()),
	}
	a, err := c.call(ctx, &guestv1.Request{Call: &guestv1.Request_Read{Read: r}})
	if err != nil {
		return nil, err
	}
	out, err := outputOf(a, maxBytes)
	if err != nil {
		a.release()
		return nil, err
	}
	return out, nil
}

// outputOf cuts the payload into chunks and refuses an answer that does not add up.
func outputOf(a answer, maxBytes int) (*Output, error) {
	read := a.response.GetRead()
	if read == nil {
		return nil, errWrongAnswer
	}
	data := a.payload.bytes()
	if len(data) > maxBytes {
		return nil, fmt.Errorf("the guest sent %d bytes where at most %d were asked for", len(data), maxBytes)
	}
	out := &Output{Exit: read.GetExit(), Chunks: make([]Chunk, 0, len(read.GetChunks())), answer: a}
	for _, chunk := range read.GetChunks() {
		n := int(chunk.GetSize())
		s := chunk.GetStream()
		if n == 0 || n > len(data) || (s != guestv1.Stream_STREAM_STDOUT && s != guestv1.Stream_STREAM_STDERR) {
			return nil, fmt.Errorf("the guest sent a chunk of %d bytes of stream %d with %d bytes left", n, s, len(data))
		}
		out.Chunks = append(out.Chunks, Chunk{Stream: s, Data: data[:n:n]})
		data = data[n:]
	}
	if len(data) > 0 {
		return nil, fmt.Errorf("the guest sent %d bytes that belong to no chunk", len(data))
	}
	if exit := out.Exit; exit != nil && exit.GetStatus() == nil {
		return nil, errors.New("the guest told an end without a status")
	}
	return out, nil
}

var errWrongAnswer = errors.New("the guest answered another question")

// call sends a request and returns its answer; over fresh pipes if one is lost.
func (c *Client) call(ctx context.Context, r *guestv1.Request) (answer, error) {
	pause := firstPause
	for attempt := 1; ; attempt++ {
		a, err := c.try(ctx, r)
		if err == nil {
			if e := a.response.GetError(); e != nil {
				a.release()
				return answer{}, &Error{Kind: e.GetKind(), Message: e.GetMessage()}
			}
			return a, nil
		}
		if ctx.Err() != nil {
			return answer{}, context.Cause(ctx)
		}
		if attempt == attempts || errors.Is(err, errClosed) {
			return answer{}, err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return answer{}, context.Cause(ctx)
		}
		pause *= 2
	}
}

func (c *Client) try(ctx context.Context, r *guestv1.Request) (answer, error) {
	p, err := c.connect(ctx)
	if err != nil {
		return answer{}, err
	}
	a, err := p.ask(ctx, r)
	if err != nil && ctx.Err() == nil {
		c.drop(p, err)
	}
	return a, err
}

// connect returns the open pipe or dials one; one caller dials, the others wait.
func (c *Client) connect(ctx context.Context) (*pipe, error) {
	for {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return nil, errClosed
		}
		if c.pipe != nil && !c.pipe.isLost() {
			defer c.mu.Unlock()
			return c.pipe, nil
		}
		if c.dialing == nil {
			done := make(chan struct{})
			c.dialing = done
			old := c.pipe
			c.pipe = nil
			c.mu.Unlock()
			if old != nil {
				old.close(errClosed)
			}
			return c.dial(ctx, done)
		}
		other := c.dialing
		c.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (c *Client) dial(ctx context.Context, done chan struct{}) (*pipe, error) {
	conn, err := c.dialer.Dial(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dialing = nil
	close(done)
	if err != nil {
		return nil, err
	}
	if c.closed {
		conn.Close()
		return nil, errClosed
	}
	c.pipe = newPipe(conn, &c.payloads)
	return c.pipe, nil
}

// drop closes a pipe that failed.
func (c *Client) drop(p *pipe, cause error) {
	c.mu.Lock()
	if c.pipe == p {
		c.pipe = nil
	}
	c.mu.Unlock()
	p.close(cause)
}
