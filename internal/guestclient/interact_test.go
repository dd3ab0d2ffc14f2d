package guestclient

import (
	"bytes"
	"math"
	"testing"
	"time"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
)

func TestWriteCarriesItsBytes(t *testing.T) {
	data := bytes.Repeat([]byte("\x00\xff"), MaxWrite/2)
	var got []byte
	var asked *guestv1.WriteRequest
	c, _ := lie(t, func(_ int, p *lyingPipe) {
		for req := p.next(); req != nil; req = p.next() {
			got, asked = p.payload, req.GetWrite()
			p.answer(req, &guestv1.WriteResponse{CommittedOffset: 77})
		}
	})
	w, err := c.Write(t.Context(), "x", 70, data, true, time.Hour)
	if err != nil || w != (Written{Committed: 77}) || !bytes.Equal(got, data) {
		t.Errorf("%+v, %v; %d bytes came", w, err, len(got))
	}
	if asked.GetOffset() != 70 || !asked.GetClose() || asked.GetWaitMs() != 10_000 || asked.GetExecution() != "x" {
		t.Errorf("asked %v", asked)
	}
	if _, err := c.Input(t.Context(), "x"); err != nil || asked.Offset != nil || asked.GetClose() || len(got) > 0 {
		t.Errorf("%v, asked %v", err, asked)
	}
	for _, bad := range []func() (Written, error){
		func() (Written, error) { return c.Write(t.Context(), "x", -1, nil, false, 0) },
		func() (Written, error) { return c.Write(t.Context(), "x", 0, make([]byte, MaxWrite+1), false, 0) },
	} {
		if w, err := bad(); err == nil {
			t.Errorf("%+v", w)
		}
	}
}

// A pipe that is lost in the middle of a write is dialled again, and all is sent again.
func TestWriteOverALostPipe(t *testing.T) {
	var sent [][]byte
	c, l := lie(t, func(dial int, p *lyingPipe) {
		for req := p.next(); req != nil; req = p.next() {
			sent = append(sent, p.payload)
			if dial < 3 {
				return
			}
			p.answerHonestly(req)
		}
	})
	w, err := c.Write(t.Context(), "x", 10, []byte("abc"), false, time.Second)
	if err != nil || w.Committed != 13 || l.dialled() != 3 {
		t.Errorf("%+v, %v, dialled %d times", w, err, l.dialled())
	}
	for _, s := range sent {
		if string(s) != "abc" {
			t.Errorf("sent %q", sent)
		}
	}
}

func TestRefusedWritesTellTheOffset(t *testing.T) {
	huge, some := uint64(math.MaxInt64+1), uint64(5)
	for name, c := range map[string]struct {
		refusal *guestv1.Error
		kind    guestv1.Error_Kind
		want    int64
	}{
		"told":     {&guestv1.Error{Kind: guestv1.Error_KIND_CLOSED, CommittedOffset: &some}, guestv1.Error_KIND_CLOSED, 5},
		"not told": {&guestv1.Error{Kind: guestv1.Error_KIND_ENDED}, guestv1.Error_KIND_ENDED, -1},
		"a lie":    {&guestv1.Error{Kind: guestv1.Error_KIND_INVALID, CommittedOffset: &huge}, guestv1.Error_KIND_INVALID, -1},
		"unknown":  {&guestv1.Error{Kind: 99, CommittedOffset: &some}, guestv1.Error_KIND_INTERNAL, 5},
	} {
		t.Run(name, func(t *testing.T) {
			client, _ := lie(t, func(_ int, p *lyingPipe) {
				for req := p.next(); req != nil; req = p.next() {
					p.answer(req, c.refusal)
				}
			})
			_, err := client.Write(t.Context(), "x", 0, []byte("x"), false, 0)
			ge, ok := err.(*Error)
			if !ok || ge.Kind != c.kind || ge.Committed != c.want {
				t.Errorf("%+v", err)
			}
		})
	}
}

func TestWriteRefusesLies(t *testing.T) {
	for name, answer := range map[string]func(p *lyingPipe, req *guestv1.Request){
		"too much": func(p *lyingPipe, req *guestv1.Request) {
			p.answer(req, &guestv1.WriteResponse{CommittedOffset: math.MaxUint64})
		},
		"a payload": func(p *lyingPipe, req *guestv1.Request) {
			p.answer(req, &guestv1.WriteResponse{CommittedOffset: 1}, []byte("x"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := lie(t, func(_ int, p *lyingPipe) {
				for req := p.next(); req != nil; req = p.next() {
					answer(p, req)
				}
			})
			if w, err := c.Write(t.Context(), "x", 0, []byte("x"), false, 0); err == nil {
				t.Errorf("%+v", w)
			}
		})
	}
}
