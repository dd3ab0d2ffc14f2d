package guestclient

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"github.com/harvest-run/executord/internal/guest/wire"
)

func TestListen(t *testing.T) {
	for name, c := range map[string]struct {
		answer *guestv1.Response
		want   uint16
		kind   guestv1.Error_Kind
	}{
		"a port":            {&guestv1.Response{Answer: &guestv1.Response_Listen{Listen: &guestv1.ListenResponse{Port: 3128}}}, 3128, 0},
		"none":              {&guestv1.Response{Answer: &guestv1.Response_Listen{Listen: &guestv1.ListenResponse{}}}, 0, 0},
		"no port there is":  {&guestv1.Response{Answer: &guestv1.Response_Listen{Listen: &guestv1.ListenResponse{Port: 65536 + 80}}}, 0, 0},
		"another answer":    {&guestv1.Response{Answer: &guestv1.Response_Stop{Stop: &guestv1.StopResponse{}}}, 0, 0},
		"a refusal":         {&guestv1.Response{Answer: &guestv1.Response_Error{Error: &guestv1.Error{Kind: guestv1.Error_KIND_EXHAUSTED}}}, 0, guestv1.Error_KIND_EXHAUSTED},
		"an unknown answer": {&guestv1.Response{}, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			var asked *guestv1.ListenRequest
			client, _ := lie(t, func(_ int, p *lyingPipe) {
				for req := p.next(); req != nil; req = p.next() {
					asked = req.GetListen()
					c.answer.Id = req.GetId()
					_ = wire.Write(p, c.answer)
				}
			})
			port, err := client.Listen(t.Context(), "web", 80)
			if port != c.want || (err == nil) != (c.want != 0) || KindOf(err) != c.kind {
				t.Errorf("%d, %v", port, err)
			}
			if asked.GetName() != "web" || asked.GetPort() != 80 {
				t.Errorf("asked: %v", asked)
			}
		})
	}
}

func TestAccept(t *testing.T) {
	accepted := func(id uint64) *guestv1.Response {
		return &guestv1.Response{Id: id, Answer: &guestv1.Response_Accept{Accept: &guestv1.AcceptResponse{}}}
	}
	for name, c := range map[string]struct {
		serve func(p *lyingPipe, id uint64)
		works bool
		kind  guestv1.Error_Kind
	}{
		"a connection": {func(p *lyingPipe, id uint64) { _ = wire.Write(p, accepted(id)) }, true, 0},
		"the end":      {func(*lyingPipe, uint64) {}, false, 0},
		"half an answer": {func(p *lyingPipe, _ uint64) {
			_, _ = p.Write([]byte{0, 0, 0, 9, 0, 0})
		}, false, 0},
		"another's answer": {func(p *lyingPipe, id uint64) { _ = wire.Write(p, accepted(id+1)) }, false, 0},
		"a payload":        {func(p *lyingPipe, id uint64) { _ = wire.Write(p, accepted(id), []byte("x")) }, false, 0},
		"too much":         {func(p *lyingPipe, _ uint64) { _, _ = p.Write([]byte{255, 255, 255, 255, 0, 0, 0, 0}) }, false, 0},
		"another question": {func(p *lyingPipe, id uint64) {
			_ = wire.Write(p, &guestv1.Response{Id: id, Answer: &guestv1.Response_Stop{Stop: &guestv1.StopResponse{}}})
		}, false, 0},
		"a refusal": {func(p *lyingPipe, id uint64) {
			_ = wire.Write(p, &guestv1.Response{Id: id, Answer: &guestv1.Response_Error{Error: &guestv1.Error{Kind: guestv1.Error_KIND_NOT_FOUND}}})
		}, false, guestv1.Error_KIND_NOT_FOUND},
	} {
		t.Run(name, func(t *testing.T) {
			_, l := lie(t, func(_ int, p *lyingPipe) {
				req := p.next()
				if req.GetAccept().GetListener() != "web" {
					t.Errorf("asked: %v", req)
				}
				c.serve(p, req.GetId())
				if c.works {
					_, _ = p.Write([]byte("hello"))
					_, _ = io.Copy(p, p)
				}
			})
			conn, err := Accept(t.Context(), l, "web")
			if (err == nil) != c.works || KindOf(err) != c.kind {
				t.Fatalf("%v", err)
			}
			if !c.works {
				return
			}
			defer conn.Close()
			// Nothing of what comes behind the answer was read ahead.
			got := make([]byte, 7)
			if _, err := io.ReadFull(conn, got[:5]); err != nil || string(got[:5]) != "hello" {
				t.Errorf("%q, %v", got, err)
			}
			_, _ = conn.Write([]byte("ab"))
			if _, err := io.ReadFull(conn, got[5:]); err != nil || string(got) != "helloab" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

// Whoever stops waiting closes his pipe; a connection that he has is left alone.
func TestAcceptEnds(t *testing.T) {
	errLeft := errors.New("left")
	_, l := lie(t, func(_ int, p *lyingPipe) {
		_ = p.next()
		_, _ = p.Read(make([]byte, 1))
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(20*time.Millisecond, func() { cancel(errLeft) })
	if conn, err := Accept(ctx, l, "web"); !errors.Is(err, errLeft) {
		t.Errorf("%v, %v", conn, err)
	}
	if conn, err := Accept(ctx, l, "web"); !errors.Is(err, errLeft) {
		t.Errorf("and before it begins: %v, %v", conn, err)
	}

	_, l = lie(t, func(_ int, p *lyingPipe) {
		req := p.next()
		_ = wire.Write(p, &guestv1.Response{Id: req.GetId(), Answer: &guestv1.Response_Accept{Accept: &guestv1.AcceptResponse{}}})
		_, _ = io.Copy(p, p)
	})
	ctx, cancel = context.WithCancelCause(t.Context())
	conn, err := Accept(ctx, l, "web")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cancel(errLeft)
	_, _ = conn.Write([]byte("x"))
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Errorf("the end of the wait ends the connection: %v", err)
	}
}

func TestConnect(t *testing.T) {
	for name, c := range map[string]struct {
		answer *guestv1.Response
		works  bool
		kind   guestv1.Error_Kind
	}{
		"a connection":     {&guestv1.Response{Answer: &guestv1.Response_Connect{Connect: &guestv1.ConnectResponse{}}}, true, 0},
		"another question": {&guestv1.Response{Answer: &guestv1.Response_Accept{Accept: &guestv1.AcceptResponse{}}}, false, 0},
		"a refusal":        {&guestv1.Response{Answer: &guestv1.Response_Error{Error: &guestv1.Error{Kind: guestv1.Error_KIND_NOT_FOUND}}}, false, guestv1.Error_KIND_NOT_FOUND},
	} {
		t.Run(name, func(t *testing.T) {
			_, l := lie(t, func(_ int, p *lyingPipe) {
				req := p.next()
				if req.GetConnect().GetPort() != 4096 {
					t.Errorf("asked: %v", req)
				}
				c.answer.Id = req.GetId()
				_ = wire.Write(p, c.answer)
				_, _ = io.Copy(p, p)
			})
			conn, err := Connect(t.Context(), l, 4096)
			if (err == nil) != c.works || KindOf(err) != c.kind {
				t.Fatalf("%v", err)
			}
			if !c.works {
				return
			}
			defer conn.Close()
			_, _ = conn.Write([]byte("ab"))
			got := make([]byte, 2)
			if _, err := io.ReadFull(conn, got); err != nil || string(got) != "ab" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}
