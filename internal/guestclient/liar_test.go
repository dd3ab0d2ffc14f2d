package guestclient

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// liar is a guest that follows a script. Every dial opens a pipe on which serve is
// run; the pipe is closed when serve returns.
type liar struct {
	t     *testing.T
	serve func(dial int, p *lyingPipe)
	work  sync.WaitGroup

	mu    sync.Mutex
	dials int
	open  int
}

// lie makes a guest with a script and a client of it. Both end with the test.
func lie(t *testing.T, serve func(dial int, p *lyingPipe)) (*Client, *liar) {
	l := &liar{t: t, serve: serve}
	c := New(l)
	t.Cleanup(func() {
		c.Close()
		l.work.Wait()
		if l.open != 0 {
			t.Errorf("%d pipes were left open", l.open)
		}
	})
	return c, l
}

func (l *liar) Dial(context.Context) (net.Conn, error) {
	ours, theirs := net.Pipe()
	l.mu.Lock()
	l.dials++
	l.open++
	n := l.dials
	l.mu.Unlock()
	l.work.Go(func() {
		defer theirs.Close()
		l.serve(n, &lyingPipe{Conn: theirs, t: l.t})
	})
	return &countedConn{Conn: ours, l: l}, nil
}

func (l *liar) dialled() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dials
}

// countedConn tells when it is closed.
type countedConn struct {
	net.Conn
	l    *liar
	once sync.Once
}

func (c *countedConn) Close() error {
	c.once.Do(func() {
		c.l.mu.Lock()
		c.l.open--
		c.l.mu.Unlock()
	})
	return c.Conn.Close()
}

// lyingPipe is the guest's end of a pipe.
type lyingPipe struct {
	payload []byte // of the last request
	net.Conn
	t     *testing.T
	write sync.Mutex
}

// next reads a request; nil at the end of the pipe.
func (p *lyingPipe) next() *guestv1.Request {
	req := new(guestv1.Request)
	n, err := (&wire.Reader{R: p}).Read(req)
	if err != nil {
		return nil
	}
	p.payload = make([]byte, n)
	if _, err := io.ReadFull(p, p.payload); err != nil {
		return nil
	}
	return req
}

// answer answers a request. The client may have gone.
func (p *lyingPipe) answer(req *guestv1.Request, with any, payload ...[]byte) {
	resp := &guestv1.Response{Id: req.GetId()}
	switch a := with.(type) {
	case nil:
	case *guestv1.Error:
		resp.Answer = &guestv1.Response_Error{Error: a}
	case *guestv1.StartResponse:
		resp.Answer = &guestv1.Response_Start{Start: a}
	case *guestv1.ReadResponse:
		resp.Answer = &guestv1.Response_Read{Read: a}
	case *guestv1.StopResponse:
		resp.Answer = &guestv1.Response_Stop{Stop: a}
	case *guestv1.ReleaseResponse:
		resp.Answer = &guestv1.Response_Release{Release: a}
	case *guestv1.InfoResponse:
		resp.Answer = &guestv1.Response_Info{Info: a}
	case *guestv1.WriteResponse:
		resp.Answer = &guestv1.Response_Write{Write: a}
	case *guestv1.ResizeResponse:
		resp.Answer = &guestv1.Response_Resize{Resize: a}
	case *guestv1.SignalResponse:
		resp.Answer = &guestv1.Response_Signal{Signal: a}
	default:
		panic("no such answer")
	}
	p.write.Lock()
	defer p.write.Unlock()
	if err := wire.Write(p, resp, payload...); errors.Is(err, wire.ErrUnsendable) {
		p.t.Error(err)
	}
}

// honest answers every request as it should be.
func honest(_ int, p *lyingPipe) {
	for req := p.next(); req != nil; req = p.next() {
		p.answerHonestly(req)
	}
}

func (p *lyingPipe) answerHonestly(req *guestv1.Request) {
	switch req.GetCall().(type) {
	case *guestv1.Request_Start:
		p.answer(req, &guestv1.StartResponse{Pid: 7})
	case *guestv1.Request_Read:
		p.answer(req, chunks(2, 1), []byte("out"))
	case *guestv1.Request_Stop:
		p.answer(req, &guestv1.StopResponse{})
	case *guestv1.Request_Release:
		p.answer(req, &guestv1.ReleaseResponse{})
	case *guestv1.Request_Info:
		p.answer(req, &guestv1.InfoResponse{Protocol: wire.Protocol, Executions: []string{"a"}})
	case *guestv1.Request_Write:
		p.answer(req, &guestv1.WriteResponse{CommittedOffset: req.GetWrite().GetOffset() + uint64(len(p.payload)), Closed: req.GetWrite().GetClose()})
	case *guestv1.Request_Resize:
		p.answer(req, &guestv1.ResizeResponse{})
	case *guestv1.Request_Signal:
		p.answer(req, &guestv1.SignalResponse{})
	}
}

// chunks describes a payload of standard output.
func chunks(sizes ...uint32) *guestv1.ReadResponse {
	r := &guestv1.ReadResponse{}
	for _, n := range sizes {
		r.Chunks = append(r.Chunks, &guestv1.Chunk{Stream: guestv1.Stream_STREAM_STDOUT, Size: n})
	}
	return r
}

func exit(e *guestv1.Exit) *guestv1.ReadResponse { return &guestv1.ReadResponse{Exit: e} }

func code(n int32) *guestv1.Exit { return &guestv1.Exit{Status: &guestv1.Exit_Code{Code: n}} }

func signal(n int32) *guestv1.Exit { return &guestv1.Exit{Status: &guestv1.Exit_Signal{Signal: n}} }
