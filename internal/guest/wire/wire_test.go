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

func TestWriteLeavesThePipeAloneOnBadMessages(t *testing.T) {
	for name, m := range map[string]*guestv1.Request{
		"not UTF-8": {Call: &guestv1.Request_Start{Start: &guestv1.StartRequest{Args: []string{"\xff"}}}},
		"too large": {Call: &guestv1.Request_Start{Start: &guestv1.StartRequest{Source: make([]byte, MaxMessage)}}},
	} {
		var pipe bytes.Buffer
		if err := Write(&pipe, m); !errors.Is(err, ErrUnsendable) || pipe.Len() > 0 {
			t.Errorf("%s: %v after %d bytes", name, err, pipe.Len())
		}
	}
	broken := errors.New("broken")
	if err := Write(brokenWriter{broken}, &guestv1.Request{}); !errors.Is(err, broken) || errors.Is(err, ErrUnsendable) {
		t.Errorf("a broken pipe: %v", err)
	}
}

type brokenWriter struct{ err error }

func (w brokenWriter) Write([]byte) (int, error) { return 0, w.err }

func TestReadLimit(t *testing.T) {
	var pipe bytes.Buffer
	m := &guestv1.Request{Call: &guestv1.Request_Start{Start: &guestv1.StartRequest{Source: make([]byte, 1000)}}}
	if err := Write(&pipe, m); err != nil {
		t.Fatal(err)
	}
	size := uint32(proto.Size(m))
	for limit, ok := range map[uint32]bool{0: true, size: true, size - 1: false, 1: false} {
		r := &Reader{R: bytes.NewReader(pipe.Bytes()), Limit: limit}
		if _, err := r.Read(new(guestv1.Request)); (err == nil) != ok {
			t.Errorf("a message of %d bytes with the limit %d: %v", size, limit, err)
		}
	}
}

// TestReadHoldsLittle reads one large message and looks at what is kept of it.
func TestReadHoldsLittle(t *testing.T) {
	var pipe bytes.Buffer
	for _, n := range []int{MaxMessage / 2, 100} {
		m := &guestv1.Request{Call: &guestv1.Request_Start{Start: &guestv1.StartRequest{Source: bytes.Repeat([]byte{byte(n)}, n)}}}
		if err := Write(&pipe, m); err != nil {
			t.Fatal(err)
		}
	}
	r := &Reader{R: &pipe}
	large, small := new(guestv1.Request), new(guestv1.Request)
	if _, err := r.Read(large); err != nil {
		t.Fatal(err)
	}
	if cap(r.message) > 64<<10 {
		t.Errorf("%d bytes are kept after a large message", cap(r.message))
	}
	if _, err := r.Read(small); err != nil {
		t.Fatal(err)
	}
	if n := len(large.GetStart().GetSource()); n != MaxMessage/2 || large.GetStart().GetSource()[n-1] != 0 {
		t.Error("the first message changed when the second was read")
	}
}

// TestAnswersFit builds the largest answers that a guest gives.
func TestAnswersFit(t *testing.T) {
	read := &guestv1.ReadResponse{Exit: &guestv1.Exit{RunMicros: 1<<64 - 1, CpuUserMicros: 1<<64 - 1, MaxRssBytes: 1<<64 - 1}}
	for range MaxChunks {
		read.Chunks = append(read.Chunks, &guestv1.Chunk{Stream: guestv1.Stream_STREAM_STDERR, Size: 1 << 20})
	}
	if size := proto.Size(&guestv1.Response{Id: 1<<64 - 1, Answer: &guestv1.Response_Read{Read: read}}); size > MaxAnswer/4 {
		t.Errorf("an answer with the most chunks has %d bytes", size)
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
