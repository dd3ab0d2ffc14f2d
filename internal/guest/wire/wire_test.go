package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"

	guestv1 "github.com/harvest-run/executord/gen/harvest/guest/v1"
	"google.golang.org/protobuf/proto"
)

func TestRoundTrip(t *testing.T) {
	frames := []struct {
		request *guestv1.Request
		payload [][]byte
	}{
		{&guestv1.Request{Id: 1, Call: &guestv1.Request_Info{Info: &guestv1.InfoRequest{}}}, nil},
		{&guestv1.Request{Id: 2, Call: &guestv1.Request_Start{Start: &guestv1.StartRequest{
			Execution: "x", Args: []string{"sh", "-c", "true"}, Source: bytes.Repeat([]byte("a"), 1<<20),
		}}}, nil},
		{&guestv1.Request{}, [][]byte{[]byte("one"), nil, []byte("two")}},
		{&guestv1.Request{Id: 3}, [][]byte{bytes.Repeat([]byte{7}, MaxPayload)}},
	}
	var pipe bytes.Buffer
	for _, f := range frames {
		if err := Write(&pipe, f.request, f.payload...); err != nil {
			t.Fatal(err)
		}
	}
	r := &Reader{R: &pipe}
	for i, f := range frames {
		var got guestv1.Request
		n, err := r.Read(&got)
		if err != nil {
			t.Fatalf("frame %d: %v", i, err)
		}
		payload := make([]byte, n)
		if _, err := io.ReadFull(r.R, payload); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(&got, f.request) || !bytes.Equal(payload, bytes.Join(f.payload, nil)) {
			t.Errorf("frame %d came back different", i)
		}
	}
	if _, err := r.Read(&guestv1.Request{}); err != io.EOF {
		t.Errorf("after the last frame: %v, want io.EOF", err)
	}
}

func TestWriteRefusesWhatReadWould(t *testing.T) {
	err := Write(io.Discard, &guestv1.Request{}, make([]byte, MaxPayload), []byte("x"))
	if err == nil || !strings.Contains(err.Error(), "over the limit") {
		t.Errorf("payload over the limit: %v", err)
	}
	big := &guestv1.Request{Call: &guestv1.Request_Start{Start: &guestv1.StartRequest{Source: make([]byte, MaxMessage)}}}
	if err := Write(io.Discard, big); err == nil {
		t.Error("message over the limit was written")
	}
}

func TestReadRefusesLies(t *testing.T) {
	header := func(size, total uint32) []byte {
		b := make([]byte, 8)
		binary.BigEndian.PutUint32(b, size)
		binary.BigEndian.PutUint32(b[4:], total)
		return b
	}
	for name, in := range map[string][]byte{
		"message too large":  header(MaxMessage+1, 0),
		"payload too large":  header(0, MaxPayload+1),
		"largest numbers":    header(1<<32-1, 1<<32-1),
		"message is garbage": append(header(3, 0), 0xff, 0xff, 0xff),
	} {
		if _, err := (&Reader{R: bytes.NewReader(in)}).Read(&guestv1.Request{}); err == nil || err == io.EOF {
			t.Errorf("%s: %v, want an error", name, err)
		}
	}
	for name, in := range map[string][]byte{
		"header cut":  header(1, 0)[:5],
		"message cut": append(header(9, 0), 1, 2),
	} {
		if _, err := (&Reader{R: bytes.NewReader(in)}).Read(&guestv1.Request{}); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s: %v, want io.ErrUnexpectedEOF", name, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	var seed bytes.Buffer
	if err := Write(&seed, &guestv1.Request{Id: 9, Call: &guestv1.Request_Read{Read: &guestv1.ReadRequest{Execution: "x"}}}, []byte("p")); err != nil {
		f.Fatal(err)
	}
	f.Add(seed.Bytes())
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := &Reader{R: bytes.NewReader(in)}
		for {
			var m guestv1.Request
			n, err := r.Read(&m)
			if err != nil {
				return
			}
			if n > MaxPayload {
				t.Fatalf("payload of %d bytes was let through", n)
			}
			if _, err := io.CopyN(io.Discard, r.R, int64(n)); err != nil {
				return
			}
		}
	})
}
