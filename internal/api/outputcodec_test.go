package api

import (
	"bytes"
	"math"
	"math/rand/v2"
	"strings"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	executorv1 "github.com/harvest-run/executord/gen/harvest/executor/v1"
)

// checkEncoding compares what the codec makes of a message with what proto.Marshal
// does, and says whether the data was passed on as it is.
func checkEncoding(t *testing.T, message proto.Message, data []byte) (uncopied bool) {
	t.Helper()
	want, wantErr := proto.Marshal(message)
	got, err := newCodec().Marshal(message)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("error %v, want %v: %v", err, wantErr, message)
	}
	if err != nil {
		return false
	}
	defer got.Free()
	if b := got.Materialize(); !bytes.Equal(b, want) {
		t.Fatalf("%v\nis encoded as %x\nwant         %x", message, head(string(b), 200), head(string(want), 200))
	}
	last := got[len(got)-1].ReadOnlyData()
	return len(got) == 2 && len(data) > 0 && &last[0] == &data[0]
}

// responses are the messages that carry events.
func responses(e *executorv1.Event) []proto.Message {
	return []proto.Message{&executorv1.ExecuteResponse{Event: e}, &executorv1.WatchExecutionResponse{Event: e}}
}

func TestOutputIsEncodedAsEver(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	number := func() int64 {
		return []int64{0, 1, -1, 127, 128, math.MaxInt64, math.MinInt64, random.Int64()}[random.IntN(8)] >> random.IntN(64)
	}
	uncopied := 0
	for range 5000 {
		data := make([]byte, []int{0, 1, 1024, 1025, 16384, maxChunk, random.IntN(maxChunk)}[random.IntN(7)])
		e := &executorv1.Event{Kind: &executorv1.Event_Output{Output: &executorv1.OutputChunk{
			Stream: executorv1.Stream(number()), Offset: number(), Data: data,
		}}}
		if random.IntN(8) > 0 {
			e.Cursor = &executorv1.Cursor{Epoch: strings.Repeat("é", random.IntN(3)*random.IntN(40)), Sequence: uint64(number())}
		}
		if random.IntN(8) > 0 {
			e.EventTime = &timestamppb.Timestamp{Seconds: number(), Nanos: int32(number())}
		}
		for _, m := range responses(e) {
			if checkEncoding(t, m, data) {
				uncopied++
			}
		}
	}
	if uncopied < 1000 {
		t.Errorf("only %d messages were encoded without a copy", uncopied)
	}
}

// TestOddMessagesAreEncodedAsEver is about what the short way must leave to the long one.
func TestOddMessagesAreEncodedAsEver(t *testing.T) {
	data := make([]byte, maxChunk)
	output := func(change func(*executorv1.Event)) *executorv1.Event {
		e := &executorv1.Event{
			Cursor: &executorv1.Cursor{Epoch: "e", Sequence: 1}, EventTime: timestamppb.Now(),
			Kind: &executorv1.Event_Output{Output: &executorv1.OutputChunk{Data: data}},
		}
		change(e)
		return e
	}
	unknown := []byte{0xfa, 0x7f, 1, 'x'}
	for name, e := range map[string]*executorv1.Event{
		"none":                        nil,
		"empty":                       {},
		"no output":                   {Kind: &executorv1.Event_Output{}},
		"started":                     {Kind: &executorv1.Event_Started{Started: &executorv1.Started{Execution: "x"}}},
		"heartbeat":                   {Kind: &executorv1.Event_Heartbeat{Heartbeat: &executorv1.Heartbeat{}}},
		"not UTF-8":                   output(func(e *executorv1.Event) { e.Cursor.Epoch = "\xff" }),
		"unknown field of the event":  output(func(e *executorv1.Event) { e.ProtoReflect().SetUnknown(unknown) }),
		"unknown field of the cursor": output(func(e *executorv1.Event) { e.Cursor.ProtoReflect().SetUnknown(unknown) }),
		"unknown field of the time":   output(func(e *executorv1.Event) { e.EventTime.ProtoReflect().SetUnknown(unknown) }),
		"unknown field of the chunk":  output(func(e *executorv1.Event) { e.GetOutput().ProtoReflect().SetUnknown(unknown) }),
	} {
		t.Run(name, func(t *testing.T) {
			for _, m := range responses(e) {
				if checkEncoding(t, m, data) {
					t.Error("took the short way")
				}
			}
		})
	}
	t.Run("unknown field of the response", func(t *testing.T) {
		for _, m := range responses(output(func(*executorv1.Event) {})) {
			m.ProtoReflect().SetUnknown(unknown)
			if checkEncoding(t, m, data) {
				t.Error("took the short way")
			}
		}
	})
	t.Run("not a message", func(t *testing.T) {
		for _, v := range []any{nil, 7, (*executorv1.ExecuteResponse)(nil), (*executorv1.WatchExecutionResponse)(nil)} {
			if _, ok := encodeOutput(v); ok {
				t.Errorf("%T took the short way", v)
			}
		}
	})
}

func FuzzEncodeOutput(f *testing.F) {
	for _, m := range responses(outputProtoOf(7, make([]byte, 2000))) {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, m := range []proto.Message{new(executorv1.ExecuteResponse), new(executorv1.WatchExecutionResponse)} {
			if proto.Unmarshal(b, m) == nil {
				checkEncoding(t, m, nil)
			}
		}
	})
}

func outputProtoOf(sequence uint64, data []byte) *executorv1.Event {
	return &executorv1.Event{
		Cursor: &executorv1.Cursor{Epoch: strings.Repeat("e", 32), Sequence: sequence}, EventTime: timestamppb.Now(),
		Kind: &executorv1.Event_Output{Output: &executorv1.OutputChunk{Stream: executorv1.Stream_STREAM_STDOUT, Offset: int64(sequence), Data: data}},
	}
}

func BenchmarkEncodeOutput(b *testing.B) {
	message := &executorv1.WatchExecutionResponse{Event: outputProtoOf(1<<40, make([]byte, maxChunk))}
	for name, marshal := range map[string]func(any) (mem.BufferSlice, error){"here": newCodec().Marshal, "standard": newCodec().CodecV2.Marshal} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(maxChunk)
			b.ReportAllocs()
			for b.Loop() {
				data, err := marshal(message)
				if err != nil {
					b.Fatal(err)
				}
				data.Free()
			}
		})
	}
}
