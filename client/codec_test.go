package client

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"google.golang.org/grpc/encoding"
	grpcproto "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

func newCodec() codec { return codec{encoding.GetCodecV2(grpcproto.Name)} }

// pieces cuts a message as the transport does, or otherwise.
func pieces(b []byte, at ...int) (s mem.BufferSlice) {
	from := 0
	for _, to := range at {
		to = min(max(to, from), len(b))
		s = append(s, mem.SliceBuffer(b[from:to]))
		from = to
	}
	return append(s, mem.SliceBuffer(b[from:]))
}

// checkDecoding compares what the codec makes of bytes with what proto.Unmarshal does,
// and says whether they took the short way.
func checkDecoding(t *testing.T, b []byte, at ...int) (short bool) {
	t.Helper()
	untouched := bytes.Clone(b)
	for _, pair := range [][2]proto.Message{
		{new(executorv1.ExecuteResponse), new(executorv1.ExecuteResponse)},
		{&executorv1.WatchExecutionResponse{Event: &executorv1.Event{Cursor: &executorv1.Cursor{Epoch: "old"}}}, new(executorv1.WatchExecutionResponse)},
	} {
		got, want := pair[0], pair[1]
		wantErr := proto.Unmarshal(b, want)
		data := pieces(b, at...)
		err := newCodec().Unmarshal(data, got)
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("error %v, want %v, for %x", err, wantErr, b[:min(len(b), 200)])
		}
		if err == nil && !proto.Equal(got, want) {
			t.Fatalf("%x is decoded as\n%v\nwant\n%v", b[:min(len(b), 200)], got, want)
		}
	}
	e := decodeOutput(pieces(b, at...))
	if e != nil {
		// grpc takes its memory back.
		clear(b)
		m := new(executorv1.ExecuteResponse)
		if err := proto.Unmarshal(untouched, m); err != nil || !proto.Equal(e, m.GetEvent()) {
			t.Fatal("the event shares the message's memory")
		}
	}
	return e != nil
}

func outputOf(data []byte) *executorv1.ExecuteResponse {
	return &executorv1.ExecuteResponse{Event: &executorv1.Event{
		Cursor: &executorv1.Cursor{Epoch: strings.Repeat("e", 32), Sequence: 1 << 40}, EventTime: timestamppb.Now(),
		Kind: &executorv1.Event_Output{Output: &executorv1.OutputChunk{Stream: executorv1.Stream_STREAM_STDOUT, Offset: 1 << 50, Data: data}},
	}}
}

func encode(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func fillRandom(random *rand.Rand, b []byte) []byte {
	for i := 0; i+8 <= len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], random.Uint64())
	}
	return b
}

func TestOutputIsDecodedAsEver(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	number := func() int64 {
		return []int64{0, 1, -1, 127, 128, math.MaxInt64, math.MinInt64, random.Int64()}[random.IntN(8)] >> random.IntN(64)
	}
	short := 0
	for range 3000 {
		data := fillRandom(random, make([]byte, []int{0, 1, 1023, 1024, 16384, 31744, random.IntN(31744)}[random.IntN(7)]))
		m := outputOf(data)
		chunk := m.GetEvent().GetOutput()
		chunk.Stream, chunk.Offset = executorv1.Stream(number()), number()
		if m.Event.Cursor = nil; random.IntN(8) > 0 {
			m.Event.Cursor = &executorv1.Cursor{Epoch: strings.Repeat("é", random.IntN(3)*random.IntN(80)), Sequence: uint64(number())}
		}
		if m.Event.EventTime = nil; random.IntN(8) > 0 {
			m.Event.EventTime = &timestamppb.Timestamp{Seconds: number(), Nanos: int32(number())}
		}
		b := encode(t, m)
		if checkDecoding(t, b, random.IntN(200), random.IntN(len(b)+1), 16379) {
			short++
		}
	}
	if short < 1000 {
		t.Errorf("only %d messages took the short way", short)
	}
}

// TestOddMessagesAreDecodedAsEver is about what the short way must leave to the long one.
func TestOddMessagesAreDecodedAsEver(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 128)
	field := func(n protowire.Number, content ...[]byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), bytes.Join(content, nil))
	}
	number := func(n protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), v)
	}
	cursor, when := field(1, field(1, []byte("e")), number(2, 7)), field(2, number(1, 5), number(2, 6))
	output := field(4, number(1, 1), number(2, 9), field(3, data))
	for name, b := range map[string][]byte{
		"nothing":                     nil,
		"no event":                    field(7, data),
		"two events":                  append(field(1, output), field(1, output)...),
		"something behind the event":  append(field(1, cursor, when, output), number(9, 1)...),
		"something before the event":  append(number(9, 1), field(1, cursor, when, output)...),
		"another order":               field(1, output, cursor, when),
		"two cursors":                 field(1, cursor, cursor, when, output),
		"two outputs":                 field(1, cursor, when, output, output),
		"output, then a gap":          field(1, cursor, when, output, field(5)),
		"a field of later versions":   field(1, cursor, when, number(90, 1), output),
		"and in the cursor":           field(1, field(1, field(1, []byte("e")), number(2, 7), number(3, 7)), when, output),
		"and in the time":             field(1, cursor, field(2, number(1, 5), number(2, 6), number(3, 7)), output),
		"and in the output":           field(1, cursor, when, field(4, number(1, 1), number(2, 9), field(3, data), number(4, 1))),
		"and before the data":         field(1, cursor, when, field(4, number(4, 1), field(3, data))),
		"data twice":                  field(1, field(4, field(3, data), field(3, data))),
		"a number as a string":        field(1, field(4, field(2, []byte("x")), field(3, data))),
		"an epoch that is not UTF-8":  field(1, field(1, field(1, []byte{0xff})), output),
		"a long epoch":                field(1, field(1, field(1, bytes.Repeat([]byte("e"), 300))), output),
		"an output that is too long":  field(1, cursor, when, append(output[:1:1], 0xff, 0xff, 0x01)),
		"a size beyond all":           append([]byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f}, data...),
		"an endless number":           append([]byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, data...),
		"a cursor over the event":     append(append([]byte{0x0a}, protowire.AppendVarint(nil, 2000)...), append([]byte{0x0a, 0xff, 0xff, 0x7f}, data[:1996]...)...),
		"a group":                     field(1, protowire.AppendTag(nil, 3, protowire.StartGroupType), protowire.AppendTag(nil, 3, protowire.EndGroupType), output),
		"nothing but data":            data,
		"field number 0":              append([]byte{0x02, 0x00}, field(1, output)...),
		"the end of the event is off": field(1, cursor, when, output)[:2000],
	} {
		t.Run(name, func(t *testing.T) {
			if checkDecoding(t, b, 1, 2, 3, 100) {
				t.Error("took the short way")
			}
		})
	}
	for name, b := range map[string][]byte{
		"whole":     field(1, cursor, when, output),
		"no cursor": field(1, when, output), "no time": field(1, cursor, output), "bare": field(1, field(4, field(3, data))),
		"empty cursor and time": field(1, field(1), field(2), output),
	} {
		t.Run(name, func(t *testing.T) {
			for at := range 40 {
				if !checkDecoding(t, bytes.Clone(b), at, at+1, at+20) {
					t.Error("did not take the short way")
				}
			}
		})
	}
	t.Run("cut off anywhere", func(t *testing.T) {
		b := encode(t, outputOf(data))
		for n := range len(b) {
			checkDecoding(t, b[:n:n])
		}
	})
}

func FuzzDecodeOutput(f *testing.F) {
	b := encode(f, outputOf(make([]byte, 1100)))
	f.Add(b, 50)
	f.Add(b[:1000], 0)
	f.Fuzz(func(t *testing.T, b []byte, at int) {
		checkDecoding(t, bytes.Clone(b), at)
		// Behind so much that the short way is considered, whatever b is.
		checkDecoding(t, append(bytes.Clone(b), make([]byte, minOutput)...), at)
		// As the head of a message whose sizes agree.
		inner := protowire.AppendBytes(append(bytes.Clone(b), 0x1a), make([]byte, minOutput))
		event := protowire.AppendBytes([]byte{0x22}, inner)
		checkDecoding(t, protowire.AppendBytes([]byte{0x0a}, event), at)
		event = protowire.AppendBytes(append(bytes.Clone(b), 0x22), protowire.AppendBytes([]byte{0x1a}, make([]byte, minOutput)))
		checkDecoding(t, protowire.AppendBytes([]byte{0x0a}, event), at)
	})
}

func BenchmarkDecodeOutput(b *testing.B) {
	message := encode(b, outputOf(make([]byte, 31744)))
	data := pieces(message, 16379)
	for name, unmarshal := range map[string]func(mem.BufferSlice, any) error{"here": newCodec().Unmarshal, "standard": newCodec().CodecV2.Unmarshal} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(31744)
			b.ReportAllocs()
			for b.Loop() {
				if err := unmarshal(data, new(executorv1.ExecuteResponse)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
