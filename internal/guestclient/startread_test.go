package guestclient

import (
	"errors"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

func TestStartRead(t *testing.T) {
	c, l := lie(t, honest)
	resp, early, err := c.StartRead(t.Context(), &guestv1.StartRequest{Execution: "x"}, 100, time.Second)
	if err != nil || resp.GetPid() != 7 {
		t.Fatalf("start: %v, %v", resp, err)
	}
	out, err := early.Output(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(out.Chunks) != 2 || string(out.Chunks[0].Data) != "ou" {
		t.Errorf("%+v", out)
	}
	out.Release()
	if l.dialled() != 1 {
		t.Errorf("dialled %d times", l.dialled())
	}
}

// A guest may answer the read first: what it read then belongs to the command.
func TestStartReadAnsweredBackwards(t *testing.T) {
	c, _ := lie(t, func(_ int, p *lyingPipe) {
		start, read := p.next(), p.next()
		if start.GetStart() == nil || read.GetRead().GetExecution() != "x" || read.GetRead().GetPosition() != 0 {
			t.Errorf("%v before %v", start, read)
		}
		p.answerHonestly(read)
		p.answerHonestly(start)
		honest(0, p)
	})
	_, early, err := c.StartRead(t.Context(), &guestv1.StartRequest{Execution: "x"}, 100, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	out, err := early.Output(t.Context())
	if err != nil || len(out.Chunks) != 2 {
		t.Fatalf("%+v, %v", out, err)
	}
	out.Release()
}

func TestStartReadRefused(t *testing.T) {
	refuse := func(p *lyingPipe, req *guestv1.Request, kind guestv1.Error_Kind) {
		p.answer(req, &guestv1.Error{Kind: kind, Message: "no"})
	}
	t.Run("start", func(t *testing.T) {
		c, _ := lie(t, func(_ int, p *lyingPipe) {
			refuse(p, p.next(), guestv1.Error_KIND_NOT_EXECUTABLE)
			refuse(p, p.next(), guestv1.Error_KIND_NOT_FOUND)
			honest(0, p)
		})
		_, _, err := c.StartRead(t.Context(), &guestv1.StartRequest{Execution: "x"}, 100, time.Second)
		if KindOf(err) != guestv1.Error_KIND_NOT_EXECUTABLE {
			t.Errorf("%v", err)
		}
		if _, err := c.Info(t.Context()); err != nil {
			t.Errorf("the pipe is of no more use: %v", err)
		}
	})
	// A guest of an earlier time works on both at once and may not know the command yet.
	t.Run("read", func(t *testing.T) {
		c, _ := lie(t, func(_ int, p *lyingPipe) {
			p.answerHonestly(p.next())
			refuse(p, p.next(), guestv1.Error_KIND_NOT_FOUND)
			honest(0, p)
		})
		_, early, err := c.StartRead(t.Context(), &guestv1.StartRequest{Execution: "x"}, 100, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := early.Output(t.Context()); KindOf(err) != guestv1.Error_KIND_NOT_FOUND {
			t.Errorf("%v", err)
		}
		out, err := c.Read(t.Context(), "x", 0, 100, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		out.Release()
	})
	t.Run("wrong answer", func(t *testing.T) {
		c, _ := lie(t, func(_ int, p *lyingPipe) {
			p.answer(p.next(), &guestv1.StopResponse{})
			honest(0, p)
		})
		_, _, err := c.StartRead(t.Context(), &guestv1.StartRequest{Execution: "x"}, 100, time.Second)
		if !errors.Is(err, errWrongAnswer) {
			t.Errorf("%v", err)
		}
	})
}

// A pipe that is lost with the start on it is dialled again; the read is then the
// caller's to send.
func TestStartReadOverALostPipe(t *testing.T) {
	c, l := lie(t, func(dial int, p *lyingPipe) {
		if dial == 1 {
			p.next()
			p.Close()
			return
		}
		honest(dial, p)
	})
	resp, early, err := c.StartRead(t.Context(), &guestv1.StartRequest{Execution: "x"}, 100, time.Second)
	if err != nil || resp.GetPid() != 7 {
		t.Fatalf("%v, %v", resp, err)
	}
	if _, err := early.Output(t.Context()); !errors.Is(err, errNotAsked) {
		t.Errorf("%v", err)
	}
	if l.dialled() != 2 {
		t.Errorf("dialled %d times", l.dialled())
	}
}

// What nobody waits for is thrown away, and does not hold up the others.
func TestEarlyOutputThatNobodyWaitsFor(t *testing.T) {
	c, _ := lie(t, honest)
	for range 3 {
		if _, _, err := c.StartRead(t.Context(), &guestv1.StartRequest{Execution: "x"}, 100, time.Second); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Info(t.Context()); err != nil {
		t.Error(err)
	}
}
