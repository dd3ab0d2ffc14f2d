package client

import (
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// codec is gRPC's own, except that it decodes output with one copy instead of two and
// half as many allocations: output is nearly all that a busy stream has.
type codec struct {
	encoding.CodecV2
}

func withCodec() grpc.DialOption {
	return grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{encoding.GetCodecV2(grpcproto.Name)}))
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	switch m := v.(type) {
	case *executorv1.ExecuteResponse:
		if e := decodeOutput(data); e != nil {
			m.Reset()
			m.Event = e
			return nil
		}
	case *executorv1.WatchExecutionResponse:
		if e := decodeOutput(data); e != nil {
			m.Reset()
			m.Event = e
			return nil
		}
	}
	return c.CodecV2.Unmarshal(data, v)
}

const (
	// maxHead is the most that may stand before the data of an output event. It is some
	// 90 bytes from executord.
	maxHead = 256
	// minOutput is from how much data on the short way is taken.
	minOutput = 1 << 10
)

// outputEvent holds the parts of an output event, so that it takes one allocation.
type outputEvent struct {
	event  executorv1.Event
	cursor executorv1.Cursor
	time   timestamppb.Timestamp
	kind   executorv1.Event_Output
	chunk  executorv1.OutputChunk
}

// decodeOutput decodes a response whose event is output and which is written as executord
// writes it: every field at most once, in order, the data last. nil for all others,
// the bad ones included, which are left to the standard codec.
func decodeOutput(message mem.BufferSlice) *executorv1.Event {
	size := message.Len()
	if size < minOutput {
		return nil
	}
	var memory [maxHead]byte
	h := head{b: memory[:message.CopyTo(memory[:])], left: size}
	if h.size(1) != h.left { // the event is all of the response
		return nil
	}
	o := &outputEvent{}
	if n, ok := h.message(1); ok {
		rest := h.enter(n)
		o.cursor.Epoch = string(h.bytes(h.size(1)))
		o.cursor.Sequence = h.number(2)
		h.leave(rest)
		o.event.Cursor = &o.cursor
	}
	if n, ok := h.message(2); ok {
		rest := h.enter(n)
		o.time.Seconds = int64(h.number(1))
		o.time.Nanos = int32(h.number(2))
		h.leave(rest)
		o.event.EventTime = &o.time
	}
	if h.size(4) != h.left { // the output is all that is left of the event
		return nil
	}
	o.chunk.Stream = executorv1.Stream(h.number(1))
	o.chunk.Offset = int64(h.number(2))
	n := h.size(3)
	if h.bad || n != h.left || n < minOutput || !utf8.ValidString(o.cursor.GetEpoch()) {
		return nil
	}
	o.chunk.Data = make([]byte, n)
	copyFrom(message, size-n, o.chunk.Data)
	o.kind.Output = &o.chunk
	o.event.Kind = &o.kind
	return &o.event
}

// copyFrom copies what stands from a position on to the end.
func copyFrom(message mem.BufferSlice, position int, to []byte) {
	for _, piece := range message {
		b := piece.ReadOnlyData()
		skip := min(position, len(b))
		position -= skip
		to = to[copy(to, b[skip:]):]
	}
}

// head reads the beginning of a message. What it cannot read makes it bad.
type head struct {
	b []byte
	// left is how much is left of the message that is being read, in b or behind.
	left int
	bad  bool
}

// next says whether a field follows, and takes its tag.
func (h *head) next(field protowire.Number, wire protowire.Type) bool {
	if h.left == 0 {
		return false
	}
	number, kind, n := protowire.ConsumeTag(h.b)
	if n < 0 {
		h.bad = true
		return false
	}
	if number != field || kind != wire {
		return false // if nothing else expects it, the sizes will not agree
	}
	h.take(n)
	return true
}

func (h *head) take(n int) {
	if n < 0 || n > len(h.b) || n > h.left {
		h.bad, h.b, h.left = true, nil, 0
		return
	}
	h.b, h.left = h.b[n:], h.left-n
}

func (h *head) varint() uint64 {
	v, n := protowire.ConsumeVarint(h.b)
	h.take(n)
	return v
}

// number reads a field that is a number; 0 if it does not follow.
func (h *head) number(field protowire.Number) uint64 {
	if !h.next(field, protowire.VarintType) {
		return 0
	}
	return h.varint()
}

// message says whether a field with a size follows, and reads the size.
func (h *head) message(field protowire.Number) (int, bool) {
	if !h.next(field, protowire.BytesType) {
		return 0, false
	}
	v := h.varint()
	if v > uint64(h.left) {
		h.bad = true
		return 0, false
	}
	return int(v), !h.bad
}

// size is that of a field; 0 if it does not follow.
func (h *head) size(field protowire.Number) int {
	n, _ := h.message(field)
	return n
}

// bytes reads what a field consists of.
func (h *head) bytes(n int) []byte {
	if n > len(h.b) {
		h.bad = true
		return nil
	}
	b := h.b[:n]
	h.take(n)
	return b
}

// enter goes into a message within, and returns what is left behind it.
func (h *head) enter(size int) (rest int) {
	rest, h.left = h.left-size, size
	return rest
}

// leave goes back, which is only right at the inner message's end.
func (h *head) leave(rest int) {
	h.bad = h.bad || h.left != 0
	h.left = rest
}
