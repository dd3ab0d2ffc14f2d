package guestclient

import (
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

// TestReadEnd asks for what it should, and takes no output for an answer.
func TestReadEnd(t *testing.T) {
	var asked []*guestv1.ReadRequest
	c, _ := lie(t, func(_ int, p *lyingPipe) {
		for req := p.next(); req != nil; req = p.next() {
			asked = append(asked, req.GetRead())
			p.answer(req, &guestv1.ReadResponse{Over: true, Discarding: true, IdleMs: 1 << 63})
		}
	})
	out, err := c.AwaitOver(t.Context(), "x", time.Hour)
	if err != nil || !out.Over || out.Idle <= 0 {
		t.Errorf("%+v, %v", out, err)
	}
	if out, err = c.Discard(t.Context(), "x", 7, time.Second); err != nil || !out.Discarding || out.Exit != nil {
		t.Errorf("%+v, %v", out, err)
	}
	if len(asked) != 2 || asked[0].GetMode() != guestv1.ReadMode_READ_MODE_AWAIT_OVER || asked[0].GetWaitMs() != 60_000 ||
		asked[1].GetMode() != guestv1.ReadMode_READ_MODE_DISCARD || asked[1].GetPosition() != 7 || asked[1].GetWaitMs() != 1000 {
		t.Errorf("%v", asked)
	}
}

func TestReadEndIsLiedTo(t *testing.T) {
	exit := &guestv1.Exit{Status: &guestv1.Exit_Code{}, DiscardedBytes: 1 << 63}
	for name, answer := range map[string]*guestv1.ReadResponse{
		"output":               {Chunks: []*guestv1.Chunk{{Stream: 1, Size: 1}}},
		"an impossible number": {Exit: exit},
	} {
		c, _ := lie(t, func(_ int, p *lyingPipe) {
			for req := p.next(); req != nil; req = p.next() {
				if len(answer.GetChunks()) > 0 {
					p.answer(req, answer, []byte("x"))
				} else {
					p.answer(req, answer)
				}
			}
		})
		if out, err := c.AwaitOver(t.Context(), "x", 0); err == nil {
			t.Errorf("%s: %+v", name, out)
		}
		if out, err := c.Discard(t.Context(), "x", 0, 0); err == nil {
			t.Errorf("%s: %+v", name, out)
		}
	}
}
