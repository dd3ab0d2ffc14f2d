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
	"math"
	"net"
	"strings"
	"sync"
	"time"
	"unicode"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

// Dialer opens a byte pipe to a guest. An engine.Sandbox is one. The context is for
// the dialling; the pipe outlives it.
type Dialer interface {
	Dial(ctx context.Context) (net.Conn, error)
}

// Error is what a guest answered instead of doing what it was asked.
type Error struct {
	// Kind is never KIND_UNSPECIFIED.
	Kind guestv1.Error_Kind
	// Message is one line of at most 2 KiB.
	Message string
	// Committed is how far a command's input has come, where the guest told it with a
	// refused Write; else -1.
	Committed int64
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

var (
	// errClosed ends what is under way when the Client is closed.
	errClosed = errors.New("the connection to the guest was closed")
	// errSilent ends a request that a guest with an open pipe does not answer.
	errSilent = fmt.Errorf("the guest did not answer within %v", patience)
	// errWrongAnswer refuses an answer to another question.
	errWrongAnswer = errors.New("the guest answered another question")
)

const (
	// attempts is how often a request is tried over fresh pipes.
	attempts = 4
	// firstPause lies between the first two attempts; it doubles.
	firstPause = 10 * time.Millisecond
	// patience is how long a guest may take for an answer, beside the time that it was
	// asked to wait. It answers in a millisecond; on a host that has more to do than it
	// can, or is stopped for a while, it may take much longer.
	patience = 30 * time.Second
	// maxWait is the longest that a guest can be asked to wait.
	maxWait = time.Minute
	// maxIdleMillis is a century.
	maxIdleMillis = 100 * 366 * 24 * 3600 * 1000
	// maxErrorText bounds what is kept of a guest's message.
	maxErrorText = 2 << 10
)

// Client talks to one guest. Its methods may be called from any goroutine.
type Client struct {
	dialer   Dialer
	payloads sync.Pool
	closing  chan struct{} // closed by Close

	mu      sync.Mutex
	pipe    *pipe
	dialing chan struct{}           // not nil while somebody dials
	hangUp  context.CancelCauseFunc // ends the dialling
	closed  bool
}

// New makes a Client; it dials when it is first used.
func New(d Dialer) *Client { return &Client{dialer: d, closing: make(chan struct{})} }

// Close ends what is under way and waits for it. Requests made later fail.
func (c *Client) Close() {
	c.mu.Lock()
	if !c.closed {
		c.closed = true
		close(c.closing)
	}
	p, dialing := c.pipe, c.dialing
	c.pipe = nil
	if dialing != nil {
		c.hangUp(errClosed)
	}
	c.mu.Unlock()
	if dialing != nil {
		<-dialing
	}
	if p != nil {
		p.close(errClosed)
	}
}

// Start starts a command, or joins the one that has its id.
func (c *Client) Start(ctx context.Context, r *guestv1.StartRequest) (*guestv1.StartResponse, error) {
	resp, err := c.ask(ctx, &guestv1.Request{Call: &guestv1.Request_Start{Start: r}})
	if err != nil {
		return nil, err
	}
	if resp.GetStart().GetPid() <= 0 {
		return nil, errWrongAnswer
	}
	return resp.GetStart(), nil
}

// Stop begins the end of a command: TERM now, KILL after the grace, at once if that
// is not positive. The end itself is read like any other.
func (c *Client) Stop(ctx context.Context, execution string, grace time.Duration) error {
	r := &guestv1.StopRequest{Execution: execution, GraceMs: uint64(milliseconds(grace))}
	resp, err := c.ask(ctx, &guestv1.Request{Call: &guestv1.Request_Stop{Stop: r}})
	if err == nil && resp.GetStop() == nil {
		err = errWrongAnswer
	}
	return err
}

// Release makes the guest forget an ended command.
func (c *Client) Release(ctx context.Context, execution string) error {
	r := &guestv1.ReleaseRequest{Execution: execution}
	resp, err := c.ask(ctx, &guestv1.Request{Call: &guestv1.Request_Release{Release: r}})
	if err == nil && resp.GetRelease() == nil {
		err = errWrongAnswer
	}
	return err
}

// Info asks what the guest is and holds.
func (c *Client) Info(ctx context.Context) (*guestv1.InfoResponse, error) {
	resp, err := c.ask(ctx, &guestv1.Request{Call: &guestv1.Request_Info{Info: &guestv1.InfoRequest{}}})
	if err != nil {
		return nil, err
	}
	info := resp.GetInfo()
	if info == nil {
		return nil, errWrongAnswer
	}
	if info.GetProtocol() != wire.Protocol {
		return nil, fmt.Errorf("the guest speaks protocol %d, this executord %d", info.GetProtocol(), wire.Protocol)
	}
	return info, nil
}

// milliseconds rounds up, so that a short time does not become none.
func milliseconds(d time.Duration) int64 {
	if d <= 0 {
		return 0
	}
	return int64((d-1)/time.Millisecond) + 1
}

// Output is what a Read answered.
type Output struct {
	// Chunks in the order of arrival. Their data is valid until Release.
	Chunks []Chunk
	// Exit is set once everything was read.
	Exit *guestv1.Exit
	// Over says that nothing more is going to be written.
	Over bool
	// Discarding says that output is given up, by a Discard before.
	Discarding bool
	// Idle is how long the command has been idle; 0 without an idle time-out.
	Idle time.Duration

	answer answer
}

// Chunk is a piece of one stream.
type Chunk struct {
	Stream guestv1.Stream
	Data   []byte
}

// Release gives the memory of the chunks back. Further calls do nothing.
func (o *Output) Release() {
	o.answer.release()
	o.answer, o.Chunks = answer{}, nil
}

// Read reads at most maxBytes, which is 1 to 1 MiB, of output from a position on, and
// waits up to a minute for something to tell. An Output without chunks and without an
// exit says that nothing came in that time.
func (c *Client) Read(ctx context.Context, execution string, position int64, maxBytes int, wait time.Duration) (*Output, error) {
	if position < 0 || maxBytes < 1 || maxBytes > wire.MaxPayload {
		return nil, fmt.Errorf("read %d bytes at %d: out of range", maxBytes, position)
	}
	wait = min(wait, maxWait)
	a, err := c.call(ctx, readRequest(execution, position, maxBytes, wait), max(wait, 0))
	if err != nil {
		return nil, err
	}
	return checkedOutput(a, maxBytes)
}

func readRequest(execution string, position int64, maxBytes int, wait time.Duration) *guestv1.Request {
	return &guestv1.Request{Call: &guestv1.Request_Read{Read: &guestv1.ReadRequest{
		Execution: execution, Position: uint64(position), MaxBytes: uint32(maxBytes), WaitMs: uint32(milliseconds(wait)),
	}}}
}

// checkedOutput takes over an answer to a read.
func checkedOutput(a answer, maxBytes int) (*Output, error) {
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
	if n := len(read.GetChunks()); n > wire.MaxChunks {
		return nil, fmt.Errorf("the guest sent %d chunks at once", n)
	}
	out := &Output{
		Exit: read.GetExit(), Chunks: make([]Chunk, 0, len(read.GetChunks())), answer: a,
		Over: read.GetOver(), Discarding: read.GetDiscarding(), Idle: time.Duration(min(read.GetIdleMs(), maxIdleMillis)) * time.Millisecond,
	}
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
	return out, checkExit(out.Exit)
}

// checkExit refuses an end that no process can have.
func checkExit(exit *guestv1.Exit) error {
	if exit == nil {
		return nil
	}
	switch status := exit.GetStatus().(type) {
	case *guestv1.Exit_Code:
		if status.Code < 0 || status.Code > 255 {
			return fmt.Errorf("the guest told the exit code %d", status.Code)
		}
	case *guestv1.Exit_Signal:
		if status.Signal < 1 || status.Signal > 64 {
			return fmt.Errorf("the guest told an end by signal %d", status.Signal)
		}
	default:
		return errors.New("the guest told an end without a status")
	}
	if _, known := guestv1.StopCause_name[int32(exit.GetStopCause())]; !known {
		return fmt.Errorf("the guest told the stop cause %d", exit.GetStopCause())
	}
	// More than a century; it would not fit into a Duration.
	const limit = 1 << 52
	for _, micros := range []uint64{exit.GetFirstOutputMicros(), exit.GetRunMicros(), exit.GetCpuUserMicros(), exit.GetCpuSystemMicros()} {
		if micros > limit {
			return fmt.Errorf("the guest told a time of %d µs", micros)
		}
	}
	if n := exit.GetDiscardedBytes(); n > 1<<62 {
		return fmt.Errorf("the guest told of %d bytes that it gave up", n)
	}
	return nil
}

// ask does a call whose answer has no payload.
func (c *Client) ask(ctx context.Context, r *guestv1.Request) (*guestv1.Response, error) {
	a, err := c.call(ctx, r, 0)
	if err != nil {
		return nil, err
	}
	defer a.release()
	if n := len(a.payload.bytes()); n > 0 {
		return nil, fmt.Errorf("the guest sent %d bytes that nobody asked for", n)
	}
	return a.response, nil
}

// call sends a request and returns its answer; over fresh pipes if one is lost. wait
// is how long the guest is asked to wait.
func (c *Client) call(ctx context.Context, r *guestv1.Request, wait time.Duration) (answer, error) {
	return c.callWith(ctx, r, nil, wait)
}

// callWith is call for a request with a payload.
func (c *Client) callWith(ctx context.Context, r *guestv1.Request, payload []byte, wait time.Duration) (answer, error) {
	pause := firstPause
	for attempt := 1; ; attempt++ {
		a, err := c.try(ctx, r, payload, wait)
		if err == nil {
			if e := a.response.GetError(); e != nil {
				a.release()
				return answer{}, errorOf(e)
			}
			return a, nil
		}
		if ctx.Err() != nil {
			return answer{}, context.Cause(ctx)
		}
		if attempt == attempts || errors.Is(err, errClosed) || errors.Is(err, errSilent) || errors.Is(err, wire.ErrUnsendable) {
			return answer{}, err
		}
		select {
		case <-time.After(pause):
		case <-c.closing:
			return answer{}, errClosed
		case <-ctx.Done():
			return answer{}, context.Cause(ctx)
		}
		pause *= 2
	}
}

// errorOf takes a guest's error over. Its text is shown to people.
func errorOf(e *guestv1.Error) error {
	kind := e.GetKind()
	if _, known := guestv1.Error_Kind_name[int32(kind)]; !known || kind == guestv1.Error_KIND_UNSPECIFIED {
		kind = guestv1.Error_KIND_INTERNAL
	}
	text := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, e.GetMessage()[:min(len(e.GetMessage()), maxErrorText)])
	told := &Error{Kind: kind, Message: text, Committed: -1}
	if e.CommittedOffset != nil && e.GetCommittedOffset() <= math.MaxInt64 {
		told.Committed = int64(e.GetCommittedOffset())
	}
	return told
}

func (c *Client) try(ctx context.Context, r *guestv1.Request, payload []byte, wait time.Duration) (answer, error) {
	limited, cancel := context.WithTimeoutCause(ctx, wait+patience, errSilent)
	defer cancel()
	p, err := c.connect(limited)
	if err != nil {
		return answer{}, err
	}
	a, err := p.ask(limited, r, payload)
	if err != nil && ctx.Err() == nil && !errors.Is(err, wire.ErrUnsendable) {
		// The others that use the pipe have not waited that long: they try a fresh one.
		c.drop(p, fmt.Errorf("the pipe to the guest was given up: %v", err)) //nolint:errorlint // one caller's cause is not another's
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
		if c.pipe != nil && c.pipe.lostBy() == nil {
			defer c.mu.Unlock()
			return c.pipe, nil
		}
		if c.dialing == nil {
			ctx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			c.dialing, c.hangUp = make(chan struct{}), cancel
			old := c.pipe
			c.pipe = nil
			c.mu.Unlock()
			if old != nil {
				old.close(errClosed)
			}
			return c.dial(ctx)
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

// dial opens a pipe for everybody.
func (c *Client) dial(ctx context.Context) (*pipe, error) {
	conn, err := c.dialer.Dial(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.dialing)
	c.dialing, c.hangUp = nil, nil
	if c.closed {
		if err == nil {
			conn.Close()
		}
		return nil, errClosed
	}
	if err != nil {
		return nil, err
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
